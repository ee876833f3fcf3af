import math
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.context.scales import (
    ENERGY_LIMIT,
    FEWEST,
    HISTORY,
    SURPRISE_LIMIT,
    clip_spikes,
    details,
    oscillation,
    scales,
)
from tts_brain.context.trends import trend
from tts_brain.types import OSCILLATION_ALARM, Scales

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench import component_trends

# Whole numbers, so that shifting and scaling them rounds nothing away.
whole = st.lists(st.integers(-1000, 1000), max_size=140).map(lambda values: [float(v) for v in values])
seeds = st.integers(0, 10**6)
STEPS = np.arange(HISTORY)


def of(values: np.ndarray | list[float]) -> Scales:
    return scales(range(len(values)), values)


def noise(seed: int, count: int = HISTORY) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


def numbers(found: Scales) -> list[float]:
    flat: list[float] = []
    for value in astuple(found):
        flat.extend(value) if isinstance(value, tuple) else flat.append(value)
    return flat


def within_limits(found: Scales) -> bool:
    bounded = 0.0 <= found.oscillation <= SURPRISE_LIMIT and all(0.0 <= e <= ENERGY_LIMIT for e in found.energy)
    return bounded and all(math.isfinite(v) for v in numbers(found)) and found.noise >= 0.0 and found.lag >= 0.0


# No look-ahead, no edge.


@given(seeds, st.integers(8, 139))
def test_later_values_change_no_earlier_coefficient(seed: int, cut: int) -> None:
    values = noise(seed, 140)
    assert np.array_equal(clip_spikes(values)[:cut], clip_spikes(values[:cut]))
    for early, late in zip(details(values[:cut]), details(values), strict=False):
        np.testing.assert_allclose(late[: len(early)], early, atol=1e-12)


@given(seeds, st.integers(-1000, 1000), st.integers(1, 100))
def test_the_newest_coefficients_rest_on_the_newest_values_alone(seed: int, before: int, changed: int) -> None:
    values = noise(seed)
    other = values.copy()
    other[:changed] = before
    for was, now in zip(details(values), details(other), strict=True):
        untouched = len(was) - changed
        np.testing.assert_allclose(now[len(now) - max(untouched, 0) :], was[len(was) - max(untouched, 0) :], atol=1e-9)


@given(st.integers(2, 140), st.integers(-50, 50), st.integers(1, 9))
def test_on_a_straight_line_level_and_slope_are_exact_up_to_the_edge(count: int, slope: int, gap: int) -> None:
    steps = gap * np.arange(count)
    found = scales(steps, 7.0 + slope * steps)
    assert found.level == pytest.approx(7.0 + slope * (steps[-1] - found.lag), abs=1e-6)
    if count > 5:
        assert found.slope == pytest.approx(slope, abs=1e-7)
    assert found.energy == pytest.approx((0.0,) * len(found.energy), abs=1e-3) and not found.oscillates


def test_no_jump_while_the_window_moves_along_a_smooth_curve() -> None:
    curve = 3.0 * np.exp(-np.arange(400) / 60.0)
    found = [scales(STEPS, curve[at : at + HISTORY]) for at in range(300)]
    assert max(abs(np.diff([f.level for f in found], n=2))) < 1e-3
    assert max(abs(np.diff([f.slope for f in found], n=2))) < 1e-4
    assert max(f.oscillation for f in found) < OSCILLATION_ALARM


def test_the_slow_part_lags_by_what_it_says() -> None:
    found = of(np.concatenate([np.zeros(70), 100.0 * np.ones(30)]))
    assert 8.0 < found.lag < 12.0
    assert 0 <= of(list(range(3))).lag <= 2


# Units, steps, bad input.


@given(whole, st.sampled_from([2.0**-20, 0.125, 64.0, 2.0**30]), st.integers(-(10**6), 10**6))
def test_shift_and_scale_change_nothing_normalised_and_carry_the_rest(values: list[float], by: float, to: int) -> None:
    was, now = of(values), of([by * (v + to) for v in values])
    unit = by * (1.0 + abs(to)) * 1e-9
    assert now.count == was.count and now.lag == was.lag
    assert now.oscillation == pytest.approx(was.oscillation, abs=1e-6)
    assert now.period == pytest.approx(was.period)
    assert now.energy == pytest.approx(was.energy, rel=1e-6, abs=1e-6)
    assert now.noise == pytest.approx(by * was.noise, rel=1e-6, abs=unit)
    assert now.slope == pytest.approx(by * was.slope, rel=1e-6, abs=unit)
    if values:
        assert now.level == pytest.approx(by * (was.level + to), rel=1e-6, abs=unit)


