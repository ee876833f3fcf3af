"""Checkpoints and their sidecars: what continues, what starts afresh, and what plain Coqui makes of it."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("TTS", reason="Coqui is not installed: pip install 'tts-brain[coqui]'")

from coqui_run import assert_same, events, make_config, make_trainer, quick, records, weights
from trainer import TrainerArgs

from tts_brain.pytorch.sidecar import SIDECAR_KIND, SIDECAR_VERSION
from tts_brain.statefile import load_state, save_state

STEPS = 8
SAVES = {"save_checkpoints": True, "save_step": 3, "save_n_checkpoints": 1}


class Run:
    """Eight steps with checkpoints at global steps 3 and 6 (the 4th and the 7th), of which one is kept."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder
        self.at_save: dict[str, Any] = {}
        trainer = make_trainer(make_config(corpus, folder, model="tacotron", brain=quick(), **SAVES), steps=STEPS)
        session = trainer.brain.session
        session.manager.knobs["learning_rate"] = 1.3  # as an earlier decision would have left it
        session._turn_taps()
        step = trainer.train_step

        def keep(*args: Any) -> Any:
            result = step(*args)
            if trainer.total_steps_done == 7:
                self.at_save = {
                    "manager": session.manager.state_dict(),
                    "step": session.step,
                    "weights": weights(trainer),
                    "knobs": dict(session.knobs),
                }
            return result

        trainer.train_step = keep
        trainer._fit()
        self.path = trainer.output_path
        self.journal = records(trainer)

    @property
    def sidecar(self) -> Path:
        return self.path / "brain" / "state_6.safetensors"

    def resume(self, steps: int = 1, **settings: Any) -> Any:
        """A new trainer with ``continue_path``, not yet trained."""
        config = make_config(self.corpus, self.folder, model="tacotron", brain=quick(), **settings)
        return make_trainer(config, steps=steps, args=TrainerArgs(continue_path=str(self.path)))


@pytest.fixture(scope="module")
def first(corpus: Path, module_folder: Path) -> Run:
    return Run(corpus, module_folder / "first")


@pytest.fixture
def copy(first: Run, tmp_path: Path) -> Run:
    """``first``, to be spoilt."""
    other = object.__new__(Run)
    other.__dict__.update(first.__dict__)
    other.path = tmp_path / "copy"
    shutil.copytree(first.path, other.path)
    return other


def test_one_sidecar_for_each_checkpoint_there_is(first: Run) -> None:
    assert [p.name for p in first.path.glob("checkpoint_*.pth")] == ["checkpoint_6.pth"]
    assert [p.name for p in first.path.glob("brain/state_*")] == ["state_6.safetensors"]


