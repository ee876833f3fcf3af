"""The filter alone, against the simplest that one would use instead; made-up series whose truth is known.

(a) level and slope, against an EMA and a rolling least squares **at equal lag**. On a step of the level (for the
slope: a kink) under noise, the rival's window is the one whose mean response reaches half the change in as many steps
as the filter's does. A rival's lag is that of its window; the filter's depends on the size of the step, so two sizes
are taken. An EMA's slope is the EMA of the differences. On a steady ramp the filter and least squares have no lag in
the end and an EMA always has, which is why a step is the measure. As the filter adapts and a window does not, the note
also has the rival's best window in hindsight, chosen on the very series that are judged.

(b) spikes and breaks, against "6 sigma over 128 steps" with its 6 replaced, as is the filter's own, by what gives one
false alarm per 10,000 steps on other runs of noise alone. The rule is off by design where a loss falls fast.

(c) time per update.

The filter was tuned on other seeds, noise levels and families (one exponential, power law, flat, linear pieces, level
steps). Here ``exponential``, ``plateau`` and ``kinks`` are of kinds that it was tuned on; those of HELD_OUT are not.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tts_brain.context.trends import trend
from tts_brain.feedback.kalman import MetricFilter

STEPS = 700
BURN_IN = 50
FIRST_SEED = 50_000
NOISES = (0.03, 0.15)
STEP_SIZES = (1.5, 4.0)
KINK_SIZES = (0.05, 0.2)
FALSE_ALARMS = 1e-4
WINDOW = 128
SPIKES = (4.0, 6.0, 10.0)
BREAKS = (2.0, 4.0, 8.0)
WITHIN = 30

Estimate = tuple[np.ndarray, np.ndarray]


# -- the truth -------------------------------------------------------------------------------------------------------


def _exponential(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.3, 1.0) + rng.uniform(1.0, 3.0) * np.exp(-t / rng.uniform(40.0, 250.0))


def _plateau(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Falls in a straight line, then stays."""
    return 1.0 + rng.uniform(0.003, 0.01) * np.maximum(rng.uniform(100.0, 300.0) - t, 0.0)


