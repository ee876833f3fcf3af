"""The benchmark `components`: what it counts, and that a part made worse is seen as worse."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from simulated_run import Stretch, make_manager, observations

from bench import (
    component_coordination,
    component_eyes,
    component_lengths,
    component_phases,
    component_ranks,
    component_time,
    components,
)
from bench.blindfold import blindfold
from bench.component_phases import Course, agreement, bare, delays, ema, made_up, median_delay, ours, switches
from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.context.lengths import LengthEffect
from tts_brain.context.phases import PhaseClassifier
from tts_brain.learning.micro_tacotron import MicroRun, MicroSetting
from tts_brain.learning.traces import Recorder, Trace, save
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import LEARNING_RATE, PHASE_LIMITS, AttentionReport, Decision, Observation

COURSES = made_up(1)


def course(truth: list[float]) -> Course:
    values = np.array(truth)
    zeros = np.zeros(len(values))
    return Course("by hand", np.arange(5, 5 * len(values) + 1, 5), values, values, zeros, zeros)


# What is counted.


def test_the_measures_by_hand() -> None:
    # Crosses 0.1 half-way between steps 10 and 15, then goes on; the phase follows at step 25.
    one = course([0.02, 0.05, 0.15, 0.2, 0.3, 0.3])
    said = np.array([0, 0, 0, 0, 1, 1])
    assert delays([one], [said]).tolist() == pytest.approx([12.5])
    assert switches([one], [said]) == pytest.approx(1000 / 30)
    # Off the boundary by more than 0.05 are 0.02, 0.2 and twice 0.3; wrong is 0.2.
    assert agreement([one], [said]) == pytest.approx(75.0)


def test_a_crossing_is_missed_when_it_is_undone_first_and_touching_a_limit_is_none() -> None:
    back = course([0.3, 0.3, 0.6, 0.6, 0.3, 0.3])
    found = delays([back], [np.array([1, 1, 1, 1, 1, 1])])
    assert math.isinf(found[0]) and found[1] == pytest.approx(25 - (20 + 5 / 3))
    assert len(delays([course([0.47, 0.52, 0.48, 0.53])], [np.ones(4, dtype=int)])) == 0


def test_the_rival_without_memory_is_the_bare_rule() -> None:
    values = np.array([0.05, 0.1, 0.49, 0.5, 0.69, 0.7, 1.0])
    assert bare(values).tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert np.array_equal(ema(values, 0.0), values)


def test_courses_are_the_same_each_time_and_others_at_another_seed() -> None:
    again, other = made_up(1), made_up(1, first_seed=1)
    for one, same, different in zip(COURSES, again, other, strict=True):
        assert np.array_equal(one.seen, same.seen) and not np.array_equal(one.seen, different.seen)
        assert np.all((one.seen >= 0.0) & (one.seen <= 1.0))


def test_it_asks_the_classifier_what_the_analyzer_asks_it() -> None:
    rng, analyzer, said = np.random.default_rng(0), ContextAnalyzer(), []
    attention, loss = np.full(300, np.nan), 1.0 + np.exp(-np.arange(300) / 60.0) + 0.05 * rng.normal(size=300)
    for step in range(1, 301):
        if step % 5 == 0:
            attention[step - 1] = np.clip(0.8 / (1.0 + math.exp((150 - step) / 25)) + 0.05 * rng.normal(), 0.0, 1.0)
        good = float(attention[step - 1])
        report = None if step % 5 else AttentionReport(good, good, good, good, 0.5, 1.0, 1.0, 5.0, 1.0)
        analyzer.observe(Observation(step, {"total": float(loss[step - 1])}, attention=report))
        if report is not None:
            said.append(analyzer.phases.phase.index)
    assert ours(component_phases.real_course("x", np.arange(1, 301), attention, loss)).tolist() == said
    assert len(set(said)) == 4


# What is made worse is seen as worse.


class Late(PhaseClassifier):
    """Ten measurements behind."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[float, float, float]] = []

    def update(self, *measured: float) -> None:
        self._waiting.append(measured)  # type: ignore[arg-type]
        super().update(*self._waiting[max(0, len(self._waiting) - 11)])


def phases_of(make: Any) -> list[np.ndarray]:
    return [ours(one, make) for one in COURSES]


def test_a_classifier_made_worse_is_seen_as_worse() -> None:
    good, nervous, late = (
        phases_of(make) for make in (PhaseClassifier, lambda: PhaseClassifier(stickiness=0.25), Late)
    )
    assert switches(COURSES, nervous) > 1.5 * switches(COURSES, good)
    assert median_delay(COURSES, late) > median_delay(COURSES, good) + 30
    assert agreement(COURSES, late) < agreement(COURSES, good) - 2
    assert agreement(COURSES, good) > 98


