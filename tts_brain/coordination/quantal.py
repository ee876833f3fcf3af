"""A mixed Nash equilibrium, by following the quantal responses of all players from no reason to perfect reason.

    p_i = softmax(λ · u_i(p_others))     λ = 0: all moves alike      λ → ∞: a Nash equilibrium

From λ = 0 one path leads on, and in almost every game it ends in one equilibrium (McKelvey and Palfrey 1995), so which
of several is met does not hang on the order of players or moves. It is followed by Euler steps and Newton corrections
along its arc (Turocy 2005; Allgower and Georg 1990), as λ may have to turn back. On the way the moves in use are
guessed and the equilibrium on them is solved for; the first that proves right ends the walk.

If none does, the walk's end will do: the regret of a response at λ is at most ln(moves) / λ.

Support enumeration lost: it has 29,791 sets of moves to try in a game of 3 x 5, and no rule which solution to take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]

# Regret, in shares of the range, that ends the walk, and that makes a second one needless.
EXACT, GOOD = 1e-9, 1e-6
# ln 7 / 4e6 is half of GOOD.
_LARGEST_REASON = 4e6
_FIRST_GUESS, _NEXT_GUESS = 4.0, 2.0
_MOST_STEPS = 400
_MOST_TURNS = 6
# Farthest that a correction may go, in logarithms of probabilities, on the first walk and on a second, careful one:
# more means that the step was too long. What is under a share of _NEAR of it is left to the next step.
_FAR = (1.0, 0.1)
_NEAR = 1e-2
# Moves above this share of the likeliest one's probability are taken for those in use.
_IN_USE = (0.03, 0.003)


class Multilinear:
    """The payoffs of a game, laid out so that mixing over the other players is one product for all pairs of players.

    Args:
        payoffs: (N, m1, …, mN), finite, N >= 2; best if each player's lie in [0, 1].
    """

    def __init__(self, payoffs: Vector) -> None:
        self.moves = payoffs.shape[1:]
        players = range(len(self.moves))
        self.starts = np.concatenate(([0], np.cumsum(self.moves)[:-1]))
        self.owner = np.repeat(players, self.moves)
        self.same_owner = self.owner[:, None] == self.owner
        n = len(self.owner)
        pairs = [(i, k) for i in players for k in players if i != k]
        others = [[j for j in players if j not in pair] for pair in pairs]
        joint = [[range(self.starts[j], self.starts[j] + self.moves[j]) for j in rest] for rest in others]
        combinations = [np.array(list(product(*ranges)), dtype=np.intp) for ranges in joint]
        cells = [self.moves[i] * self.moves[k] for i, k in pairs]
        # Pairs of fewer moves are filled up; what fills them reads the probability 0 at n, and writes to row n.
        shape = len(pairs), max(cells), max(len(c) for c in combinations)
        self._blocks = np.zeros(shape)
        self._reads = np.full((shape[0], shape[2], len(players) - 2), n)
        self._writes = np.full(shape[:2], (n + 1) ** 2 - 1)
        for at, (i, k) in enumerate(pairs):
            block = np.moveaxis(payoffs[i], (i, k), (0, 1)).reshape(cells[at], -1)
            self._blocks[at, : cells[at], : block.shape[1]] = block
            self._reads[at, : block.shape[1]] = combinations[at]
            rows, columns = (self.starts[j] + np.arange(self.moves[j]) for j in (i, k))
            self._writes[at, : cells[at]] = (rows[:, None] * (n + 1) + columns).ravel()

    def fields(self, mixed: Vector) -> tuple[Vector, Vector]:
        """Expected payoff of each move, (n,), and its derivative by each probability, (n, n); n moves in all."""
        n = len(mixed)
        weights = np.append(mixed, 0.0)[self._reads].prod(axis=2)
        slope = np.zeros((n + 1, n + 1))
        slope.ravel()[self._writes] = (self._blocks @ weights[:, :, None])[:, :, 0]
        slope = slope[:n, :n]
        # Each of the N − 1 other players' columns adds up to the whole payoff.
        return slope @ mixed / (len(self.moves) - 1), slope

    def regret(self, mixed: Vector) -> float:
        """Most that any player gains by leaving ``mixed`` alone."""
        payoff, _ = self.fields(mixed)
        best = np.maximum.reduceat(payoff, self.starts)
        return float((best - self.sums(mixed * payoff)).max())

    def sums(self, values: Vector) -> Vector:
        """Sum over each player's moves, (N,)."""
        return np.add.reduceat(values, self.starts)

    def shares(self, levels: Vector) -> Vector:
        """Softmax of ``levels``, player by player."""
        top = np.maximum.reduceat(levels, self.starts)
        weights = np.exp(levels - top[self.owner])
        shares: Vector = weights / self.sums(weights)[self.owner]
        return shares


