import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_run import Stretch, context, observations

from tts_brain.coordination.dynamics import Course, Dynamics
from tts_brain.coordination.outlook import dynamics
from tts_brain.coordination.risk import PHASE_BUDGET, RiskAssessor, added
from tts_brain.feedback.filters import RunFilters
from tts_brain.types import GRAD_CLIP, GUIDED_WEIGHT, KNOBS, LEARNING_RATE, MEL_WEIGHT, TrainingPhase

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
            other.load_state_dict({"kept": {}, "undone": {"learning_rate:up": wrong}, "trust": 1.0})
        with pytest.raises(ValueError):
            other.load_state_dict({"kept": {}, "undone": {}, "trust": wrong})
    assert other.state_dict() == risk.state_dict()


def test_a_vetoed_kind_of_move_is_tried_again_some_day() -> None:
    risk = taught([False] * 4)
    assert of_raise(risk) > 0.4
    for _ in range(200):
        risk.fade()
    assert of_raise(risk) < 0.3


# the outlook

RAISE = {LEARNING_RATE: math.log(1.5), MEL_WEIGHT: 0.1}
CALM = Dynamics(Course(0.0, slope=-0.05, noise=1.0, drift=1e-5, prior_std=0.02), 8.0)


def harmful(mean: float, **more) -> Dynamics:
    """A raise of the rate by e makes the slope worse by ``mean`` noise widths a step."""
    course = Course(0.0, slope=-0.05, noise=1.0, drift=1e-5, effects={LEARNING_RATE: (mean, 0.05)}, prior_std=0.02)
    return Dynamics(course, 8.0, **more)


def test_a_harmless_move_goes_through_a_harmful_one_is_halved_and_a_deadly_one_held() -> None:
    sizes = [RiskAssessor().weigh(context(), RAISE, course).size for course in (CALM, harmful(0.8), harmful(5.0))]
    assert sizes == [1.0, 0.5, 0.0]
    halved = RiskAssessor().weigh(context(), RAISE, harmful(0.8))
    assert halved.moves == {knob: move / 2 for knob, move in RAISE.items()}
    assert "halved" in halved.notes[0]
    assert halved.outlook is not None and halved.adds > halved.budget >= added(halved.outlook)
    assert not any(RiskAssessor().weigh(context(), RAISE, harmful(5.0)).moves.values())


def test_what_happens_anyway_is_no_reason_against_a_move() -> None:
    """A run that diverges if held: the same harmless raise adds nothing to that."""
    lost = Dynamics(Course(0.0, slope=1.0, noise=1.0, drift=1e-5, prior_std=0.01), 8.0)
    weighed = RiskAssessor().weigh(context(), RAISE, lost)
    assert weighed.size == 1.0 and weighed.outlook is not None
    assert weighed.outlook.divergence > 0.9 and added(weighed.outlook) < 0.05


def test_an_alignment_that_would_be_lost_counts_as_much_as_a_divergence() -> None:
    attention = Course(1.0, noise=0.2, drift=1e-5, effects={LEARNING_RATE: (-0.3, 0.02)}, prior_std=0.01)
    course = Dynamics(CALM.loss, 8.0, attention, 0.75)
    weighed = RiskAssessor().weigh(context(phase=TrainingPhase.CONVERGENCE), RAISE, course)
    assert weighed.size < 1.0 and weighed.outlook is not None and weighed.outlook.divergence == 0.0


def test_what_calms_is_let_through_whole() -> None:
    """Also where the filters fear it, and beside what is held."""
    cut = {LEARNING_RATE: math.log(0.7), GRAD_CLIP: -1.0}
    fears = Dynamics(Course(0.0, noise=1.0, drift=1e-5, effects={LEARNING_RATE: (-9.0, 0.1)}), 8.0)
    assert RiskAssessor().weigh(context(), cut, fears).moves == cut
    guided = Dynamics(Course(0.0, noise=1.0, drift=1e-5, effects={GUIDED_WEIGHT: (9.0, 0.1)}), 8.0)
    assert RiskAssessor().weigh(context(), {**cut, GUIDED_WEIGHT: 0.3}, guided).moves == {**cut, GUIDED_WEIGHT: 0.0}