def test_an_arm_without_memory_gains_nothing_over_thresholds_and_the_verdict_says_so() -> None:
    class Bare(PhaseClassifier):
        def update(self, attention_diag: float, loss_fall_z: float, loss_drop: float) -> None:
            self._posterior = np.eye(4)[sum(attention_diag >= limit for limit in PHASE_LIMITS)]

    rows = component_phases.compare("by hand", COURSES, Bare)
    met = {v["criterion"]: v["met"] for v in components.verdicts(rows)}
    assert met["switches at equal delay at least 3x fewer than thresholds', by hand"] is False


def test_more_work_takes_more_time() -> None:
    def work(times: int) -> Any:
        return lambda: [sum(range(2000)) for _ in range(50 * times)]

    taken = component_time.milliseconds({"once": work(1), "five times": work(5)}, blocks=5)
    assert taken["five times"] > 2.5 * taken["once"]


def test_the_time_of_each_part_is_there_and_the_whole_holds_its_parts() -> None:
    rows = {row["figure"]: row["ours"] for row in component_time.rows(quick=True)}
    whole, fold = rows["ms per step: whole ContextAnalyzer"], rows["ms per step: ContextAnalyzer.observe"]
    assert all(taken > 0 for taken in rows.values()) and whole > fold


def test_observations_of_the_time_are_measured_as_often_as_by_default() -> None:
    config, stream = BrainConfig(), component_time.observations(BrainConfig())
    seen = [next(stream) for _ in range(100)]
    assert sum(one.attention is not None for one in seen) == 100 // config.attention_every


def test_what_length_explains_is_taken_out_of_the_noise_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = [_trace_owing(0.3, seed) for seed in range(3)]
    plain = [_trace_owing(0.0, seed) for seed in range(3)]
    assert all(after < 0.5 * before for after, before in map(component_lengths.noises, silent))
    assert all(after == pytest.approx(before, rel=0.1) for after, before in map(component_lengths.noises, plain))
    with_it, without = (component_lengths.alarms(0.3, 0, known) for known in (True, False))
    assert with_it[1] < 3 and without[1] > 10 and with_it[0] > 0
    # A part that takes out nothing is seen to.
    monkeypatch.setattr(LengthEffect, "effect", lambda self: 0.0)
    assert all(after == before for after, before in map(component_lengths.noises, silent))


def _trace_owing(effect: float, seed: int) -> Trace:
    recorder = Recorder()
    for shown in component_lengths.run_of(effect, False, seed):
        recorder.add(shown)
    return recorder.trace("made up", host="espnet", corpus="made up")


# The collection.


def row(part: str, figure: str, mine: float | str, theirs: float | str | None, against: str = "x") -> dict[str, Any]:
    return {"part": part, "against": against, "figure": figure, "ours": mine, "theirs": theirs, "note": ""}


@pytest.mark.parametrize(
    ("good", "worse"),
    [
        (
            row("filter: level and slope", "RMSE of the level, known", 0.7, 1.0),
            row("filter: level and slope", "RMSE of the level, known", 0.8, 1.0),
        ),
        (
            row("filter: spikes and breaks", "spike of 4 widths found", 0.9, 0.9),
            row("filter: spikes and breaks", "spike of 4 widths found", 0.8, 0.9),
        ),
        (
            row("filter: spikes and breaks", "break of 4 widths by `changed`, flat", 0.9, 0.9),
            row("filter: spikes and breaks", "break of 4 widths by `changed`, flat", 0.8, 0.9),
        ),
        (row("trends", "median delay, steps: period 2", 20.0, "missed"), row("trends", "median delay", "missed", 20.0)),
        (
            row("time", "ms per training step: micro-Tacotron", 14.0, 15.0),
            row("time", "ms per training step: micro-Tacotron", 16.0, 15.0),
        ),
        (row("trends", "false alarms per 10,000", 9.0, 9.0), row("trends", "false alarms per 10,000", 30.0, 9.0)),
        (
            row("time", "ms per step: whole ContextAnalyzer", 0.9, 1.0),
            row("time", "ms per step: whole ContextAnalyzer", 1.1, 1.0),
        ),
    ],
)
def test_a_verdict_turns_when_a_row_does(good: dict[str, Any], worse: dict[str, Any]) -> None:
    (one,), (other,) = components.verdicts([good]), components.verdicts([worse])
    assert one["met"] is True and other["met"] is False


def test_of_oscillations_those_that_agents_heed_are_judged_by_themselves() -> None:
    slow = row("trends", "median delay, steps: period 32, constant", 40.0, 20.0)
    fast = row("trends", "median delay, steps: period 9, constant", 10.0, 20.0)
    neither = row("trends", "median delay, steps: period 9, growing", "missed", "missed")
    both, heeded = components.verdicts([slow, fast, neither])
    assert not both["met"] and "earlier in 1 of 3 cases, later in 1, alike in 0, missed by both in 1" in both["figure"]
    assert heeded["met"] and "within 12 steps" in heeded["criterion"]


