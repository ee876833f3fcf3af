"""Traces of runs: recorded from journals and observations, kept in files, given back as observations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tts_brain.config import BrainConfig
from tts_brain.journal import Journal
from tts_brain.learning.micro_tacotron import CAPABILITIES, MicroRun, MicroSetting
from tts_brain.learning.traces import COLUMNS, Recorder, Trace, from_journal, load, save
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.statefile import StateFileError
from tts_brain.types import LEARNING_RATE, Observation


def _journal(folder: Path, every: int) -> list[Observation]:
    """A real run of the micro-Tacotron under the brain, written down as the hosts' sessions do."""
    setting = MicroSetting(rate=5e-4, nan_steps=frozenset({7}))
    manager = ContextAwareTrainingManager(BrainConfig(), setting.capabilities, setting.host_values)
    run, journal, seen = MicroRun(setting, 0), Journal(folder), []
    journal.write("start", {"step": 0, "host": CAPABILITIES.host})
    for _ in range(30):
        observation = run.step(manager.knobs)
        manager.observe(observation)
        seen.append(observation)
        if observation.step % every == 0:
            journal.write("observation", observation)
        if manager.due(observation.step):
            journal.write("decision", manager.decide())
    journal.close()
    return seen


def test_a_journal_with_every_step_is_a_trace(tmp_path: Path) -> None:
    seen = _journal(tmp_path, every=1)
    trace = from_journal(tmp_path, name="one", corpus="made-up", faults=("nan-once",))
    assert trace.table.shape == (30, len(COLUMNS))
    assert (trace.name, trace.host, trace.corpus, trace.faults) == ("one", "micro-tacotron", "made-up", ("nan-once",))
    assert np.allclose(trace.column("mel"), [o.losses["mel"] for o in seen], equal_nan=True)
    assert np.isnan(trace.column("mel")[6])
    assert trace.column("skipped").tolist() == [float(o.skipped) for o in seen]
    assert np.isnan(trace.column("attention.focus")[0]) and math.isfinite(trace.column("attention.focus")[4])


def test_knobs_are_those_the_step_was_made_with(tmp_path: Path) -> None:
    _journal(tmp_path, every=1)
    rate = from_journal(tmp_path).column(f"knob.{LEARNING_RATE}")
    assert rate[0] == 1.0  # known from the first decision on what it found
    changes = np.flatnonzero(np.diff(rate)) + 1
    assert len(changes) and all(step % 10 == 0 for step in changes)  # decisions are taken after steps 10, 20


def test_a_journal_with_gaps_is_refused_with_the_line_to_write(tmp_path: Path) -> None:
    _journal(tmp_path, every=10)
    with pytest.raises(ValueError, match="journal_every: 1"):
        from_journal(tmp_path)


def test_what_is_saved_is_read_and_is_what_was_observed(tmp_path: Path) -> None:
    setting = MicroSetting()
    run, recorder = MicroRun(setting, 3), Recorder()
    seen = [run.step() for _ in range(12)]
    for observation in seen:
        recorder.add(observation, {LEARNING_RATE: 2.0})
    path = tmp_path / "some.safetensors"
    save(path, [recorder.trace("a", host="h", corpus="c"), Recorder().trace("b", host="h", corpus="c", faults=["x"])])
    one, empty = load(path)
    assert len(empty.observations()) == 0 and empty.faults == ("x",)
    for read, made in zip(one.observations(), seen, strict=True):
        assert read.step == made.step and read.skipped == made.skipped
        assert read.losses == pytest.approx(made.losses, rel=1e-6)
        assert read.grad_norm == pytest.approx(made.grad_norm, rel=1e-6)
        assert (read.attention is None) == (made.attention is None)
        assert read.stop is not None and made.stop is not None
        assert read.stop.false_negative == pytest.approx(made.stop.false_negative, abs=1e-6)


def test_a_loss_the_host_lacks_is_not_made_up() -> None:
    recorder = Recorder()
    recorder.add(Observation(1, {"total": math.inf, "mel": math.nan}))
    recorder.add(Observation(2, {"total": 1e300, "mel": 1.0}))
    first, second = recorder.trace("a", host="h", corpus="c").observations()
    assert set(first.losses) == {"total", "mel"} and math.isnan(first.losses["mel"])
    assert second.losses["total"] == math.inf and second.grad_norm is None and second.attention is None


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateFileError):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(ValueError, match="shape"):
        Trace("a", "h", "c", (), np.zeros((3, 2), dtype=np.float32))


def test_columns_of_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a column that is not known any more, and without one that is new."""
    from tts_brain.learning import traces

    path = tmp_path / "old.safetensors"
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    run = {"name": "a", "host": "h", "corpus": "c", "faults": (), "table": table}
    traces.save_state(path, {"columns": ["step", "gone", "mel"], "runs": [run]}, kind=traces.KIND, version=1)
    read = load(path)[0]
    assert read.column("step").tolist() == [0.0, 3.0] and read.column("mel").tolist() == [2.0, 5.0]
    assert np.isnan(read.column("gate")).all()
