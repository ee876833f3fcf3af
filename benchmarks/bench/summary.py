"""Medians over seeds, with their ranges or bootstrap intervals; a run that never aligns counts as twice the budget.

A value that is not finite is no value to leave out: it counts as the worst there is.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.figures import rescued

_RESAMPLES = 2000
LEVEL = 0.9
# Of so many values or fewer the bootstrap interval at 90 % is the range of the values: each of them alone is the median
# of more than one draw in twenty.
FEW = 5
UNNAMED = "older, unnamed"


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
# Where more is better; in all other columns what is not finite counts as infinitely much.
_HIGHER_IS_BETTER = frozenset({"attention_diag", "speaks", "diagonality"})
# What fits a terminal; the rows and the summary beside them have all.
SHORT = ("steps to aligned", "final loss", "held-out L1", "diagonality", "attention_diag", "speaks", "interventions")


def columns_of(benchmark: str) -> dict[str, Column]:
    """What a benchmark's table shows."""
    return AUTOFIX if benchmark == "autofix150" else COLUMNS


def median_interval(
    values: Sequence[float | None], worst: float = math.inf, seed: int = 0
) -> tuple[float, float, float]:
    """Median and a percentile bootstrap interval at 90 % (Efron 1979); of ``FEW`` values or fewer that is their range.

    Args:
        worst: what a value counts as that is missing or not finite; ``-math.inf`` where more is better.
    """
    known = np.array([v if v is not None and math.isfinite(v) else worst for v in values], dtype=np.float64)
    if len(known) == 0:
        return math.nan, math.nan, math.nan
    middle = float(np.median(known))
    if len(known) <= FEW:
        return middle, float(known.min()), float(known.max())
    drawn = np.median(np.random.default_rng(seed).choice(known, (_RESAMPLES, len(known))), axis=1)
    # Without interpolation: half-way to infinity is no number.
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return middle, float(low), float(high)


def by_arm(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each arm, in the order they came."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["arm"]].append(row)
    return dict(groups)


def of_one_setting(rows: Iterable[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], int]:
    """The rows of the commonest setting, of two alike the first, and how many others there are."""
    rows = list(rows)
    keys = [json.dumps(row["setting"], sort_keys=True) for row in rows]
    if not keys:
        return [], 0
    commonest, count = Counter(keys).most_common(1)[0]
    return [row for row, key in zip(rows, keys, strict=True) if key == commonest], len(rows) - count


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Column] = COLUMNS) -> list[list[str]]:
    """Header and one line per arm, best first by steps to aligned, then L1; as text."""
    groups = by_arm(rows)
    lines = []
    for arm, group in groups.items():
        order = tuple(median_interval([of(r) for r in group])[0] for of in (steps_to_aligned, COLUMNS["held-out L1"]))
        cells = [cell([of(r) for r in group], name in _HIGHER_IS_BETTER) for name, of in columns.items()]
        aligned = sum(r["aligned_step"] is not None for r in group)
        lines.append((order, [arm, f"{aligned} of {len(group)}", *cells]))
    return [["arm", "aligned", *columns], *(cells for _, cells in sorted(lines, key=lambda line: line[0]))]