def test_rows_are_collected_shown_and_strict_json(tmp_path: Path) -> None:
    recorder = Recorder()
    for step in range(1, 200):
        good = min(1.0, step / 150)
        report = AttentionReport(good, good, good, good, 0.5, 1.0, 1.0, 5.0, 1.0) if step % 5 == 0 else None
        recorder.add(Observation(step, {"total": 1.0 / step}, attention=report))
    (tmp_path / "town").mkdir()
    save(tmp_path / "town" / "a.safetensors", [recorder.trace("a", host="h", corpus="town")])
    console = Console(record=True, width=200, file=sys.stderr)
    rows = [row for name in ("phases", "time") for row in components.collect(name, True, tmp_path)]
    components.show(rows, console)
    assert "recorded town" in console.export_text()
    json.dumps(components.plain(rows), allow_nan=False)
    assert all(set(one) == {"part", "against", "figure", "ours", "theirs", "note", "quick"} for one in rows)
    assert components.missing("nothing") and not components.missing("phases")


def test_a_part_run_again_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import run

    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"parts": {"filter": [row("filter: level and slope", "RMSE of the slope, x", 1, 1)]}}))
    monkeypatch.setattr(sys, "argv", ["run.py", "components", "--quick", "--arms", "time", "--json", str(path)])
    assert run.main() == 0
    found = json.loads(path.read_text())
    assert list(found["parts"]) == ["filter", "time"] and found["parts"]["filter"][0]["ours"] == 1
    assert [verdict["part"] for verdict in found["verdicts"]] == ["filter", "time", "time"]
    monkeypatch.setattr(sys, "argv", ["run.py", "components", "--arms", "nonsense", "--json", str(path)])
    assert run.main() == 2


def test_the_model_of_ranks_is_a_line_that_never_falls() -> None:
    assert component_ranks.line((2, 4, 8), (1.2, 1.4, 1.8)) == pytest.approx((1.0, 0.1))
    assert component_ranks.line((2, 4, 8), (3.0, 2.0, 1.0)) == pytest.approx((66 / 49, 0.0)), "relative errors"
    assert component_ranks.line((2, 4, 8), (0.1, 1.0, 3.0))[0] == 0.0


@pytest.mark.parametrize("count", [1, 2])
def test_what_ranks_cost_is_measured_in_real_processes(count: int) -> None:
    cost = component_ranks.measure(count, rounds=2)
    assert cost.whole > cost.exchange and (cost.exchange > 0.0) == (cost.each_step > 0.0) == (count > 1)


def test_what_is_not_finite_is_null_in_the_file() -> None:
    assert components.plain({"a": [math.nan, 1.0, (math.inf,)]}) == {"a": [None, 1.0, [None]]}


TROUBLE = {"rate 0.1": {"rate": 1e-1}}


def test_looking_at_what_each_part_changes_changes_no_decision() -> None:
    (watched,) = component_eyes.steered(TROUBLE, 1, 60)
    setting = MicroSetting(guided_weight=component_coordination.WEAK, **TROUBLE["rate 0.1"])
    run = MicroRun(setting, component_eyes.SEED)
    manager = ContextAwareTrainingManager(BrainConfig(), setting.capabilities, setting.host_values)
    for step in range(1, 61):
        manager.observe(run.step(manager.knobs))
        if manager.due(step):
            manager.decide()
    assert watched.manager.knobs == manager.knobs and watched.decisions == 6
    assert watched.changed["phases"] > 0, "bare thresholds have no doubt, and the targets hang on it"
    assert all(watched.large[part] <= count <= watched.decisions for part, count in watched.changed.items())


def test_a_recorded_run_is_replayed_with_the_knobs_of_the_record() -> None:
    recorder, start = Recorder(), make_manager().knobs
    for seen in observations([Stretch(60, slope=-0.05, attention=0.3)]):
        recorder.add(seen, {**start, LEARNING_RATE: 2.0 if seen.step > 30 else 1.0})
    trace = recorder.trace("one", host="espnet", corpus="c")
    brain = component_eyes.replayed(trace)
    assert brain.decisions == 6
    rates = [d.before[LEARNING_RATE] for d in _decisions(trace)]
    assert rates == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def _decisions(trace: Trace) -> list[Decision]:
    """What the brain of a replay decides."""
    made: list[Decision] = []
    decide = ContextAwareTrainingManager.decide

    def noted(manager: ContextAwareTrainingManager) -> Decision:
        made.append(decide(manager))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component_eyes, "PARTS", ())
        patch.setattr(ContextAwareTrainingManager, "decide", noted)
        component_eyes.replayed(trace)
    return made


def test_a_risk_that_is_shut_lets_everything_through() -> None:
    manager = make_manager()
    moves = {LEARNING_RATE: 3.0}
    for _ in range(20):
        manager.risk.learn({LEARNING_RATE: (1.0, 2.0)}, kept=False)
    assert manager.risk.weigh(manager.context(), moves, None).moves == {}
    blindfold(manager, "risk")
    assert manager.risk.weigh(manager.context(), moves, None).moves == moves
