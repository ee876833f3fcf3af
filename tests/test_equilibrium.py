import itertools
import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linprog
from simulated_run import context
from test_criteria import filtered

from tts_brain.agents import GuidedAttentionAgent, LearningRateAgent, LossBalanceAgent
from tts_brain.coordination.criteria import criteria
from tts_brain.coordination.equilibrium import Equilibrium, _in_shares, equilibrium, regret_of
from tts_brain.coordination.game import Game
from tts_brain.coordination.game import game as game_of
from tts_brain.coordination.quantal import Multilinear, _walk
from tts_brain.types import KNOBS

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
any_game = shapes.flatmap(
    lambda s: st.one_of(
        # Rounded: a difference under a billionth of the range is a tie.
        arrays(np.float64, (len(s), *s), elements=st.floats(-1e3, 1e3).map(lambda x: round(x, 3))),
        arrays(np.float64, (len(s), *s), elements=st.integers(-2, 2).map(float)),
    )
)
# A game that no walk solves at once takes a while on a busy machine.
patient = settings(deadline=None)
seeds = st.integers(0, 2**32 - 1)
SHAPES = [(5, 5, 5), (7, 7), (3, 4, 2), (2, 2, 2, 2), (7, 7, 7), (2, 6), (3, 1, 3)]


def random_game(seed: int, shape: tuple[int, ...], *, pure: bool | None = None) -> np.ndarray:
    """Normal payoffs; with ``pure`` given, of a game that has a pure equilibrium, or has none."""
    generator = np.random.default_rng(seed)
    while True:
        game = generator.normal(size=(len(shape), *shape))
        if pure in (None, bool(pure_by_hand(game))):
            return game