@given(whole)
def test_upside_down_only_level_and_slope_turn_round(values: list[float]) -> None:
    was, now = of(values), of([-v for v in values])
    assert (now.noise, now.period) == (was.noise, was.period)
    assert now.oscillation == pytest.approx(was.oscillation)
    assert (now.level, now.slope) == (pytest.approx(-was.level), pytest.approx(-was.slope))


@given(seeds, st.integers(1, 50))
def test_steps_further_apart_stretch_period_lag_and_slope(seed: int, gap: int) -> None:
    values = noise(seed)
    near, far = of(values), scales(gap * STEPS, values)
    assert (far.oscillation, far.noise, far.energy) == (near.oscillation, near.noise, near.energy)
    assert (far.period, far.lag) == (pytest.approx(gap * near.period), pytest.approx(gap * near.lag))
    assert far.slope == pytest.approx(near.slope / gap, abs=1e-9)


@given(st.lists(st.floats(), max_size=140))
@settings(max_examples=200)
def test_any_float_is_taken_and_only_finite_ones_come_back(values: list[float]) -> None:
    assert within_limits(of(values))


@given(st.lists(st.floats(-1e30, 1e30), min_size=30, max_size=140))
def test_huge_and_negative_values_stay_within_limits(values: list[float]) -> None:
    found = of(values)
    assert within_limits(found) and found.count == min(len(values), HISTORY)


@pytest.mark.parametrize("values", [[], [math.nan] * 50, [math.inf, -math.inf], [1e308] * 40], ids=str)
def test_nothing_usable_is_nothing_seen(values: list[float]) -> None:
    assert of(values) == Scales(0, 0.0, 0.0, 0.0, 0.0, (), 0.0, 0.0)


@given(st.floats(-1e100, 1e100), st.integers(1, 140))
def test_a_constant_series_is_its_level_and_nothing_else(value: float, count: int) -> None:
    found = of([value] * count)
    assert (found.level, found.slope, found.noise, found.oscillation) == (value, 0.0, 0.0, 0.0)
    assert not any(found.energy)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=140), st.lists(st.integers(-3, 3), min_size=140, max_size=140))
def test_repeated_steps_and_coarse_values_do_no_harm(gaps: list[int], values: list[int]) -> None:
    assert within_limits(scales(np.cumsum(gaps).tolist(), values[: len(gaps)]))


@given(seeds, st.lists(st.integers(0, 120), max_size=30))
def test_values_that_are_not_finite_are_left_out(seed: int, holes: list[int]) -> None:
    steps, values = np.arange(121.0), noise(seed, 121)
    values[holes] = math.nan
    kept = np.isfinite(values)
    assert scales(steps, values) == scales(steps[kept], values[kept])


def test_only_the_newest_hundred_count() -> None:
    values = noise(0, 150)
    assert scales(np.arange(150), values) == scales(np.arange(50, 150), values[50:])


def test_lengths_that_differ_and_too_few_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 steps for 2 values"):
        scales([1, 2, 3], [1.0, 2.0])
    with pytest.raises(ValueError, match=f"at least {FEWEST}"):
        oscillation(np.zeros((1, FEWEST - 1)))


@pytest.mark.parametrize("count", range(0, FEWEST))
def test_with_few_values_nothing_is_said_of_oscillation(count: int) -> None:
    found = of((-1.0) ** np.arange(count))
    assert (found.oscillation, found.period) == (0.0, 0.0) and within_limits(found)


# Noise, energy, oscillation.


@pytest.mark.parametrize("swing", [0.0, 1.0, 2.0, 5.0])
def test_the_noise_does_not_swallow_an_alternation(swing: float) -> None:
    found = [of(0.3 * (noise(seed) + swing * (-1.0) ** STEPS)).noise for seed in range(40)]
    assert np.mean(found) == pytest.approx(0.3, rel=0.15)


def test_plain_noise_has_energy_one_in_every_octave() -> None:
    found = np.array([of(noise(seed, HISTORY)).energy for seed in range(200)])
    assert found.shape == (200, 4)
    assert np.median(found, 0) == pytest.approx(np.ones(4), abs=0.25)


