"""Pictures for the docs from a benchmark's rows.

    python benchmarks/plot.py benchmarks/results/align-kathleen-en-us.jsonl [--arms default,brain] [--out docs/images]
    python benchmarks/plot.py benchmarks/results/components.json

``NAME-curves.png``: held-out attention and L1 over steps, the median of the seeds and its range. ``NAME-steps.png``:
steps to aligned of every arm, a mark per seed; a run that never aligned stands at twice the budget. Rows of one setting
alone stand in a picture: the commonest, and what was left out is said. ``reliability.png``, of ``components.json``: of
the moves called so risky, how many went bad.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import beta

from bench.store import Store
from bench.summary import by_arm, of_one_setting, steps_to_aligned

_ROOT = Path(__file__).resolve().parents[1]
# Colours that people with any colour vision tell apart (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MOST_CURVES = len(_COLOURS)
_SAID = re.compile(r"(?P<what>.+), (?P<kind>\S+): went bad, said ")

Rows = dict[str, list[Mapping[str, Any]]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    arms_help = "comma-separated arms of the curves; default: brain, default, the best; no ablations"
    parser.add_argument("--arms", help=arms_help)
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "images")
    args = parser.parse_args()
    if args.rows.suffix == ".json":
        return _components(args.rows, args.out)
    rows, others = of_one_setting(Store(args.rows).rows())
    if others:
        print(f"plot.py: rows of other settings than the commonest left out: {others}", file=sys.stderr)
    groups = by_arm(rows)
    if not groups:
        print(f"plot.py: {args.rows} holds no rows; run the benchmark first", file=sys.stderr)
        return 2
    arms = [name.strip() for name in args.arms.split(",")] if args.arms else _shown(groups)
    unknown = [arm for arm in arms if arm not in groups]
    if unknown:
        print(f"plot.py: no rows of {unknown[0]!r}; there are {', '.join(groups)}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for kind, draw in (("curves", lambda: curves({a: groups[a] for a in arms})), ("steps", lambda: steps(groups))):
        _keep(draw(), args.out / f"{args.rows.stem}-{kind}.png")
    return 0


def _keep(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(path)


def _components(rows: Path, out: Path) -> int:
    """The picture of the risk's rows."""
    said = [
        row
        for row in json.loads(rows.read_text(encoding="utf-8"))["parts"].get("risk", ())
        if _SAID.match(row["figure"])
    ]
    if not said:
        print(f"plot.py: {rows} holds no rows of the risk; run components --arms risk first", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    _keep(reliability(said), out / "reliability.png")
    return 0


def _shown(groups: Rows) -> list[str]:
    """The brain, the host's default, and of the others those that align soonest; no ablations of the brain.

    Those are "brain without …" and "brain with …"; "brain at …" is the whole brain from constants.
    """
    others = [arm for arm in groups if not arm.startswith("brain with")]
    others.sort(key=lambda arm: (np.median([steps_to_aligned(r) for r in groups[arm]]), arm))
    first = [arm for arm in ("brain", "default") if arm in groups]
    return list(dict.fromkeys([*first, *others]))[:_MOST_CURVES]


def curves(groups: Rows) -> Any:
    """Held-out ``attention_diag`` and L1 over steps."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (arm, rows), colour in zip(groups.items(), _COLOURS, strict=False):
        shape = min(len(row["curve"]) for row in rows)
        values = np.array([row["curve"][:shape] for row in rows])  # (seeds, points, [step, l1, attention_diag])
        for axis, column in zip(axes, (2, 1), strict=True):
            step, found = values[0, :, 0], values[:, :, column]
            axis.plot(step, np.median(found, axis=0), color=colour, label=f"{arm} ({len(rows)})")
            axis.fill_between(step, found.min(axis=0), found.max(axis=0), color=colour, alpha=0.15, linewidth=0)
    axes[0].axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes[0].set(xlabel="optimizer step", ylabel="attention_diag, held out", ylim=(0, 1))
    axes[1].set(xlabel="optimizer step", ylabel="L1, held out")
    # The first steps would flatten the rest.
    late = np.concatenate([[p[1] for p in row["curve"][2:]] for rows in groups.values() for row in rows])
    axes[1].set_ylim(late.min() - 0.02, np.quantile(late, 0.98))
    labelled = axes[0].get_legend_handles_labels()
    figure.legend(*labelled, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def steps(groups: Rows) -> Any:
    """Steps to aligned, arm by arm."""
    order: Sequence[str] = sorted(groups, key=lambda arm: np.median([steps_to_aligned(r) for r in groups[arm]]))
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.3 * len(order)), layout="constrained")
    for place, arm in enumerate(reversed(order)):
        values = [steps_to_aligned(row) for row in groups[arm]]
        axis.plot([np.median(values)], [place], "|", color=_COLOURS[1], markersize=14, markeredgewidth=3)
        axis.plot(values, [place] * len(values), "o", color=_COLOURS[0], alpha=0.7)
    budget = next(iter(groups.values()))[0]["setting"]["steps"]
    axis.axvline(budget, color="grey", linestyle=":", linewidth=1)
    axis.set_yticks(range(len(order)), list(reversed(order)))
    axis.set(xlabel=f"steps to aligned (never: {2 * budget}); bar: median", xlim=(0, 2.1 * budget))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def reliability(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Of the moves called so risky, the share that went bad: a panel per event, a line per kind of move.

    A bar is the 90 % Jeffreys interval of the share (Brown, Cai and DasGupta 2001), as if no two moves were of one
    run: the true one is wider.
    """
    found: dict[str, dict[str, list[tuple[float, float, int]]]] = {}
    for row in rows:
        name = _SAID.match(row["figure"])
        assert name is not None
        points = found.setdefault(name["what"], {}).setdefault(name["kind"], [])
        points.append((row["theirs"], row["ours"], int(row["note"].split()[0])))
    figure, panels = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.6), layout="constrained", squeeze=False)
    for panel, (what, kinds) in zip(panels[0], found.items(), strict=True):
        panel.plot([0, 1], [0, 1], color="0.7", linewidth=1, label="as many as said")
        for colour, (kind, points) in zip(_COLOURS, kinds.items(), strict=False):
            said, bad, count = (np.array(values) for values in zip(*points, strict=True))
            low, high = (beta.ppf(q, bad * count + 0.5, (1 - bad) * count + 0.5) for q in (0.05, 0.95))
            panel.vlines(said, low, high, color=colour, alpha=0.5)
            panel.plot(said, bad, "o-", color=colour, label=f"{kind} ({count.sum()} moves)")
        panel.set(title=what, xlabel="said", ylabel="went bad", xlim=(-0.02, 1.0), ylim=(-0.02, 1.02))
        panel.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
