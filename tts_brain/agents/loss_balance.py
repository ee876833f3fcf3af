"""Mel and gate weight by phase, stop-token prices by its own errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tts_brain.losses.controller import AdaptiveLossController
from tts_brain.types import GATE_WEIGHT, KNOBS, MEL_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA, Proposal, TrainingContext


class LossBalanceAgent:
    """Owns the mel and gate weights and the Tversky prices; the controller holds the state."""

    name: ClassVar[str] = "loss_balance"
    owns: ClassVar[tuple[str, ...]] = (MEL_WEIGHT, GATE_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA)

    def __init__(self, controller: AdaptiveLossController) -> None:
        self._controller = controller

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal:
        """A step of ``adaptation_rate`` toward each target."""
        targets = self._controller.targets(context.phase_posterior)
        rate = self._controller.adaptation_rate
        moves = {k: KNOBS[k].approach(knobs[k], t, rate) for k, t in targets.items() if k in knobs}
        evidence = {f"{k}_target": t for k, t in targets.items()}
        errors = context.stop_errors
        stop = "stop token not seen yet"
        if errors is not None:
            evidence |= {"false_stops": errors[0], "missed_stops": errors[1]}
            stop = f"{errors[0]:.2%} false and {errors[1]:.2%} missed stops"
        goals = f"mel toward {targets[MEL_WEIGHT]:.2f}, gate toward {targets[GATE_WEIGHT]:.2f}"
        reason = f"{context.phase.value}: {goals}; {stop}"
        return Proposal(self.name, moves, reason, evidence)

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        """Targets follow the phase; a single move teaches nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"controller": self._controller.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._controller.load_state_dict(state["controller"])
