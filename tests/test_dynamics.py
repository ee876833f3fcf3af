import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from tts_brain.coordination.dynamics import GAIN_LIMIT, Course, Dynamics, _spread, simulate
from tts_brain.feedback.kalman import SLOPE_MEMORY, advance, process_noise
from tts_brain.types import GUIDED_WEIGHT, KNOBS, LEARNING_RATE, MEL_WEIGHT

MOVES = {LEARNING_RATE: 0.4, GUIDED_WEIGHT: -0.3}
LOSS = Course(1.0, -0.001, 0.02, 0.0005, 0.05, 1e-4, {LEARNING_RATE: (-0.001, 0.002)}, prior_std=0.001)
ATTENTION = Course(0.4, 0.001, 0.1, 0.004, 0.3, 1e-4, {GUIDED_WEIGHT: (0.002, 0.004)}, prior_std=0.01)
RUN = Dynamics(LOSS, 1.1, ATTENTION, 0.7)
anything = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(0.0, allow_infinity=False)
effects = st.dictionaries(st.sampled_from(list(KNOBS)), st.tuples(anything, positive), max_size=3)
courses = st.builds(Course, anything, anything, positive, positive, positive, positive, effects, positive)
log_moves = st.dictionaries(st.sampled_from(list(KNOBS)), st.floats(-20.0, 20.0), max_size=4)


def with_loss(**other: Any) -> Dynamics:
    return dataclasses.replace(RUN, loss=dataclasses.replace(LOSS, **other))


def reach(horizon: int) -> float:
    """What a slope of 1 adds to the level: 1 + ρ + ρ² + …"""
    return sum((1.0 - 1.0 / SLOPE_MEMORY) ** k for k in range(horizon))


def close_to(share: float, draws: int) -> Any:
    """Within four standard errors of a share."""
    return pytest.approx(share, abs=4.0 * math.sqrt(max(share * (1.0 - share), 1.0 / draws) / draws))


# -- closed forms ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0), st.floats(-1.0, 1.0))
def test_without_noise_it_is_the_filters_own_prediction(horizon: int, slope: float, effect: float, move: float) -> None:
    level = advance([2.0, slope, effect], horizon, [move])[0]
    held = advance([2.0, slope, effect], horizon, [0.0])[0]
    course = Course(2.0, slope, noise=0.1, effects={LEARNING_RATE: (effect, 0.0)})
    rises = level > 2.0
    for limit, share in ((level + 1e-6, 0.0), (level - 1e-6, 1.0)) if rises else ((2.0, 0.0),):
        found = simulate(Dynamics(course, limit), {LEARNING_RATE: move}, horizon=horizon)
        assert found.divergence == share
        assert (found.gain, found.cvar) == pytest.approx([(held - level) / 0.1] * 2, abs=1e-6)


def test_one_step_ahead_the_risk_is_that_of_a_normal_number() -> None:
    draws = 40_000
    found = simulate(RUN, {LEARNING_RATE: 3.0}, horizon=1, draws=draws)
    # No noise of the slope has reached the level after a single step.
    spread = math.sqrt(0.02**2 + 0.0005**2 + (3.0 * 0.002) ** 2)
    assert found.divergence == close_to(norm.sf(1.1, 1.0 - 0.001 - 3.0 * 0.001, spread), draws)
    assert found.divergence_held == close_to(norm.sf(1.1, 0.999, math.hypot(0.02, 0.0005)), draws)


@pytest.mark.parametrize("horizon", [1, 7, 100, 1000])
def test_the_gain_and_its_tail_are_those_of_a_normal_number(horizon: int) -> None:
    draws = 40_000
    found = simulate(RUN, MOVES, horizon=horizon, draws=draws)
    # The guided weight was never tried: its mean is 0 and its spread the prior's.
    mean = 0.001 * 0.4 * reach(horizon) / 0.05
    spread = math.hypot(0.4 * 0.002, 0.3 * 0.001) * reach(horizon) / 0.05
    assert found.gain == pytest.approx(mean, abs=4.0 * spread / math.sqrt(draws))
    # Expected shortfall of a normal number (Rockafellar and Uryasev 2000, section 3).
    tail = mean - spread * norm.pdf(norm.ppf(0.05)) / 0.05
    assert found.cvar == pytest.approx(tail, abs=0.06 * spread)


def step_by_step(dynamics: Dynamics, moves: dict[str, float], horizon: int, draws: int) -> float:
    """The model as its first two lines say it, looked at after every step."""
    generator, loss = np.random.default_rng(7), dynamics.loss
    level = generator.normal(loss.level, loss.level_std, draws)
    slope = generator.normal(loss.slope, loss.slope_std, draws)
    slope += sum(move * generator.normal(*loss.effect(knob), draws) for knob, move in moves.items())
    over = np.zeros(draws, dtype=bool)
    for _ in range(horizon):
        level = level + slope
        slope = (1.0 - 1.0 / SLOPE_MEMORY) * slope + generator.normal(0.0, math.sqrt(loss.drift) * loss.noise, draws)
        over |= level > dynamics.divergence_limit
    return float(over.mean())


