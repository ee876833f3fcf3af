"""Made-up speech for the micro-Tacotron: texts of a few symbols, and mel-like frames that speak them.

Every number is a hash of (seed, step, stream, place), not the next one of a generator: a run's batch is the same alone
and beside other runs, on a CPU and on a GPU, after a resume and after a rollback; and no random state has to be kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SYMBOLS = 20
END = SYMBOLS + 1  # token 0 is padding, the end of the text comes after the symbols
VOCABULARY = SYMBOLS + 2
BANDS = 12
MIN_SYMBOLS, MAX_SYMBOLS = 6, 14
MAX_TOKENS = MAX_SYMBOLS + 1
CLEAN_EDGE = (0.0, 2.0)  # frames of silence at either end of ordinary speech

_MOST_FRAMES = 100  # with CLEAN_EDGE; what would be longer is spoken faster
_SILENCE = -1.5  # level of all bands
_PAUSE_SHARE, _PAUSE = 0.12, (2.0, 12.0)  # of the symbols; frames
_LASTING = (2.0, 9.0)  # frames, by kind of symbol
_RATE = (0.75, 1.3)  # of the utterance
_JITTER = (0.4, 1.6)  # of each occurrence
_LANGUAGE = 20261125  # what is spoken is the same for every seed, as a corpus is
# Streams of random numbers; a text that grows does not move what is drawn for the frames.
_TEXT, _FRAME = 0, 1
DROPOUT = 2


@dataclass(frozen=True)
class Speech:
    """A batch for each of R runs. B utterances, N tokens with the end token, T mel frames.

    Args:
        tokens: (R, B, N) long, 0 in the padding.
        token_lengths: (R, B) long.
        mel: (R, B, T, BANDS), 0 in the padding; T is a multiple of the reduction factor.
        mel_lengths: (R, B) long.
    """

    tokens: Tensor
    token_lengths: Tensor
    mel: Tensor
    mel_lengths: Tensor


def uniform(seeds: Sequence[int], steps: Sequence[int], stream: int, count: int, device: torch.device) -> Tensor:
    """(R, count) in [0, 1): place i of run r depends on (seed, step, stream, i) alone, not on ``count`` or R.

    MurmurHash3's finaliser (Appleby 2011), with half of a 64-bit key added before and half put in between.
    """
    keys = [_key(seed, step, stream) for seed, step in zip(seeds, steps, strict=True)]
    key = torch.tensor([[_signed(k & _MASK), _signed(k >> 32)] for k in keys], dtype=torch.int32, device=device)
    place = torch.arange(count, dtype=torch.int32, device=device) * _signed(0x9E3779B9)
    h = place + key[:, :1]
    # In place: fifty thousand numbers a step are a good part of its cost. The masks make the shifts logical.
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(0x85EBCA6B)
    h ^= key[:, 1:]
    h ^= (h >> 13) & 0x7FFFF
    h *= _signed(0xC2B2AE35)
    h ^= (h >> 16) & 0xFFFF
    return ((h >> 8) & 0xFFFFFF).float().mul_(2.0**-24)


def speak(
    seeds: Sequence[int],
    steps: Sequence[int],
    *,
    batch_size: int,
    reduction_factor: int,
    edges: Sequence[tuple[float, float]],
    wrong: Sequence[float],
    noise: float,
    device: torch.device,
) -> Speech:
    """One batch for each run.

    A symbol lasts 2 to 9 frames, by its kind, times the utterance's speaking rate (0.75 to 1.3), times a jitter of each
    occurrence (0.4 to 1.6); after 12 % of the symbols comes a pause of 2 to 12 frames that the text does not show.
    Neighbouring frames run into each other (coarticulation), each utterance has a tilt of its own (the speaker), and
    there is noise. With clean edges at most 100 frames, 61 on average, 1.4 decoder steps a token at r = 4.

    Args:
        seeds, steps: (R,), what the batch is drawn from.
        edges: (R,), least and most silent frames at each end, drawn for each utterance.
        wrong: (R,), share of utterances that come with the text of another one.
        noise: standard deviation in each band; that of the speech itself is about 1.
    """
    runs, columns = len(seeds), 4 * MAX_TOKENS
    drawn = uniform(seeds, steps, _TEXT, batch_size * columns, device).view(runs, batch_size, 4, MAX_TOKENS)
    symbols = (drawn[:, :, 0] * SYMBOLS).long() + 1  # (R, B, N)
    extra = drawn[..., MAX_SYMBOLS]  # (R, B, 4): the last column belongs to no symbol
    count = MIN_SYMBOLS + (extra[..., 0] * (MAX_SYMBOLS - MIN_SYMBOLS + 1)).long()  # (R, B)
    place = torch.arange(MAX_TOKENS, device=device)
    spoken = place < count.unsqueeze(2)

    low, high = torch.tensor(edges, device=device, dtype=torch.float32).T.reshape(2, runs, 1)
    edge = low + (high - low) * torch.stack([extra[..., 1], extra[..., 2]])  # (2, R, B)
    rate = _between(extra[..., 3:], _RATE)  # (R, B, 1)
    kinds = _language(device)
    lasting = kinds.frames[symbols] * rate * _between(drawn[:, :, 1], _JITTER) * spoken
    between = spoken & (place != count.unsqueeze(2) - 1)
    pausing = _between(drawn[:, :, 3], _PAUSE) * (drawn[:, :, 2] < _PAUSE_SHARE) * between
    ends, sounds = _segments(symbols, lasting, pausing, edge)
    most = [_MOST_FRAMES + 2 * round(max(most - CLEAN_EDGE[1], 0.0)) for _, most in edges]  # each run's own
    ends = ends * (torch.tensor(most, device=device).view(-1, 1, 1) / ends[..., -1:]).clamp(max=1.0)
    frames = ends[..., -1].round().long().clamp(min=1)  # (R, B)
    longest = int(frames.max()) if device.type == "cpu" else max(most)  # a GPU would have to be waited for
    mel = _sound(ends, sounds, -(-longest // reduction_factor) * reduction_factor, kinds.prototypes)
    mel += _tilt(drawn[:, :, 1, MAX_SYMBOLS - 1], kinds.tilt)
    if noise > 0.0:
        draws = uniform(seeds, steps, _FRAME, mel.shape[2] * batch_size * BANDS, device)
        # Frames first, so that a longer batch changes no draw. Uniform noise: nothing here hangs on its shape.
        mel += (draws.view(runs, -1, batch_size, BANDS).transpose(1, 2) - 0.5) * (noise * 12.0**0.5)
    mel *= (torch.arange(mel.shape[2], device=device) < frames.unsqueeze(2)).unsqueeze(3)
    tokens = torch.where(spoken, symbols, (place == count.unsqueeze(2)) * END)
    lengths = count + 1
    mixed = drawn[:, :, 3, MAX_SYMBOLS - 1] < torch.tensor(wrong, device=device).unsqueeze(1)  # (R, B)
    tokens = torch.where(mixed.unsqueeze(2), tokens.roll(1, 1), tokens)
    return Speech(tokens, torch.where(mixed, lengths.roll(1, 1), lengths), mel, frames)


def _between(draw: Tensor, limits: tuple[float, float]) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * draw


def _segments(symbols: Tensor, lasting: Tensor, pausing: Tensor, edge: Tensor) -> tuple[Tensor, Tensor]:
    """Ends in frames, and what sounds, (R, B, S) each: silence, then symbol, pause, symbol, pause …, silence.

    S = 2 N + 2; symbols beyond the text have no length.
    """
    pairs = torch.stack([lasting, pausing], dim=3).flatten(2)
    ends = torch.cat([edge[0].unsqueeze(2), pairs, edge[1].unsqueeze(2)], dim=2).cumsum(2)
    sounds = torch.stack([symbols, torch.zeros_like(symbols)], dim=3).flatten(2)
    return ends, torch.nn.functional.pad(sounds, (1, 1))


def _sound(ends: Tensor, sounds: Tensor, frames: int, prototypes: Tensor) -> Tensor:
    """(R, B, frames, BANDS), each frame a quarter of both neighbours."""
    middle = (torch.arange(-1, frames + 1, device=ends.device) + 0.5).expand(*ends.shape[:2], -1).contiguous()
    segment = torch.searchsorted(ends.contiguous(), middle, right=True).clamp_(max=ends.shape[2] - 1)
    mel = torch.nn.functional.embedding(sounds.gather(2, segment), prototypes)
    return 0.5 * mel[:, :, 1:-1] + 0.25 * (mel[:, :, :-2] + mel[:, :, 2:])


def _tilt(draw: Tensor, tilt: Tensor) -> Tensor:
    """(R, B, 1, BANDS): the speaker's."""
    return (draw - 0.5)[:, :, None, None] * tilt


