"""Is this move worth its risk? From how earlier moves of the same kind ended, and from what the run is made to expect.

Two views, the cheap one first:

1. The book: how often a move of this knob and direction had to be taken back in this run. What is too risky by it is
   left out, knob by knob.
2. The outlook: what is left is played forward under the dynamics that the filters learned, with all that they do not
   know (``dynamics.simulate``). The joint move is halved, then held, if it *adds* more than the budget to the share of
   plays that diverge or lose their alignment; what happens without a move is no reason against it.

The budget is the share of plays that may be lost to one move: 0.30, 0.25, 0.15, 0.10 by phase, as there is more and
more to lose, times the trust: halved with each move that was taken back, down to a quarter, doubled with each that was
kept, up to the whole. What only calms (the rate or the clip lowered) is not simulated: the filters of an untried knob
think a cut as likely to harm as a raise, and we know better.

A share of plays is no probability that the run goes wrong: as one, it is said through ``calibration``. The budget stays
in shares, which is what it was set in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tts_brain.coordination.dynamics import Dynamics, Outlook, simulate
from tts_brain.coordination.game import stirring
from tts_brain.coordination.outlook import tracked
from tts_brain.types import KNOBS, TrainingContext

# Beta(1, 5) prior: before anything was tried, one move in six is expected to hurt.
_PRIOR_BAD = 1.0
_PRIOR_GOOD = 5.0
# A move by half again counts whole, also where a knob may go further.
_WHOLE = 1.5
# Half of what was learned is forgotten after 70 decisions: phases differ in what they bear.
_MEMORY = 0.99
PHASE_BUDGET = (0.30, 0.25, 0.15, 0.10)
_LEAST_TRUST = 0.25
_SIZES = (1.0, 0.5)


@dataclass(frozen=True, slots=True)
class Risk:
    """Probability in [0, 1] that a move will have to be taken back, and the sentence that says why."""

    probability: float
    reason: str


@dataclass(frozen=True, slots=True)
class Weighed:
    """What is left of a joint move.

    Args:
        moves: by knob, its move (``Knob.move``).
        size: 1, ½ or 0: what the outlook left of it.
        budget: share of plays that the move might add, in [0, 1].
        outlook: of the move at the size that was let through, or at the smallest that was not; None where nothing was
            simulated.
        adds: what the whole move adds to the plays that go wrong, by ``added``; 0 where nothing was simulated.
        left_out: by knob, why the book left it out.
    """

    moves: Mapping[str, float]
    size: float
    budget: float
    outlook: Outlook | None
    left_out: Mapping[str, str]
    adds: float = 0.0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was cut, in words; nothing where all was let through."""
        lines = [f"too risky, left out: {reason}" for reason in self.left_out.values()]
        if self.outlook is not None and self.size < 1.0:
            what = "halved" if self.size > 0.0 else "held"
            lines.append(f"{what}: {self.adds:.0%} more plays go wrong by it, {self.budget:.0%} are allowed")
        return tuple(lines)


