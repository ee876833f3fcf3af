"""What is taken from a batch: the guided weight's unit, a few utterances' attention."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.attention.metrics import report
from tts_brain.pytorch.capture import measure_some, tokens_per_utterance
from tts_brain.pytorch.step import StepUnderWay
from tts_brain.types import AttentionReport, Observation

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


def seen(under_way: StepUnderWay) -> Observation:
    """What the manager is told of a step."""
    taps = SimpleNamespace(grad_norm=1.0, take_update_ratio=lambda: 1e-3)
    return under_way.observation(1, taps, skipped=False, grad_norm=None, learning_rate=None, stop=None)


def told(values: torch.Tensor) -> AttentionReport | None:
    """What the manager is told of measured utterances."""
    return seen(StepUnderWay({"total": 1.0}, 1, attention=values)).attention


def test_losses_and_text_length_of_a_step_are_of_all_its_batches() -> None:
    """What a loss owes to length can only be learned where both are of the same clips."""
    under_way = StepUnderWay()
    for total, length in ((1.0, 20.0), (2.0, None), (6.0, 50.0)):
        under_way.add({"total": total}, length)
    assert (seen(under_way).losses, seen(under_way).text_length) == ({"total": 3.0}, 35.0)
    assert seen(StepUnderWay({"total": 1.0}, 1)).text_length is None


def test_an_utterance_of_which_nothing_can_be_told_is_left_out() -> None:
    """One token: any attention is perfect and none says so. Hosts sort by length, so that the last is the shortest."""
    perfect = torch.eye(6).repeat_interleave(2, 0)  # (12, 6)
    letter = torch.zeros(12, 6)
    letter[:, 0] = 1.0
    attention = torch.stack([perfect, perfect, perfect, letter])
    frames, tokens = torch.tensor([12, 12, 12, 12]), torch.tensor([6, 6, 6, 1])
    some = told(measure_some(attention, frames, tokens, 4))
    assert some == report(measure_some(attention[:3], frames[:3], tokens[:3], 3))
    assert some is not None and some.attention_diag > 0.99
    assert told(measure_some(attention[3:], frames[3:], tokens[3:], 4)) is None
    one_frame = torch.tensor([1])
    assert told(measure_some(attention[:1, :1], one_frame, tokens[:1], 4)) is None
