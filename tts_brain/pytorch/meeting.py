"""Where the ranks of a data-parallel run come together: when, what they tell each other, and whether they agree.

When they meet hangs only on what the host makes all of them see alike (steps, and which of them were skipped), never on
a rank's own state: else one would wait for another that never comes.

A decision takes two exchanges: one vector of a fixed size (``tell``) and one number (``agree``).

| what happens | what comes of it |
|---|---|
| f of n >= 3f + 1 ranks report NaN, old steps or nonsense | outvoted (``coordination.consensus``); it is decided |
| fewer than 2f + 1 ranks report of the steps at hand | hold |
| two ranks come to different outcomes | hold, on all, in the state before |
| a rank is killed, or hangs for ``ranks.TIMEOUT`` | hold, from then on, on those that are left |
| the brain of a rank fails | it steps aside on all |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from tts_brain.coordination.consensus import digest, median_of_ranks, most_faulty, pack, row_width, unpack
from tts_brain.manager import NONFINITE_LIMIT
from tts_brain.pytorch.ranks import Ranks
from tts_brain.types import Observation


@dataclass(frozen=True, slots=True)
class Told:
    """What the ranks told each other; the same on all of them.

    Args:
        seen: of each step since the last time, merged; empty when too few ranks can be listened to.
        refused: indices of the ranks that reported of other steps.
        failed: the brain of a rank has failed.
    """

    seen: tuple[Observation, ...] = ()
    refused: tuple[int, ...] = ()
    failed: bool = False


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
        self._bad_runs = (0, 0)  # steps in a row: skipped, of a loss that was not finite

    def goes_on(self, step: int, decided_at: int, bad_runs: tuple[int, int]) -> None:
        """A run is resumed at ``step``, after so many steps in a row that were skipped, and of losses not finite."""
        self._told_at, self._decided_at, self._bad_runs = step, decided_at, bad_runs

    def forgive(self) -> None:
        """Forget how many steps in a row were skipped: earlier weights are back."""
        self._bad_runs = (0, 0)

    def due(self, step: int, *, skipped: bool, finite: bool) -> bool:
        """Is it time to decide? Call once per step.

        Args:
            skipped: its gradient was kept from the weights.
            finite: its loss was; the same on every rank.
        """
        skips, losses = self._bad_runs
        self._bad_runs = (skips + 1 if skipped or not finite else 0, 0 if finite else losses + 1)
        return step - self._decided_at >= self._every or NONFINITE_LIMIT in self._bad_runs

    def untold(self, step: int) -> bool:
        """Has there been a step since the ranks last told each other?"""
        return step > self._told_at

    def tell(self, step: int, mine: Sequence[Observation], *, failed: bool) -> Told:
        """What all ranks saw since the last time; one vector of 1 + ``decide_every`` · ``row_width`` numbers each.

        Args:
            mine: one observation for each step since then; anything else counts as a failure of this rank.

        Raises:
            RanksLost: a rank is gone, or did not come in time.
        """
        steps = np.arange(self._told_at + 1, step + 1)
        self._told_at = step
        # Of one size whatever a rank believes to have seen, as a gather of different sizes has no defined outcome.
        vector = np.full(1 + self._every * row_width(self._losses), np.nan)
        if not failed:
            with suppress(Exception):  # whatever it is, the others are waiting
                rows = pack(mine, self._losses)
                if len(rows) == len(steps):
                    vector[1 : 1 + rows.size] = rows.ravel()
                    vector[0] = 0.0
        return self._merge(self._ranks.gather(vector), steps)

    def _merge(self, vectors: np.ndarray, steps: np.ndarray) -> Told:
        if not (vectors[:, 0] == 0.0).all():
            return Told(failed=True)
        width = row_width(self._losses)
        rows = vectors[:, 1 : 1 + len(steps) * width].reshape(len(vectors), len(steps), width)
        stale = (rows[:, :, 0] != steps).any(axis=1)
        rows[stale] = np.nan
        refused = tuple(np.flatnonzero(stale).tolist())
        if len(rows) - len(refused) < 2 * most_faulty(len(rows)) + 1:
            return Told(refused=refused)
        return Told(tuple(unpack(median_of_ranks(rows), self._losses)), refused)

    def decided(self, step: int) -> None:
        """The next decision is due ``decide_every`` steps from here."""
        self._decided_at = step

    def same_outcome(self, state: Mapping[str, Any] | None) -> bool | None:
        """Have all ranks come to one and the same state?

        Args:
            state: plain values; None when this rank has come to none.

        Returns:
            None when a rank has come to none.

        Raises:
            RanksLost: a rank is gone, or did not come in time.
        """
        outcome = np.nan
        with suppress(Exception):  # the same: a rank that cannot say must not keep the others waiting
            outcome = np.nan if state is None else digest(state)
        outcomes = self._ranks.gather(np.array([outcome]))
        return None if np.isnan(outcomes).any() else bool((outcomes == outcomes[0]).all())
