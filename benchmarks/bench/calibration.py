"""Are probabilities what they say? Reliability, Brier score, expected calibration error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Vector = NDArray[np.float64]

# Said risks bunch up near 0, where the budgets are: narrow bins there, wide ones above.
EDGES = (0.0, 0.01, 0.05, 0.15, 0.3, 0.5, 1.0)


@dataclass(frozen=True)
class Bin:
    """Forecasts said to lie in [low, high), the last one in [low, high].

    Args:
        said: their mean.
        happened: share of them that came true.
        count: how many.
    """

    low: float
    high: float
    said: float
    happened: float
    count: int


def reliability(said: ArrayLike, happened: ArrayLike, edges: ArrayLike = EDGES) -> list[Bin]:
    """The reliability table (Murphy and Winkler 1977); empty bins are left out.

    Args:
        said: (N,) probabilities in [0, 1].
        happened: (N,) true or false.
        edges: of the bins, rising, from 0 to 1.

    Raises:
        ValueError: shapes that differ, or a probability out of range.
    """
    p, y = _checked(said, happened)
    limits = np.asarray(edges, dtype=np.float64)
    at = np.minimum(np.searchsorted(limits, p, side="right") - 1, len(limits) - 2)
    return [
        Bin(float(limits[k]), float(limits[k + 1]), float(p[at == k].mean()), float(y[at == k].mean()), int(n))
        for k, n in enumerate(np.bincount(at, minlength=len(limits) - 1))
        if n
    ]


def brier(said: ArrayLike, happened: ArrayLike) -> float:
    """Mean squared error of the probabilities (Brier 1950); who always says the base rate p gets p (1 - p)."""
    p, y = _checked(said, happened)
    return float(np.mean((p - y) ** 2)) if len(p) else float("nan")


def base_brier(happened: ArrayLike) -> float:
    """Brier score of who knows the base rate of these very cases and nothing else."""
    rate = float(np.mean(np.asarray(happened, dtype=np.float64))) if np.size(happened) else float("nan")
    return rate * (1.0 - rate)


def calibration_error(said: ArrayLike, happened: ArrayLike, edges: ArrayLike = EDGES) -> float:
    """Expected calibration error: mean over the cases of how far their bin's share is from what it said
    (Naeini, Cooper and Hauskrecht 2015)."""
    bins = reliability(said, happened, edges)
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.said - one.happened) for one in bins) / total if total else float("nan")


def _checked(said: ArrayLike, happened: ArrayLike) -> tuple[Vector, Vector]:
    p, y = np.asarray(said, dtype=np.float64), np.asarray(happened, dtype=np.float64)
    if p.shape != y.shape or p.ndim != 1 or not ((p >= 0.0) & (p <= 1.0)).all():
        raise ValueError(f"shapes {p.shape} and {y.shape}; pass as many probabilities in [0, 1] as outcomes")
    return p, y
