"""The knobs on ESPnet's Tacotron2: guided weight and width, forward-sum, mel and gate weight, Tversky.

The host's loss is computed by the host. Only the difference that a knob makes is added to it, so with all knobs
neutral it is the same tensor. What the host reports (``loss``, ``attn_loss``) is the host's own: its log, its curves
and its choice of the best epoch can be compared with a run without the brain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from espnet.nets.pytorch_backend.e2e_tts_tacotron2 import GuidedAttentionLoss
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor

from tts_brain.attention.guide import guided_places
from tts_brain.attention.terms import HostGuide, with_attention_terms
from tts_brain.feedback.diagnosis import BatchFacts
from tts_brain.losses.shaping import Counts, added_by_knobs
from tts_brain.losses.tversky import soft_counts
from tts_brain.pytorch.audio import believable, look_at_some, speaking_rates
from tts_brain.pytorch.capture import tokens_per_utterance
from tts_brain.pytorch.replaced import Replaced
from tts_brain.pytorch.session import BrainSession


def host_sigma(tts: Tacotron2) -> float:
    """Width of the host's guide; the host's default where this model has none."""
    return float(getattr(tts, "attn_loss", GuidedAttentionLoss()).sigma)


class LossTap:
    """Replaces ``forward`` of one ``Tacotron2`` on the instance; evaluation is left to the host.

    Args:
        tts: the host's, on which hooks are put.
        session: gives the knobs, and is shown attention and stop token.

    Attributes:
        names: ids of the batch under way, set by the adapter; empty where the host gives none.
        raw: losses of the newest batch by name, in the host's weights, without ``total``; empty before the first.
        text_length: its mean tokens per utterance; None before the first.
    """

    def __init__(self, tts: Tacotron2, session: BrainSession) -> None:
        self.names: tuple[str, ...] = ()
        self.raw: dict[str, float] = {}
        self.text_length: float | None = None
        self._tts = tts
        self._session = session
        self._host_sigma = host_sigma(tts)
        # Of the class: what somebody else has put in front of it may take (*args, **kwargs).
        self._signature = signature(type(tts).forward.__get__(tts))
        self._tokens = 1.0
        self._texts: Tensor | None = None
        self._measured = False
        self._attention: Tensor | None = None
        self._mel: tuple[Tensor, Tensor] | None = None
        self._loss_inputs: tuple[Tensor, ...] = ()
        self._terms: tuple[Tensor, ...] = ()
        self._guided_loss: Tensor | None = None
        self._handles = [
            tts.dec.register_forward_hook(self._keep_attention),
            tts.taco2_loss.register_forward_hook(self._keep_terms),
        ]
        if tts.use_guided_attn_loss:
            self._handles.append(tts.attn_loss.register_forward_hook(self._keep_guided))
        self._replaced = Replaced(tts, "forward", self._forward)
        self._host_forward = self._replaced.host

    def detach(self) -> None:
        """Give the host its ``forward`` back."""
        for handle in self._handles:
            handle.remove()
        self._replaced.give_back()

    @property
    def _watching(self) -> bool:
        """Is this a training step, and are we still there? Else nothing of it is kept: it would take memory."""
        return torch.is_grad_enabled() and self._session.active

    def _keep_attention(self, module: Any, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self._attention = outputs[3] if self._watching else None

    def _keep_terms(self, module: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
        self._loss_inputs, self._terms = (inputs, outputs) if self._watching else ((), ())

    def _keep_guided(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._guided_loss = output if self._watching else None

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        if not self._watching:
            return self._host_forward(*args, **kwargs)
        self.raw, knobs = {}, self._session.knobs
        tokens = frames = None
        with self._session.fence():
            tokens, frames = self._lengths(*args, **kwargs)
        if tokens is None:
            return self._host_forward(*args, **kwargs)
        loss, stats, rest = self._host_forward(*args, **kwargs)
        with self._session.fence():
            loss = self._after(loss, knobs, tokens, frames)
        with self._session.fence():
            self._session.see_batch(self._facts(*self._mel, self._texts))
        self._attention, self._guided_loss, self._mel, self._texts = None, None, None, None
        self._loss_inputs, self._terms = (), ()
        return loss, stats, rest

    def _lengths(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Tokens, with the host's end-of-sentence, and decoder frames, cut by r as the host cuts them; each (B,)."""
        inputs = self._signature.bind(*args, **kwargs).arguments
        self._mel, self._texts = (inputs["feats"], inputs["feats_lengths"]), inputs["text_lengths"]
        tokens = inputs["text_lengths"] + 1
        frames = torch.div(inputs["feats_lengths"], self._tts.reduction_factor, rounding_mode="floor")
        # A wait for the device, where the host's forward waits for it next: it reads each length by itself.
        text, mel = torch.stack([inputs["text_lengths"].long(), inputs["feats_lengths"].long()]).cpu()
        steps = torch.div(mel, self._tts.reduction_factor, rounding_mode="floor")
        self._tokens = tokens_per_utterance(text + 1, steps)
        self.text_length = float((text + 1).double().mean())
        return tokens, frames

    def _after(self, loss: Tensor, knobs: Mapping[str, float], tokens: Tensor, frames: Tensor) -> Tensor:
        """Show the batch to the session, and add what the knobs change."""
        l1, mse, gate = self._terms
        mel = {"L1": l1, "L2": mse, "L1+L2": l1 + mse}[self._tts.loss_type]
        guided = self._guided_per_frame()
        self._read({"mel": mel, "gate": gate} | ({} if guided is None else {"guided": guided}))
        if self._session.wants_attention and self._attention is not None:
            self._session.see_attention(self._attention, frames, tokens)
            self._measured = True
        counts = self._stop_counts(graph=bool(knobs))
        self._session.see_stop_token(*counts)
        if not knobs:
            return loss
        hosts = HostGuide(self._guided_loss, self._host_weight(), self._host_sigma)
        places = partial(self._places, frames)
        clips = believable(*self._mel, self._texts, self._session.believable_rates)
        loss = with_attention_terms(loss, knobs, self._attention, frames, tokens, places, hosts, clips)
        added = added_by_knobs(knobs, mel, gate, counts)
        return loss if added is None else loss + added

    def _host_weight(self) -> float:
        """Of the host's guide, normalised."""
        return 0.0 if self._guided_loss is None else self._tts.attn_loss.alpha / self._tokens

    def _places(self, frames: Tensor) -> Tensor:
        """Where our guide has each decoder step look."""
        over, r = self._session.config.guide_over, self._tts.reduction_factor
        return guided_places(over, *self._mel, r, frames, self._attention.shape[1])

    def _guided_per_frame(self) -> Tensor | None:
        """The host's guided loss as mean penalty per frame; None where it has none, or none with a weight."""
        if self._guided_loss is None or self._tts.attn_loss.alpha == 0.0:
            return None
        return self._guided_loss.detach().float() / self._tts.attn_loss.alpha * self._tokens

    def _read(self, terms: Mapping[str, Tensor]) -> None:
        # The host has just waited for these very values, one by one.
        values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
        self.raw = dict(zip(terms, values, strict=True))

    def _facts(self, features: Tensor, lengths: Tensor, texts: Tensor) -> BatchFacts:
        """What the batch is like; its values are read only where something is wrong, or what they say is wanted."""
        names = self.names or tuple(f"clip {n} of the batch" for n in range(len(features)))
        bad: tuple[str, ...] = ()
        if not all(math.isfinite(value) for value in self.raw.values()):
            finite = torch.isfinite(features).flatten(1).all(1).tolist()
            bad = tuple(name for name, good in zip(names, finite, strict=True) if not good)
        measured, self._measured = self._measured and not bad, False
        *_, labels, label_lengths = self._loss_inputs
        some = look_at_some(features, lengths, labels, label_lengths) if measured else {}
        # Scripts differ in how many signs a second takes.
        asked = self._tts.langs is None and not bad and self._session.wants_rates
        rates = speaking_rates(features, lengths, texts) if asked else ()
        return BatchFacts(len(features), self.names, bad, text_rates=rates, **some)

    def _stop_counts(self, *, graph: bool) -> Counts:
        """True positives, false positives, false negatives over the valid frames."""
        _, _, logits, _, labels, lengths = self._loss_inputs
        frame = torch.arange(logits.shape[1], device=logits.device)
        with nullcontext() if graph else torch.no_grad():
            return soft_counts(logits, labels, frame < lengths.to(logits.device).unsqueeze(1))