def even(game: np.ndarray) -> list[list[float]]:
    return [[abs(k - m // 2) for k in range(m)] for m in game.shape[1:]]


def solve(game: np.ndarray) -> Equilibrium:
    return equilibrium(game, even(game))


def gain_of_leaving(game: np.ndarray, strategies: Sequence[Sequence[float]]) -> float:
    """By the definition, joint move by joint move; in shares of each player's range."""
    players, worst = len(game), 0.0
    for player in range(players):
        reach = float(np.ptp(game[player] / 2.0)) * 2.0
        by_move = [0.0] * game.shape[1 + player]
        for joint in itertools.product(*(range(m) for m in game.shape[1:])):
            chance = math.prod(strategies[other][joint[other]] for other in range(players) if other != player)
            by_move[joint[player]] += chance * float(game[(player, *joint)])
        stays = sum(p * u for p, u in zip(strategies[player], by_move, strict=True))
        worst = max(worst, (max(by_move) - stays) / reach if reach else 0.0)
    return worst


def pure_by_hand(game: np.ndarray) -> list[tuple[int, ...]]:
    found = []
    for joint in itertools.product(*(range(m) for m in game.shape[1:])):
        lines = (game[i][(*joint[:i], slice(None), *joint[i + 1 :])] for i in range(len(game)))
        if all(line[move] == line.max() for line, move in zip(lines, joint, strict=True)):
            found.append(joint)
    return found


# -- it is an equilibrium ----------------------------------------------------------------------------------------------


def _two_of_four() -> np.ndarray:
    """Two with a choice among four, on payoffs from 1 to 846: quantal responses end at a regret of 3e-5 here."""
    game = np.zeros((4, 1, 4, 1, 4))
    game[1, 0, :, 0] = [[0, 6, 0, 0], [846, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 717]]
    game[3, 0, :, 0] = [[0, 0, 720, -373], [0, 1, 0, 0], [0, 0, 0, 0], [0, 119, 0, 0]]
    return game


def test_where_quantal_responses_lose_their_way_the_moves_in_use_are_tried() -> None:
    """By hand: rows 0 and 3, columns 1 and 2."""
    found = solve(_two_of_four())
    assert found.kind == "mixed" and found.regret <= 1e-9
    assert found.strategies[1] == pytest.approx((119 / 839, 0, 0, 720 / 839))
    assert found.strategies[3] == pytest.approx((0, 1 / 7, 6 / 7, 0))


@patient
@given(any_game)
@example(_two_of_four())
def test_no_agent_gains_by_leaving_it_alone(game: np.ndarray) -> None:
    found = solve(game)
    assert gain_of_leaving(game, found.strategies) <= 1e-6
    assert found.regret == pytest.approx(gain_of_leaving(game, found.strategies), abs=1e-9)
    for strategy, moves in zip(found.strategies, game.shape[1:], strict=True):
        assert len(strategy) == moves and min(strategy) >= 0.0 and sum(strategy) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_nor_in_games_where_no_pure_one_is(shape: tuple[int, ...]) -> None:
    for seed in range(15):
        game = random_game(seed, shape, pure=False)
        found = solve(game)
        assert found.kind == "mixed" and found.pure_count == 0
        assert gain_of_leaving(game, found.strategies) <= 1e-6


@pytest.mark.parametrize("seed", [335, 1842])
def test_where_the_first_walk_loses_its_way_a_careful_one_does_not(seed: int) -> None:
    game = random_game(seed, (3, 3, 3), pure=False)
    assert gain_of_leaving(game, solve(game).strategies) <= 1e-6


@pytest.mark.parametrize("seed", [308, 328, 370])
def test_a_sharp_turn_does_not_lead_back(seed: int) -> None:
    layout = Multilinear(_in_shares(random_game(seed, (3, 3, 3), pure=False)))
    assert min(layout.regret(mixed) for mixed in _walk(layout, 1.0)) <= 1e-6


@patient
@given(any_game)
def test_it_is_pure_where_a_pure_one_is(game: np.ndarray) -> None:
    pure, found = pure_by_hand(game), solve(game)
    if pure:
        assert found.kind == "pure" and found.play in pure and found.pure_count == len(pure)
        assert all(p[move] == 1.0 for p, move in zip(found.strategies, found.play, strict=True))


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (3, 4), (4, 4)])
def test_of_two_players_it_is_one_that_nashpy_finds(shape: tuple[int, int]) -> None:
    nashpy = pytest.importorskip("nashpy", reason="the oracle is nashpy: uv pip install 'nashpy>=0.0.43'")
    for seed in range(25):
        game = random_game(seed, shape)
        # Its support enumeration compares payoffs without tolerance, and loses equilibria to rounding.
        oracle = [np.concatenate(pair) for pair in nashpy.Game(*game).vertex_enumeration()]
        assert len(oracle) % 2 == 1  # all of them: their number is odd (Wilson 1971)
        pure = [pair for pair in oracle if np.isin(pair.round(9), (0.0, 1.0)).all()]
        found = solve(game)
        assert found.pure_count == len(pure)
        assert min(np.abs(np.concatenate(found.strategies) - pair).max() for pair in oracle) < 1e-7


@given(seeds, st.integers(2, 7), st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_a_zero_sum_game_has_the_value_of_its_linear_programme(seed: int, rows: int, columns: int) -> None:
    wins = np.random.default_rng(seed).normal(size=(rows, columns))
    found = solve(np.stack([wins, -wins]))
    # Maximise v under wins.T @ p >= v, von Neumann 1928.
    programme = linprog(
        [*[0.0] * rows, -1.0],
        A_ub=np.hstack([-wins.T, np.ones((columns, 1))]),
        b_ub=np.zeros(columns),
        A_eq=[[*[1.0] * rows, 0.0]],
        b_eq=[1.0],
        bounds=[(0.0, None)] * rows + [(None, None)],
    )
    p, q = (np.array(strategy) for strategy in found.strategies)
    assert p @ wins @ q == pytest.approx(programme.x[-1], abs=1e-5)


@patient
@given(any_game.filter(lambda game: len(game) >= 2), seeds)
def test_the_fields_are_the_expected_payoffs_and_their_derivative(game: np.ndarray, seed: int) -> None:
    layout = Multilinear(game)
    mixed = layout.shares(np.random.default_rng(seed).normal(size=len(layout.owner)))
    payoff, slope = layout.fields(mixed)
    strategies = np.split(mixed, layout.starts[1:])
    for player, by_move in enumerate(np.split(payoff, layout.starts[1:])):
        rest = np.moveaxis(game[player], player, -1)
        for other, strategy in enumerate(strategies):
            rest = rest if other == player else np.tensordot(strategy, rest, axes=1)
        np.testing.assert_allclose(by_move, rest, atol=1e-9)
    for at in range(len(mixed)):  # linear in each probability, so a difference is exact
        moved = mixed.copy()
        moved[at] += 0.5
        np.testing.assert_allclose(layout.fields(moved)[0] - payoff, 0.5 * slope[:, at], atol=1e-9)


# -- what must not matter ----------------------------------------------------------------------------------------------


@given(seeds, st.sampled_from(SHAPES), st.data())
@settings(max_examples=40, deadline=None)
def test_the_unit_of_a_players_payoffs_changes_nothing(seed: int, shape: tuple[int, ...], data: st.DataObject) -> None:
    game = random_game(seed, shape)
    one_each = (len(shape), *[1] * len(shape))
    factor = data.draw(arrays(np.float64, one_each, elements=st.floats(1e-3, 1e3)))
    shift = data.draw(arrays(np.float64, one_each, elements=st.floats(-100.0, 100.0)))
    one, other = solve(game), solve(game * factor + shift)
    assert (one.play, one.kind, one.pure_count) == (other.play, other.kind, other.pure_count)
    for a, b in zip(one.strategies, other.strategies, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@given(seeds, st.sampled_from([(5, 5, 5), (4, 4), (3, 3, 3, 3), (2, 5, 3)]), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_players_and_moves_changes_nothing(seed: int, shape: tuple[int, ...], shuffler) -> None:
    game, players = random_game(seed, shape), list(range(len(shape)))
    orders = [shuffler.sample(range(m), m) for m in shape]
    shuffler.shuffle(players)
    turned = game[np.ix_(range(len(shape)), *orders)]
    turned = np.moveaxis(turned[players], [1 + p for p in players], range(1, len(shape) + 1))
    sizes = even(game)
    one = equilibrium(game, sizes)
    other = equilibrium(turned, [[sizes[p][k] for k in orders[p]] for p in players])
    assert [orders[p][k] for p, k in zip(players, other.play, strict=True)] == [one.play[p] for p in players]
    assert (one.kind, one.pure_count) == (other.kind, other.pure_count)
    for p, strategy in zip(players, other.strategies, strict=True):
        assert strategy == pytest.approx([one.strategies[p][k] for k in orders[p]], abs=1e-5)


@pytest.mark.parametrize("factor", [0.5, 1e-3])
def test_what_comes_back_is_a_mixture_also_where_newtons_method_ends_outside(factor: float) -> None:
    found = solve(factor * random_game(89, (3, 4, 2)))
    assert [sum(strategy) for strategy in found.strategies] == pytest.approx([1.0] * 3)
    assert found.play == (0, 1, 0)


@given(seeds, st.sampled_from([(5, 5, 5), (4, 4), (3, 2, 3)]), st.floats(0.01, 1.0), st.data())
@settings(max_examples=50, deadline=None)
def test_a_dominated_move_is_never_made(seed: int, shape: tuple[int, ...], by: float, data: st.DataObject) -> None:
    game = random_game(seed, shape)
    player = data.draw(st.integers(0, len(shape) - 1))
    better, worse = data.draw(st.permutations(range(shape[player])))[:2]
    own = np.moveaxis(game[player], player, 0)
    own[worse] = own[better] - by
    found = solve(game)
    assert found.play[player] != worse
    assert found.strategies[player][worse] < 1e-9


# -- the choice between several ----------------------------------------------------------------------------------------


def test_hunting_the_hare_is_risk_dominant() -> None:
    stag_hunt = np.array([[[4.0, 0.0], [3.0, 2.0]], [[4.0, 3.0], [0.0, 2.0]]])
    found = equilibrium(stag_hunt, [[0.0, 5.0], [0.0, 5.0]])  # although it moves more
    assert found.play == (1, 1) and found.pure_count == 2


@patient
@given(st.lists(st.floats(0.1, 10.0), min_size=6, max_size=6))
def test_unanimity_is_settled_by_the_nash_product(prizes: list[float]) -> None:
    game = np.zeros((3, 2, 2, 2))
    game[:, 0, 0, 0], game[:, 1, 1, 1] = prizes[:3], prizes[3:]
    first, second = math.prod(prizes[:3]), math.prod(prizes[3:])
    assume(abs(math.log(first / second)) > 1e-3)
    # Every player's range is its larger prize, in both products alike.
    assert equilibrium(game, [[0.0, 0.0]] * 3).play == ((0, 0, 0) if first > second else (1, 1, 1))


@patient
@given(any_game)
def test_who_does_not_care_leaves_the_choice_to_the_others(game: np.ndarray) -> None:
    alone, count = solve(game), len(game)
    joined = np.zeros((count + 1, *game.shape[1:], 3))
    joined[:count] = game[..., None]
    found = equilibrium(joined, [*even(game), [1.0, 0.0, 1.0]])
    if alone.kind == "pure":
        assert found.play == (*alone.play, 1)


def test_the_loss_is_that_against_the_nearest_rival() -> None:
    own = np.array([[1.0, 0.3, 0.5], [0.9, 0.8, 0.0], [0.0, 0.3, 0.0]])
    found = equilibrium(np.stack([own, own.T]), [[0.0] * 3] * 2)
    assert found.play == (1, 1) and found.pure_count == 2  # 0.5 to lose, at (0, 0) 0.1


def test_to_lose_nothing_counts_less_than_any_loss() -> None:
    game = np.array([[[0.5, 1.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, 1.0]]])
    found = equilibrium(game, [[0.0] * 2] * 2)
    assert found.play == (0, 0) and found.pure_count == 2  # at (1, 1) the first player does not care


def test_of_equal_ones_the_one_that_moves_least_is_played_then_the_first() -> None:
    agree = np.stack([np.eye(3), np.eye(3)])
    assert equilibrium(agree, [[2.0, 1.0, 0.0], [0.0, 0.5, 9.0]]).play == (1, 1)
    assert equilibrium(agree, [[1.0] * 3] * 2).play == (0, 0)
    nobody_cares = np.full((3, 5, 5, 5), 7.0)
    found = solve(nobody_cares)
    assert found.play == (2, 2, 2) and found.pure_count == 125


def test_of_a_mixed_one_the_likeliest_move_is_played_then_the_smallest() -> None:
    pennies = np.array([[[1.0, -1.0], [-1.0, 1.0]], [[-1.0, 1.0], [1.0, -1.0]]])
    found = equilibrium(pennies, [[1.0, 0.0], [0.0, 1.0]])
    assert found.play == (1, 0) and found.kind == "mixed"
    assert np.allclose(found.strategies, 0.5)
    pennies[0, 0, 0] = 3.0  # makes the second player rarer there
    found = equilibrium(pennies, [[0.0, 1.0], [0.0, 1.0]])
    assert np.allclose(found.strategies, [[0.5, 0.5], [1 / 3, 2 / 3]]) and found.play == (0, 1)


# -- limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_payoff_that_is_no_number_is_named(value: float) -> None:
    game = np.zeros((2, 3, 2))
    game[1, 2, 0] = value
    with pytest.raises(ValueError, match=rf"player 1 for the joint move \(2, 0\) is {value}"):
        solve(game)
    with pytest.raises(ValueError, match=r"player 1"):
        regret_of(game, [[1, 0, 0], [1, 0]])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 3, 3, 3), (2, 0, 3)])
def test_what_is_no_game_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="payoffs have shape"):
        equilibrium(np.zeros(shape), [[0.0] * 3] * 2)


