"""Short real runs of Coqui's Trainer: real models, real speech of espeak-ng, a few steps on one core."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trainer import Trainer, TrainerArgs
from TTS.config.shared_configs import BaseAudioConfig, BaseDatasetConfig
from TTS.tts.datasets import load_tts_samples
from TTS.tts.models.tacotron import Tacotron
from TTS.tts.models.tacotron2 import Tacotron2

from tts_brain.journal import read_journal
from tts_brain_coqui import Tacotron2Config, TacotronConfig
from tts_brain_coqui.corpus import ljspeech_any

BATCH = 2
STEPS_AN_EPOCH = 6
# What a test needs in a handful of steps: decide often, look at the attention always.
QUICK = {"decide_every": 2, "attention_every": 1, "journal_every": 1, "attention_utterances": 2}


def quick(mode: str = "full", **settings: Any) -> dict[str, Any]:
    """A brain that decides every other step."""
    return {**QUICK, "mode": mode, **settings}


def make_config(corpus: Path, folder: Path, model: str = "tacotron2", **settings: Any) -> Any:
    """A Tacotron config for a CPU: r=7, two short clips a batch, nothing spoken, nothing saved.

    Args:
        corpus: from ``make_corpus``.
        folder: where the run folder is made.
        settings: any of Coqui's, ``brain`` too.
    """
    audio = BaseAudioConfig(sample_rate=22050, mel_fmin=0.0, mel_fmax=8000, hop_length=1024, griffin_lim_iters=10)
    common: dict[str, Any] = {
        "run_name": "run",
        "output_path": str(folder),
        "datasets": [BaseDatasetConfig(meta_file_train="metadata.csv", path=str(corpus))],
        "audio": audio,
        "text_cleaner": "english_cleaners",
        "batch_size": BATCH,
        "eval_batch_size": BATCH,
        "r": 7,
        "optimizer": "SGD",  # no state: checkpoints stay small
        "optimizer_params": {},
        "lr": 1e-3,
        "lr_scheduler": None,
        "lr_scheduler_params": {},
        "scheduler_after_epoch": False,
        "epochs": 1,
        "print_step": 1000,
        "plot_step": 1000,
        "save_step": 100_000,
        "save_checkpoints": False,
        "save_best_after": 100_000,
        "run_eval": False,
        "test_delay_epochs": 1000,  # a test sentence would be decoded to the limit
        "test_sentences": [],
        "max_decoder_steps": 5,
        "num_loader_workers": 0,
        "num_eval_loader_workers": 0,
        "cudnn_enable": False,
    }
    cls = TacotronConfig if model == "tacotron" else Tacotron2Config
    return cls(**{**common, **settings})


def make_trainer(
    config: Any,
    *,
    steps: int = STEPS_AN_EPOCH,
    args: TrainerArgs | None = None,
    callbacks: dict[str, Callable[[Trainer], None]] | None = None,
    command_line: bool = False,
) -> Trainer:
    """The real Trainer on ``steps`` batches an epoch; the model's weights are the same each time."""
    train, held_out = load_tts_samples(config, eval_split_size=2, formatter=ljspeech_any)
    train.sort(key=lambda clip: Path(clip["audio_file"]).stat().st_size)  # the shortest will do
    torch.manual_seed(1)
    model = (Tacotron if config.model == "tacotron" else Tacotron2)(config)
    trainer = Trainer(
        args or TrainerArgs(),
        config,
        config.output_path,
        model=model,
        train_samples=train[: steps * config.batch_size],
        eval_samples=held_out,
        parse_command_line_args=command_line,
        callbacks=callbacks,
    )
    trainer.log_model_step = math.nan  # its plots and Griffin-Lim cost more than the steps
    return trainer


def run(config: Any, **more: Any) -> Trainer:
    """Train to the end. ``_fit``, not ``fit``: that one ends the process when something goes wrong."""
    trainer = make_trainer(config, **more)
    trainer._fit()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def records(trainer: Trainer, kind: str | None = None) -> list[dict[str, Any]]:
    """The run's journal."""
    return [r for r in read_journal(trainer.output_path / "brain") if kind in (None, r["kind"])]


def events(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    """The journal's events of one name."""
    return [r for r in records(trainer, "event") if r["event"] == name]


def assert_same(left: Any, right: Any, place: str = "") -> None:
    """Bit-identical, tensors and all; NaN is not NaN."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            assert_same(left[key], right[key], f"{place}/{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), place
        for number, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{place}/{number}")
    else:
        assert left == right, place


def assert_finite(trainer: Trainer) -> None:
    """Weights, running statistics, optimizer state: no NaN, no infinity."""
    for name, value in trainer.model.state_dict().items():
        assert not value.is_floating_point() or torch.isfinite(value).all(), name
    for optimizer in trainer.optimizer:
        for state in optimizer.state_dict()["state"].values():
            for name, value in state.items():
                assert not isinstance(value, torch.Tensor) or torch.isfinite(value).all(), name
