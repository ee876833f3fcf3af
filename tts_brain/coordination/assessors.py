"""The voters that are no agents: each looks at the joint move from a side of its own, and moves nothing itself.

A new one is a function here and a line in ``ASSESSORS``. All of them let pass what calms at least as much as it stirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
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
    """

    approve: bool | None
    size: float


Assessor = Callable[[TrainingContext, Mapping[str, float], Weighed], Opinion]


def by_simulation(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By the mean of the plays; their tails have had their say in ``RiskAssessor.weigh``. No plays, no objection."""
    outlook = weighed.outlook
    return _opinion(moves, bad=outlook is not None and outlook.gain < -_WORSE, doubtful=False)


def by_window(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By the last window of raw values alone, without any filter or forecast: what spikes, what surely rises."""
    loss = context.trends.get("mel") or context.trends.get("total")
    bad = context.grad_spikes > _SPIKY or _rises(loss)
    return _opinion(moves, bad=bad, doubtful=context.grad_spikes > _CALM or _rises(context.trends.get("grad_norm")))


def by_forecast(context: TrainingContext, moves: Mapping[str, float], weighed: Weighed) -> Opinion:
    """By what the temporal model expects at its longest horizon; abstains without one."""
    forecast = context.forecast
    if forecast is None:
        return Opinion(None, 1.0)
    trouble = max(forecast.divergence[-1], forecast.alignment_loss[-1])
    if math.isnan(trouble):
        return Opinion(None, 1.0)
    return _opinion(moves, bad=trouble > _PROBABLY, doubtful=trouble > _PERHAPS)


ASSESSORS: Mapping[str, Assessor] = MappingProxyType(
    {"simulation": by_simulation, "window": by_window, "forecast": by_forecast}
)


def wanted(moves: Mapping[str, float], opinion: Opinion) -> dict[str, float]:
    """The joint move as this assessor would make it."""
    stirs = stirring(moves)
    return {knob: move * opinion.size if knob in stirs else move for knob, move in moves.items()}


def _opinion(moves: Mapping[str, float], *, bad: bool, doubtful: bool) -> Opinion:
    return Opinion(not bad or calming(moves), 0.0 if bad else 0.5 if doubtful else 1.0)


def _rises(trend: Trend | None) -> bool:
    return trend is not None and trend.count >= 4 and trend.z > _SURELY
