"""Tversky loss for the stop token: one positive frame against hundreds of negatives, each error at its own price."""

from __future__ import annotations

import torch
from torch import Tensor

_SMOOTH = 1e-6


def soft_counts(logits: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Soft (true positive, false positive, false negative) counts over the frames that ``mask`` keeps.

    Args:
        logits: (B, T) stop-token logits, any float dtype; computed in float32.
        target: (B, T) 1 where the utterance ends, else 0.
        mask: (B, T) True where a frame counts.

    Returns:
        Three scalars, each 0 or more, differentiable in ``logits``.
    """
    if logits.shape != target.shape or logits.shape != mask.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, target {tuple(target.shape)} and mask {tuple(mask.shape)} "
            "must have one shape (batch, frames)"
        )
    keep = mask.bool()
    # where, not a product: a NaN logit in the padding must not leak through 0 * NaN.
    logit = torch.where(keep, logits.float(), logits.new_zeros((), dtype=torch.float32))
    truth = torch.where(keep, target.float(), 0.0)
    probability = torch.sigmoid(logit)
    # Three sums of products, no differences of sums: those go a little below 0.
    true_positive = (probability * truth).sum()
    return true_positive, (probability * (keep.float() - truth)).sum(), ((1.0 - probability) * truth).sum()


def tversky_loss(
    true_positive: Tensor, false_positive: Tensor, false_negative: Tensor, alpha: float, beta: float
) -> Tensor:
    """``1 - TP / (TP + alpha * FP + beta * FN)``, in [0, 1] (Tversky 1977; as a loss: arXiv:1706.05721, eq. 1).

    0 when there is no error at all, also when nothing was to be found (TP = FP = FN = 0).
    """
    good = true_positive + _SMOOTH
    return 1.0 - good / (good + alpha * false_positive + beta * false_negative)


def tversky_coefficients(false_positive: float, false_negative: float, a: float, b: float) -> tuple[float, float]:
    """Prices (alpha, beta) that lean on the commoner error: ``A + B * FP / (FP + FN)`` and ``A + B * FN / (FP + FN)``.

    With no errors at all both lie half-way, ``A + B / 2``. They always sum to ``2 A + B``.
    """
    errors = false_positive + false_negative
    share = false_positive / errors if errors > 0.0 else 0.5
    return a + b * share, a + b * (1.0 - share)
