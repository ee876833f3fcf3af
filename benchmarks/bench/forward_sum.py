"""The forward-sum loss on a decoder's attention, as an arm of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor

_BLANK_LOG = -1.0


def forward_sum(attention: Tensor, frames: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of all monotonic paths through the text, per token (CTC over attention; RAD-TTS,
    and Badlani et al., arXiv:2108.10447, eq. 4-5).

    Args:
        attention: (B, T, N) weights that sum to 1 over N.
        frames, tokens: (B,). An utterance with fewer frames than tokens has no path and counts as 0.
    """
    log = torch.log(attention.float().clamp(min=1e-8))
    log = torch.nn.functional.pad(log, (1, 0), value=_BLANK_LOG)  # the blank is symbol 0
    symbol = torch.arange(log.shape[2], device=log.device)
    log = log.masked_fill(symbol > tokens.unsqueeze(1).unsqueeze(1), -1e4)
    targets = torch.arange(1, log.shape[2], device=log.device).expand(len(tokens), -1)
    return torch.nn.functional.ctc_loss(
        torch.log_softmax(log, dim=2).transpose(0, 1), targets, frames, tokens, zero_infinity=True
    )


class ForwardSum:
    """Adds ``weight`` times the forward-sum loss to the loss of a Tacotron2; nothing that the host reports changes."""

    def __init__(self, tts: Tacotron2, weight: float) -> None:
        self.weight = weight
        self._tts = tts
        self._host: Callable[..., Any] = tts.forward
        self._attention: Tensor | None = None
        self._handle = tts.dec.register_forward_hook(self._keep)
        tts.forward = self._forward

    def _keep(self, module: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._attention = outputs[3]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        loss, stats, rest = self._host(*args, **kwargs)
        if torch.is_grad_enabled() and self.weight > 0.0:
            tokens = kwargs["text_lengths"] + 1
            frames = torch.div(kwargs["feats_lengths"], self._tts.reduction_factor, rounding_mode="floor")
            loss = loss + self.weight * forward_sum(self._attention, frames, tokens)
        self._attention = None
        return loss, stats, rest

    def detach(self) -> None:
        self._handle.remove()
        self._tts.__dict__.pop("forward", None)
