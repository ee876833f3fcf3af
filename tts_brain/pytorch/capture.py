"""What is taken from a batch on the device: a few utterances' attention, the stop token's counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tts_brain.attention.metrics import measure
from tts_brain.types import StopTokenCounts


def measure_some(attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor, utterances: int) -> Tensor:
    """``measure`` on up to ``utterances`` of the batch, evenly spread: hosts sort batches by length.

    Args:
        attention: (B, T, N) with padding, any float dtype; may require grad.
        frame_lengths, token_lengths: (B,).

    Returns:
        (utterances, 9) on the device of ``attention``; nothing waits for the device. A row of NaN where nothing can be
        told: one token, or one frame.
    """
    batch = attention.shape[0]
    rows = torch.linspace(0, batch - 1, min(utterances, batch), device=attention.device).round().long()
    frames, tokens = frame_lengths.to(attention.device)[rows], token_lengths.to(attention.device)[rows]
    values = measure(attention.detach()[rows], frames, tokens)
    return torch.where(((frames > 1) & (tokens > 1)).unsqueeze(1), values, math.nan)


def tokens_per_utterance(token_lengths: Tensor, frame_lengths: Tensor) -> float:
    """Frame-weighted mean, what turns the normalised guided weight into a host's.

    Hosts average the guided loss over all (frame, token) cells of a batch; this undoes the division by tokens exactly.
    Waits for the device when the lengths (B,) lie on one.
    """
    tokens, frames = token_lengths.double(), frame_lengths.double()
    return float((tokens * frames).sum() / frames.sum())


class StopTally:
    """Sums of soft counts on the device, read once per decision."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, true_positive: Tensor, false_positive: Tensor, false_negative: Tensor) -> None:
        """Three scalars of one batch; detached here."""
        new = torch.stack([true_positive, false_positive, false_negative]).detach()
        self._sums = new if self._sums is None else self._sums.to(new.device) + new

    @property
    def sums(self) -> list[float] | None:
        """What has been added since the last ``take``, for a sidecar; waits for the device."""
        return None if self._sums is None else self._sums.tolist()

    @sums.setter
    def sums(self, sums: list[float] | None) -> None:
        self._sums = None if sums is None else torch.tensor(sums)

    def take(self) -> StopTokenCounts | None:
        """Shares since the last call, None if nothing came; the counts are shares of all errors and hits."""
        if self._sums is None:
            return None
        hit, false, missed = self._sums.tolist()
        self._sums = None
        whole = hit + false + missed
        if not (math.isfinite(whole) and whole > 0.0):
            return None
        return StopTokenCounts(hit / whole, false / whole, missed / whole)
