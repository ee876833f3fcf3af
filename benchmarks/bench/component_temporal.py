"""The temporal model alone, against the simplest that one would use instead, on recorded runs that it has not seen.

    python -m bench.component_temporal --traces FOLDER [--quick]

FOLDER holds a folder of traces for each corpus (``run.py rescue --traces``), and may hold the made-up ones that the
weights were trained on. Of what they were trained on, only the runs kept for the test count (``temporal_training``); of
another corpus, all do. Without any traces some runs of the micro-Tacotron are made here, and the note says so.

(a) Quantiles of the loss and of ``attention_diag`` at 25, 50 and 100 steps ahead, by their pinball loss: in widths of
the window's noise, as far as 20 of them, for the loss. The rivals give one value each; their quantiles are that value
plus the quantiles of their own errors on the validation runs (where there are none, on the test runs: in their favour).

    last value    the level is the median of five losses, the attention is the smoothed one; both stay
    Theil-Sen     goes on at the slope of the last ``trend_window`` = 20 values
    Kalman        goes on at the fading slope of the filter (feedback.kalman), by ``log`` and by ``logit``

(b) Divergence and loss of the alignment, as ``context.temporal`` defines them: how well the windows are ranked (AUROC),
and how early an event is announced. A rival's score is how far its forecast lies above the best level, in noise widths,
and how far below half the best attention. The alarm is set so that one window in twenty without an event within 50
steps gives one, on the validation runs; an event counts as announced by an alarm in the 50 steps before it.

(c) Time per call.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tts_brain.context.temporal import HORIZONS, WEIGHTS, TemporalForecaster, load_net
from tts_brain.context.trends import trend
from tts_brain.feedback.kalman import LINKS, MetricFilter, advance
from tts_brain.learning.temporal_scores import Answers, coverage, last_value, ours, score, with_residuals
from tts_brain.learning.temporal_targets import Samples, course, observed, samples
from tts_brain.learning.temporal_traces import CORPUS as MICRO
from tts_brain.learning.temporal_traces import SUDDEN, generate, load_folder
from tts_brain.learning.temporal_training import part_of
from tts_brain.learning.traces import Trace, load
from tts_brain.types import AttentionReport, Observation

TREND_WINDOW = 20
LEVEL = 5
FALSE_ALARMS = 0.05
AHEAD = 1  # of HORIZONS: events are announced 50 steps ahead
SEED = 77  # of made-up runs, other than those trained on
PART = "temporal model"


@dataclass(frozen=True)
class Field:
    """Runs to tune the rivals on, runs to be judged on, and what is said of them."""

    validation: Sequence[Trace]
    test: Sequence[Trace]
    said: str


# -- the runs --------------------------------------------------------------------------------------------------------


def fields(traces: Path | None, quick: bool) -> list[Field]:
    """One for each corpus, and for the micro-Tacotron; its runs are made here where there are no traces at all."""
    folders = sorted(path for path in traces.iterdir() if path.is_dir()) if traces is not None else []
    recorded = [trace for folder in folders for trace in load_folder(folder)]
    real = [trace for trace in recorded if trace.corpus != MICRO]
    known, every = _trained_on(), 4 if quick else 1
    validation = [trace for trace in real if trace.corpus in known and part_of(trace) == "validation"]
    found = []
    for corpus in sorted({trace.corpus for trace in real}):
        test = [t for t in real if t.corpus == corpus and (corpus not in known or part_of(t) == "test")][::every]
        kind = "runs kept for the test" if corpus in known else "a corpus not trained on"
        if test:
            found.append(Field(validation, test, f"{corpus}, {kind}, {len(test)} runs"))
    return [*found, *_micro([trace for trace in recorded if trace.corpus == MICRO], every)] or [_made_up(quick)]


def _micro(made: Sequence[Trace], every: int) -> list[Field]:
    """Each tenth run was kept for the test (``temporal_training.gather``): all, and those whose events can be foreseen.

    The rivals are tuned on the runs beside them, which the model was trained on.
    """
    test, beside = made[::10], made[1::10]
    calm = [trace for trace in test if not set(trace.faults) & SUDDEN]
    said = {"all": test, "without redrawn attention or NaN batches": calm}
    return [
        Field(
            beside[::every], some[::every], f"micro-Tacotron, runs kept for the test, {what}, {len(some[::every])} runs"
        )
        for what, some in said.items()
        if some and beside
    ]


def _trained_on() -> list[str]:
    with safe_open(WEIGHTS, framework="numpy") as file:
        corpora: list[str] = json.loads(file.metadata()["model"])["made"]["corpora"]
    return corpora


def _made_up(quick: bool) -> Field:
    runs, steps = (8, 150) if quick else (64, 400)
    with tempfile.TemporaryDirectory() as folder:
        made = [t for p in generate(Path(folder), runs=runs, steps=steps, seed=SEED) for t in load(p)]
    said = f"no real traces: {runs // 2} runs of the micro-Tacotron, the kind that it was trained on"
    return Field(made[: runs // 2], made[runs // 2 :], said)


# -- the rivals ------------------------------------------------------------------------------------------------------

Points = tuple[list[float], list[float]]  # loss in its own units, attention_diag: one for each horizon


class TheilSen:
    """Level now, and the slope of the last values."""

    def __init__(self) -> None:
        self._loss: list[tuple[int, float]] = []
        self._attention: list[tuple[int, float]] = []

    def observe(self, step: int, loss: float, attention: float | None) -> None:
        if math.isfinite(loss):
            self._loss.append((step, loss))
        if attention is not None:
            self._attention.append((step, attention))

    def points(self) -> Points:
        level = float(np.median([v for _, v in self._loss[-LEVEL:]]))
        last = self._attention[-1][1] if self._attention else math.nan
        return self._on(self._loss, level), self._on(self._attention, last)

    def _on(self, series: Sequence[tuple[int, float]], level: float) -> list[float]:
        tail = series[-TREND_WINDOW:]
        slope = trend([s for s, _ in tail], [v for _, v in tail]).slope
        return [level + slope * horizon for horizon in HORIZONS]


class Kalman:
    """The filters' levels, at their fading slopes."""

    def __init__(self) -> None:
        self._filters = {"log": MetricFilter("log"), "logit": MetricFilter("logit")}
        self._states: dict[str, list[float]] = {}

    def observe(self, step: int, loss: float, attention: float | None) -> None:
        for link, value in (("log", loss), ("logit", attention)):
            seen = self._filters[link].update(step, value)
            if seen is not None:
                latent = LINKS[link].latent(seen.level)
                tangent = LINKS[link].read(latent or 0.0)[1]
                self._states[link] = [latent or 0.0, seen.slope / max(tangent, 1e-12)]

    def points(self) -> Points:
        return self._on("log"), self._on("logit")

    def _on(self, link: str) -> list[float]:
        if link not in self._states:
            return [math.nan] * len(HORIZONS)
        ahead = (advance(self._states[link], horizon, ())[0] for horizon in HORIZONS)
        return [LINKS[link].read(min(max(level, -50.0), 50.0))[0] for level in ahead]


