"""Nash equilibrium of a game of a few players with a few moves each: the joint move that none would leave alone.

Pure where best responses meet, else mixed (``quantal``; where that is not exact enough, ``supports``). Of several pure
ones, in this order:

1. The risk-dominant one: the largest product, over the players, of what each would lose by leaving alone for its next
   best move. With two players of two moves that is risk dominance as Harsanyi and Selten define it (1988, A General
   Theory of Equilibrium Selection in Games), and in a unanimity game of any number of players it is the Nash product
   that they choose by; beyond these it is our generalisation. Their pairwise relation lost: it can go round in circles.
   To lose nothing counts as an infinitely small loss: equilibria with fewer such players come first, and an agent that
   does not care leaves the choice to the others.
2. The one that moves least.
3. The first, in the order of the array.

Payoffs are compared in shares of each player's own range: a positive factor or a constant on the payoffs of one player
changes nothing.

How exact: a pure one is exact, and a mixed one has a regret under 1e-6 where a player's payoffs are of like size. Where
they differ by orders of magnitude (±exp(4 N(0, 1)), three players) a sixth of the mixed ones of 3 moves each, and half
of those of 5, have more; the largest in 1,500 such games was 9e-5. Newton's method from there, in three forms, mends
few of them; walks of four times as many steps mend half, for 0.1 s more.

How long, for 3 players of 5 moves: under 0.5 ms with a pure equilibrium, which all of 6,000 random decisions had. A
decision can be without one, where effects are large, sure and opposed. A mixed one takes 4 ms with normal payoffs, 14
at the worst, and up to 0.12 s where payoffs differ as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tts_brain.coordination.quantal import GOOD, mixed_equilibrium
from tts_brain.coordination.supports import by_supports

Vector = NDArray[np.float64]

# In shares of a player's range: smaller differences are rounding, and count as ties.
TIE = 1e-9
# A range smaller than this share of the payoffs themselves is rounding too: the player does not care.
_NO_RANGE = 1e-13
_SAME_PROBABILITY = 1e-6


@dataclass(frozen=True, slots=True)
class Equilibrium:
    """What the players would settle on.

    Args:
        strategies: for each player the probabilities of its moves; they sum to 1.
        play: the joint move to make, one index per player. Of a mixed equilibrium each player's most probable move,
            ties to the one that moves least, then to the first. Drawing one would be truer to the game, and would make
            the decision depend on the draw; who wants that draws from ``strategies``.
        kind: ``pure`` or ``mixed``.
        regret: most that a player would gain by leaving ``strategies`` alone, in shares of its payoffs' range.
        pure_count: how many pure equilibria there are.
    """

    strategies: tuple[tuple[float, ...], ...]
    play: tuple[int, ...]
    kind: Literal["pure", "mixed"]
    regret: float
    pure_count: int


def equilibrium(payoffs: ArrayLike, sizes: Sequence[Sequence[float]]) -> Equilibrium:
    """The equilibrium of one game.

    Args:
        payoffs: (N, m1, …, mN): entry [i, a1, …, aN] is what player i gains by the joint move (a1, …, aN).
        sizes: for each player how far each of its moves moves, 0 or more; of one unit for all players.

    Raises:
        ValueError: a shape that is no game, or a payoff or size that is not a finite number; it is named.
    """
    game = _game(payoffs)
    moves = game.shape[1:]
    size = _sizes(sizes, moves)
    scaled = _in_shares(game)
    best, second = _two_best(scaled)
    regret = np.maximum(best - scaled, 0.0).max(axis=0)
    pure = np.argwhere(regret <= TIE)
    if len(pure):
        # (N, count): what each player loses by leaving each of them.
        losses = np.array([(b - s)[tuple(pure.T)] for b, s in zip(best, second, strict=True)])
        chosen = tuple(int(move) for move in pure[_preferred(losses, _movement(pure, size))])
        strategies = tuple(tuple(float(k == a) for k in range(m)) for a, m in zip(chosen, moves, strict=True))
        return Equilibrium(strategies, chosen, "pure", float(regret[chosen]), len(pure))
    mixed = mixed_equilibrium(scaled)
    left = regret_of(game, mixed)
    exact = by_supports(scaled) if left > GOOD else None
    if exact is not None:
        mixed, left = exact, regret_of(game, exact)
    play = tuple(_most_probable(p, s) for p, s in zip(mixed, size, strict=True))
    return Equilibrium(tuple(tuple(p.tolist()) for p in mixed), play, "mixed", left, 0)


def regret_of(payoffs: ArrayLike, strategies: Sequence[ArrayLike]) -> float:
    """Most that any player gains by leaving ``strategies`` alone, in shares of its payoffs' range; 0 in equilibrium.

    Straight from the definition, so that what found the strategies does not check itself.

    Args:
        payoffs: (N, m1, …, mN), as in ``equilibrium``.
        strategies: for each player the probabilities of its moves, (m_i,).

    Raises:
        ValueError: as in ``equilibrium``.
    """
    scaled = _in_shares(_game(payoffs))
    worst = 0.0
    for player, payoff in enumerate(scaled):
        # Own axis last, the others contracted one by one from the front.
        rest = np.moveaxis(payoff, player, -1)
        for other, mixed in enumerate(strategies):
            if other != player:
                rest = np.tensordot(np.asarray(mixed, dtype=np.float64), rest, axes=1)
        worst = max(worst, float(rest.max() - rest @ np.asarray(strategies[player], dtype=np.float64)))
    return worst


def _game(payoffs: ArrayLike) -> Vector:
    game = np.asarray(payoffs, dtype=np.float64)
    if game.ndim < 2 or game.shape[0] != game.ndim - 1 or not game.size:
        raise ValueError(f"payoffs have shape {game.shape}; write (N, m1, …, mN), with N players of 1 move or more")
    wrong = np.argwhere(~np.isfinite(game))
    if len(wrong):
        player, *move = (int(k) for k in wrong[0])
        value = game[tuple(wrong[0])]
        raise ValueError(f"payoff of player {player} for the joint move {tuple(move)} is {value}; write a finite one")
    return game


def _sizes(sizes: Sequence[Sequence[float]], moves: tuple[int, ...]) -> list[Vector]:
    found = [np.asarray(size, dtype=np.float64) for size in sizes]
    if [size.shape for size in found] != [(m,) for m in moves]:
        raise ValueError(f"sizes have shapes {[s.shape for s in found]}; write one size per move: {list(moves)}")
    for player, size in enumerate(found):
        if not (np.isfinite(size) & (size >= 0.0)).all():
            raise ValueError(f"sizes of player {player} are {size.tolist()}; write finite numbers, 0 or more")
    return found


def _in_shares(game: Vector) -> Vector:
    """Each player's payoffs in [0, 1]: 0 for its worst joint move and 1 for its best; 0 if all are alike."""
    each = game.reshape(len(game), -1)
    largest = np.abs(each).max(axis=1, keepdims=True)
    # Scaled first: the difference of two of 1e308 would overflow.
    each = each / np.where(largest > 0.0, largest, 1.0)
    low = each.min(axis=1, keepdims=True)
    reach = each.max(axis=1, keepdims=True) - low
    cares = reach > _NO_RANGE
    return (np.where(cares, each - low, 0.0) / np.where(cares, reach, 1.0)).reshape(game.shape)


