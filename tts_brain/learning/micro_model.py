"""The micro-Tacotron's weights, its teacher-forced pass and its losses; every tensor has a leading axis of R runs.

Encoder: embedding, a convolution over three tokens, and linear recurrences in both directions, whose decays are fixed:
like the hosts' bidirectional LSTM they tell each token where it stands, and unlike it they are one product. Decoder:
prenet with dropout (also when measuring, as in Tacotron 2), location-sensitive attention, one LSTM, r frames and a stop
logit from state and context. No postnet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.metrics import decoder_frames
from tts_brain.learning.micro_loop import AttentionLoop
from tts_brain.learning.micro_task import BANDS, MAX_TOKENS, VOCABULARY, Speech

ENCODER, INNER, TAPS, UNITS, PRENET = 32, 32, 7, 64, 32
GATE_POSITIVE = 5.0  # ESPnet's bce_pos_weight
_DROPOUT = 0.5
ATTENTION = ("keys", "kernel", "query", "energy")


def shapes(reduction_factor: int) -> dict[str, tuple[int, ...]]:
    """Of one run's weights, by name. Matrices are (in, out); ``_bias`` goes with the name before it."""
    both = UNITS + ENCODER
    return {
        "embedding": (VOCABULARY, ENCODER),
        "convolution": (3 * ENCODER, ENCODER),
        "convolution_bias": (ENCODER,),
        "encoder": (3 * ENCODER, ENCODER),
        "encoder_bias": (ENCODER,),
        "keys": (ENCODER, INNER),
        "kernel": (TAPS, INNER),
        "query": (UNITS, INNER),
        "energy": (INNER,),
        "prenet1": (BANDS, PRENET),
        "prenet1_bias": (PRENET,),
        "prenet2": (PRENET, PRENET),
        "prenet2_bias": (PRENET,),
        "from_prenet": (PRENET, 4 * UNITS),
        "from_prenet_bias": (4 * UNITS,),
        "recurrent": (both, 4 * UNITS),
        "frames": (both, BANDS * reduction_factor + 1),  # the last column is the stop token
        "frames_bias": (BANDS * reduction_factor + 1,),
    }


def draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Fresh weights as torch's own layers have them; a bias starts at 0."""
    if name == "embedding":
        return torch.randn(shape, generator=generator)
    if name.endswith("_bias"):
        return torch.zeros(shape)
    bound = 1.0 / math.sqrt(shape[0])
    return (2.0 * torch.rand(shape, generator=generator) - 1.0) * bound


@dataclass(frozen=True)
class Output:
    """A pass over a batch: T decoder steps, L = T r mel frames.

    Args:
        mel: (R, B, L, BANDS).
        stop: (R, B, T) logits.
        attention: (R, B, T, N), 0 on padded tokens.
        steps: (R, B) decoder steps of each utterance.
    """

    mel: Tensor
    stop: Tensor
    attention: Tensor
    steps: Tensor


def dropout_count(batch_size: int, steps: int) -> int:
    """Uniform numbers that ``teacher_forced`` needs."""
    return steps * batch_size * 2 * PRENET


