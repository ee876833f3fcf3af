"""What every host's probe of held-out clips shares: the figures, and how a run is left undisturbed by measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tts_brain.attention.metrics import measure, report
from tts_brain.feedback.rollback import RandomStates

# Free-running synthesis counts as speech when it ends by itself within these shares of the reference's length,
# covers this share of the text and never jumps back by more than a token or two (DESIGN.md, *speaks*).
SPEAKS_LENGTH = (0.5, 2.0)
SPEAKS_COVERAGE = 0.5
SPEAKS_REPEATS = 2.0


@dataclass(frozen=True)
class HeldOut:
    """One measurement. ``l1`` is the mean absolute error of the mel spectrogram before the postnet, ``l1_postnet``
    after it, over valid frames; ``values`` are the attention metrics; ``matrices`` one (T, N) array per clip;
    ``l1_postnet_fresh`` is after the postnet with ``fresh_statistics``, None where that was not measured."""

    l1: float
    l1_postnet: float
    values: dict[str, float]
    matrices: list[np.ndarray]
    l1_postnet_fresh: float | None = None


@dataclass(frozen=True)
class Spoken:
    """Free-running synthesis of one clip's text; ``mel`` is (frames, mels)."""

    mel: np.ndarray
    speaks: bool


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients; every module's mode and the random states are as before afterwards."""
    states = RandomStates()
    before, modes = states.state_dict(), [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        states.load_state_dict(before)


@contextmanager
def fresh_statistics(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, batch norm by the statistics of the batch at hand; the running ones are left alone.

    Running statistics lag behind weights that move fast. In the first hundred steps of a full-size model an error by
    them says little: it jumps between a half and four times that by fresh ones from one evaluation to the next.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(module.running_mean, module.running_var) for module in norms]
    for module in norms:
        module.running_mean = module.running_var = None
    try:
        yield
    finally:
        for module, (mean, var) in zip(norms, kept, strict=True):
            module.running_mean, module.running_var = mean, var


def masked_l1(predicted: Tensor, target: Tensor, lengths: Tensor) -> tuple[float, int]:
    """Sum of absolute errors over valid frames, and how many values it sums; (B, T, mels), (B, T', mels), (B,)."""
    length = min(predicted.shape[1], target.shape[1])
    mask = torch.arange(length, device=target.device)[None, :, None] < lengths.to(target.device)[:, None, None]
    error = (predicted[:, :length] - target[:, :length]).abs() * mask
    return float(error.sum()), int(mask.sum()) * target.shape[2]


def speaks(attention: Tensor, reference_frames: int, limit: int) -> bool:
    """Did free-running synthesis speak the text?

    Args:
        attention: (T, N) of the synthesis, decoder frames by tokens.
        reference_frames: decoder frames of the recording.
        limit: decoder frames after which the synthesis was cut.
    """
    frames, tokens = attention.shape
    lengths = (torch.tensor([frames], device=attention.device), torch.tensor([tokens], device=attention.device))
    quality = report(measure(attention[None].float(), *lengths))
    ended = SPEAKS_LENGTH[0] * reference_frames <= frames < limit
    return bool(ended and quality.coverage >= SPEAKS_COVERAGE and quality.repeats <= SPEAKS_REPEATS)
