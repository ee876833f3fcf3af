"""What really happened after a decision, by the simulation's own definitions; and which of two branches ended better.

The simulation speaks of levels, which nobody sees. Here the level of the loss is the median of the five steps around a
look, that of the attention the mean of the nine around it, as single measurements (four utterances) are far from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bench.forks import AFTER, FORESEEN, GIVEN, HELD, PROBE, ROLLBACK, UNDO, VOTE, Decided, Vector
from tts_brain.coordination.dynamics import Outlook, simulate
from tts_brain.coordination.game import stirring
from tts_brain.coordination.outlook import tracked

HORIZON = 40  # 2 x trial_steps, as the manager sets it
_LEVEL, _ATTENTION_LEVEL = 5, 9
_EVERY = 2  # steps between two looks of the simulation over this horizon
_ALIGNED = 0.5
# Judged from here to the end: what a move does at once may be a transient.
_JUDGED_FROM = 25
# Smaller differences of the mean loss, in noise widths of one value, are called none.
CLEAR = 0.1


@dataclass(frozen=True)
class Case:
    """One joint move: what was said of it, and what happened in the fork that made it and then nothing more.

    Args:
        seed, step: of the run, and of the decision.
        said: the outlook.
        diverged, lost: what happened; ``lost`` is None where there was no alignment to lose.
        gain: fall of the loss at the end of the horizon against the fork without a move, in noise widths.
    """

    seed: int
    step: int
    said: Outlook
    diverged: bool
    lost: bool | None
    gain: float


def cases(some: Iterable[Decided], *, probes: bool = False) -> list[Case]:
    """Of each forked decision the different joint moves that stir a knob whose effect is learned: what a stage was
    given or handed on; or the probe alone."""
    found = []
    for one in some:
        done: list[dict[str, float]] = []
        for name in one.after if one.course is not None and ROLLBACK not in one.knobs else ():
            if name != UNDO and (name == PROBE) is probes and one.knobs[name] not in done and stirred(one, name):
                done.append(one.knobs[name])
                found.append(case_of(one, name, one.after[name]))
    return found


def stirred(one: Decided, branch: str) -> dict[str, float]:
    """What the simulation plays of a branch's joint move."""
    return {knob: move for knob, move in tracked(stirring(one.moves(branch))).items() if move}


def case_of(one: Decided, branch: str, after: Vector) -> Case:
    """The case of a branch that went on as ``after``: (steps, 2), the horizon and a few more."""
    assert one.course is not None
    said = simulate(one.course, stirred(one, branch), horizon=HORIZON, step=one.step)
    gain = (_end(one.after[HELD]) - _end(after)) / one.noise if HELD in one.after else math.nan
    return Case(one.seed, one.step, said, diverged(one, after), lost(one, after), gain)


def run_cases(some: Iterable[Decided]) -> list[Case]:
    """The same of the runs themselves, whose brains went on deciding: of what the simulation said its last word on,
    where that was made. The gain is not known."""
    return [
        Case(one.seed, one.step, one.weighed.outlook, diverged(one, one.run_after), lost(one, one.run_after), math.nan)
        for one in some
        if one.course is not None
        and one.weighed is not None
        and one.weighed.outlook is not None
        and one.knobs.get(FORESEEN) == one.knobs[VOTE]
        and len(one.run_after) >= HORIZON + _ATTENTION_LEVEL // 2
    ]


def risks(some: Iterable[Case]) -> dict[str, list[tuple[float, bool, int]]]:
    """By kind of risk: the share of plays that went wrong, whether the fork or run did, and of how many plays."""
    some = list(some)
    return {
        "divergence": [(case.said.divergence, case.diverged, case.said.draws) for case in some],
        "alignment_loss": [(c.said.alignment_loss, c.lost, c.said.draws) for c in some if c.lost is not None],
    }


def diverged(one: Decided, after: Vector) -> bool:
    """The level of the loss was above its limit at one of the looks; a loss that is not finite is above all."""
    assert one.course is not None
    loss = np.where(np.isfinite(after), after, math.inf)[:, 0]
    levels = [float(np.median(around)) for around in _around(one.before[:, 0], loss, _LEVEL)]
    return max(levels) > one.level + one.course.divergence_limit * one.noise


def lost(one: Decided, after: Vector) -> bool | None:
    """The level of ``attention_diag`` was under half its best at one of the looks; None where that was no alignment."""
    if one.course is None or one.course.attention is None or one.course.best_attention_diag < _ALIGNED:
        return None
    levels = [float(np.nanmean(around)) for around in _around(one.before[:, 1], after[:, 1], _ATTENTION_LEVEL)]
    return min(levels) < one.course.best_attention_diag / 2.0


def _around(before: Vector, after: Vector, width: int) -> list[Vector]:
    """The ``width`` values around each look; fewer where the run is younger than that."""
    both, now = np.concatenate([before, after]), len(before) - 1
    looks = range(now + _EVERY, now + HORIZON + 1, _EVERY)
    return [both[max(at - width // 2, 0) : at + width // 2 + 1] for at in looks]


def _end(after: Vector) -> float:
    half = _LEVEL // 2
    return float(np.median(after[HORIZON - 1 - half : HORIZON + half, 0]))


def better(one: Decided, stage: str) -> float | None:
    """By how much the stage's own branch ended better than the one it was given, in noise widths of the loss.

    Steps 26 to 50 after the decision, same batches: infinite where one of the two lost its alignment, or its loss, and
    the other did not. None where it was not forked.
    """
    if stage not in one.after or GIVEN[stage] not in one.after or not one.noise > 0.0:
        return None
    ours, theirs = (one.after[name][_JUDGED_FROM:AFTER] for name in (stage, GIVEN[stage]))
    broken = [_broken(one, late) for late in (ours, theirs)]
    if broken[0] != broken[1]:
        return math.inf if broken[1] else -math.inf
    difference = float(theirs[:, 0].mean() - ours[:, 0].mean()) / one.noise
    return difference if math.isfinite(difference) else 0.0


def _broken(one: Decided, late: Vector) -> bool:
    best = 0.0 if one.course is None else one.course.best_attention_diag
    attention = float(np.nanmean(late[:, 1]))
    return not np.isfinite(late[:, 0]).all() or (best >= _ALIGNED and attention < best / 2.0)
