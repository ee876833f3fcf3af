"""Laws of the whole loop, over made-up runs."""

import copy
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_run import (
    EVENTFUL,
    HOST,
    Stretch,
    drive,
    fingerprint,
    make_manager,
    observations,
    plain,
    report,
    show,
)

from tts_brain.config import BrainConfig
from tts_brain.coordination.assessors import Opinion
from tts_brain.journal import to_plain
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import (
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    AttentionReport,
    Capabilities,
    Decision,
    Mode,
    Observation,
    StopTokenCounts,
    Verdict,
)

seeds = st.integers(0, 10**6)
stretches = st.lists(
    st.builds(
        Stretch,
        steps=st.integers(5, 40),
        slope=st.floats(-0.05, 0.3),
        noise=st.sampled_from([0.0, 0.01, 0.2, 5.0]),
        spikes=st.sampled_from([0.0, 0.0, 0.3]),
        attention=st.floats(0, 1),
        bad=st.sampled_from([0.0, 0.0, 0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=5,
)
modes = pytest.mark.parametrize("mode", ["assist", "full"])


# bounds


@modes
@settings(max_examples=8, deadline=None)
@given(course=stretches, seed=seeds, rate=st.sampled_from([0.1, 1.0]))
def test_every_decision_keeps_every_knob_in_bounds_and_within_its_ratio(
    mode: str, course: list, seed: int, rate: float
) -> None:
    """UNDO too: it takes back exactly one move, as the knobs on trial do not drift. Only the cut of the rate that
    follows a rollback is larger; it is not a decision but part of going back."""
    manager = make_manager(mode=mode, adaptation_rate=rate, cooldown_steps=0)
    for observation in observations(course, seed):
        before = dict(manager.knobs)
        decision = show(manager, observation)
        if decision is None:
            assert manager.knobs == before
            continue
        assert decision.before == before
        assert decision.verdict is Verdict.ROLL_BACK or manager.knobs == decision.after
        assert set(decision.after) == set(before) == set(KNOBS)
        for name, value in decision.after.items():
            knob = KNOBS[name]
            assert knob.low <= value <= knob.high
            assert abs(knob.move(before[name], value)) <= math.log(knob.max_ratio) + 1e-9
        for name, value in manager.knobs.items():
            assert KNOBS[name].low <= value <= KNOBS[name].high


def test_undo_brings_back_the_values_before_the_move() -> None:
    manager = make_manager(cooldown_steps=0)
    opened: Decision | None = None
    undone = 0
    for observation in observations([Stretch(20, slope=-0.05), Stretch(30, slope=0.03), Stretch(45, slope=-0.05)] * 3):
        had_trial = manager.feedback.trial
        decision = show(manager, observation)
        if decision is None:
            continue
        if decision.verdict is Verdict.UNDO:
            assert had_trial is not None and opened is not None
            undone += 1
            for name in had_trial.moves:
                assert decision.after[name] == opened.before[name]
                assert decision.before[name] == opened.after[name]
        if manager.feedback.trial is not None and manager.feedback.trial is not had_trial:
            opened = decision
    assert undone > 0


def test_only_knobs_that_the_host_has_and_the_user_gave_are_steered() -> None:
    host = Capabilities("bare", knobs=(LEARNING_RATE, GUIDED_WEIGHT))
    config = BrainConfig(knobs="learning_rate,mel_weight", decide_every=5)
    manager = ContextAwareTrainingManager(config, host)
    drive(manager, observations([Stretch(100, slope=-0.05)]))
    assert set(manager.knobs) == {LEARNING_RATE}


@pytest.mark.parametrize("values", [None, {}, {GUIDED_SIGMA: math.nan}])
def test_a_value_that_only_the_host_knows_must_be_given(values: dict | None) -> None:
    with pytest.raises(ValueError, match=r"guided_sigma.*host's own value"):
        ContextAwareTrainingManager(BrainConfig(), HOST, values)


# determinism and resume


# The rate is too high for a while, gradients spike, the loss rises, an alignment comes and is lost.
TROUBLED = (
    Stretch(40, slope=0.02, noise=0.5, spikes=0.08, attention=0.12),
    Stretch(22, slope=0.02, spikes=0.08, attention=0.35),
    Stretch(38, slope=-0.01, spikes=0.08, attention=0.2),
    Stretch(40, slope=0.04, noise=0.5, attention=0.2),
    Stretch(40, slope=-0.03, noise=0.2, spikes=0.08, attention=0.4),
    Stretch(40, slope=0.01, attention=0.4),
    Stretch(40, slope=-0.01, spikes=0.08, attention=0.6),
    Stretch(60, slope=-0.01, spikes=0.1, attention=0.05),
)


def decisions_in_trouble() -> list[Any]:
    stream = observations(TROUBLED)
    hot = (replace(o, learning_rate=1e-3, update_ratio=0.05) if 60 < o.step <= 90 else o for o in stream)
    return plain(drive(make_manager(divergence_sigmas=3.0), hot))


def printed_elsewhere(code: str) -> str:
    """What ``code`` prints in another process with another hash seed."""
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout.strip()


def test_another_process_with_another_hash_seed_decides_alike() -> None:
    assert printed_elsewhere("from simulated_run import fingerprint; print(fingerprint(3))") == fingerprint(3)


def test_and_in_trouble_too() -> None:
    here = decisions_in_trouble()
    settled = [d["coordination"] for d in here if "vote" in d["coordination"]]
    assert any(one["risk"]["size"] < 1.0 for one in settled), "the simulation cuts"
    assert any(one["vote"].get("no") and one["vote"]["approved"] for one in settled), "one objects"
    assert any(not one["vote"]["approved"] for one in settled), "no quorum"
    assert any(d["verdict"] == "roll_back" and "the alignment was" in d["reason"] for d in here)
    code = "import json, test_manager; print(json.dumps(test_manager.decisions_in_trouble()))"
    assert json.loads(printed_elsewhere(code)) == here


@lru_cache
def run_with_states(seed: int) -> tuple[list[Observation], dict[int, Any], dict[int, str]]:
    """Observations, decisions by step, and the state after each step as JSON text."""
    stream = list(observations(EVENTFUL, seed))
    manager, decisions, states = make_manager(), {}, {0: json.dumps(make_manager().state_dict())}
    for observation in stream:
        decision = show(manager, observation)
        if decision is not None:
            decisions[observation.step] = plain([decision])[0]
        states[observation.step] = json.dumps(manager.state_dict())
    return stream, decisions, states


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2), st.integers(0, 299))
def test_a_resume_at_any_cut_changes_no_decision(seed: int, cut: int) -> None:
    stream, decisions, states = run_with_states(seed)
    manager = make_manager()
    manager.load_state_dict(json.loads(states[cut]))
    assert json.dumps(manager.state_dict()) == states[cut]
    later = drive(manager, stream[cut : cut + 80])
    assert plain(later) == [d for step, d in decisions.items() if cut < step <= cut + 80]


def test_the_eventful_run_holds_every_kind_of_decision() -> None:
    seen = {d["verdict"] for seed in range(3) for d in run_with_states(seed)[1].values()}
    assert {"accept", "hold", "undo", "roll_back"} <= seen


def test_a_rolled_back_manager_goes_on_alike_from_a_copy() -> None:
    manager, twin = make_manager(), make_manager()
    drive(manager, observations(EVENTFUL[:7]))
    manager.rolled_back(failed_at=222, count=2, restored=True, trial=None)
    twin.load_state_dict(json.loads(json.dumps(manager.state_dict())))
    rest = [replace(o, step=o.step + 222) for o in observations(EVENTFUL[7:])]
    assert plain(drive(twin, rest)) == plain(drive(manager, rest))


# what the numbers mean


def proposals(decisions: list[Decision]) -> list[list[dict[str, float]]]:
    return [[dict(p.moves) for p in d.proposals] for d in decisions]


@settings(max_examples=2, deadline=None)
@given(seeds, st.sampled_from([2.0**-12, 4.0, 2.0**12]))
@example(131072, 2.0**-12)
def test_the_unit_of_the_losses_changes_no_decision(seed: int, scale: float) -> None:
    was, now = (drive(make_manager(), observations(EVENTFUL, seed, s)) for s in (1.0, scale))
    assert plain(now) == plain(was)


@pytest.mark.parametrize(("scale", "shift"), [(3.7, 0.0), (1.0, -100.0), (0.01, 7.0)])
def test_shift_and_scale_of_the_losses_change_no_proposal(scale: float, shift: float) -> None:
    was = drive(make_manager(), observations(EVENTFUL))
    now = drive(make_manager(), observations(EVENTFUL, 0, scale, shift))
    assert [d.verdict for d in was] == [d.verdict for d in now]
    for old, new in zip(proposals(was), proposals(now), strict=True):
        assert new == [pytest.approx(moves, rel=1e-6) for moves in old]


# whatever comes in

any_float = st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, -1e308, 1.7e308, 0.0, -0.0, 5e-324])
some_float = any_float | st.floats(0, 4)
any_observation = st.builds(
    Observation,
    step=st.just(0),
    losses=st.fixed_dictionaries({"total": some_float, "mel": some_float}, optional={"gate": any_float}),
    grad_norm=st.none() | some_float,
    learning_rate=st.none() | any_float,
    update_ratio=st.none() | any_float,
    attention=st.none() | st.builds(AttentionReport, *[st.floats(0, 1) | any_float] * 9),
    stop=st.none() | st.builds(StopTokenCounts, any_float, any_float, any_float),
    text_length=st.none() | any_float,
    skipped=st.booleans(),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(any_observation, min_size=1, max_size=10), seeds)
