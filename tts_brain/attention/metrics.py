"""How good an alignment is, in nine numbers per utterance (DESIGN.md, 'Attention quality, defined once').

``attention_diag`` is the one to steer by; the others say what is wrong when it is low.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from tts_brain.types import AttentionReport

METRICS = (
    "diagonality",
    "focus",
    "coverage",
    "attention_diag",
    "entropy",
    "skips",
    "repeats",
    "longest_dwell",
    "end_reached",
)

END_SHARE = 0.05


@torch.no_grad()
def measure(attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor, band: float = 0.1) -> Tensor:
    """Alignment quality of each utterance; nothing waits for the device.

    - ``diagonality``: mass in the band around the diagonal, corrected for chance; [0, 1], 0 for uniform attention, and
      for any where the band is the whole matrix (one token, one frame). The band is where guided attention costs least
      (Tachibana et al., arXiv:1710.08969, section 4.1).
    - ``focus``: mean over frames of the largest weight, (0, 1] (focus rate, FastSpeech, arXiv:1905.09263, section 3.3).
    - ``coverage``: mean over tokens of the largest weight, over the most that T frames allow, min(1, T/N); (0, 1].
    - ``attention_diag``: the least of these three.
    - ``entropy``: mean over frames, over ln N; [0, 1], 0 for N = 1.
    - ``skips``: forward jumps of the arg-max path by more than one token (for T < N: by more than an even path needs).
    - ``repeats``: backward jumps of that path. A tie goes to the first token.
    - ``longest_dwell``: most frames in a row on one token.
    - ``end_reached``: 1 when the path ever touches the last 5 % of the tokens (at least the last one), else 0.

    Each row is divided by its sum over the valid tokens, so weights that do not sum to 1 are fine; negative weights
    count as 0. A row that is all zero, or holds a NaN or +infinity, counts as uniform: it says nothing.

    Args:
        attention: (B, T, N), frames by tokens, padded, any float type; computed in float32.
        frame_lengths: (B,), decoder frames; clamped to [0, T].
        token_lengths: (B,); clamped to [0, N].
        band: half-width of the band as a share of the utterance, in (0, 1).

    Returns:
        (B, 9) float32 in the order of ``METRICS``, on the device of ``attention``, always finite; a row of zeros for an
        utterance without frames or without tokens.

    Raises:
        ValueError: on other shapes, or a band out of range.
    """
    _check(attention, frame_lengths, token_lengths, band)
    batch, max_frames, max_tokens = attention.shape
    device = attention.device
    if attention.numel() == 0:
        return torch.zeros(batch, len(METRICS), device=device)
    # A blocking copy to a GPU would wait for it; one from a GPU must block, or the CPU reads too early.
    overlap = device.type != "cpu"
    frame_count = frame_lengths.to(device, torch.long, non_blocking=overlap).clamp(0, max_frames)  # (B,)
    token_count = token_lengths.to(device, torch.long, non_blocking=overlap).clamp(0, max_tokens)  # (B,)
    present = (frame_count > 0) & (token_count > 0)  # (B,)
    frame_count, token_count = frame_count.clamp(min=1), token_count.clamp(min=1)

    frame = torch.arange(max_frames, device=device).unsqueeze(0)  # (1, T)
    token = torch.arange(max_tokens, device=device).unsqueeze(0)  # (1, N)
    in_frames = frame < frame_count.unsqueeze(1)  # (B, T)
    in_tokens = token < token_count.unsqueeze(1)  # (B, N)
    weights = _distributions(attention, in_frames, in_tokens, token_count)
    near = _band_mask(frame, token, frame_count, token_count, band) & in_frames.unsqueeze(2) & in_tokens.unsqueeze(1)
    frames, tokens = frame_count.float(), token_count.float()

    uniform_mass = near.sum((1, 2)) / (frames * tokens)
    mass = torch.where(near, weights, 0.0).sum((1, 2)) / frames
    # Where the band is the whole matrix nothing can be told from chance: 0 / tiny is 0, never 0 / 0.
    diagonality = ((mass - uniform_mass) / (1.0 - uniform_mass).clamp(min=1e-6)).clamp(0.0, 1.0)
    diagonality = torch.where(uniform_mass < 1.0, diagonality, 0.0)
    focus = (weights.amax(2).sum(1) / frames).clamp(max=1.0)
    coverage = (weights.amax(1).sum(1) / torch.minimum(tokens, frames)).clamp(max=1.0)
    attention_diag = torch.minimum(torch.minimum(diagonality, focus), coverage)
    nats = -torch.xlogy(weights, weights).sum((1, 2)) / frames
    entropy = (nats / tokens.clamp(min=2.0).log()).clamp(0.0, 1.0)

    shares = (diagonality, focus, coverage, attention_diag, entropy)
    path = _path_metrics(weights.argmax(2), frame, in_frames, frame_count, token_count)
    return torch.where(present.unsqueeze(1), torch.stack((*shares, *path), dim=1), 0.0)


def report(values: Tensor) -> AttentionReport:
    """The mean over utterances; here, and only here, the device is waited for.

    Args:
        values: (B, 9), from ``measure``, B at least 1.

    Raises:
        ValueError: on another shape.
    """
    if values.dim() != 2 or values.shape[0] == 0 or values.shape[1] != len(METRICS):
        raise ValueError(
            f"values has shape {tuple(values.shape)}; pass (B, {len(METRICS)}) from measure(), with B at least 1"
        )
    return AttentionReport(**dict(zip(METRICS, values.mean(0).tolist(), strict=True)))


def decoder_frames(mel_lengths: Tensor, reduction_factor: int) -> Tensor:
    """Decoder frames that ``mel_lengths`` mel frames take at ``reduction_factor`` mel frames each, rounded up.

    Raises:
        ValueError: when ``reduction_factor`` is below 1.
    """
    if reduction_factor < 1:
        raise ValueError(f"reduction_factor={reduction_factor}; write a whole number of mel frames, 1 or more")
    return torch.div(mel_lengths + (reduction_factor - 1), reduction_factor, rounding_mode="floor")


def _check(attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor, band: float) -> None:
    if attention.dim() != 3:
        raise ValueError(f"attention has shape {tuple(attention.shape)}; pass (B, T, N): utterances, frames, tokens")
    expected = (attention.shape[0],)
    for name, lengths in (("frame_lengths", frame_lengths), ("token_lengths", token_lengths)):
        if tuple(lengths.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(lengths.shape)}; pass {expected}, "
                f"one length per utterance of attention {tuple(attention.shape)}"
            )
    if not (isfinite(band) and 0.0 < band < 1.0):
        raise ValueError(f"band={band} is out of (0, 1); write band=0.1 for a tenth of the utterance on either side")


def _distributions(attention: Tensor, in_frames: Tensor, in_tokens: Tensor, token_count: Tensor) -> Tensor:
    """(B, T, N): rows that sum to 1 over the valid tokens; exactly 0 wherever there is padding."""
    weights = torch.where(in_tokens.unsqueeze(1), attention.float(), 0.0).clamp(min=0.0)
    peak = weights.amax(2, keepdim=True)  # (B, T, 1); a NaN in the row is the peak
    told = peak.isfinite() & (peak > 0.0)
    # By the peak first: the sum of huge weights would overflow, that of tiny ones would vanish.
    weights = weights / torch.where(told, peak, 1.0)
    weights = weights / torch.where(told, weights.sum(2, keepdim=True), 1.0)
    uniform = in_tokens.float() / token_count.unsqueeze(1)  # (B, N)
    weights = torch.where(told, weights, uniform.unsqueeze(1))
    return torch.where(in_frames.unsqueeze(2), weights, 0.0)


def _band_mask(frame: Tensor, token: Tensor, frame_count: Tensor, token_count: Tensor, band: float) -> Tensor:
    """(B, T, N): cells whose centre, ((t + 0.5) / T, (n + 0.5) / N), is within ``band`` of the diagonal.

    Centres, not t/T and n/N: by those an exact alignment is late by up to 1/N, and its mirror image early.
    Cells that the diagonal itself crosses always belong: below 10 tokens or so they are wider than the band.
    """
    t, n = frame_count.float().unsqueeze(1), token_count.float().unsqueeze(1)  # (B, 1)
    # All distances times 2TN, which are whole numbers: no rounding decides which cells are in.
    across = ((2 * frame + 1) * n).unsqueeze(2)  # (B, T, 1)
    along = ((2 * token + 1) * t).unsqueeze(1)  # (B, 1, N)
    off = (across - along).abs()
    return (off <= (2 * band * t * n).unsqueeze(2)) | (off < (t + n).unsqueeze(2))


def _path_metrics(
    path: Tensor, frame: Tensor, in_frames: Tensor, frame_count: Tensor, token_count: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Skips, repeats, longest dwell and end reached, each (B,), of ``path`` (B, T): the token of each frame."""
    jump = path.diff(dim=1) * in_frames[:, 1:]  # (B, T - 1)
    # With fewer frames than tokens every step must jump: allowed is what an even path from first to last token needs.
    steps = (frame_count - 1).clamp(min=1)
    needed = torch.div(token_count - 1 + steps - 1, steps, rounding_mode="floor").clamp(min=1)
    skips = (jump > needed.unsqueeze(1)).sum(1)
    repeats = (jump < 0).sum(1)
    run_start = torch.where(jump != 0, frame[:, 1:], 0).cummax(1).values  # (B, T - 1); frame where the run began
    dwell = torch.where(in_frames[:, 1:], frame[:, 1:] - run_start + 1, 1)
    longest = torch.cat((torch.ones_like(path[:, :1]), dwell), dim=1).amax(1)
    ending = (token_count * END_SHARE).long().clamp(min=1)  # tokens that count as the end
    reached = ((path >= (token_count - ending).unsqueeze(1)) & in_frames).any(1)
    return skips.float(), repeats.float(), longest.float(), reached.float()
