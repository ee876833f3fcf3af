"""The agents settle on one joint move: criteria ─▶ wishes ─▶ equilibrium ─▶ risk ─▶ vote.

    criteria       three scores of the run                                          criteria.py
    wishes         each agent's proposal, within limits; shares of it are its moves  game.py
    equilibrium    the shares that none would leave alone                            equilibrium.py
    risk           the book leaves out, the simulation halves or holds               risk.py
    vote           agents and assessors; no quorum holds everything                  vote.py, assessors.py

No clock and no random state: the same state, context and proposals give the same joint move in any process.

What one arbitrary agent can do, all others and the assessors being as they should. Nobody else has a move of its own
for an agent's knobs; the assessors say none, half or all of what it plays, and it says all. So the vote bounds how far
a knob goes and never turns it round:

    it can      move its own knobs by the mean of what the two most willing assessors would (of two, where the forecast
                abstains: by what the more willing one would), within a decision's limits, and do so at every decision
                lower the rate or the clip whole, if they are its own: what calms is never held
                hold what the others stir, by a proposal so wild that risk or two assessors refuse the joint move
    it cannot   move another's knob farther than its agent wishes, or the other way
                stir at all where two assessors say no
                be listened to for long with what is no value of a knob
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tts_brain.agents import GuidedAttentionAgent, LearningRateAgent, LossBalanceAgent
from tts_brain.coordination.assessors import ASSESSORS, Assessor, wanted
from tts_brain.coordination.criteria import criteria
from tts_brain.coordination.equilibrium import Equilibrium, equilibrium
from tts_brain.coordination.game import Game, Wishes, at_play, game, movement, stirring
from tts_brain.coordination.record import record_of
from tts_brain.coordination.risk import Weighed
from tts_brain.coordination.vote import Ballot, Electorate, Outcome
from tts_brain.types import Proposal, TrainingContext

AGENTS = (LearningRateAgent.name, GuidedAttentionAgent.name, LossBalanceAgent.name)

# An agent says no to a joint move that costs it more than this against holding, in the payoffs' unit: its wish for one
# whole move. A small loss by the others' drift is what working together costs.
_BEARABLE = 0.1


@dataclass(frozen=True, slots=True)
class Coordination:
    """What the agents settled on.

    Args:
        moves: by knob, its move (``Knob.move``); empty where the vote failed.
        cuts: what was taken from the wishes and why, in words; nothing where all of them are made.
        record: everything that was wished, played, simulated and voted, as plain values for the journal.
    """

    moves: Mapping[str, float]
    cuts: tuple[str, ...]
    record: Mapping[str, Any]


class MultiAgentOptimizer:
    """Brings the agents' proposals to one joint move. Its memory is who voted out of range.

    Args:
        n_agents: how many agents play.
        consensus_threshold: share of the votes that must be yes, in (0.5, 1].
        learning_rate: of the learned agents, in (0, 1]. The present ones are laws and learn nothing from it; it is
            checked and kept for them.
        experience_buffer: moves that learned agents remember, 1 or more; checked and kept likewise.
        agents: their names, in the order in which they play.
        assessors: the voters that are no agents, by name. Where fewer than two of them have a
            say, the agents vote on each other's knobs too.

    Raises:
        ValueError: a value out of its range, or another number of names than ``n_agents``.
    """

    def __init__(
        self,
        n_agents: int = 3,
        consensus_threshold: float = 0.67,
        learning_rate: float = 1e-4,
        experience_buffer: int = 1000000,
        *,
        agents: Sequence[str] = AGENTS,
        assessors: Mapping[str, Assessor] = ASSESSORS,
    ) -> None:
        if n_agents != len(agents):
            raise ValueError(f"n_agents={n_agents}, agents={tuple(agents)}; write one name for each agent")
        if not 0.0 < learning_rate <= 1.0:
            raise ValueError(f"learning_rate={learning_rate} is out of range; write a number above 0, up to 1")
        if isinstance(experience_buffer, bool) or not isinstance(experience_buffer, int) or experience_buffer < 1:
            raise ValueError(f"experience_buffer={experience_buffer!r}; write a whole number, 1 or more")
        self.agents, self.assessors = tuple(agents), dict(assessors)
        self.learning_rate, self.experience_buffer = learning_rate, experience_buffer
        self.electorate = Electorate((*self.agents, *self.assessors), consensus_threshold)

    def coordinate(
        self,
        context: TrainingContext,
        proposals: Sequence[Proposal],
        knobs: Mapping[str, float],
        wishes: Wishes,
        weigh: Callable[[Mapping[str, float]], Weighed],
    ) -> Coordination:
        """Settle on one joint move.

        Args:
            context: what the agents saw.
            proposals: of all agents.
            knobs: present values.
            wishes: by agent and knob, the move (``Knob.move``) of the proposals, within all limits; knobs that it may
                not move now are left out.
            weigh: leaves out, halves or holds what is too risky of a joint move (``RiskAssessor.weigh``).
        """
        muted = self.electorate.muted
        # Who is not listened to moves nothing either.
        heard = {agent: {} if agent in muted else dict(wishes.get(agent, {})) for agent in self.agents}
        scores = criteria(context)
        one = game(context, scores, heard)
        payoffs = one.payoffs
        settled = equilibrium(payoffs, one.sizes)
        weighed = weigh(_joint(one, settled, heard))
        cuts = _cuts(one, settled, weighed)
        complaints = [_complaint(float(payoff[settled.play]), float(payoff[(0,) * payoff.ndim])) for payoff in payoffs]
        say = [_own(heard[agent]) | _absurd(proposals, agent, knobs) for agent in self.agents]
        ballots, outcome = self._vote(context, weighed, complaints, say)
        refused: Sequence[Ballot] = ()
        calms = {knob: move for knob, move in weighed.moves.items() if knob not in stirring(weighed.moves)}
        if not outcome.approved and any(calms.values()):
            # What calms must not wait because others wanted to drift: it is put to the vote by itself.
            cuts += _no_quorum(outcome)
            weighed, refused = replace(weighed, moves=calms), ballots
            ballots, outcome = self._vote(context, weighed, complaints, say)
        if not outcome.approved and any(weighed.moves.values()):
            cuts += _no_quorum(outcome)
        made = {knob: move for knob, move in outcome.moves.items() if outcome.approved and move}
        gains = at_play(one, settled.play)
        return Coordination(
            made,
            (*cuts, *outcome.notes),
            record_of(scores, one, settled, gains, weighed, ballots, outcome, refused),
        )

    def _vote(
        self, context: TrainingContext, weighed: Weighed, complaints: Sequence[str], say: Sequence[dict[str, float]]
    ) -> tuple[list[Ballot], Outcome]:
        """The agents say of their own knobs what they play (``say`` has what is no move, and 0 for a move), and no
        where they have a complaint; the assessors say of all knobs what they would make of the move."""
        moves = weighed.moves
        opinions = {name: assess(context, moves, weighed) for name, assess in self.assessors.items()}
        # An agent and fewer than 2f assessors could settle nothing; then each agent says of all knobs what is played.
        if sum(opinion.approve is not None for opinion in opinions.values()) < 2 * self.electorate.faulty:
            say = [_own(moves) | own for own in say]
        ballots = [
            Ballot(agent, context.step, not why, {k: moves.get(k, 0.0) + extra for k, extra in own.items()}, why)
            for agent, why, own in zip(self.agents, complaints, say, strict=True)
        ]
        for name, opinion in opinions.items():
            of_all = {} if opinion.approve is None else wanted(moves, opinion)
            ballots.append(Ballot(name, context.step, opinion.approve, of_all, opinion.reason))
        return ballots, self.electorate.count(context.step, ballots)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"vote": self.electorate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, all or nothing.

        Raises:
            ValueError, KeyError, TypeError: no such state.
        """
        self.electorate.load_state_dict(state["vote"])


