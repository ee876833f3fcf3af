"""Phases alone: agreement with the truth, and how seldom it switches, against bare thresholds.

A course is ``attention_diag`` measured every five steps, with a truth that is known: what the bare thresholds say of
the course without its noise. On made-up courses that is the course they were made from. Of real runs (traces, and
runs of the micro-Tacotron) only the noisy course is known; there the truth is a smooth of it that looks ahead as far as
back.

- *Agreement*: share of measurements with the right phase, among those whose true value is more than OFF from a limit.
- *Delay*: from the moment that the true course crosses a limit, either way, to the first measurement whose phase lies
  beyond; median over crossings, those missed count as later. An early alarm is no gain: it counts as none.
- *Switches* are counted over all courses of a family and 1,000 steps. The truth's own are in the note.
- *At equal delay*: the rival is the bare thresholds on an EMA of the raw course, whose memory gives the same median
  delay on these crossings. The classifier sees the measurements themselves, as the analyzer gives it them.

The classifier was tuned on made-up courses of other seeds, on no real run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tts_brain.context.phases import PhaseClassifier
from tts_brain.context.trends import trend
from tts_brain.types import PHASE_LIMITS, TrainingPhase

PART = "phases"
EVERY = 5
STEPS = 1000
OFF = 0.05
REPORT_SEED = 70_000
_TREND_WINDOW = 20
_LOOK = 4.0  # measurements: standard deviation of the Gaussian that stands for the truth of a real run
_MEMORIES = np.concatenate([[0.0], 1.0 - np.geomspace(0.9, 0.02, 120)])
_MICRO_STEPS = 500
_MICRO_SEED = 900

Row = dict[str, Any]
Make = Callable[[], PhaseClassifier]


class Course(NamedTuple):
    """One run at its measurements, each field (M,): the step, what was measured, the truth, and the loss's features."""

    family: str
    step: np.ndarray
    seen: np.ndarray
    truth: np.ndarray
    fall: np.ndarray
    drop: np.ndarray


# -- made-up courses -------------------------------------------------------------------------------------------------


def _sigmoid(t: np.ndarray, at: float, width: float) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-(t - at) / width))


def _width(rng: np.random.Generator) -> float:
    """Steps; a recorded run goes from 0.1 to 0.5 in some two and a half of them, 50 to 250 steps."""
    return float(np.exp(rng.uniform(np.log(20.0), np.log(100.0))))


