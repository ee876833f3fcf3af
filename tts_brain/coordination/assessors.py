"""The voters that are no agents: each looks at the joint move from a side of its own, and moves nothing itself.

A new one is a function here and a line in ``ASSESSORS``. All of them let pass what calms at least as much as it stirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tts_brain.coordination.game import calming, stirring
from tts_brain.coordination.risk import Weighed
from tts_brain.types import TrainingContext, Trend

_SURELY = 3.0
_SPIKY, _CALM = 0.15, 0.05
_PROBABLY, _PERHAPS = 0.5, 0.25
# Noise widths that a joint move may cost on average.
_WORSE = 1.0


@dataclass(frozen=True, slots=True)
class Opinion:
    """What an assessor thinks of a joint move.

    Args:
        approve: None abstains.
        size: how much of what stirs in the move it would make, in [0, 1].
        reason: what it saw, with the figure, where it says no or would make less than all; else nothing.
    """

    approve: bool | None
    size: float
    reason: str = ""


Assessor = Callable[[TrainingContext, Mapping[str, float], Weighed], Opinion]


def by_simulation(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By the mean of the plays; their tails have had their say in ``RiskAssessor.weigh``. No plays, no objection."""
    gain = 0.0 if weighed.outlook is None else weighed.outlook.gain
    return _opinion(moves, [f"the plays lose {-gain:.1f} noise widths on average"] if gain < -_WORSE else [])


def by_window(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By the last window of raw values alone, without any filter or forecast: what spikes, what surely rises."""
    spikes = f"{context.grad_spikes:.0%} of the gradients spike"
    bad = [spikes] if context.grad_spikes > _SPIKY else []
    doubtful = [spikes] if context.grad_spikes > _CALM else []
    bad += _rises("the loss", context.trends.get("mel") or context.trends.get("total"))
    return _opinion(moves, bad, doubtful + _rises("the gradient norm", context.trends.get("grad_norm")))


def by_forecast(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By what the temporal model expects at its longest horizon; abstains without one."""
    forecast = context.forecast
    if forecast is None:
        return Opinion(None, 1.0)
    trouble = max(forecast.divergence[-1], forecast.alignment_loss[-1])
    if math.isnan(trouble):
        return Opinion(None, 1.0)
    what = "divergence" if trouble == forecast.divergence[-1] else "a lost alignment"
    said = [f"{what} {trouble:.0%} likely in {forecast.horizons[-1]} steps"]
    return _opinion(moves, said if trouble > _PROBABLY else [], said if trouble > _PERHAPS else [])


ASSESSORS: Mapping[str, Assessor] = MappingProxyType(
    {"simulation": by_simulation, "window": by_window, "forecast": by_forecast}
)


def wanted(moves: Mapping[str, float], opinion: Opinion) -> dict[str, float]:
    """The joint move as this assessor would make it."""
    stirs = stirring(moves)
    return {knob: move * opinion.size if knob in stirs else move for knob, move in moves.items()}


def _opinion(moves: Mapping[str, float], bad: Sequence[str], doubtful: Sequence[str] = ()) -> Opinion:
    """None of what stirs where something is bad, half of it where something is doubtful; each says what it is."""
    size = 0.0 if bad else 0.5 if doubtful else 1.0
    return Opinion(not bad or calming(moves), size, ", ".join(bad or doubtful))


def _rises(what: str, trend: Trend | None) -> list[str]:
    if trend is None or trend.count < 4 or not trend.z > _SURELY:
        return []
    return [f"{what} surely rises (z {trend.z:+.1f})"]
