"""A journal told in order: holds folded, verdicts and moves in words. The terminal and the HTML page both use it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tts_brain.types import Verdict

Record = Mapping[str, Any]

NOT_FINITE = "not finite"
_DIGITS = range(3, 8)
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the story: a single record, or several alike in a row.

    ``kind`` is decision, hold, event, start (a resume) or end.
    """

    kind: str
    records: tuple[Record, ...]

    @property
    def last(self) -> Record:
        """The newest of the records."""
        return self.records[-1]

    @property
    def steps(self) -> str:
        """``step 120`` or ``steps 120–180``."""
        first, last = step_of(self.records[0]), step_of(self.last)
        return f"step {first}" if first == last else f"steps {first}–{last}"


@dataclass(frozen=True, slots=True)
class Tally:
    """How often what happened; ``watched`` are moves that were written down and not made, as in ``observe`` mode."""

    moves: int
    watched: int
    undone: int
    rollbacks: int
    holds: int
    skipped: int
    faults: int

    def sentence(self) -> str:
        """For people, for example ``5 moves: 4 kept, 1 taken back; 1 rollback; 40 holds``."""
        parts = self._moves_in_words()
        parts += [count(self.rollbacks, "rollback"), count(self.holds, "hold")]
        parts += [count(self.skipped, "skipped gradient")] if self.skipped else []
        parts += [count(self.faults, "fault")] if self.faults else []
        return "; ".join(parts)

    def _moves_in_words(self) -> list[str]:
        watched = [f"{count(self.watched, 'move')} only watched"] if self.watched else []
        if watched and not self.moves:
            return [f"{watched[0]}, none made"]
        kept = max(0, self.moves - self.undone)
        return [f"{count(self.moves, 'move')}: {kept} kept, {self.undone} taken back", *watched]


@dataclass(frozen=True, slots=True)
class PhaseRun:
    """A stretch of decisions in the same phase."""

    phase: str
    first: int
    last: int


def fold(records: Iterable[Record], *, fold_holds: bool = True) -> list[Entry]:
    """Decisions, events, resumes and ends in order; holds and like events in a row become one entry."""
    groups: list[tuple[tuple[str, ...], list[Record]]] = []
    started = False
    for record in records:
        kind = record.get("kind")
        if kind == "start" and not started:
            started = True
        elif kind in ("decision", "event", "start", "end"):
            key = _group(record)
            if groups and groups[-1][0] == key and (fold_holds or key[0] != "hold") and key[0] in ("hold", "event"):
                groups[-1][1].append(record)
            else:
                groups.append((key, [record]))
    return [Entry(key[0], tuple(group)) for key, group in groups]


def _group(record: Record) -> tuple[str, ...]:
    kind = str(record["kind"])
    if kind == "decision" and record.get("verdict") == "hold":
        return ("hold",)
    if kind == "event":
        # A rollback is too important to share a line.
        name = str(record.get("event"))
        # Advice of another cause is another thing to mend.
        return (kind, name, str(record.get("step" if name == "rollback" else "cause")))
    return (kind,)


def decisions(records: Iterable[Record]) -> list[Record]:
    """The decision records."""
    return [r for r in records if r.get("kind") == "decision"]


def tally(records: Sequence[Record]) -> Tally:
    """Count moves, undos and the rest. A rollback may stand as a decision and as an event: it counts once.

    What it goes back behind counts as taken back, as an undone move does.
    """
    verdicts = [r.get("verdict") for r in decisions(records)]
    events = [r.get("event") for r in records if r.get("kind") == "event"]
    made = [r.get("verdict") for r in decisions(records) if r.get("applied", True)].count("accept")
    standing: list[int] = []
    for record in records:
        if record.get("verdict") == "accept" and record.get("applied", True):
            standing.append(step_of(record))
        elif record.get("verdict") == "undo":
            standing = standing[:-1]
        elif record.get("event") == "rollback" and isinstance(record.get("restored"), int):
            standing = [step for step in standing if step <= record["restored"]]
    rolled = {step_of(r) for r in records if r.get("verdict") == "roll_back" or r.get("event") == "rollback"}
    return Tally(
        moves=made,
        watched=verdicts.count("accept") - made,
        undone=made - len(standing),
        rollbacks=len(rolled),
        holds=verdicts.count("hold"),
        skipped=events.count("skipped_gradient"),
        faults=events.count("fault"),
    )


def phase_runs(records: Iterable[Record]) -> list[PhaseRun]:
    """Phases in order, each from its first decision to the next phase's first."""
    runs: list[PhaseRun] = []
    for record in (r for r in decisions(records) if r.get("phase")):
        phase, step = str(record.get("phase")), step_of(record)
        if runs and runs[-1].phase == phase:
            runs[-1] = PhaseRun(phase, runs[-1].first, step)
        else:
            if runs:
                runs[-1] = PhaseRun(runs[-1].phase, runs[-1].first, step)
            runs.append(PhaseRun(phase, step, step))
    return runs