def test_resume_goes_on_where_it_was_saved(copy: Run) -> None:
    trainer = copy.resume(steps=3)
    session, at_save = trainer.brain.session, copy.at_save
    assert (trainer.total_steps_done, session.step, at_save["step"]) == (7, 7, 7)
    assert_same(session.manager.state_dict(), at_save["manager"])
    assert_same(weights(trainer), at_save["weights"])
    # The knobs turn the very first resumed step.
    assert dict(session.knobs) == at_save["knobs"] and session.knobs["gate_weight"] != 1.0
    assert session._taps[0].rate_multiplier == at_save["knobs"]["learning_rate"] != 1.0
    used: list[tuple[float, float]] = []
    trainer.optimizer[0].register_step_pre_hook(lambda o, *_: used.append((o.param_groups[0]["lr"], o.defaults["lr"])))
    trainer._fit()
    assert used[0][0] == pytest.approx(at_save["knobs"]["learning_rate"] * used[0][1])
    # The journal reads as one run: what came after the checkpoint stands once.
    steps = [r["step"] for r in records(trainer, "observation")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [r["step"] for r in records(trainer, "decision")] == [2, 4, 6, 8, 10]
    assert not records(trainer, "event")


def test_resuming_inside_a_schedule_is_no_change_of_regime(corpus: Path, tmp_path: Path) -> None:
    """config.json holds the r of the start; the host takes the schedule's only when the first epoch begins."""
    schedule = {"model": "tacotron", "r": 14, "gradual_training": [[0, 14, 2], [2, 7, 2]]}
    config = make_config(corpus, tmp_path, epochs=2, brain=quick(), **schedule, **SAVES)
    trainer = make_trainer(config, steps=2)
    trainer.model.config = trainer.config  # see test_coqui_models
    trainer._fit()
    assert len(events(trainer, "regime_changed")) == 1
    assert (trainer.output_path / "checkpoint_3.pth").exists()
    args = TrainerArgs(continue_path=str(trainer.output_path))
    resumed = make_trainer(make_config(corpus, tmp_path, brain=quick(), **schedule), steps=1, args=args)
    resumed.model.config = resumed.config
    assert resumed.model.decoder.r == 14
    resumed._fit()
    assert resumed.model.decoder.r == 7
    assert len(events(resumed, "regime_changed")) == 1


@pytest.mark.parametrize(
    ("recipes", "says"),
    [
        (False, "enabled True (the recipe says False)"),
        (quick("observe"), "mode 'full' (the recipe says 'observe')"),
        (quick(), ""),
    ],
)
def test_a_recipe_that_has_changed_its_mind_is_told_that_the_run_has_not(
    recipes: Any, says: str, copy: Run, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(copy.corpus, copy.folder, model="tacotron", brain=recipes)
    trainer = make_trainer(config, steps=1, args=TrainerArgs(continue_path=str(copy.path)))
    assert trainer.brain.session.config.mode == "full"
    assert [says in line for line in caplog.messages if "of its own config.json" in line] == [True] * bool(says)


@pytest.mark.parametrize("command_line", [True, False])
@pytest.mark.parametrize(
    ("flags", "mode"),
    [
        (["--coqpit.brain.mode", "observe"], "observe"),
        (["--coqpit.lr", "0.5", "--coqpit.brain.mode=assist"], "assist"),
        (["--coqpit.brain.enabled", "false"], None),
    ],
)
def test_flags_reach_a_continued_run_whichever_way_the_host_reads_its_own(
    command_line: bool,
    flags: list[str],
    mode: str | None,
    copy: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``coqui-train`` has the host read ``config.json`` over the flags; a recipe has it read them last."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    config = make_config(copy.corpus, copy.folder, model="tacotron", brain=quick())
    args = TrainerArgs(continue_path=str(copy.path))
    trainer = make_trainer(config, steps=1, args=args, command_line=command_line)
    brain = getattr(trainer, "brain", None)
    assert (None if brain is None else brain.session.config.mode) == mode
    assert not any("of its own config.json" in line for line in caplog.messages)


def test_a_change_made_between_two_sessions_is_seen(copy: Run) -> None:
    trainer = copy.resume(steps=2)
    trainer.config.batch_size = 3
    trainer._fit()
    (event,) = events(trainer, "regime_changed")
    assert (event["step"], event["message"]) == (7, "batch size 2 → 3")


def test_restore_is_a_new_run(first: Run, tmp_path: Path) -> None:
    config = make_config(first.corpus, tmp_path, model="tacotron", brain=quick())
    args = TrainerArgs(restore_path=str(first.path / "checkpoint_6.pth"))
    trainer = make_trainer(config, steps=1, args=args)
    assert_same(weights(trainer), first.at_save["weights"])
    session = trainer.brain.session
    assert session.step == 0 and session.knobs["gate_weight"] == session.knobs["learning_rate"] == 1.0
    trainer._fit()
    assert [r["step"] for r in records(trainer, "observation")] == [1]
    assert not records(trainer, "event")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def garble(path: Path) -> None:
    path.write_bytes(b"no safetensors file at all")


def other_version(path: Path) -> None:
    save_state(path, {"step": 7}, kind=SIDECAR_KIND, version=SIDECAR_VERSION + 1)


def other_manager(path: Path) -> None:
    state = {"step": 7, "regime": None, "manager": {"version": 99}}
    save_state(path, state, kind=SIDECAR_KIND, version=SIDECAR_VERSION)


def lacking_step(path: Path) -> None:
    save_state(path, {"manager": {}}, kind=SIDECAR_KIND, version=SIDECAR_VERSION)


def of_another_run(path: Path) -> None:
    state = load_state(path, kind=SIDECAR_KIND, version=SIDECAR_VERSION)
    state["weights"] = [1.01 * norm for norm in state["weights"]]
    save_state(path, state, kind=SIDECAR_KIND, version=SIDECAR_VERSION)


def missing(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil", [cut, garble, other_version, other_manager, lacking_step, of_another_run, missing, unreadable]
)
def test_a_bad_sidecar_is_said_and_left(
    spoil: Callable[[Path], None], copy: Run, caplog: pytest.LogCaptureFixture
) -> None:
    path = copy.sidecar
    spoil(path)
    before = path.read_bytes() if path.is_file() else path.exists()
    trainer = copy.resume()
    (error,) = (r.getMessage() for r in caplog.records if r.levelname == "ERROR" and r.name == "tts_brain")
    assert "the brain starts afresh" in error and path.name in error
    assert any(
        remedy in error.lower()
        for remedy in ("delete the file", "delete it", "remove the brain's sidecar", "start without")
    )
    session = trainer.brain.session
    assert session.step == trainer.total_steps_done == 7 and session.knobs["gate_weight"] == 1.0
    trainer._fit()
    assert trainer.total_steps_done == 8
    assert (path.read_bytes() if path.is_file() else path.exists()) == before
    assert len(events(trainer, "resume_failed")) == 1 and not events(trainer, "fault")
    steps = [r["step"] for r in records(trainer, "observation")]
    assert (steps[0], steps[-1]) == (1, 8), "what the journal held of the earlier session is still told"


def test_files_of_the_user_are_left_alone(copy: Run) -> None:
    theirs = [copy.path / "voice_1_good.pth", copy.path / "brain" / "state_old.safetensors"]
    for path in theirs:
        path.write_bytes(b"mine")
    trainer = copy.resume()
    trainer.save_checkpoint()
    assert not events(trainer, "fault")
    assert all(path.read_bytes() == b"mine" for path in theirs)
    assert [p.name for p in copy.path.glob("brain/state_[0-9]*")] == ["state_7.safetensors"]


def test_best_models_have_sidecars_too(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", epochs=2, brain=quick(), save_best_after=0)
    trainer = make_trainer(config, steps=2)
    trainer._fit()
    best = {p.stem.rpartition("_")[2] for p in trainer.output_path.glob("best_model_*.pth")}
    assert len(best) == 1
    assert {p.stem.rpartition("_")[2] for p in trainer.output_path.glob("brain/state_*")} == best
    resumed = make_trainer(
        make_config(corpus, tmp_path, model="tacotron", brain=quick()),
        steps=1,
        args=TrainerArgs(continue_path=str(trainer.output_path)),
    )
    assert resumed.brain.session.step == int(best.pop())


PLAIN = """
import sys
for name in ("tts_brain", "tts_brain_coqui"):
    sys.modules[name] = None
import torch
from TTS.config import load_config
from TTS.tts.models.tacotron2 import Tacotron2

torch.set_num_threads(1)
run, checkpoint = sys.argv[1:]
config = load_config(run + "/config.json")
model = Tacotron2(config)
model.load_checkpoint(config, run + "/" + checkpoint, eval=True)
tokens = torch.LongTensor([model.tokenizer.text_to_ids("It works.")])
outputs = model.inference(tokens)
assert torch.isfinite(outputs["model_outputs"]).all()
print("frames", outputs["model_outputs"].shape[1])
"""


def test_a_checkpoint_loads_in_plain_coqui(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, brain=quick(), save_checkpoints=True, save_step=1)
    trainer = make_trainer(config, steps=2)
    trainer._fit()
    # Coqui wants a checkpoint's tensors only (weights_only): nothing of ours may be pickled into it.
    assert isinstance(torch.load(trainer.output_path / "checkpoint_1.pth", weights_only=True)["config"]["brain"], dict)
    command = [sys.executable, "-c", PLAIN, str(trainer.output_path), "checkpoint_1.pth"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    frames = int(result.stdout.split("frames ")[1])
    assert 0 < frames <= 5 * 7  # max_decoder_steps times r
