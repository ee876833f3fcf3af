import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import context

from tts_brain.feedback.manager import FeedbackLoopManager, Judgement
from tts_brain.types import LEARNING_RATE, Observation, TrainingPhase

MOVE = {LEARNING_RATE: (1.0, 1.5)}
NOISE = 0.05
seeds = st.integers(0, 10**6)


def numbered(values) -> list[tuple[int, float]]:
    return [(i, float(v)) for i, v in enumerate(values, start=1)]


def noise(seed: int, count: int = 40) -> np.ndarray:
    return NOISE * np.random.default_rng(seed).normal(size=count)


def judged(before, after, at_move=None, at_end=None, feedback: FeedbackLoopManager | None = None) -> Judgement:
    """The judgement on a move made after ``before``, once all of ``after`` is seen."""
    series = numbered([*before, *after])
    feedback = feedback or FeedbackLoopManager()
    feedback.open(len(before), MOVE, context(step=len(before), **(at_move or {})), series[: len(before)])
    return feedback.judge(context(step=len(series), **(at_end or {})), series)


def flat(level: float, seed: int, count: int = 20) -> np.ndarray:
    return level + noise(seed, count)


@settings(max_examples=30)
@given(seeds, st.floats(0.3, 10))
def test_a_move_after_which_the_loss_stands_higher_is_not_kept(seed: int, rise: float) -> None:
    judgement = judged(flat(2.0, seed), flat(2.0 + rise, seed + 1))
    assert judgement.kept is False and "higher" in judgement.reason


@settings(max_examples=30)
@given(seeds, st.floats(0.1, 1.5))
def test_a_move_after_which_the_loss_stands_lower_is_kept(seed: int, fall: float) -> None:
    assert judged(flat(2.0, seed), flat(2.0 - fall, seed + 1)).kept is True


def test_on_noise_alone_a_move_is_seldom_condemned() -> None:
    condemned = sum(judged(flat(2.0, s), flat(2.0, s + 10_000)).kept is False for s in range(200))
    assert condemned / 200 < 0.08


@pytest.mark.parametrize("slope", [0.02, 0.05, 0.2])
def test_a_rise_before_the_move_does_not_condemn_it(slope: float) -> None:
    condemned = [0, 0]
    for seed in range(100):
        before = 2.0 + slope * np.arange(20) + noise(seed, 20)
        top = 2.0 + slope * 19
        for i, after in enumerate((np.full(20, top), top + slope * np.arange(1, 21))):  # stopped; not stopped yet
            condemned[i] += judged(before, after + noise(seed + 10_000, 20)).kept is False
    assert max(condemned) <= 12


def test_a_rise_that_goes_on_twice_as_fast_is_not_kept() -> None:
    before = 2.0 + 0.1 * np.arange(20) + noise(0, 20)
    assert judged(before, 4.0 + 0.2 * np.arange(20) + noise(1, 20)).kept is False


@settings(max_examples=30)
@given(seeds, st.floats(0.03, 0.2))
def test_a_fall_before_the_move_does_not_save_it(seed: int, slope: float) -> None:
    before = 8.0 - slope * np.arange(20) + noise(seed, 20)
    # Half the way back up: still under the mean of the steps before, yet clearly worse than where the move found it.
    after = before[-1] + slope * 10 + noise(seed + 1, 20)
    assert judged(before, after).kept is False


@given(seeds, st.integers(0, 19), st.integers(0, 19), st.floats(1, 1e6))
def test_one_spike_on_either_side_decides_nothing(seed: int, early: int, late: int, spike: float) -> None:
    before, better, worse = flat(2.0, seed), flat(1.5, seed + 1), flat(3.0, seed + 2)
    before[early] += spike
    better[late] += spike
    assert judged(before, better).kept is True
    assert judged(before, worse).kept is False


@settings(max_examples=50)
@given(seeds, st.floats(-0.5, 0.5), st.sampled_from([2.0**-20, 0.5, 1024.0]), st.integers(-1000, 1000))
def test_shift_and_scale_of_the_loss_change_no_judgement(seed: int, change: float, scale: float, shift: int) -> None:
    before, after = flat(2.0, seed), flat(2.0 + change, seed + 1)
    was, now = judged(before, after), judged((before + shift) * scale, (after + shift) * scale)
    assert was.kept is now.kept
    assert was.evidence["loss_change_z"] == pytest.approx(now.evidence["loss_change_z"], rel=1e-6, abs=1e-6)


def test_spikes_since_the_move_condemn_it_and_spikes_before_do_not() -> None:
    before, after = flat(2.0, 0), flat(1.9, 1)
    assert judged(before, after, {"grad_spikes": 0.0}, {"grad_spikes": 0.3}).kept is False
    assert judged(before, after, {"grad_spikes": 0.3}, {"grad_spikes": 0.3}).kept is True


