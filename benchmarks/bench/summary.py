"""Medians over seeds, with bootstrap intervals; a run that never aligns counts as twice the budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import rescued

_RESAMPLES = 2000
LEVEL = 0.9


def steps_to_aligned(row: Mapping[str, Any]) -> float:
    """A run that never aligns counts as twice the budget."""
    step = row["aligned_step"]
    return float(2 * row["setting"]["steps"] if step is None else step)


def seconds_to_aligned(row: Mapping[str, Any]) -> float:
    value = row["aligned_s"]
    return float(2 * row["seconds"] if value is None else value)


Column = Callable[[Mapping[str, Any]], float]

COLUMNS: dict[str, Column] = {
    "steps to aligned": steps_to_aligned,
    "seconds to aligned": seconds_to_aligned,
    "held-out L1": lambda row: row["l1"],
    "MCD dB": lambda row: row["mcd"],
    "attention_diag": lambda row: row["attention_diag"],
    "speaks": lambda row: row["speaks"],
    "relapse steps": lambda row: float(row["relapse_steps"]),
    "gradient stability": lambda row: row["gradient_stability"],
}

# The rows of the old AutoFixManager's table, and what this project goes by beside them.
AUTOFIX: dict[str, Column] = {
    "final loss": lambda row: row["loss"],
    "diagonality": lambda row: row["diagonality"],
    "attention_diag": lambda row: row["attention_diag"],
    "gradient stability": lambda row: row["gradient_stability"],
    "interventions": lambda row: float(row["interventions"]),
    "guided weight, first": lambda row: row["guided_path"][0],
    "guided weight, last": lambda row: row["guided_path"][-1],
    "held-out L1": lambda row: row["l1"],
}
# What fits a terminal; the rows and the summary beside them have all.
SHORT = ("steps to aligned", "final loss", "held-out L1", "diagonality", "attention_diag", "speaks", "interventions")


def columns_of(benchmark: str) -> dict[str, Column]:
    """What a benchmark's table shows."""
    return AUTOFIX if benchmark == "autofix150" else COLUMNS


def median_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median and a percentile bootstrap interval at 90 % (Efron 1979); both ends are the median of one value.

    With a handful of seeds the interval is coarse: its ends are among the values themselves.
    """
    clean = np.array([v for v in values if v is not None and math.isfinite(v)], dtype=np.float64)
    if len(clean) == 0:
        return math.nan, math.nan, math.nan
    generator = np.random.default_rng(seed)
    drawn = np.median(generator.choice(clean, (_RESAMPLES, len(clean))), axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.median(clean)), float(low), float(high)


def by_arm(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each arm, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["arm"]].append(row)
    return dict(groups)


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Column] = COLUMNS) -> list[list[str]]:
    """Header and one line per arm, best first by steps to aligned, then L1; as text."""
    groups = by_arm(rows)
    lines = []
    for arm, group in groups.items():
        order = (np.median([steps_to_aligned(r) for r in group]), np.median([r["l1"] for r in group]))
        cells = [_shown(*median_interval([of(r) for r in group])) for of in columns.values()]
        aligned = sum(r["aligned_step"] is not None for r in group)
        lines.append((order, [arm, f"{aligned} of {len(group)}", *cells]))
    return [["arm", "aligned", *columns], *(cells for _, cells in sorted(lines, key=lambda line: line[0]))]


def rescue_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line per bad start, a column per arm: rescued of the seeds run, and whether the brain named the cause."""
    arms = list(by_arm(rows))
    clean = {(row["arm"], row["seed"]): row for row in rows if not row["start"]}
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    told: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        if row["start"] and (row["arm"], row["seed"]) in clean:
            cells[row["start"], row["arm"]].append(rescued(row, clean[row["arm"], row["seed"]]))
            if "told" in row:
                told[row["start"]].append(row["told"])
    starts = list(dict.fromkeys(row["start"] for row in rows if row["start"]))
    lines = [[start, *(_share(cells[start, arm]) for arm in arms), _share(told[start])] for start in starts]
    total = [_share([hit for start in starts for hit in cells[start, arm]]) for arm in arms]
    lines.append(["all", *total, _share([hit for hits in told.values() for hit in hits])])
    return [["bad start", *arms, "cause told"], *lines]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)} of {len(hits)}" if hits else "–"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """For the docs."""
    head, *body = lines
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in body)]) + "\n"


def _shown(middle: float, low: float, high: float) -> str:
    if math.isnan(middle):
        return "–"
    digits = 0 if abs(middle) >= 20 else 3 if abs(middle) < 2 else 2
    if low == high == middle:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def show(benchmark: str, rows: Sequence[Mapping[str, Any]], path: Path, console: Any) -> None:
    """The table of medians on a terminal, and whole as Markdown in ``path``."""
    from rich.table import Table

    if not rows:
        console.print("no rows yet")
        return
    lines = rescue_table(rows) if benchmark == "rescue" else table(rows, columns_of(benchmark))
    _write(path, f"# {benchmark}\n\nMedian over seeds (90 % bootstrap interval).\n\n{markdown(lines)}")
    head, *body = lines
    shown = Table(title=f"{benchmark}: median over seeds (90 % bootstrap interval)")
    whole = benchmark == "rescue"
    narrow = [number for number, name in enumerate(head) if whole or name in ("arm", "aligned", *SHORT)]
    for number in narrow:
        shown.add_column(head[number], no_wrap=number == 0, overflow="fold")
    for line in body:
        shown.add_row(*(line[number] for number in narrow))
    console.print(shown)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
