"""Trends alone: oscillation found under noise, false alarms and time, against the slope over a window.

The slope gets the threshold at which it raises as many alarms on plain noise as ours does, both measured on seeds of
their own. Seeds, and periods but for the fastest, are none that `tts_brain.context.scales` was tuned
on; of the amplitudes 1 and 2 were. Over the 20 decisions after a start some 2 % are found by chance, by either.

    python -m bench.component_trends              the rows, as a table
    python -m bench.component_trends --calibrate  the tail table of tts_brain/context/scales.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tts_brain.context.scales import HISTORY, clip_spikes, oscillation, raw_statistic, scales
from tts_brain.context.trends import trend
from tts_brain.types import OSCILLATION_ALARM

PART = "trends"
WINDOWS = (20, 100)
DECIDE_EVERY = 10
# 2 is the fastest there can be, so it is tried in both; the rest lie between those tuned on (2.3, 3, 4.5, 7, 11, …).
PERIODS = (2.0, 2.7, 3.6, 5.6, 9.0, 13.0, 20.0, 32.0)
AMPLITUDES = (0.5, 1.0, 1.5, 2.0)
_GROWTH_STEPS = 18.0
_ONSET = 200
_RUN_STEPS = 400
_CALIBRATION_SEED = 1_000
_THRESHOLD_SEED = 2_000
_REPORT_SEED = 3_000
_PER_BATCH = 1_000

Noise = Callable[[np.random.Generator, int, int], np.ndarray]
Row = dict[str, Any]


def _correlated(coefficient: float) -> Noise:
    def make(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
        fresh = rng.normal(size=(rows, count + 60))
        for at in range(1, count + 60):
            fresh[:, at] += coefficient * fresh[:, at - 1]
        return fresh[:, 60:]

    return make


def _white(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    return rng.normal(size=(rows, count))


def _decaying(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """White noise round an exponential decay from 3 to 50 deviations, time constant 10 to 200 steps."""
    height = 10 ** rng.uniform(0.5, 1.7, (rows, 1))
    return rng.normal(size=(rows, count)) + height * np.exp(-np.arange(count) / 10 ** rng.uniform(1.0, 2.3, (rows, 1)))


def _jumping(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """White noise with one change of level by 1 to 8 deviations."""
    after = np.arange(count) >= rng.integers(5, count - 1, (rows, 1))
    return rng.normal(size=(rows, count)) + rng.uniform(1.0, 8.0, (rows, 1)) * after


def _louder(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """White noise whose deviation doubles somewhere."""
    after = np.arange(count) >= rng.integers(5, count - 1, (rows, 1))
    return rng.normal(size=(rows, count)) * np.where(after, 2.0, 1.0)


# What the tail is calibrated on, each (rows, count) in deviations.
NULLS: Mapping[str, Noise] = MappingProxyType(
    {
        "white": _white,
        "AR(1) 0.3": _correlated(0.3),
        "AR(1) 0.5": _correlated(0.5),
        "t3 tails": lambda rng, rows, count: rng.standard_t(3, (rows, count)),
        "exponential": lambda rng, rows, count: rng.exponential(size=(rows, count)),
        "round a decay": _decaying,
        "with a jump": _jumping,
    }
)
# What it is not calibrated on, for an honest look beyond.
BEYOND: Mapping[str, Noise] = MappingProxyType(
    {
        "AR(1) 0.8": _correlated(0.8),
        "doubling": _louder,
        "Cauchy tails": lambda rng, rows, count: rng.standard_cauchy((rows, count)),
    }
)


def calibrate(windows: int = 40_000) -> dict[int, tuple[float, float, float]]:
    """Raw statistic exceeded with probability 0.1, 0.01 and 0.001 by count of values, the worst of ``NULLS``."""
    table = {}
    for count in range(30, HISTORY + 1, 10):
        tails = []
        for number, make in enumerate(NULLS.values()):
            rng = np.random.default_rng([_CALIBRATION_SEED, count, number])
            batches = [
                raw_statistic(clip_spikes(make(rng, _PER_BATCH, count)))[0] for _ in range(windows // _PER_BATCH)
            ]
            tails.append(np.quantile(np.concatenate(batches), (0.9, 0.99, 0.999)))
        table[count] = tuple(round(float(v), 2) for v in np.max(tails, 0))
    return table


def rows(quick: bool) -> list[Row]:
    """The table: part, against, figure, ours, theirs, note. ``quick`` takes a tenth of the runs, to try it."""
    limits = slope_limits(3_000 if quick else 20_000)
    found = [*detection(20 if quick else 200, limits), *false_alarms(1_000 if quick else 10_000, limits)]
    return [*found, *_time_of_calls(50 if quick else 1_000)]


def slope_limits(windows: int) -> dict[int, float]:
    """By window, the |z| that a slope exceeds on plain white noise as often as ours raises an alarm there."""
    rng = np.random.default_rng(_THRESHOLD_SEED)
    noise = _white(rng, windows, HISTORY)
    # At least ten alarms are asked for, or a quantile would be one lucky value.
    rate = max(float(np.mean(_ours(noise))), 10.0 / windows)
    return {w: float(np.quantile([_slope_z(row, w) for row in noise], 1.0 - rate)) for w in WINDOWS}


def detection(runs: int, limits: Mapping[int, float]) -> list[Row]:
    """Share of runs found within 200 steps of the start, and the median delay in steps (missed runs count as later)."""
    found = []
    for grows in (False, True):
        for period in PERIODS:
            for amplitude in AMPLITUDES[1::2] if grows else AMPLITUDES:
                rng = np.random.default_rng([_REPORT_SEED, int(10 * period), int(10 * amplitude), grows])
                series = oscillating(rng, runs, period, amplitude, grows)
                ours = _delays(series, _ours)
                for window, limit in limits.items():
                    theirs = _delays(series, lambda w, n=window, z=limit: np.array([_slope_z(r, n) > z for r in w]))
                    how = f"growing e-fold in {_GROWTH_STEPS:.0f} steps from" if grows else "constant at"
                    what = f"period {period:g}, {how} {amplitude:g} noise deviations"
                    note = f"{runs} runs; decisions every {DECIDE_EVERY} steps; slope alarms at |z| > {limit:.2f}"
                    against = f"slope over {window} values"
                    found.append(
                        _row(against, f"found within 200 steps, %: {what}", *map(_share, (ours, theirs)), note)
                    )
                    found.append(_row(against, f"median delay, steps: {what}", *map(_median, (ours, theirs)), note))
    return found


def oscillating(rng: np.random.Generator, runs: int, period: float, amplitude: float, grows: bool) -> np.ndarray:
    """(runs, 400) of white noise of deviation 1; a sine of any phase sets in at step 200.

    A growing one multiplies by e every 18 steps, up to four times its start: divergence itself is not the question.
    """
    step = np.arange(_RUN_STEPS) - _ONSET
    phase = rng.uniform(0.0, 2.0 * np.pi, (runs, 1))
    if period == 2.0:  # a sine at its zeros would be nothing
        phase = np.full((runs, 1), np.pi / 2.0)
    height = np.minimum(np.exp(step / _GROWTH_STEPS), 4.0) if grows else 1.0
    wave = amplitude * height * np.sin(2.0 * np.pi * step / period + phase)
    return rng.normal(size=(runs, _RUN_STEPS)) + np.where(step >= 0, wave, 0.0)


def false_alarms(decisions: int, limits: Mapping[int, float]) -> list[Row]:
    """Alarms per 10,000 decisions, each on a window of its own."""
    found = []
    for number, (name, make) in enumerate({**NULLS, **BEYOND}.items()):
        noise = make(np.random.default_rng([_REPORT_SEED, 99, number]), decisions, HISTORY)
        per = 10_000.0 / decisions
        ours = per * float(np.sum(_ours(noise)))
        for window, limit in limits.items():
            theirs = per * sum(_slope_z(row, window) > limit for row in noise)
            note = "not among what ours was calibrated on" if name in BEYOND else ""
            if name == "round a decay":
                note = "a decay is a slope: the slope's alarms here are right about the slope"
            found.append(
                _row(f"slope over {window} values", f"false alarms per 10,000, noise {name}", ours, theirs, note)
            )
    return found


def _delays(series: np.ndarray, alarm: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Steps from the start to the first alarm, (runs,); infinite when missed."""
    delay = np.full(len(series), np.inf)
    for after in range(_RUN_STEPS - _ONSET, 0, -DECIDE_EVERY):
        newest = _ONSET + after
        delay[alarm(series[:, newest - HISTORY : newest])] = after
    return delay