def _two_best(scaled: Vector) -> tuple[Vector, Vector]:
    """For each player and joint move the best that its own moves give there, and the second best.

    A player with a single move cannot leave; its second best is set one whole range lower: a factor of 1.
    """
    best, second = np.empty_like(scaled), np.empty_like(scaled)
    for player, payoff in enumerate(scaled):
        ordered = np.sort(payoff, axis=player)
        best[player] = np.take(ordered, [-1], axis=player)
        second[player] = np.take(ordered, [-2], axis=player) if payoff.shape[player] > 1 else best[player] - 1.0
    return best, second


def _movement(joint: NDArray[np.intp], sizes: list[Vector]) -> Vector:
    """How far each of the (count, N) joint moves moves, the players' sizes added up."""
    return sum([size[joint[:, player]] for player, size in enumerate(sizes)], np.zeros(len(joint)))


def _preferred(losses: Vector, movement: Vector) -> int:
    """Which of the pure equilibria: ``losses`` (N, count) and ``movement`` (count,) as the module says."""
    nothing = losses <= TIE
    careless = nothing.sum(axis=0)
    product = np.log(np.where(nothing, 1.0, losses)).sum(axis=0)
    left = careless == careless.min()
    left &= product >= product[left].max() - TIE
    least = movement[left].min()
    left &= movement <= least + TIE * abs(least)
    return int(np.flatnonzero(left)[0])


def _most_probable(mixed: Vector, size: Vector) -> int:
    likely = np.flatnonzero(mixed >= mixed.max() - _SAME_PROBABILITY)
    return int(likely[np.argmin(size[likely])])
