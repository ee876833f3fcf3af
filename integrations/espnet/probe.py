"""Held-out clips measured the same way for every run of ESPnet's Tacotron2, brain or not."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
import yaml
from espnet2.tasks.tts import TTSTask
from espnet2.train.abs_espnet_model import AbsESPnetModel
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor

from tts_brain.attention.metrics import measure, report
from tts_brain.pytorch.heldout import SPEAKS_LENGTH, HeldOut, Spoken, masked_l1, speaks, undisturbed

_BATCH = 16
_NEEDED = ("tts", "token_list", "valid_data_path_and_name_and_type")
_GIVE = "give the folder of a finished run, whose config.yaml ESPnet wrote"
_EXTRAS = ("spembs", "sids", "lids")
_SPEECH = ("wav.scp", "sound")


class Probe:
    """Measures a model on fixed clips.

    The prenet's dropout stays on in evaluation, by design of Tacotron2; a seed of its own makes it repeatable.

    Args:
        batches: as the host's collate function makes them.
        seed: for the prenet's dropout.
    """

    def __init__(self, batches: Sequence[dict[str, Tensor]], seed: int = 0) -> None:
        self._batches = list(batches)
        self._seed = seed

    def __len__(self) -> int:
        return sum(len(batch["text_lengths"]) for batch in self._batches)

    def held_out(self, model: AbsESPnetModel) -> HeldOut:
        """Teacher-forced forward in evaluation mode; errors in units of the normalised mel spectrogram."""
        before, after, count = 0.0, 0.0, 0
        values, matrices = [], []
        with undisturbed(model):
            torch.manual_seed(self._seed)
            for batch in self._batches:
                outs, target, lengths, attention, frames, tokens = _forced(model, batch)
                error, number = masked_l1(outs[1], target, lengths)
                before, count = before + error, count + number
                after += masked_l1(outs[0], target, lengths)[0]
                values.append(measure(attention, frames, tokens))
                matrices += [a[:t, :n].cpu().numpy() for a, t, n in zip(attention, frames, tokens, strict=True)]
        return HeldOut(before / count, after / count, asdict(report(torch.cat(values))), matrices)

    def speak(self, model: AbsESPnetModel) -> Iterator[Spoken]:
        """Free-running synthesis of each clip's text, cut at twice the reference's length."""
        for batch in self._batches:
            for index in range(len(batch["text_lengths"])):
                with undisturbed(model):
                    torch.manual_seed(self._seed)
                    spoken = _speak(model, batch, index)
                yield spoken


def clips(train_config: Path, folder: Path, limit: int | None = None) -> list[dict[str, Tensor]]:
    """The clips of a dump folder (``text``, ``wav.scp``), as a run with ``train_config`` reads them.

    Speech is looked for under the name of the run's own, and read as that is: ``feats.scp``, say, of a run on features.

    Speakers, languages and speaker vectors of a run that was trained with them are looked for in the folder too, then
    beside those that it was validated with.

    Args:
        train_config: the ``config.yaml`` of a run; paths in it are relative to the recipe's folder.
        limit: only the first so many.

    Raises:
        FileNotFoundError: a file of ``folder`` is missing.
        ValueError: ``train_config`` is of no run.
    """
    args = _arguments(train_config)
    inputs = args.valid_data_path_and_name_and_type
    speech, kind = next(((Path(path).name, kind) for path, name, kind in inputs if name == "speech"), _SPEECH)
    for name in ("text", speech):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; give a dump folder such as dump/raw/eval")
    loader = TTSTask.build_streaming_iterator(
        [
            (str(folder / "text"), "text", "text"),
            (str(folder / speech), "speech", kind),
            *_extras(inputs, folder),
        ],
        dtype="float32",
        batch_size=_BATCH,
        num_workers=0,
        preprocess_fn=TTSTask.build_preprocess_fn(args, False),
        collate_fn=TTSTask.build_collate_fn(args, False),
        inference=True,
    )
    found: list[dict[str, Tensor]] = []
    left = math.inf if limit is None else limit
    for _, batch in loader:
        if left <= 0:
            break
        kept = {name: value[: int(min(left, len(value)))] for name, value in batch.items()}
        left -= len(kept["text_lengths"])
        # The host's encoder wants the longest text first.
        order = kept["text_lengths"].argsort(descending=True)
        found.append({name: value[order] for name, value in kept.items()})
    return found


def _extras(of_the_run: Sequence[Sequence[str]], folder: Path) -> list[tuple[str, str, str]]:
    """Further inputs of the run's model, (path, name, type), for the clips of ``folder``."""
    found = []
    for written, name, kind in of_the_run:
        if name not in _EXTRAS:
            continue
        path = Path(written)
        places = (folder / path.name, path.parent.parent / folder.name / path.name)
        there = next((place for place in places if place.is_file()), None)
        if there is None:
            raise FileNotFoundError(
                f"this run was trained with {name}, and neither {places[0]} nor {places[1]} is there; "
                "write that file for these clips"
            )
        found.append((str(there), name, kind))
    return found


