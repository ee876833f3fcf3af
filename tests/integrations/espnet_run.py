"""Short real runs of ESPnet's TTSTask: a real Tacotron2 of a few thousand parameters, real speech of espeak-ng."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from espnet2.tasks.tts import TTSTask

from tts_brain.corpus import load_ljspeech
from tts_brain.journal import read_journal

QUICK = {"decide_every": 2, "attention_every": 1, "journal_every": 1, "attention_utterances": 2}
SMALL = {
    "embed_dim": 8,
    "eunits": 8,
    "econv_layers": 1,
    "econv_chans": 8,
    "adim": 8,
    "aconv_chans": 2,
    "dlayers": 1,
    "dunits": 16,
    "prenet_units": 8,
    "postnet_layers": 1,
    "postnet_chans": 8,
    "reduction_factor": 3,
}


def quick(mode: str = "full", **settings: Any) -> dict[str, Any]:
    """``brain_conf`` that decides every other step."""
    return {**QUICK, "mode": mode, **settings}


@dataclass
class Data:
    """What ESPnet's stages 1 to 6 make, as far as training reads it."""

    folder: Path
    ids: list[str]

    @classmethod
    def make(cls, corpus: Path, folder: Path, clips: int = 12) -> Data:
        """The shortest clips of a corpus in LJSpeech layout; two speakers by turns, an embedding for each clip."""
        import numpy as np

        items = sorted(load_ljspeech(corpus), key=lambda item: Path(item["audio_file"]).stat().st_size)[:clips]
        folder.mkdir(parents=True)
        ids = [item["id"] for item in items]
        generator = np.random.default_rng(0)
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "sids": [], "xvector.scp": [], "text_shape": []}
        for number, item in enumerate(items):
            vector = folder / f"{item['id']}.npy"
            np.save(vector, generator.normal(size=4).astype(np.float32))
            lines["wav.scp"].append(item["audio_file"])
            lines["text"].append(item["text"].lower())
            lines["text_shape"].append(str(len(item["text"])))
            lines["sids"].append(str(1 + number % 2))
            lines["xvector.scp"].append(str(vector))
        for name, values in lines.items():
            (folder / name).write_text("".join(f"{i} {v}\n" for i, v in zip(ids, values, strict=True)))
        letters = sorted({letter for text in lines["text"] for letter in text if letter != " "})
        (folder / "tokens.txt").write_text("\n".join(["<blank>", "<unk>", *letters, "<space>", "<sos/eos>"]) + "\n")
        return cls(folder, ids)

    def config(self, **settings: Any) -> dict[str, Any]:
        """A training configuration; ``tts_conf`` is laid over the small one, and ``extras`` names further inputs."""
        extras = settings.pop("extras", ())
        kinds = {"spembs": ("xvector.scp", "npy"), "sids": ("sids", "text_int")}
        inputs = [[f"{self.folder}/text", "text", "text"], [f"{self.folder}/wav.scp", "speech", "sound"]]
        inputs += [[f"{self.folder}/{kinds[name][0]}", name, kinds[name][1]] for name in extras]
        return {
            "token_list": str(self.folder / "tokens.txt"),
            "token_type": "char",
            "normalize": None,
            "feats_extract": "fbank",
            "feats_extract_conf": {
                "fs": 22050,
                "n_fft": 1024,
                "hop_length": 512,
                "n_mels": 8,
                "fmin": 80,
                "fmax": 7600,
            },
            "tts": "tacotron2",
            "optim": "adam",
            "optim_conf": {"lr": 1e-3},
            "grad_clip": 1.0,
            "train_data_path_and_name_and_type": inputs,
            "valid_data_path_and_name_and_type": inputs,
            "train_shape_file": [str(self.folder / "text_shape")],
            "valid_shape_file": [str(self.folder / "text_shape")],
            "batch_type": "sorted",
            "batch_size": 2,
            "valid_batch_size": 12,
            "max_epoch": 1,
            "num_workers": 0,
            "num_att_plot": 0,
            "use_matplotlib": False,
            "use_tensorboard": False,
            "keep_nbest_models": 1,
            "log_interval": 1000,
            "seed": 1,
            **settings,
            "tts_conf": {**SMALL, **settings.get("tts_conf", {})},
        }


@dataclass
class Run:
    """A run that is over."""

    path: Path

    @property
    def checkpoint(self) -> dict[str, Any]:
        """What the host saved, without its clocks."""
        states = torch.load(self.path / "checkpoint.pth", weights_only=False)
        return {name: states[name] for name in ("model", "optimizers", "schedulers", "scaler")}

    @property
    def reported(self) -> dict[int, dict[str, dict[str, float]]]:
        """The host's own figures by epoch and part, without its clocks."""
        epochs = torch.load(self.path / "checkpoint.pth", weights_only=False)["reporter"]["stats"]
        return {
            epoch: {part: {n: v for n, v in values.items() if "time" not in n} for part, values in parts.items()}
            for epoch, parts in epochs.items()
        }

    def records(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The run's journal."""
        return [r for r in read_journal(self.path / "brain") if kind in (None, r["kind"])]

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's events of one name."""
        return [r for r in self.records("event") if r["event"] == name]


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """The training yaml, as a user has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(folder: Path, config: dict[str, Any], task: type[TTSTask] | None = None, *more: str) -> Run:
    """Train in this process; plain ESPnet's task with ``task=TTSTask``, else ours."""
    from tts_brain_espnet.task import BrainTTSTask

    path = write_config(folder, config)
    (task or BrainTTSTask).main(cmd=["--config", str(path), "--output_dir", str(folder / "exp"), *more])
    return Run(folder / "exp")


def assert_same(left: Any, right: Any, place: str = "") -> None:
    """Bit-identical, tensors and all; NaN is NaN."""
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
        assert left == right or (left != left and right != right), f"{place}: {left} {right}"


def assert_finite(run: Run) -> None:
    """Weights, running statistics and optimizer state hold no NaN and no infinity."""

    def check(value: Any, place: str) -> None:
        if isinstance(value, torch.Tensor):
            assert torch.isfinite(value).all(), place
        elif isinstance(value, dict):
            for key, item in value.items():
                check(item, f"{place}/{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                check(item, f"{place}/{number}")
        elif isinstance(value, float):
            assert math.isfinite(value), place

    check(run.checkpoint, "")