def _rise(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(0.02, 0.06) + rng.uniform(0.75, 0.9) * _sigmoid(t, rng.uniform(200.0, 500.0), _width(rng))


def _relapse(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rises, is lost within some ten to forty steps, comes back."""
    lost = rng.uniform(0.4, 1.0) * _sigmoid(t, rng.uniform(450.0, 550.0), rng.uniform(4.0, 15.0))
    back = _sigmoid(t, rng.uniform(700.0, 800.0), rng.uniform(15.0, 40.0))
    top = rng.uniform(0.75, 0.9) * _sigmoid(t, 200.0, rng.uniform(20.0, 50.0))
    return 0.03 + top * (1.0 - lost * (1.0 - back))


def _stall(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rises and stays half-way, at no limit."""
    top = rng.choice([rng.uniform(0.2, 0.4), rng.uniform(0.57, 0.63)])
    return 0.03 + (top - 0.03) * _sigmoid(t, rng.uniform(150.0, 400.0), _width(rng))


def _hover(limit: float) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Rises to within a hundredth of a limit and stays there."""

    def make(t: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return (limit + rng.uniform(-0.01, 0.01)) * _sigmoid(t, 60.0, 12.0)

    return make


FAMILIES = {"rise": _rise, "relapse": _relapse, "stall": _stall}
FAMILIES |= {f"hover at {limit:g}": _hover(limit) for limit in PHASE_LIMITS}
# Correlation of the noise from one measurement to the next.
NOISES = {"white": 0.0, "AR(1) 0.6": 0.6}


def made_up(per_kind: int, first_seed: int = REPORT_SEED) -> list[Course]:
    """``per_kind`` courses of each family and kind of noise."""
    return [
        _course(family, coefficient, np.random.default_rng((first_seed, number, int(10 * coefficient), run)))
        for number, family in enumerate(FAMILIES)
        for coefficient in NOISES.values()
        for run in range(per_kind)
    ]


def _course(family: str, coefficient: float, rng: np.random.Generator) -> Course:
    step = np.arange(EVERY, STEPS + 1, EVERY)
    truth = FAMILIES[family](step.astype(float), rng)
    # The recorded Coqui run of tests/data has 0.022 near 0.35, micro-Tacotrons 0.03 to 0.09; less towards 0 and 1.
    width = np.exp(rng.uniform(np.log(0.012), np.log(0.08))) * 2.0 * np.sqrt(truth * (1.0 - truth))
    seen = np.clip(truth + width * _noise(rng, len(step), coefficient), 0.0, 1.0)
    drop = 40.0 * (1.0 - np.exp(-step / rng.uniform(50.0, 400.0))) + rng.normal(size=len(step))
    return Course(family, step, seen, truth, rng.normal(-1.0, 2.0, size=len(step)), drop)


def _noise(rng: np.random.Generator, count: int, coefficient: float) -> np.ndarray:
    """(count,) of unit variance."""
    fresh = rng.normal(size=count) * np.sqrt(1.0 - coefficient**2)
    fresh[0] /= np.sqrt(1.0 - coefficient**2)
    for i in range(1, count):
        fresh[i] += coefficient * fresh[i - 1]
    return fresh


# -- real courses ----------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> dict[str, list[Course]]:
    """The runs of every file of traces in ``folder`` and below whose attention was measured thirty times or more.

    By the name of the folder that they lie in.
    """
    from tts_brain.learning.traces import load

    found: dict[str, list[Course]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        name = f"recorded {path.parent.name}"
        for run in load(path):
            loss = "mel" if np.isfinite(run.column("mel")).any() else "total"
            seen = run.column("attention.attention_diag").astype(float)
            if np.isfinite(seen).sum() >= 30:
                course = real_course(name, run.column("step"), seen, run.column(loss).astype(float))
                found.setdefault(name, []).append(course)
    return found


def micro_runs(steps: int) -> list[Course]:
    """The benchmark's grid on the micro-Tacotron, and half of it once more with the attention lost half-way."""
    from bench.micro_grid import GRID
    from tts_brain.learning.micro_tacotron import MicroRuns

    settings = [point.setting() for point in GRID]
    settings += [point.setting(redraw_steps=frozenset({steps // 2})) for point in GRID[::2]]
    runs = MicroRuns(settings, [_MICRO_SEED + i for i in range(len(settings))])
    seen = [runs.step() for _ in range(steps)]
    courses = []
    for run in zip(*seen, strict=True):
        attention = [np.nan if one.attention is None else one.attention.attention_diag for one in run]
        mel = np.array([one.losses["mel"] for one in run])
        courses.append(real_course("micro-Tacotron", np.arange(1, steps + 1), np.array(attention), mel))
    return courses


def real_course(family: str, step: np.ndarray, attention_diag: np.ndarray, loss: np.ndarray) -> Course:
    """From values at each step (T,), NaN where attention was not measured."""
    at = np.flatnonzero(np.isfinite(attention_diag))
    seen, fall, drop, first = attention_diag[at], [], [], None
    for i in at:
        since = max(0, i + 1 - _TREND_WINDOW)
        found = trend(step[since : i + 1], loss[since : i + 1])
        if first is None and found.count >= 4:
            first = found.level
        fallen = 0.0 if first is None else max(first - found.level, 0.0)
        fall.append(found.z)
        drop.append(fallen / found.noise if found.noise > 0.0 else 0.0 if fallen == 0.0 else np.inf)
    return Course(family, step[at], seen, _smooth(seen), np.array(fall), np.array(drop))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian mean round each value; at the ends of what there is."""
    apart = np.subtract.outer(np.arange(len(values)), np.arange(len(values))) / _LOOK
    weights = np.exp(-0.5 * apart**2)
    return np.asarray(weights @ values / weights.sum(1))


# -- who says what ---------------------------------------------------------------------------------------------------


def bare(values: np.ndarray) -> np.ndarray:
    """Index of the phase of each value, by the thresholds alone."""
    return np.asarray(np.sum(values[..., None] >= np.array(PHASE_LIMITS), axis=-1))


def ema(values: np.ndarray, memory: float) -> np.ndarray:
    """(M,): begins at the first value."""
    smooth = np.array(values, dtype=float)
    for i in range(1, len(smooth)):
        smooth[i] = memory * smooth[i - 1] + (1.0 - memory) * smooth[i]
    return smooth


def ours(course: Course, make: Make = PhaseClassifier) -> np.ndarray:
    """Index of the classifier's phase after each measurement, which it sees as it is, like ``ContextAnalyzer``'s."""
    classifier, said = make(), []
    order = list(TrainingPhase)
    for value, fall, drop in zip(course.seen, course.fall, course.drop, strict=True):
        classifier.update(float(value), float(fall), float(drop))
        said.append(order.index(classifier.phase))
    return np.array(said)


# -- the figures -----------------------------------------------------------------------------------------------------


def agreement(courses: Sequence[Course], said: Sequence[np.ndarray]) -> float:
    """Per cent, off the boundary; NaN when nothing is."""
    right = []
    for course, phases in zip(courses, said, strict=True):
        off = np.all(np.abs(course.truth[:, None] - np.array(PHASE_LIMITS)) > OFF, axis=1)
        right.append((phases == bare(course.truth))[off])
    together = np.concatenate(right)
    return 100.0 * float(np.mean(together)) if len(together) else float("nan")


def switches(courses: Sequence[Course], said: Sequence[np.ndarray]) -> float:
    """Per 1,000 steps."""
    steps = sum(float(course.step[-1]) for course in courses)
    return 1000.0 * sum(int(np.sum(phases[1:] != phases[:-1])) for phases in said) / steps


def delays(courses: Sequence[Course], said: Sequence[np.ndarray]) -> np.ndarray:
    """Steps from each true crossing of a limit to the first measurement beyond; infinite if not before it is undone."""
    found = []
    for course, phases in zip(courses, said, strict=True):
        for index, limit in enumerate(PHASE_LIMITS):
            found += _crossings(course, phases, index, limit)
    return np.array(found)


def _crossings(course: Course, phases: np.ndarray, index: int, limit: float) -> list[float]:
    above = course.truth >= limit
    at = np.flatnonzero(above[1:] != above[:-1]) + 1
    ends = [*at, len(above)][1:]
    found = []
    for start, end in zip(at, ends, strict=True):
        # Only what goes on to lie clearly beyond is a crossing to be found.
        if np.max(np.abs(course.truth[start:end] - limit)) <= OFF:
            continue
        low, high = course.truth[start - 1], course.truth[start]
        share = (limit - low) / (high - low)
        moment = course.step[start - 1] + share * (course.step[start] - course.step[start - 1])
        beyond = np.flatnonzero((phases[start:end] > index) == above[start])
        found.append(float(course.step[start + beyond[0]] - moment) if len(beyond) else np.inf)
    return found


def median_delay(courses: Sequence[Course], said: Sequence[np.ndarray]) -> float:
    """Steps; NaN without a crossing."""
    found = np.sort(delays(courses, said))
    return float(found[len(found) // 2]) if len(found) else float("nan")


def equal_memory(courses: Sequence[Course], delay: float) -> float:
    """The EMA's memory at which the bare thresholds are nearest to that median delay; the longer where two are."""

    def off(memory: float) -> float:
        return abs(median_delay(courses, [bare(ema(c.seen, memory)) for c in courses]) - delay)

    return float(min(reversed(_MEMORIES), key=off))


def compare(name: str, courses: Sequence[Course], make: Make = PhaseClassifier) -> list[Row]:
    """All rows of one set of courses."""
    said = [ours(course, make) for course in courses]
    delay = median_delay(courses, said)
    memory = equal_memory(courses, delay) if np.isfinite(delay) else 0.0
    rivals = {
        f"thresholds on an EMA of equal delay (memory {memory:.2f})": [bare(ema(c.seen, memory)) for c in courses],
        "raw thresholds": [bare(c.seen) for c in courses],
        # Without a history the mixture stays on its anchors.
        "the same, never fitted to the run": [ours(c, lambda: PhaseClassifier(history_size=0)) for c in courses],
    }
    crossings = len(delays(courses, said))
    note = f"{len(courses)} courses, {crossings} crossings, more than {OFF:g} from every limit"
    families = [None, *dict.fromkeys(c.family for c in courses)]
    found = []
    for rival, theirs in rivals.items():
        right = (agreement(courses, said), agreement(courses, theirs))
        found.append(_row(rival, f"agreement off the boundary, %, {name}", *right, note))
        late = [np.quantile(delays(courses, who), 0.9) if crossings else np.nan for who in (said, theirs)]
        note_late = f"nine in ten within {late[0]:.0f} and {late[1]:.0f}"
        found.append(_row(rival, f"median delay, steps, {name}", delay, median_delay(courses, theirs), note_late))
        # One family needs no row of its own.
        for family in families if len(families) > 2 else [None]:
            found.append(_switch_row(rival, name, family, courses, said, theirs))
    return found


def _switch_row(
    rival: str,
    name: str,
    family: str | None,
    courses: Sequence[Course],
    said: Sequence[np.ndarray],
    theirs: Sequence[np.ndarray],
) -> Row:
    """Of one family, or of all courses for None."""
    kept = [i for i, course in enumerate(courses) if family in (None, course.family)]
    some = [courses[i] for i in kept]
    ours_, theirs_ = (switches(some, [who[i] for i in kept]) for who in (said, theirs))
    true = switches(some, [bare(course.truth) for course in some])
    fewer = f"{theirs_ / ours_:.1f}x fewer" if ours_ else "none of ours"
    if ours_ > true:
        fewer += f", {(theirs_ - true) / (ours_ - true):.1f}x of those beyond the truth's {true:.2f}"
    figure = f"switches per 1,000 steps, {name}{f', {family}' if family else ''}"
    return _row(rival, figure, ours_, theirs_, fewer)


def _row(against: str, figure: str, mine: float, theirs: float, note: str = "") -> Row:
    return {
        "part": PART,
        "against": against,
        "figure": figure,
        "ours": round(mine, 3),
        "theirs": round(theirs, 3),
        "note": note,
    }


def rows(quick: bool, traces: Path | None = None, make: Make = PhaseClassifier) -> list[Row]:
    """Made-up courses; real ones unless ``quick``, and those of ``traces`` where there are any."""
    found = compare("made-up courses", made_up(1 if quick else 40), make)
    if not quick:
        found += compare("micro-Tacotron", micro_runs(_MICRO_STEPS), make)
    if traces is not None:
        for name, courses in recorded(traces).items():
            found += compare(name, courses, make)
    return found
