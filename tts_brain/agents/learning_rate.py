"""The rate: raised while the loss falls and the gradients are calm, lowered when they are not.

The rate is the strongest lever on the loss (FACTS, pilot runs), and the fixed one is picked by luck. The agent is a
search with undo: it raises by half, the monitor compares what follows with what came before, and a raise that hurt is
taken back and remembered as a ceiling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from tts_brain.types import GRAD_CLIP, GRAD_CLIP_OFF, KNOBS, LEARNING_RATE, Proposal, TrainingContext, TrainingPhase

RAISE = 1.5
LOWER = 0.7
EASE = 0.85
_SMALLEST_RAISE = 1.1
_TOLERANCE = 1.05
TIGHT_CLIP = 3.0
_FALLS = -2.0
_RISES = 3.0
_SPIKY = 0.15
_CALM = 0.05
# A rate that changes a weight tensor by more than this share per step is not raised further.
_MAX_UPDATE_RATIO = 0.02
# After an undo, the rate stays this far under the one that hurt until the phase has changed.
_CEILING_SHARE = 0.75
_PLATEAU_DECISIONS = 6


class LearningRateAgent:
    """Owns the rate multiplier and the gradient clip.

    Args:
        max_learning_rate: the multiplied rate is never proposed above this (absolute).
    """

    name: ClassVar[str] = "learning_rate"
    owns: ClassVar[tuple[str, ...]] = (LEARNING_RATE, GRAD_CLIP)

    def __init__(self, max_learning_rate: float = 2e-3) -> None:
        self._max_rate = max_learning_rate
        self._ceiling = math.inf
        self._ceiling_phase = 0
        self._flat = 0

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal:
        """One move of the rate, with the clip tightened while gradients spike."""
        loss = context.trends.get("mel") or context.trends.get("total")
        if loss is None or loss.count < 4 or LEARNING_RATE not in knobs:
            return Proposal(self.name, {}, "too little seen yet to judge the rate")
        if context.phase.index > self._ceiling_phase:
            self._ceiling = math.inf
        self._flat = self._flat + 1 if abs(loss.z) < 1.0 else 0
        evidence = {
            "loss_z": loss.z,
            "grad_spikes": context.grad_spikes,
            "rate": context.learning_rate * knobs[LEARNING_RATE],
            "update_ratio": context.update_ratio,
        }
        factor, reason = self._factor(context, knobs[LEARNING_RATE], loss.z)
        moves = {} if factor == 1.0 else {LEARNING_RATE: knobs[LEARNING_RATE] * factor}
        clip, clip_reason = _clip(context, knobs.get(GRAD_CLIP))
        if clip is not None:
            moves[GRAD_CLIP] = clip
            reason = f"{reason}; {clip_reason}"
        return Proposal(self.name, moves, reason, evidence)

    def _factor(self, context: TrainingContext, multiplier: float, z: float) -> tuple[float, str]:
        rate = context.learning_rate * multiplier
        if multiplier > 1.0 and rate > self._max_rate * _TOLERANCE:
            return max(self._max_rate / rate, 1.0 / multiplier), f"the host's schedule carried the rate to {rate:.1e}"
        if z > _RISES:
            return LOWER, f"the loss rises (z {z:+.1f}): lower the rate"
        if context.grad_spikes > _SPIKY:
            return LOWER, f"{context.grad_spikes:.0%} of the gradient norms spike: lower the rate"
        stuck = self._flat >= _PLATEAU_DECISIONS
        if z < _FALLS or (stuck and context.phase.index < TrainingPhase.REFINEMENT.index):
            blocked = self._why_not_higher(context)
            if blocked:
                return 1.0, blocked
            limit, name = self._limit()
            factor = min(RAISE, limit / rate)
            if factor < _SMALLEST_RAISE:
                return 1.0, f"{rate:.1e} is as high as {name} allows ({limit:.1e})"
            why = f"the loss falls steadily (z {z:+.1f})" if z < _FALLS else "nothing moves and nothing is aligned"
            return factor, f"{why}, gradients calm: try a higher rate"
        if stuck:
            self._flat = 0
            return EASE, f"flat for {_PLATEAU_DECISIONS} decisions with an alignment in place: ease the rate"
        return 1.0, f"no clear direction (z {z:+.1f}): keep the rate"

    def _limit(self) -> tuple[float, str]:
        """The highest rate to try, and what sets it; an effective rate, as the host's schedule moves on."""
        near = self._ceiling * _CEILING_SHARE
        return (
            (near, f"the rate that hurt, {self._ceiling:.1e},")
            if near < self._max_rate
            else (
                self._max_rate,
                "max_learning_rate",
            )
        )

    def _why_not_higher(self, context: TrainingContext) -> str | None:
        if not context.learning_rate > 0.0:
            return "the host does not say its rate, or it is 0: no raise"
        if context.grad_spikes > _CALM:
            return f"{context.grad_spikes:.0%} of the gradient norms spike: no raise"
        if context.update_ratio > _MAX_UPDATE_RATIO:
            return f"weights already change by {context.update_ratio:.1%} per step: no raise"
        return None

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        """Remember a rate that hurt as the ceiling, until a later phase."""
        if kept or LEARNING_RATE not in moves:
            return
        old, new = moves[LEARNING_RATE]
        if new > old:
            rate = context.learning_rate * new
            self._ceiling = min(self._ceiling, rate if math.isfinite(rate) else math.inf)
            self._ceiling_phase = context.phase.index

    def state_dict(self) -> dict[str, Any]:
        return {"ceiling": self._ceiling, "ceiling_phase": self._ceiling_phase, "flat": self._flat}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ceiling = float(state["ceiling"])
        self._ceiling_phase = int(state["ceiling_phase"])
        self._flat = int(state["flat"])


def _clip(context: TrainingContext, current: float | None) -> tuple[float | None, str]:
    """Three medians while gradients spike, else back to off."""
    if current is None:
        return None, ""
    if context.grad_spikes > _CALM and current > TIGHT_CLIP:
        return TIGHT_CLIP, f"clip at {TIGHT_CLIP:.0f} median norms"
    if context.grad_spikes == 0.0 and current < GRAD_CLIP_OFF:
        return current * KNOBS[GRAD_CLIP].max_ratio, "no spikes left: release the clip"
    return None, ""
