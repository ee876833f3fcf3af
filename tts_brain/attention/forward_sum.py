"""The forward-sum loss on a decoder's attention: are all tokens passed, in order?"""

from __future__ import annotations

import torch
from torch import Tensor

_BLANK_LOG = -1.0
_LEAST = 1e-8


def forward_sum(attention: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of all monotonic paths through the text, nats per token, of each utterance.

    CTC over the attention, with a blank of constant likelihood (RAD-TTS; Badlani et al., arXiv:2108.10447, eq. 4-5).
    Where guided attention is content with a diagonal that jumps over tokens, this asks for every one of them, wherever
    the speaker pauses.

    Args:
        attention: (B, T, N) weights that sum to 1 over N, any float dtype; computed in float32.
        frames, tokens: (B,) lengths. An utterance with fewer frames than tokens has no path and counts as 0.

    Returns:
        (B,), differentiable in ``attention``; the loss is their mean.
    """
    log = torch.log(attention.float().clamp(min=_LEAST))
    log = torch.nn.functional.pad(log, (1, 0), value=_BLANK_LOG)  # the blank is symbol 0
    symbol = torch.arange(log.shape[2], device=log.device)
    frames, tokens = frames.to(log.device), tokens.to(log.device)
    log = log.masked_fill(symbol > tokens[:, None, None], -1e4)
    paths = torch.log_softmax(log, dim=2).transpose(0, 1)
    targets = symbol[1:].expand(len(tokens), -1)
    cost = torch.nn.functional.ctc_loss(paths, targets, frames, tokens, reduction="none", zero_infinity=True)
    return cost / tokens
