import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import theilslopes

from tts_brain.context.trends import Z_LIMIT, noise_level, trend

# Whole numbers, so that shifting and scaling them rounds nothing away.
series = st.lists(st.integers(-1000, 1000), min_size=4, max_size=40).map(lambda values: [float(v) for v in values])
scales = st.floats(1e-6, 1e6)


def of(values: list[float]):
    return trend(range(len(values)), values)


@given(series, scales, st.integers(-(10**6), 10**6))
def test_shift_and_scale_leave_z_and_carry_the_rest(values: list[float], scale: float, shift: int) -> None:
    was, now = of(values), of([scale * v + scale * shift for v in values])
    # What was exactly flat may be off by rounding once scaled: the least tilt over no noise is a sure direction.
    unit = scale * (1.0 + abs(shift)) * 1e-9
    assert now.slope == pytest.approx(scale * was.slope, rel=1e-6, abs=unit)
    assert now.noise == pytest.approx(scale * was.noise, rel=1e-6, abs=unit)
    assert now.level == pytest.approx(scale * (was.level + shift), rel=1e-6, abs=unit)
    if was.noise > 0 and was.slope != 0:
        assert now.z == pytest.approx(was.z, rel=1e-4, abs=1e-4)


@given(series)
def test_the_slope_is_theil_and_sens(values: list[float]) -> None:
    assert of(values).slope == theilslopes(values, range(len(values))).slope


@given(series)
def test_upside_down_the_direction_turns_round(values: list[float]) -> None:
    was, now = of(values), of([-v for v in values])
    assert (now.z, now.slope, now.noise) == (-was.z, -was.slope, was.noise)


@pytest.mark.parametrize("slope", [0.0, 0.05, -0.3])
@pytest.mark.parametrize("noise", [0.01, 1.0, 50.0])
def test_the_noise_of_white_noise_is_found_under_any_gentle_slope(slope: float, noise: float) -> None:
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found.append(noise_level(noise * (rng.normal(size=200) + slope * np.arange(200))))
    assert np.mean(found) == pytest.approx(noise, rel=0.05)
    assert max(abs(f / noise - 1) for f in found) < 0.35


def test_on_white_noise_a_direction_is_seldom_seen_and_on_a_slope_nearly_always() -> None:
    rng = np.random.default_rng(0)
    flat = [of(list(rng.normal(size=20))).z for _ in range(400)]
    falling = [of(list(rng.normal(size=20) - 0.3 * np.arange(20))).z for _ in range(100)]
    # Two sides of a normal beyond 2 are 5 %; the noise is estimated from ten pairs, so the tails are heavier.
    assert np.mean(np.abs(flat) > 2) < 0.2
    assert np.mean(np.array(falling) < -2) > 0.98


@given(st.floats(-1e6, 1e6), st.integers(0, 50))
def test_a_constant_series_has_no_direction(value: float, count: int) -> None:
    found = of([value] * count)
    assert (found.slope, found.noise, found.z, found.count) == (0.0, pytest.approx(0.0, abs=1e-9), 0.0, count)
    assert math.isnan(found.level) if count == 0 else found.level == pytest.approx(value)


@given(series, st.data())
def test_values_that_are_not_finite_are_left_out(values: list[float], data: st.DataObject) -> None:
    steps = list(range(len(values)))
    holes = data.draw(st.lists(st.sampled_from(steps), max_size=10))
    filled = [(s, v) for s, v in zip(steps, values, strict=True)]
    for at in holes:
        filled.insert(at, (at, data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))))
    assert trend([s for s, _ in filled], [v for _, v in filled]) == of(values)


@given(
    st.integers(8, 40),
    st.integers(0, 39),
    st.floats(-1e6, 1e6),
    st.sampled_from([1.0, -1.0]),
    st.integers(0, 1000),
)
def test_a_single_spike_does_not_turn_the_direction(count: int, at: int, spike: float, sign: float, seed: int) -> None:
    assume(at < count)
    values = sign * np.arange(count) + 0.3 * np.random.default_rng(seed).normal(size=count)
    values[at] += spike
    found = of(list(values))
    assert found.z * sign > 0 and found.slope * sign == pytest.approx(1.0, abs=0.35)


@given(st.lists(st.floats(-1e30, 1e30), max_size=40))
def test_every_field_is_finite_and_z_is_bounded(values: list[float]) -> None:
    found = of(values)
    assert abs(found.z) <= Z_LIMIT and found.count == len(values)
    assert all(math.isfinite(v) for v in (found.slope, found.noise, *([found.level] if values else [])))


def test_the_level_is_that_of_the_newest_quarter() -> None:
    assert of([9.0] * 15 + [1.0] * 5).level == 1.0


def test_steps_count_in_the_slope() -> None:
    assert trend(range(0, 100, 5), [2.0 * s for s in range(0, 100, 5)]).slope == pytest.approx(2.0)
    assert trend([3] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).z == 0.0