def load_model(train_config: Path, model_file: Path) -> AbsESPnetModel:
    """A Tacotron2 of a run.

    Raises:
        ValueError: another model, or a file that holds none.
    """
    _arguments(train_config)
    try:
        model, _ = TTSTask.build_model_from_file(str(train_config), str(model_file), "cpu")
    except OSError:  # a file that the config names; the message says which
        raise
    except Exception as error:
        why = shorten(f"{type(error).__name__}: {error}", 200)
        raise ValueError(
            f"{model_file} is no model of the run of {train_config} ({why}); give --model a file such as latest.pth"
        ) from error
    if not isinstance(getattr(model, "tts", None), Tacotron2):
        raise ValueError(f"{train_config} is of a run of {type(model.tts).__name__}; only Tacotron2 has attention here")
    # The host takes whatever tensors it finds, none at all too, and leaves the others as they were drawn.
    stored = torch.load(model_file, map_location="cpu", weights_only=False)
    missing = [name for name, _ in model.named_parameters() if name not in stored.get("module", stored)]
    if missing:
        raise ValueError(
            f"{model_file} lacks {len(missing)} weights of the model, {missing[0]} first (checkpoint.pth holds a whole "
            "run, and no weights at its top); give --model a file such as latest.pth"
        )
    return model


def _arguments(train_config: Path) -> argparse.Namespace:
    try:
        read = yaml.safe_load(train_config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{train_config} is not YAML ({shorten(str(error), 200)}); {_GIVE}") from error
    missing = [name for name in _NEEDED if not isinstance(read, dict) or name not in read]
    if missing:
        raise ValueError(f"{train_config} is not of an ESPnet TTS run, it has no {', '.join(missing)}; {_GIVE}")
    return argparse.Namespace(**read)


def _features(model: AbsESPnetModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    features, lengths = batch["speech"], batch["speech_lengths"]
    for step in (model.feats_extract, model.normalize):
        if step is not None:
            features, lengths = step(features, lengths)
    return features[:, : lengths.max()], lengths


def _forced(
    model: AbsESPnetModel, batch: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Any, Any, Any]:
    tts = model.tts
    features, lengths = _features(model, batch)
    tokens = batch["text_lengths"] + 1
    text = torch.nn.functional.pad(batch["text"][:, : batch["text_lengths"].max()], [0, 1], value=tts.padding_idx)
    text[torch.arange(len(tokens)), tokens - 1] = tts.eos
    extras = {name: batch.get(name) for name in _EXTRAS}
    # As the host's forward, which gives its losses only.
    after, before, _, attention = tts._forward(xs=text, ilens=tokens, ys=features, olens=lengths, **extras)
    frames = torch.div(lengths, tts.reduction_factor, rounding_mode="floor")
    return (after, before), features, frames * tts.reduction_factor, attention, frames, tokens


def _speak(model: AbsESPnetModel, batch: dict[str, Tensor], index: int) -> Spoken:
    tts = model.tts
    text = batch["text"][index, : batch["text_lengths"][index]]
    one = {name: value[index : index + 1] for name, value in batch.items()}
    features, lengths = _features(model, one)
    reference = int(lengths[0]) // tts.reduction_factor
    limit = int(SPEAKS_LENGTH[1] * reference)
    extras = {name: batch[name][index] for name in _EXTRAS if name in batch}
    if tts.use_gst:
        extras["feats"] = features[0]
    # The host's limit is in mel frames per token, end-of-sentence included; half a frame against rounding down.
    ratio = (limit * tts.reduction_factor + 0.5) / (len(text) + 1)
    out = tts.inference(text, maxlenratio=ratio, **extras)
    said = speaks(out["att_w"], reference, limit)
    mel: np.ndarray = out["feat_gen"].cpu().numpy()
    return Spoken(mel, said)