def test_no_float_anywhere_in_an_observation_raises(strange: list[Observation], seed: int) -> None:
    manager = make_manager(decide_every=1, trial_steps=4, cooldown_steps=0)
    plausible = observations([Stretch(60, slope=-0.05, attention=0.4)], seed)
    mixed = [replace(o, step=2 * i + j) for i, s in enumerate(strange) for j, o in enumerate((s, next(plausible)))]
    calm = [replace(o, step=o.step + 100) for o in observations([Stretch(10)], seed)]
    for decision in drive(manager, [*mixed, *calm]):
        assert decision.reason.strip()
    for name, value in manager.knobs.items():
        assert KNOBS[name].low <= value <= KNOBS[name].high
    make_manager().load_state_dict(json.loads(json.dumps(manager.state_dict())))


@pytest.mark.parametrize("extreme", [math.nan, math.inf, -math.inf, 1e308, -1e308, -1.0])
def test_a_run_of_nothing_but_one_absurd_float_raises_nothing(extreme: float) -> None:
    manager = make_manager(decide_every=1)
    absurd = Observation(
        step=0,
        losses={"total": extreme, "mel": extreme},
        grad_norm=extreme,
        learning_rate=extreme,
        update_ratio=extreme,
        attention=AttentionReport(*[extreme] * 9),
        stop=StopTokenCounts(extreme, extreme, extreme),
        text_length=extreme,
    )
    drive(manager, [replace(absurd, step=i) for i in range(1, 31)])


