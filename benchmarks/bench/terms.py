"""The brain's two attention terms at constant weights, as arms of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.guide import guided_loss, guided_places
from tts_brain.pytorch.capture import tokens_per_utterance
from tts_brain.types import OVER_SPEECH


class Terms:
    """Adds terms to the loss of a Tacotron2; nothing that the host reports of its own changes.

    Args:
        tts: the host's.
        forward_sum: weight of the forward-sum loss, 0 or more.
        over_speech: weight, in the host's units, of a guide over the clip's speech; 0 or more.
    """

    def __init__(self, tts: Tacotron2, forward_sum: float, over_speech: float = 0.0) -> None:
        self.forward_sum, self.over_speech = forward_sum, over_speech
        self._tts = tts
        self._host: Callable[..., Any] = tts.forward
        self._attention: Tensor | None = None
        self._handle = tts.dec.register_forward_hook(self._keep)
        tts.forward = self._forward

    def _keep(self, module: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._attention = outputs[3]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        loss, stats, rest = self._host(*args, **kwargs)
        if torch.is_grad_enabled():
            tokens, r = kwargs["text_lengths"] + 1, self._tts.reduction_factor
            frames = torch.div(kwargs["feats_lengths"], r, rounding_mode="floor")
            if self.forward_sum > 0.0:
                loss = loss + self.forward_sum * forward_sum(self._attention, frames, tokens).mean()
            if self.over_speech > 0.0:
                mel, attention = (kwargs["feats"], kwargs["feats_lengths"]), self._attention
                places = guided_places(OVER_SPEECH, *mel, r, frames, attention.shape[1])
                penalty = guided_loss(attention, frames, tokens, places, self._tts.attn_loss.sigma)
                loss = loss + self.over_speech / tokens_per_utterance(tokens, frames) * penalty
        self._attention = None
        return loss, stats, rest

    def detach(self) -> None:
        self._handle.remove()
        self._tts.__dict__.pop("forward", None)