def knob_series(records: Iterable[Record]) -> dict[str, list[tuple[float, float]]]:
    """By knob, its value after each decision or rollback; the first point is where it stood before the first one."""
    series: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        before, after = record.get("before") or {}, record.get("after") or {}
        if record.get("event") == "rollback":
            after = record.get("knobs") or {}
        elif record.get("kind") != "decision":
            continue
        for knob, value in after.items():
            if knob not in series:
                series[knob] = [(0.0, number(before.get(knob, value)))]
            series[knob].append((step_of(record), number(value)))
    return series


def moves(record: Record) -> list[tuple[str, float, float]]:
    """Knobs that changed, as (name, from, to)."""
    before, after = record.get("before") or {}, record.get("after") or {}
    return [(k, number(before[k]), number(v)) for k, v in after.items() if k in before and before[k] != v]


def move_text(move: tuple[str, float, float]) -> str:
    """``learning_rate 1.00 → 1.50``."""
    return f"{clean(move[0])} {change_text(move[1], move[2])}"


def change_text(old: Any, new: Any) -> str:
    """``1.00 → 1.50``, with as many digits as it takes to see the difference."""
    for digits in _DIGITS:
        texts = knob_text(old, digits), knob_text(new, digits)
        if texts[0] != texts[1]:
            break
    return f"{texts[0]} → {texts[1]}"


def is_seen(old: Any, new: Any) -> bool:
    """Does ``change_text`` show a difference? A knob that went and came back may be one rounding off."""
    return knob_text(old, _DIGITS[-1]) != knob_text(new, _DIGITS[-1])


def verdict_text(record: Record) -> str:
    """The sentence for the verdict; said to be only watched when the decision was not applied."""
    name = str(record.get("verdict", "unknown verdict"))
    known = {verdict.name.lower(): verdict.value for verdict in Verdict}
    text = known.get(name, clean(name))
    return text if record.get("applied", True) or name == "hold" else f"only watched; in full mode: {text}"


def wishes(record: Record) -> list[str]:
    """What each agent wanted, for example ``learning_rate: learning_rate to 1.50``."""
    return [
        f"{clean(p.get('agent'))}: " + ", ".join(f"{clean(k)} to {knob_text(v)}" for k, v in p["moves"].items())
        for p in record.get("proposals") or ()
        if p.get("moves")
    ]


def status(records: Sequence[Record]) -> str:
    """One sentence on how far the run came."""
    if not records:
        return "No journal: this arm ran without the brain or has not started."
    reached = max(step_of(r) for r in records)
    end = next((r for r in reversed(records) if r.get("kind") in ("start", "end")), None)
    if end is not None and end.get("kind") == "end":
        return f"Ended at step {step_of(end)}: {clean(end.get('message', 'no message'))}"
    return f"No end record: still running, or stopped from outside, at step {reached}."


def step_of(record: Record) -> int:
    """The record's step, 0 when it has none."""
    value = number(record.get("step", 0))
    return int(value) if math.isfinite(value) else 0


def number(value: Any) -> float:
    """A float from a journal field: also from ``"nan"``; NaN from anything that is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def number_text(value: Any) -> str:
    """A value for people: four digits, ``not finite``, a dash for None, and texts as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    found = number(value)
    if math.isnan(found) and isinstance(value, str) and value.strip().lower() != "nan":
        return clean(value)
    if not math.isfinite(found):
        return clean(value) if isinstance(value, list | dict) else NOT_FINITE
    whole = found.is_integer() and abs(found) < 1e7
    return (f"{int(found):,}" if whole else f"{found:.4g}").replace("-", "−")


def knob_text(value: Any, digits: int = 3) -> str:
    """A knob's value: ``1.00``, ``4.50``, ``0.0156``, ``100``."""
    found = number(value)
    if not math.isfinite(found):
        return NOT_FINITE
    return f"{found:#.{digits}g}".removesuffix(".") if abs(found) < 10**digits else f"{found:.0f}"


def evidence_text(evidence: Mapping[str, Any] | None) -> str:
    """``slope_z −3.1, noise 0.02``."""
    return ", ".join(f"{clean(k)} {number_text(v)}" for k, v in (evidence or {}).items())


def phase_text(phase: Any) -> str:
    """``alignment learning``."""
    return clean(phase).replace("_", " ")


def count(n: int, noun: str) -> str:
    """``1 move``, ``2 moves``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def clean(value: Any) -> str:
    """One line of text: no control characters (they could steer a terminal), no half surrogates, single spaces."""
    text = "".join(
        " " if char in _BIDI_CONTROLS or unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") else char
        for char in str(value)
    )
    return " ".join(text.split())