# modes


def test_in_observe_nothing_is_applied_and_the_wishes_are_written() -> None:
    manager = make_manager(mode="observe")
    start = dict(manager.knobs)
    decisions = drive(manager, observations(EVENTFUL))
    assert all(d.before == d.after == start and not d.applied for d in decisions)
    assert manager.knobs == start and manager.feedback.trial is None
    assert any(p.moves for d in decisions for p in d.proposals)
    assert Verdict.ROLL_BACK not in {d.verdict for d in decisions}


def test_every_decision_says_why() -> None:
    for mode in Mode:
        assert all(d.reason.strip() for d in drive(make_manager(mode=mode.value), observations(EVENTFUL[1:5], 1)))


# trouble

BAD = Stretch(12, bad=1.0)


def test_steps_that_are_not_finite_roll_back_in_full_and_only_hold_in_assist() -> None:
    course = [Stretch(40, slope=-0.02), BAD]
    full, assist = (drive(make_manager(mode=mode), observations(course)) for mode in ("full", "assist"))
    first = next(d for d in full if d.verdict is Verdict.ROLL_BACK)
    assert first.step == 43 and "3 steps in a row were not finite" in first.reason  # at once, not at the next due step
    assert {d.verdict for d in assist if d.step > 42} == {Verdict.HOLD}
    assert all("not finite" in d.reason for d in assist if d.step > 42)


def test_steps_left_out_under_finite_losses_take_long_to_count_as_a_break() -> None:
    """Half precision that looks for its loss scale: the guard has kept the weights, so going back mends nothing."""
    stream = list(observations([Stretch(80, slope=-0.02)]))
    left_out = [replace(o, skipped=o.step > 40, grad_norm=math.nan if o.step > 40 else o.grad_norm) for o in stream]
    verdicts = {d.step: d.verdict for d in drive(make_manager(), left_out) if d.step > 40}
    assert verdicts[43] is Verdict.HOLD
    first = next(step for step, verdict in verdicts.items() if verdict is Verdict.ROLL_BACK)
    assert 60 <= first < 65


@pytest.mark.parametrize("parity", [0, 1])
def test_every_other_step_left_out_does_not_stop_the_decisions(parity: int) -> None:
    """Whatever steps are left out, those at a decision or those between."""
    manager, accepted = make_manager(decide_every=10), 0
    for observation in observations([Stretch(200, slope=-0.02)]):
        if observation.step % 2 == parity:
            observation = replace(observation, skipped=True, grad_norm=math.nan)
        decision = show(manager, observation)
        accepted += decision is not None and decision.verdict is Verdict.ACCEPT
    assert accepted > 10


def test_losses_that_are_not_finite_roll_back_at_once_after_skipped_steps_too() -> None:
    stream = list(observations([Stretch(42, slope=-0.02), Stretch(12, bad=1.0)]))
    seen = [replace(o, skipped=True, grad_norm=math.nan) if o.step in (41, 42) else o for o in stream]
    decisions = {d.step: d.verdict for d in drive(make_manager(decide_every=20), seen)}
    assert decisions[45] is Verdict.ROLL_BACK


