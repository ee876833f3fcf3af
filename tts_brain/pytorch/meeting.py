"""Where the ranks of a data-parallel run come together: when, what they tell each other, and whether they agree.

When they meet hangs only on what the host makes all of them see alike (steps, and which of them were skipped), never on
a rank's own state: else one would wait for another that never comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from tts_brain.coordination.consensus import digest, median_of_ranks, pack, row_width, unpack
from tts_brain.manager import NONFINITE_LIMIT
from tts_brain.pytorch.ranks import Ranks
from tts_brain.types import Observation


class Meeting:
    """The meetings of one run.

    Args:
        ranks: several.
        losses: names that observations may have.
        decide_every: steps between decisions.
    """

    def __init__(self, ranks: Ranks, losses: Sequence[str], decide_every: int) -> None:
        self._ranks = ranks
        self._losses = losses
        self._every = decide_every
        self._decided_at = 0
        self._told_at = 0
        self._skipped_run = 0

    def goes_on(self, step: int, decided_at: int, skipped_run: int) -> None:
        """A run is resumed at ``step``."""
        self._told_at, self._decided_at, self._skipped_run = step, decided_at, skipped_run

    def forgive(self) -> None:
        """Forget how many steps in a row were skipped: earlier weights are back."""
        self._skipped_run = 0

    def due(self, step: int, *, skipped: bool) -> bool:
        """Is it time to decide? Call once per step."""
        self._skipped_run = self._skipped_run + 1 if skipped else 0
        return step - self._decided_at >= self._every or self._skipped_run == NONFINITE_LIMIT

    def untold(self, step: int) -> bool:
        """Has there been a step since the ranks last told each other?"""
        return step > self._told_at

    def tell(self, step: int, mine: Sequence[Observation], *, failed: bool) -> list[Observation] | None:
        """What all ranks saw since the last time, merged; None when one of them has failed.

        Args:
            mine: one observation for each step since then; anything else counts as a failure of this rank.
        """
        rows = np.zeros((step - self._told_at, row_width(self._losses)))
        self._told_at = step
        if not failed:
            failed = True
            with suppress(Exception):  # whatever it is, the others are waiting
                rows[:] = pack(mine, self._losses)
                failed = False
        everybody = self._ranks.gather(np.append(rows.ravel(), float(failed)))
        if everybody[:, -1].any():
            return None
        return unpack(median_of_ranks(everybody[:, :-1].reshape(-1, *rows.shape)), self._losses)

    def decided(self, step: int) -> None:
        """The next decision is due ``decide_every`` steps from here."""
        self._decided_at = step

    def agree(self, state: Mapping[str, Any] | None) -> bool:
        """Have all ranks come to one and the same state? None when this one has come to none."""
        outcome = None
        with suppress(Exception):  # the same: a rank that cannot say must not keep the others waiting
            outcome = None if state is None else digest(state)
        return self._ranks.agree(outcome)
