"""A mixed Nash equilibrium of two players with a choice, by trying which moves are in use.

Slower than following the quantal responses, and exact where that loses its way: in games whose payoffs differ by
orders of magnitude and have ties.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

# In shares of a player's range: rounding of the linear systems.
_EXACT = 1e-9


def by_supports(scaled: Vector) -> list[Vector] | None:
    """The first equilibrium whose players use equally many moves, fewest first, then in the order of the moves.

    Every nondegenerate game of two players has one (Dickhaut and Kaplan 1991); of a degenerate one it may be missed.

    Args:
        scaled: (N, m1, …, mN), each player's payoffs in [0, 1].

    Returns:
        For each player the probabilities of its moves; None where other than two players have a choice, or none is met.
    """
    moves = scaled.shape[1:]
    choosers = [player for player, m in enumerate(moves) if m > 1]
    if len(choosers) != 2:
        return None
    first, second = (scaled[player].reshape(moves[choosers[0]], moves[choosers[1]]) for player in choosers)
    found = _of_two(first, second.T)
    if found is None:
        return None
    mixed = [np.ones(1) for _ in moves]
    for player, strategy in zip(choosers, found, strict=True):
        mixed[player] = strategy
    return mixed


def _of_two(first: Vector, second: Vector) -> tuple[Vector, Vector] | None:
    """Payoffs of each player, own moves in the rows."""
    rows, columns = first.shape
    for size in range(1, min(rows, columns) + 1):
        for own in combinations(range(rows), size):
            for other in combinations(range(columns), size):
                theirs = _indifferent(first, own, other)
                ours = _indifferent(second, other, own)
                if theirs is not None and ours is not None:
                    return ours, theirs
    return None


def _indifferent(payoffs: Vector, own: tuple[int, ...], other: tuple[int, ...]) -> Vector | None:
    """The opponent's mix of ``other`` under which the player's ``own`` moves are worth the same, and no other more."""
    size = len(own)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size], system[:size, size], system[size, :size] = payoffs[np.ix_(own, other)], -1.0, 1.0
    try:
        *mix, worth = np.linalg.solve(system, np.eye(size + 1)[size])
    except np.linalg.LinAlgError:
        return None
    strategy = np.zeros(payoffs.shape[1])
    strategy[list(other)] = mix
    if not (strategy.min() >= -_EXACT and (payoffs @ strategy).max() <= worth + _EXACT):
        return None
    strategy = np.maximum(strategy, 0.0)
    clean: Vector = strategy / strategy.sum()
    return clean
