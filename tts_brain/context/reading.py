"""What several readers ask of a context, answered in one place."""

from __future__ import annotations

import math

from tts_brain.types import Scales, TrainingContext

# A rate that changes a weight tensor by more than this share per step is not raised further.
MAX_UPDATE_RATIO = 0.02
# Longest period, in steps, of an oscillation that is put down to the rate: an epoch's own rhythm is longer.
_RATE_PERIOD = 12.0
_FEWEST = 4
# In standard errors of the slope: below the first the loss surely falls, above the second it surely rises.
FALLS, RISES = -2.0, 3.0


def slope_z(context: TrainingContext) -> float | None:
    """Slope of the judged loss in standard errors, within ±100; None while too little has been seen.

    The filter's, which lags less than a line through a window; the window's where nothing was filtered.
    """
    loss = context.filtered.get("loss")
    if loss is not None and loss.count >= _FEWEST and loss.slope_std > 0.0:
        z = loss.slope / loss.slope_std
    else:
        trend = context.trends.get("mel") or context.trends.get("total")
        z = trend.z if trend is not None and trend.count >= _FEWEST else math.nan
    return None if math.isnan(z) else min(max(z, -100.0), 100.0)


def fast_swing(context: TrainingContext) -> Scales | None:
    """The judged loss at several scales, if it surely swings within 12 steps; else None."""
    scales = context.scales.get("mel") or context.scales.get("total")
    return scales if scales is not None and scales.oscillates and scales.period <= _RATE_PERIOD else None