def averaged(wishes: Wishes) -> dict[str, float]:
    """The plain rival of all this: each agent's move, shrunk to the average size of all agents' where it is larger."""
    sizes = {agent: movement(moves) for agent, moves in wishes.items()}
    mean = math.fsum(sizes.values()) / max(len(sizes), 1)
    shares = {agent: min(1.0, mean / size) if size > 0.0 else 1.0 for agent, size in sizes.items()}
    return {knob: move * shares[agent] for agent, moves in wishes.items() for knob, move in moves.items()}


def _joint(one: Game, settled: Equilibrium, wishes: Wishes) -> dict[str, float]:
    shares = (each[at] for each, at in zip(one.shares, settled.play, strict=True))
    pairs = zip(shares, wishes.values(), strict=True)
    return {knob: share * move for share, moves in pairs for knob, move in moves.items()}


def _own(wish: Mapping[str, float]) -> dict[str, float]:
    return dict.fromkeys(wish, 0.0)


def _absurd(proposals: Sequence[Proposal], agent: str, knobs: Mapping[str, float]) -> dict[str, float]:
    """NaN for each value of the agent's proposal that is no value of a knob: the vote refuses it and keeps count."""
    values = {knob: value for p in proposals if p.agent == agent for knob, value in p.moves.items() if knob in knobs}
    return {knob: math.nan for knob, value in values.items() if not 0.0 < value < math.inf}


def _complaint(made: float, held: float) -> str:
    """Why an agent says no to a joint move that is worth ``made`` to it; nothing where it bears it."""
    return "" if made >= held - _BEARABLE else f"the joint move is worth {held - made:.2f} less to it than holding"


def _cuts(one: Game, settled: Equilibrium, weighed: Weighed) -> tuple[str, ...]:
    played = zip(one.agents, one.shares, settled.play, strict=True)
    parts = [f"{agent} {each[at]:.0%}" for agent, each, at in played if at < len(each) - 1]
    lines = [f"the agents settle on part of their wishes ({', '.join(parts)})"] if parts else []
    return (*lines, *weighed.notes)


def _no_quorum(outcome: Outcome) -> tuple[str, ...]:
    votes = outcome.yes + outcome.no
    return (f"no quorum: {outcome.yes} of {votes} say yes, {outcome.needed} are needed",)
