"""Runs of the micro-Tacotron that show what can happen to a run: what the temporal model is trained on.

Half of what goes wrong in a real run is drawn here on purpose: rates 1,000 times apart, any guidance, small batches,
edge silence, wrong texts, NaN batches, an attention that is drawn anew, a rate that shoots up. The knobs move as the
brain moves them: toward targets by a share at each decision, and now and then boldly; some runs are left alone.

Run i is a function of (seed, i) alone, so a folder that was begun can be finished later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tts_brain.learning.micro_tacotron import CAPABILITIES, MicroRuns, MicroSetting
from tts_brain.learning.traces import Recorder, Trace, load, save
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GATE_WEIGHT,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    LEARNING_RATE,
    MEL_WEIGHT,
)

CORPUS = "micro"
RUNS_PER_FILE = 32
DECIDE_EVERY = 10
SUDDEN = frozenset({"nan", "attention-redrawn"})  # faults that nothing announces
_BASE_RATE = 3e-3
# The same within a file, as ``MicroRuns`` wants. r = 1 costs four times as much as 4: rare, and in small batches.
_BATCH_SIZES, _REDUCTIONS = (2, 4, 8, 16, 16, 16), (4, 4, 3, 2, 4, 3, 4, 1)
# Knobs that move, and how far a bold move goes. Not read from ``types.KNOBS``: a change there would change the runs.
_MOVED = {
    LEARNING_RATE: 1.5,
    GUIDED_WEIGHT: 1.35,
    GUIDED_SIGMA: 1.15,
    FORWARD_SUM_WEIGHT: 1.35,
    MEL_WEIGHT: 1.25,
    GATE_WEIGHT: 1.25,
}


@dataclass(frozen=True)
class Plan:
    """One run, before it is made.

    Args:
        setting: of the micro-Tacotron.
        seed: of its weights and data.
        knobs: the knobs at each step, ``steps`` of them.
        faults: in words, as in ``Trace``.
    """

    setting: MicroSetting
    seed: int
    knobs: tuple[Mapping[str, float], ...]
    faults: tuple[str, ...]


def plans(seed: int, number: int, steps: int, runs: int = RUNS_PER_FILE) -> list[Plan]:
    """The runs of file ``number``; they share batch size, reduction factor and noise."""
    rng = np.random.default_rng((seed, number))
    r = _REDUCTIONS[number % len(_REDUCTIONS)]
    batch_size = min(int(rng.choice(_BATCH_SIZES)), 16 if r > 1 else 4)
    noise = float(rng.uniform(0.15, 0.6))
    return [_plan(np.random.default_rng((seed, number, i)), batch_size, r, noise, steps) for i in range(runs)]


def _plan(rng: np.random.Generator, batch_size: int, r: int, noise: float, steps: int) -> Plan:
    faults: dict[str, bool] = {
        name: bool(rng.random() < share)
        for name, share in (
            ("unguided", 0.1),
            ("edge-silence", 0.15),
            ("wrong-transcripts", 0.15),
            ("nan", 0.12),
            ("attention-redrawn", 0.3),
            ("rate-spike", 0.15),
        )
    }
    redraws = rng.integers(steps // 5, steps, size=rng.integers(1, 3) if faults["attention-redrawn"] else 0)
    setting = MicroSetting(
        rate=_BASE_RATE * _log_uniform(rng, 0.03, 30.0),
        guided_weight=0.0 if faults["unguided"] else _log_uniform(rng, 0.02, 20.0),
        guided_sigma=_log_uniform(rng, 0.1, 0.6),
        forward_sum=_log_uniform(rng, 0.003, 0.3) if rng.random() < 0.4 else 0.0,
        batch_size=batch_size,
        reduction_factor=r,
        noise=noise,
        clip=1.0 if rng.random() < 0.7 else 1e6,
        edge_silence=(0.0, float(rng.uniform(5.0, 30.0))) if faults["edge-silence"] else (0.0, 2.0),
        wrong_transcripts=float(rng.uniform(0.05, 0.5)) if faults["wrong-transcripts"] else 0.0,
        nan_steps=_nan_steps(rng, steps) if faults["nan"] else frozenset(),
        redraw_steps=frozenset(int(step) for step in redraws),
    )
    knobs = tuple(_knobs(rng, setting, steps, faults["rate-spike"]))
    return Plan(setting, int(rng.integers(2**40)), knobs, tuple(name for name, on in faults.items() if on))


def _knobs(rng: np.random.Generator, setting: MicroSetting, steps: int, spike: bool) -> Iterator[Mapping[str, float]]:
    """Left alone, drifting toward targets that change now and then, or drifting with bold moves."""
    kind = rng.choice(["still", "drift", "bold"], p=[0.25, 0.4, 0.35])
    turned = tuple(_MOVED) if rng.random() < 0.7 else (LEARNING_RATE,)
    knobs, targets = dict(setting.own_knobs), dict(setting.own_knobs)
    spiked = range(at := int(rng.integers(steps // 4, steps)), at + max(1, steps // 20)) if spike else range(0)
    for step in range(steps):
        if step and step % DECIDE_EVERY == 0 and kind != "still":
            for name in turned:
                if knobs[name] <= 0.0:  # a term that the run does not have
                    continue
                if rng.random() < 0.1:
                    targets[name] = setting.own_knobs[name] * _log_uniform(rng, 0.2, 5.0)
                knobs[name] *= (targets[name] / knobs[name]) ** rng.uniform(0.05, 0.15)
                if kind == "bold" and rng.random() < 0.03:
                    wild = 8.0 if rng.random() < 0.25 else _MOVED[name]
                    knobs[name] *= _log_uniform(rng, 1.0 / wild, wild)
                    targets[name] = knobs[name]
        yield {**knobs, LEARNING_RATE: knobs[LEARNING_RATE] * (30.0 if step in spiked else 1.0)}


def _nan_steps(rng: np.random.Generator, steps: int) -> frozenset[int]:
    """One batch, one every so often, or some in a row."""
    first = int(rng.integers(steps // 8, steps))
    return frozenset(
        {
            "once": range(first, first + 1),
            "often": range(first, steps + 1, int(rng.integers(20, 80))),
            "burst": range(first, first + int(rng.integers(3, 25))),
        }[str(rng.choice(["once", "often", "burst"]))]
    )


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def make(plan: list[Plan], name: str) -> list[Trace]:
    """Train the runs side by side."""
    runs = MicroRuns([one.setting for one in plan], [one.seed for one in plan])
    recorders = [Recorder() for _ in plan]
    for knobs in zip(*(one.knobs for one in plan), strict=True):
        for recorder, observation, turned in zip(recorders, runs.step(list(knobs)), knobs, strict=True):
            recorder.add(observation, {name: value for name, value in turned.items() if value > 0.0})
    return [
        recorder.trace(f"{name}-{i:02d}", host=CAPABILITIES.host, corpus=CORPUS, faults=one.faults)
        for i, (recorder, one) in enumerate(zip(recorders, plan, strict=True))
    ]


def generate(folder: Path, *, runs: int, steps: int, seed: int) -> Iterator[Path]:
    """Make the files that are not there yet, one after the other; a file holds ``RUNS_PER_FILE`` runs.

    A folder belongs to one ``seed`` and ``steps``: files of others are not told apart.
    """
    for number in range(math.ceil(runs / RUNS_PER_FILE)):
        path = folder / f"micro-{number:03d}.safetensors"
        if not path.exists():
            save(path, make(plans(seed, number, steps, min(RUNS_PER_FILE, runs - number * RUNS_PER_FILE)), path.stem))
        yield path


def load_folder(folder: Path) -> list[Trace]:
    """All traces of a folder, by name of the file. Raises StateFileError when a file is not one of traces."""
    return [trace for path in sorted(folder.glob("*.safetensors")) for trace in load(path)]