# At two deviations. The slowest turns but four times in the window and is missed in three runs of ten.
@pytest.mark.parametrize(
    ("period", "octave", "share"), [(2.0, 0, 1.0), (2.6, 0, 1.0), (5.6, 1, 0.95), (11.0, 2, 0.9), (22.0, 3, 0.6)]
)
def test_an_oscillation_stands_out_in_its_octave_with_its_period(period: float, octave: int, share: float) -> None:
    wave = 2.0 * np.sin(2.0 * np.pi * STEPS / period + (np.pi / 2.0 if period == 2.0 else 0.3))
    found = [of(noise(seed) + wave) for seed in range(20)]
    assert np.mean([f.oscillates for f in found]) >= share
    assert np.argmax(np.mean([f.energy for f in found], 0)) == octave
    assert np.median([f.period for f in found]) == pytest.approx(period, rel=0.1)


@pytest.mark.parametrize("count", [30, 60, 100])
@pytest.mark.parametrize("name", component_trends.NULLS)
def test_noise_seldom_seems_to_oscillate(name: str, count: int) -> None:
    windows = component_trends.NULLS[name](np.random.default_rng([77, count]), 2000, count)
    surprise = oscillation(clip_spikes(windows))[0]
    # Expected 2 and 20 or fewer; the bounds are what a binomial of that rate exceeds once in some thousand.
    assert np.sum(surprise >= OSCILLATION_ALARM) <= 8
    assert np.sum(surprise >= 2.0) <= 36


@given(seeds, st.integers(FEWEST, 140))
def test_one_series_is_judged_as_many_are(seed: int, count: int) -> None:
    values = noise(seed, count)
    window = clip_spikes(values[None, -HISTORY:])
    assert of(values).oscillation == pytest.approx(float(oscillation(window)[0][0]), abs=1e-6)


@pytest.mark.parametrize("spike", [-1e6, -20.0, 20.0, 1e6])
def test_one_spike_is_no_oscillation(spike: float) -> None:
    windows = np.repeat(np.random.default_rng(5).normal(size=(20, HISTORY)), HISTORY, 0)
    windows[np.arange(len(windows)), np.tile(STEPS, 20)] = spike
    # Windows of one noise are alike, so the bound is loose; unclipped, nearly all would be judged by the spike.
    assert np.mean(oscillation(clip_spikes(windows))[0] >= OSCILLATION_ALARM) < 0.005


@given(st.integers(0, 99), st.floats(-1e6, 1e6).filter(lambda v: abs(v) > 1e-3))
def test_one_spike_on_a_constant_is_nothing(at: int, spike: float) -> None:
    values = np.zeros(HISTORY)
    values[at] = spike
    assert not of(values).oscillates


CURVES = {
    "line": STEPS / 100.0,
    "parabola": (STEPS / 100.0) ** 2,
    "power law": (STEPS + 20.0) ** -0.5,
    "decay": np.exp(-STEPS / 20.0),
    "two decays": np.exp(-STEPS / 5.0) + np.exp(-STEPS / 50.0),
    "cosine schedule": np.cos(np.pi * STEPS / 100.0),
    "divergence": np.exp(STEPS / 30.0 - 3.0),
    "logarithm": np.log(STEPS + 1.0),
}


@pytest.mark.parametrize("spread", [0.01, 0.1])
@pytest.mark.parametrize("name", CURVES)
def test_a_bend_is_no_oscillation(name: str, spread: float) -> None:
    curve = CURVES[name] / np.ptp(CURVES[name])
    assert sum(of(curve + spread * noise(seed)).oscillates for seed in range(100, 150)) <= 1


def test_a_rate_induced_oscillation_is_found_where_the_slope_sees_nothing() -> None:
    """Amplitude 1.5 deviations, a period of 5: seen in the window of 100, hidden from a slope over 20."""
    found, slopes = [], []
    for seed in range(50):
        values = noise(seed) + 1.5 * np.sin(2.0 * np.pi * STEPS / 5.0 + seed)
        found.append(of(values).oscillates)
        slopes.append(abs(trend(range(20), values[-20:]).z))
    assert np.mean(found) > 0.9
    assert np.mean(np.array(slopes) > 3.0) < 0.1


def test_the_noise_of_neighbours_that_repel_is_an_oscillation() -> None:
    """x(t+1) = -0.9 x(t) + noise: what gradient descent does just under the rate at which it diverges."""
    found = []
    for seed in range(30):
        values = noise(seed, 160)
        for at in range(1, 160):
            values[at] -= 0.9 * values[at - 1]
        found.append(of(values[60:]).oscillates)
    assert np.mean(found) > 0.8
