"""The guide that attention is drawn to: a diagonal over the speech of a clip, not over its frames."""

from __future__ import annotations

import torch
from torch import Tensor

_QUIET, _LOUD = 0.05, 0.95
# A frame under the first share of the way from quiet to loud is silent, one over the second is speech.
_SILENT, _SPEECH = 0.15, 0.35
# Silence counts this much of speech: a clip that is all alike has a straight diagonal, never an undefined one.
_LEAST = 0.02


def speech(mel: Tensor, lengths: Tensor) -> Tensor:
    """How much of each frame is speech, by its loudness within its own clip; nothing waits for the device.

    Args:
        mel: (B, T, mels) in any affine scale of log mel.
        lengths: (B,) valid frames.

    Returns:
        (B, T) in [0, 1], 0 in the padding.
    """
    level = mel.detach().float().mean(2)
    valid = torch.arange(level.shape[1], device=level.device) < lengths.to(level.device).unsqueeze(1)
    ordered = level.masked_fill(~valid, torch.inf).sort(1).values
    last = (lengths.to(level.device) - 1).clamp(min=0).unsqueeze(1)
    quiet, loud = (ordered.gather(1, (share * last).round().long()) for share in (_QUIET, _LOUD))
    height = (level - quiet) / (loud - quiet).clamp(min=1e-6)
    return torch.where(valid, ((height - _SILENT) / (_SPEECH - _SILENT)).clamp(0.0, 1.0), 0.0)


def progress(mel: Tensor, mel_lengths: Tensor, reduction_factor: int, steps: int) -> Tensor:
    """Share of a clip's speech that has gone by at each decoder step: it stands still in pauses and edge silence.

    Args:
        mel, mel_lengths: as for ``speech``.
        reduction_factor: mel frames per decoder step.
        steps: decoder steps to return.

    Returns:
        (B, steps) in [0, 1), never falling; where a clip has ended, what it ended with.
    """
    frames = torch.arange(mel.shape[1], device=mel.device)
    valid = frames < mel_lengths.to(mel.device).unsqueeze(1)
    amount = torch.where(valid, speech(mel, mel_lengths) + _LEAST, 0.0)
    before = amount.cumsum(1) - amount
    share = before / amount.sum(1, keepdim=True).clamp(min=1e-6)
    at = (torch.arange(steps, device=mel.device) * reduction_factor).clamp(max=mel.shape[1] - 1)
    return share[:, at]


def guided_penalty(attention: Tensor, frames: Tensor, tokens: Tensor, where: Tensor, sigma: float) -> Tensor:
    """Mean penalty per frame of attention off the diagonal (Tachibana et al., arXiv:1710.08969, eq. 6), in [0, 1].

    The hosts' guided loss times the mean tokens per frame, with ``where`` in place of t / T.

    Args:
        attention: (B, T, N) weights that sum to 1 over N.
        frames, tokens: (B,) lengths.
        where: (B, T) in [0, 1], from ``progress``.
        sigma: width of the guide as a share of the text, above 0.
    """
    tokens, frames = tokens.to(attention.device), frames.to(attention.device)
    token = torch.arange(attention.shape[2], device=attention.device) / tokens.unsqueeze(1)
    off = token.unsqueeze(1) - where.unsqueeze(2)
    penalty = attention.float() * (1.0 - torch.exp(-off.square() / (2.0 * sigma**2)))
    valid = torch.arange(attention.shape[1], device=attention.device) < frames.unsqueeze(1)
    valid = valid.unsqueeze(2) & (token < 1.0).unsqueeze(1)
    return torch.where(valid, penalty, 0.0).sum() / frames.sum()