@pytest.mark.parametrize("sizes", [[[0.0]], [[0.0, 1.0], [0.0]], [[0.0, -1.0], [0, 1]], [[0.0, math.nan], [0, 1]]])
def test_sizes_that_do_not_fit_are_refused(sizes: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="sizes"):
        equilibrium(np.zeros((2, 2, 2)), sizes)


@patient
@given(arrays(np.float64, (2, 3, 3), elements=st.floats(allow_nan=False, allow_infinity=False)))
@example(np.where(np.arange(18).reshape(2, 3, 3) % 4 < 2, 1.7e308, -1.7e308))
@pytest.mark.filterwarnings("error")
def test_any_finite_payoffs_will_do(game: np.ndarray) -> None:
    found = solve(game)
    assert found.regret <= 1e-6 and all(math.isfinite(p) for s in found.strategies for p in s)


@pytest.mark.parametrize("shape", [(3, 3, 3), (5, 5, 5)])
def test_payoffs_of_many_orders_of_magnitude_leave_a_small_regret(shape: tuple[int, ...]) -> None:
    regrets = []
    for seed in range(40):
        generator, size = np.random.default_rng(seed), (len(shape), *shape)
        game = generator.choice([-1.0, 1.0], size=size) * np.exp(4.0 * generator.normal(size=size))
        found = solve(game)
        if found.kind == "mixed":
            regrets.append(gain_of_leaving(game, found.strategies))
    assert len(regrets) >= 5 and max(regrets) <= 2e-4  # the module says what was measured
    assert np.quantile(regrets, 0.25) <= 1e-6


