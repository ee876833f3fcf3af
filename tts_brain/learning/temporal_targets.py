"""Windows of recorded runs, and what came after them: what the temporal model learns from and is judged on.

An event is defined as the brain defines it (``context/temporal.py`` says it in words): divergence by calling
``FeedbackLoopManager.broken`` itself after each step, on a run that it is not told to roll back; a lost alignment as
that class looks for it, with 0.3 in place of 0.5 as the best ``attention_diag`` that counts as an alignment, as short
runs of small models seldom have more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tts_brain.context.temporal import HORIZONS
from tts_brain.context.temporal_window import ALIGNED, BLOCK, LEVEL, History, Window, compress
from tts_brain.feedback.manager import FeedbackLoopManager
from tts_brain.learning.traces import Trace
from tts_brain.types import KNOBS, Observation, TrainingContext, TrainingPhase

STRIDE = 5  # steps from one window of a run to the next
_HISTORY = 100
_NONFINITE = 3  # steps in a row; skipped ones count too here, where the manager waits for more of them
_LOST_STEPS = 50
_STALE = 2 * BLOCK  # an attention_diag measured longer ago is none
_FEWEST_LATER = 3  # of the LEVEL values whose median is the loss to be forecast
_ATTENTION_MEMORY = 0.5


@dataclass(frozen=True)
class Samples:
    """N windows, each with what came after it at each of the horizons (K). NaN: not known, or the question is void.

    Args:
        run: (N,) index of the run.
        step: (N,) newest step of the window.
        blocks: (N, B, FEATURES) float32.
        filled: (N, B) bool.
        summary: (N, SUMMARY) float32.
        level, scale: (N,) of the losses.
        loss: (N, K) compressed (``compress`` with the window's level and scale).
        attention_now: (N,) smoothed; NaN when not measured in the window.
        attention: (N, K) smoothed ``attention_diag``.
        diverged, lost: (N, K) of 0 and 1: the event came in (step, step + horizon].
    """

    run: np.ndarray
    step: np.ndarray
    blocks: np.ndarray
    filled: np.ndarray
    summary: np.ndarray
    level: np.ndarray
    scale: np.ndarray
    loss: np.ndarray
    attention_now: np.ndarray
    attention: np.ndarray
    diverged: np.ndarray
    lost: np.ndarray

    def __len__(self) -> int:
        return len(self.run)

    def of(self, chosen: np.ndarray) -> Samples:
        """Those at the indices, or under the mask."""
        return replace(self, **{name: value[chosen] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Course:
    """What happened in one run of T steps.

    Args:
        loss: (T,) that moves are judged by, NaN where not finite.
        smooth: (T,) smoothed ``attention_diag``, kept from one measurement to the next, NaN before the first.
        measured: (T,) bool.
        diverged: (T,) bool, found at that step.
        lost_at: (T,) 1 where an alignment began to be lost for good, NaN where the run is too short to say, else 0.
        aligned: (T,) bool, there is an alignment that can be lost.
    """

    loss: np.ndarray
    smooth: np.ndarray
    measured: np.ndarray
    diverged: np.ndarray
    lost_at: np.ndarray
    aligned: np.ndarray


def course(trace: Trace) -> Course:
    """What happened in a run."""
    mel = trace.column("mel").astype(np.float64)
    loss = trace.column("total").astype(np.float64) if np.isnan(mel).all() else mel
    loss = np.where(np.isfinite(loss), loss, np.nan)
    smooth, measured = _smooth(trace.column("attention.attention_diag"))
    best = np.fmax.accumulate(smooth)
    with np.errstate(invalid="ignore"):
        under = (best >= ALIGNED) & (smooth < 0.5 * best)
        aligned = (best >= ALIGNED) & (smooth >= 0.5 * best)
    return Course(loss, smooth, measured, _diverged(trace, loss), _lost_at(under), aligned)


def samples(traces: Sequence[Trace], *, stride: int = STRIDE) -> Samples:
    """All windows of the runs, one every ``stride`` steps, that have something to say of what came after.

    Raises:
        ValueError: there is none.
    """
    rows = [(run, *row) for run, trace in enumerate(traces) for row in _of_run(trace, stride)]
    if not rows:
        raise ValueError(f"{len(traces)} runs have no window: too short, or without finite losses; record longer ones")
    runs, windows, after = zip(*rows, strict=True)
    losses, attentions, diverged, lost = (np.array(part) for part in zip(*after, strict=True))
    return Samples(
        run=np.array(runs),
        step=np.array([window.steps[-1] for window in windows]),
        blocks=np.array([window.blocks for window in windows], dtype=np.float32),
        filled=np.array([window.filled for window in windows]),
        summary=np.array([window.summary for window in windows], dtype=np.float32),
        level=np.array([window.level for window in windows]),
        scale=np.array([window.scale for window in windows]),
        loss=losses,
        attention_now=np.array([window.attention_diag for window in windows]),
        attention=attentions,
        diverged=diverged,
        lost=lost,
    )


def observed(trace: Trace) -> Iterable[tuple[Observation, dict[str, float]]]:
    """Each step with the knobs it was made with."""
    columns = {name: trace.column(f"knob.{name}") for name in KNOBS}
    for at, observation in enumerate(trace.observations()):
        yield observation, {name: float(column[at]) for name, column in columns.items() if column[at] > 0.0}


def _of_run(trace: Trace, stride: int) -> Iterable[tuple[Window, tuple[np.ndarray, ...]]]:
    happened, history = course(trace), History(_HISTORY)
    for at, (observation, knobs) in enumerate(observed(trace)):
        history.observe(observation, knobs)
        if (at + 1) % stride == 0 and at + 1 + HORIZONS[0] <= len(trace.table):
            window = history.window()
            if window is not None:
                yield window, _after(happened, at, window)


def _after(happened: Course, at: int, window: Window) -> tuple[np.ndarray, ...]:
    """(K,) each: loss, attention, diverged, lost."""
    ends = [at + horizon for horizon in HORIZONS]
    inside = [end < len(happened.loss) for end in ends]
    rows = [
        (
            _later_loss(happened.loss, end, window),
            _later_attention(happened, end),
            math.nan if happened.diverged[at] else float(happened.diverged[at + 1 : end + 1].any()),
            _ever(happened.lost_at[at + 1 : end + 1]) if happened.aligned[at] else math.nan,
        )
        if known
        else (math.nan,) * 4
        for end, known in zip(ends, inside, strict=True)
    ]
    return tuple(np.array(rows).T)


def _later_loss(loss: np.ndarray, end: int, window: Window) -> float:
    seen = loss[end + 1 - LEVEL : end + 1]
    seen = seen[np.isfinite(seen)]
    if len(seen) < _FEWEST_LATER:
        return math.nan
    return float(compress(np.median(seen), window.level, window.scale))


def _later_attention(happened: Course, end: int) -> float:
    fresh = happened.measured[max(end + 1 - _STALE, 0) : end + 1].any()
    return float(happened.smooth[end]) if fresh else math.nan


def _ever(events: np.ndarray) -> float:
    """1 if there is one, NaN if there may be one, else 0."""
    return 1.0 if (events == 1.0).any() else math.nan if np.isnan(events).any() else 0.0


def _smooth(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    smooth, now = np.full(len(values), np.nan), math.nan
    for at, value in enumerate(values.tolist()):
        if math.isfinite(value):
            now = value if math.isnan(now) else _ATTENTION_MEMORY * now + (1.0 - _ATTENTION_MEMORY) * value
        smooth[at] = now
    return smooth, np.isfinite(values)


def _diverged(trace: Trace, loss: np.ndarray) -> np.ndarray:
    """(T,) bool: by ``FeedbackLoopManager.broken`` on the loss, or the last three steps were not finite."""
    losses = np.stack([trace.column(name) for name in ("total", "mel")])
    said = ~np.isnan(losses).all(axis=1, keepdims=True)  # a loss that the host lacks is NaN all along
    bad = (said & ~np.isfinite(losses)).any(axis=0) | (trace.column("skipped") == 1.0)
    manager, context, series = FeedbackLoopManager(), _context(), list(enumerate(loss.tolist()))
    found = np.zeros(len(loss), dtype=bool)
    for at in range(len(loss)):
        broken = manager.broken(context, series[max(at + 1 - _HISTORY, 0) : at + 1])
        found[at] = broken is not None or (at + 1 >= _NONFINITE and bad[at + 1 - _NONFINITE : at + 1].all())
    return found


def _context() -> TrainingContext:
    """One without attention: ``broken`` then looks at the loss alone."""
    return TrainingContext(
        step=0,
        phase=TrainingPhase.PRE_ALIGNMENT,
        phase_posterior=(1.0, 0.0, 0.0, 0.0),
        certainty=1.0,
        trends={},
        attention=None,
        stable=False,
        grad_spikes=0.0,
        grad_norm_median=math.nan,
        nonfinite_run=0,
        nonfinite_losses=0,
        learning_rate=math.nan,
        update_ratio=math.nan,
        best_attention_diag=0.0,
        text_length=math.nan,
    )


def _lost_at(under: np.ndarray) -> np.ndarray:
    """(T,) 1 where a stretch of at least 50 steps ``under`` begins, NaN where one that the run's end cut short does."""
    edges = np.flatnonzero(np.diff(under.astype(np.int8), prepend=0, append=0))
    found = np.zeros(len(under))
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        if end - begin >= _LOST_STEPS:
            found[begin] = 1.0
        elif end == len(under):
            found[begin] = math.nan
    return found