def _ours(windows: np.ndarray) -> np.ndarray:
    """What ``scales(...).oscillates`` says of each row (a test holds the two together), many at a time."""
    batches = [windows[at : at + _PER_BATCH] for at in range(0, len(windows), _PER_BATCH)]
    return np.concatenate([oscillation(clip_spikes(batch))[0] >= OSCILLATION_ALARM for batch in batches])


def _slope_z(values: np.ndarray, window: int) -> float:
    return abs(trend(range(window), values[-window:]).z)


def _share(delays: np.ndarray) -> float:
    return round(100.0 * float(np.mean(np.isfinite(delays))), 1)


def _median(delays: np.ndarray) -> float | str:
    middle = float(np.sort(delays)[len(delays) // 2])
    return middle if np.isfinite(middle) else "missed"


def _row(against: str, figure: str, ours: float | str, theirs: float | str, note: str) -> Row:
    return {"part": PART, "against": against, "figure": figure, "ours": ours, "theirs": theirs, "note": note}


def _time_of_calls(calls: int) -> list[Row]:
    values = np.random.default_rng(_REPORT_SEED).normal(size=HISTORY)
    steps = np.arange(HISTORY)
    ours = _microseconds(lambda: scales(steps, values), calls)
    found = []
    for window in WINDOWS:
        theirs = _microseconds(lambda w=window: trend(steps[-w:], values[-w:]), calls)
        note = f"median of {calls} calls, one core"
        found.append(_row(f"slope over {window} values", "microseconds per call at 100 values", ours, theirs, note))
    return found


def _microseconds(call: Callable[[], object], calls: int) -> float:
    spent = []
    call()  # the first builds the atoms
    for _ in range(calls):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(spent), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", action="store_true", help="print the tail table instead")
    parser.add_argument("--quick", action="store_true", help="a tenth of the runs")
    chosen = parser.parse_args()
    if chosen.calibrate:
        for count, tail in calibrate(4_000 if chosen.quick else 40_000).items():
            print(f"    {count}: {tail},")
        return
    for row in rows(chosen.quick):
        print(" | ".join(str(row[key]) for key in ("against", "figure", "ours", "theirs", "note")))


if __name__ == "__main__":
    main()