def test_in_assist_a_rising_loss_lowers_the_rate() -> None:
    """Nothing is rolled back there, so the agents must not be kept from acting while the run stands broken."""
    manager = make_manager(mode="assist", cooldown_steps=0)
    decisions = drive(manager, observations([Stretch(40, slope=-0.02), Stretch(60, slope=0.2)]))
    assert Verdict.ROLL_BACK not in {d.verdict for d in decisions}
    top = max(d.after[LEARNING_RATE] for d in decisions)
    assert decisions[-1].after[LEARNING_RATE] < top


@pytest.mark.parametrize("most", [0, 1, 3])
def test_after_so_many_rollbacks_in_a_row_it_stops_and_says_what_to_look_at(most: int) -> None:
    manager = make_manager(max_rollbacks_in_a_row=most, decide_every=1)
    verdicts = [d.verdict for d in drive(manager, observations([Stretch(20), Stretch(40, bad=1.0)]))]
    assert verdicts.count(Verdict.ROLL_BACK) == most
    assert verdicts.count(Verdict.STOP) == 1
    assert verdicts.index(Verdict.STOP) > max((i for i, v in enumerate(verdicts) if v is Verdict.ROLL_BACK), default=0)


def test_after_a_long_healthy_stretch_rolling_back_is_taken_up_again() -> None:
    manager = make_manager(max_rollbacks_in_a_row=1, snapshot_every=50, decide_every=1)
    course = [Stretch(60), Stretch(12, bad=1.0), Stretch(80), Stretch(3, bad=1.0)]
    decisions = drive(manager, observations(course))
    stop = next(d.step for d in decisions if d.verdict is Verdict.STOP)
    assert any(d.verdict is Verdict.ROLL_BACK and d.step > stop + 50 for d in decisions)


def test_rollbacks_far_apart_are_not_in_a_row() -> None:
    manager = make_manager(max_rollbacks_in_a_row=1, snapshot_every=50, decide_every=1)
    course = [Stretch(60), Stretch(3, bad=1.0)] * 3
    verdicts = [d.verdict for d in drive(manager, observations(course))]
    assert verdicts.count(Verdict.ROLL_BACK) == 3 and Verdict.STOP not in verdicts


def test_after_a_rollback_the_rate_is_lower_and_nothing_moves_for_a_while() -> None:
    manager = make_manager(cooldown_steps=30)
    drive(manager, observations([Stretch(40)]))
    rate = manager.knobs[LEARNING_RATE]
    manager.rolled_back(failed_at=40, count=2, restored=True, trial=None)
    assert manager.knobs[LEARNING_RATE] == pytest.approx(rate * 0.5**2)
    later = drive(manager, [replace(o, step=o.step + 40) for o in observations([Stretch(60, slope=-0.05)])])
    assert all(d.verdict is Verdict.HOLD for d in later if d.step < 70)
    assert any(d.verdict is Verdict.ACCEPT for d in later)


def test_the_rate_is_lowered_once_for_each_rollback_wherever_the_snapshot_lies() -> None:
    manager, first = make_manager(), json.dumps(make_manager().state_dict())
    manager.rolled_back(failed_at=40, count=1, restored=True, trial=None)
    between = json.dumps(manager.state_dict())
    for snapshot in (first, between):
        manager.load_state_dict(json.loads(snapshot))
        manager.rolled_back(failed_at=60, count=2, restored=True, trial=None)
        assert manager.knobs[LEARNING_RATE] == pytest.approx(0.25)


@pytest.mark.parametrize(("broke_at", "then"), [(8.0, 0.5), (1.0, 0.5), (0.25, 0.125), (math.inf, 0.5)])
def test_after_a_rollback_the_rate_is_under_the_one_that_broke(broke_at: float, then: float) -> None:
    """The host's own rate does not go back, so that a multiplier of before a cut would be above the one that broke."""
    manager = make_manager()
    assert manager.knobs[LEARNING_RATE] == 1.0
    manager.rolled_back(failed_at=40, count=1, restored=True, trial=None, multiplier=broke_at)
    assert manager.knobs[LEARNING_RATE] == pytest.approx(then)


def test_the_move_on_trial_takes_the_blame_for_a_rollback() -> None:
    manager = make_manager(trial_steps=1000)
    for observation in observations([Stretch(100, slope=-0.05)]):
        show(manager, observation)
    trial = manager.feedback.trial
    assert trial is not None and LEARNING_RATE in trial.moves
    manager.rolled_back(failed_at=100, count=1, restored=True, trial=trial)
    assert manager.feedback.trial is None
    assert manager.risk.state_dict()["undone"]["learning_rate:up"] == 1.0
    assert math.isfinite(manager.agents[0].state_dict()["ceiling"])


