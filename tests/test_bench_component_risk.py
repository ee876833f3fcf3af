"""The benchmark part `risk`: that a fork is the run, that hindsight is right, that what is badly said is seen so."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import component_risk, components, forks, risk_fit
from bench.calibration import base_brier, brier, calibration_error, reliability
from bench.forks import AFTER, EQUILIBRIUM, HELD, PROBE, ROLLBACK, UNDO, VOTE, WISHED, Decided
from bench.hindsight import HORIZON, Case, better, cases, diverged, lost, run_cases
from bench.recorded import recorded_cases, replayed
from tts_brain.config import BrainConfig
from tts_brain.coordination.calibration import ALIGNMENT_LOSS, DIVERGENCE, Curve, log_odds, probabilities
from tts_brain.coordination.dynamics import Course, Dynamics, Outlook
from tts_brain.learning.micro_tacotron import MicroRuns, MicroSetting
from tts_brain.learning.traces import Recorder, save
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import GRAD_CLIP, LEARNING_RATE, Verdict

COURSE = Dynamics(Course(0.0, noise=1.0), 8.0, Course(0.5, noise=0.4), 0.8)


@pytest.fixture(scope="module")
def decided() -> list[Decided]:
    return forks.gather(7, runs=3, steps=80, forked=1)


def by_hand(**changes: Any) -> Decided:
    """Loss 2 and attention 0.7 before; noise 0.1."""
    before = np.tile([2.0, 0.7], (10, 1))
    knobs = {HELD: {LEARNING_RATE: 1.0}, WISHED: {LEARNING_RATE: 1.5}, EQUILIBRIUM: {LEARNING_RATE: 1.2}}
    one = Decided(0, 100, 7, Verdict.ACCEPT, (EQUILIBRIUM,), 2.0, 0.1, COURSE, None, knobs, before)
    for name, value in changes.items():
        setattr(one, name, value)
    return one


def course(loss: Any, attention: Any = 0.7) -> np.ndarray:
    return np.stack([np.broadcast_to(loss, AFTER), np.broadcast_to(attention, AFTER)], axis=1).astype(float)


# The forks.


def test_the_fork_of_what_was_decided_is_the_run_until_the_next_decision(decided: list[Decided]) -> None:
    checked = 0
    for one in decided:
        if VOTE in one.after and one.verdict is Verdict.ACCEPT:
            np.testing.assert_allclose(one.after[VOTE][:10], one.run_after[:10], rtol=1e-3, atol=1e-3)
            checked += one.knobs[VOTE] != one.knobs[HELD]
    assert checked


def test_a_move_changes_what_follows_and_nothing_before_the_first_step_with_it(decided: list[Decided]) -> None:
    forked = [one for one in decided if PROBE in one.after]
    assert forked
    for one in forked:
        assert one.knobs[PROBE][LEARNING_RATE] > one.knobs[HELD][LEARNING_RATE]
        held, probe = one.after[HELD], one.after[PROBE]
        # The first loss is that of the weights before any step was made with the new rate.
        np.testing.assert_allclose(probe[0], held[0], rtol=1e-3, atol=1e-3)
        assert np.abs(probe[1:] - held[1:]).max() > 1e-3


def test_branches_with_equal_knobs_are_one_and_no_decision_is_lost(decided: list[Decided]) -> None:
    assert [one.step for one in decided if one.run == 0] == list(range(10, 81, 10))
    for one in decided:
        for a in one.after:
            for b in one.after:
                if one.knobs[a] == one.knobs[b] and ROLLBACK not in (a, b):
                    assert np.array_equal(one.after[a], one.after[b])


def test_a_row_put_back_is_the_row_taken_and_the_others_stay() -> None:
    micro = MicroRuns([MicroSetting(rate=1e-2)] * 3, [1, 2, 3])
    micro.step()
    row = forks._Row(micro, 1)
    taken, before = row.state_dict(), micro.state_dict()
    micro.step()
    after = micro.state_dict()
    row.load_state_dict(taken)
    now = micro.state_dict()
    assert now["step"] == after["step"] == 2
    for name, axis in (("weights", 0), ("moments", 1), ("updates", 0), ("norms", 0)):
        for run, whole in ((0, after), (1, before), (2, after)):
            same = now[name].select(axis, run).equal(whole[name].select(axis, run))
            assert same or (name == "norms" and now[name][run].nan_to_num().equal(whole[name][run].nan_to_num()))
        assert not now[name].select(axis, 1).nan_to_num().equal(after[name].select(axis, 1).nan_to_num())


def test_a_broken_run_is_forked_as_it_broke_and_as_it_was_put_back() -> None:
    """Held, it goes on from the broken weights; rolled back, from those of the snapshot."""
    micro = MicroRuns([MicroSetting(rate=1e-3, attention_every=1)] * 2, [1, 2])
    brains = [forks._Brain(micro, run) for run in (0, 1)]
    for _ in range(30):
        for brain, seen in zip(brains, micro.step([brain.knobs for brain in brains]), strict=True):
            brain.see(seen)
    first = brains[0]
    assert first._snapshots.newest() == 10
    snapshot = forks._rows(micro.state_dict(), 0)
    assert first._roll_back(30)
    broken, restored = first.rows[HELD], first.rows[ROLLBACK]
    assert broken["weights"].equal(snapshot["weights"]) and not restored["weights"].equal(broken["weights"])
    assert restored["weights"].equal(forks._rows(micro.state_dict(), 0)["weights"])
    one = by_hand(knobs={HELD: {}, ROLLBACK: {}}, changed=(ROLLBACK,), step=30)
    forks._fork(micro, brains, [one])
    assert np.abs(one.after[HELD] - one.after[ROLLBACK]).max() > 1e-3


# Hindsight.


def test_a_loss_has_diverged_when_its_level_is_above_the_limit_and_a_spike_is_none() -> None:
    one, spike, steps = by_hand(), np.full(AFTER, 2.0), np.arange(1, AFTER + 1)
    spike[20:22] = 50.0
    assert not diverged(one, course(spike))
    assert diverged(one, course(np.where(steps > 30, 2.81, 2.0)))
    assert not diverged(one, course(np.where(steps > 30, 2.79, 2.0)))
    assert not diverged(one, course(np.where(steps > HORIZON + 2, 9.0, 2.0)))
    assert diverged(one, course(np.where(steps > 30, math.nan, 2.0)))


def test_an_alignment_is_lost_when_its_level_is_under_half_its_best() -> None:
    one, steps = by_hand(), np.arange(1, AFTER + 1)
    assert lost(one, course(2.0, np.where(steps > 20, 0.39, 0.7)))
    assert not lost(one, course(2.0, np.where(steps > 20, 0.41, 0.7)))
    assert not lost(one, course(2.0, np.where(steps % 5 == 0, 0.1, 0.7)))
    never = Dynamics(COURSE.loss, 8.0, COURSE.attention, 0.49)
    assert lost(by_hand(course=never), course(2.0, 0.0)) is None


def test_a_stage_was_right_when_its_own_branch_ended_lower_or_alone_kept_its_alignment() -> None:
    good, bad, gone = course(1.9), course(2.1), course(1.0, 0.1)
    one = by_hand(after={EQUILIBRIUM: good, WISHED: bad})
    assert better(one, EQUILIBRIUM) == pytest.approx(2.0)
    assert better(by_hand(after={EQUILIBRIUM: bad, WISHED: good}), EQUILIBRIUM) == pytest.approx(-2.0)
    assert better(by_hand(after={EQUILIBRIUM: bad, WISHED: gone}), EQUILIBRIUM) == math.inf
    assert better(by_hand(after={EQUILIBRIUM: gone, WISHED: good}), EQUILIBRIUM) == -math.inf
    assert better(by_hand(after={EQUILIBRIUM: good}), EQUILIBRIUM) is None
    assert better(one, UNDO) is None


def test_of_a_fork_the_moves_that_stir_are_cases_each_once_and_a_cut_is_none() -> None:
    knobs = {
        HELD: {LEARNING_RATE: 1.0},
        WISHED: {LEARNING_RATE: 1.5},
        VOTE: {LEARNING_RATE: 1.5},
        PROBE: {LEARNING_RATE: 0.5},
    }
    after = {HELD: course(2.0), WISHED: course(3.0), VOTE: course(3.0), PROBE: course(2.0)}
    (case,) = cases([by_hand(knobs=knobs, after=after)])
    assert case.diverged and case.lost is False and case.gain == pytest.approx(-10.0)
    assert (case.seed, case.step, case.said.draws) == (7, 100, 256)


def test_the_runs_own_cases_are_of_moves_that_were_made(decided: list[Decided]) -> None:
    made = run_cases(decided)
    assert made and all(case.step <= 80 - HORIZON for case in made)
    assert len({(case.seed, case.step) for case in made}) == len(made)


def test_a_recorded_run_gives_a_case_where_a_knob_was_turned_up(tmp_path: Path) -> None:
    micro, recorder = MicroRuns([MicroSetting(rate=3e-3)], [5]), Recorder()
    for step in range(1, 101):
        knobs = {LEARNING_RATE: 1.5 if step > 30 else 1.0, GRAD_CLIP: 50.0 if step > 20 else 100.0}
        recorder.add(micro.step([knobs])[0], knobs)
    trace = recorder.trace("by hand", host="some host", corpus="x")
    (case,) = replayed([trace])
    assert case.step == 30 and not case.diverged
    (tmp_path / "some").mkdir()
    save(tmp_path / "some" / "one.safetensors", [trace])
    found = recorded_cases(tmp_path)
    assert {name: [one.said for one in some] for name, some in found.items()} == {"some": [case.said]}


# Calibration.


def test_the_measures_by_hand() -> None:
    said, happened = [0.0, 0.0, 0.2, 0.2, 1.0], [False, True, False, False, True]
    table = [(one.said, one.happened, one.count) for one in reliability(said, happened)]
    assert table == [(0.0, 0.5, 2), (pytest.approx(0.2), 0.0, 2), (1.0, 1.0, 1)]
    assert brier(said, happened) == pytest.approx((1.0 + 2 * 0.04) / 5)
    assert base_brier(happened) == pytest.approx(0.24)
    assert calibration_error(said, happened) == pytest.approx((2 * 0.5 + 2 * 0.2) / 5)
    with pytest.raises(ValueError, match="probabilities in"):
        brier([1.1], [True])


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60))
def test_every_case_is_in_one_bin_and_the_base_rate_is_its_own_best_constant(pairs: list) -> None:
    said, happened = (list(column) for column in zip(*pairs, strict=True))
    bins = reliability(said, happened)
    assert sum(one.count for one in bins) == len(pairs)
    assert all(one.low <= one.said <= one.high for one in bins)
    assert 0.0 <= calibration_error(said, happened) <= 1.0
    rate = sum(happened) / len(happened)
    assert brier([rate] * len(pairs), happened) == pytest.approx(base_brier(happened))
    assert base_brier(happened) <= brier([0.3] * len(pairs), happened) + 1e-12


def test_what_is_said_too_high_is_seen_as_worse_than_what_is_said_right() -> None:
    rng = np.random.default_rng(0)
    right = rng.uniform(0, 1, 4000) ** 3
    happened = rng.uniform(0, 1, 4000) < right
    assert calibration_error(right, happened) < 0.03 < calibration_error(np.sqrt(right), happened)
    assert brier(right, happened) < base_brier(happened)


# The map that is shipped, and how it is learned.

curves = st.builds(Curve, st.floats(0.01, 10), st.floats(-10, 10))


@given(curves, st.integers(20, 10_000), st.floats(0, 1), st.floats(0, 1))
def test_a_curve_gives_probabilities_and_keeps_the_order(curve: Curve, draws: int, a: float, b: float) -> None:
    low, high = (curve.probability(share, draws) for share in sorted((a, b)))
    assert 0.0 <= low <= high <= 1.0


@given(st.floats(0, 1), st.integers(20, 10_000))
def test_the_curve_that_changes_nothing_gives_back_the_share(share: float, draws: int) -> None:
    assert Curve(1.0, 0.0).probability(share, draws) == pytest.approx(share, abs=0.5 / draws)
    assert log_odds(share, draws) == pytest.approx(-log_odds(1.0 - share, draws), abs=1e-6)


@pytest.mark.parametrize(
    ("slope", "level"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0), (1.0, math.nan)]
)
def test_a_curve_that_turns_risks_round_is_refused(slope: float, level: float) -> None:
    with pytest.raises(ValueError, match="write a finite slope above 0"):
        Curve(slope, level)


def test_an_outlook_is_mapped_each_risk_by_its_own_curve() -> None:
    said = probabilities(Outlook(0.1, 0.4, 0.0, 0.0, 0.0, 0.0, 256))
    assert said["divergence"] == DIVERGENCE.probability(0.1, 256)
    assert said["alignment_loss"] == ALIGNMENT_LOSS.probability(0.4, 256)
    assert set(probabilities(Outlook(0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 256, alignment=False))) == {"divergence"}


def test_a_decision_says_the_probabilities_of_its_own_plays() -> None:
    setting = MicroSetting(rate=1e-2)
    micro = MicroRuns([setting], [3])
    manager = ContextAwareTrainingManager(BrainConfig(), setting.capabilities, setting.host_values)
    told = []
    for _ in range(40):
        manager.observe(micro.step([manager.knobs])[0])
        if manager.due(micro.step_number):
            told.append(manager.decide().coordination.get("risk", {}))
    simulated = [risk for risk in told if "draws" in risk]
    assert simulated
    for risk in simulated:
        curves = dict(component_risk.CURVES)
        if not risk["alignment"]:
            curves.pop("alignment_loss")  # there is none to lose
        assert set(risk["probability"]) == set(curves)
        for name, curve in curves.items():
            assert risk["probability"][name] == pytest.approx(curve.probability(risk[name], risk["draws"]), abs=2e-3)


@pytest.mark.parametrize("true", [Curve(0.5, -1.0), Curve(1.5, 0.5)])
def test_the_fit_finds_the_curve_that_made_the_outcomes(true: Curve) -> None:
    rng = np.random.default_rng(1)
    shares = rng.integers(0, 257, 5000) / 256
    happened = rng.uniform(0, 1, 5000) < [true.probability(share, 256) for share in shares]
    found = risk_fit.fit(shares, happened, 256)
    assert (found.slope, found.level) == (pytest.approx(true.slope, rel=0.1), pytest.approx(true.level, abs=0.15))


def test_the_fit_bears_a_risk_that_never_came_true() -> None:
    curve = risk_fit.fit([0.0, 0.1, 0.3] * 50, [False] * 150, 256)
    assert curve.probability(0.3, 256) < 0.02


# The rows.


def test_seeds_that_choose_are_not_those_that_report() -> None:
    both = [range(seed, seed + forks.RUNS) for seed in (*component_risk.SEEDS, *risk_fit.SEEDS)]
    assert len({seed for some in both for seed in some}) == forks.RUNS * len(both)


def test_risk_said_badly_is_a_row_said_badly() -> None:
    def of(said: float, happened: bool) -> Case:
        return Case(0, 10, Outlook(said, 0.0, 0.0, 0.0, 0.0, 0.0, 256), happened, None, 0.0)

    some = [of(0.5, happened) for happened in [True] + [False] * 9]
    rows = {(row["figure"], row["against"]): row for row in component_risk.calibration(some, "here")}
    error = rows["divergence, here: expected calibration error", "share of plays"]
    assert error["theirs"] == pytest.approx(0.4)
    assert not any("alignment" in figure for figure, _ in rows)  # there was none to lose


def test_the_verdict_is_that_of_the_worst_calibration() -> None:
    def error(of: str, ours: float) -> dict[str, Any]:
        row = {"part": "risk: calibration", "figure": f"{of}: expected calibration error", "against": "share of plays"}
        return row | {"ours": ours, "theirs": 0.2, "note": "50 moves"}

    (met,), (missed,) = (components.verdicts([error("a", 0.01), error("b", worst)]) for worst in (0.05, 0.06))
    assert met["met"] and not missed["met"] and "b: expected" in missed["figure"]


def test_rows_of_stages_count_what_was_changed_and_what_was_forked() -> None:
    good = by_hand(after={EQUILIBRIUM: course(1.9), WISHED: course(2.1)})
    (row, *others) = component_risk.stages([good, by_hand(), by_hand(changed=())])
    assert (row["ours"], row["theirs"]) == (1.0, 0.0)
    assert row["note"].startswith("666.7 per 1,000 decisions (2); 1 forked: 1 clearly better, 0 clearly worse")
    assert all(other["note"].startswith("0.0 per 1,000 decisions (0); 0 forked") for other in others)


def test_the_rows_fit_the_table_and_strict_json(decided: list[Decided], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(component_risk, "gather", lambda *_, **__: decided)
    rows = components.collect("risk", True, None)
    assert {row["part"] for row in rows} == {"risk: calibration", "risk: stages"}
    assert all(set(row) == {"part", "against", "figure", "ours", "theirs", "note", "quick"} for row in rows)
    json.dumps(components.plain(rows), allow_nan=False)
    assert "risk" in components.NAMES and not components.missing("risk")
