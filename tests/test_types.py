import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.types import (
    KNOBS,
    PHASE_LIMITS,
    Capabilities,
    Decision,
    Knob,
    Proposal,
    TrainingPhase,
    Verdict,
)

any_float = st.floats()
positive = st.floats(1e-6, 1e6)


@st.composite
def knobs(draw) -> Knob:
    low, high = sorted((draw(positive), draw(positive)))
    neutral = draw(st.none() | st.floats(low, high))
    scale = draw(st.just(0.0) | positive)
    return Knob("k", "unit", neutral, low, max(high, low * 1.001), draw(st.floats(1.001, 1e3)), scale)


@given(
    knob=knobs() | st.sampled_from(sorted(KNOBS.values(), key=lambda k: k.name)), current=any_float, wanted=any_float
)
def test_limit_stays_in_bounds_and_within_the_ratio(knob: Knob, current: float, wanted: float) -> None:
    value = knob.limit(current, wanted)
    assert knob.low <= value <= knob.high
    if not math.isnan(current):
        bounded = min(max(current, knob.low), knob.high)
        assert abs(knob.move(bounded, value)) <= math.log(knob.max_ratio) + 1e-9


@given(knob=knobs(), current=positive, wanted=positive)
def test_limit_goes_the_wanted_way_and_never_past_it(knob: Knob, current: float, wanted: float) -> None:
    bounded = knob.limit(current, current)
    value = knob.limit(current, wanted)
    target = min(max(wanted, knob.low), knob.high)
    rounding = 1e-15 * (target + knob.scale)
    assert min(bounded, target) - rounding <= value <= max(bounded, target) + rounding


@given(knob=knobs(), old=positive, way=positive, new=positive)
def test_moves_in_a_row_add_up_and_can_be_made_again(knob: Knob, old: float, way: float, new: float) -> None:
    move = knob.move(old, new)
    assert move == pytest.approx(knob.move(old, way) + knob.move(way, new), abs=1e-9)
    assert knob.moved(old, move) == pytest.approx(new, rel=1e-9, abs=1e-9 * knob.scale)
    assert knob.limit(old, knob.moved(old, 0.0)) == pytest.approx(knob.limit(old, old), abs=1e-9 * knob.scale)


@given(knob=knobs(), current=positive, wanted=positive)
def test_what_is_within_reach_comes_back_as_it_was_said(knob: Knob, current: float, wanted: float) -> None:
    inside = knob.low <= wanted <= knob.high and knob.low <= current <= knob.high
    if inside and abs(knob.move(current, wanted)) < 0.999 * math.log(knob.max_ratio):
        assert knob.limit(current, wanted) == wanted


@given(knob=knobs(), current=positive)
def test_a_wish_that_is_not_finite_changes_nothing(knob: Knob, current: float) -> None:
    for wanted in (math.nan, math.inf, -math.inf):
        assert knob.limit(current, wanted) == min(max(current, knob.low), knob.high)


@pytest.mark.parametrize("limits", [(0, 1, 2), (-1, 1, 2), (1, 1, 2), (2, 1, 2), (1, math.inf, 2), (1, 2, 1)])
def test_a_knob_without_sense_is_refused(limits: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="write 0 < low < high, max_ratio > 1 and scale >= 0"):
        Knob("k", "unit", None, *limits)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_a_scale_without_sense_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="scale >= 0"):
        Knob("k", "unit", None, 1, 2, 2, scale)


def test_every_knob_may_stand_at_its_neutral_value() -> None:
    for name, knob in KNOBS.items():
        assert knob.name == name
        assert knob.neutral is None or knob.low <= knob.neutral <= knob.high


@given(st.floats(0, 1))
def test_the_phase_is_the_number_of_limits_passed(attention_diag: float) -> None:
    phase = TrainingPhase.from_attention_diag(attention_diag)
    edges = (0.0, *PHASE_LIMITS, math.inf)
    assert edges[phase.index] <= attention_diag < edges[phase.index + 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alignment": "magic"}, "attention, durations, monotonic_search, none"),
        ({"knobs": ("learning_rte",)}, "learning_rte.*known are learning_rate"),
        ({"losses": ("mel",)}, "lacks 'total'"),
        ({"grad_clip": 0.0}, "grad_clip=0.0; write a positive norm"),
        ({"grad_clip": float("nan")}, "grad_clip=nan"),
    ],
)
def test_capabilities_that_make_no_sense_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Capabilities("host", **wrong)


@pytest.mark.parametrize("reason", ["", "  \n"])
def test_no_record_goes_without_a_reason(reason: str) -> None:
    with pytest.raises(ValueError, match="reason"):
        Proposal("agent", {}, reason)
    with pytest.raises(ValueError, match="reason"):
        Decision(1, Verdict.HOLD, TrainingPhase.PRE_ALIGNMENT, {}, {}, reason)


def test_the_moves_of_a_decision_are_the_knobs_that_changed() -> None:
    before, after = {"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 2.0}
    decision = Decision(1, Verdict.ACCEPT, TrainingPhase.PRE_ALIGNMENT, before, after, "why")
    assert decision.moves == {"a": (1.0, 1.5)}


@given(st.sampled_from(list(KNOBS.values())), st.floats(0.01, 20.0), st.floats(0.01, 20.0), st.floats(0.01, 1.0))
def test_approach_goes_its_share_of_the_way_and_not_past(
    knob: Knob, current: float, target: float, share: float
) -> None:
    new = knob.approach(current, target, share)
    assert knob.move(current, new) == pytest.approx(share * knob.move(current, target), abs=1e-9)
