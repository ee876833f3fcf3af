"""What a few clips of a batch say of the recordings and of where the stop token is told to fire."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tts_brain.attention.guide import speech

_QUIET, _LOUD = 0.05, 0.95
_THRESHOLD = 0.25
_FEW = 4


def look_at_some(mel: Tensor, lengths: Tensor, labels: Tensor | None, label_lengths: Tensor | None) -> dict[str, Any]:
    """What ``BatchFacts`` says of a few clips of a batch, evenly spread, as hosts sort by length.

    Args:
        mel, lengths: (B, T, mels) and (B,).
        labels, label_lengths: (B, T') 1 where the stop token is told to fire, and (B,); None without a stop token.
    """
    rows = torch.linspace(0, len(mel) - 1, min(_FEW, len(mel))).round().long().tolist()
    some, valid = mel[rows], lengths[rows]
    return {
        "edge_silence": edge_silence(some, valid),
        "alike_tail": alike_tail(some, valid),
        "end_labelled_at": None
        if labels is None or label_lengths is None
        else end_labelled_at(labels[rows], label_lengths[rows]),
    }


def speaking_rates(mel: Tensor, lengths: Tensor, tokens: Tensor) -> tuple[float, ...]:
    """Tokens per frame from the first to the last sound of each clip, above 0; infinite where there is no sound.

    Silence at the ends would make a short clip look slower than a long one. Waits for the device.

    Args:
        mel, lengths: (B, T, mels), in any affine scale of log mel, and (B,) valid frames of it.
        tokens: (B,) of the text.
    """
    rates: list[float] = _rates(mel, lengths, tokens).tolist()
    return tuple(rates)


def believable(mel: Tensor, lengths: Tensor, tokens: Tensor, rates: tuple[float, float] | None) -> Tensor | None:
    """Which clips have as much text as is spoken in their time, (B,) bool; nothing waits for the device.

    All of them where most have not: then the usual rate is another one here, as of long clips after short ones.

    Args:
        mel, lengths, tokens: as for ``speaking_rates``.
        rates: the least and the most tokens per frame; None gives None, for all.
    """
    if rates is None:
        return None
    least, most = rates
    own = _rates(mel, lengths, tokens)
    kept = (own >= least) & (own <= most)
    return kept | (2 * kept.sum() < len(kept))


def _rates(mel: Tensor, lengths: Tensor, tokens: Tensor) -> Tensor:
    frames = (speech(mel, lengths) > 0.5).sum(1)
    return tokens.to(frames.device) / frames


def edge_silence(mel: Tensor, lengths: Tensor) -> float:
    """Share of the frames that are silence at the two ends, mean over clips; waits for the device.

    A frame is silent when its mean over mel bands lies in the lowest quarter between the clip's quiet and loud frames
    (5th and 95th percentile). A clip without loud frames counts as none.

    Args:
        mel: (B, T, mels), in any affine scale of log mel.
        lengths: (B,) valid frames.
    """
    shares = []
    for clip, length in zip(mel.detach().float().mean(2).cpu(), lengths.tolist(), strict=True):
        level = clip[: int(length)]
        quiet, loud = torch.quantile(level, torch.tensor([_QUIET, _LOUD]))
        sound = (level > quiet + _THRESHOLD * (loud - quiet)).nonzero()
        if len(sound) == 0:
            shares.append(0.0)
            continue
        inner = int(sound[-1]) - int(sound[0]) + 1
        shares.append(1.0 - inner / len(level))
    return sum(shares) / len(shares) if shares else 0.0


def alike_tail(mel: Tensor, lengths: Tensor) -> float:
    """Share of the frames, at the end of a clip, that are one and the same to the last bit; mean over clips.

    No recording ends so: it is padding that counts as speech, or digital silence. Waits for the device.

    Args:
        mel: (B, T, mels), in any scale.
        lengths: (B,) valid frames.
    """
    last = (lengths.to(mel.device) - 1).clamp(min=0).long()
    ends = mel.detach()[torch.arange(len(mel), device=mel.device), last]
    differs = (mel.detach() != ends.unsqueeze(1)).any(2).cpu()
    shares = []
    for clip, length in zip(differs, lengths.tolist(), strict=True):
        others = clip[: int(length)].nonzero()
        alike = int(length) - 1 - (int(others[-1]) + 1 if len(others) else 0)  # the last frame repeats no other
        if length > 1:
            shares.append(alike / int(length))
    return sum(shares) / len(shares) if shares else 0.0


def end_labelled_at(labels: Tensor, lengths: Tensor) -> float | None:
    """Where in a clip the first label says that it ends, in (0, 1], mean over clips; None where none says so.

    1 is the last frame, as it should be. Waits for the device.

    Args:
        labels: (B, T) 1 where the clip ends, else 0.
        lengths: (B,) valid frames, or decoder steps.
    """
    places = []
    for clip, length in zip(labels.detach().cpu(), lengths.tolist(), strict=True):
        ends = (clip[: int(length)] > 0.5).nonzero()
        if len(ends):
            places.append((int(ends[0]) + 1) / int(length))
    return sum(places) / len(places) if places else None
