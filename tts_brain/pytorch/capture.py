"""A few utterances of a batch, measured off the graph."""

from __future__ import annotations

import torch
from torch import Tensor

from tts_brain.attention.metrics import measure


def measure_some(attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor, utterances: int) -> Tensor:
    """``measure`` on up to ``utterances`` of the batch, evenly spread: hosts sort batches by length.

    Args:
        attention: (B, T, N) with padding, any float dtype; may require grad.
        frame_lengths, token_lengths: (B,).

    Returns:
        (utterances, 9) on the device of ``attention``; nothing waits for the device.
    """
    batch = attention.shape[0]
    rows = torch.linspace(0, batch - 1, min(utterances, batch), device=attention.device).round().long()
    return measure(
        attention.detach()[rows],
        frame_lengths.to(attention.device)[rows],
        token_lengths.to(attention.device)[rows],
    )
