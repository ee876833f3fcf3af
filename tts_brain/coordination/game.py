"""The game that the agents play: which share of its own wish each of them makes, and what a joint move is worth to it.

Candidates of an agent: 0 (hold), ¼, ½, ¾ or all of the moves (``Knob.move``) that it proposes, for all its knobs alike.
The laws that made the proposal stay the agent's wish; what is settled here is how much of it a joint move can bear. A
proposal that only calms is made whole: an effect learned while the loss rose for another reason must not talk an agent
out of lowering the rate.
What agent i gains by the joint move of shares s:

    u_i(s) = wish_i s_i + Σ_c w_ic need_c E_c(s) + relief calm(s)
             - price stir_i s_i (Σ_(j≠i) stir_j s_j + (1 - need_i) stir_i s_i)

    wish_i    size of its proposal: Σ |move| / log max_ratio of its knobs
    stir_i    that size without what calms: the rate or the clip lowered
    calm(s)   Σ_j s_j (wish_j - stir_j)
    E_c(s)    tanh(Σ_j s_j e_cj): e_cj is what the learned effects expect of j's whole proposal within 20 steps. Means
              are shrunk by mean² / (mean² + std²), so that what is not known counts nothing
    need_c    1 minus the criterion's score; w_ic is 1 for the agent's own criterion, ½ for another's; need_i is the
              attention's for the agent that guides it, 0 for the others
    relief    2 (1 - gradient health)
    price     4 (1 - gradient health) + (1 - certainty of the phase)

The last term is the interaction: what gradients bear at once is a common good, its cost grows with the square of the
joint movement, and each pays by its part of it (the game of Cournot 1838). The guide pays less for its own square, the
worse the attention is: spiking gradients would else hold back what the run waits for. With calm gradients and a sure
phase the price is 0, and all make their whole proposal: a healthy run is steered as its agents wish. Lowering the rate
costs nothing, as it is the cure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tts_brain.agents import GuidedAttentionAgent
from tts_brain.coordination.criteria import ATTENTION_QUALITY, CONVERGENCE, GRADIENT_HEALTH, Criteria
from tts_brain.types import GRAD_CLIP, KNOBS, LEARNING_RATE, TrainingContext

Vector = NDArray[np.float64]
Wishes = Mapping[str, Mapping[str, float]]

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_CALM_WHEN_LOWERED = (LEARNING_RATE, GRAD_CLIP)
_RELIEF, _PRICE_OF_SPIKES, _PRICE_OF_DOUBT = 2.0, 4.0, 1.0
_OF_ANOTHER = 0.5
# Within a trial: what counts as a large effect on the loss, in noise widths, and on attention, as a logit.
_TRIAL, _LARGE_ON_LOSS, _LARGE_ON_ATTENTION = 20.0, 4.0, 1.0
_OWN_CRITERION = {GuidedAttentionAgent.name: ATTENTION_QUALITY}


@dataclass(frozen=True, slots=True)
class Game:
    """One decision's game of N agents.

    Args:
        agents: their names, in the order of the axes.
        shares: candidates of each; an agent that wishes nothing has hold alone, one whose wish only calms the whole.
        terms: payoffs by what they come from: ``wish``, ``convergence``, ``attention_quality``, ``relief`` and
            ``strain``; each (N, m1, …, mN).
        sizes: how far each candidate moves, in whole moves.
    """

    agents: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    terms: Mapping[str, Vector]
    sizes: tuple[tuple[float, ...], ...]

    @property
    def payoffs(self) -> Vector:
        """(N, m1, …, mN)."""
        total: Vector = sum(self.terms.values(), np.zeros(1))
        return total


def game(context: TrainingContext, scores: Criteria, wishes: Wishes) -> Game:
    """The game of one decision.

    Args:
        context: its certainty and learned effects are read.
        scores: of the same context.
        wishes: by agent and knob, the move (``Knob.move``) of the proposal, within the knobs' limits.
    """
    shares = tuple(_candidates(moves) for moves in wishes.values())
    grid = np.stack(np.meshgrid(*map(np.asarray, shares), indexing="ij"))  # (N, m1, …, mN)
    wish = np.array([movement(moves) for moves in wishes.values()])
    stir = np.array([movement(stirring(moves)) for moves in wishes.values()])
    unhealthy = scores.need(GRADIENT_HEALTH)
    price = _PRICE_OF_SPIKES * unhealthy + _PRICE_OF_DOUBT * (1.0 - context.certainty)
    part = _per_agent(stir, grid) * grid
    terms = {"wish": _per_agent(wish, grid) * grid}
    for name, expected in (
        (CONVERGENCE, [_on_loss(context, moves) for moves in wishes.values()]),
        (ATTENTION_QUALITY, [_on_attention(context, moves) for moves in wishes.values()]),
    ):
        weights = [1.0 if _OWN_CRITERION.get(agent, CONVERGENCE) == name else _OF_ANOTHER for agent in wishes]
        gain = scores.need(name) * np.tanh(np.tensordot(np.array(expected), grid, axes=1))
        terms[name] = _per_agent(np.array(weights), grid) * gain
    terms["relief"] = np.broadcast_to(_RELIEF * unhealthy * np.tensordot(wish - stir, grid, axes=1), grid.shape)
    own = np.array([1.0 - scores.need(_OWN_CRITERION[agent]) if agent in _OWN_CRITERION else 1.0 for agent in wishes])
    terms["strain"] = -price * part * (part.sum(axis=0) - part + _per_agent(own, grid) * part)
    sizes = tuple(tuple(s * size for s in each) for each, size in zip(shares, wish.tolist(), strict=True))
    return Game(tuple(wishes), shares, terms, sizes)


def _candidates(wish: Mapping[str, float]) -> tuple[float, ...]:
    if any(stirring(wish).values()):
        return SHARES
    return (1.0,) if any(wish.values()) else (0.0,)


def movement(moves: Mapping[str, float]) -> float:
    """Size of a move in whole moves: Σ |move| / log max_ratio."""
    return math.fsum(abs(move) / math.log(KNOBS[knob].max_ratio) for knob, move in moves.items())


def stirring(moves: Mapping[str, float]) -> dict[str, float]:
    """The part of a move that puts strain on the gradients: all but a rate or a clip that is lowered."""
    return {knob: move for knob, move in moves.items() if move > 0.0 or knob not in _CALM_WHEN_LOWERED}


def calming(moves: Mapping[str, float]) -> bool:
    """Does the move calm at least as much as it stirs?"""
    return 2.0 * movement(stirring(moves)) <= movement(moves)


def _per_agent(values: Vector, grid: Vector) -> Vector:
    return values.reshape(-1, *[1] * (grid.ndim - 1))


def _on_loss(context: TrainingContext, moves: Mapping[str, float]) -> float:
    """Expected fall of the loss within a trial, in large effects."""
    loss = context.filtered.get("loss")
    if loss is None or not loss.noise > 0.0:
        return 0.0
    return _bounded(-_learned(context, "loss", moves) * _TRIAL / loss.noise / _LARGE_ON_LOSS)


def _on_attention(context: TrainingContext, moves: Mapping[str, float]) -> float:
    """Expected rise of the logit of ``attention_diag`` within a trial, in large effects."""
    return _bounded(_learned(context, "attention_diag", moves) * _TRIAL / _LARGE_ON_ATTENTION)


def _learned(context: TrainingContext, metric: str, moves: Mapping[str, float]) -> float:
    known = context.effects.get(metric, {})
    return math.fsum(move * _shrunk(*known[knob]) for knob, move in moves.items() if knob in known)


def _shrunk(mean: float, std: float) -> float:
    """James and Stein (1961) with one value: nothing of an effect that is all doubt, all of one that is sure."""
    return 0.0 if mean == 0.0 else mean / (1.0 + (std / mean) ** 2) if abs(std) < 1e9 * abs(mean) else 0.0


def _bounded(value: float) -> float:
    return min(max(value, -20.0), 20.0) if not math.isnan(value) else 0.0


def at_play(one: Game, play: Sequence[int]) -> dict[str, dict[str, float]]:
    """By agent, what the joint move ``play`` is worth to it, term by term."""
    return {
        agent: {name: float(term[(i, *play)]) for name, term in one.terms.items()} for i, agent in enumerate(one.agents)
    }
