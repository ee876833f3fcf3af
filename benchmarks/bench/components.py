"""Each part of the context alone, against the simplest that one would use instead: all rows, and what was asked.

A part is a module ``component_NAME`` with ``rows(quick)`` or ``rows(quick, traces)``, which gives dictionaries with
``part``, ``against``, ``figure``, ``ours``, ``theirs`` and ``note``. The verdicts are read from these rows.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = ("filter", "trends", "lengths", "judge", "coordination", "risk", "temporal", "phases", "eyes", "time", "ranks")
LOWER = 0.25
AGREEMENT = 99.0
FEWER = 3.0
CALIBRATED = 0.05
HEEDED = 12.0  # steps: ``fast_swing`` of ``tts_brain.context.reading``
_COLUMNS = ("figure", "against", "ours", "theirs", "note")

Row = dict[str, Any]


def missing(name: str) -> bool:
    """Whether there is no such module."""
    return find_spec(f"bench.component_{name}") is None


def collect(name: str, quick: bool, traces: Path | None) -> list[Row]:
    """Rows of one part."""
    make = import_module(f"bench.component_{name}").rows
    rows = make(quick, traces) if "traces" in inspect.signature(make).parameters else make(quick)
    return [{**row, "quick": True} for row in rows] if quick else list(rows)


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """What was asked of the parts that have rows: ``part``, ``criterion``, ``figure`` in words, ``met``."""
    found = [_filter_errors(rows, what) for what in ("level", "slope")]
    found += [_found(rows, "spike", "found"), _found(rows, "break", "by `changed`")]
    found += [_earlier(rows, math.inf), _earlier(rows, HEEDED), _false_alarms(rows)]
    found += [made for name in _courses(rows) for made in (_agreement(rows, name), _switches(rows, name))]
    found.append(_calibration(rows))
    found.append(_time(rows, "ms per step: whole ContextAnalyzer", "whole analyzer"))
    found.append(_time(rows, "ms per training step: micro-Tacotron", "a training step of the micro-Tacotron"))
    return [verdict for verdict in found if verdict is not None]


def _filter_errors(rows: Sequence[Row], what: str) -> Row | None:
    some = _rows(rows, "filter: level and slope", f"RMSE of the {what},")
    lower = [1.0 - row["ours"] / row["theirs"] for row in some]
    if not lower:
        return None
    worst = some[lower.index(min(lower))]
    said = f"{min(lower):.0%} to {max(lower):.0%} lower; least against {worst['against']}, {worst['figure']}"
    criterion = f"error of the {what} at equal lag at least {LOWER:.0%} lower than each rival's"
    return _verdict("filter", criterion, said, min(lower) >= LOWER)


def _found(rows: Sequence[Row], what: str, how: str) -> Row | None:
    """Spikes are the surprise's to find, breaks those of the filter's flag; the surprise on breaks is a row alone."""
    some = [row for row in _rows(rows, "filter: spikes and breaks", what) if how in row["figure"]]
    if not some:
        return None
    better = sum(row["ours"] >= row["theirs"] for row in some)
    worst = min(some, key=lambda row: row["ours"] - row["theirs"])
    said = f"as good or better in {better} of {len(some)} cases; worst {100 * worst['ours']:.1f} % against "
    said += f"{100 * worst['theirs']:.1f} %: {worst['figure']}"
    return _verdict("filter", f"{what}s found no less often at as many false alarms", said, better == len(some))


def _earlier(rows: Sequence[Row], longest: float) -> Row | None:
    """Of oscillations with periods of up to ``longest`` steps."""
    some = [row for row in _rows(rows, "trends", "median delay") if _period(row) <= longest]
    if not some:
        return None
    pairs = [(_steps(row["ours"]), _steps(row["theirs"])) for row in some]
    better, later = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    missed = sum(math.isinf(a) and math.isinf(b) for a, b in pairs)
    alike = len(pairs) - better - later - missed
    said = f"earlier in {better} of {len(pairs)} cases, later in {later}, alike in {alike}, missed by both in {missed}"
    which = "" if math.isinf(longest) else f" within {longest:g} steps, which the agents heed,"
    return _verdict("trends", f"oscillation{which} found earlier than by the slope", said, later == 0)


def _period(row: Row) -> float:
    found = re.search(r"period (\S+),", row["figure"])
    return math.inf if found is None else float(found[1])


def _false_alarms(rows: Sequence[Row]) -> Row | None:
    some = [row for row in _rows(rows, "trends", "false alarms") if not row["note"].startswith("not among")]
    if not some:
        return None
    worst = max(some, key=lambda row: row["ours"])
    said = f"at most {worst['ours']:.1f} ({worst['figure']})"
    return _verdict("trends", "at most some 10 false alarms per 10,000 decisions on noise", said, worst["ours"] <= 15.0)


def _courses(rows: Sequence[Row]) -> list[str]:
    """Names of the sets of courses."""
    some = _rows(rows, "phases", "agreement off the boundary, %, ")
    some = [row for row in some if isinstance(row["ours"], float) and math.isfinite(row["ours"])]
    return list(dict.fromkeys(row["figure"].removeprefix("agreement off the boundary, %, ") for row in some))


def _agreement(rows: Sequence[Row], name: str) -> Row | None:
    row = _equal_delay(rows, f"agreement off the boundary, %, {name}")
    said = f"{row['ours']:.2f} %, thresholds on an EMA of equal delay {row['theirs']:.2f} %"
    return _verdict(
        "phases", f"agreement off the boundary at least {AGREEMENT:g} %, {name}", said, row["ours"] >= AGREEMENT
    )


def _switches(rows: Sequence[Row], name: str) -> Row | None:
    row = _equal_delay(rows, f"switches per 1,000 steps, {name}")
    fewer = row["theirs"] / row["ours"] if row["ours"] else math.inf
    said = f"{row['ours']:.2f} against {row['theirs']:.2f} per 1,000 steps: {row['note']}"
    return _verdict(
        "phases", f"switches at equal delay at least {FEWER:g}x fewer than thresholds', {name}", said, fewer >= FEWER
    )


def _equal_delay(rows: Sequence[Row], figure: str) -> Row:
    return next(row for row in rows if row["figure"] == figure and "of equal delay" in row["against"])


def _calibration(rows: Sequence[Row]) -> Row | None:
    some = [row for row in _rows(rows, "risk: calibration", "") if row["figure"].endswith("expected calibration error")]
    if not some:
        return None
    worst = max(some, key=lambda row: row["ours"])
    said = f"at most {worst['ours']:.3f}, as simulated {worst['theirs']:.3f}: {worst['figure']}, {worst['note']}"
    criterion = f"of the moves called risky as many go bad: expected calibration error at most {CALIBRATED:g}"
    return _verdict("risk", criterion, said, worst["ours"] <= CALIBRATED)


def _time(rows: Sequence[Row], figure: str, what: str) -> Row | None:
    some = _rows(rows, "time", figure)
    if not some:
        return None
    took, limit = some[0]["ours"], some[0]["theirs"]
    return _verdict("time", f"{what} at most {limit:g} ms per step", f"{took:.3g} ms", took <= limit)


def _rows(rows: Sequence[Row], part: str, start: str) -> list[Row]:
    return [row for row in rows if row["part"] == part and row["figure"].startswith(start)]


def _steps(value: float | str) -> float:
    return math.inf if isinstance(value, str) else value


def _verdict(part: str, criterion: str, figure: str, met: bool) -> Row:
    return {"part": part, "criterion": criterion, "figure": figure, "met": bool(met)}


def show(rows: Sequence[Row], console: Console) -> None:
    """One table, a section for each part."""
    table = Table("part", *_COLUMNS, title="components")
    for i, row in enumerate(rows):
        last = i + 1 == len(rows) or rows[i + 1]["part"] != row["part"]
        table.add_row(row["part"], *(_text(row[name]) for name in _COLUMNS), end_section=last)
    console.print(table)
    for verdict in verdicts(rows):
        met = "met" if verdict["met"] else "NOT MET"
        console.print(f"{met}: {verdict['part']}: {verdict['criterion']}: {verdict['figure']}", markup=False)


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return re.sub(r"\s+", " ", value)
    return f"{value:.4g}"


def plain(value: Any) -> Any:
    """For strict JSON: what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
