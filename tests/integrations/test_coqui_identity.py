"""Off means off: without the brain, with it off, and with it only observing, the host's run is the same to the bit."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("TTS", reason="Coqui is not installed: pip install 'tts-brain[coqui]'")

from coqui_run import assert_same, make_config, quick, records, run, weights

STEPS = 6
OFF = [False, {"enabled": True, "mode": "off"}]
# Shuffled: whoever draws a random number more than the host changes the order of the clips.
RADAM = {"optimizer": "RAdam", "optimizer_params": {"betas": [0.9, 0.998], "weight_decay": 1e-6}, "shuffle": True}
NOAM = {**RADAM, "model": "tacotron", "lr_scheduler": "NoamLR", "lr_scheduler_params": {"warmup_steps": 3}}
BF16 = {**RADAM, "model": "tacotron", "mixed_precision": True, "precision": "bf16"}

# The same run by somebody who never heard of tts-brain: importing it fails.
PLAIN = """
import sys
for name in ("tts_brain", "tts_brain_coqui"):
    sys.modules[name] = None
import torch
from pathlib import Path
from trainer import Trainer, TrainerArgs
from TTS.config import load_config
from TTS.tts.datasets import load_tts_samples
from TTS.tts.models.tacotron2 import Tacotron2

torch.set_num_threads(1)
config_file, out, clips = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = load_config(config_file)
assert not hasattr(config, "brain")
config.output_path = str(Path(out).parent)
config.datasets[0].formatter = "ljspeech"
train, held_out = load_tts_samples(config, eval_split_size=2)
train.sort(key=lambda clip: Path(clip["audio_file"]).stat().st_size)
torch.manual_seed(1)
model = Tacotron2(config)
trainer = Trainer(TrainerArgs(), config, config.output_path, model=model, train_samples=train[:clips],
                  eval_samples=held_out, parse_command_line_args=False)
trainer.update_training_dashboard_logger = lambda **_: None
trainer._fit()
torch.save({"model": model.state_dict(), "optimizer": trainer.optimizer[0].state_dict()}, out)
"""


def state(trainer: Any) -> dict[str, Any]:
    """Everything that training changes."""
    scheduler = trainer.scheduler[0]
    return {
        "model": weights(trainer),
        "optimizer": trainer.optimizer[0].state_dict(),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "random": torch.get_rng_state(),
    }


@pytest.fixture(scope="module")
def plain(corpus: Path, module_folder: Path) -> dict[str, Any]:
    """The host alone, RAdam."""
    trainer = run(make_config(corpus, module_folder / "plain", **RADAM), steps=STEPS)
    assert trainer.total_steps_done == STEPS
    assert not (trainer.output_path / "brain").exists()
    return state(trainer)


@pytest.mark.parametrize("brain", OFF, ids=["false", "mode off"])
def test_off_is_the_host(brain: Any, plain: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    trainer = run(make_config(corpus, tmp_path, brain=brain, **RADAM), steps=STEPS)
    assert not hasattr(trainer, "brain")
    assert not (trainer.output_path / "brain").exists()
    assert_same(state(trainer), plain)


def test_observe_is_the_host(plain: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    trainer = run(make_config(corpus, tmp_path, brain=quick("observe"), **RADAM), steps=STEPS)
    assert_same(state(trainer), plain)
    decisions = records(trainer, "decision")
    assert [d["step"] for d in decisions] == [2, 4, 6]
    assert not any(d["applied"] for d in decisions)
    # It looked at everything, or being identical would mean nothing.
    seen = records(trainer, "observation")
    assert [o["step"] for o in seen] == list(range(1, STEPS + 1))
    assert all(o["attention"] is not None and o["grad_norm"] > 0 for o in seen)
    assert [o["stop"] is not None for o in seen] == [False, True] * 3


@pytest.fixture(scope="module")
def without_tts_brain(corpus: Path, module_folder: Path) -> Iterator[dict[str, Any]]:
    config = make_config(corpus, module_folder / "blocked", **RADAM).to_dict()
    del config["brain"]
    folder = module_folder / "blocked"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    out = folder / "state.pth"
    command = [sys.executable, "-c", PLAIN, str(folder / "config.json"), str(out), str(STEPS * config["batch_size"])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    yield torch.load(out)
    out.unlink()


def test_brain_absent_is_the_host(plain: dict[str, Any], without_tts_brain: dict[str, Any]) -> None:
    assert_same(dict(without_tts_brain["model"]), plain["model"])
    assert_same(without_tts_brain["optimizer"], plain["optimizer"])


@pytest.mark.parametrize("settings", [NOAM, BF16], ids=["NoamLR", "bf16"])
def test_observe_is_the_host_under(settings: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    alone = state(run(make_config(corpus, tmp_path / "plain", **settings), steps=STEPS))
    watched = run(make_config(corpus, tmp_path / "observe", brain=quick("observe"), **settings), steps=STEPS)
    assert_same(state(watched), alone)
    assert len(records(watched, "decision")) == STEPS // 2
    assert not records(watched, "event")
