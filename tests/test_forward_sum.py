import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.attention.forward_sum import forward_sum


def test_forward_sum_prefers_a_monotonic_path() -> None:
    diagonal = torch.eye(6).repeat_interleave(2, dim=0)[None] * 0.9 + 0.1 / 6
    frames, tokens = torch.tensor([12]), torch.tensor([6])
    good, reverse, blur = (
        forward_sum(a, frames, tokens).item() for a in (diagonal, diagonal.flip(1), torch.full_like(diagonal, 1 / 6))
    )
    assert good < blur < reverse
    padded = torch.nn.functional.pad(diagonal, (0, 3, 0, 4))
    assert forward_sum(padded, frames, tokens).item() == pytest.approx(good, rel=1e-5)
    assert forward_sum(diagonal, torch.tensor([0]), tokens).item() == 0.0  # no frames, no path


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 12), st.integers(1, 4))
def test_tokens_without_a_step_of_their_own_are_taken_together(seed: int, frames: int, tokens: int, wish: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    attention = torch.softmax(3.0 * torch.randn(1, frames, tokens, generator=rng), dim=2)
    size = max(wish, -(-tokens // frames))
    together = torch.stack([part.sum(2) for part in attention.split(size, dim=2)], dim=2)
    lengths = torch.tensor([frames]), torch.tensor([tokens])
    found = forward_sum(attention, *lengths, torch.tensor([wish])).item()
    assert found == pytest.approx(forward_sum(together, lengths[0], torch.tensor([together.shape[2]])).item(), rel=1e-4)
    assert found > 0.0 or tokens == 1 or size >= tokens
    if wish == 1:
        assert found == pytest.approx(forward_sum(attention, *lengths).item(), rel=1e-6)


def test_weight_beside_the_text_is_not_counted() -> None:
    attention = torch.softmax(torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    lengths = torch.tensor([7, 6]), torch.tensor([5, 3])
    assert torch.allclose(forward_sum(0.1 * attention, *lengths), forward_sum(attention, *lengths), atol=1e-5)
    assert torch.isfinite(forward_sum(attention, lengths[0], torch.tensor([0, 3]))).all()


def by_hand(attention: torch.Tensor, blank: float = math.exp(-1.0)) -> float:
    """All ways to walk from the first token to the last, with blanks between, added up one by one."""
    frames, tokens = attention.shape
    scores = torch.cat([torch.full((frames, 1), blank, dtype=torch.float64), attention.double()], dim=1)
    share = scores / scores.sum(1, keepdim=True)
    total = 0.0
    for path in itertools.product(range(tokens + 1), repeat=frames):
        said = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        if said == list(range(1, tokens + 1)):
            total += math.prod(float(share[t, symbol]) for t, symbol in enumerate(path))
    return -math.log(total) / tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_the_sum_over_all_paths(seed: int) -> None:
    attention = torch.softmax(torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(seed)), dim=2)
    found = forward_sum(attention, torch.tensor([5]), torch.tensor([3]))
    assert found.item() == pytest.approx(by_hand(attention[0]), rel=1e-4)


def test_its_gradient_asks_for_the_token_that_was_passed_over() -> None:
    attention = torch.tensor([[[0.9, 0.05, 0.05], [0.5, 0.0, 0.5], [0.05, 0.05, 0.9]]]).clamp(min=1e-3)
    attention.requires_grad_()
    cost = forward_sum(attention, torch.tensor([3]), torch.tensor([3]))
    (gradient,) = torch.autograd.grad(cost.sum(), attention)
    assert gradient.isfinite().all()
    assert gradient[0, 1, 1] < 0 and gradient[0, 1, 1] == gradient.min()
