"""A host's rate that jumps far above all before it, and the loss with it: a schedule, or a hand, that slipped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from statistics import median
from typing import Any

# Times the highest rate so far, in one step: no warm-up climbs like that.
_JUMP = 10.0
# A warm-up that begins at next to nothing may take its first steps in such bounds.
_STEPS_BEFORE = 20
# The loss is so many times its usual within so many steps: else the run bears it.
_LOSS_TOO, _WITHIN = 1.2, 10
_LOSSES_KEPT = 20


@dataclass(frozen=True, slots=True)
class Jump:
    """From one rate of the host's to another at a step, and the median loss before it."""

    step: int
    before: float
    now: float
    usual_loss: float


class RateJumps:
    """Looks at each step; keeps twenty losses and the highest rate."""

    def __init__(self) -> None:
        self._highest = 0.0
        self._steps = 0
        self._losses: list[float] = []
        self._pending: Jump | None = None

    def look(self, step: int, rate: float | None, loss: float) -> Jump | None:
        """The jump that the loss of this step bears out, once.

        Args:
            rate: the host's own, without the brain's multiplier; None where it does not say.
            loss: of the step, any unit above 0.
        """
        if rate is None or not (math.isfinite(rate) and rate > 0.0):
            return None
        self._steps += 1
        if self._steps > _STEPS_BEFORE and self._losses and rate >= _JUMP * self._highest:
            self._pending = Jump(step, self._highest, rate, median(self._losses))
        self._highest = max(self._highest, rate)
        pending = self._pending
        if pending is None:
            if math.isfinite(loss):
                self._losses = [*self._losses, loss][-_LOSSES_KEPT:]
            return None
        borne_out = not loss <= _LOSS_TOO * pending.usual_loss and pending.usual_loss > 0.0
        if borne_out or step - pending.step >= _WITHIN:
            self._pending = None
        return pending if borne_out else None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "highest": self._highest,
            "steps": self._steps,
            "losses": list(self._losses),
            "pending": None if self._pending is None else list(astuple(self._pending)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        highest, steps = float(state["highest"]), int(state["steps"])
        losses = [float(loss) for loss in state["losses"]]
        pending = None
        if state["pending"] is not None:
            step, before, now, usual = state["pending"]
            pending = Jump(int(step), float(before), float(now), float(usual))
        self._highest, self._steps, self._losses, self._pending = highest, steps, losses, pending
