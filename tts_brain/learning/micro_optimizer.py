"""Clip and Adam for R runs whose weights are the rows of one tensor; nothing waits for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tts_brain.types import GRAD_CLIP_OFF

_BETA1, _BETA2, _EPS = 0.9, 0.999, 1e-6  # ESPnet's Adam
_NORMS = 64  # gradient norms that the clip's median is of


class Adam:
    """Adam (Kingma and Ba, arXiv:1412.6980, algorithm 1) behind a clip, with a guard.

    Args:
        weights: (R, P), changed in place.
    """

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights
        self._moments = torch.zeros(2, *weights.shape, device=weights.device)
        self._updates = torch.zeros(len(weights), 1, device=weights.device)  # done, without the skipped ones
        self._norms = torch.full((len(weights), _NORMS), math.nan, device=weights.device)  # newest last

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: Tensor, clip: Tensor, clip_medians: Tensor) -> tuple[Tensor, Tensor]:
        """One update of each run. A gradient that is not finite leaves a run's weights and moments alone.

        Args:
            gradient: (R, P).
            rate: (R,).
            clip: (R,), the host's clip of the L2 norm.
            clip_medians: (R,), clip at so many medians of the last norms too; from ``GRAD_CLIP_OFF`` on, do not.

        Returns:
            (R,) norms before clipping, and (R,) lengths of the changes over those of the weights.
        """
        norm: Tensor = torch.linalg.vector_norm(gradient, dim=1)
        finite = norm.isfinite()
        allowed = torch.where(clip_medians < GRAD_CLIP_OFF, clip_medians * self._norms.nanmedian(1).values, math.inf)
        allowed = torch.minimum(clip, allowed.nan_to_num(nan=math.inf))  # NaN before the first norm
        scale = (allowed / norm.clamp(min=1e-12)).clamp(max=1.0).unsqueeze(1)
        self._norms = torch.cat([self._norms[:, 1:], torch.where(finite, norm, math.nan).unsqueeze(1)], dim=1)
        done = finite.float().unsqueeze(1)
        gradient = torch.where(finite.unsqueeze(1), gradient * scale, 0.0)
        self._updates += done
        first, second = self._moments
        first.lerp_(gradient, (1.0 - _BETA1) * done)
        second.lerp_(gradient.square(), (1.0 - _BETA2) * done)
        count = self._updates.clamp(min=1.0)
        size = rate.unsqueeze(1) * done / (1.0 - _BETA1**count)
        spread = (second.sqrt() / (1.0 - _BETA2**count).sqrt()).add_(_EPS)
        change = size * first / spread
        ratio = torch.linalg.vector_norm(change, dim=1) / torch.linalg.vector_norm(self._weights, dim=1)
        self._weights -= change
        return norm, ratio

    def state_dict(self) -> dict[str, Tensor]:
        """Copies."""
        return {
            "moments": self._moments.clone(),
            "updates": self._updates.clone(),
            "norms": self._norms.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``."""
        self._moments.copy_(state["moments"])
        self._updates.copy_(state["updates"])
        self._norms = state["norms"].clone().to(self._weights.device)