def _kinks(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    at = np.sort(rng.uniform(60.0, len(t) - 60.0, size=4))
    slopes = -rng.choice([0.0, 0.0015, 0.004, -0.002], size=5)
    fallen = np.cumsum(slopes[np.searchsorted(at, t)])
    return fallen - fallen.min() + 0.5


def _two_rates(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return 0.5 + 2.0 * np.exp(-t / rng.uniform(10.0, 30.0)) + np.exp(-t / rng.uniform(300.0, 900.0))


def _late_drop(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A plateau left when attention forms."""
    return 1.0 - 0.6 / (1.0 + np.exp(-(t - rng.uniform(200.0, 500.0)) / rng.uniform(8.0, 40.0)))


def _rate_drops(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each drop of the rate lets the loss relax to a lower plateau."""
    loss = np.full(len(t), 1.5)
    for at in (150.0, 300.0, 500.0):
        loss += 0.3 * np.expm1(-np.maximum(t - at, 0.0) / rng.uniform(10.0, 40.0))
    return loss


def _rebound(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Falls, then slowly diverges."""
    return 0.5 + np.exp(-t / 60.0) + (np.maximum(t - rng.uniform(250.0, 450.0), 0.0) / 200.0) ** 2


TUNED_ON = {"exponential": _exponential, "plateau": _plateau, "kinks": _kinks}
HELD_OUT = {"two rates": _two_rates, "late drop": _late_drop, "rate drops": _rate_drops, "rebound": _rebound}


def _gaussian(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(size=size)


def _heavy(rng: np.random.Generator, size: int) -> np.ndarray:
    """Student's t of five degrees, of unit variance."""
    return rng.standard_t(5, size=size) / math.sqrt(5.0 / 3.0)


def _spiky(rng: np.random.Generator, size: int) -> np.ndarray:
    """Normal; three values in a hundred are 5 to 25 widths too high."""
    return rng.normal(size=size) + rng.uniform(5.0, 25.0, size=size) * (rng.random(size) < 0.03)


NOISE_KINDS = {"normal": _gaussian, "heavy tails": _heavy, "3 % spikes": _spiky}


# -- the estimators --------------------------------------------------------------------------------------------------


def ours(values: np.ndarray) -> Estimate:
    """Level and slope at each step, by the filter with its defaults (identity link)."""
    found = MetricFilter()
    reports = [found.update(step, float(value)) for step, value in enumerate(values, start=1)]
    return np.array([r.level for r in reports if r]), np.array([r.slope for r in reports if r])


def ema(values: np.ndarray, window: float) -> Estimate:
    """EMA of the values, and of their differences; its step response is half after ``window`` steps."""
    gain = 1.0 - 0.5 ** (1.0 / window)
    level, slope = np.empty(len(values)), np.empty(len(values))
    level[0], slope[0] = values[0], 0.0
    for i in range(1, len(values)):
        level[i] = level[i - 1] + gain * (values[i] - level[i - 1])
        slope[i] = slope[i - 1] + gain * (values[i] - values[i - 1] - slope[i - 1])
    return level, slope


def least_squares(values: np.ndarray, window: float) -> Estimate:
    """End point and slope of a straight line through the last ``window`` values; through all while there are fewer."""
    size = max(int(window), 2)
    level, slope = np.empty(len(values)), np.zeros(len(values))
    level[0] = values[0]
    for i in range(1, min(size - 1, len(values))):
        level[i], slope[i] = _line(values[None, : i + 1])
    if len(values) >= size:
        level[size - 1 :], slope[size - 1 :] = _line(np.lib.stride_tricks.sliding_window_view(values, size))
    return level, slope


def _line(rows: np.ndarray) -> tuple[Any, Any]:
    x = np.arange(rows.shape[1]) - (rows.shape[1] - 1) / 2.0
    slope = rows @ x / (x @ x)
    return np.squeeze(rows.mean(axis=1) + slope * x[-1]), np.squeeze(slope)


RIVALS: dict[str, tuple[Callable[[np.ndarray, float], Estimate], Sequence[float]]] = {
    "EMA": (ema, tuple(np.unique(np.round(np.geomspace(1.0, 150.0, 50), 1)).tolist())),
    "rolling least squares": (least_squares, tuple(np.unique(np.geomspace(3, 400, 70).astype(int)).tolist())),
}


# -- (a) level and slope at equal lag --------------------------------------------------------------------------------


def _half_rise(response: np.ndarray, change: float) -> float:
    """Steps until the response first reaches half the change; between two steps, the line between them."""
    reached = int(np.argmax(response >= change / 2.0))
    if response[reached] < change / 2.0:
        return math.inf
    if reached == 0:
        return 1.0
    before = response[reached - 1]
    return reached + float((change / 2.0 - before) / (response[reached] - before))


@cache
def our_lag(which: int, size: float, runs: int) -> float:
    """Half rise of the filter's mean response to a step of the level (0) or of the slope (1), in noise widths."""
    before, after = 200, 200
    change = np.concatenate([np.zeros(before), np.ones(after) if which == 0 else np.arange(1.0, after + 1.0)])
    total = np.zeros(after)
    for seed in range(runs):
        rng = np.random.default_rng(FIRST_SEED - 1 - seed)
        noise = rng.normal(size=before + after)
        total += ours(size * change + noise)[which][before:]
    return _half_rise(total / runs, size)


@cache
def rival_window(rival: str, which: int, lag: float) -> float:
    """The window whose half rise on a change without noise is nearest to ``lag`` (they are linear: noise adds none)."""
    estimate, windows = RIVALS[rival]
    change = np.concatenate([np.zeros(450), np.ones(450) if which == 0 else np.arange(1.0, 451.0)])
    return min(windows, key=lambda w: abs(_half_rise(estimate(change, w)[which][450:], 1.0) - lag))


class Cell(NamedTuple):
    """One made-up series; ``noise`` is the width of its noise, ``kind`` the name of it."""

    family: str
    kind: str
    noise: float
    truth: np.ndarray
    values: np.ndarray


def _cells(families: dict[str, Any], seeds: int) -> list[Cell]:
    """Series of every family, noise level and kind."""
    cells = []
    for number, (name, family) in enumerate(families.items()):
        for level, noise in enumerate(NOISES):
            for kind, (noise_kind, draw) in enumerate(NOISE_KINDS.items()):
                for seed in range(seeds):
                    rng = np.random.default_rng((FIRST_SEED, len(name), number, level, kind, seed))
                    truth = family(np.arange(STEPS, dtype=float), rng)
                    cells.append(Cell(name, noise_kind, noise, truth, truth + noise * draw(rng, STEPS)))
    return cells


def level_and_slope(quick: bool) -> list[dict[str, Any]]:
    """Rows of (a): geometric means over series of the RMSE in noise widths (of the slope: per step)."""
    result = []
    for kind, families in (("known", TUNED_ON), ("held-out", HELD_OUT)):
        cells = _cells(families, 1 if quick else 6)
        found = [ours(cell.values) for cell in cells]
        for which, rival in itertools.product((0, 1), RIVALS):
            result += _compare(kind, cells, found, which, rival, quick)
    return result


def _compare(
    kind: str, cells: Sequence[Cell], found: Sequence[Estimate], which: int, rival: str, quick: bool
) -> list[dict[str, Any]]:
    """Rows against one rival, for the level (0) or the slope (1), at the windows of equal lag."""
    what, change, sizes = (("level", "step", STEP_SIZES), ("slope", "kink", KINK_SIZES))[which]
    estimate, windows = RIVALS[rival]
    mine = _errors([pair[which] for pair in found], cells, which)

    def errors(window: float) -> np.ndarray:
        return _errors([estimate(cell.values, window)[which] for cell in cells], cells, which)

    best = min(windows[:: 8 if quick else 2], key=lambda w: _mean(errors(w)))
    in_hindsight = f"best window in hindsight {best:g}: {_mean(errors(best)):.4g}"
    result = []
    for size in sizes:
        lag = our_lag(which, size, 40 if quick else 200)
        window = rival_window(rival, which, lag)
        theirs = errors(window)
        ratios = ", ".join(f"{name} ×{ratio:.2f}" for name, ratio in _ratios(cells, mine / theirs).items())
        result.append(
            {
                "part": "filter: level and slope",
                "against": rival,
                "figure": f"RMSE of the {what}, {kind} families, equal lag on a {change} of {size:g}",
                "ours": _mean(mine),
                "theirs": _mean(theirs),
                "note": f"lag {lag:.1f} steps, window {window:g}, {len(cells)} series; {ratios}; {in_hindsight}",
            }
        )
    return result


def _errors(estimates: Sequence[np.ndarray], cells: Sequence[Cell], which: int) -> np.ndarray:
    """RMSE of each series in its noise widths."""
    result = []
    for estimate, cell in zip(estimates, cells, strict=True):
        truth = cell.truth[BURN_IN:] if which == 0 else np.diff(cell.truth)[BURN_IN - 1 :]
        result.append(np.sqrt(np.mean((estimate[BURN_IN:] - truth) ** 2)) / cell.noise)
    return np.array(result)


def _ratios(cells: Sequence[Cell], ratios: np.ndarray) -> dict[str, float]:
    """Ours over theirs by family and by kind of noise."""
    groups: dict[str, list[float]] = {}
    for cell, ratio in zip(cells, ratios, strict=True):
        groups.setdefault(cell.family, []).append(ratio)
        groups.setdefault(cell.kind, []).append(ratio)
    return {name: _mean(np.array(group)) for name, group in groups.items()}


def _mean(values: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(values))))


# -- (b) spikes and breaks -------------------------------------------------------------------------------------------


def our_scores(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Absolute surprise at each step, and whether a lasting change was found."""
    found = MetricFilter()
    reports = [found.update(step, float(value)) for step, value in enumerate(values, start=1)]
    return np.array([abs(r.surprise) for r in reports if r]), np.array([r.changed for r in reports if r])


def sigma_scores(values: np.ndarray) -> np.ndarray:
    """Distance from the mean of the 128 values before, in their standard deviations; 0 while there are fewer."""
    scores = np.zeros(len(values))
    rows = np.lib.stride_tricks.sliding_window_view(values, WINDOW)[:-1]
    scores[WINDOW:] = np.abs(values[WINDOW:] - rows.mean(axis=1)) / rows.std(axis=1)
    return scores


def _threshold(scores: np.ndarray, rate: float) -> float:
    """What as large a share as ``rate`` of the scores exceeds."""
    return float(np.quantile(scores, 1.0 - rate))


def _trials(kind: str, shape: str, size: float, lasting: bool, count: int) -> list[tuple[np.ndarray, int]]:
    """Series with one spike, or one break that stays, and where it is."""
    trials = []
    for seed in range(count):
        rng = np.random.default_rng((FIRST_SEED + 7, seed, int(10 * size), int(lasting), len(kind), len(shape)))
        at = int(rng.integers(200, 260))
        t = np.arange(at + WITHIN + 1, dtype=float)
        values = NOISE_KINDS[kind](rng, len(t)) + (0.0 if shape == "flat" else 30.0 * np.exp(-t / 120.0))
        sign = rng.choice([-1.0, 1.0])
        values[at : None if lasting else at + 1] += sign * size
        trials.append((values, at))
    return trials


def spikes_and_breaks(quick: bool) -> list[dict[str, Any]]:
    """Rows of (b): share found at one false alarm per 10,000 steps, and the median delay of breaks that were."""
    result = []
    for kind in ("normal", "heavy tails"):
        alarms = _calibrate(kind, 8 if quick else 60)
        for shape in ("flat", "falling"):
            result += _on_trials(kind, shape, alarms, 10 if quick else 200)
    return result


class Alarms(NamedTuple):
    """Thresholds of the surprise and of the rule, how often ``changed`` is said for nothing, and the rule's threshold
    for as many; ``steps`` of noise that they rest on."""

    surprise: float
    rule: float
    changed_rate: float
    rule_as_often: float
    steps: int


def _calibrate(kind: str, runs: int) -> Alarms:
    noise = [NOISE_KINDS[kind](np.random.default_rng((FIRST_SEED + 99, i, len(kind))), 10_000) for i in range(runs)]
    scored = [our_scores(values) for values in noise]
    rule = np.concatenate([sigma_scores(values)[WINDOW:] for values in noise])
    changed = float(np.mean(np.concatenate([flags[WINDOW:] for _, flags in scored])))
    return Alarms(
        surprise=_threshold(np.concatenate([s[WINDOW:] for s, _ in scored]), FALSE_ALARMS),
        rule=_threshold(rule, FALSE_ALARMS),
        changed_rate=changed,
        rule_as_often=_threshold(rule, max(changed, 1.0 / len(rule))),
        steps=len(rule),
    )


def _on_trials(kind: str, shape: str, alarms: Alarms, count: int) -> list[dict[str, Any]]:
    result, where = [], f"{kind} noise, {shape}"
    said = f"thresholds {alarms.surprise:.1f} and {alarms.rule:.1f}, from {alarms.steps} steps"
    for size in SPIKES:
        trials = _trials(kind, shape, size, False, count)
        mine = float(np.mean([our_scores(v)[0][at] > alarms.surprise for v, at in trials]))
        theirs = float(np.mean([sigma_scores(v)[at] > alarms.rule for v, at in trials]))
        result.append(_found(f"spike of {size:g} widths found, {where}", mine, theirs, said))
    often = f"both {1e4 * alarms.changed_rate:.2f} false alarms per 10,000 steps, rule at {alarms.rule_as_often:.1f}"
    for size in BREAKS:
        trials = _trials(kind, shape, size, True, count)
        scored = [(*our_scores(v), sigma_scores(v), at) for v, at in trials]
        ones = [_delay(surprise > alarms.surprise, at) for surprise, _, _, at in scored]
        twos = [_delay(rule > alarms.rule, at) for _, _, rule, at in scored]
        result.append(_breaks(f"break of {size:g} widths by surprise, {where}", ones, twos, said))
        ones = [_delay(changed, at) for _, changed, _, at in scored]
        twos = [_delay(rule > alarms.rule_as_often, at) for _, _, rule, at in scored]
        result.append(_breaks(f"break of {size:g} widths by `changed`, {where}", ones, twos, often))
    return result


def _delay(alarms: np.ndarray, at: int) -> float:
    """Steps from the break to the first alarm, 0 at the break itself; infinite if none came in time."""
    after = np.flatnonzero(alarms[at : at + WITHIN])
    return float(after[0]) if len(after) else math.inf


def _found(figure: str, mine: float, theirs: float, note: str) -> dict[str, Any]:
    return {
        "part": "filter: spikes and breaks",
        "against": "6 sigma over 128 steps",
        "figure": figure,
        "ours": float(mine),
        "theirs": float(theirs),
        "note": note,
    }


def _breaks(figure: str, mine: Sequence[float], theirs: Sequence[float], note: str) -> dict[str, Any]:
    shares = [float(np.mean(np.isfinite(delays))) for delays in (mine, theirs)]
    delay = f"median delay {_median(mine)} against {_median(theirs)} steps"
    return _found(f"{figure}: found within {WITHIN} steps", shares[0], shares[1], f"{delay}; {note}")


def _median(delays: Sequence[float]) -> str:
    found = [delay for delay in delays if math.isfinite(delay)]
    return f"{np.median(found):g}" if found else "–"


# -- (c) cost --------------------------------------------------------------------------------------------------------


def cost(quick: bool) -> list[dict[str, Any]]:
    """Microseconds per update, least of five blocks; theirs is the trend of 20 values that is in use today."""
    size = 500 if quick else 3000
    values = (1.0 + 0.1 * np.random.default_rng(FIRST_SEED).normal(size=size)).tolist()
    found = MetricFilter("log", ("learning_rate", "guided_weight", "gate_weight", "mel_weight"))
    step, steps, window = itertools.count(1), list(range(20)), values[:20]
    mine = min(_timed(lambda: [found.update(next(step), value) for value in values]) for _ in range(5)) / size
    theirs = min(_timed(lambda: [trend(steps, window) for _ in range(200)]) for _ in range(5)) / 200
    return [
        {
            "part": "filter: cost",
            "against": "trend of 20 values",
            "figure": "microseconds per update",
            "ours": 1e6 * mine,
            "theirs": 1e6 * theirs,
            "note": "filter with four knobs; Theil-Sen and wavelet noise of context.trends",
        }
    ]


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def rows(quick: bool) -> list[dict[str, Any]]:
    """All rows; seconds when ``quick``, a few minutes on one core otherwise. Same figures each time, cost apart."""
    return level_and_slope(quick) + spikes_and_breaks(quick) + cost(quick)
