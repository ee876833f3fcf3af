"""Figures of held-out clips: right, blind to padding, and taken without leaving a trace in the run."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tts_brain.pytorch.heldout import fresh_statistics, masked_l1, speaks, undisturbed


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 3))
def test_masked_l1_is_the_plain_loop(seed: int, lengths: list[int], predicted_frames: int, mels: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    predicted = torch.randn(len(lengths), predicted_frames, mels, generator=rng)
    target = torch.randn(len(lengths), 7, mels, generator=rng)
    error, count = 0.0, 0
    for i, length in enumerate(lengths):
        for t in range(min(length, predicted_frames)):
            for m in range(mels):
                error += abs(float(predicted[i, t, m]) - float(target[i, t, m]))
                count += 1
    found, number = masked_l1(predicted, target, torch.tensor(lengths))
    assert number == count and found == pytest.approx(error, rel=1e-4, abs=1e-5)


TOKENS = 20


def path(frames: int, tokens: list[int]) -> Tensor:
    """Attention that stands on ``tokens``, each for the same time; the last ones take the rest."""
    attention = torch.full((frames, TOKENS), 0.01)
    for t in range(frames):
        attention[t, tokens[min(t * len(tokens) // frames, len(tokens) - 1)]] = 1.0
    return attention


ALONG = list(range(TOKENS))
GOOD = path(60, ALONG)


@pytest.mark.parametrize(
    ("attention", "reference", "limit", "spoken"),
    [
        pytest.param(GOOD, 60, 120, True, id="good"),
        pytest.param(GOOD.half(), 60, 120, True, id="half precision"),
        pytest.param(GOOD, 60, 61, True, id="ended just before the limit"),
        pytest.param(GOOD, 60, 60, False, id="cut at the limit"),
        pytest.param(GOOD, 120, 240, True, id="half as long"),
        pytest.param(GOOD, 121, 240, False, id="too short"),
        pytest.param(path(60, ALONG[:9]), 60, 120, False, id="half the text uncovered"),
        pytest.param(path(60, ALONG[:12]), 60, 120, True, id="most of the text covered"),
        pytest.param(path(60, [0]), 60, 120, False, id="stuck on one token"),
        pytest.param(torch.full((60, TOKENS), 1 / TOKENS), 60, 120, False, id="no attention at all"),
        pytest.param(torch.full((60, TOKENS), float("nan")), 60, 120, False, id="not a number"),
        pytest.param(path(100, [*ALONG, *ALONG, *ALONG]), 60, 120, True, id="two jumps back"),
        pytest.param(path(100, ALONG * 4), 60, 120, False, id="loops"),
    ],
)
def test_speaks(attention: Tensor, reference: int, limit: int, spoken: bool) -> None:
    assert speaks(attention, reference, limit) is spoken


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_measuring_leaves_no_trace_even_when_it_fails(training: bool, fails: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train(training)
    statistics = model[1].running_mean.clone()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)

    def measure() -> None:
        with undisturbed(model):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            torch.manual_seed(7), random.seed(7), np.random.seed(7)
            out = model(torch.randn(5, 3))
            assert not out.requires_grad
            draws()
            if fails:
                raise MemoryError

    if fails:
        with pytest.raises(MemoryError):
            measure()
    else:
        measure()
    assert all(m.training == training for m in model.modules()) and torch.is_grad_enabled()
    assert draws() == expected and torch.equal(model[1].running_mean, statistics)


def test_a_layer_the_host_has_frozen_stays_so() -> None:
    """Hosts freeze parts, such as a batch norm in evaluation mode, within a model that trains."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    model[1].eval()
    with undisturbed(model):
        pass
    assert model.training and model[0].training and not model[1].training


def test_fresh_statistics_leave_the_running_ones_alone() -> None:
    norm = torch.nn.BatchNorm1d(2).eval()
    norm.running_mean += 5.0
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    seen = torch.randn(64, 2) * 3.0 + 1.0
    with pytest.raises(RuntimeError), fresh_statistics(norm):
        fresh = norm(seen)
        raise RuntimeError("whatever happens")
    assert torch.allclose(fresh.mean(0), torch.zeros(2), atol=1e-5)
    assert norm(seen).mean() < -1.0
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
