"""Time of each part of the context, per training step, on one core.

A part that works at each decision counts a tenth (``decide_every`` is 10), one that works when attention is measured a
fifth. The parts take turns in short blocks of made-up steps, each in a state where all windows are full; the figure is
the median block. Time is that of the process, so that other jobs on the core count only by what they do to its caches.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.context.lengths import LengthEffect
from tts_brain.context.phases import PhaseClassifier
from tts_brain.context.scales import HISTORY, scales
from tts_brain.context.trends import trend
from tts_brain.feedback.kalman import MetricFilter
from tts_brain.learning.micro_tacotron import MicroRun, MicroSetting
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import GUIDED_SIGMA, KNOBS, AttentionReport, Capabilities, Observation, StopTokenCounts

PART = "time"
LIMIT_MS, MICRO_LIMIT_MS = 1.0, 15.0
LOSSES = ("total", "mel", "gate", "guided")
_SEED = 90_000
_BLOCK = 100  # steps, a whole number of decisions
_WARM_UP = 2 * HISTORY

Row = dict[str, Any]
Work = Callable[[], None]  # the part's share of _BLOCK steps


def observations(config: BrainConfig) -> Iterator[Observation]:
    """An endless run: losses fall, the alignment forms."""
    rng = np.random.default_rng(_SEED)
    for step in itertools.count(1):
        mel = 0.6 + float(np.exp(-step / 300.0)) + 0.03 * float(rng.normal())
        good = float(np.clip(0.6 / (1.0 + np.exp((400.0 - step) / 60.0)) + 0.03 * rng.normal(), 0.0, 1.0))
        measured = step % config.attention_every == 0
        yield Observation(
            step,
            dict(zip(LOSSES, (mel + 0.2, mel, 0.1 * mel, 0.05 * mel), strict=True)),
            grad_norm=float(np.exp(0.2 * rng.normal())),
            learning_rate=1e-3,
            update_ratio=1e-3,
            attention=AttentionReport(good, good, good, good, 0.5, 1.0, 1.0, 5.0, 1.0) if measured else None,
            stop=StopTokenCounts(0.5, 0.1, 0.4),
            text_length=40.0 + step % 30,
        )


def parts(config: BrainConfig) -> dict[str, Work]:
    """Name to work, each with a state of its own."""
    noise = np.random.default_rng(_SEED).normal(size=HISTORY)
    steps, values = list(range(HISTORY)), (1.0 + 0.1 * noise).tolist()
    decisions, measured = _BLOCK // config.decide_every, _BLOCK // config.attention_every
    window = config.trend_window
    filtered = MetricFilter("log", tuple(KNOBS))
    phases = PhaseClassifier(config.phase_classifier_components, config.phase_stickiness, config.history_size)
    at = itertools.count(1)
    return {
        "MetricFilter.update, a metric": lambda: _each(
            _BLOCK, lambda: filtered.update(next(at), values[next(at) % HISTORY])
        ),
        "scales(), a series, at each decision": lambda: _each(decisions, lambda: scales(steps, values)),
        "trend(), a series, at each decision": lambda: _each(
            decisions, lambda: trend(steps[-window:], values[-window:])
        ),
        "PhaseClassifier.update, at each measurement": lambda: _each(
            measured, lambda: phases.update(0.5 * values[next(at) % HISTORY], -1.0, 10.0)
        ),
        "LengthEffect.adjusted": _length_part(config),
        **_analyzer_parts(config),
        "ContextAwareTrainingManager, observe and decide": _manager_part(config),
    }


def _length_part(config: BrainConfig) -> Work:
    by, some = LengthEffect(), list(itertools.islice(observations(config), _BLOCK))

    def work() -> None:
        for seen in some:
            by.adjusted(seen)

    for _ in range(_WARM_UP // _BLOCK):
        work()
    return work


def _analyzer_parts(config: BrainConfig) -> dict[str, Work]:
    def fresh() -> tuple[ContextAnalyzer, Iterator[Observation]]:
        analyzer = ContextAnalyzer(
            config.history_size,
            config.phase_classifier_components,
            config.trend_window,
            config.stability_threshold,
            config.phase_stickiness,
        )
        stream = observations(config)
        for seen in itertools.islice(stream, _WARM_UP):
            analyzer.observe(seen)
        return analyzer, stream

    (folding, first), (asked, _), (whole, second) = fresh(), fresh(), fresh()

    def both() -> None:
        for seen in itertools.islice(second, _BLOCK):
            whole.observe(seen)
            if seen.step % config.decide_every == 0:
                whole.context()

    def fold() -> None:
        for seen in itertools.islice(first, _BLOCK):
            folding.observe(seen)

    return {
        "ContextAnalyzer.observe": fold,
        "ContextAnalyzer.context(), at each decision": lambda: _each(_BLOCK // config.decide_every, asked.context),
        "whole ContextAnalyzer": both,
    }


def _manager_part(config: BrainConfig) -> Work:
    host = Capabilities("made-up", LOSSES, tuple(KNOBS), "attention", True)
    manager, stream = ContextAwareTrainingManager(config, host, {GUIDED_SIGMA: 0.4}), observations(config)

    def work() -> None:
        for seen in itertools.islice(stream, _BLOCK):
            manager.observe(seen)
            if manager.due(seen.step):
                manager.decide()

    for _ in range(_WARM_UP // _BLOCK):
        work()
    return work


def _each(count: int, call: Callable[[], object]) -> None:
    for _ in range(count):
        call()


def milliseconds(work: dict[str, Work], blocks: int) -> dict[str, float]:
    """Per step: the median block of each part, taken in turn. The first block of each is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(blocks + 1):
        for name, block in work.items():
            start = time.process_time()
            block()
            spent[name].append(1000.0 * (time.process_time() - start) / _BLOCK)
    return {name: statistics.median(taken[1:]) for name, taken in spent.items()}


