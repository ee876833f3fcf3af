"""Three scores of a run, each in [0, 1] with a reason."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_run import EVENTFUL, context, falling, make_manager, observations, report, show

from tts_brain.coordination.criteria import criteria, slope_z
from tts_brain.types import FilterReport, Scales

numbers = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 0.0])
SWINGING = Scales(100, 1.0, 0.0, 10.0, 0.1, (1.0,), 6.0, 4.0)


def filtered(slope: float, std: float, count: int = 50) -> FilterReport:
    return FilterReport(100, 1.0, 0.1, slope, std, 0.1, 0.0, 0.0, changed=False, count=count)


@given(
    z=st.floats(-1e3, 1e3),
    spikes=st.floats(0, 1),
    ratio=numbers,
    diag=st.floats(0, 1) | st.sampled_from([math.nan, 1e38, -1e38]),
    bad=st.integers(0, 5),
)
def test_every_score_is_in_0_to_1_and_has_a_reason(
    z: float, spikes: float, ratio: float, diag: float, bad: int
) -> None:
    seen = context(loss_z=z, grad_spikes=spikes, update_ratio=ratio, nonfinite_losses=bad)
    for attention in (None, report(diag)):
        for one in criteria(replace(seen, attention=attention)).by_name.values():
            assert 0.0 <= one.score <= 1.0 and one.reason.strip()


@given(st.floats(-8, 8), st.floats(-8, 8))
def test_a_loss_that_falls_more_surely_scores_no_less(a: float, b: float) -> None:
    more, less = (criteria(context(loss_z=z)).convergence.score for z in (min(a, b), max(a, b)))
    assert more >= less


def test_a_flat_loss_and_one_not_seen_score_a_half() -> None:
    assert criteria(context(loss_z=0.0)).convergence.score == 0.5
    assert criteria(context(trends={})).convergence.score == 0.5
    assert criteria(context(trends={"mel": falling(-9.0, count=3)})).convergence.score == 0.5


def test_the_filter_comes_before_the_window_once_it_has_seen_enough() -> None:
    assert slope_z(context(loss_z=-5.0, filtered={"loss": filtered(2.0, 1.0)})) == 2.0
    assert slope_z(context(loss_z=-5.0, filtered={"loss": filtered(2.0, 1.0, count=3)})) == -5.0
    assert slope_z(context(loss_z=-5.0, filtered={"loss": filtered(1.0, 1e-9)})) == 100.0


@pytest.mark.parametrize(
    ("trouble", "word"),
    [
        ({"grad_spikes": 0.15}, "spike"),
        ({"update_ratio": 0.04}, "change by 4.0%"),
        ({"scales": {"mel": SWINGING}}, "swings"),
    ],
)
def test_each_trouble_of_the_gradients_halves_their_health_and_is_named(trouble: dict, word: str) -> None:
    assert criteria(context()).gradient_health.score == 1.0
    health = criteria(context(**trouble)).gradient_health
    assert health.score == pytest.approx(0.5) and word in health.reason


def test_troubles_add_up_and_a_step_that_is_not_finite_is_the_worst() -> None:
    both = criteria(context(grad_spikes=0.15, update_ratio=0.04)).gradient_health
    assert both.score == pytest.approx(0.25) and "spike" in both.reason and "change" in both.reason
    assert criteria(context(nonfinite_losses=1)).gradient_health.score == 0.0


def test_a_slow_swing_is_the_epochs_own_and_no_trouble() -> None:
    slow = replace(SWINGING, period=20.0)
    assert criteria(context(scales={"mel": slow})).gradient_health.score == 1.0


def test_attention_is_as_good_as_its_weakest_side_and_the_side_is_named() -> None:
    seen = context(attention=report(0.3, diagonality=0.9, focus=0.8, coverage=0.3))
    assert criteria(seen).attention_quality.score == 0.3
    assert "coverage" in criteria(seen).attention_quality.reason


def test_the_scores_tell_a_healthy_stretch_of_a_run_from_trouble() -> None:
    manager, scores = make_manager(mode="observe"), {}
    for observation in observations(EVENTFUL):
        show(manager, observation)
        scores[observation.step] = criteria(manager.context())
    assert scores[60].convergence.score > 0.95 > 0.3 > scores[182].convergence.score
    assert scores[60].gradient_health.score > 0.9 > 0.3 > scores[182].gradient_health.score
    assert scores[60].attention_quality.score < 0.2 < 0.7 < scores[271].attention_quality.score
