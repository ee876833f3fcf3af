"""Made-up runs for the tests of the core: streams of observations, and a tiny training that answers to its knobs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tts_brain.config import BrainConfig
from tts_brain.journal import to_plain
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import (
    GUIDED_SIGMA,
    KNOBS,
    AttentionReport,
    Capabilities,
    Decision,
    Observation,
    StopTokenCounts,
    TrainingContext,
    TrainingPhase,
    Trend,
    Verdict,
)

HOST = Capabilities(
    host="simulated",
    losses=("total", "mel", "gate", "guided"),
    knobs=tuple(KNOBS),
    alignment="attention",
    stop_token=True,
)
# Losses lie on this grid, so that a shift by a whole number and a scale by a power of two are exact.
_GRID = 2.0**16


@dataclass(frozen=True)
class Stretch:
    """Steps of one kind: the mel loss moves by ``slope`` a step under ``noise``, a share of the norms spikes."""

    steps: int
    slope: float = 0.0
    noise: float = 0.05
    spikes: float = 0.0
    attention: float = 0.05
    bad: float = 0.0  # share of steps that are not finite


# Early, aligning, trouble (spikes, a rise, NaNs), late: what a run can show.
EVENTFUL = (
    Stretch(60, slope=-0.02),
    Stretch(12, slope=0.02),
    Stretch(12, slope=0.02, attention=0.3),
    Stretch(28, slope=-0.005, attention=0.3),
    Stretch(40, slope=-0.005, attention=0.3),
    Stretch(30, slope=0.02, spikes=0.3, attention=0.3),
    Stretch(40, slope=-0.01, attention=0.6),
    Stretch(10, bad=0.7, attention=0.6),
    Stretch(40, attention=0.8),
    Stretch(30, slope=0.3, noise=0.2, attention=0.2),
    Stretch(50, slope=-0.02, attention=0.75),
)


def report(attention_diag: float, **changes: float) -> AttentionReport:
    """All three sides as good as ``attention_diag``."""
    sides = dict.fromkeys(("diagonality", "focus", "coverage", "attention_diag"), attention_diag)
    rest = {"entropy": 0.5, "skips": 1.0, "repeats": 1.0, "longest_dwell": 5.0, "end_reached": 1.0}
    return AttentionReport(**{**sides, **rest, **changes})


def observations(
    stretches: Iterable[Stretch], seed: int = 0, scale: float = 1.0, shift: float = 0.0
) -> Iterator[Observation]:
    """One observation a step; every loss is multiplied by ``scale``, then ``shift`` is added."""
    rng = np.random.default_rng(seed)
    level, step = 4.0, 0
    for stretch in stretches:
        for _ in range(stretch.steps):
            step += 1
            level += stretch.slope
            draw, norm_draw, spike, bad, diag = rng.normal(), rng.normal(), rng.random(), rng.random(), rng.normal()
            mel = round((level + stretch.noise * draw) * _GRID) / _GRID
            raw = {"total": mel + 0.5, "mel": mel, "gate": mel / 8, "guided": mel / 16}
            broken = bad < stretch.bad
            yield Observation(
                step=step,
                losses={name: float("nan") if broken else value * scale + shift for name, value in raw.items()},
                grad_norm=float(np.exp(0.1 * norm_draw)) * (10.0 if spike < stretch.spikes else 1.0),
                learning_rate=1e-4,
                update_ratio=1e-3,
                attention=report(float(np.clip(stretch.attention + 0.03 * diag, 0, 1))) if step % 2 == 0 else None,
                stop=StopTokenCounts(0.5, 0.1, 0.4) if step % 5 == 0 else None,
                text_length=40.0,
                skipped=broken and bad < stretch.bad / 2,
            )


def make_manager(**settings: Any) -> ContextAwareTrainingManager:
    """One that decides every fifth step and moves at a pace that a short test can see."""
    config = BrainConfig(
        **{"decide_every": 5, "cooldown_steps": 15, "trial_steps": 10, "tversky_weight": 0.5, **settings}
    )
    return ContextAwareTrainingManager(config, HOST, {GUIDED_SIGMA: 0.4})


def show(manager: ContextAwareTrainingManager, observation: Observation) -> Decision | None:
    """What a session does at each step; a rollback finds a snapshot, but the knobs stay for the test to see."""
    manager.observe(observation)
    if not manager.due(observation.step):
        return None
    decision = manager.decide()
    if decision.verdict is Verdict.ROLL_BACK:
        count, trial = manager.rollbacks_in_a_row + 1, manager.feedback.trial
        manager.rolled_back(failed_at=observation.step, count=count, restored=True, trial=trial)
    return decision


def drive(manager: ContextAwareTrainingManager, stream: Iterable[Observation]) -> list[Decision]:
    """All decisions over a stream."""
    return [d for d in (show(manager, o) for o in stream) if d is not None]


def plain(decisions: Iterable[Decision]) -> list[Any]:
    """Comparable: NaN equals NaN."""
    return [to_plain(d) for d in decisions]


def fingerprint(seed: int = 0) -> str:
    """Hash of all decisions over the eventful run, to compare across processes."""
    decisions = plain(drive(make_manager(), observations(EVENTFUL, seed)))
    return hashlib.sha256(json.dumps(decisions).encode()).hexdigest()


def falling(z: float = -5.0, count: int = 20) -> Trend:
    """A trend of the loss with this ``z``."""
    return Trend(level=1.0, slope=z / 100, noise=0.1, z=z, count=count)


def context(**changes: Any) -> TrainingContext:
    """A calm early context; ``loss_z`` and ``attention_diag`` are short for the fields they make."""
    z, diag = changes.pop("loss_z", 0.0), changes.pop("attention_diag", 0.05)
    calm = TrainingContext(
        step=100,
        phase=TrainingPhase.PRE_ALIGNMENT,
        phase_posterior=(1.0, 0.0, 0.0, 0.0),
        certainty=1.0,
        trends={"total": falling(z), "mel": falling(z)},
        attention=report(diag),
        stable=True,
        grad_spikes=0.0,
        grad_norm_median=1.0,
        nonfinite_run=0,
        nonfinite_losses=0,
        learning_rate=1e-4,
        update_ratio=1e-3,
        best_attention_diag=diag,
        text_length=40.0,
    )
    return replace(calm, **changes)