class Training:
    """A loss that falls in proportion to the rate, and climbs once the rate passes ``edge`` times the host's."""

    def __init__(self, edge: float, seed: int) -> None:
        self.edge, self.level, self.step = edge, 4.0, 0
        self._rng = np.random.default_rng(seed)

    def run(self, manager: ContextAwareTrainingManager, steps: int) -> list[Decision]:
        decisions = []
        for _ in range(steps):
            self.step += 1
            rate = manager.knobs[LEARNING_RATE]
            self.level += 0.1 * (rate - self.edge) if rate > self.edge else -0.01 * rate * (self.level - 1.0)
            mel = self.level + 0.02 * self._rng.normal()
            seen = Observation(
                step=self.step,
                losses={"total": mel, "mel": mel},
                grad_norm=float(np.exp(0.1 * self._rng.normal())),
                learning_rate=1e-4,
                attention=report(0.2) if self.step % 5 == 0 else None,
            )
            decision = show(manager, seen)
            if decision is not None:
                decisions.append(decision)
        return decisions


@modes
@pytest.mark.parametrize("seed", range(3))
def test_a_raise_that_makes_the_loss_diverge_is_taken_back(mode: str, seed: int) -> None:
    manager, training = make_manager(mode=mode), Training(edge=2.0, seed=seed)
    decisions = training.run(manager, 400)
    too_high = next(d for d in decisions if d.after[LEARNING_RATE] > 2.0)
    back = next(d for d in decisions if d.step > too_high.step and d.verdict in (Verdict.UNDO, Verdict.ROLL_BACK))
    assert back.step - too_high.step <= 20
    assert manager.knobs[LEARNING_RATE] <= 2.0
    assert training.level < 3.0
    moved = [(d, *d.moves[LEARNING_RATE]) for d in decisions if LEARNING_RATE in d.moves]
    hurt = [(d.step, old) for d, old, new in moved if d.verdict is Verdict.UNDO and new < old]
    for decision, old, new in moved:  # a rate that hurt is remembered for 15 decisions
        near = [rate for step, rate in hurt if 0 < decision.step - step < 15 * 5]
        assert new < old or all(new <= 0.75 * rate + 1e-9 for rate in near)


@pytest.mark.parametrize("seed", range(3))
def test_a_rate_that_was_too_high_from_the_start_is_lowered_until_the_loss_falls(seed: int) -> None:
    """A lowered rate is not taken back because the loss has not turned yet."""
    manager, training = make_manager(mode="assist"), Training(edge=0.4, seed=seed)
    decisions = training.run(manager, 300)
    assert manager.knobs[LEARNING_RATE] <= 0.4 * 1.5
    lowered = [d for d in decisions if d.after[LEARNING_RATE] < d.before[LEARNING_RATE]]
    assert lowered
    assert all(d.after[LEARNING_RATE] <= d.before[LEARNING_RATE] for d in decisions if d.verdict is Verdict.UNDO)


@pytest.mark.parametrize("seed", range(2))
def test_what_calms_is_not_put_on_trial(seed: int) -> None:
    manager, lowered = make_manager(), set()
    for observation in observations(EVENTFUL, seed):
        decision, trial = show(manager, observation), manager.feedback.trial
        assert trial is None or all(new > old for name, (old, new) in trial.moves.items() if name == LEARNING_RATE)
        if decision is not None and decision.verdict is Verdict.ACCEPT:
            lowered |= {name for name, (old, new) in decision.moves.items() if KNOBS[name].move(old, new) < -0.1}
    assert {LEARNING_RATE, GRAD_CLIP} <= lowered


@pytest.mark.parametrize("seed", range(3))
def test_after_an_undo_what_was_taken_back_cools_down_and_the_rest_moves_on(seed: int) -> None:
    """The weights move slowly here, so that they are still on their way. Undos that a rollback follows are left out."""
    manager, training = make_manager(cooldown_steps=30, adaptation_rate=0.03), Training(edge=2.0, seed=seed)
    decisions = training.run(manager, 200)
    broken = [d.step for d in decisions if d.verdict is Verdict.ROLL_BACK]
    undone = [d for d in decisions if d.verdict is Verdict.UNDO and d.step <= 170]
    undo = next(d for d in undone if not any(d.step < step < d.step + 30 for step in broken))
    assert set(undo.moves) == {LEARNING_RATE}
    cooling = [d.moves for d in decisions if undo.step < d.step < undo.step + 30]
    assert not any(LEARNING_RATE in moves for moves in cooling) and any(cooling)


def test_a_second_undo_leaves_the_first_ones_cooldown_alone() -> None:
    manager = make_manager(cooldown_steps=100)
    course = [Stretch(20, attention=0.6), Stretch(30, attention=0.4)] * 2
    moved = {20: {LEARNING_RATE: (1.0, 1.5)}, 70: {GUIDED_WEIGHT: (4.5, 6.0)}}
    for observation in observations(course):
        manager.observe(observation)
        if observation.step in moved:
            series = manager.analyzer.series(manager.loss_name)
            manager.feedback.open(observation.step, moved[observation.step], manager.context(), series)
        elif observation.step in (50, 100):
            assert manager.decide().verdict is Verdict.UNDO
    assert manager.state_dict()["cooling"] == {LEARNING_RATE: 150, GUIDED_WEIGHT: 200}


