"""Is the micro-Tacotron a fair stand-in? Its answer to rate, guidance, batch and r beside the small ESPnet model's.

    python -m bench.micro_grid --json FILE                    # train the grid, a row per run (in benchmarks/)
    python -m bench.micro_grid --json FILE --compare ROWS …   # Spearman against rows of `run.py align`
    python -m bench.micro_grid --json FILE --compare ROWS … --figure PNG

The grid is the benchmark's own (``bench.plans``): guided weights in the host's units, which are the micro model's times
``HOST_TOKENS``, rates as multiples of a base that belongs to each model, and the forward-sum arms.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scipy.stats import spearmanr

from tts_brain.learning.micro_tacotron import MicroRuns, MicroSetting

HOST_TOKENS = 43.0  # mean text of kathleen-en-us, end token included
HOST_RATE, MICRO_RATE = 1e-3, 1e-3  # what a multiple of 1 means
STEPS = 400
EVALUATE_EVERY = 25
_HOST_BATCH, _HOST_R = 16, 4
_ALIGNED, _IN_A_ROW = 0.5, 3
_TOGETHER = 24  # runs in one batch: more gain nothing on a core


@dataclass(frozen=True, order=True)
class Point:
    """One setting, in units that both models have.

    Args:
        guided: weight in the host's units; the normalised one is this over ``HOST_TOKENS``.
        rate: multiple of the model's base rate.
        forward_sum: weight.
        batch_size: utterances.
        reduction_factor: mel frames per decoder step.
    """

    guided: float
    rate: float
    forward_sum: float = 0.0
    batch_size: int = _HOST_BATCH
    reduction_factor: int = _HOST_R

    def __str__(self) -> str:
        also = f" fs{self.forward_sum:g}" if self.forward_sum else ""
        sizes = f" b{self.batch_size}" if self.batch_size != _HOST_BATCH else ""
        sizes += f" r{self.reduction_factor}" if self.reduction_factor != _HOST_R else ""
        return f"g{self.guided:g} x{self.rate:g}{also}{sizes}"

    def setting(self, base_rate: float = MICRO_RATE, **changes: Any) -> MicroSetting:
        """The micro model's."""
        return MicroSetting(
            rate=self.rate * base_rate,
            guided_weight=self.guided / HOST_TOKENS,
            forward_sum=self.forward_sum,
            batch_size=self.batch_size,
            reduction_factor=self.reduction_factor,
            **changes,
        )


GRID = tuple(Point(guided, rate) for guided in (1.0, 10.0, 100.0, 300.0) for rate in (1.0, 2.0, 3.0)) + tuple(
    Point(guided, 2.0, forward_sum) for guided in (100.0, 300.0) for forward_sum in (0.03, 0.1)
)
# Batch and r, from two of the grid's points that align.
SIZES = tuple(
    Point(300.0, 2.0, forward_sum, batch, r)
    for batch, r in ((4, _HOST_R), (2, _HOST_R), (_HOST_BATCH, 2), (_HOST_BATCH, 1))
    for forward_sum in (0.0, 0.03)
)


def train(
    points: Sequence[Point], seeds: Sequence[int], steps: int = STEPS, base_rate: float = MICRO_RATE, **changes: Any
) -> Iterator[dict[str, Any]]:
    """A row for each point and seed, those of one shape trained side by side.

    Args:
        changes: further fields of ``MicroSetting``, the same for all.

    Yields:
        The point's fields, ``seed``, ``steps``, held-out ``l1`` and ``attention_diag`` at the end, ``aligned_step``
        (the first of three evaluations in a row at 0.5 or above, None without) and ``curve`` ([step, l1,
        attention_diag]).
    """
    shapes: dict[tuple[int, int], list[tuple[Point, int]]] = defaultdict(list)
    for seed in seeds:
        for point in points:
            shapes[point.batch_size, point.reduction_factor].append((point, seed))
    for cells in shapes.values():
        for first in range(0, len(cells), _TOGETHER):
            yield from _together(cells[first : first + _TOGETHER], steps, base_rate, changes)