def test_alignment_lost_since_the_move_condemns_it() -> None:
    before, after = flat(2.0, 0), flat(1.9, 1)
    assert judged(before, after, {"attention_diag": 0.6}, {"attention_diag": 0.4}).kept is False
    assert judged(before, after, {"attention_diag": 0.4}, {"attention_diag": 0.6}).kept is True
    assert judged(before, after, {"attention": None}, {"attention_diag": 0.1}).kept is True


@pytest.mark.parametrize("count", [0, 3, 19])
def test_too_early_is_said_and_waits(count: int) -> None:
    aligned = {"phase": TrainingPhase.REFINEMENT}
    assert judged(flat(2.0, 0), flat(9.0, 1, count), aligned, aligned).kept is None
    assert judged(flat(2.0, 0), [math.nan] * 30).kept is None


def test_before_there_is_an_alignment_half_a_trial_is_enough() -> None:
    assert judged(flat(2.0, 0), flat(9.0, 1, 9)).kept is None
    assert judged(flat(2.0, 0), flat(9.0, 1, 10)).kept is False
    assert judged(flat(2.0, 0), flat(1.9, 1, 10)).kept is True


def test_without_a_move_there_is_nothing_to_judge() -> None:
    judgement = FeedbackLoopManager().judge(context(), numbered(flat(2.0, 0)))
    assert judgement.kept is None and "no move" in judgement.reason


def test_a_history_that_has_forgotten_the_steps_before_the_move_is_enough() -> None:
    for level, kept in ((3.0, False), (1.0, True)):
        feedback = FeedbackLoopManager()
        series = numbered([*flat(2.0, 0), *flat(level, 1, 60)])
        feedback.open(20, MOVE, context(step=20), series[:20])
        assert feedback.judge(context(step=80), series[-15:]).kept is kept


def test_a_move_right_after_a_new_regime_is_judged_by_the_rest() -> None:
    feedback = FeedbackLoopManager()
    feedback.open(20, MOVE, context(step=20), [])
    series = numbered(flat(2.0, 0, 40))[20:]
    assert feedback.judge(context(step=40), series).kept is True
    assert feedback.judge(context(step=40, grad_spikes=0.5), series).kept is False


# the run as a whole


def watched(values, feedback: FeedbackLoopManager | None = None, every: int = 5, keep: int = 100) -> list[str]:
    """What ``broken`` said along the series."""
    feedback = feedback or FeedbackLoopManager()
    series, said = numbered(values), []
    for end in range(every, len(series) + 1, every):
        said.append(feedback.broken(context(step=end), series[max(0, end - keep) : end]))
    return [s for s in said if s]


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(-0.02, 0.0))
def test_noise_and_a_falling_loss_are_no_divergence(seed: int, slope: float) -> None:
    assert watched(4.0 + slope * np.arange(400) + noise(seed, 400)) == []


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(1.0, 1e6), st.integers(1, 4))
def test_a_few_bad_batches_are_no_divergence(seed: int, spike: float, count: int) -> None:
    values = flat(2.0, seed, 200)
    values[100 : 100 + count] += spike
    assert watched(values, every=1) == []


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(1.0, 1e6))
def test_a_loss_that_leaves_for_good_is_a_divergence(seed: int, rise: float) -> None:
    said = watched([*flat(2.0, seed, 60), *flat(2.0 + rise, seed + 1, 20)])
    assert said and "noise widths above its best" in said[0]


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([2.0**-20, 0.25, 1024.0]), st.integers(-100, 100))
def test_shift_and_scale_change_no_alarm(seed: int, scale: float, shift: int) -> None:
    values = np.concatenate([flat(2.0, seed, 60), 2.0 + 0.05 * np.arange(40) + noise(seed, 40)])
    assert len(watched(values)) == len(watched((values + shift) * scale)) > 0


def lost(diags: list[float], every: int = 5) -> list[bool]:
    feedback, best, said = FeedbackLoopManager(), 0.0, []
    for i, diag in enumerate(diags):
        best = max(best, diag)
        seen = context(step=i * every, attention_diag=diag, best_attention_diag=best)
        said.append(feedback.broken(seen, []) is not None)
    return said


def test_an_alignment_lost_for_long_is_an_alarm_and_a_short_dip_is_not() -> None:
    assert not any(lost([0.7] * 10 + [0.1] * 10 + [0.5] * 10 + [0.1] * 10))
    assert lost([0.7] * 10 + [0.1] * 12)[-2:] == [True, True]
    assert not any(lost([0.4] * 10 + [0.05] * 40))  # it never was aligned