def test_a_state_in_which_the_loss_surely_rises_is_not_one_to_go_back_to() -> None:
    for slope, healthy in ((-0.02, True), (0.2, False)):
        manager = make_manager(mode="assist")
        drive(manager, observations([Stretch(60, slope=-0.02), Stretch(60, slope=slope)]))
        manager.feedback.close()
        assert manager.healthy is healthy


def test_an_alignment_on_its_way_out_is_no_state_to_go_back_to_and_resets_no_count() -> None:
    """With a deadline longer than the steps between snapshots, each rollback would else count as the first."""
    manager = make_manager(snapshot_every=20, lost_alignment_steps=60)
    lost = [Stretch(60, attention=0.8), Stretch(900, attention=0.02)]
    decisions, unhealthy = [], 0
    for observation in observations(lost):
        decision = show(manager, observation)
        if decision is not None:
            decisions.append(decision)
            unhealthy += manager.feedback.losing
            assert not (manager.feedback.losing and manager.healthy)
    verdicts = [d.verdict for d in decisions if d.verdict in (Verdict.ROLL_BACK, Verdict.STOP)]
    assert verdicts == [Verdict.ROLL_BACK] * 3 + [Verdict.STOP]
    assert unhealthy > 30


def test_what_rollbacks_could_not_save_is_no_state_to_go_back_to() -> None:
    manager = make_manager(max_rollbacks_in_a_row=0)
    decisions = drive(manager, observations([Stretch(100), Stretch(60, slope=0.5)]))
    assert Verdict.STOP in [d.verdict for d in decisions]
    drive(manager, [replace(o, step=o.step + 160) for o in observations([Stretch(20)])])
    assert not manager.healthy


def test_a_clip_that_is_always_bad_does_not_hide_a_loss_that_stands_high() -> None:
    def course(every: int) -> Iterator[Observation]:
        for o in observations([Stretch(200, noise=0.01), Stretch(1, slope=50.0), Stretch(60, noise=0.01)]):
            yield replace(o, losses=dict.fromkeys(o.losses, math.nan)) if every and o.step % every == 0 else o

    for every in (0, 5, 3):
        decisions = drive(make_manager(), course(every))
        back = [d.step for d in decisions if d.verdict is Verdict.ROLL_BACK]
        assert back and back[0] <= 215, every


def test_the_rate_is_not_raised_while_most_steps_are_left_out() -> None:
    def course(left_out: int) -> Iterator[Observation]:
        for o in observations([Stretch(20, slope=-0.02), Stretch(80, slope=-0.02)]):
            out = o.step > 20 and o.step % 3 < left_out
            yield replace(o, skipped=out, grad_norm=None if out else o.grad_norm)

    whole, most = (
        drive(make_manager(forecasts=False, decide_every=10, max_learning_rate=1.0), course(n)) for n in (0, 2)
    )
    raised = [[d.step for d in some if d.after[LEARNING_RATE] > d.before[LEARNING_RATE]] for some in (whole, most)]
    assert [step for step in raised[0] if step > 40] and not [step for step in raised[1] if step > 40]
    assert any("of the steps were left out" in p.reason for d in most for p in d.proposals)


@pytest.mark.parametrize("max_move_risk", [0.1, 0.4])
def test_nothing_talks_the_brain_out_of_lowering_the_rate(max_move_risk: float) -> None:
    """Neither a cautious limit, nor effects learned from a rise that the rate has no part in, nor a vote."""
    manager = make_manager(mode="assist", max_move_risk=max_move_risk, cooldown_steps=0)
    decisions = drive(manager, observations([Stretch(60), Stretch(100, slope=0.1)]))
    wished = [(d, p.moves[LEARNING_RATE]) for d in decisions for p in d.proposals if LEARNING_RATE in p.moves]
    lowered = [(d, wish) for d, wish in wished if wish < d.before[LEARNING_RATE]]
    limit = KNOBS[LEARNING_RATE].limit
    assert len(lowered) > 5
    assert all(d.after[LEARNING_RATE] == limit(d.before[LEARNING_RATE], wish) for d, wish in lowered)
    assert manager.knobs[LEARNING_RATE] < 0.3 * max(d.after[LEARNING_RATE] for d in decisions)


