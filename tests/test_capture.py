"""What a batch's lengths make of the guided weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.pytorch.capture import tokens_per_utterance

utterances = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=5)


@given(utterances, st.integers(0, 10**6))
def test_a_mean_over_cells_times_tokens_is_the_mean_penalty_per_frame(
    lengths: list[tuple[int, int]], seed: int
) -> None:
    """Hosts report the first; the weight is meant for the second."""
    rng = torch.Generator().manual_seed(seed)
    cells = [torch.rand(t, n, generator=rng, dtype=torch.float64) for n, t in lengths]
    mean_over_cells = sum(c.sum().item() for c in cells) / sum(c.numel() for c in cells)
    per_frame = sum(c.sum().item() for c in cells) / sum(c.shape[0] for c in cells)
    tokens, frames = torch.tensor(lengths).T
    assert mean_over_cells * tokens_per_utterance(tokens, frames) == pytest.approx(per_frame, rel=1e-9)


def test_long_utterances_count_for_more() -> None:
    assert tokens_per_utterance(torch.tensor([10, 40]), torch.tensor([1, 3])) == 32.5
