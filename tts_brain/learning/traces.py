"""What runs looked like, step by step: what the learned parts are trained on, and tested against.

A run that is to be kept is one whose journal has every step: ``journal_every: 1``, in any mode, ``observe`` too.

    from tts_brain.learning.traces import from_journal, save
    save("mine.safetensors", [from_journal("RUN_FOLDER")])

A file of traces is one safetensors file (``tts_brain.statefile``): a table of float32 for each run, about 60 kB for
500 steps. Nothing in it is of the text or the speech.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from tts_brain.journal import read_journal
from tts_brain.statefile import load_state, save_state
from tts_brain.types import KNOBS, AttentionReport, Observation, StopTokenCounts

_ATTENTION = tuple(field.name for field in fields(AttentionReport))
_STOP = tuple(field.name for field in fields(StopTokenCounts))
_LOSSES = ("total", "mel", "gate", "guided")
_PLAIN = ("grad_norm", "learning_rate", "update_ratio", "text_length", "skipped")
COLUMNS = (
    "step",
    *_LOSSES,
    *_PLAIN,
    *(f"attention.{name}" for name in _ATTENTION),
    *(f"stop.{name}" for name in _STOP),
    *(f"knob.{name}" for name in KNOBS),
)
_PLACES = {name: at for at, name in enumerate(COLUMNS)}
KIND, VERSION = "traces", 1


@dataclass(frozen=True)
class Trace:
    """One run.

    Args:
        name: of the run, for people.
        host: ``Capabilities.host``.
        corpus: traces are split by run and by corpus; runs of one corpus bear the same word.
        faults: what was wrong with the run, in the words of whoever recorded it; empty for none.
        table: (T, len(COLUMNS)) float32, one row a step; NaN where nothing was seen, infinities kept. A knob's value
            is the one the step was made with; NaN for a knob that nobody turns.
    """

    name: str
    host: str
    corpus: str
    faults: tuple[str, ...]
    table: np.ndarray

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or self.table.shape[1] != len(COLUMNS):
            raise ValueError(
                f"trace {self.name!r} has a table of shape {self.table.shape}; (T, {len(COLUMNS)}) is read"
            )

    def column(self, name: str) -> np.ndarray:
        """(T,) of one of ``COLUMNS``."""
        return self.table[:, _PLACES[name]]

    def observations(self) -> list[Observation]:
        """The run as the brain saw it, to rounding of float32. A loss that no step has is one that the host lacks."""
        losses = [name for name in _LOSSES if name == "total" or not np.isnan(self.column(name)).all()]
        return [_observation(row, losses) for row in self.table]


class Recorder:
    """Rows of one run, as it goes on."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, observation: Observation, knobs: Mapping[str, float] | None = None) -> None:
        """Take in one step, made with ``knobs``."""
        row = np.full(len(COLUMNS), np.nan, dtype=np.float32)
        seen: dict[str, Any] = {"step": observation.step, "skipped": float(observation.skipped)}
        seen |= {name: observation.losses.get(name) for name in _LOSSES}
        seen |= {name: getattr(observation, name) for name in _PLAIN if name != "skipped"}
        for prefix, names, part in (
            ("attention", _ATTENTION, observation.attention),
            ("stop", _STOP, observation.stop),
        ):
            seen |= {} if part is None else {f"{prefix}.{name}": getattr(part, name) for name in names}
        seen |= {f"knob.{name}": value for name, value in (knobs or {}).items()}
        with np.errstate(over="ignore"):  # a loss of 1e300 is as good as infinite
            for name, value in seen.items():
                if value is not None:
                    row[_PLACES[name]] = value
        self._rows.append(row)

    def turn_back(self, knobs: Mapping[str, float]) -> None:
        """The steps so far were made with ``knobs``."""
        for row in self._rows:
            for name, value in knobs.items():
                row[_PLACES[f"knob.{name}"]] = value

    def trace(self, name: str, *, host: str, corpus: str, faults: Iterable[str] = ()) -> Trace:
        """All steps so far."""
        table = np.stack(self._rows) if self._rows else np.zeros((0, len(COLUMNS)), dtype=np.float32)
        return Trace(name, host, corpus, tuple(faults), table)


def from_journal(path: str | Path, *, name: str = "", corpus: str = "", faults: Iterable[str] = ()) -> Trace:
    """The trace of a run whose journal was written with ``journal_every: 1``.

    Raises:
        FileNotFoundError: no journal there.
        ValueError: the journal has not every step; the message says what to set.
    """
    recorder, host, steps = Recorder(), "", list[int]()
    knobs: dict[str, float] = {}
    for record in read_journal(path):
        if record["kind"] == "start":
            host = str(record["host"])
        elif record["kind"] == "decision" and record["applied"]:
            if not knobs:  # until the first decision they stood as it found them
                recorder.turn_back(record["before"])
            knobs = record["after"]
        elif record["kind"] == "observation":
            steps.append(int(record["step"]))
            recorder.add(_from_record(record), knobs)
    if not steps or len(steps) < 0.9 * (steps[-1] - steps[0] + 1):
        raise ValueError(
            f"the journal in {path} has {len(steps)} steps of {steps[-1] if steps else 0}; "
            "write journal_every: 1 into the brain's settings to record a run"
        )
    return recorder.trace(name or str(path), host=host, corpus=corpus, faults=faults)


def save(path: str | Path, traces: Sequence[Trace]) -> None:
    """Write traces, atomically. Raises OSError when the file cannot be written."""
    state = {
        "columns": list(COLUMNS),
        "runs": [{f.name: getattr(trace, f.name) for f in fields(Trace)} for trace in traces],
    }
    save_state(Path(path), state, kind=KIND, version=VERSION)


def load(path: str | Path) -> list[Trace]:
    """Read traces. Columns that this version does not know are left out, those it lacks are NaN.

    Raises:
        StateFileError: missing, torn, or not a file of traces.
    """
    state = load_state(Path(path), kind=KIND, version=VERSION)
    known = [(at, _PLACES[name]) for at, name in enumerate(state["columns"]) if name in _PLACES]
    traces = []
    for run in state["runs"]:
        table = np.full((len(run["table"]), len(COLUMNS)), np.nan, dtype=np.float32)
        table[:, [to for _, to in known]] = run["table"][:, [at for at, _ in known]]
        traces.append(Trace(run["name"], run["host"], run["corpus"], tuple(run["faults"]), table))
    return traces


def _from_record(record: Mapping[str, Any]) -> Observation:
    attention, stop = record["attention"], record["stop"]
    return Observation(
        step=int(record["step"]),
        losses={name: float(value) for name, value in record["losses"].items()},
        attention=None if attention is None else AttentionReport(**{k: float(v) for k, v in attention.items()}),
        stop=None if stop is None else StopTokenCounts(**{k: float(v) for k, v in stop.items()}),
        skipped=bool(record["skipped"]),
        **{name: _number(record[name]) for name in _PLAIN if name != "skipped"},
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _observation(row: np.ndarray, losses: Sequence[str]) -> Observation:
    seen = dict(zip(COLUMNS, row.tolist(), strict=True))
    attention = [seen[f"attention.{name}"] for name in _ATTENTION]
    stop = [seen[f"stop.{name}"] for name in _STOP]
    return Observation(
        step=int(seen["step"]),
        losses={name: seen[name] for name in losses},
        attention=None if math.isnan(attention[0]) else AttentionReport(*attention),
        stop=None if math.isnan(stop[0]) else StopTokenCounts(*stop),
        skipped=bool(seen["skipped"]),
        **{name: None if math.isnan(seen[name]) else seen[name] for name in _PLAIN if name != "skipped"},
    )