def _together(
    cells: Sequence[tuple[Point, int]], steps: int, base_rate: float, changes: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    runs = MicroRuns([point.setting(base_rate, **changes) for point, _ in cells], [seed for _, seed in cells])
    curves: list[list[list[float]]] = [[] for _ in cells]
    for step in range(1, steps + 1):
        runs.step()
        if step % EVALUATE_EVERY == 0 or step == steps:
            for curve, held_out in zip(curves, runs.held_out(), strict=True):
                curve.append([step, held_out["l1"], held_out["attention_diag"]])
    for (point, seed), curve in zip(cells, curves, strict=True):
        yield {**point.__dict__, "seed": seed, **at_step(curve, steps)}


def at_step(curve: Sequence[Sequence[float]], steps: int) -> dict[str, Any]:
    """A row's figures, had the run ended at ``steps``."""
    curve = [list(one) for one in curve if one[0] <= steps]
    return {
        "steps": steps,
        "l1": curve[-1][1],
        "attention_diag": curve[-1][2],
        "aligned_step": aligned_step(curve),
        "curve": curve,
    }


def aligned_step(curve: Sequence[Sequence[float]]) -> int | None:
    """As ``bench.figures.aligned_at``, whose module is not needed for a curve."""
    good = [one[2] >= _ALIGNED for one in curve]
    for start in range(len(curve) - _IN_A_ROW + 1):
        if all(good[start : start + _IN_A_ROW]):
            return int(curve[start][0])
    return None


_STATIC = re.compile(r"static g(?P<guided>\S+) lr(?P<rate>\S+?)(?: fs(?P<forward_sum>\S+))?$")


def point_of(row: Mapping[str, Any]) -> Point | None:
    """The setting of a row of ``run.py align``; None for an arm that is not constant, or a bad start."""
    if row.get("start"):
        return None
    setting = row["setting"]
    sizes = (int(setting["batch_size"]), int(setting["reduction_factor"]))
    if row["arm"] == "default":
        return Point(1.0, setting["rate"] / HOST_RATE, 0.0, *sizes)
    found = _STATIC.match(row["arm"])
    if found is None:
        return None
    return Point(float(found["guided"]), float(found["rate"]) / HOST_RATE, float(found["forward_sum"] or 0.0), *sizes)


def spearman(
    rows_espnet: Iterable[Mapping[str, Any]], rows_micro: Iterable[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Rank correlation over the settings that both have; a setting counts by the median over its seeds.

    Args:
        rows_espnet: of ``run.py align``, other arms among them are left out.
        rows_micro: of ``train``.

    Returns:
        For ``attention_diag``, ``l1`` and ``aligned_step`` (never is twice the run): ``rho``, ``p`` (of no correlation)
        and ``settings`` (how many).

    Raises:
        ValueError: fewer than three settings in common.
    """
    espnet = _medians((point_of(row), row) for row in rows_espnet)
    micro = _medians((_own_point(row), row) for row in rows_micro)
    both = sorted(espnet.keys() & micro.keys())
    if len(both) < 3:
        raise ValueError(f"{len(both)} settings in common; train the same grid with both, at least three settings")
    result = {}
    for name in ("attention_diag", "l1", "aligned_step"):
        pair = [espnet[point][name] for point in both], [micro[point][name] for point in both]
        ranked = min(len(set(pair[0])), len(set(pair[1]))) > 1  # where all are equal there is no rank
        found = spearmanr(*pair) if ranked else None
        rho, p = (math.nan, math.nan) if found is None else (float(found.statistic), float(found.pvalue))
        result[name] = {"rho": rho, "p": p, "settings": len(both)}
    return result


def _own_point(row: Mapping[str, Any]) -> Point:
    return Point(**{name: row[name] for name in Point.__dataclass_fields__})


def _medians(pairs: Iterable[tuple[Point | None, Mapping[str, Any]]]) -> dict[Point, dict[str, float]]:
    groups: dict[Point, list[dict[str, float]]] = defaultdict(list)
    for point, row in pairs:
        if point is None:
            continue
        steps = row["steps"] if "steps" in row else row["setting"]["steps"]
        never = row["aligned_step"] is None
        groups[point].append(
            {
                "attention_diag": row["attention_diag"],
                "l1": row["l1"] if math.isfinite(row["l1"]) else math.inf,
                "aligned_step": float(2 * steps if never else row["aligned_step"]),
            }
        )
    return {point: {name: median(one[name] for one in group) for name in group[0]} for point, group in groups.items()}


def figure(rows_espnet: Iterable[Mapping[str, Any]], rows_micro: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Both models' medians for each setting that both have, one against the other, the three figures side by side.

    Other sizes than the grid's batch and r are orange; the larger a mark, the higher its rate.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows_espnet, rows_micro = list(rows_espnet), list(rows_micro)
    found = spearman(rows_espnet, rows_micro)
    espnet = _medians((point_of(row), row) for row in rows_espnet)
    micro = _medians((_own_point(row), row) for row in rows_micro)
    both = sorted(espnet.keys() & micro.keys())
    drawing, panels = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4.5), layout="constrained")
    for panel, (name, value) in zip(panels, found.items(), strict=True):
        for point in both:
            x, y = espnet[point][name], micro[point][name]
            color = "tab:blue" if point in GRID else "tab:orange"
            panel.scatter(x, y, s=14 * point.rate, marker="^" if point.forward_sum else "o", color=color)
            panel.annotate(str(point), (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        panel.set(title=f"{name}: Spearman {value['rho']:+.2f}, {value['settings']} settings")
        panel.set(xlabel="ESPnet's small Tacotron2, real speech", ylabel="micro-Tacotron")
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Rows of JSON lines; a last line that is still being written is left out."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="rows of the micro model")
    parser.add_argument("--compare", type=Path, nargs="+", help="rows of the ESPnet model; nothing is trained")
    parser.add_argument("--figure", type=Path, help="with --compare: where the picture goes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sizes", action="store_true", help="batch and r too; r = 1 takes four times as long")
    args = parser.parse_args()
    if args.compare:
        espnet, micro = read(args.compare), read([args.json])
        if args.figure:
            figure(espnet, micro, args.figure)
        for name, found in spearman(espnet, micro).items():
            print(f"{name:15} rho {found['rho']:+.2f}  p {found['p']:.1e}  over {found['settings']} settings")
        return
    torch.set_num_threads(1)
    with args.json.open("w", encoding="utf-8") as file:
        for row in train(GRID + (SIZES if args.sizes else ()), range(args.seeds), args.steps):
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
