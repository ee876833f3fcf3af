"""Mel, gate and Tversky weight by phase, stop-token prices by its own errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tts_brain.losses.controller import AdaptiveLossController
from tts_brain.types import (
    GATE_WEIGHT,
    KNOBS,
    MEL_WEIGHT,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    TVERSKY_WEIGHT,
    Knob,
    Proposal,
    TrainingContext,
)

# As a move (``Knob.move``): so much at least, or what is left to the target, or a share of a short way would be too
# small a move to be made and the knob never come where it belongs.
_LEAST_MOVE = 0.02


class LossBalanceAgent:
    """Owns mel, gate and Tversky weight and the Tversky prices; the controller remembers the stop token's errors."""

    name: ClassVar[str] = "loss_balance"
    owns: ClassVar[tuple[str, ...]] = (MEL_WEIGHT, GATE_WEIGHT, TVERSKY_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA)

    def __init__(self, controller: AdaptiveLossController) -> None:
        self._controller = controller

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal:
        """A step of ``adaptation_rate`` toward each target, at least ``_LEAST_MOVE``."""
        targets = self._controller.targets(context.phase_posterior)
        rate = self._controller.adaptation_rate
        moves = {k: _toward(KNOBS[k], knobs[k], t, rate) for k, t in targets.items() if k in knobs}
        evidence = {f"{k}_target": t for k, t in targets.items()}
        errors = context.stop_errors
        stop = "stop token not seen yet"
        if errors is not None:
            evidence |= {"false_stops": errors[0], "missed_stops": errors[1]}
            stop = f"of the stops {errors[0]:.2%} are false and {errors[1]:.2%} missed"
        shown = {MEL_WEIGHT: "mel", GATE_WEIGHT: "gate", TVERSKY_WEIGHT: "Tversky"}
        goals = ", ".join(f"{name} toward {targets[knob]:.2f}" for knob, name in shown.items() if knob in knobs)
        reason = f"{context.phase.value}: {goals}; {stop}" if goals else stop
        return Proposal(self.name, moves, reason, evidence)

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        """Targets follow the phase; a single move teaches nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what the controller knows is the manager's to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def _toward(knob: Knob, current: float, target: float, share: float) -> float:
    way = abs(knob.move(current, target))
    return target if way <= _LEAST_MOVE else knob.approach(current, target, max(share, _LEAST_MOVE / way))
