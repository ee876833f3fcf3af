import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.feedback import kalman
from tts_brain.feedback.kalman import (
    LINKS,
    SHIFT_LIMIT,
    SURPRISE_LIMIT,
    MetricFilter,
    advance,
    correct,
    process_noise,
    transition,
)
from tts_brain.types import FilterReport

KNOBS = ("learning_rate", "guided_weight")
links = st.sampled_from(list(LINKS))
anything = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.floats(-1.0, 1.0),
    st.sampled_from([0.0, 1.0, 1e30, -1e30, 1e38, 1e-300]),
)
log_moves = st.dictionaries(st.sampled_from(KNOBS), st.floats(-3.0, 3.0), max_size=2)
updates = st.lists(st.tuples(st.integers(-2, 2000), anything, log_moves), max_size=40)
whole = st.lists(st.integers(-1000, 1000), min_size=1, max_size=60).map(lambda values: [float(v) for v in values])


def fed(filter_: MetricFilter, values: Any, first: int = 1) -> list[FilterReport | None]:
    return [filter_.update(step, value) for step, value in enumerate(values, start=first)]


def seen(filter_: MetricFilter, values: Any, first: int = 1) -> list[FilterReport]:
    reports = fed(filter_, values, first)
    assert None not in reports
    return reports  # type: ignore[return-value]