@pytest.mark.parametrize("gap", [1, 2, 5, 50, 1000])
def test_the_noise_between_two_looks_is_the_filters(gap: int) -> None:
    on_both, on_slope, on_level = _spread(gap)
    root = np.array([[on_both, on_level], [on_slope, 0.0]])
    np.testing.assert_allclose(root @ root.T, process_noise(gap, 2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("drift", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("limit", [1.1, 1.25])
def test_few_looks_see_nearly_all_that_a_look_at_every_step_sees(drift: float, limit: float) -> None:
    draws = 20_000
    run = dataclasses.replace(with_loss(drift=drift), divergence_limit=limit)
    every, few = step_by_step(run, MOVES, 100, draws), simulate(run, MOVES, draws=draws).divergence
    error = 4.0 * math.sqrt(2.0 * every * (1.0 - every) / draws)
    assert every * 0.95 - error <= few <= every + error


# -- laws --------------------------------------------------------------------------------------------------------------


def test_to_hold_gains_nothing_and_risks_what_holding_risks() -> None:
    for moves in ({}, {LEARNING_RATE: 0.0}):
        found = simulate(RUN, moves)
        assert (found.gain, found.cvar) == (0.0, 0.0)
        assert (found.divergence, found.alignment_loss) == (found.divergence_held, found.alignment_loss_held)
    moved = simulate(RUN, MOVES)
    assert (moved.divergence_held, moved.alignment_loss_held) == (found.divergence, found.alignment_loss)


@given(st.integers(0, 1000))
def test_a_joint_move_gains_what_its_parts_gain(step: int) -> None:
    parts = [simulate(RUN, {knob: move}, step=step).gain for knob, move in MOVES.items()]
    assert simulate(RUN, MOVES, step=step).gain == pytest.approx(sum(parts), abs=1e-9)


@given(st.floats(-2.0, 2.0), st.floats(0.0, 2.0), st.integers(0, 1000))
def test_a_higher_limit_is_crossed_no_more_often(limit: float, higher: float, step: int) -> None:
    low, high = (dataclasses.replace(RUN, divergence_limit=limit + more) for more in (0.0, higher))
    assert simulate(high, MOVES, step=step).divergence <= simulate(low, MOVES, step=step).divergence


@given(st.floats(0.0, 0.01), st.floats(1.0, 10.0), st.integers(0, 1000))
def test_to_know_less_of_an_effect_makes_it_no_less_risky(std: float, times: float, step: int) -> None:
    known = Course(1.0, noise=0.05)
    courses = (dataclasses.replace(known, effects={LEARNING_RATE: (0.0, s)}) for s in (std, std * times))
    sure, unsure = (simulate(Dynamics(course, 1.1), {LEARNING_RATE: 0.4}, step=step) for course in courses)
    assert unsure.divergence >= sure.divergence and unsure.cvar <= sure.cvar
    assert sure.divergence_held == 0.0


def test_to_know_less_is_riskier_among_all_other_doubts_too() -> None:
    risks = [
        simulate(with_loss(effects={LEARNING_RATE: (0.0, std)}), {LEARNING_RATE: 0.4}, draws=20_000).divergence
        for std in (0.0005, 0.002, 0.008)
    ]
    assert risks == sorted(risks) and risks[0] < risks[-1]


@given(st.floats(-10.0, 10.0), st.floats(1e-3, 1e3))
def test_shift_and_scale_of_the_loss_change_nothing(shift: float, scale: float) -> None:
    scaled = {f: getattr(LOSS, f) * scale for f in ("slope", "level_std", "slope_std", "noise", "prior_std")}
    tries = {knob: (mean * scale, std * scale) for knob, (mean, std) in LOSS.effects.items()}
    other = with_loss(level=(LOSS.level + shift) * scale, effects=tries, **scaled)
    found = simulate(dataclasses.replace(other, divergence_limit=(1.1 + shift) * scale), MOVES)
    expected = simulate(RUN, MOVES)
    # A play that ends a rounding error from the limit may fall on the other side of it.
    assert found.divergence == pytest.approx(expected.divergence, abs=1.5 / 256)
    assert (found.gain, found.cvar) == pytest.approx((expected.gain, expected.cvar))


@pytest.mark.parametrize("level, best, lost", [(5.0, 0.7, 0.0), (-5.0, 0.7, 1.0), (-5.0, 0.49, 0.0), (-5.0, 1.0, 1.0)])
def test_an_alignment_is_lost_only_where_one_was(level: float, best: float, lost: float) -> None:
    attention = Course(level, noise=0.1)
    assert simulate(Dynamics(LOSS, 1.1, attention, best), MOVES).alignment_loss == lost
    assert simulate(Dynamics(LOSS, 1.1, attention, best), MOVES).alignment == (best >= 0.5)
    none = simulate(Dynamics(LOSS, 1.1, None, best), MOVES)
    assert none.alignment_loss == 0.0 and not none.alignment


def test_attention_falls_as_its_slope_does() -> None:
    half = math.log(0.35 / 0.65)
    sinks = Course(half + 1.0, -0.02, noise=0.1, effects={GUIDED_WEIGHT: (0.1, 0.0)})
    found = simulate(Dynamics(LOSS, 1.1, sinks, 0.7), {GUIDED_WEIGHT: 0.3})
    assert (found.alignment_loss_held, found.alignment_loss) == (1.0, 0.0)


def test_what_the_attention_does_changes_nothing_for_the_loss() -> None:
    alone = simulate(dataclasses.replace(RUN, attention=None), MOVES)
    both = simulate(RUN, MOVES)
    assert (alone.divergence, alone.gain, alone.cvar) == (both.divergence, both.gain, both.cvar)


def test_an_effect_of_zero_and_zero_is_one_never_tried() -> None:
    never = simulate(with_loss(effects={}), MOVES)
    assert never == simulate(with_loss(effects=dict.fromkeys(KNOBS, (0.0, 0.0))), MOVES)
    assert never.cvar < 0.0


# -- the same decision in another process ------------------------------------------------------------------------------


def test_another_process_sees_the_same_future_and_another_step_another() -> None:
    code = (
        "from tts_brain.coordination.dynamics import *; c = Course(1.0, 0.0, 0.1, 0.01, 0.05, 1e-3, prior_std=0.01);"
        "print(repr(simulate(Dynamics(c, 1.5, c, 0.9), {'mel_weight': 0.2, 'learning_rate': 0.4}, seed=3, step=40)))"
    )
    here = Course(1.0, 0.0, 0.1, 0.01, 0.05, 1e-3, prior_std=0.01)
    expected = simulate(Dynamics(here, 1.5, here, 0.9), {LEARNING_RATE: 0.4, MEL_WEIGHT: 0.2}, seed=3, step=40)
    env = {**os.environ, "PYTHONHASHSEED": "5"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=env)
    assert run.stdout.strip() == repr(expected)
    others = [simulate(RUN, MOVES, seed=seed, step=step) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({found.gain for found in others}) == 3


# -- limits ------------------------------------------------------------------------------------------------------------


@given(courses, st.one_of(st.none(), courses), log_moves, st.floats(allow_nan=False), st.integers(1, 10**6))
@settings(deadline=None)
@pytest.mark.filterwarnings("error")
def test_it_is_finite_whatever_is_estimated(
    loss: Course, attention: Course | None, moves: dict[str, float], limit: float, horizon: int
) -> None:
    found = simulate(Dynamics(loss, limit, attention, 0.8), moves, horizon=horizon, draws=32)
    assert all(math.isfinite(value) for value in dataclasses.astuple(found))
    shares = (found.divergence, found.alignment_loss, found.divergence_held, found.alignment_loss_held)
    assert all(0.0 <= share <= 1.0 for share in shares)
    assert -GAIN_LIMIT <= found.cvar <= found.gain <= GAIN_LIMIT


@pytest.mark.parametrize("name", ["level", "slope", "level_std", "slope_std", "noise", "drift", "prior_std"])
def test_an_estimate_that_is_no_number_is_named(name: str) -> None:
    for value in (math.nan, math.inf, *((-1.0,) if name not in ("level", "slope") else ())):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            with_loss(**{name: value})


@pytest.mark.parametrize("effect", [(math.nan, 1.0), (0.0, -1.0), (0.0, math.inf), (0.0, math.nan)])
def test_an_effect_that_is_none_is_refused(effect: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="effect of 'mel_weight'"):
        with_loss(effects={MEL_WEIGHT: effect})
    with pytest.raises(ValueError, match="effect of 'nothing'"):
        with_loss(effects={"nothing": (0.0, 1.0)})


@pytest.mark.parametrize(
    "moves, other",
    [
        ({"nothing": 0.1}, {}),
        ({MEL_WEIGHT: math.nan}, {}),
        ({MEL_WEIGHT: 21.0}, {}),
        ({}, {"horizon": 0}),
        ({}, {"draws": 19}),
        ({}, {"seed": -1}),
        ({}, {"step": -1}),
    ],
)
def test_what_cannot_be_played_is_refused(moves: dict[str, float], other: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter({**moves, **other}))):
        simulate(RUN, moves, **other)


def test_limits_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="divergence_limit"):
        Dynamics(LOSS, math.nan)
    with pytest.raises(ValueError, match="best_attention_diag"):
        Dynamics(LOSS, 1.0, ATTENTION, 1.5)


def seconds(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def test_it_takes_less_than_drawing_400000_normal_numbers() -> None:
    """Some 2 to 4 ms, by the machine; half as long as that when written."""
    draw = np.random.default_rng(0).standard_normal
    pairs = [(seconds(lambda: simulate(RUN, MOVES)), seconds(lambda: draw(400_000))) for _ in range(40)]
    ours, drawing = np.median(pairs, axis=0)
    assert ours < drawing
