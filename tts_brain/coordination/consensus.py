"""Ranks of a data-parallel run: what each of them saw, made into the one thing that all of them act on.

Every rank gathers the same numbers and applies the same function to them, so every rank takes the same decision.

Of n ranks, f of them may send anything (NaN, old or made-up numbers, nothing) without moving what comes out of the
range of the honest ones, from n >= 3f + 1: f that send nothing leave 2f + 1, and f liars among 2f + 1 are outvoted.
So four ranks survive one in all of this, seven two. Two and three are promised nothing, but three still outvote one
while all are finite. Whether all came to one outcome is another question, which ``digest`` answers for any number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tts_brain.types import AttentionReport, Observation, StopTokenCounts

Vector = NDArray[np.float64]

_SCALARS = ("grad_norm", "learning_rate", "update_ratio", "text_length")
_REPORT, _COUNTS = len(fields(AttentionReport)), len(fields(StopTokenCounts))
_WIDTH = 2 + len(_SCALARS) + _REPORT + _COUNTS
_SKIPPED = 1
# Stands for None. A host that reports it as a loss is told apart: that one travels as plus infinity.
_ABSENT = -np.inf
_DIGEST_BYTES = 6


def row_width(losses: Sequence[str]) -> int:
    """Numbers that one observation takes, by the names its losses may have."""
    return _WIDTH + len(losses)


def pack(observations: Sequence[Observation], losses: Sequence[str]) -> Vector:
    """(steps, ``row_width(losses)``) of one rank's observations; None and a loss that is missing are minus infinity."""
    rows = [_row(observation, losses) for observation in observations]
    return np.asarray(rows, dtype=np.float64).reshape(len(rows), row_width(losses))


def unpack(rows: Vector, losses: Sequence[str]) -> list[Observation]:
    """Inverse of ``pack``."""
    return [_observation(row, losses) for row in np.asarray(rows, dtype=np.float64)]


def most_faulty(ranks: int) -> int:
    """The f that ``ranks`` survive by n >= 3f + 1."""
    return (ranks - 1) // 3


def median_of_ranks(rows: Vector, faulty: int | None = None) -> Vector:
    """One (steps, width) out of (ranks, steps, width): coordinate by coordinate the median of the finite values.

    What comes out lies in the range of the honest finite values (Hampel 1974: the median's breakdown point is 1/2), or
    is not a number, or absent, as at least one honest rank said. A finite value takes 2f + 1 ranks, an absent one
    n - f; else it is NaN. A step counts as skipped when more than f say so.

    Args:
        rows: of each rank, from ``pack``; a rank that is not to be listened to is NaN throughout.
        faulty: f, by default the most that n >= 3f + 1 allows.

    Raises:
        ValueError: fewer than 3f + 1 ranks.
    """
    rows = np.asarray(rows, dtype=np.float64)
    faulty = most_faulty(len(rows)) if faulty is None else faulty
    if faulty < 0 or len(rows) < 3 * faulty + 1:
        raise ValueError(f"faulty={faulty} of {len(rows)} ranks; write 0 to {most_faulty(len(rows))}")
    finite = np.isfinite(rows)
    count = finite.sum(axis=0)
    ordered = np.sort(np.where(finite, rows, np.nan), axis=0)  # NaN go to the end
    lower = np.take_along_axis(ordered, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    upper = np.take_along_axis(ordered, np.minimum(count // 2, len(rows) - 1)[None], axis=0)[0]
    middle = np.where(lower == upper, lower, lower / 2 + upper / 2)  # halves first: the sum might overflow
    absent = (rows == _ABSENT).sum(axis=0) >= len(rows) - faulty
    middle = np.where(count >= 2 * faulty + 1, middle, np.where(absent, _ABSENT, np.nan))
    middle[:, _SKIPPED] = (rows[:, :, _SKIPPED] > 0.0).sum(axis=0) > faulty
    return middle


def digest(state: Mapping[str, Any]) -> float:
    """A whole number under 2**48, so exact in float64, that differs when the plain values of ``state`` do."""
    text = json.dumps(state, sort_keys=True)
    return float(int.from_bytes(hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES], "big"))


def _row(observation: Observation, losses: Sequence[str]) -> list[float]:
    scalars = [_present(getattr(observation, name)) for name in _SCALARS]
    report = [_ABSENT] * _REPORT if observation.attention is None else list(astuple(observation.attention))
    counts = [_ABSENT] * _COUNTS if observation.stop is None else list(astuple(observation.stop))
    raw = [_present(observation.losses.get(name)) for name in losses]
    return [observation.step, observation.skipped, *scalars, *report, *counts, *raw]


def _present(value: float | None) -> float:
    return _ABSENT if value is None else abs(value) if value == _ABSENT else value


def _observation(row: Vector, losses: Sequence[str]) -> Observation:
    values = row.tolist()
    scalars, rest = values[2 : 2 + len(_SCALARS)], values[2 + len(_SCALARS) :]
    report, counts, raw = rest[:_REPORT], rest[_REPORT : _REPORT + _COUNTS], rest[_REPORT + _COUNTS :]
    return Observation(
        step=int(row[0]),
        skipped=bool(row[_SKIPPED]),
        losses={name: value for name, value in zip(losses, raw, strict=True) if value != _ABSENT},
        attention=None if _ABSENT in report else AttentionReport(*report),
        stop=None if _ABSENT in counts else StopTokenCounts(*counts),
        **{name: None if v == _ABSENT else v for name, v in zip(_SCALARS, scalars, strict=True)},
    )
