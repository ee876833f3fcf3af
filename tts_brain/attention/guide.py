"""The guide that attention is drawn to: a diagonal from the first to the last sound of a clip, not over all its frames.

Recordings begin and end with silence. A diagonal over frames walks through the text meanwhile; one over the speech
waits, so that what is learned by it is right on trimmed clips too. Pauses inside count as speech: commas and spaces are
tokens, and a guide that waited in them as well was no better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_brain.types import OVER_FRAMES

_QUIET, _LOUD = 0.05, 0.95
# A frame under the first share of the way from quiet to loud is silent, one over the second is speech.
_SILENT, _SPEECH = 0.15, 0.35
# Shares of a clip's sound that may lie before its first and behind its last: a click in the silence is no speech.
_EDGE = 0.005
# Silence at the ends counts this much of speech: a clip that is all alike has a diagonal too.
_LEAST = 0.02


def guided_loss(attention: Tensor, frames: Tensor, tokens: Tensor, places: Tensor, sigma: float) -> Tensor:
    """Mean penalty per frame of attention off the guide, in [0, 1] (Tachibana et al., arXiv:1710.08969, section 4.1).

    The hosts' guided loss times the mean tokens per frame, with ``places`` for t / T.

    Args:
        attention: (B, T, N) weights that sum to 1 over N, any float type; computed in float32.
        frames, tokens: (B,) lengths.
        places: (B, T), from ``guided_places``.
        sigma: width of the guide as a share of the text, above 0.

    Returns:
        A scalar, differentiable in ``attention``.
    """
    device = attention.device
    frames, tokens = frames.to(device), tokens.to(device)
    token = torch.arange(attention.shape[2], device=device)
    off = (token / tokens.clamp(min=1).unsqueeze(1)).unsqueeze(1) - places.unsqueeze(2)  # (B, T, N)
    penalty = attention.float() * (1.0 - torch.exp(-off.square() / (2.0 * sigma**2)))
    in_frames = torch.arange(attention.shape[1], device=device) < frames.unsqueeze(1)
    valid = in_frames.unsqueeze(2) & (token < tokens.unsqueeze(1)).unsqueeze(1)
    return torch.where(valid, penalty, 0.0).sum() / frames.sum().clamp(min=1)


def guided_places(
    over: str, mel: Tensor, mel_lengths: Tensor, reduction_factor: int, frames: Tensor, steps: int
) -> Tensor:
    """Where in the text, as a share of it, the guide has each decoder step look.

    Args:
        over: ``frames``, the hosts' diagonal, or ``speech``: the share gone by of what lies between the silent ends.
        mel: (B, L, mels) in any affine scale of log mel.
        mel_lengths: (B,) valid frames of it.
        reduction_factor: mel frames per decoder step.
        frames: (B,) decoder steps of each clip.
        steps: decoder steps of the longest, T.

    Returns:
        (B, T) in [0, 1), hardly rising in the silence at the ends; what lies beyond a clip's end says nothing.
    """
    step = torch.arange(steps, device=mel.device)
    if over == OVER_FRAMES:
        return step / frames.to(mel.device).clamp(min=1).unsqueeze(1)
    amount = speech(mel, mel_lengths)
    before = amount.cumsum(1) - amount
    share = before / amount.sum(1, keepdim=True).clamp(min=1e-6)
    return share[:, (step * reduction_factor).clamp(max=mel.shape[1] - 1)]


def speech(mel: Tensor, mel_lengths: Tensor) -> Tensor:
    """What each frame counts: 1 from the first to the last sound, 0.02 in the silence at the ends, 0 in the padding.

    A sound is told by its loudness between the quiet and loud frames (5th and 95th percentile) of its own clip. Nothing
    waits for the device.

    Returns:
        (B, L).
    """
    lengths = mel_lengths.to(mel.device)
    level = mel.detach().float().mean(2)
    valid = torch.arange(level.shape[1], device=mel.device) < lengths.unsqueeze(1)
    ordered = level.masked_fill(~valid, torch.inf).sort(1).values
    last = (lengths - 1).clamp(0, level.shape[1] - 1).unsqueeze(1)
    quiet, loud = (ordered.gather(1, (share * last).round().long()) for share in (_QUIET, _LOUD))
    height = (level - quiet) / (loud - quiet).clamp(min=1e-6)
    sounds = torch.where(valid, ((height - _SILENT) / (_SPEECH - _SILENT)).clamp(0.0, 1.0), 0.0)
    gone, whole = sounds.cumsum(1), sounds.sum(1, keepdim=True)
    inside = (gone > _EDGE * whole) & (gone - sounds < (1.0 - _EDGE) * whole)
    return torch.where(valid, torch.where(inside, 1.0, _LEAST), 0.0)