@pytest.mark.parametrize("seed", range(2))
def test_a_clip_that_is_let_go_is_not_put_on_trial(seed: int) -> None:
    """Nothing has come up to it, and a trial of it would keep the rate from being raised."""
    manager, released = make_manager(), 0
    for observation in observations([Stretch(40, spikes=0.25), Stretch(120, slope=-0.02)], seed):
        decision = show(manager, observation)
        old, new = (0.0, 0.0) if decision is None else (decision.before[GRAD_CLIP], decision.after[GRAD_CLIP])
        released += new > old
        trial = manager.feedback.trial
        assert trial is None or GRAD_CLIP not in trial.moves
    assert released > 1


@pytest.mark.parametrize(("host_clip", "turned"), [(None, True), (20.0, True), (2.0, False)])
def test_a_clip_is_left_alone_where_the_host_clips_lower(host_clip: float | None, turned: bool) -> None:
    """Norms are about 1 here, so that three medians lie over the host's 2: ours would never act."""
    manager = make_manager()
    manager.capabilities = replace(HOST, grad_clip=host_clip)
    decisions = drive(manager, observations([Stretch(60, spikes=0.25)]))
    assert (manager.knobs[GRAD_CLIP] < GRAD_CLIP_OFF) is turned
    assert any("clip at" in d.reason for d in decisions) is turned


def test_a_clip_is_steered_without_the_rate() -> None:
    manager = make_manager(knobs="guided_weight,grad_clip")
    decisions = drive(manager, observations([Stretch(60, spikes=0.25, attention=0.3)]))
    assert manager.knobs[GRAD_CLIP] == 3.0
    assert any("clip at 3 median norms" in d.reason for d in decisions)


def test_reasons_name_only_what_is_steered() -> None:
    decisions = drive(make_manager(knobs="learning_rate,guided_weight"), observations([Stretch(80, attention=0.3)]))
    said = " ".join([*(d.reason for d in decisions), *(p.reason for d in decisions for p in d.proposals)])
    assert "guided weight toward" in said
    assert not any(knob in said for knob in ("width toward", "forward-sum toward", "mel toward", "gate toward"))


def test_what_the_clip_is_measured_in_is_that_of_the_newest_decision_after_a_resume_too() -> None:
    manager = make_manager()
    for observation in observations([Stretch(53, spikes=0.25)]):
        show(manager, observation)
    resumed = make_manager()
    resumed.load_state_dict(json.loads(json.dumps(manager.state_dict())))
    assert resumed.usual_grad_norm == manager.usual_grad_norm != manager.context().grad_norm_median


def test_a_long_watch_with_a_short_history_still_ends() -> None:
    manager = make_manager(history_size=30, trial_steps=40, cooldown_steps=0)
    verdicts = drive(manager, observations([Stretch(300, slope=-0.02)]))
    assert sum(d.verdict is Verdict.ACCEPT and LEARNING_RATE in d.moves for d in verdicts) >= 3


# coordination


def test_a_calm_run_is_steered_as_it_is_without_coordination() -> None:
    """To the last bit: what nobody cuts is the very value that was wanted."""
    course = [Stretch(60, slope=-0.05), Stretch(60, slope=-0.05, attention=0.3)]
    none, full = (drive(make_manager(coordination=how), observations(course)) for how in ("none", "full"))
    assert [d.after for d in full] == [d.after for d in none]
    assert all(d.coordination for d in full if d.verdict is Verdict.ACCEPT) and not any(d.coordination for d in none)


@pytest.mark.parametrize("seed", range(3))
def test_while_gradients_spike_the_agents_make_part_of_their_wishes_and_else_all(seed: int) -> None:
    course = [Stretch(40, slope=-0.05), Stretch(80, slope=-0.05, spikes=0.3)]
    shares: dict[bool, list[float]] = {True: [], False: []}
    for decision in drive(make_manager(), observations(course, seed)):
        if "equilibrium" in decision.coordination and decision.evidence["certainty"] > 0.99:
            health = decision.coordination["criteria"]["gradient_health"]["score"]
            if not 0.2 < health < 1.0:
                shares[health == 1.0] += decision.coordination["equilibrium"]["shares"].values()
    assert set(shares[True]) == {1.0}
    assert min(shares[False]) < 1.0


def test_what_a_decision_was_taken_on_is_kept_until_an_earlier_state_comes_back() -> None:
    manager, seen = make_manager(), list(observations([Stretch(30, slope=-0.05)]))
    for observation in seen[:10]:
        show(manager, observation)
    kept, state = manager.decided_on, manager.state_dict()
    assert kept.step == 10 and kept is manager.decided_on
    manager.observe(seen[10])
    assert manager.decided_on is kept and manager.context().step == 11
    manager.load_state_dict(json.loads(json.dumps(state)))
    assert manager.decided_on is not kept and manager.decided_on.step == 10