# -- the mathematics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0, 1, 7, 400])
@pytest.mark.parametrize("moves", [[], [0.4], [0.3, -1.2, 0.0]])
def test_the_transition_is_the_derivative_that_autograd_finds(gap: int, moves: list[float]) -> None:
    state = torch.tensor(np.random.default_rng(0).normal(size=2 + len(moves)))
    found = torch.autograd.functional.jacobian(lambda x: torch.stack(advance(x, gap, moves)), state)
    np.testing.assert_allclose(transition(gap, moves), found.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("link, shown", [("identity", lambda x: x), ("log", torch.exp), ("logit", torch.sigmoid)])
@pytest.mark.parametrize("level", [-6.0, -1.5, 0.0, 0.3, 5.0])
def test_both_derivatives_of_a_link_are_autograds(link: str, shown: Any, level: float) -> None:
    x = torch.tensor(level, dtype=torch.float64, requires_grad=True)
    value = shown(x)
    (first,) = torch.autograd.grad(value, x, create_graph=True)
    second = torch.autograd.grad(first, x)[0].item() if first.requires_grad else 0.0
    assert LINKS[link].read(level) == pytest.approx((value.item(), first.item(), second), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("link", list(LINKS))
@given(st.floats(-5.0, 5.0))
def test_the_latent_level_is_the_inverse_of_the_link(link: str, level: float) -> None:
    found = LINKS[link].latent(LINKS[link].read(level)[0])
    assert found is not None and found == pytest.approx(level, abs=1e-9)


@given(st.integers(1, 60), st.integers(1, 60))
def test_two_gaps_are_one_long_gap(first: int, second: int) -> None:
    jacobian = transition(second, [0.0])
    np.testing.assert_allclose(jacobian @ transition(first, [0.0]), transition(first + second, [0.0]), rtol=1e-9)
    added = jacobian @ process_noise(first, 3) @ jacobian.T + process_noise(second, 3)
    np.testing.assert_allclose(added, process_noise(first + second, 3), rtol=1e-6, atol=1e-9)


class Plain(MetricFilter):
    """The filter without what is learned and made robust: what remains is the textbook's."""

    def _learn(self, z: float, offset: float, share: float) -> None:
        pass


@pytest.mark.parametrize("link", list(LINKS))
def test_it_is_filterpys_extended_filter(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filterpy = pytest.importorskip("filterpy.kalman", reason="the oracle is filterpy: uv pip install 'filterpy>=2.0'")
    monkeypatch.setattr(kalman, "_DEGREES", 1e12)  # a Student's t of so many degrees is a normal
    monkeypatch.setattr(kalman, "SHIFT_LIMIT", math.inf)
    monkeypatch.setattr(kalman, "_DRIFT_START", math.log(1e-4))
    generator = np.random.default_rng(1)
    ours, read = Plain(link, KNOBS), LINKS[link].read
    level = -0.5 - 0.004 * np.arange(300)
    values = [read(x)[0] + read(x)[1] * 0.1 * generator.normal() for x in level]
    for step in range(1, 41):
        ours.update(step, values[step - 1])

    oracle = filterpy.ExtendedKalmanFilter(dim_x=4, dim_z=1)
    oracle.x, oracle.P = ours._x[:, None].copy(), ours._p.copy()
    step, compared = 40, 0
    for index in range(40, 300):
        gap = 3 if index % 50 == 0 else 1
        moves = {"learning_rate": 0.4, "guided_weight": -0.2} if index % 60 == 45 else {}
        value = None if index % 17 == 0 else values[index]
        ours_before = ours._x.copy(), ours._p.copy()
        step += gap
        report = ours.update(step, value, moves)
        turned = [moves.get(name, 0.0) for name in KNOBS]
        if moves:  # a move opens its effect: part of the model, not of the textbook's filter
            opened = MetricFilter(link, KNOBS)
            opened._x, opened._p, opened._memory.noise = *ours_before, ours._memory.noise
            opened._open(turned)
            oracle.P = opened._p
        oracle.F, oracle.Q = transition(gap, turned), process_noise(gap, 4) * ours.noise**2 * ours.drift
        oracle.predict()
        if value is not None:
            tangent = read(float(oracle.x[0, 0]))[1]
            predicted = tangent**2 * (float(oracle.P[0, 0]) + ours.noise**2)
            expected = read(float(oracle.x[0, 0]))[0]
            oracle.update(
                np.array([[value]]),
                HJacobian=lambda x: np.array([[read(float(x[0, 0]))[1], 0.0, 0.0, 0.0]]),
                Hx=lambda x: np.array([[read(float(x[0, 0]))[0]]]),
                R=(tangent * ours.noise) ** 2,
            )
            assert report is not None
            assert report.surprise == pytest.approx((value - expected) / math.sqrt(predicted), rel=1e-6, abs=1e-8)
            compared += 1
        np.testing.assert_allclose(ours._x, oracle.x[:, 0], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(ours._p, oracle.P, rtol=1e-6, atol=1e-13)
    assert compared > 200


@given(st.integers(0, 10_000), st.floats(1e-9, 1e9))
def test_a_correction_leaves_a_covariance(seed: int, variance: float) -> None:
    generator = np.random.default_rng(seed)
    root = generator.normal(size=(4, 4))
    state, spread = correct(generator.normal(size=4), root @ root.T, generator.normal(), variance)
    np.testing.assert_allclose(spread, spread.T, atol=1e-12)
    assert np.linalg.eigvalsh(spread).min() > -1e-9 and np.isfinite(state).all()


# -- right about itself ----------------------------------------------------------------------------------------------


def made_up(link: str, drift: float, seed: int, steps: int = 900, noise: float = 0.02) -> tuple[np.ndarray, ...]:
    """A system of the filter's own kind: latent level and slope, values, all of shape (steps,)."""
    generator = np.random.default_rng(seed)
    level, slope = np.zeros(steps), np.zeros(steps)
    for t in range(1, steps):
        level[t] = level[t - 1] + slope[t - 1]
        slope[t] = slope[t - 1] * (1 - 1 / 250) + math.sqrt(drift) * noise * generator.normal()
    level -= level.mean()
    values = []
    for x in level:
        value, tangent, _ = LINKS[link].read(x)
        values.append(value + tangent * noise * generator.normal())
    return level, slope, np.array(values)


@pytest.mark.parametrize("link", list(LINKS))
@pytest.mark.parametrize("drift", [1e-7, 1e-5, 1e-3])
def test_innovations_and_errors_are_as_large_as_it_says(link: str, drift: float) -> None:
    surprises, off_level, off_slope = [], [], []
    for seed in range(5):
        level, slope, values = made_up(link, drift, seed)
        assert link != "logit" or abs(level).max() < 5.0  # beyond, the logit is blunt on purpose
        for t, report in enumerate(seen(MetricFilter(link), values)):
            if t < 200:
                continue
            value, tangent, _ = LINKS[link].read(level[t])
            surprises.append(report.surprise)
            off_level.append((report.level - value) / report.level_std)
            off_slope.append((report.slope - tangent * slope[t]) / report.slope_std)
    # Normalised innovation squared: 1 in the mean, 3500 values of which neighbours share the learned noise.
    assert 0.85 < np.mean(np.square(surprises)) < 1.2
    assert abs(np.mean(surprises)) < 0.08
    assert 0.93 < np.mean(np.abs(surprises) < 1.96) < 0.97
    assert abs(np.corrcoef(surprises[1:], surprises[:-1])[0, 1]) < 0.1
    # Errors within two of their standard deviations: 95 % if all were known, and the drift must be learned.
    assert np.mean(np.abs(off_level) < 2) > 0.85
    assert np.mean(np.abs(off_slope) < 2) > 0.85


@pytest.mark.parametrize("noise", [1e-6, 0.3, 1e4])
def test_the_noise_is_learned(noise: float) -> None:
    generator = np.random.default_rng(3)
    report = seen(MetricFilter(), noise * generator.normal(size=600))[-1]
    assert report.noise == pytest.approx(noise, rel=0.25)
    later = seen(MetricFilter(), np.concatenate([generator.normal(size=300), 5 * generator.normal(size=300)]))[-1]
    assert later.noise == pytest.approx(5.0, rel=0.35)


# -- moves -----------------------------------------------------------------------------------------------------------


def steered(effect: float, seed: int, better: str = "lower", bold: float = math.log(1.5)) -> MetricFilter:
    """One bold move of the rate that changes the slope by ``effect`` noise widths per log unit, seen for 60 steps."""
    generator = np.random.default_rng(seed)
    found, level, slope = MetricFilter("identity", KNOBS, better), 5.0, -0.02
    for step in range(1, 161):
        moved = step == 101
        slope += effect * bold if moved else 0.0
        level += slope
        found.update(step, level + generator.normal(), {"learning_rate": bold} if moved else None)
    return found


def test_a_move_that_helped_is_told_from_one_that_hurt() -> None:
    helped = [steered(-0.3, seed).helped() for seed in range(12)]
    hurt = [steered(0.3, seed).helped() for seed in range(12)]
    assert min(helped) > 0.8 and max(hurt) < 0.2
    assert steered(-0.3, 0, "higher").helped() == pytest.approx(1.0 - helped[0])


def test_as_sure_as_it_may_be() -> None:
    generator = np.random.default_rng(5)
    claims, truth, errors = [], [], []
    for seed in range(150):
        effect = 0.15 * generator.normal()
        found = steered(effect, 1000 + seed)
        mean, std = found.effect("learning_rate")
        claims.append(found.helped())
        truth.append(effect < 0.0)
        errors.append((mean - effect) / std)
    claims_, truth_ = np.array(claims), np.array(truth)
    sure = np.abs(claims_ - 0.5) > 0.4
    assert sure.mean() > 0.3
    # It claims above 0.9 on these, so it must be right on nearly as many.
    assert np.mean((claims_ > 0.5)[sure] == truth_[sure]) > 0.9
    assert np.mean(np.abs(errors) < 2.0) > 0.85
    assert np.mean((claims_ - truth_) ** 2) < 0.2  # 0.25 is "no idea"


def test_what_was_never_turned_has_no_effect_and_no_move_is_no_idea() -> None:
    found = steered(-0.3, 0)
    assert found.effect("guided_weight") == (0.0, 0.0) and found.helped({"guided_weight": 0.4}) == 0.5
    assert found.helped({"learning_rate": -0.4}) == pytest.approx(1.0 - found.helped({"learning_rate": 0.4}))
    assert MetricFilter("log", KNOBS).helped() == 0.5


@pytest.mark.parametrize("moves", [{"learning_rat": 0.1}, {"learning_rate": math.nan}, {"learning_rate": 21.0}])
def test_a_wrong_move_is_refused_and_changes_nothing(moves: dict[str, float]) -> None:
    found = steered(-0.3, 0)
    before = json.dumps(found.state_dict())
    with pytest.raises(ValueError, match="learning_rat"):
        found.update(200, 1.0, moves)
    assert json.dumps(found.state_dict()) == before


# -- spikes and breaks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["identity", "log"])
@pytest.mark.parametrize("spike", [10.0, 1e3, 1e30])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_spike_is_a_surprise_and_does_not_drag_the_level(link: str, spike: float, seed: int) -> None:
    noise = 0.03
    values = 2.0 + noise * np.random.default_rng(seed).normal(size=80)
    found = MetricFilter(link)
    before = seen(found, values)[-1]
    hit = found.update(81, 2.0 + spike * noise)
    after = found.update(82, None)
    assert hit is not None and after is not None
    assert hit.surprise > 4.0 and not hit.changed
    assert abs(after.level - before.level) < noise


@pytest.mark.parametrize("jump", [-20.0, -5.0, 5.0, 20.0, 1e4])
def test_a_level_that_stays_is_followed_within_a_few_steps(jump: float) -> None:
    for seed in range(10):
        generator = np.random.default_rng(seed)
        found = MetricFilter()
        seen(found, generator.normal(size=100))
        reports = seen(found, jump + generator.normal(size=8), first=101)
        changed = next(i for i, report in enumerate(reports) if report.changed)
        assert changed <= 4
        assert abs(reports[-1].level - jump) < 1.5


def test_noise_alone_seldom_looks_like_a_break() -> None:
    generator = np.random.default_rng(2)
    found = [report.changed for report in seen(MetricFilter(), generator.standard_t(5, size=8000))]
    assert sum(found) <= 12


def test_a_constant_series_may_wake_up() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([np.full(300, 0.7), 0.7 + 0.1 * generator.normal(size=60)])
    reports = seen(MetricFilter("log"), values)
    assert reports[299].slope == pytest.approx(0.0, abs=1e-9) and reports[299].level == pytest.approx(0.7)
    assert 0.03 < reports[-1].noise < 0.3 and reports[-1].level == pytest.approx(0.7, abs=0.15)


# -- laws ------------------------------------------------------------------------------------------------------------


@given(links, updates)
@settings(max_examples=200, deadline=None)
def test_any_values_any_gaps_no_exception_and_all_is_finite(link: str, items: Any) -> None:
    found, step = MetricFilter(link, KNOBS), 0
    for gap, value, moves in items:
        step += gap
        report = found.update(step, value, moves)
        assert 0.0 <= found.helped() <= 1.0
        assert all(math.isfinite(v) for name in KNOBS for v in found.effect(name))
        if report is None:
            continue
        numbers = [getattr(report, name) for name in FilterReport.__slots__]
        assert all(math.isfinite(v) for v in numbers), report
        assert min(report.level_std, report.slope_std, report.noise) >= 0.0
        assert abs(report.surprise) <= SURPRISE_LIMIT and abs(report.shift) <= SHIFT_LIMIT
        if link == "logit":
            assert 0.0 <= report.level <= 1.0
        if link == "log":
            assert report.level > 0.0
    json.dumps(found.state_dict(), allow_nan=False)


@given(links, st.lists(st.floats(-1e30, 1e30), max_size=200))
@settings(max_examples=50, deadline=None)
def test_long_series_of_any_size_stay_finite(link: str, values: list[float]) -> None:
    for report in fed(MetricFilter(link), values):
        assert report is None or all(math.isfinite(getattr(report, name)) for name in FilterReport.__slots__)


@given(links, updates, st.data())
@settings(max_examples=100, deadline=None)
def test_a_resume_at_any_cut_changes_no_report(link: str, items: Any, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(items)))
    whole_run, resumed = MetricFilter(link, KNOBS), MetricFilter(link, KNOBS)
    step = 0
    for index, (gap, value, moves) in enumerate(items):
        if index == cut:
            text = json.dumps(resumed.state_dict())
            resumed = MetricFilter(link, KNOBS)
            resumed.load_state_dict(json.loads(text))
        step += gap
        assert whole_run.update(step, value, moves) == resumed.update(step, value, moves)
        assert whole_run.helped() == resumed.helped()
    assert json.dumps(whole_run.state_dict()) == json.dumps(resumed.state_dict())


@given(whole, st.floats(1e-6, 1e6), st.integers(-(10**6), 10**6))
@settings(deadline=None)
def test_neither_shift_nor_scale_is_seen_in_what_is_normalised(values: list[float], scale: float, shift: int) -> None:
    changed = [scale * v + scale * shift for v in values]
    assert parted(MetricFilter(), values, MetricFilter(), changed, scale, scale * shift) == []


@given(whole, st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_of_a_log_metric_the_scale_is_not_seen(values: list[float], scale: float) -> None:
    positive = [2.0 + v / 1000.0 for v in values]
    changed = [scale * v for v in positive]
    assert parted(MetricFilter("log"), positive, MetricFilter("log"), changed, scale, 0.0) == []


def parted(
    was: MetricFilter, values: Any, now: MetricFilter, changed: Any, scale: float, shift: float
) -> list[tuple[FilterReport, FilterReport]]:
    """The pairs of reports that are not the same but for ``scale`` and ``shift``."""
    generator, found = np.random.default_rng(0), []
    for step, (value, other) in enumerate(zip(values, changed, strict=True), start=1):
        # A little noise: of an exactly constant series rounding would be all the noise there is.
        wobble = 0.01 * (1.0 + abs(value)) * generator.normal()
        a, b = was.update(step, value + wobble), now.update(step, other + scale * wobble)
        assert a is not None and b is not None
        unit = scale * max(a.noise, 1e-9) * 1e-3
        same = (
            (a.changed, a.count) == (b.changed, b.count)
            and b.surprise == pytest.approx(a.surprise, rel=1e-3, abs=1e-3)
            and b.shift == pytest.approx(a.shift, rel=1e-3, abs=1e-3)
            and b.level == pytest.approx(scale * a.level + shift, abs=unit + 1e-9 * abs(shift))
            and b.slope == pytest.approx(scale * a.slope, rel=1e-3, abs=unit)
        )
        found += [] if same else [(a, b)]
    return found


@given(whole)
@settings(deadline=None)
def test_upside_down_all_signs_turn(values: list[float]) -> None:
    was, now = seen(MetricFilter(), values)[-1], seen(MetricFilter(), [-v for v in values])[-1]
    assert (now.level, now.slope, now.surprise, now.noise) == (-was.level, -was.slope, -was.surprise, was.noise)


def test_a_missing_value_only_makes_less_sure() -> None:
    found = MetricFilter("log")
    before = seen(found, 2.0 + 0.1 * np.random.default_rng(0).normal(size=50))[-1]
    for gap in (1, 5, 1000, 10**9):
        after = found.update(50 + gap, math.nan)
        assert after is not None
        assert after.level_std > before.level_std and after.count == before.count and after.surprise == 0.0
        before = after


def test_a_step_back_is_no_time() -> None:
    found = MetricFilter()
    before = seen(found, [1.0, 1.1, 0.9, 1.0, 1.2, 0.8])[-1]
    after = found.update(2, None)
    assert after is not None and after.step == 2
    assert (after.level, after.slope, after.level_std) == (before.level, before.slope, before.level_std)


@pytest.mark.parametrize("values", [[], [math.nan] * 5, [None], [math.inf, -math.inf]])
def test_of_nothing_nothing_is_said(values: list[float | None]) -> None:
    assert fed(MetricFilter("log"), values) == [None] * len(values)
    assert fed(MetricFilter("log"), [-1.0]) == fed(MetricFilter("logit"), [1.5]) == [None]


def test_forgotten_is_as_new() -> None:
    found = steered(-0.3, 0)
    found.reset()
    assert found.state_dict() == MetricFilter("identity", KNOBS).state_dict()


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("logarithm",), "link='logarithm'"),
        (("log", (), "down"), "better='down'"),
        (("log", ("a", "a")), "names one twice"),
    ],
)
def test_a_wrong_filter_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MetricFilter(*arguments)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda s: s.update(link="log"), "link='log'"),
        (lambda s: s.update(knobs=["learning_rate"]), "knobs="),
        (lambda s: s.pop("x"), "lacks 'x'"),
        (lambda s: s["memory"].pop("noise"), "lacks 'noise'"),
        (lambda s: s["memory"].update(noise=-1.0), "noise=-1.0"),
        (lambda s: s["memory"].update(noise=math.nan), "noise="),
        (lambda s: s["memory"].update(log_drift=5.0), "log_drift=5.0"),
        (lambda s: s["memory"].update(first=[]), "0 first values"),
        (lambda s: s["memory"].update(rising=None), "damaged"),
        (lambda s: s.update(x=[0.0]), "shapes"),
        (lambda s: s.update(x=[math.inf] * 4), "not finite"),
        (lambda s: s["p"][1].__setitem__(1, -1.0), "negative variance"),
        (lambda s: s.update(memory=3), "damaged"),
    ],
)
def test_a_damaged_state_is_refused_whole(damage: Any, message: str) -> None:
    found = steered(-0.3, 0)
    before = json.dumps(found.state_dict())
    state = json.loads(before)
    damage(state)
    with pytest.raises(ValueError, match=message):
        found.load_state_dict(state)
    assert json.dumps(found.state_dict()) == before
