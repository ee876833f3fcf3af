"""What is counted in a finished run, the same way for every arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the host takes seconds to import, and a table or a picture needs none of it
    from bench.host import Measured

ALIGNED = 0.5
_IN_A_ROW = 3
_RELAPSE_STEPS = 50
_STABILITY_STEPS = 50
_INTERVENTION = 0.05
_L1_WITHIN = 1.15
_PATH_EVERY = 10


class Finished(Protocol):
    """What is left of a run, or of a population of runs."""

    trace: list[dict[str, float]]
    measured: list[Measured]
    seconds: float


def figures(run: Finished) -> dict[str, Any]:
    """One row's numbers. A run that never aligns has ``aligned_step`` None."""
    last = run.measured[-1]
    spoken = [m for m in run.measured if m.speaks is not None]
    first = aligned_at(run.measured)
    speaks = next((m.step for m in spoken if m.speaks is not None and m.speaks >= 0.9), None)
    return {
        "aligned_step": None if first is None else first.step,
        "aligned_s": None if first is None else first.seconds,
        "speaks_step": speaks,
        "relapse_steps": relapse(run.measured),
        "l1": last.l1,
        "l1_postnet": last.l1_postnet,
        "mcd": last.mcd,
        "liveliness": last.liveliness,
        "speaks": last.speaks,
        **last.values,
        "best_attention_diag": max(m.values["attention_diag"] for m in run.measured),
        "loss": tail_mean(run.trace, "loss"),
        "mel_loss": tail_mean(run.trace, "l1_loss") + tail_mean(run.trace, "mse_loss"),
        "gradient_stability": gradient_stability(run.trace),
        "interventions": interventions(run.trace),
        "seconds": run.seconds,
        "guided_path": [_rounded(row["used_guided"]) for row in run.trace[::_PATH_EVERY]],
        "rate_path": [_rounded(row["used_rate"]) for row in run.trace[::_PATH_EVERY]],
        "curve": [[m.step, round(m.l1, 4), round(m.values["attention_diag"], 4)] for m in run.measured],
    }


def aligned_at(measured: Sequence[Measured]) -> Measured | None:
    """The first of three evaluations in a row with ``attention_diag`` of at least 0.5 (DESIGN.md, *aligned*)."""
    for start in range(len(measured) - _IN_A_ROW + 1):
        if all(m.values["attention_diag"] >= ALIGNED for m in measured[start : start + _IN_A_ROW]):
            return measured[start]
    return None


def relapse(measured: Sequence[Measured]) -> int:
    """Steps that ``attention_diag``, once aligned, stayed below half of its best without a break, at the longest."""
    first = aligned_at(measured)
    if first is None:
        return 0
    best, since, longest = 0.0, None, 0
    for m in measured:
        if m.step < first.step:
            continue
        value = m.values["attention_diag"]
        best = max(best, value)
        since = (m.step if since is None else since) if value < 0.5 * best else None
        longest = max(longest, 0 if since is None else m.step - since)
    return longest


def relapsed(row: Mapping[str, Any]) -> bool:
    """Below half of its best for more than 50 steps."""
    return bool(row["relapse_steps"] > _RELAPSE_STEPS)


def rescued(row: Mapping[str, Any], clean_row: Mapping[str, Any]) -> bool:
    """The last three evaluations are aligned, and both held-out errors are within 15 % of the clean run's.

    The error after the postnet counts too: running statistics that a NaN has poisoned show in it alone.

    Args:
        row: of ``figures``.
        clean_row: of the same arm and seed, without the bad start.
    """
    newest = [attention_diag for _, _, attention_diag in row["curve"][-_IN_A_ROW:]]
    aligned = len(newest) == _IN_A_ROW and all(value >= ALIGNED for value in newest)
    # Not "no larger": NaN is no success.
    return bool(aligned and all(row[name] <= _L1_WITHIN * clean_row[name] for name in ("l1", "l1_postnet")))


def gradient_stability(trace: Sequence[Mapping[str, float]]) -> float:
    """Standard deviation of the logarithm of the gradient norm over the last 50 steps; NaN without two of them."""
    logs = [math.log(r["grad_norm"]) for r in trace[-_STABILITY_STEPS:] if 0.0 < r.get("grad_norm", 0.0) < math.inf]
    return statistics.stdev(logs) if len(logs) > 1 else math.nan


def interventions(trace: Sequence[Mapping[str, float]]) -> int:
    """Moves of the effective rate or the effective guided weight by more than 5 % from one step to the next.

    The rate that the optimizer used and the weight in the loss, whoever turned them; each counts by itself.
    """
    count = 0
    for before, after in pairwise(trace):
        for name in ("used_rate", "used_guided"):
            old, new = before.get(name), after.get(name)
            if old and new and abs(math.log(new / old)) > math.log1p(_INTERVENTION):
                count += 1
    return count


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def tail_mean(trace: Sequence[Mapping[str, float]], name: str, count: int = 20) -> float:
    """Mean of the last finite values."""
    values = [row[name] for row in trace[-count:] if math.isfinite(row.get(name, math.nan))]
    return sum(values) / len(values) if values else math.nan
