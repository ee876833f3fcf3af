"""Did a move of the rate help? The monitor's judgement against the truth, which here can be had.

The micro-Tacotron trains each run twice: once with a move of its rate, once without, from the same weights on the same
batches. A move is *bad* when the training loss of steps 20 to 60 after it is higher by more than 0.3 of the noise than
it would have been, *good* when it is lower by as much. The judge sees only the run with the move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.feedback.manager import FeedbackLoopManager
from tts_brain.learning.micro_tacotron import MicroRuns, MicroSetting
from tts_brain.types import LEARNING_RATE

PART = "judge"
SEED = 80_000
MOVED_AT = (60, 120, 200)
RATES = (5e-4, 1e-3, 3e-3, 1e-2)
FACTORS = (0.25, 0.5, 2.0, 4.0, 8.0)
TRIAL, AFTER = 20, 60
_CLEAR = 0.3  # noise widths
_NOISE_OVER = 20  # steps before the move

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One move: what it did to the loss, in noise widths, and what was said of it after ``TRIAL`` steps."""

    harm: float
    level_z: float
    helped: float
    undone: bool


def cases(seed: int, moved_at: int, runs: int) -> list[Case]:
    """``runs`` moves at one step."""
    draw = np.random.default_rng(seed)
    rates, factors = draw.choice(RATES, runs), draw.choice(FACTORS, runs)
    made = [MicroSetting(rate=float(rate), forward_sum=0.05) for rate in rates]
    seeds = [seed + number for number in range(runs)]
    moved, left = MicroRuns(made, seeds), MicroRuns(made, seeds)
    watchers = [_Watcher(float(factor)) for factor in factors]
    with_move, without = np.zeros((2, moved_at + AFTER + 1, runs))
    for step in range(1, moved_at + AFTER + 1):
        seen = moved.step([watcher.knobs for watcher in watchers])
        with_move[step] = [one.losses["mel"] for one in seen]
        if step > moved_at:
            without[step] = [one.losses["mel"] for one in left.step()]
        for watcher, one in zip(watchers, seen, strict=True):
            watcher.see(one, moved_at)
        if step == moved_at:
            left.load_state_dict(moved.state_dict())
    late, early = slice(moved_at + TRIAL, None), slice(moved_at - _NOISE_OVER, moved_at + 1)
    harm = (with_move[late] - without[late]).mean(0) / with_move[early].std(0)
    return [Case(float(h), *watcher.said) for h, watcher in zip(harm, watchers, strict=True)]


class _Watcher:
    """The brain's eyes on one run: as in ``ContextAwareTrainingManager``, with a move that is given."""

    def __init__(self, factor: float) -> None:
        self.knobs, self._new = {LEARNING_RATE: 1.0}, factor
        self._analyzer, self._feedback = ContextAnalyzer(), FeedbackLoopManager(TRIAL)
        self._by_level = FeedbackLoopManager(TRIAL)  # its filter is shown nothing, so that it goes by the level alone
        self.said = (math.nan, math.nan, False)

    def see(self, observation: Any, moved_at: int) -> None:
        self._analyzer.observe(observation)
        self._feedback.observe(observation, self.knobs)
        series = self._analyzer.series("mel")
        if observation.step == moved_at:
            move = {LEARNING_RATE: (1.0, self._new)}
            for judge in (self._feedback, self._by_level):
                judge.open(moved_at, move, self._analyzer.context(), series)
            self.knobs = {LEARNING_RATE: self._new}
        elif observation.step == moved_at + TRIAL:
            judgement, plain = (
                judge.judge(self._analyzer.context(), series) for judge in (self._feedback, self._by_level)
            )
            self.said = (plain.evidence["loss_change_z"], judgement.evidence["helped"], judgement.kept is False)


def rows(quick: bool = False) -> list[Row]:
    """Rank of bad moves over good ones, and which of either are taken back."""
    runs = 6 if quick else 24
    some = [case for at in MOVED_AT[: 1 if quick else None] for case in cases(SEED + at, at, runs)]
    bad = [case for case in some if case.harm > _CLEAR]
    good = [case for case in some if case.harm < -_CLEAR]
    note = f"{len(bad)} bad and {len(good)} good moves of {len(some)}"

    def row(figure: str, ours: float, theirs: float) -> Row:
        against = "rise of the level, z > 2"
        return {"part": PART, "against": against, "figure": figure, "ours": ours, "theirs": theirs, "note": note}

    return [
        row("AUROC, bad over good", _auroc(bad, good, lambda c: -c.helped), _auroc(bad, good, lambda c: c.level_z)),
        row("bad moves taken back, share", _share(c.undone for c in bad), _share(c.level_z > 2.0 for c in bad)),
        row("good moves taken back, share", _share(c.undone for c in good), _share(c.level_z > 2.0 for c in good)),
    ]


def _auroc(bad: list[Case], good: list[Case], score: Any) -> float:
    """Chance that a bad move scores above a good one (Mann and Whitney 1947); one that cannot be scored counts low."""
    if not bad or not good:
        return math.nan
    high, low = (np.nan_to_num([score(case) for case in some], nan=-1e9) for some in (bad, good))
    return float(np.mean((high[:, None] > low) + 0.5 * (high[:, None] == low)))


def _share(said: Any) -> float:
    found = list(said)
    return sum(found) / len(found) if found else math.nan
