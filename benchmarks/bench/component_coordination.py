"""What coordination changes: micro-Tacotrons under the brain with it, without it, and with plain averaging.

*Healthy* runs start at rates 100 times apart, with noise, edge silence or one redrawn attention; *troubled* ones at ten
times the rate and more. A *reversal* is a knob that moves the other way than the last time it moved; a *chain* is a
move, its counter-move and the counter to that: two or more reversals of a knob, each within 50 steps of the last move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from tts_brain.config import BrainConfig
from tts_brain.learning.micro_tacotron import MicroRuns, MicroSetting
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import KNOBS, Verdict

PART = "coordination"
SEED, STEPS, LOOK_EVERY = 100, 300, 10
ALIGNED, IN_A_ROW = 0.5, 3
_CHAIN_WITHIN = 50
_RESAMPLES = 10_000
WEAK = 0.02  # guided weight of the host, in normalised units: what a default comes to
_NOISY, _SILENT = {"wrong_transcripts": 0.2}, {"edge_silence": (0.0, 12.0)}

HEALTHY: Mapping[str, Mapping[str, Any]] = {
    **{f"rate {rate:g}": {"rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
    "wrong transcripts": {"rate": 1e-3, **_NOISY},
    "edge silence": {"rate": 1e-3, **_SILENT},
    "attention redrawn": {"rate": 1e-3, "redraw_steps": frozenset({STEPS // 2})},
}
TROUBLED: Mapping[str, Mapping[str, Any]] = {
    **{f"rate {rate:g}": {"rate": rate} for rate in (6e-2, 1e-1)},
    "rate 0.03, wrong transcripts": {"rate": 3e-2, "wrong_transcripts": 0.3},
    "rate 0.03, edge silence": {"rate": 3e-2, **_SILENT},
    "rate 0.03, attention redrawn": {"rate": 3e-2, "redraw_steps": frozenset({STEPS // 3, 2 * STEPS // 3})},
    "rate 0.1, attention redrawn": {"rate": 1e-1, "redraw_steps": frozenset({STEPS // 3})},
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Steered:
    """One run: steps to aligned (twice the budget if never), held-out L1; reversals and chains per 1,000 steps."""

    aligned: float
    l1: float
    reversals: float
    chains: float


def steer(kinds: Mapping[str, Mapping[str, Any]], seeds: int, steps: int, config: Mapping[str, Any]) -> list[Steered]:
    """All kinds of start under a brain with ``config``, a run for each kind and seed, always in the same order."""
    settings = [MicroSetting(guided_weight=WEAK, **kind) for kind in kinds.values() for _ in range(seeds)]
    runs = MicroRuns(settings, [SEED + number % seeds for number in range(len(settings))])
    brains = [_Steering(setting, config) for setting in settings]
    for step in range(1, steps + 1):
        for brain, observation in zip(brains, runs.step([brain.knobs for brain in brains]), strict=True):
            brain.see(observation)
        if step % LOOK_EVERY == 0:
            for brain, held_out in zip(brains, runs.held_out(), strict=True):
                brain.looks.append((step, held_out["attention_diag"], held_out["l1"]))
    return [
        Steered(
            steps_to_aligned(brain.looks, steps),
            brain.looks[-1][2],
            1000.0 * brain.reversals / steps,
            1000.0 * brain.chains / steps,
        )
        for brain in brains
    ]


class _Steering:
    """One run's brain. A rollback lowers the rate; the weights stay, as no snapshot is kept."""

    def __init__(self, setting: MicroSetting, config: Mapping[str, Any]) -> None:
        self._manager = ContextAwareTrainingManager(BrainConfig(**config), setting.capabilities, setting.host_values)
        self._last: dict[str, tuple[int, float, int]] = {}  # step, move, reversals in a row
        self.looks: list[tuple[int, float, float]] = []
        self.reversals = self.chains = 0

    @property
    def knobs(self) -> Mapping[str, float]:
        return self._manager.knobs

    def see(self, observation: Any) -> None:
        manager = self._manager
        manager.observe(observation)
        if not manager.due(observation.step):
            return
        decision = manager.decide()
        for knob, (old, new) in decision.moves.items():
            self._note(decision.step, knob, KNOBS[knob].move(old, new))
        if decision.verdict is Verdict.ROLL_BACK:
            rolled_back(manager, observation.step)

    def _note(self, step: int, knob: str, move: float) -> None:
        before, last, row = self._last.get(knob, (step, 0.0, 0))
        reversed_ = last * move < 0.0
        row = row + 1 if reversed_ and step - before <= _CHAIN_WITHIN else 0
        self.reversals += reversed_
        self.chains += row == 2  # a longer chain is one chain too
        self._last[knob] = (step, move, row)


def rolled_back(manager: ContextAwareTrainingManager, step: int) -> None:
    """What a session tells its manager where no snapshot is kept: the weights stay."""
    count, trial = manager.rollbacks_in_a_row + 1, manager.feedback.trial
    manager.rolled_back(failed_at=step, count=count, restored=False, trial=trial)


def steps_to_aligned(looks: Sequence[tuple[int, float, float]], steps: int) -> int:
    """The first of three looks in a row at an ``attention_diag`` of at least 0.5."""
    for at in range(len(looks) - IN_A_ROW + 1):
        if all(attention >= ALIGNED for _, attention, _ in looks[at : at + IN_A_ROW]):
            return looks[at][0]
    return 2 * steps


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """90 % bootstrap interval (Efron 1979) of the mean of ours less theirs, each of the same start and seed."""
    apart = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    drawn = np.random.default_rng(0).choice(apart, size=(_RESAMPLES, len(apart))).mean(axis=1)
    low, high = np.quantile(drawn, (0.05, 0.95))
    return float(low), float(high)


def rows(quick: bool = False) -> list[Row]:
    """With coordination against without, and against the average."""
    made = []
    for name, kinds, seeds in (("healthy", HEALTHY, 2), ("troubled", TROUBLED, 4)):
        some = dict(list(kinds.items())[2:4]) if quick else kinds
        many, steps = (1, 60) if quick else (seeds, STEPS)
        full, none, average = (steer(some, many, steps, {"coordination": how}) for how in ("full", "none", "average"))
        for against, rival in (("none", none), ("average", average)):
            for figure, field in (
                ("steps to aligned", "aligned"),
                ("held-out L1", "l1"),
                ("reversals per 1,000 steps", "reversals"),
                ("chains of counter-moves per 1,000 steps", "chains"),
            ):
                ours, theirs = ([getattr(run, field) for run in runs] for runs in (full, rival))
                low, high = paired(ours, theirs)
                note = f"mean of {len(full)} micro-Tacotrons, {steps} steps; ours less theirs, run by run: "
                note += f"{low:+.3g} to {high:+.3g} (90 % bootstrap interval)"
                row = {"part": PART, "against": against, "figure": f"{figure}, {name} starts"}
                made.append(row | {"ours": fmean(ours), "theirs": fmean(theirs), "note": note})
    return made
