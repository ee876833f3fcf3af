"""The difference each knob makes to a host's loss, against the formula written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tts_brain.losses.shaping import added_by_knobs
from tts_brain.losses.tversky import tversky_loss
from tts_brain.types import (
    GATE_WEIGHT,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    MEL_WEIGHT,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    TVERSKY_OFF,
    TVERSKY_WEIGHT,
)

PRICES = {TVERSKY_ALPHA: 0.4, TVERSKY_BETA: 0.6}
HALF = PRICES | {TVERSKY_WEIGHT: 0.5}
weights = st.floats(0.1, 4.0)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def parts() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Spectrogram term, stop token's term, counts."""
    return scalar(0.7), scalar(0.3), (scalar(1.2), scalar(0.4), scalar(0.8))


@pytest.mark.parametrize("knobs", [{}, {MEL_WEIGHT: 1.0, GATE_WEIGHT: 1.0, LEARNING_RATE: 2.0, GUIDED_WEIGHT: 3.0}])
def test_neutral_knobs_add_nothing_at_all(knobs: dict[str, float]) -> None:
    """None, not a zero: the host's tensor must stay the same, to the bit and in the graph."""
    mel, gate, counts = parts()
    assert added_by_knobs(knobs, mel, gate, counts) is None
    assert added_by_knobs(knobs | PRICES, mel, gate, counts) is None
    assert added_by_knobs(knobs | PRICES | {TVERSKY_WEIGHT: TVERSKY_OFF}, mel, gate, counts) is None
    assert added_by_knobs(knobs | HALF, mel, gate, None) is None


@pytest.mark.parametrize("one", PRICES)
def test_one_price_alone_is_no_tversky(one: str) -> None:
    mel, gate, counts = parts()
    assert added_by_knobs({one: PRICES[one], TVERSKY_WEIGHT: 0.5}, mel, gate, counts) is None


@given(weights, weights, st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.01, 10))
def test_all_knobs_add_up_and_each_gradient_is_the_formulas(
    mel_weight: float, gate_weight: float, alpha: float, beta: float, share: float
) -> None:
    prices = {TVERSKY_WEIGHT: share, TVERSKY_ALPHA: alpha, TVERSKY_BETA: beta}
    knobs = {MEL_WEIGHT: mel_weight, GATE_WEIGHT: gate_weight, **prices}
    mel, gate, counts = parts()
    added = added_by_knobs(knobs, mel, gate, counts)
    assert added is not None and added.dim() == 0
    tversky = 1 - 1.2 / (1.2 + alpha * 0.4 + beta * 0.8)
    expected = (mel_weight - 1) * 0.7 + (gate_weight - 1) * 0.3 + gate_weight * share * tversky
    assert added.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    added.backward()
    assert (mel.grad is None) == (mel_weight == 1) and (mel.grad is None or mel.grad.item() == mel_weight - 1)
    assert (gate.grad is None) == (gate_weight == 1) and (gate.grad is None or gate.grad.item() == gate_weight - 1)
    hit, false_stop, missed = (c.grad.item() for c in counts)
    assert hit < 0 < min(false_stop, missed)
    assert false_stop / missed == pytest.approx(alpha / beta, rel=1e-6)


@pytest.mark.parametrize(
    ("knob", "expected"), [({MEL_WEIGHT: 3.0}, 2 * 0.7), ({GATE_WEIGHT: 0.1}, -0.9 * 0.3), ({MEL_WEIGHT: 0.5}, -0.35)]
)
def test_one_knob_alone(knob: dict[str, float], expected: float) -> None:
    mel, gate, counts = parts()
    assert added_by_knobs(knob, mel, gate, counts).item() == pytest.approx(expected)
    assert added_by_knobs({**dict.fromkeys(KNOBS, 1.0), **knob}, mel, gate, None).item() == pytest.approx(expected)


@given(weights)
def test_the_gate_weight_scales_the_tversky_share_too(gate_weight: float) -> None:
    """It is the stop token's weight, and Tversky is half of the stop token's loss."""
    mel, gate, counts = parts()
    loss = tversky_loss(*counts, *PRICES.values()).item()
    alone = added_by_knobs(HALF, mel, gate, counts)
    weighted = added_by_knobs({**HALF, GATE_WEIGHT: gate_weight}, mel, gate, counts)
    assert alone.item() == pytest.approx(0.5 * loss)
    assert weighted.item() == pytest.approx((gate_weight - 1) * 0.3 + gate_weight * 0.5 * loss)


def test_a_model_without_a_stop_token_has_only_its_mel_weighted() -> None:
    mel, _, counts = parts()
    assert added_by_knobs({GATE_WEIGHT: 2.0}, mel, None, None) is None
    assert added_by_knobs({GATE_WEIGHT: 2.0, MEL_WEIGHT: 2.0}, mel, None, None).item() == pytest.approx(0.7)
    # Counts without a term of the host's own: Tversky stands alone.
    added = added_by_knobs({GATE_WEIGHT: 2.0, **HALF}, mel, None, counts)
    assert added.item() == pytest.approx(tversky_loss(*counts, 0.4, 0.6).item())