RIVALS: Mapping[str, Callable[[], Any]] = {"Theil-Sen": TheilSen, "Kalman": Kalman}


def rival(make: Callable[[], Any], traces: Sequence[Trace], some: Samples, tuned: np.ndarray) -> Answers:
    """What a rival says of the windows; ``tuned``: (N,) bool, the windows whose errors give its quantiles."""
    wanted = {(int(run), int(step)): at for at, (run, step) in enumerate(zip(some.run, some.step, strict=True))}
    loss, attention = (np.full(some.loss.shape, np.nan) for _ in range(2))
    for run, trace in enumerate(traces):
        method, happened = make(), course(trace)
        for i, (observation, _) in enumerate(observed(trace)):
            smooth = float(happened.smooth[i]) if happened.measured[i] else None
            method.observe(observation.step, float(happened.loss[i]), smooth)
            at = wanted.get((run, observation.step))
            if at is not None:
                loss[at], attention[at] = method.points()
    safe = np.where(some.scale > 0.0, some.scale, np.inf)[:, None]
    points = np.clip((loss - some.level[:, None]) / safe, -1e6, 1e6)
    attention = np.clip(attention, 0.0, 1.0)
    best_above, best = np.sinh(some.summary[:, 3:4].astype(np.float64)), some.summary[:, 1:2]
    quantiles = with_residuals(points, attention, tuned, some)
    return Answers(*quantiles, diverged=points + best_above, lost=np.nan_to_num(0.5 * best - attention, nan=-1.0))


# -- (a) and (b) -----------------------------------------------------------------------------------------------------


def compare(field: Field) -> list[dict[str, Any]]:
    """Rows of one corpus."""
    traces = [*field.validation, *field.test]
    some = samples(traces)
    test = some.run >= len(field.validation)
    tuned = ~test if (~test).any() else test
    answers = {"ours": ours(load_net(), some), "last value": last_value(tuned, some)}
    answers |= {name: rival(make, traces, some, tuned) for name, make in RIVALS.items()}
    judged = some.of(test)
    scores = {name: score(_of(one, test), judged) for name, one in answers.items()}
    rows = []
    for name in ("last value", *RIVALS):
        for k, horizon in enumerate(HORIZONS):
            for key, figure in FIGURES.items():
                known, events = _counts(judged, key, k)
                note = f"{field.said}; {known} windows" + (f", {events} with the event" if key in EVENTS else "")
                figures = (scores["ours"][key][k], scores[name][key][k])
                rows.append(_row(name, f"{figure}, {horizon} steps ahead", *figures, note))
        for key in EVENTS:
            rows += _announced(field, name, key, answers, some, tuned)
    inside = coverage(_of(answers["ours"], test), judged)
    for key, shares in inside.items():
        for horizon, share in zip(HORIZONS, shares, strict=True):
            figure = f"share of the {key} within the quantiles 0.1 and 0.9, {horizon} steps ahead"
            rows.append(_row("what it should be", figure, share, 0.8, field.said))
    return rows