def mixed_equilibrium(payoffs: Vector) -> list[Vector]:
    """One mixed equilibrium: for each player the probabilities of its moves, (m_i,).

    Args:
        payoffs: (N, m1, …, mN), finite, N >= 2; each player's in [0, 1].

    Something always comes back; what a player would gain by leaving it is for the caller to look at.
    """
    game = Multilinear(payoffs)
    best, least = game.shares(np.zeros(len(game.owner))), np.inf
    for far in _FAR:
        for mixed in _walk(game, far):
            regret = game.regret(mixed)
            if regret < least:
                best, least = mixed, regret
            if least <= EXACT:
                break
        if least <= GOOD:
            break
    return np.split(best, game.starts[1:])


def _walk(game: Multilinear, far: float) -> Iterator[Vector]:
    """Candidates met on the path, the response at the walk's last step included."""
    point = np.zeros(len(game.owner) + 1)
    system, _ = _linearised(game, point, point)
    tangent = np.append(-system[:-1, -1], 1.0)
    tangent /= np.linalg.norm(tangent)
    length, guess_at = 1.0, _FIRST_GUESS
    for _ in range(_MOST_STEPS):
        step = _step(game, point, tangent, length, far)
        if step is None:
            length /= 2.0
            continue
        point, tangent, stretch = step
        length *= stretch
        reason = point[-1]
        if reason < 0.0:  # the path never comes back to its start: this is another
            return
        if reason >= guess_at or reason > _LARGEST_REASON:
            guess_at = _NEXT_GUESS * reason
            mixed = game.shares(point[:-1])
            likeliest = np.maximum.reduceat(mixed, game.starts)[game.owner]
            yield from (_solved(game, mixed, mixed > share * likeliest) for share in _IN_USE)
            yield mixed
        if reason > _LARGEST_REASON:
            return


def _step(
    game: Multilinear, point: Vector, tangent: Vector, length: float, far: float
) -> tuple[Vector, Vector, float] | None:
    """One step along the arc: point, tangent there, and what to multiply the next length by; None if too long."""
    new = point + length * tangent
    right, first = np.zeros(len(new)), 0.0
    for turn in range(_MOST_TURNS):
        system, missed = _linearised(game, new, tangent)
        right[:-1] = -missed
        change = _solve(system, right)
        new = new + change
        moved = float(np.abs(change[:-1]).max())
        first = first or moved
        if not moved <= far / 4.0**turn:
            return None
        if moved <= _NEAR * far:
            break
    right[:-1], right[-1] = 0.0, 1.0
    ahead = _solve(system, right)
    ahead /= np.linalg.norm(ahead)
    system[-1] = ahead
    # The determinant keeps its sign along a path. It is what notices a sharp turn that was stepped over; from there
    # the tangent that looks like the last one leads back to the start.
    if ahead @ tangent < 0.5 or np.linalg.slogdet(system)[0] < 0.0:
        return None
    return new, ahead, min(2.0, max(0.5, math.sqrt(0.3 * far / max(first, 1e-12))))


def _linearised(game: Multilinear, point: Vector, tangent: Vector) -> tuple[Vector, Vector]:
    """Jacobian of (levels − λ·payoffs, advance along the tangent), and by how much levels miss λ·payoffs."""
    levels, reason = point[:-1], point[-1]
    mixed = game.shares(levels)
    payoff, slope = game.fields(mixed)
    n = len(levels)
    spread = np.diag(mixed) - game.same_owner * np.outer(mixed, mixed)
    system = np.empty((n + 1, n + 1))
    system[:n, :n] = np.eye(n) - reason * (slope @ spread)
    system[:n, n] = -payoff
    system[n] = tangent
    return system, levels - reason * payoff


def _solved(game: Multilinear, mixed: Vector, used: Flags) -> Vector:
    """Newton's method for "all moves in use pay the same", from ``mixed``."""
    at, players = np.flatnonzero(used), len(game.moves)
    owners = (game.owner[at][:, None] == np.arange(players)).astype(np.float64)
    system = np.zeros((len(at) + players, len(at) + players))
    system[: len(at), len(at) :], system[len(at) :, : len(at)] = -owners, owners.T
    now = np.where(used, mixed, 0.0)
    now /= game.sums(now)[game.owner]
    for _ in range(_MOST_TURNS):
        payoff, slope = game.fields(now)
        value = game.sums(now * payoff)
        system[: len(at), : len(at)] = slope[np.ix_(at, at)]
        gap = np.concatenate(((value[game.owner] - payoff)[at], 1.0 - game.sums(now)))
        change = _solve(system, gap)[: len(at)]
        now[at] += change
        far = np.abs(change).max()
        if not 1e-13 < far < 2.0:
            break
    now = np.maximum(now, 0.0)
    sums = game.sums(now)
    # Newton's method may end far outside, with nothing left of a player: no mixture, whose regret would look like 0.
    if not (np.isfinite(sums) & (sums > 0.5)).all():
        return mixed
    solved: Vector = now / sums[game.owner]
    return solved


def _solve(system: Vector, right: Vector) -> Vector:
    """Exact, or by least squares where many solutions are: two moves may be the same."""
    try:
        return np.asarray(np.linalg.solve(system, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        return np.asarray(np.linalg.lstsq(system, right, rcond=1e-12)[0], dtype=np.float64)