@dataclass(frozen=True)
class _Language:
    prototypes: Tensor  # (VOCABULARY, BANDS), the first is silence
    frames: Tensor  # (VOCABULARY,) usual length
    tilt: Tensor  # (BANDS,)


_languages: dict[torch.device, _Language] = {}


def _language(device: torch.device) -> _Language:
    if device not in _languages:
        draw = uniform([_LANGUAGE], [0], _TEXT, VOCABULARY * (BANDS + 1), torch.device("cpu"))[0]
        sounds = (draw[: VOCABULARY * BANDS].view(VOCABULARY, BANDS) - 0.5) * 12.0**0.5
        sounds[0] = _SILENCE
        lasting = _between(draw[VOCABULARY * BANDS :], _LASTING)
        _languages[device] = _Language(
            sounds.to(device), lasting.to(device), torch.linspace(-1.0, 1.0, BANDS, device=device)
        )
    return _languages[device]


_MASK = 0xFFFFFFFF


def _signed(value: int) -> int:
    """The int32 with the bits of an unsigned one."""
    return value - (1 << 32) if value >> 31 else value


def _key(seed: int, step: int, stream: int) -> int:
    """64 bits (splitmix64; Steele, Lea, Flood, OOPSLA 2014)."""
    key = 0
    for part in (seed, step, stream):
        key = (key ^ part) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key