FIGURES = {
    "loss": "pinball loss of the loss, in noise widths",
    "attention": "pinball loss of attention_diag",
    "diverged": "AUROC of divergence",
    "lost": "AUROC of a lost alignment",
}
EVENTS = {"diverged": "divergence", "lost": "loss of the alignment"}


def _announced(
    field: Field, name: str, key: str, answers: Mapping[str, Answers], some: Samples, tuned: np.ndarray
) -> list[dict[str, Any]]:
    """Share of the events of the test runs that were announced, and how early."""
    first, within = len(field.validation), HORIZONS[AHEAD]
    found, leads, false = [], [], []
    for method in ("ours", name):
        values, happened = getattr(answers[method], key)[:, AHEAD], getattr(some, key)[:, AHEAD]
        calm = tuned & (happened == 0.0)
        alarm = values > np.quantile(values[calm], 1.0 - FALSE_ALARMS) if calm.any() else np.zeros(len(values), bool)
        early = []
        for run, trace in enumerate(field.test, start=first):
            mine = alarm & (some.run == run)
            for begin in _begins(trace, key):
                before = some.step[mine & (some.step < begin) & (some.step >= begin - within)]
                early.append(begin - before.min() if len(before) else math.nan)
        found.append(float(np.isfinite(early).mean()) if early else math.nan)
        leads.append(f"{np.nanmedian(early):g}" if np.isfinite(early).any() else "–")
        still = (some.run >= first) & (happened == 0.0)
        false.append(f"{alarm[still].mean():.3f}" if still.any() else "–")
    note = (
        f"{field.said}; {len(early)} events; median lead {leads[0]} against {leads[1]} steps; false alarms on the test "
    )
    note += f"runs {false[0]} against {false[1]}"
    return [_row(name, f"share announced of: {EVENTS[key]}", *found, note)]


def _begins(trace: Trace, key: str) -> list[int]:
    """Steps at which an event began in a run where it could: divergence is counted once, later ones are its echo."""
    happened, steps = course(trace), trace.column("step").astype(int)
    if key == "lost":
        return [int(step) for step in steps[happened.lost_at == 1.0]]
    return [int(step) for step in steps[happened.diverged][:1]]


def _counts(some: Samples, key: str, k: int) -> tuple[int, int]:
    truth = getattr(some, key)[:, k]
    return int(np.isfinite(truth).sum()), int(np.nansum(truth == 1.0))


def _of(answers: Answers, chosen: np.ndarray) -> Answers:
    return Answers(**{name: value[chosen] for name, value in vars(answers).items()})


def _row(against: str, figure: str, mine: float, theirs: float, note: str) -> dict[str, Any]:
    values = {"ours": float(mine), "theirs": float(theirs)}
    return {"part": PART, "against": against, "figure": figure, **values, "note": note}


# -- (c) -------------------------------------------------------------------------------------------------------------


def cost(quick: bool) -> list[dict[str, Any]]:
    """Microseconds of processor time per call, least of five blocks; theirs is a trend of 20 values."""
    made, noise = TemporalForecaster(), np.random.default_rng(SEED).normal(size=100)
    report = AttentionReport(0.3, 0.4, 0.3, 0.3, 0.5, 1.0, 1.0, 5.0, 1.0)
    made_up = [
        Observation(at, {"total": value, "mel": value}, 1.0, 1e-3, attention=None if at % 5 else report)
        for at, value in enumerate(noise.tolist(), start=1)
    ]
    for observation in made_up:
        made.observe(observation)
    steps, values, calls = list(range(TREND_WINDOW)), noise[:TREND_WINDOW].tolist(), 20 if quick else 200
    forecast, slope = _timed(made.forecast, calls), _timed(lambda: trend(steps, values), calls)
    observe = _timed(lambda: [made.observe(o, {"learning_rate": 1.0}) for o in made_up], 3) / len(made_up)
    return [
        _row("trend of 20 values", "microseconds per forecast, once per decision", forecast, slope, "one core"),
        _row("trend of 20 values", "microseconds per observed step", observe, slope, "one core"),
    ]


def _timed(work: Callable[[], Any], calls: int) -> float:
    best = math.inf
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls):
            work()
        best = min(best, (time.process_time() - start) / calls)
    return 1e6 * best


def rows(quick: bool, traces: Path | None = None) -> list[dict[str, Any]]:
    """All rows. ``traces``: a folder that holds a folder for each corpus."""
    return [row for field in fields(traces, quick) for row in compare(field)] + cost(quick)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the rows, one JSON object a line with ``--json``, else as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, help="folder with a folder of traces for each corpus")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    for row in rows(args.quick, args.traces):
        figures = f"{row['ours']:.4g} | {row['theirs']:.4g}"
        print(json.dumps(row) if args.json else f"| {row['figure']} | {row['against']} | {figures} | {row['note']} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
