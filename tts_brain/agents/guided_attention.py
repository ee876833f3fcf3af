"""The guided-attention weight and width and the forward-sum term, by the supervisor's smooth laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tts_brain.attention.supervisor import DynamicAttentionSupervisor
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    KNOBS,
    AttentionReport,
    Proposal,
    TrainingContext,
)

_SMALL_CHANCE = 0.05
_FAR = 2.0


def _feared(context: TrainingContext, report: AttentionReport) -> tuple[float, str]:
    """The ``attention_diag`` to guide by, and a remark: what is, or what it would be if the alignment were lost.

    The guide is drawn in as the chance of that within 50 steps grows, before there is a loss to see.
    """
    now, forecast = report.attention_diag, context.forecast
    chance = 0.0 if forecast is None else forecast.alignment_loss[1]
    if chance < _SMALL_CHANCE:
        return now, ""
    assert forecast is not None
    remark = f"; the alignment is lost within {forecast.horizons[1]} steps with a chance of {chance:.0%}"
    return now * (1.0 - 0.5 * chance), remark


class GuidedAttentionAgent:
    """Owns the guided weight (normalised), the guide's width, and the weight of the forward-sum term.

    Args:
        supervisor: gives the targets.
        adaptation_rate: share of the way (in moves, ``Knob.move``) to the target per decision, in (0, 1].
    """

    name: ClassVar[str] = "guided_attention"
    owns: ClassVar[tuple[str, ...]] = (GUIDED_WEIGHT, GUIDED_SIGMA, FORWARD_SUM_WEIGHT)

    def __init__(self, supervisor: DynamicAttentionSupervisor, adaptation_rate: float = 0.1) -> None:
        self._supervisor = supervisor
        self._rate = adaptation_rate

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal:
        """A small step toward the supervisor's targets; smaller while the phase is in doubt."""
        report = context.attention
        if report is None:
            return Proposal(self.name, {}, "attention not measured yet")
        feared, fear = _feared(context, report)
        targets = {
            GUIDED_WEIGHT: self._supervisor.weight(feared),
            GUIDED_SIGMA: self._supervisor.sigma(report),
            FORWARD_SUM_WEIGHT: self._supervisor.forward_sum(report),
        }
        # Two phases with equal odds take a quarter off the step, all four half of it.
        rate = self._rate * (0.5 + 0.5 * context.certainty)
        moves = {k: KNOBS[k].approach(knobs[k], t, rate) for k, t in targets.items() if k in knobs}
        sides = {"diagonality": report.diagonality, "focus": report.focus, "coverage": report.coverage}
        weakest = min(sides, key=lambda side: sides[side])
        far_off = self._far_off(knobs.get(GUIDED_WEIGHT))
        goals = {
            GUIDED_WEIGHT: f"guided weight {far_off}toward {targets[GUIDED_WEIGHT]:.2f}",
            GUIDED_SIGMA: f"width toward {targets[GUIDED_SIGMA]:.2f}",
            FORWARD_SUM_WEIGHT: f"forward-sum toward {targets[FORWARD_SUM_WEIGHT]:.3f}",
        }
        aims = ", ".join(goal for knob, goal in goals.items() if knob in knobs)
        where = f"attention_diag {report.attention_diag:.2f} (weakest side: {weakest})"
        reason = f"{where}: {aims}{fear}" if aims else f"{where}{fear}"
        evidence = {**sides, "attention_diag": report.attention_diag, "feared": feared, "rate": rate}
        if fear and context.forecast is not None:
            evidence |= context.forecast.evidence
        return Proposal(self.name, moves, reason, evidence)

    def _far_off(self, weight: float | None) -> str:
        """What to say of a weight that lies far outside of all that the law ever asks for; else nothing."""
        if weight is None:
            return ""
        if weight <= KNOBS[GUIDED_WEIGHT].low:  # as near to 0 as the knob goes
            return "is off: "
        if weight < self._supervisor.weight(1.0) / _FAR:
            return f"{weight:.3g} is too weak: "
        return f"{weight:.3g} is too strong: " if weight > self._supervisor.weight(0.0) * _FAR else ""

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        """The law has no memory."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
