import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_run import context

from tts_brain.coordination.risk import RiskAssessor
from tts_brain.types import KNOBS, LEARNING_RATE

UP = {LEARNING_RATE: (1.0, 1.5)}
DOWN = {LEARNING_RATE: (1.5, 1.0)}
outcomes = st.lists(st.booleans(), max_size=20)


def taught(outcomes: list[bool], moves=UP) -> RiskAssessor:
    risk = RiskAssessor()
    for kept in outcomes:
        risk.learn(moves, kept=kept)
    return risk


def of_raise(risk: RiskAssessor, new: float = 1.5, **seen) -> float:
    return risk.assess(context(**seen), {LEARNING_RATE: 1.0}, {LEARNING_RATE: new}).probability


@given(outcomes, st.floats(0, 1), st.sampled_from(sorted(KNOBS)), st.data())
def test_it_is_a_probability_with_a_reason(outcomes: list, spikes: float, name: str, data: st.DataObject) -> None:
    knob = KNOBS[name]
    old, new = (data.draw(st.floats(knob.low, knob.high)) for _ in range(2))
    risk = taught(outcomes, {name: (old, new)}).assess(context(grad_spikes=spikes), {name: old}, {name: new})
    assert 0.0 <= risk.probability <= 1.0 and risk.reason


@given(outcomes)
def test_each_undone_move_raises_it_and_each_kept_one_lowers_it(outcomes: list) -> None:
    now = of_raise(taught(outcomes))
    assert of_raise(taught([*outcomes, False])) > now > of_raise(taught([*outcomes, True]))


@given(outcomes, st.floats(1.0, 1.5), st.floats(1.0, 1.5))
def test_a_larger_move_is_no_less_risky(outcomes: list, a: float, b: float) -> None:
    risk = taught(outcomes)
    assert of_raise(risk, min(a, b)) <= of_raise(risk, max(a, b))


def test_spikes_make_a_raise_riskier_and_a_cut_not() -> None:
    risk = RiskAssessor()
    assert of_raise(risk, grad_spikes=0.3) > of_raise(risk)
    assert of_raise(risk, 0.7, grad_spikes=0.3) == of_raise(risk, 0.7)


def test_up_and_down_are_judged_apart() -> None:
    assert of_raise(taught([False] * 5, DOWN)) == of_raise(RiskAssessor())


def test_a_joint_move_is_as_risky_as_its_riskiest_part() -> None:
    risk = taught([False] * 3)
    before = {LEARNING_RATE: 1.0, "mel_weight": 1.0}
    parts = [risk.assess(context(), before, {n: 1.2}).probability for n in before]
    assert risk.assess(context(), before, dict.fromkeys(before, 1.2)).probability == max(parts)


def test_what_does_not_move_has_no_risk_and_what_hardly_moves_no_blame() -> None:
    assert of_raise(RiskAssessor(), 1.0) == 0.0
    assert of_raise(taught([False] * 5, {LEARNING_RATE: (1.0, 1.01)})) == of_raise(RiskAssessor())


def test_the_record_comes_back_and_a_damaged_one_is_refused() -> None:
    risk, other = taught([True, False, False]), RiskAssessor()
    state = json.loads(json.dumps(risk.state_dict()))
    other.load_state_dict(state)
    assert other.state_dict() == risk.state_dict()
    for wrong in ("x", -1.0, float("nan")):
        with pytest.raises(ValueError):
            other.load_state_dict({"kept": {}, "undone": {"learning_rate:up": wrong}})
    assert other.state_dict() == risk.state_dict()


def test_a_vetoed_kind_of_move_is_tried_again_some_day() -> None:
    risk = taught([False] * 4)
    assert of_raise(risk) > 0.4
    for _ in range(200):
        risk.fade()
    assert of_raise(risk) < 0.3