# -- time --------------------------------------------------------------------------------------------------------------


def spent(payoffs: np.ndarray, sizes: Sequence[Sequence[float]]) -> float:
    began = time.thread_time()
    equilibrium(payoffs, sizes)
    return time.thread_time() - began


def decision_game(seed: int) -> Game:
    """As a decision makes it, from any state of the run, any wishes within limits and any learned effects."""
    generator = np.random.default_rng(seed)
    owned = {agent.name: agent.owns for agent in (LearningRateAgent, GuidedAttentionAgent, LossBalanceAgent)}
    knobs = [knob for owns in owned.values() for knob in owns]
    wishes = {
        agent: {knob: float(generator.uniform(-1, 1)) * math.log(KNOBS[knob].max_ratio) for knob in owns}
        for agent, owns in owned.items()
    }
    effects = {
        metric: {knob: (float(generator.normal()), 10.0 ** float(generator.uniform(-3, 0))) for knob in knobs}
        for metric in ("loss", "attention_diag")
    }
    seen = context(
        grad_spikes=float(generator.uniform(0, 0.4)),
        certainty=float(generator.uniform()),
        attention_diag=float(generator.uniform()),
        effects=effects,
        filtered={"loss": filtered(float(generator.uniform(-6, 6)), 1.0)},
    )
    return game_of(seen, criteria(seen), wishes)


def test_the_game_of_a_decision_takes_under_five_milliseconds_at_the_worst() -> None:
    games = [decision_game(seed) for seed in range(100)]
    assert max(spent(one.payoffs, one.sizes) for one in games) < 5e-3
    assert {one.payoffs.shape[1:] for one in games} >= {(5, 5, 5)}


def test_a_game_without_a_pure_one_takes_some_milliseconds() -> None:
    """Of 3 x 5 moves; no random decision had such a game. The bound has room for a busy machine."""
    games = [random_game(seed, (5, 5, 5), pure=False) for seed in range(20)]
    assert np.median([spent(game, even(game)) for game in games]) < 20e-3
