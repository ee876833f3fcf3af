"""What the knobs add to a host's loss beside the guided attention. The host's own terms are never computed anew."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tts_brain.losses.tversky import tversky_loss
from tts_brain.types import GATE_WEIGHT, MEL_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA, TVERSKY_OFF, TVERSKY_WEIGHT

Counts = tuple[Tensor, Tensor, Tensor]


def added_by_knobs(
    knobs: Mapping[str, float], mel: Tensor, gate: Tensor | None, counts: Counts | None
) -> Tensor | None:
    """The difference that mel weight, gate weight and Tversky make.

    Args:
        knobs: values; those that are missing are neutral.
        mel: all spectrogram terms as the host adds them up, a scalar.
        gate: the stop token's term as the host adds it; None where the model has none.
        counts: soft (true positive, false positive, false negative) counts, from ``soft_counts``; None without.

    Returns:
        A scalar to add to the host's loss; None when every knob is neutral, so that the loss stays the same tensor.
    """
    terms = []
    mel_weight, gate_weight = knobs.get(MEL_WEIGHT, 1.0), knobs.get(GATE_WEIGHT, 1.0)
    if mel_weight != 1.0:
        terms.append((mel_weight - 1.0) * mel)
    if gate is not None and gate_weight != 1.0:
        terms.append((gate_weight - 1.0) * gate)
    weight = knobs.get(TVERSKY_WEIGHT, TVERSKY_OFF)
    if counts is not None and weight > TVERSKY_OFF and TVERSKY_ALPHA in knobs and TVERSKY_BETA in knobs:
        terms.append(gate_weight * weight * tversky_loss(*counts, knobs[TVERSKY_ALPHA], knobs[TVERSKY_BETA]))
    return sum(terms[1:], terms[0]) if terms else None
