"""Level, direction and noise of one series, in units that neither shift nor scale of the series changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pywt

from tts_brain.types import Trend

Z_LIMIT = 100.0
_MIN_COUNT = 4


def noise_level(values: np.ndarray) -> float:
    """Standard deviation of the step-to-step noise: median absolute finest Haar detail over 0.6745.

    The finest detail sees no slow trend, and the median no single spike (Donoho & Johnstone 1994, eq. 7).
    """
    even = values[: len(values) // 2 * 2]
    if len(even) < 2:
        return 0.0
    detail = pywt.dwt(even, "haar")[1]
    return float(np.median(np.abs(detail)) / 0.6745)


def trend(steps: Sequence[float], values: Sequence[float]) -> Trend:
    """Trend of ``values`` seen at ``steps`` (same length, rising). Values that are not finite are left out.

    The slope is Theil-Sen's (one value in four may be absurd); ``z`` compares it with the standard error that a
    least-squares slope would have under white noise, so ``|z| > 2`` means a real direction.
    """
    y_all = np.asarray(values, dtype=np.float64)
    x_all = np.asarray(steps, dtype=np.float64)
    keep = np.isfinite(y_all)
    x, y = x_all[keep], y_all[keep]
    count = len(y)
    if count == 0:
        return Trend(level=float("nan"), slope=0.0, noise=0.0, z=0.0, count=0)
    level = float(np.mean(y[-max(1, count // 4) :]))
    if count < _MIN_COUNT or x[-1] <= x[0]:
        return Trend(level=level, slope=0.0, noise=noise_level(y), z=0.0, count=count)
    slope = _theil_sen(x, y)
    noise = noise_level(y)
    return Trend(level=level, slope=slope, noise=noise, z=_slope_z(slope, noise, x), count=count)


def _theil_sen(x: np.ndarray, y: np.ndarray) -> float:
    """Median slope of all pairs (Sen 1968); scipy.stats.theilslopes says the same, several times slower."""
    first, second = np.triu_indices(len(x), k=1)
    run, rise = x[second] - x[first], y[second] - y[first]
    return float(np.median(rise[run > 0] / run[run > 0]))


def _slope_z(slope: float, noise: float, x: np.ndarray) -> float:
    if slope == 0.0:
        return 0.0
    spread = float(np.sqrt(np.sum((x - x.mean()) ** 2)))
    if noise == 0.0:
        return Z_LIMIT if slope > 0 else -Z_LIMIT
    return float(np.clip(slope * spread / noise, -Z_LIMIT, Z_LIMIT))