class RiskAssessor:
    """Beta-Bernoulli estimate per knob and direction of how often a move had to be taken back, and the outlook.

    A full-sized move (by half again) carries the full estimate, a smaller one its share; gradient spikes raise it. The
    record of the run is the only source: no constant is fitted to a corpus.

    Args:
        max_risk: a knob's move that the book gives more is left out, unless it calms.
        draws: plays per outlook, 20 or more.
        horizon: steps that are played: a bold move is judged and, if it hurt, undone within 2 x ``trial_steps``.
        seed: of the run; with the step it alone chooses the random numbers.
    """

    def __init__(self, max_risk: float = 0.4, draws: int = 256, horizon: int = 40, seed: int = 0) -> None:
        self._max_risk, self._draws, self._horizon, self._seed = max_risk, draws, horizon, seed
        self._kept: dict[str, float] = {}
        self._undone: dict[str, float] = {}
        self._trust = 1.0

    def budget(self, context: TrainingContext) -> float:
        """Share of plays that one move may add to those that go wrong."""
        return PHASE_BUDGET[context.phase.index] * self._trust

    def weigh(self, context: TrainingContext, moves: Mapping[str, float], course: Dynamics | None) -> Weighed:
        """Leave out, halve or hold what is too risky of a joint move.

        Args:
            context: where the run stands.
            moves: by knob, its move (``Knob.move``).
            course: what to simulate from; None leaves the outlook out.
        """
        parts = {knob: self._part(context, knob, move) for knob, move in moves.items()}
        # What calms is never held: it is the cure.
        stirs = stirring(moves)
        left_out = {knob: parts[knob].reason for knob in stirs if parts[knob].probability > self._max_risk}
        moves = {knob: move for knob, move in moves.items() if knob not in left_out}
        budget, adds, outlook = self.budget(context), [], None
        tried = {knob: move for knob, move in tracked(stirring(moves)).items() if move}
        if course is None or not tried:
            return Weighed(moves, 1.0, budget, None, left_out)
        for size in _SIZES:
            outlook = self._play(course, {knob: move * size for knob, move in tried.items()}, context.step)
            adds.append(added(outlook))
            if adds[-1] <= budget:
                return Weighed(_resized(moves, size), size, budget, outlook, left_out, adds[0])
        return Weighed(_resized(moves, 0.0), 0.0, budget, outlook, left_out, adds[0])

    def _play(self, course: Dynamics, moves: Mapping[str, float], step: int) -> Outlook:
        return simulate(course, moves, horizon=self._horizon, draws=self._draws, seed=self._seed, step=max(step, 0))

    def assess(self, context: TrainingContext, before: Mapping[str, float], after: Mapping[str, float]) -> Risk:
        """Risk of a joint move by the book: that of its riskiest part."""
        worst = Risk(0.0, "nothing moves")
        for name, new in after.items():
            part = self._part(context, name, KNOBS[name].move(before[name], new))
            if part.probability > worst.probability:
                worst = part
        return worst

    def _part(self, context: TrainingContext, name: str, move: float) -> Risk:
        if move == 0.0:
            return Risk(0.0, "nothing moves")
        key = _kind(name, move)
        undone, kept = self._undone.get(key, 0.0), self._kept.get(key, 0.0)
        base = (_PRIOR_BAD + undone) / (_PRIOR_BAD + _PRIOR_GOOD + undone + kept)
        size = min(abs(move) / math.log(min(KNOBS[name].max_ratio, _WHOLE)), 1.0)
        probability = min(1.0, base * size * (1.0 + 5.0 * context.grad_spikes * (move > 0.0)))
        way = "up" if move > 0.0 else "down"
        return Risk(probability, f"{name} {way}: about {undone:.0f} of {undone + kept:.0f} such moves hurt")

    def fade(self) -> None:
        """Forget a little; once per decision. A kind of move that is vetoed could else never show a change."""
        for book in (self._kept, self._undone):
            for kind in book:
                book[kind] *= _MEMORY
        # As slowly, the trust comes back: where nothing bold is let through, nothing can be kept.
        self._trust = min(self._trust / _MEMORY, 1.0)

    def learn(self, moves: Mapping[str, tuple[float, float]], *, kept: bool) -> None:
        """Take in how a move ended; moves under a tenth of ``max_ratio`` are not blamed nor credited."""
        self._trust = min(self._trust * 2.0, 1.0) if kept else max(self._trust / 2.0, _LEAST_TRUST)
        for name, (old, new) in moves.items():
            move = KNOBS[name].move(old, new)
            if abs(move) < 0.1 * math.log(KNOBS[name].max_ratio):
                continue
            book = self._kept if kept else self._undone
            key = _kind(name, move)
            book[key] = book.get(key, 0.0) + 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self._kept), "undone": dict(self._undone), "trust": self._trust}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        kept, undone, trust = _book(state["kept"]), _book(state["undone"]), float(state["trust"])
        if not _LEAST_TRUST <= trust <= 1.0:
            raise ValueError(f"trust in moves is {trust}; write {_LEAST_TRUST} to 1")
        self._kept, self._undone, self._trust = kept, undone, trust


def added(outlook: Outlook) -> float:
    """Share of plays that the move adds to those that diverge, or to those that lose their alignment."""
    diverge = outlook.divergence - outlook.divergence_held
    return max(diverge, outlook.alignment_loss - outlook.alignment_loss_held)


def _resized(moves: Mapping[str, float], size: float) -> dict[str, float]:
    """What stirs, at ``size``; what calms, whole."""
    stirs = stirring(moves)
    return {knob: move * size if knob in stirs else move for knob, move in moves.items()}


def _book(counts: Mapping[str, Any]) -> dict[str, float]:
    book = {kind: float(count) for kind, count in counts.items()}
    if not all(0.0 <= count < math.inf for count in book.values()):
        raise ValueError(f"counts of moves {book} are not all 0 or more")
    return book


def _kind(name: str, move: float) -> str:
    return f"{name}:{'up' if move > 0.0 else 'down'}"