def made_observation_ms(config: BrainConfig, blocks: int) -> float:
    """What making an observation of ours costs, which is in the blocks of analyzer and manager."""
    stream = observations(config)
    return milliseconds({"": lambda: _each(_BLOCK, lambda: next(stream))}, blocks)[""]


def rows(quick: bool) -> list[Row]:
    """Milliseconds per step; the limit stands where there is one."""
    config, blocks = BrainConfig(), 3 if quick else 40
    found = milliseconds(parts(config), blocks)
    made = made_observation_ms(config, blocks)
    note = f"median of {blocks} blocks of {_BLOCK} steps, process time"
    result = []
    for name, taken in found.items():
        takes_observations = name in ("ContextAnalyzer.observe", "whole ContextAnalyzer") or "Manager" in name
        result.append(
            {
                "part": PART,
                "against": f"{LIMIT_MS:g} ms" if name == "whole ContextAnalyzer" else "",
                "figure": f"ms per step: {name}",
                "ours": round(taken - made if takes_observations else taken, 4),
                "theirs": LIMIT_MS if name == "whole ContextAnalyzer" else None,
                "note": note + (f", less {made:.3f} to make the observations" if takes_observations else ""),
            }
        )
    result.append(_micro_row(blocks))
    return result


def _micro_row(blocks: int) -> Row:
    """What the traces are made with: a training step of one micro-Tacotron, batch 16, r 4."""
    run = MicroRun(MicroSetting(), _SEED)
    taken = []
    for _ in range(10 * blocks):
        start = time.process_time()
        run.step()
        taken.append(1000.0 * (time.process_time() - start))
    return {
        "part": PART,
        "against": f"{MICRO_LIMIT_MS:g} ms",
        "figure": "ms per training step: micro-Tacotron",
        "ours": round(statistics.median(taken), 2),
        "theirs": MICRO_LIMIT_MS,
        "note": f"median of {10 * blocks} steps, process time, batch 16, r 4",
    }
