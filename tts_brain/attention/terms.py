"""What the attention's knobs add to a host's loss: our guide in place of its own, and the forward-sum term."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.guide import guided_loss, tokens_at_once
from tts_brain.types import FORWARD_SUM_OFF, FORWARD_SUM_WEIGHT, GUIDED_SIGMA, GUIDED_WEIGHT


@dataclass(frozen=True)
class HostGuide:
    """A host's own guided attention.

    Args:
        loss: as the host has added it, a scalar; None where it has none.
        weight: of it, normalised (the host's over the mean text length); of no matter without one.
        sigma: its width as a share of the text, above 0.
    """

    loss: Tensor | None
    weight: float
    sigma: float


def with_attention_terms(
    loss: Tensor,
    knobs: Mapping[str, float],
    attention: Tensor,
    frames: Tensor,
    tokens: Tensor,
    places: Callable[[], Tensor],
    host: HostGuide,
    clips: Tensor | None = None,
) -> Tensor:
    """The host's loss with what guided weight, width and forward-sum weight change of it.

    Args:
        loss: the host's, its own guided loss included.
        knobs: values; those that are missing leave the host's own.
        attention: (B, T, N) weights.
        frames, tokens: (B,) lengths.
        places: gives ``guide.guided_places``; called only where a term needs them.
        host: its guide, which ours takes the place of.
        clips: (B,) bool, those that our terms look at; None for all.

    Returns:
        A scalar; ``loss`` itself where nothing changes.
    """
    guided, sigma = _our_guide(knobs, host)
    weight = knobs.get(FORWARD_SUM_WEIGHT, FORWARD_SUM_OFF)
    if guided is None and weight <= FORWARD_SUM_OFF:
        return loss
    where = places()
    if guided is not None:
        looked_at = frames if clips is None else frames.to(clips.device) * clips
        ours = guided * guided_loss(attention, looked_at, tokens, where, sigma)
        loss = loss + (ours if host.loss is None else ours - host.loss)
    if weight > FORWARD_SUM_OFF:
        path = forward_sum(attention, frames, tokens, tokens_at_once(where, frames, tokens))
        loss = loss + weight * (path.mean() if clips is None else _mean_of(path, clips))
    return loss


def _mean_of(values: Tensor, some: Tensor) -> Tensor:
    """0 of none."""
    return torch.where(some, values, 0.0).sum() / some.sum().clamp(min=1)


def _our_guide(knobs: Mapping[str, float], host: HostGuide) -> tuple[float | None, float]:
    """Its normalised weight, None where the host's own stays, and its width."""
    sigma = knobs.get(GUIDED_SIGMA, host.sigma)
    if GUIDED_WEIGHT not in knobs and host.loss is not None and sigma != host.sigma:
        return host.weight, sigma
    return knobs.get(GUIDED_WEIGHT), sigma