@settings(max_examples=15, deadline=None)
@given(seeds, st.floats(0.5, 0.95))
def test_an_alignment_that_wavers_is_no_alarm(seed: int, level: float) -> None:
    wavering = np.clip(level + 0.1 * np.random.default_rng(seed).normal(size=200), 0, 1)
    assert not any(lost(list(wavering)))


# state


@settings(max_examples=15, deadline=None)
@given(seeds, st.integers(1, 79), st.floats(-0.5, 0.5))
def test_a_saved_state_continues_alike(seed: int, cut: int, change: float) -> None:
    series = numbered([*flat(2.0, seed), *flat(2.0 + change, seed + 1, 60)])

    def go(feedback: FeedbackLoopManager, first: int, last: int) -> list:
        said = []
        for step in range(first, last + 1):
            if step == 20:
                feedback.open(step, MOVE, context(step=step), series[:step])
            seen = context(step=step)
            judgement = feedback.judge(seen, series[:step])
            said.append((judgement.kept, judgement.reason, feedback.broken(seen, series[:step])))
        return said

    whole, first, second = FeedbackLoopManager(), FeedbackLoopManager(), FeedbackLoopManager()
    expected = go(whole, 1, 80)
    go(first, 1, cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert go(second, cut + 1, 80) == expected[cut:]


@pytest.mark.parametrize(
    "damage",
    [
        {"lost_since": "x"},
        {"best_level": None},
        {"trial": []},
        {"trial": {"moves": {"learning_rate": [0.0, 1.0]}}},
        {"trial": {"moves": {"learning_rte": [1.0, 1.0]}}},
        {"trial": {"loss_count": 0}},
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: dict) -> None:
    feedback = FeedbackLoopManager()
    feedback.open(20, MOVE, context(step=20), numbered(flat(2.0, 0)))
    before = feedback.state_dict()
    if isinstance(damage.get("trial"), dict):
        damage = {"trial": {**before["trial"], **damage["trial"]}}
    with pytest.raises((ValueError, TypeError, KeyError)):
        feedback.load_state_dict({**before, **damage})
    assert feedback.state_dict() == before


def test_after_a_reset_nothing_is_remembered() -> None:
    feedback = FeedbackLoopManager()
    watched(flat(2.0, 0, 60), feedback)
    feedback.open(60, MOVE, context(step=60), numbered(flat(2.0, 0, 60)))
    feedback.reset_baseline()
    assert feedback.state_dict() == FeedbackLoopManager().state_dict()


def told(feedback: FeedbackLoopManager, slopes: list[float], moved_at: int, new: float) -> list[tuple[int, float]]:
    """Shows a run whose rate moves from 1 to ``new`` after ``moved_at`` steps; its loss series."""
    rng, level, series = np.random.default_rng(1), 5.0, []
    for step, slope in enumerate(slopes, start=1):
        level += slope
        series.append((step, level + 0.02 * rng.normal()))
        rate = new if step > moved_at else 1.0
        feedback.observe(Observation(step, {"total": series[-1][1], "mel": series[-1][1]}), {LEARNING_RATE: rate})
    return series


@pytest.mark.parametrize(("after", "kept"), [(-0.04, True), (0.0, False)])
def test_a_raise_after_which_the_loss_falls_less_is_taken_back_though_it_does_not_stand_higher(
    after: float, kept: bool
) -> None:
    feedback = FeedbackLoopManager()
    slopes = [-0.02] * 60 + [after] * 20
    series = told(feedback, slopes, 60, 1.5)
    feedback.open(60, MOVE, context(step=60), series[:60])
    judgement = feedback.judge(context(step=80), series)
    assert judgement.kept is kept
    assert (judgement.evidence["helped"] > 0.5) is kept


def test_a_raise_that_does_clear_harm_is_taken_back_in_the_middle_of_its_trial() -> None:
    feedback = FeedbackLoopManager()
    series = told(feedback, [-0.02] * 60 + [0.06] * 10, 60, 1.5)
    feedback.open(60, MOVE, context(step=60), series[:60])
    assert feedback.judge(context(step=69), series).kept is None
    assert feedback.judge(context(step=70), series).kept is False


def test_a_rate_lowered_in_a_rise_is_not_taken_back_because_the_rise_goes_on() -> None:
    feedback = FeedbackLoopManager()
    series = told(feedback, [0.02] * 80, 60, 0.7)
    feedback.open(60, {LEARNING_RATE: (1.0, 0.7)}, context(step=60), series[:60])
    assert feedback.judge(context(step=80), series).kept is True
