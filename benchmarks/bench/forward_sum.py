"""The forward-sum loss on a decoder's attention, as an arm of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor

from tts_brain.attention.forward_sum import forward_sum


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
            loss = loss + self.weight * forward_sum(self._attention, frames, tokens).mean()
        self._attention = None
        return loss, stats, rest

    def detach(self) -> None:
        self._handle.remove()
        self._tts.__dict__.pop("forward", None)
