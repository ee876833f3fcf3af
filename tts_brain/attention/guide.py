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
# How much sound may lie before a clip's first and behind its last: a click in the silence is no speech. A share of it
# all, at least two frames, of a short clip at most so great a share.
_EDGE, _EDGE_FRAMES, _EDGE_MOST = 0.005, 2.0, 0.02
# Silence at the ends counts this much of speech: a clip that is all alike has a diagonal too.
_LEAST = 0.02


def guided_loss(attention: Tensor, frames: Tensor, tokens: Tensor, places: Tensor, sigma: float) -> Tensor:
    """Mean penalty per frame of attention off the guide, in [0, 1] (Tachibana et al., arXiv:1710.08969, section 4.1).

    The hosts' guided loss times the mean tokens per frame, with ``places`` for t / T.

    Args:
        attention: (B, T, N) weights, any float type; computed in float32, as ``shares``.
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
    penalty = shares(attention, tokens) * (1.0 - torch.exp(-off.square() / (2.0 * sigma**2)))
    in_frames = torch.arange(attention.shape[1], device=device) < frames.unsqueeze(1)
    return torch.where(in_frames.unsqueeze(2), penalty, 0.0).sum() / frames.sum().clamp(min=1)


def shares(attention: Tensor, tokens: Tensor) -> Tensor:
    """Attention over the valid tokens that sums to 1, float32.

    Some attention lets weight fall beside the text (Coqui's Graves mixture) or on padding (its dynamic convolution).
    Counted as it is, looking nowhere would cost nothing, and a guide would drive the attention off the text.
    A row that hardly looks at the text at all (under 1 %) is raised a hundredfold and no further.
    """
    token = torch.arange(attention.shape[2], device=attention.device)
    valid = (token < tokens.to(attention.device).unsqueeze(1)).unsqueeze(1)
    weights = torch.where(valid, attention.float(), 0.0)
    return weights / weights.sum(2, keepdim=True).clamp(min=0.01)


def guided_places(
    over: str, mel: Tensor, mel_lengths: Tensor, reduction_factor: int, frames: Tensor, steps: int
) -> Tensor:
    """Where in the text, as a share of it, the guide has each decoder step look.

    Args:
        over: ``frames``, the hosts' diagonal, or ``speech``: the share gone by of what lies between the silent ends.
        mel: (B, L, mels) in any affine scale of log mel. Where a noisy recording is padded with digital silence, its
            noise counts as sound.
        mel_lengths: (B,) valid frames of it.
        reduction_factor: mel frames per decoder step.
        frames: (B,) decoder steps of each clip.
        steps: decoder steps of the longest, T.

    Returns:
        (B, T) in [0, 1], hardly rising in the silence at the ends; what lies beyond a clip's end says nothing.
    """
    step = torch.arange(steps, device=mel.device)
    if over == OVER_FRAMES:
        return step / frames.to(mel.device).clamp(min=1).unsqueeze(1)
    amount = speech(mel, mel_lengths)
    before = amount.cumsum(1) - amount
    share = before / amount.sum(1, keepdim=True).clamp(min=1e-6)
    return share[:, (step * reduction_factor).clamp(max=mel.shape[1] - 1)]


def tokens_at_once(places: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """How many tokens the guide passes in its fastest decoder step, rounded up: 1 where each can have its own.

    More than 1 where a reduction factor leaves fewer steps of speech than there are tokens.

    Args:
        places: (B, T), from ``guided_places``.
        frames, tokens: (B,) lengths.

    Returns:
        (B,) int64, 1 or more.
    """
    step = torch.arange(1, places.shape[1], device=places.device)
    strides = places.diff(dim=1).masked_fill(step >= frames.to(places.device).unsqueeze(1), 0.0)
    fastest = torch.nn.functional.pad(strides, (1, 0)).amax(1)  # 0 where there is but one step
    # So much over a whole number is rounding.
    return (fastest * tokens.to(places.device) - 0.01).ceil().clamp(min=1).long()


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
    edge = torch.maximum(_EDGE * whole, (_EDGE_MOST * whole).clamp(max=_EDGE_FRAMES))
    inside = (gone > edge) & (gone - sounds < whole - edge)
    return torch.where(valid, torch.where(inside, 1.0, _LEAST), 0.0)
