"""How a run stands, in three scores: does the loss come down, are the gradients healthy, how good is the attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from tts_brain.context.reading import MAX_UPDATE_RATIO, fast_swing, slope_z
from tts_brain.types import TrainingContext

CONVERGENCE, GRADIENT_HEALTH, ATTENTION_QUALITY = "convergence", "gradient_health", "attention_quality"

# Twice the share of spikes at which the rate is lowered: half the health there.
_ALL_SPIKES = 0.3


@dataclass(frozen=True, slots=True)
class Criterion:
    """One score in [0, 1], 1 is good, and the sentence that says why."""

    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class Criteria:
    """The three of one moment."""

    convergence: Criterion
    gradient_health: Criterion
    attention_quality: Criterion

    @property
    def by_name(self) -> Mapping[str, Criterion]:
        """In the order above."""
        return {
            CONVERGENCE: self.convergence,
            GRADIENT_HEALTH: self.gradient_health,
            ATTENTION_QUALITY: self.attention_quality,
        }

    def need(self, name: str) -> float:
        """1 minus the score: how much a gain in it is worth now."""
        return 1.0 - self.by_name[name].score


def criteria(context: TrainingContext) -> Criteria:
    """Score a context. What has not been seen yet scores 0.5 (loss, attention) or is taken for healthy (gradients).

    - convergence: probability that the judged loss falls, Φ(-z) of its filtered slope (of its trend where nothing was
      filtered). A flat loss has 0.5, whatever its level: levels mean nothing across hosts.
    - gradient health: 1 less the share of spikes over 0.3, times 0.02 / ``update_ratio`` where that is below 1, times
      ½ while the loss swings within 12 steps; 0 after a loss that was not finite.
    - attention quality: the smoothed ``attention_diag``.
    """
    return Criteria(_convergence(context), _gradient_health(context), _attention_quality(context))


def _convergence(context: TrainingContext) -> Criterion:
    z = slope_z(context)
    if z is None:
        return Criterion(0.5, "too little seen of the loss")
    score = 0.5 * math.erfc(z / math.sqrt(2.0))
    way = "falls" if score > 0.9 else "rises" if score < 0.1 else "has no clear direction"
    return Criterion(score, f"the loss {way} (z {z:+.1f})")


def _gradient_health(context: TrainingContext) -> Criterion:
    if context.nonfinite_losses:
        return Criterion(0.0, f"the losses of {context.nonfinite_losses} steps in a row were not finite")
    spikes = min(max(1.0 - context.grad_spikes / _ALL_SPIKES, 0.0), 1.0)
    # A ratio that is not known is NaN, and fails the comparison.
    ratio = MAX_UPDATE_RATIO / context.update_ratio if context.update_ratio > MAX_UPDATE_RATIO else 1.0
    calm = 1.0 if fast_swing(context) is None else 0.5
    faults = [f"{context.grad_spikes:.0%} of the gradient norms spike"] if spikes < 1.0 else []
    faults += [f"weights change by {context.update_ratio:.1%} a step"] if ratio < 1.0 else []
    faults += ["the loss swings"] if calm < 1.0 else []
    return Criterion(spikes * ratio * calm, ", ".join(faults) or "gradients are calm")


def _attention_quality(context: TrainingContext) -> Criterion:
    report = context.attention
    if report is None or math.isnan(report.attention_diag):
        return Criterion(0.5, "attention is not measured")
    sides = {"diagonality": report.diagonality, "focus": report.focus, "coverage": report.coverage}
    weakest = min(sides, key=lambda side: sides[side])
    score = min(max(report.attention_diag, 0.0), 1.0)
    return Criterion(score, f"attention_diag {score:.2f}, best {context.best_attention_diag:.2f}, weakest {weakest}")
