"""One arm of a comparison: Coqui's real Trainer for a given number of steps, held-out clips measured on the way.

    python -m tts_brain_coqui.experiment ARM_FOLDER        (reads ARM_FOLDER/arm.json)

Arms of one comparison see the same initial weights, the same batches in the same order and the same random numbers.
Everything is written as it comes, so a killed run keeps what there is:

    train.jsonl      step, mel and total loss, rate used, seconds
    held_out.jsonl   step, held-out L1 and attention metrics; every ``speak_every`` steps the share of clips it speaks
    alignments.npz   the last and earlier attention matrices of two held-out clips
    audio/*.npy      sound of the first two held-out clips
    run/…/brain/     the brain's journal
    done.json        what was measured at the end
"""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from trainer import Trainer, TrainerArgs
from TTS.config.shared_configs import BaseAudioConfig, BaseDatasetConfig
from TTS.tts.datasets import load_tts_samples
from TTS.tts.models.tacotron2 import Tacotron2

from tts_brain.pytorch.heldout import Spoken
from tts_brain_coqui.config import install
from tts_brain_coqui.corpus import register
from tts_brain_coqui.probe import Probe

PICTURED_CLIPS = 2
_BUCKET_BATCHES = 8


@dataclass
class Arm:
    """What to run. ``config`` is laid over Coqui's ``Tacotron2Config`` defaults, ``brain`` is its brain section;
    ``speak_every`` is a multiple of ``measure_every``, or 0, which has clips spoken at the end alone; ``loaders`` 0
    makes features in the training process."""

    name: str
    label: str
    data: str
    steps: int
    brain: dict[str, Any] | bool = False
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch_size: int = 16
    reduction_factor: int = 5
    held_out: int = 12
    measure_every: int = 25
    speak_every: int = 0
    loaders: int = 0

    def __post_init__(self) -> None:
        if self.speak_every % self.measure_every:
            raise ValueError(
                f"speak_every={self.speak_every} is no multiple of measure_every={self.measure_every}, when clips are "
                f"looked at; write speak_every: {self.measure_every}"
            )

    def save(self, folder: Path) -> None:
        """Write ``folder / arm.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "arm.json").write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Arm:
        """Inverse of ``save``."""
        return cls(**json.loads((folder / "arm.json").read_text(encoding="utf-8")))


class FixedOrder:
    """A loader of exactly ``steps`` batches whose order depends on the seed alone, not on what the model draws."""

    def __init__(self, dataset: Any, batch_size: int, steps: int, seed: int, loaders: int = 0) -> None:
        lengths = [sample["audio_length"] for sample in dataset.samples]
        batches = list(islice(_batches(lengths, batch_size, random.Random(seed)), steps))
        self._loader = DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate_fn, num_workers=loaders)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def _batches(lengths: list[int], size: int, shuffle: random.Random) -> Iterator[list[int]]:
    """Endless batches of indices, clips of like length together (a third less padding), shuffled anew each epoch."""
    size = min(size, len(lengths))
    while True:
        order = list(range(len(lengths)))
        shuffle.shuffle(order)
        epoch = []
        for start in range(0, len(order), size * _BUCKET_BATCHES):
            bucket = sorted(order[start : start + size * _BUCKET_BATCHES], key=lambda i: lengths[i])
            epoch += [bucket[i : i + size] for i in range(0, len(bucket) - size + 1, size)]
        shuffle.shuffle(epoch)
        yield from epoch


class ArmRun:
    """Runs an arm in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arm = Arm.load(folder)
        self.pictures: dict[str, np.ndarray] = {}

    def run(self) -> None:
        """Train, measure, write."""
        trainer = self.build()
        self._watch(trainer)
        self._measure(trainer.model, 0)
        trainer._fit()
        self._finish(trainer.model)

    def build(self) -> Trainer:
        """The trainer, ready to fit, with the brain on it when the arm has one."""
        arm = self.arm
        register()
        install()
        config = _config(arm, self.folder)
        train_samples, held_out = load_tts_samples(config, eval_split_size=arm.held_out)
        torch.manual_seed(arm.seed)
        model = Tacotron2(config)
        dataset = _dataset(model, config, train_samples, is_eval=False)
        loader = FixedOrder(dataset, arm.batch_size, arm.steps, arm.seed, arm.loaders)
        trainer = Trainer(
            TrainerArgs(),
            config,
            str(self.folder / "run"),
            model=model,
            train_samples=train_samples,
            eval_samples=held_out,
            train_loader=loader,
            parse_command_line_args=False,
        )
        self.probe = Probe(_held_out_batch(trainer, model, config, held_out))
        return trainer

    def _watch(self, trainer: Trainer) -> None:
        """Write each step's raw losses; outermost, so that the seconds hold all that the brain costs."""
        host_step, optimizer = trainer.train_step, trainer.optimizer[0]
        rate = [0.0]
        # Made after the brain's hook, so it runs after it and sees the rate that is really used.
        optimizer.register_step_pre_hook(lambda o, args, kwargs: rate.__setitem__(0, float(o.param_groups[0]["lr"])))

        def train_step(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            outputs, losses = host_step(*args, **kwargs)
            seconds = time.perf_counter() - start
            step = trainer.total_steps_done
            mel = 0.5 * (losses["decoder_loss"] + losses["postnet_loss"])
            norm = float(losses.get("grad_norm", float("nan")))
            row = {"step": step, "mel": mel, "stop": losses["stopnet_loss"], "grad_norm": norm, "rate": rate[0]}
            self._append("train.jsonl", {**row, "seconds": seconds})
            print(json.dumps({"step": step, "mel": mel}), flush=True)
            if step % self.arm.measure_every == 0 or step == self.arm.steps:
                self._measure(trainer.model, step)
            return outputs, losses

        trainer.train_step = train_step

    def _measure(self, model: Tacotron2, step: int) -> None:
        seen = self.probe.held_out(model)
        errors = {"": seen.l1, "_postnet": seen.l1_postnet, "_postnet_fresh": seen.l1_postnet_fresh}
        row = {"step": step, **{f"held_out_l1{where}": error for where, error in errors.items()}, **seen.values}
        if self.arm.speak_every and step and step % self.arm.speak_every == 0:
            row["speaks"] = _share([self.probe.speak(model, clip) for clip in range(len(self.probe))])
        self._append("held_out.jsonl", row)
        print(json.dumps({"step": step, "attention_diag": seen.values["attention_diag"]}), flush=True)
        for clip, matrix in enumerate(seen.matrices[:PICTURED_CLIPS]):
            self.pictures[f"{step}/{clip}"] = matrix.astype(np.float16)
        unfinished = self.folder / "alignments.unfinished.npz"
        np.savez_compressed(unfinished, **self.pictures)
        unfinished.replace(self.folder / "alignments.npz")

    def _finish(self, model: Tacotron2) -> None:
        (self.folder / "audio").mkdir(exist_ok=True)
        spoken = [self.probe.speak(model, clip) for clip in range(len(self.probe))]
        for clip in range(min(PICTURED_CLIPS, len(self.probe))):
            mels = {
                "reference": self.probe.reference_mel(clip),
                "teacher_forced": self.probe.predicted_mel(model, clip),
                "free": spoken[clip].mel,
            }
            for kind, mel in mels.items():
                sound = model.ap.inv_melspectrogram(mel.T)
                np.save(self.folder / "audio" / f"{clip}_{kind}.npy", np.asarray(sound, dtype=np.float32))
        done = {"speaks": _share(spoken), "sample_rate": model.ap.sample_rate}
        (self.folder / "done.json").write_text(json.dumps(done), encoding="utf-8")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _share(spoken: list[Spoken]) -> float:
    return sum(s.speaks for s in spoken) / len(spoken)


def _config(arm: Arm, folder: Path) -> Any:
    config_class = install()["Tacotron2Config"]
    settings = {
        "run_name": arm.name,
        "output_path": str(folder / "run"),
        "training_seed": arm.seed,
        "datasets": [BaseDatasetConfig(formatter="ljspeech_any", meta_file_train="metadata.csv", path=arm.data)],
        "audio": BaseAudioConfig(sample_rate=22050, do_trim_silence=True, trim_db=60.0, mel_fmin=0.0, mel_fmax=8000),
        "text_cleaner": "english_cleaners",
        "batch_size": arm.batch_size,
        "r": arm.reduction_factor,
        "epochs": 1,
        "run_eval": False,
        "test_delay_epochs": 10**6,
        "test_sentences": [],
        "save_checkpoints": False,
        "save_best_after": 10**9,
        "print_step": 10**9,
        "plot_step": 10**9,
        "log_model_step": 10**9,
        "brain": arm.brain,
    }
    return config_class(**{**settings, **arm.config})


def _dataset(model: Tacotron2, config: Any, samples: list[Any], *, is_eval: bool) -> Any:
    return model.get_data_loader(config, is_eval=is_eval, samples=samples, verbose=False).dataset


def _held_out_batch(trainer: Trainer, model: Tacotron2, config: Any, samples: list[Any]) -> dict[str, Any]:
    dataset = _dataset(model, config, samples, is_eval=True)
    batch = trainer.format_batch(dataset.collate_fn([dataset[i] for i in range(len(dataset))]))
    text = [
        model.tokenizer.ids_to_text(ids[:n].tolist())
        for ids, n in zip(batch["text_input"], batch["text_lengths"], strict=True)
    ]
    (Path(config.output_path).parent / "texts.json").write_text(json.dumps(text), encoding="utf-8")
    return batch


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    # Asked to end, or Ctrl-C: either way the journal gets its last line.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        ArmRun(Path(sys.argv[1])).run()
    except KeyboardInterrupt:
        sys.exit(130)