def rescue_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A line for the clean run and one per bad start, a column per arm: rescued of the seeds run.

    *Cause told*: the brain named all that is wrong. *False causes*: it named one that is not among the start's; in the
    clean run every cause is false. The last line counts the bad starts.
    """
    from bench.bad_starts import BAD_STARTS  # imports torch

    arms = list(by_arm(rows))
    clean = {(row["arm"], row["seed"]): row for row in rows if not row["start"]}
    cells: dict[tuple[str, str], list[bool]] = defaultdict(list)
    told: dict[str, list[bool]] = defaultdict(list)
    false: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        start = row["start"]
        if start and (row["arm"], row["seed"]) in clean:
            cells[start, row["arm"]].append(rescued(row, clean[row["arm"], row["seed"]]))
        if start and "told" in row:
            told[start].append(row["told"])
        if "named" in row:
            false[start].append(not set(row["named"]) <= set(BAD_STARTS[start].causes if start else ()))
    starts = list(dict.fromkeys(row["start"] for row in rows if row["start"]))
    lines = [
        [start, *(_share(cells[start, arm]) for arm in arms), _share(told[start]), _share(false[start])]
        for start in starts
    ]
    total = [_share([hit for start in starts for hit in cells[start, arm]]) for arm in arms]
    total += [_share([hit for start in starts for hit in hits[start]]) for hits in (told, false)]
    first = ["clean", *("–" for _ in arms), "–", _share(false[""])]
    return [["bad start", *arms, "cause told", "false causes"], first, *lines, ["all", *total]]


def _share(hits: Sequence[bool]) -> str:
    return f"{sum(hits)} of {len(hits)}" if hits else "–"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """For the docs."""
    head, *body = lines
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(line) + " |" for line in body)]) + "\n"


def cell(values: Sequence[float | None], higher_is_better: bool) -> str:
    """Median and interval as text; a dash where the median is not finite. How many are not finite is said."""
    middle, low, high = median_interval(values, -math.inf if higher_is_better else math.inf)
    broken = sum(v is None or not math.isfinite(v) for v in values)
    if math.isnan(middle):
        return "–"
    if not math.isfinite(middle):
        return f"– ({broken} of {len(values)} not finite)"
    digits = 0 if abs(middle) >= 20 else 3 if abs(middle) < 2 else 2
    if low == high == middle:
        return f"{middle:.{digits}f}"
    text = f"{middle:.{digits}f} ({_end(low, digits)}–{_end(high, digits)})"
    return f"{text}, {broken} of {len(values)} not finite" if broken else text


def _end(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "∞" if value > 0.0 else "−∞"


def caption(rows: Sequence[Mapping[str, Any]]) -> str:
    """What stands beside the medians in a table of these rows."""
    most = max((len(group) for group in by_arm(rows).values()), default=0)
    if most <= FEW:
        return "median over seeds (range over seeds)"
    return f"median over seeds (90 % bootstrap interval; of {FEW} seeds or fewer it is the range)"


def brains(rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence on how many versions of the brain's code its rows are of; empty for one or none.

    A row from before rows carried a digest of the code counts as ``UNNAMED``, which may be several.
    """
    codes = Counter(
        (row.get("versions") or {}).get("code", UNNAMED) for row in rows if row["arm"].split()[0] == "brain"
    )
    if len(codes) < 2:
        return ""
    listed = ", ".join(f"{code} ({count})" for code, count in codes.items())
    return f"The rows of the brain are of {len(codes)} versions of its code (rows of each): {listed}."


def devices(rows: Iterable[Mapping[str, Any]]) -> str:
    """A sentence on where its rows were trained; empty for the processor alone, where rows that do not say were."""
    count = Counter(row.get("device", "cpu") for row in rows)
    if set(count) <= {"cpu"}:
        return ""
    return f"Where the models trained (rows of each): {', '.join(f'{name} ({n})' for name, n in count.items())}."


def show(benchmark: str, rows: Sequence[Mapping[str, Any]], path: Path, console: Any) -> None:
    """The table on a terminal, and whole as Markdown in ``path``; below it the brains in it, and where they ran."""
    from rich.table import Table

    if not rows:
        console.print("no rows yet")
        return
    whole = benchmark == "rescue"
    lines = rescue_table(rows) if whole else table(rows, columns_of(benchmark))
    title = "rescued of the seeds run" if whole else caption(rows)
    about = " ".join(filter(None, [brains(rows), devices(rows)]))
    below = f"\n{about}\n" if about else ""
    _write(path, f"# {benchmark}\n\n{title[0].upper()}{title[1:]}.\n\n{markdown(lines)}{below}")
    head, *body = lines
    shown = Table(title=f"{benchmark}: {title}")
    narrow = [number for number, name in enumerate(head) if whole or name in ("arm", "aligned", *SHORT)]
    for number in narrow:
        shown.add_column(head[number], no_wrap=number == 0, overflow="fold")
    for line in body:
        shown.add_row(*(line[number] for number in narrow))
    console.print(shown)
    if about:
        console.print(about, markup=False)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
