"""Held-out clips measured the same way for every arm, brain or not, without disturbing the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor
from TTS.tts.models.tacotron2 import Tacotron2

from tts_brain.attention.metrics import decoder_frames, measure, report
from tts_brain.pytorch.heldout import (
    SPEAKS_LENGTH,
    HeldOut,
    Spoken,
    fresh_statistics,
    masked_l1,
    speaks,
    undisturbed,
)


class Probe:
    """Measures a model on a fixed batch.

    Args:
        batch: as the host's ``format_batch`` makes it.
    """

    def __init__(self, batch: dict[str, Any]) -> None:
        self._batch = batch

    def held_out(self, model: Tacotron2) -> HeldOut:
        """Teacher-forced forward in evaluation mode."""
        b = self._batch
        with undisturbed(model):
            out = model.forward(b["text_input"], b["text_lengths"], b["mel_input"], b["mel_lengths"])
            decoded = out["decoder_outputs"]
            with fresh_statistics(model.postnet):
                fresh = decoded + model.postnet(decoded.transpose(1, 2)).transpose(1, 2)
        frames = decoder_frames(b["mel_lengths"], model.decoder.r)
        attention = out["alignments"].float()
        tokens = b["text_lengths"]
        return HeldOut(
            l1=_masked_l1(decoded, b["mel_input"], b["mel_lengths"]),
            l1_postnet=_masked_l1(out["model_outputs"], b["mel_input"], b["mel_lengths"]),
            values=asdict(report(measure(attention, frames, tokens))),
            matrices=[a[:t, :n].cpu().numpy() for a, t, n in zip(attention, frames, tokens, strict=True)],
            l1_postnet_fresh=_masked_l1(fresh, b["mel_input"], b["mel_lengths"]),
        )

    def predicted_mel(self, model: Tacotron2, index: int) -> np.ndarray:
        """Teacher-forced mel of one clip, (frames, mels)."""
        b = self._batch
        with undisturbed(model):
            out = model.forward(b["text_input"], b["text_lengths"], b["mel_input"], b["mel_lengths"])
        return out["model_outputs"][index, : b["mel_lengths"][index]].cpu().numpy()

    def speak(self, model: Tacotron2, index: int) -> Spoken:
        """Free-running synthesis of one clip's text, cut at twice the reference's length."""
        b = self._batch
        reference = int(decoder_frames(b["mel_lengths"][index : index + 1], model.decoder.r))
        limit = int(SPEAKS_LENGTH[1] * reference)
        text = b["text_input"][index : index + 1, : b["text_lengths"][index]]
        with undisturbed(model), _decoder_limit(model, limit):
            out = model.inference(text)
        said = speaks(out["alignments"][0], reference, limit)
        return Spoken(out["model_outputs"][0].cpu().numpy(), said)

    def reference_mel(self, index: int) -> np.ndarray:
        """What was recorded, (frames, mels)."""
        return self._batch["mel_input"][index, : self._batch["mel_lengths"][index]].cpu().numpy()

    def __len__(self) -> int:
        return len(self._batch["text_lengths"])


@contextmanager
def _decoder_limit(model: Tacotron2, limit: int) -> Iterator[None]:
    before = model.decoder.max_decoder_steps
    model.decoder.max_decoder_steps = limit
    try:
        yield
    finally:
        model.decoder.max_decoder_steps = before


def _masked_l1(predicted: Tensor, target: Tensor, lengths: Tensor) -> float:
    error, count = masked_l1(predicted, target, lengths)
    return error / count
