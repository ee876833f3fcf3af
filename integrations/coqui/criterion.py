"""The knobs on ``TacotronLoss``: guided weight and width, forward-sum, mel and gate weight, Tversky on the stop token.

The host's loss is computed by the host. Only the difference that a knob makes is added to it, so with all knobs
neutral it is the same tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from TTS.tts.layers.losses import GuidedAttentionLoss, TacotronLoss
from TTS.tts.utils.helpers import sequence_mask

from tts_brain.attention.guide import guided_places
from tts_brain.attention.terms import HostGuide, with_attention_terms
from tts_brain.losses.shaping import Counts, added_by_knobs
from tts_brain.losses.tversky import soft_counts
from tts_brain.pytorch.audio import believable
from tts_brain.pytorch.replaced import Replaced
from tts_brain.pytorch.session import BrainSession

# The host's spectrogram terms and the attributes that weigh them. The decoder's SSIM is weighed by the postnet's
# alpha upstream (a slip, kept: we must scale what the host adds).
_MEL_TERMS = {
    "decoder_loss": "decoder_alpha",
    "postnet_loss": "postnet_alpha",
    "decoder_diff_spec_loss": "decoder_diff_spec_alpha",
    "postnet_diff_spec_loss": "postnet_diff_spec_alpha",
    "decoder_ssim_loss": "postnet_ssim_alpha",
    "postnet_ssim_loss": "postnet_ssim_alpha",
    "decoder_b_loss": "decoder_alpha",  # of a second decoder: backwards, or with a larger reduction factor
    "decoder_coarse_loss": "decoder_alpha",
}


def host_sigma(criterion: TacotronLoss) -> float:
    """Width of the host's guide; the host's default where this model has none."""
    return float(getattr(criterion, "criterion_ga", GuidedAttentionLoss()).sigma)


class CriterionTap:
    """Replaces ``forward`` of one ``TacotronLoss`` on the instance; evaluation is left to the host.

    Args:
        criterion: the host's.
        session: gives the knobs, and is shown attention and stop token.

    Attributes:
        tokens: frame-weighted mean tokens per utterance of the batch under way, set by the adapter before each
            forward; what lies between the normalised guided weight and the host's.
        reduction_factor: mel frames per decoder step, set likewise.
        host_total: the newest training loss as the host would have it, detached; None before the first.
    """

    def __init__(self, criterion: TacotronLoss, session: BrainSession) -> None:
        self.tokens, self.reduction_factor = 1.0, 1
        self.host_total: Tensor | None = None
        self._criterion = criterion
        self._session = session
        self._host_sigma = host_sigma(criterion)
        # Of the class: what somebody else has put in front of it may take (*args, **kwargs).
        self._signature = signature(type(criterion).forward.__get__(criterion))
        self._replaced = Replaced(criterion, "forward", self._forward)
        self._host_forward = self._replaced.host

    def detach(self) -> None:
        """Give the host its ``forward`` back."""
        self._replaced.give_back()

    def _forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        if not torch.is_grad_enabled():
            return self._host_forward(*args, **kwargs)
        knobs = self._session.knobs
        inputs = self._signature.bind(*args, **kwargs).arguments
        try:
            losses = self._host_forward(*args, **kwargs)
        except AssertionError:
            # Coqui's SSIM asserts that spectrograms lie in 0 to 1, and NaN does not: one bad clip would end the run.
            if not knobs or _all_finite(inputs):
                raise
            return self._not_finite(inputs)
        with self._session.fence():
            self.host_total = losses["loss"].detach()
            if self._session.wants_attention:
                self._session.see_attention(inputs["alignments"], inputs["alignment_lens"], inputs["input_lens"])
            counts = self._stop_counts(inputs, graph=bool(knobs))
            if counts is not None:
                self._session.see_stop_token(*counts)
            if knobs:
                losses["loss"] = self._shaped(losses, inputs, knobs, counts)
        return losses

    def _not_finite(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """NaN for what the host could not compute; the gradient is NaN too, and kept from the weights."""
        loss = inputs["postnet_output"].sum() * math.nan
        self.host_total = loss.detach()
        names = ("decoder_loss", "postnet_loss", "stopnet_loss", *(["ga_loss"] if self._criterion.ga_alpha > 0 else []))
        return {"loss": loss, **dict.fromkeys(names, self.host_total)}

    def _stop_counts(self, inputs: Mapping[str, Any], *, graph: bool) -> Counts | None:
        """True positives, false positives, false negatives; None where the model has no stop token."""
        if self._criterion.criterion_st is None or not self._session.active:
            return None
        logits, target = inputs["stopnet_output"], inputs["stopnet_target"]
        with nullcontext() if graph else torch.no_grad():
            return soft_counts(logits, target, sequence_mask(inputs["stop_target_length"], logits.size(1)))

    def _shaped(
        self, losses: dict[str, Tensor], inputs: Mapping[str, Any], knobs: Mapping[str, float], counts: Counts | None
    ) -> Tensor:
        """The host's loss plus what each knob changes of it."""
        # Coqui has a guided loss only for ga_alpha > 0; a run without one gets it from us.
        hosts = self._criterion.ga_alpha * losses["ga_loss"] if "ga_loss" in losses else None
        guide = HostGuide(hosts, self._criterion.ga_alpha / self.tokens, self._host_sigma)
        attention = inputs["alignments"], inputs["alignment_lens"], inputs["input_lens"]
        features = inputs["mel_input"], inputs["output_lens"]
        clips = believable(*features, inputs["input_lens"], self._session.believable_rates)
        loss = with_attention_terms(losses["loss"], knobs, *attention, partial(self._places, inputs), guide, clips)
        mel = [losses[n] * getattr(self._criterion, alpha) for n, alpha in _MEL_TERMS.items() if n in losses]
        gate = None if counts is None else losses["stopnet_loss"]
        added = added_by_knobs(knobs, torch.stack(mel).sum(), gate, counts)
        return loss if added is None else loss + added

    def _places(self, inputs: Mapping[str, Any]) -> Tensor:
        """Where our guide has each decoder step look."""
        mel, steps = (inputs["mel_input"], inputs["output_lens"]), inputs["alignments"].shape[1]
        over = self._session.config.guide_over
        return guided_places(over, *mel, self.reduction_factor, inputs["alignment_lens"], steps)


def _all_finite(inputs: Mapping[str, Any]) -> bool:
    return all(
        bool(torch.isfinite(v).all()) for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point()
    )
