import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.losses.tversky import soft_counts, tversky_coefficients, tversky_loss

counts = st.floats(0, 1e4)
prices = st.floats(0.05, 0.95)


def batch(seed: int = 0, frames: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets, mask of three utterances of 12, 8 and 5 frames, the last frame of each its end."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([frames, 8, 5])
    position = torch.arange(frames)
    mask = position < lengths[:, None]
    target = (position == lengths[:, None] - 1).float()
    return torch.randn(3, frames, generator=rng), target, mask


def loss_of(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return tversky_loss(*soft_counts(logits, target, mask), alpha=0.3, beta=0.7)


def test_the_formula_by_hand() -> None:
    # Probabilities 0.8, 0.4 on two ends, 0.1, 0.3 on two others.
    p = torch.tensor([[0.8, 0.1, 0.4, 0.3]])
    found = soft_counts(torch.logit(p), torch.tensor([[1, 0, 1, 0]]), torch.ones(1, 4))
    assert [c.item() for c in found] == pytest.approx([1.2, 0.4, 0.8])
    assert tversky_loss(*found, 0.3, 0.7).item() == pytest.approx(1 - 1.2 / (1.2 + 0.3 * 0.4 + 0.7 * 0.8), rel=1e-5)


@given(counts, counts, counts, prices, prices)
def test_the_loss_lies_in_0_to_1_and_grows_with_each_error(tp, fp, fn, alpha: float, beta: float) -> None:
    def loss(tp: float, fp: float, fn: float) -> float:
        return tversky_loss(*torch.tensor([tp, fp, fn], dtype=torch.float64), alpha, beta).item()

    assert 0.0 <= loss(tp, fp, fn) <= 1.0
    assert loss(tp, fp, fn) <= loss(tp, fp + 1.0, fn) and loss(tp, fp, fn) <= loss(tp, fp, fn + 1.0)
    assert loss(tp, 0.0, 0.0) == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 50), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_counts_are_never_negative_and_the_loss_never_leaves_its_range(seed: int, size: float, dtype) -> None:
    logits, target, mask = batch(seed, frames=400)
    found = soft_counts((logits * size).to(dtype), target, mask)
    assert all(c >= 0 for c in found)
    assert sum(found[i] for i in (0, 2)).item() == pytest.approx(3.0, rel=1e-4)  # every end is found or missed
    assert 0.0 <= tversky_loss(*found, 0.3, 0.7) <= 1.0


def test_the_gradient_is_that_of_the_formula() -> None:
    three = torch.tensor([1.2, 0.4, 0.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: tversky_loss(c[0], c[1], c[2], 0.3, 0.7), three)
    logits, target, mask = batch()
    logits.requires_grad_()
    loss_of(logits, target, mask).backward()
    for at in [(0, 11), (0, 3), (1, 7), (2, 0)]:
        step = torch.zeros_like(logits)
        step[at] = 1e-2
        with torch.no_grad():
            slope = (loss_of(logits + step, target, mask) - loss_of(logits - step, target, mask)) / 2e-2
        assert logits.grad[at].item() == pytest.approx(slope.item(), rel=0.02, abs=1e-4)
        assert (logits.grad[at] < 0) == bool(target[at])  # an end is pulled up, all else down


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_nothing_in_the_padding_leaks(filler: float) -> None:
    logits, target, mask = batch()
    clean = loss_of(logits, target, mask)
    dirty = torch.where(mask, logits, filler).requires_grad_()
    loss = loss_of(dirty, torch.where(mask, target, filler), mask)
    loss.backward()
    assert loss.item() == clean.item()
    assert torch.isfinite(dirty.grad).all() and (dirty.grad[~mask] == 0).all()


def test_nothing_to_find_and_nothing_found_is_no_error() -> None:
    zero = torch.zeros(())
    assert tversky_loss(zero, zero, zero, 0.3, 0.7).item() == 0.0
    logits, target, mask = batch()
    assert loss_of(logits, target, torch.zeros_like(mask)).item() == 0.0


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        soft_counts(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4))


@given(st.floats(0, 1e300), st.floats(0, 1e300), prices, st.floats(0, 1))
def test_the_prices_sum_to_a_constant_and_lean_on_the_commoner_error(fp: float, fn: float, a: float, b: float) -> None:
    alpha, beta = tversky_coefficients(fp, fn, a, b)
    assert alpha + beta == pytest.approx(2 * a + b)
    assert a <= min(alpha, beta) + 1e-12 and max(alpha, beta) <= a + b + 1e-12
    assert alpha >= beta - 1e-12 if fp >= fn else beta >= alpha - 1e-12


def test_without_errors_both_prices_lie_half_way() -> None:
    assert tversky_coefficients(0.0, 0.0, 0.3, 0.4) == (0.5, 0.5)
    assert tversky_coefficients(0.3, 0.1, 0.3, 0.4) == pytest.approx((0.6, 0.4))