def test_the_budget_falls_with_the_phase_and_with_moves_taken_back_and_comes_back() -> None:
    risk, phases = RiskAssessor(), list(TrainingPhase)
    assert [risk.budget(context(phase=phase)) for phase in phases] == list(PHASE_BUDGET)
    assert list(PHASE_BUDGET) == sorted(PHASE_BUDGET, reverse=True)
    full, seen = risk.budget(context()), []
    for kept in (False, False, False, True, True, True):
        risk.learn(UP, kept=kept)
        seen.append(risk.budget(context()) / full)
    assert seen == [0.5, 0.25, 0.25, 0.5, 1.0, 1.0]
    risk.learn(UP, kept=False)
    for _ in range(100):
        risk.fade()
    assert risk.budget(context()) == full


def test_a_move_let_through_in_trust_is_halved_after_moves_were_taken_back() -> None:
    course, risk = harmful(0.6), RiskAssessor(max_risk=1.0)
    assert risk.weigh(context(), RAISE, course).size == 1.0
    risk.learn(UP, kept=False)
    risk.learn(UP, kept=False)
    assert risk.weigh(context(), RAISE, course).size < 1.0


def test_what_the_book_calls_too_risky_is_left_out_and_the_rest_stays() -> None:
    weighed = taught([False] * 5).weigh(context(), RAISE, None)
    assert weighed.moves == {MEL_WEIGHT: 0.1} and set(weighed.left_out) == {LEARNING_RATE}
    assert weighed.notes[0].startswith("too risky, left out: learning_rate up: about 5 of 5")


def test_the_same_seed_and_step_give_the_same_outlook_and_others_another() -> None:
    def outlook(seed: int, step: int):
        return RiskAssessor(seed=seed).weigh(context(step=step), RAISE, harmful(0.5)).outlook

    assert outlook(0, 100) == outlook(0, 100)
    assert len({outlook(*at).gain for at in ((0, 100), (1, 100), (0, 110))}) == 3


# the course that the filters give


def filters_after(scale: float = 1.0, shift: float = 0.0, slope: float = -0.02) -> RunFilters:
    filters = RunFilters()
    for o in observations([Stretch(60, slope=slope, attention=0.6)], 0, scale, shift):
        filters.observe(o, {LEARNING_RATE: 1.0 if o.step < 30 else 1.5})
    return filters


def test_the_course_is_the_filters_in_noise_widths() -> None:
    filters = filters_after()
    loss, course = filters.metric("loss"), dynamics(filters, 0.6, 8.0)
    assert course is not None and course.attention is not None
    assert course.loss.noise == 1.0 and course.loss.level == 0.0 and course.divergence_limit == 8.0
    assert course.loss.slope == pytest.approx(filters.reports["loss"].slope / loss.noise)
    mean, std = course.loss.effect(LEARNING_RATE)
    assert (mean * loss.noise, std * loss.noise) == pytest.approx(loss.effect(LEARNING_RATE))
    assert course.loss.effect(GUIDED_WEIGHT) == (0.0, loss.effect_prior / loss.noise)


@pytest.mark.parametrize(("scale", "shift"), [(4.0, 0.0), (1.0, 16.0), (0.125, -3.0)])
def test_the_unit_and_the_zero_of_the_loss_change_no_outlook(scale: float, shift: float) -> None:
    was, now = (dynamics(filters_after(*args), 0.6, 8.0) for args in ((), (scale, shift)))
    assert was is not None and now is not None
    assert now.loss.slope == pytest.approx(was.loss.slope, rel=1e-9)
    a, b = (RiskAssessor().weigh(context(), RAISE, course).outlook for course in (was, now))
    assert a is not None and b is not None
    assert (b.divergence, b.alignment_loss) == (a.divergence, a.alignment_loss)


def test_there_is_no_course_before_enough_was_seen() -> None:
    assert dynamics(RunFilters(), 0.0, 8.0) is None