def test_without_forecasts_there_are_none_and_a_state_with_them_is_read() -> None:
    course = [Stretch(60, slope=-0.05)]
    with_them, without = make_manager(), make_manager(forecasts=False)
    drive(with_them, observations(course))
    drive(without, observations(course))
    assert with_them.context().forecast is not None and without.context().forecast is None
    for source, target in ((with_them, without), (without, with_them)):
        target.load_state_dict(json.loads(json.dumps(source.state_dict())))


def test_what_was_settled_stands_in_the_decision_and_in_its_order() -> None:
    decisions = [d for d in drive(make_manager(), observations(EVENTFUL)) if d.coordination]
    assert all(list(d.coordination)[:1] == ["criteria"] for d in decisions)
    full = [d.coordination for d in decisions if "vote" in d.coordination]
    assert full and all(list(c)[:4] == ["criteria", "equilibrium", "risk", "vote"] for c in full)
    assert any("draws" in c["risk"] for c in full)
    assert all(not d.moves for d in decisions if "vote" in d.coordination and not d.coordination["vote"]["approved"])
    assert max(len(json.dumps(to_plain(c), allow_nan=False)) for c in full) < 2000


def test_a_vote_without_quorum_holds_everything_and_says_so() -> None:
    manager = make_manager(consensus_threshold=1.0)
    manager.optimizer.assessors["window"] = lambda seen, moves, weighed: Opinion(False, 1.0)
    decisions = drive(manager, observations([Stretch(60, slope=-0.05)]))
    assert all(not d.moves for d in decisions)
    assert any("no quorum" in d.reason and d.verdict is Verdict.HOLD for d in decisions)


def test_the_seed_decides_the_draws_and_nothing_else_does() -> None:
    runs = [drive(make_manager(seed=seed), observations(EVENTFUL[:2])) for seed in (0, 0, 1)]
    assert plain(runs[0]) == plain(runs[1]) != plain(runs[2])


# damaged states


def nodes(state: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths to every value of a nested state, itself left out."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def at(state: Any, path: tuple) -> Any:
    for key in path:
        state = state[key]
    return state


@lru_cache
def state_on_trial() -> str:
    manager = make_manager(history_size=30, trend_window=10)
    drive(manager, observations([Stretch(60, slope=-0.05, attention=0.4)]))
    assert manager.feedback.trial is not None
    return json.dumps(manager.state_dict())


# Whose keys are names of what a run happened to have: without one, a state is smaller, not damaged.
FREE_KEYS = ("knobs", "series", "kept", "undone", "moves", "strikes")
# Agents without memory read nothing.
UNREAD = (("agents", "guided_attention"), ("agents", "loss_balance"))


def damaged() -> Iterator[tuple[str, Any]]:
    whole = json.loads(state_on_trial())
    for path in nodes(whole):
        if path in UNREAD:
            continue
        parent = at(whole, path[:-1])
        long_list = isinstance(parent, list) and path[-1] > 0
        if long_list or (len(path) > 3 and path[1] == "series" and path[2] != "mel"):
            continue
        wrong = copy.deepcopy(whole)
        at(wrong, path[:-1])[path[-1]] = "x"
        yield f"{path} is 'x'", wrong
        if isinstance(parent, dict) and not (len(path) > 1 and path[-2] in FREE_KEYS):
            missing = copy.deepcopy(whole)
            del at(missing, path[:-1])[path[-1]]
            yield f"{path} is missing", missing


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    manager = make_manager(history_size=30, trend_window=10)
    drive(manager, observations([Stretch(30, attention=0.3)], seed=5))
    before = json.dumps(manager.state_dict())
    accepted = []
    for name, state in damaged():
        try:
            manager.load_state_dict(state)
        except ValueError:
            assert json.dumps(manager.state_dict()) == before, name
        else:
            accepted.append(name)
            manager.load_state_dict(json.loads(before))
    assert accepted == []


@pytest.mark.parametrize("state", [{}, {"version": 3}, {"version": None}, [], None, "x", {"version": 1}])
def test_what_is_no_state_of_this_version_is_refused(state: Any) -> None:
    manager = make_manager()
    before = json.dumps(manager.state_dict())
    with pytest.raises(ValueError, match=r"version|damaged"):
        manager.load_state_dict(state)
    assert json.dumps(manager.state_dict()) == before


@pytest.mark.parametrize("value", [math.nan, math.inf, "inf"])
def test_a_knob_that_is_not_finite_is_refused_and_one_out_of_bounds_is_bounded(value: Any) -> None:
    state = json.loads(state_on_trial())
    state["knobs"][LEARNING_RATE] = value
    with pytest.raises(ValueError, match="damaged"):
        make_manager().load_state_dict(state)
    state["knobs"][LEARNING_RATE] = 1e9
    manager = make_manager()
    manager.load_state_dict(state)
    assert manager.knobs[LEARNING_RATE] == KNOBS[LEARNING_RATE].high
