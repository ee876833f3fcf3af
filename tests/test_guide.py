"""The guide: the hosts' own over frames; over speech it waits in the silence at the ends, and nothing else moves it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.attention.guide import guided_loss, guided_places, shares, speech, tokens_at_once
from tts_brain.types import OVER_FRAMES, OVER_SPEECH

QUIET, LOUD = -6.0, 0.0
seeds = st.integers(0, 10**6)


def voice(seed: int, frames: int) -> torch.Tensor:
    """(1, frames, 8): loud throughout, with noise."""
    return LOUD + 0.3 * torch.randn(1, frames, 8, generator=torch.Generator().manual_seed(seed))


def places(mel: torch.Tensor, over: str = OVER_SPEECH, r: int = 1) -> torch.Tensor:
    """Of clips without padding."""
    length = torch.full((len(mel),), mel.shape[1])
    steps = -(-mel.shape[1] // r)
    return guided_places(over, mel, length, r, torch.full((len(mel),), steps), steps)


@settings(deadline=None)
@given(seeds, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=3), st.floats(0.1, 0.6))
def test_over_frames_it_is_the_penalty_of_the_hosts(seed: int, lengths: list[tuple[int, int]], sigma: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    frames, tokens = (torch.tensor(column) for column in zip(*lengths, strict=True))
    attention = torch.rand(len(lengths), int(frames.max()) + 1, int(tokens.max()) + 1, generator=rng) + 0.1
    total = 0.0
    for clip, (t_end, n_end) in enumerate(lengths):
        for t in range(t_end):
            for n in range(n_end):
                off = n / n_end - t / t_end
                share = attention[clip, t, n].item() / attention[clip, t, :n_end].sum().item()
                total += share * (1 - torch.exp(torch.tensor(-(off**2) / (2 * sigma**2)))).item()
    steps = attention.shape[1]
    mel = torch.randn(len(lengths), steps * 2, 3, generator=rng)
    where = guided_places(OVER_FRAMES, mel, 2 * frames, 2, frames, steps)
    ours = guided_loss(attention, frames, tokens, where, sigma)
    assert ours.item() == pytest.approx(total / int(frames.sum()), rel=1e-4, abs=1e-7)


def test_looking_nowhere_is_no_way_to_please_it() -> None:
    # Coqui's Graves attention: what it puts beside the text does not come back.
    attention = torch.full((1, 8, 6), 0.02, requires_grad=True)
    places = guided_places(OVER_FRAMES, torch.zeros(1, 8, 2), torch.tensor([8]), 1, torch.tensor([8]), 8)
    (gradient,) = torch.autograd.grad(
        guided_loss(attention, torch.tensor([8]), torch.tensor([6]), places, 0.4), attention
    )
    assert (gradient * attention).sum(2).abs().max() < 1e-6  # to scale a row gains nothing
    assert shares(torch.zeros(1, 2, 3), torch.tensor([3])).eq(0.0).all()


@settings(deadline=None)
@given(seeds, st.integers(20, 60), st.integers(1, 150), st.integers(0, 3))
def test_tokens_at_once_leave_each_group_a_step_of_speech(seed: int, frames: int, tokens: int, silence: int) -> None:
    clip = torch.cat([torch.full((1, silence, 8), QUIET), voice(seed, frames), torch.full((1, silence, 8), QUIET)], 1)
    steps = torch.tensor([frames + 2 * silence])
    over_frames, over_speech = (
        tokens_at_once(places(clip, over), steps, torch.tensor([tokens])).item() for over in (OVER_FRAMES, OVER_SPEECH)
    )
    assert over_frames == max(-(-tokens // int(steps)), 1)
    groups = -(-tokens // over_speech)
    assert groups <= frames + 1
    assert over_speech == 1 or -(-tokens // (over_speech - 1)) > 0.8 * frames  # no more than it takes


def test_with_silence_at_the_ends_fewer_steps_are_left_for_the_text() -> None:
    silence = torch.full((1, 20, 8), QUIET)
    clip = torch.cat([silence, voice(0, 60), silence], dim=1)
    steps, tokens = torch.tensor([100]), torch.tensor([90])
    assert tokens_at_once(places(clip, OVER_FRAMES), steps, tokens).item() == 1
    assert tokens_at_once(places(clip), steps, tokens).item() == 2
    assert tokens_at_once(torch.zeros(1, 1), torch.tensor([1]), tokens).item() == 1  # nothing to go by


@settings(deadline=None)
@given(seeds, st.integers(40, 60), st.integers(0, 60), st.integers(0, 60))
def test_it_waits_in_the_silence_at_the_ends(seed: int, frames: int, head: int, tail: int) -> None:
    clip = voice(seed, frames)
    clip[0, :4] = QUIET  # so that there are quiet frames without the silence too
    silence = [torch.full((1, count, 8), QUIET) for count in (head, tail)]
    alone, inside = places(clip)[0], places(torch.cat([silence[0], clip, silence[1]], dim=1))[0]
    share = 0.02 * (head + tail + 6) / (frames - 8)  # what silence still counts
    assert torch.allclose(inside[head : head + frames], alone, atol=share + 2.0 / frames)
    assert (inside[:head] <= share + 1e-6).all()
    assert (inside[head + frames :] >= 1.0 - share - 1e-6).all()


@settings(deadline=None)
@given(seeds, st.floats(0.01, 100.0), st.floats(-50.0, 50.0), st.integers(0, 20), st.integers(1, 5))
def test_scale_shift_and_padding_change_nothing(seed: int, scale: float, shift: float, padding: int, r: int) -> None:
    mel = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(seed))
    lengths, steps = torch.tensor([40, 23]), 40 // r
    before = guided_places(OVER_SPEECH, mel, lengths, r, lengths // r, steps)
    other = torch.cat([mel * scale + shift, torch.full((2, padding, 4), 1e3)], dim=1)
    after = guided_places(OVER_SPEECH, other, lengths, r, lengths // r, steps)
    assert torch.allclose(before, after, atol=1e-3)
    assert (before >= 0.0).all() and (before < 1.0 + 1e-6).all() and (before.diff(dim=1) >= -1e-6).all()


def test_a_clip_that_is_all_alike_has_a_straight_diagonal() -> None:
    flat = torch.zeros(1, 50, 4)
    assert torch.allclose(places(flat), places(flat, OVER_FRAMES), atol=1e-5)


def test_a_pause_inside_counts_as_speech() -> None:
    clip = torch.cat([voice(0, 40), torch.full((1, 30, 8), QUIET), voice(1, 40)], dim=1)
    assert torch.allclose(places(clip), places(clip, OVER_FRAMES), atol=0.02)


def test_silence_counts_little_and_padding_nothing() -> None:
    clip = torch.cat([voice(0, 30), torch.full((1, 10, 8), QUIET), torch.zeros(1, 5, 8)], dim=1)
    amount = speech(clip, torch.tensor([40]))[0]
    assert amount.tolist() == [1.0] * 30 + [pytest.approx(0.02)] * 10 + [0.0] * 5


@pytest.mark.parametrize("frames", [60, 100, 300, 1000])
def test_a_click_in_the_silence_is_no_speech(frames: int) -> None:
    silence = torch.full((1, 50, 8), QUIET)
    silence[0, 20] = LOUD
    clip = torch.cat([silence, voice(0, frames)], dim=1)
    assert places(clip)[0, 50] < 0.03


def test_an_empty_text_and_a_length_beyond_the_tensor_do_no_harm() -> None:
    attention = torch.rand(2, 4, 3, requires_grad=True)
    where = guided_places(OVER_SPEECH, torch.randn(2, 8, 5), torch.tensor([9, 8]), 2, torch.tensor([4, 4]), 4)
    guided_loss(attention, torch.tensor([4, 4]), torch.tensor([0, 3]), where, 0.4).backward()
    assert torch.isfinite(attention.grad).all() and not attention.grad[0].any()


def test_no_clip_is_too_short() -> None:
    assert places(torch.zeros(1, 1, 4)).tolist() == [[0.0]]
    empty = guided_loss(torch.zeros(1, 0, 3), torch.tensor([0]), torch.tensor([3]), torch.zeros(1, 0), 0.4)
    assert empty.item() == 0.0
