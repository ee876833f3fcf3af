"""The forward-sum loss on a decoder's attention: are all tokens passed, in order?"""

from __future__ import annotations

import torch
from torch import Tensor

from tts_brain.attention.guide import shares

_BLANK_LOG = -1.0
_LEAST = 1e-8


def forward_sum(attention: Tensor, frames: Tensor, tokens: Tensor, at_once: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of all monotonic paths through the text, nats per token, of each utterance.

    CTC over the attention, with a blank of constant likelihood (RAD-TTS; Badlani et al., arXiv:2108.10447, eq. 4-5).
    Where guided attention is content with a diagonal that jumps over tokens, this asks for every one of them, wherever
    the speaker pauses.

    A path stops at one token per frame, so there is none where the frames are fewer: at a reduction factor of 7 that is
    most speech. Neighbours are then taken together, by twos, threes and so on, and each such group is asked for.

    Args:
        attention: (B, T, N) weights, any float dtype; computed in float32, as ``guide.shares``.
        frames, tokens: (B,) lengths. An utterance without frames has no path and counts as 0.
        at_once: (B,) how many tokens are taken together, 1 or more (``guide.tokens_at_once``); by default as few as
            have a path.

    Returns:
        (B,), per group where tokens are taken together; differentiable in ``attention``; the loss is their mean.
    """
    device = attention.device
    frames, tokens = frames.to(device), tokens.to(device).clamp(min=1)
    least = torch.div(tokens + frames - 1, frames.clamp(min=1), rounding_mode="floor").clamp(min=1)
    size = least if at_once is None else torch.maximum(least, at_once.to(device))
    groups = torch.div(tokens + size - 1, size, rounding_mode="floor")
    log = torch.log(_together(shares(attention, tokens), size).clamp(min=_LEAST))
    log = torch.nn.functional.pad(log, (1, 0), value=_BLANK_LOG)  # the blank is symbol 0
    symbol = torch.arange(log.shape[2], device=device)
    log = log.masked_fill(symbol > groups[:, None, None], -1e4)
    paths = torch.log_softmax(log, dim=2).transpose(0, 1)
    targets = symbol[1:].expand(len(tokens), -1)
    cost = torch.nn.functional.ctc_loss(paths, targets, frames, groups, reduction="none", zero_infinity=True)
    return cost / groups


def _together(attention: Tensor, size: Tensor) -> Tensor:
    """The weight of each ``size`` tokens in a row, (B, T, N), the rest 0."""
    token = torch.arange(attention.shape[2], device=attention.device)
    group = torch.div(token, size.unsqueeze(1), rounding_mode="floor").unsqueeze(1).expand_as(attention)
    return torch.zeros_like(attention).scatter_add(2, group, attention)
