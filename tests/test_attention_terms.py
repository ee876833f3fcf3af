"""Our guide takes the place of the host's; without a knob that was turned, the loss is the very tensor."""

import pytest
import torch

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.guide import guided_loss, guided_places, tokens_at_once
from tts_brain.attention.terms import HostGuide, with_attention_terms
from tts_brain.types import FORWARD_SUM_OFF, FORWARD_SUM_WEIGHT, GUIDED_SIGMA, GUIDED_WEIGHT, OVER_FRAMES

FRAMES, TOKENS = torch.tensor([30, 24]), torch.tensor([9, 12])
LOSS, HOSTS = torch.tensor(3.0), HostGuide(torch.tensor(0.5), 0.2, 0.4)
NONE = HostGuide(None, 0.0, 0.4)


def attention() -> torch.Tensor:
    return torch.softmax(torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0)), 2)


def places() -> torch.Tensor:
    return guided_places(OVER_FRAMES, torch.zeros(2, 30, 8), FRAMES, 1, FRAMES, 30)


def never() -> torch.Tensor:
    raise AssertionError("nobody asked where the guide looks")


def with_knobs(host: HostGuide, **knobs: float) -> torch.Tensor:
    return with_attention_terms(LOSS, knobs, attention(), FRAMES, TOKENS, places, host)


@pytest.mark.parametrize("host", [HOSTS, NONE])
@pytest.mark.parametrize("knobs", [{}, {FORWARD_SUM_WEIGHT: FORWARD_SUM_OFF}, {GUIDED_SIGMA: 0.4}])
def test_with_nothing_turned_it_is_the_very_loss_and_nothing_is_computed(host: HostGuide, knobs: dict) -> None:
    assert with_attention_terms(LOSS, knobs, attention(), FRAMES, TOKENS, never, host) is LOSS


@pytest.mark.parametrize(("host", "own"), [(HOSTS, 0.5), (NONE, 0.0)])
def test_our_guide_takes_the_place_of_the_hosts(host: HostGuide, own: float) -> None:
    ours = guided_loss(attention(), FRAMES, TOKENS, places(), 0.2)
    assert with_knobs(host, **{GUIDED_WEIGHT: 2.0, GUIDED_SIGMA: 0.2}).item() == pytest.approx(3.0 - own + 2.0 * ours)


def test_a_width_alone_is_turned_at_the_hosts_weight_and_needs_a_guide() -> None:
    ours = guided_loss(attention(), FRAMES, TOKENS, places(), 0.2)
    assert with_knobs(HOSTS, **{GUIDED_SIGMA: 0.2}).item() == pytest.approx(2.5 + 0.2 * ours)
    assert with_knobs(NONE, **{GUIDED_SIGMA: 0.2}) is LOSS


def test_the_forward_sum_term_is_added_beside_the_guide() -> None:
    path = forward_sum(attention(), FRAMES, TOKENS, tokens_at_once(places(), FRAMES, TOKENS)).mean()
    assert with_knobs(HOSTS, **{FORWARD_SUM_WEIGHT: 0.1}).item() == pytest.approx(3.0 + 0.1 * path)
    both = with_knobs(NONE, **{FORWARD_SUM_WEIGHT: 0.1, GUIDED_WEIGHT: 2.0})
    guide = guided_loss(attention(), FRAMES, TOKENS, places(), 0.4)
    assert both.item() == pytest.approx(3.0 + 0.1 * path + 2.0 * guide)


@pytest.mark.parametrize("kept", [0, 1])
def test_terms_of_ours_look_only_at_the_clips_they_are_told_to(kept: int) -> None:
    knobs, only = {FORWARD_SUM_WEIGHT: 0.1, GUIDED_WEIGHT: 2.0}, slice(kept, kept + 1)
    clips = torch.arange(2) == kept
    weights = attention().requires_grad_()
    loss = with_attention_terms(LOSS, knobs, weights, FRAMES, TOKENS, places, HOSTS, clips)
    alone = lambda: places()[only]  # noqa: E731
    of_one = with_attention_terms(
        LOSS, knobs, attention()[only], FRAMES[only], TOKENS[only], alone, HOSTS, torch.tensor([True])
    )
    assert loss.item() == pytest.approx(of_one.item())
    loss.backward()
    assert weights.grad[1 - kept].abs().max() == 0.0 < weights.grad[kept].abs().max()


def test_without_any_clip_the_hosts_guide_is_gone_all_the_same() -> None:
    nothing = torch.zeros(2, dtype=torch.bool)
    knobs = {FORWARD_SUM_WEIGHT: 0.1, GUIDED_WEIGHT: 2.0}
    assert with_attention_terms(LOSS, knobs, attention(), FRAMES, TOKENS, places, HOSTS, nothing).item() == 2.5