def teacher_forced(weights: dict[str, Tensor], speech: Speech, reduction_factor: int, uniform: Tensor) -> Output:
    """One pass. ``uniform``: (R, ``dropout_count``) in [0, 1), for the prenet's dropout."""
    runs, batch, frames, _ = speech.mel.shape
    steps = frames // reduction_factor
    batch_shape = speech.tokens.shape
    inside = _valid(speech.token_lengths, batch_shape[2]).float()
    memory = _encode(weights, speech.tokens, inside)
    keys = torch.bmm(memory.flatten(1, 2), weights["keys"]).view(*batch_shape, INNER)
    heard = speech.mel[:, :, reduction_factor - 1 : -1 : reduction_factor]  # the last frame of each earlier step
    heard = torch.nn.functional.pad(heard, (0, 0, 1, 0)).transpose(1, 2).flatten(1, 2)  # (R, T B, BANDS)
    # Steps first, so that a longer batch changes no draw.
    keep = (uniform.view(runs, -1, 2 * PRENET) >= _DROPOUT).float() / (1.0 - _DROPOUT)
    first = _linear(weights, "prenet1", heard).relu() * keep[..., :PRENET]
    second = _linear(weights, "prenet2", first).relu() * keep[..., PRENET:]
    both, attention = AttentionLoop.apply(  # type: ignore[no-untyped-call]
        memory,
        keys,
        _linear(weights, "from_prenet", second).view(runs, steps, batch, -1),
        weights["kernel"],
        weights["query"],
        weights["energy"],
        weights["recurrent"],
        inside,
    )
    made = _linear(weights, "frames", both.flatten(1, 2)).view(runs, steps, batch, -1).transpose(1, 2)
    mel = made[..., :-1].reshape(runs, batch, frames, BANDS)
    return Output(mel, made[..., -1], attention.transpose(1, 2), decoder_frames(speech.mel_lengths, reduction_factor))


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Of (R, rows, in)."""
    return torch.baddbmm(weights[name + "_bias"].unsqueeze(1), x, weights[name])


def _encode(weights: dict[str, Tensor], tokens: Tensor, inside: Tensor) -> Tensor:
    """(R, B, N, ENCODER), 0 on padding."""
    runs = tokens.shape[0]
    table = weights["embedding"]
    rows = tokens + torch.arange(runs, device=tokens.device).view(-1, 1, 1) * table.shape[1]
    mask = inside.unsqueeze(3)
    x = torch.nn.functional.embedding(rows, table.flatten(0, 1)) * mask
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
    near = torch.cat([padded[:, :, :-2], x, padded[:, :, 2:]], dim=3)
    x = _linear(weights, "convolution", near.flatten(1, 2)).relu().view_as(x) * mask
    ahead = x.permute(3, 0, 1, 2).flatten(1, 2)  # (E, R B, N)
    decays = _decays(tokens.device)  # (2, E, N, N)
    around = torch.cat([torch.bmm(ahead, decays[0]), torch.bmm(ahead, decays[1])]).view(-1, *tokens.shape)
    told = torch.cat([x, around.permute(1, 2, 3, 0)], dim=3).flatten(1, 2)
    return _linear(weights, "encoder", told).tanh().view_as(x) * mask


_decay_matrices: dict[torch.device, Tensor] = {}


def _decays(device: torch.device) -> Tensor:
    """(2, ENCODER, N, N): what token m gives to token n, forward and backward, scaled to like size for any decay."""
    if device not in _decay_matrices:
        decay = torch.linspace(0.3, 0.95, ENCODER).view(-1, 1, 1)
        place = torch.arange(MAX_TOKENS)
        behind = place.unsqueeze(0) - place.unsqueeze(1)  # [m, n] = n - m
        forward = torch.where(behind > 0, decay ** behind.clamp(min=1), 0.0) * (1.0 - decay) / decay
        _decay_matrices[device] = torch.stack([forward, forward.transpose(1, 2)]).to(device)
    return _decay_matrices[device]


def mel_loss(output: Output, speech: Speech) -> tuple[Tensor, Tensor]:
    """Mean absolute and mean squared error over the valid frames, (R,) each."""
    valid = _valid(speech.mel_lengths, speech.mel.shape[2]).unsqueeze(3)
    # where, not a product: a NaN frame must be seen, padding never.
    error = torch.where(valid, output.mel - speech.mel, 0.0)
    cells = speech.mel_lengths.sum(1) * BANDS
    return error.abs().sum((1, 2, 3)) / cells, error.square().sum((1, 2, 3)) / cells


def gate_loss(output: Output) -> tuple[Tensor, Tensor]:
    """Cross entropy of the stop token per decoder step, its one positive weighted by ``GATE_POSITIVE``, (R,); and the
    soft (hits, false stops, missed stops), (3, R)."""
    valid = _valid(output.steps, output.stop.shape[2])
    truth = (torch.arange(output.stop.shape[2], device=output.stop.device) == output.steps.unsqueeze(2) - 1).float()
    weight = torch.full((), GATE_POSITIVE, device=output.stop.device)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        output.stop, truth, pos_weight=weight, reduction="none"
    )
    said = torch.where(valid, output.stop.detach(), -math.inf).sigmoid()
    hits = (said * truth).sum((1, 2))
    counts = torch.stack([hits, said.sum((1, 2)) - hits, truth.sum((1, 2)) - hits])
    return torch.where(valid, entropy, 0.0).sum((1, 2)) / valid.sum((1, 2)), counts


def guided_loss(output: Output, token_lengths: Tensor, sigma: Tensor) -> Tensor:
    """Mean penalty per decoder step, in [0, 1], (R,) (Tachibana et al., arXiv:1710.08969, section 4.1).

    Args:
        token_lengths: (R, B).
        sigma: (R,), width of the guide.
    """
    attention = output.attention
    steps, tokens = attention.shape[2:]
    t = torch.arange(steps, device=attention.device) / output.steps.unsqueeze(2)  # (R, B, T)
    n = torch.arange(tokens, device=attention.device) / token_lengths.unsqueeze(2)  # (R, B, N)
    off = (n.unsqueeze(2) - t.unsqueeze(3)).square() / (2.0 * sigma.square()).view(-1, 1, 1, 1)
    penalty = (1.0 - torch.exp(-off)) * _valid(output.steps, steps).unsqueeze(3)
    return (attention * penalty).sum((1, 2, 3)) / output.steps.sum(1)


def _valid(lengths: Tensor, longest: int) -> Tensor:
    """(R, B, longest)."""
    return torch.arange(longest, device=lengths.device) < lengths.unsqueeze(2)


def forward_sum_loss(attention: Tensor, steps: Tensor, token_lengths: Tensor) -> Tensor:
    """``attention.forward_sum``, mean over each run's utterances, (R,).

    Args:
        attention: (R, B, T, N).
        steps, token_lengths: (R, B).
    """
    paths = forward_sum(attention.flatten(0, 1), steps.flatten(), token_lengths.flatten())
    return paths.view(steps.shape).mean(1)
