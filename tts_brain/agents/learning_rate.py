"""The rate: raised while the loss falls and the gradients are calm, lowered when they are not.

The rate is the strongest lever on the loss (FACTS, pilot runs), and the fixed one is picked by luck. The agent is a
search with undo: it doubles the rate, later raises it by half, the monitor compares what follows with what came before,
and a raise that hurt is taken back and remembered as a ceiling. While there is no alignment to lose, a higher rate is
tried unless the loss rises (a range test, Smith 2017), up to a usual one; beyond it, or later, only while the loss
surely falls. A rate that proves too high later, as the loss jumps up and stays, or comes down no further, is a ceiling
too. Once there is an alignment to hold, a rate above the usual comes back to it.

A host's own schedule goes on below the multiplier. Where it climbs, it does not carry the rate beyond what the search
has come to; where it falls, that counts as an ease. A model that was trained before is not searched at all: its rate is
low on purpose, and its loss falls at first under any.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from tts_brain.context.reading import FALLS, MAX_UPDATE_RATIO, RISES, fast_swing, slope_z
from tts_brain.types import (
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    KNOBS,
    LEARNING_RATE,
    FilterReport,
    Forecast,
    Proposal,
    TrainingContext,
    TrainingPhase,
)

RAISE = 1.5
SEARCH = 2.0
LOWER = 0.7
EASE = 0.85
_SMALLEST_RAISE = 1.1
_TOLERANCE = 1.05
# Of the highest rate, what is usual: as far as it is tried while the loss merely does not rise. Whether a model bears
# more is not said by its size (ESPnet's full Tacotron2 does, Coqui's does not on real speech), nor by how far its
# weights move, but by its loss: where more pays it falls by 4 to 11 standard errors about there, and by 0 to 2 in those
# runs of Coqui's.
_USUAL_SHARE = 0.5
# So sure a fall is worth twice the rate at once.
_STEEP = 2.0 * FALLS
# So many times the host's rate, and the loss bears it: the host's is said to be too low.
_FAR_OVER = 8.0
TIGHT_CLIP = 3.0
_LEVEL = 1.0
_SPIKY = 0.15
_CALM = 0.05
# A loss scale that is looked for leaves out every other step at worst, and the rate is not to blame.
_MOST_LEFT_OUT = 0.6
# At a tenth of what healthy runs show, the rate is far from where it matters, and is doubled instead.
_TIMID_UPDATE_RATIO = 3e-4
# Under this a rate above the highest is an ordinary one, whatever its number: Adam at 1e-2 changes weights by some 1 %.
_ORDINARY_UPDATE_RATIO = 1.5e-3
# Probability of divergence within 25 steps, by the temporal model, above which the rate is not raised.
_UNSAFE = 0.2
# After an undo, the rate stays this far under the one that hurt, until a later phase or for so many decisions: what a
# rate does changes as the training goes on, and a verdict may have been wrong.
_CEILING_SHARE, _CEILING_DECISIONS = 0.75, 15
_PLATEAU_DECISIONS = 6
# Noise widths of one loss: by so much it has fallen over a plateau that is none, though no decision alone could tell.
# On long clips it falls by 2 to 8 then, under a rate that full-size Tacotron2 does not bear by 0.5 at most.
_FALLS_SLOWLY = 1.0
# Noise widths of one loss by which its level may stand above the lowest of the newest decisions, and how often in a row
# it must stand higher: on noise alone, normal or with heavy tails, 2 of 40,000 decisions did.
_STANDS_HIGH, _HIGH_DECISIONS, _NEWEST, _SETTLED = 2.0, 2, 20, 20
_MOST = 1e6
# So much of its highest rate since the last ease: a host's own schedule has eased it. The schedule of Vaswani et al.
# comes so far in the time that the next line grants to an ease.
_EASED_BY_HOST = 0.9
# A plateau of so many decisions eases the rate, but after the first 50 of them only if 0.28 of all decisions (less
# _YOUNG) have gone by since it was eased last: it falls about as the inverse square root of the steps, as the schedule
# of Vaswani et al. (2017) does, and not to nothing in a long run whose loss always looks flat.
_SHARE_OF_RUN, _YOUNG = 0.28, 8.5


class LearningRateAgent:
    """Owns the rate multiplier and the gradient clip.

    Args:
        max_learning_rate: the multiplied rate is never proposed above this (absolute), nor above half of it unless the
            loss surely falls and there is no alignment to hold.
    """

    name: ClassVar[str] = "learning_rate"
    owns: ClassVar[tuple[str, ...]] = (LEARNING_RATE, GRAD_CLIP)

    def __init__(self, max_learning_rate: float = 1e-2) -> None:
        self._max_rate = max_learning_rate
        self._usual = _USUAL_SHARE * max_learning_rate
        self._ceiling = math.inf
        self._ceiling_phase = 0
        self._ceiling_age = 0
        self._flat = 0
        self._decisions = 0
        self._eased_at = 0  # by the count of decisions
        self._lowest = RecentLowest()
        self._high = 0
        self._fell = 0.0  # of the decision under way
        self._multiplier = 1.0
        self._meant = 0.0  # the rate that the multiplier made when it came to be what it is
        self._host = 0.0  # at the decision before
        self._host_high = 0.0  # since the last ease

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal:
        """One move of the rate, with the clip tightened while gradients spike."""
        if LEARNING_RATE in knobs:
            self._follow(context.learning_rate, knobs[LEARNING_RATE])
        z = slope_z(context)
        clip, clip_reason = _clip(context, knobs.get(GRAD_CLIP))
        tightened = {} if clip is None else {GRAD_CLIP: clip}
        if LEARNING_RATE not in knobs:
            reason = clip_reason or "the rate is not steered"
            return Proposal(self.name, tightened, reason, {"grad_spikes": context.grad_spikes})
        if z is None:
            return Proposal(self.name, {}, "too little seen yet to judge the rate")
        self._decisions += 1
        self._ceiling_age += 1
        if context.phase.index > self._ceiling_phase or self._ceiling_age > _CEILING_DECISIONS:
            self._ceiling = math.inf
        self._flat = self._flat + 1 if abs(z) < 1.0 else 0
        above = self._lowest.above(context.filtered.get("loss"))
        self._high = self._high + 1 if above > _STANDS_HIGH else 0
        self._fell = self._lowest.fell(context.filtered.get("loss"), _PLATEAU_DECISIONS)
        evidence = {
            "loss_z": round(z, 6),  # the last digits hang on the loss's unit, and no record of a decision may
            "above_lowest": round(above, 3),
            "fell": round(self._fell, 3),
            "grad_spikes": context.grad_spikes,
            "rate": context.learning_rate * knobs[LEARNING_RATE],
            "update_ratio": context.update_ratio,
        }
        if context.forecast is not None:
            evidence |= _expected(context.forecast, context.filtered.get("loss"))
        factor, reason = self._factor(context, knobs, z)
        moves = {} if factor == 1.0 else {LEARNING_RATE: knobs[LEARNING_RATE] * factor}
        reason = f"{reason}; {clip_reason}" if tightened else reason
        return Proposal(self.name, moves | tightened, reason, evidence)

    def _follow(self, host: float, multiplier: float) -> None:
        """What the host's own schedule has done since the multiplier moved."""
        if not math.isfinite(host):
            return
        if multiplier != self._multiplier:
            self._multiplier, self._meant = multiplier, (self._host or host) * multiplier
        self._host, self._host_high = host, max(self._host_high, host)

    def _factor(self, context: TrainingContext, knobs: Mapping[str, float], z: float) -> tuple[float, str]:
        multiplier = knobs[LEARNING_RATE]
        rate = context.learning_rate * multiplier
        most = min(self._max_rate, max(self._meant, self._limit(context, pays=False)[0]))
        if multiplier > 1.0 and rate > most * _TOLERANCE:
            return max(most / rate, 1.0 / multiplier), f"the host's schedule carried the rate to {rate:.1e}"
        harm = _why_lower(context, z, knobs.get(GRAD_CLIP))
        if harm:
            return LOWER, f"{harm}: lower the rate"
        if self._high >= _HIGH_DECISIONS and z > FALLS:
            # Once per jump: the way back down takes longer than two decisions, and cut upon cut would end in nothing.
            self._high = 0
            self._lowest.forget()
            self._forbid(rate, context)
            return LOWER, f"the loss has jumped up by over {_STANDS_HIGH:.0f} noise widths and stays: lower the rate"
        searching = _searching(context)
        if not searching and z > FALLS and multiplier > 1.0 and self._too_high(context, rate):
            why = f"there is an alignment to hold, and {rate:.1e} is above the usual {self._usual:.1e}"
            return max(EASE, self._usual / rate, 1.0 / multiplier), f"{why}: ease the rate"
        if self._plateau():
            factor = self._ease(context, rate, multiplier)
            if factor < 1.0:
                eased = context.learning_rate < _EASED_BY_HOST * self._host_high
                self._flat, self._eased_at, self._host_high = 0, self._decisions, context.learning_rate
                flat = f"flat for {_PLATEAU_DECISIONS} decisions or more"
                if eased:
                    return 1.0, f"{flat}, and the host's own schedule lowers the rate: keep the multiplier"
                self._forbid(rate, context)
                if self._too_high(context, context.learning_rate):
                    return factor, f"{flat}, and the rate {rate:.1e} is too high for a higher one to help: ease it"
                return factor, f"{flat}, higher is no way out: ease the rate"
        if z < FALLS or (searching and z < _LEVEL):
            return self._raise(context, rate, z)
        return 1.0, f"no clear direction (z {z:+.1f}): keep the rate"

    def _ease(self, context: TrainingContext, rate: float, multiplier: float) -> float:
        """Where the loss is flat: factor of the rate, 1 where a higher one is still to be tried."""
        if not _searching(context) or self._too_high(context, rate):
            return EASE  # also of a host that began above the usual: it may be why nothing moves
        if context.phase is TrainingPhase.PRE_ALIGNMENT or rate < self._limit(context, pays=False)[0] / _SMALLEST_RAISE:
            return 1.0
        if self._fell > _FALLS_SLOWLY:
            return 1.0
        # The search has come to the top, attention is forming, and the loss comes down no further: its noise is the
        # rate's (full-size Tacotron2). Back, but not below where the host began, as no alignment is there yet.
        return min(max(LOWER, 1.0 / multiplier), 1.0)

    def _too_high(self, context: TrainingContext, rate: float) -> bool:
        """Above the usual, and not one of an optimizer whose rates are of another size (SGD, Adadelta)."""
        return rate > self._usual * _TOLERANCE and not context.update_ratio < _ORDINARY_UPDATE_RATIO

    def _forbid(self, rate: float, context: TrainingContext) -> None:
        """Keep under this rate for a while."""
        self._ceiling = min(self._ceiling, rate) if math.isfinite(rate) else self._ceiling
        self._ceiling_phase, self._ceiling_age = context.phase.index, 0

    def _plateau(self) -> bool:
        since = self._decisions - self._eased_at
        return self._flat >= _PLATEAU_DECISIONS and since >= _SHARE_OF_RUN * self._decisions - _YOUNG

    def _raise(self, context: TrainingContext, rate: float, z: float) -> tuple[float, str]:
        blocked = self._why_not_higher(context, rate, z)
        if blocked:
            return 1.0, blocked
        limit, name = self._limit(context, pays=z < FALLS and _searching(context))
        timid = context.update_ratio < _TIMID_UPDATE_RATIO
        # Up to the usual rate each decision that is lost to a lower one is lost to the alignment too.
        fast = timid or (_searching(context) and (rate < self._usual or z < _STEEP))
        # Two phases with equal odds: three quarters of the way, in logarithms; all four: half of it.
        wish = (SEARCH if fast else RAISE) ** (0.5 + 0.5 * context.certainty)
        factor = min(wish, limit / rate)
        if factor < 1.0 / _TOLERANCE:
            return 1.0, f"{rate:.1e} is above {name}, {limit:.1e}, and stays while the loss does not rise"
        if factor < _SMALLEST_RAISE:
            return 1.0, f"{rate:.1e} is as high as {name} allows, {limit:.1e}"
        why = f"the loss falls steadily (z {z:+.1f})" if z < FALLS else f"the loss does not rise (z {z:+.1f})"
        calm = ", gradients calm" if context.grad_spikes <= _CALM else ""
        also = f", weights change by {context.update_ratio:.2%} a step only" if timid else calm
        too_low = min(rate, self._usual) > _FAR_OVER * context.learning_rate
        host = f"; the host's own rate, {context.learning_rate:.1e} now, is too low" if too_low else ""
        return factor, f"{why}{also}: try a higher rate{host}"

    def _limit(self, context: TrainingContext, *, pays: bool) -> tuple[float, str]:
        """The highest rate to try, and what sets it; an effective rate, as the host's schedule moves on.

        Args:
            pays: the loss surely falls, and there is no alignment to lose.
        """
        near = self._ceiling * _CEILING_SHARE
        top, name = (self._max_rate, "max_learning_rate") if pays else (self._usual, "the usual rate")
        # Not above the usual or the highest rate all the same: a host that began there may have to come down.
        if context.found_trained and context.learning_rate < top:
            top, name = context.learning_rate, "the host's own rate, for a model trained before,"
        if near < top:
            return near, f"three quarters of the rate that hurt, {self._ceiling:.1e}"
        return top, name

    def _why_not_higher(self, context: TrainingContext, rate: float, z: float) -> str | None:
        if not rate > 0.0:  # nor a product that rounds to 0
            return "the host does not say its rate, or it is 0: no raise"
        # While the loss surely falls, a few are of the fall itself: norms grow as a model leaves its first plateau.
        if context.grad_spikes > (_SPIKY if z < FALLS else _CALM):
            return f"{context.grad_spikes:.0%} of the gradient norms spike: no raise"
        if context.left_out > _MOST_LEFT_OUT:
            return f"{context.left_out:.0%} of the steps were left out, gradients not finite: no raise"
        forecast, loss = context.forecast, context.filtered.get("loss")
        if forecast is not None and forecast.divergence[0] > _UNSAFE:
            return f"divergence within {forecast.horizons[0]} steps is {forecast.divergence[0]:.0%} likely: no raise"
        # Runs whose rate is too high to come further down look so long before their loss rises, which it may never do.
        if forecast is not None and loss is not None and forecast.loss[0][1] > loss.level:
            return f"the loss is not expected to be lower in {forecast.horizons[0]} steps: no raise"
        if context.update_ratio > MAX_UPDATE_RATIO:
            return f"weights already change by {context.update_ratio:.1%} per step: no raise"
        return None

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        """Remember a rate that hurt as the ceiling, for a while."""
        if kept or LEARNING_RATE not in moves:
            return
        old, new = moves[LEARNING_RATE]
        if new > old:
            self._forbid(context.learning_rate * new, context)

    def state_dict(self) -> dict[str, Any]:
        return {
            "ceiling": self._ceiling,
            "ceiling_phase": self._ceiling_phase,
            "ceiling_age": self._ceiling_age,
            "flat": self._flat,
            "decisions": self._decisions,
            "eased_at": self._eased_at,
            "high": self._high,
            "multiplier": self._multiplier,
            "meant": self._meant,
            "host": self._host,
            "host_high": self._host_high,
            "lowest": self._lowest.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ceiling = float(state["ceiling"])
        self._ceiling_phase = int(state["ceiling_phase"])
        self._ceiling_age = int(state["ceiling_age"])
        self._flat = int(state["flat"])
        self._decisions = int(state["decisions"])
        self._eased_at = int(state["eased_at"])
        self._high = int(state["high"])
        self._multiplier = float(state["multiplier"])
        self._meant = float(state["meant"])
        self._host = float(state["host"])
        self._host_high = float(state["host_high"])
        self._lowest.load_state_dict(state["lowest"])


class RecentLowest:
    """The lowest filtered level of the loss at the newest decisions; it begins anew with the filter.

    A filter that has begun anew has seen fewer values than at the decision before, or none more.
    """

    def __init__(self) -> None:
        self._levels: list[float] = []
        self._count = 0

    def above(self, loss: FilterReport | None) -> float:
        """How far the loss now stands above it, in noise widths of one value, in [0, 1e6]; call once per decision."""
        if loss is None:
            return 0.0
        if loss.count <= self._count:
            self._levels = []
        self._count = loss.count
        if loss.count < _SETTLED or not loss.noise > 0.0:
            return 0.0
        self._levels = [*self._levels, loss.level][-_NEWEST:]
        return min((loss.level - min(self._levels)) / loss.noise, _MOST)

    def fell(self, loss: FilterReport | None, decisions: int) -> float:
        """By how much it has come down over so many decisions, or those known, in noise widths, within ±1e6."""
        if loss is None or not loss.noise > 0.0 or not self._levels:
            return 0.0
        before = self._levels[-1 - decisions :][0]
        return max(-_MOST, min((before - loss.level) / loss.noise, _MOST))

    def forget(self) -> None:
        """Begin anew, at the next level."""
        self._levels = []

    def state_dict(self) -> dict[str, Any]:
        return {"levels": list(self._levels), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._levels, self._count = [float(level) for level in state["levels"]], int(state["count"])


def _expected(forecast: Forecast, loss: FilterReport | None) -> dict[str, float]:
    """What the temporal model says, in units of the loss's noise, and where it looked; rounded as that is."""
    said = {"divergence": forecast.divergence[0], **forecast.evidence}
    if loss is not None and loss.noise > 0.0:
        said["expected_rise"] = (forecast.loss[0][1] - loss.level) / loss.noise
    return {name: round(value, 3) for name, value in said.items()}


def _searching(context: TrainingContext) -> bool:
    """There is no alignment to lose yet."""
    return context.phase.index < TrainingPhase.REFINEMENT.index


def _why_lower(context: TrainingContext, z: float, clip: float | None) -> str | None:
    if z > RISES:
        return f"the loss rises (z {z:+.1f})"
    # Once there is an alignment the clip comes first, and a spike that it cuts does no harm by itself: norms have a
    # heavy tail by then that no lower rate cures, and cut upon cut would bring the rate to nothing.
    if context.grad_spikes > _SPIKY and (_searching(context) or clip is None or z > _LEVEL):
        return f"{context.grad_spikes:.0%} of the gradient norms spike"
    swing = fast_swing(context)
    # While it falls all the same, an oscillation does no harm.
    if swing is not None and z > FALLS:
        return f"the loss swings with a period of {swing.period:.1f} steps (chance 1e-{swing.oscillation:.0f})"
    return None


def _clip(context: TrainingContext, current: float | None) -> tuple[float | None, str]:
    """Three medians while gradients spike, else back to off.

    Off too under a host that clips lower than that, where it would never act and only be said to.
    """
    if current is None:
        return None, ""
    undercut = context.host_clip is not None and TIGHT_CLIP * context.grad_norm_median >= context.host_clip
    if context.grad_spikes > _CALM and current > TIGHT_CLIP and not undercut:
        return TIGHT_CLIP, f"clip at {TIGHT_CLIP:.0f} median norms"
    if (context.grad_spikes == 0.0 or undercut) and current < GRAD_CLIP_OFF:
        why = "the host clips lower" if undercut else "no spikes left"
        return current * KNOBS[GRAD_CLIP].max_ratio, f"{why}: release the clip"
    return None, ""
