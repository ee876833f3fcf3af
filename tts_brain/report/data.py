"""What a report shows: plain records that a benchmark, a demo or a run folder fills. Any part may be empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tts_brain.report.story import number

Better = Literal["lower", "higher"] | None

# Where a curve is found in the observation records when nobody measured it apart from the journal.
_IN_JOURNAL = {
    "train_mel": ("losses", "mel"),
    "train_total": ("losses", "total"),
    "attention_diag": ("attention", "attention_diag"),
    "diagonality": ("attention", "diagonality"),
    "focus": ("attention", "focus"),
    "coverage": ("attention", "coverage"),
}


@dataclass(frozen=True, slots=True)
class AlignmentPicture:
    """One attention matrix, shape (T frames, N tokens), weights in [0, 1]."""

    step: int
    utterance: str
    text: str
    matrix: NDArray[Any]


@dataclass(frozen=True, slots=True)
class AudioClip:
    """Mono sound, float samples in [-1, 1]. Clips with the same title are shown side by side."""

    title: str
    text: str
    samples: NDArray[np.float32]
    sample_rate: int


@dataclass(frozen=True, slots=True)
class Curve:
    """Values over steps, non-finite ones kept."""

    points: Sequence[tuple[float, float]]

    @property
    def steps(self) -> list[float]:
        """x values."""
        return [step for step, _ in self.points]

    @property
    def values(self) -> list[float]:
        """y values, NaN and infinities kept."""
        return [value for _, value in self.points]

    @property
    def not_finite(self) -> list[float]:
        """Steps at which the value is not finite."""
        return [step for step, value in self.points if not math.isfinite(value)]


@dataclass(frozen=True, slots=True)
class ArmData:
    """One run of a comparison; ``name`` is the key in the table rows, ``label`` what people read.

    ``curves`` uses the names train_mel, train_total, held_out_l1, attention_diag, diagonality, focus, coverage and
    learning_rate (the rate the optimizer really used).
    """

    name: str
    label: str
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    alignments: Sequence[AlignmentPicture] = ()
    audio: Sequence[AudioClip] = ()
    journal: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, float | str] = field(default_factory=dict)

    def curve(self, name: str) -> Curve:
        """The named curve, else what the journal's observations say of it, else an empty one."""
        if self.curves.get(name):
            return Curve([(float(step), number(value)) for step, value in self.curves[name]])
        place = _IN_JOURNAL.get(name)
        return Curve(_from_observations(self.journal, *place) if place else [])


class TableRow(NamedTuple):
    """One line of the result table; ``values`` by arm name, a text or None where there is no number.

    Write "never" for a goal that was not reached: it loses against any number.
    """

    label: str
    unit: str
    values: Mapping[str, float | str | None]
    better: Better = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """A whole report. A plain tuple (label, unit, values, better) does as a row of ``table``."""

    title: str
    intro: str
    arms: Sequence[ArmData]
    table: Sequence[TableRow | tuple[str, str, Mapping[str, float | str | None], Better]] = ()
    notes: Sequence[str] = ()


def _from_observations(records: Sequence[Mapping[str, Any]], group: str, name: str) -> list[tuple[float, float]]:
    found = [r for r in records if r.get("kind") == "observation" and name in (r.get(group) or {})]
    return [(number(r.get("step")), number(r[group][name])) for r in found]
