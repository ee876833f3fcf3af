"""What a few clips' mel spectrograms say of the recordings."""

from __future__ import annotations

import torch
from torch import Tensor

_QUIET, _LOUD = 0.05, 0.95
_THRESHOLD = 0.25


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
