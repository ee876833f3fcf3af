"""What a Coqui Trainer is made with, as far as the brain must know it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, SequentialSampler
from trainer import Trainer
from TTS.tts.datasets.dataset import TTSDataset

from tts_brain.config import BrainConfig
from tts_brain.types import GATE_WEIGHT, KNOBS, TVERSKY_ALPHA, TVERSKY_BETA, TVERSKY_WEIGHT, Capabilities

log = logging.getLogger("tts_brain")

_STOP_KNOBS = {GATE_WEIGHT, TVERSKY_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA}


def what_this_run_allows(trainer: Trainer, config: BrainConfig) -> BrainConfig:
    """Only observe where steering could harm: weights that processes share, optimizers that are not torch's."""
    why = None
    if trainer.use_accelerate:
        why = "accelerate steps the optimizer in its own way"
    elif trainer.num_gpus > 1 and _gradients_are_averaged(trainer):
        why = "processes that share their gradients need a common decision, which the Coqui adapter cannot take"
    elif len(trainer.optimizer) > 1 or not isinstance(trainer.optimizer[0], torch.optim.Optimizer):
        why = f"{type(trainer.optimizer[0]).__name__} steps two optimizers"
    elif trainer.num_gpus > 1:
        log.warning(
            "[brain] %d processes, and each trains alone on its share of the clips: the Trainer averages no gradients, "
            "and saves what the first has learned. The brain steers the first; one GPU would do as well",
            trainer.num_gpus,
        )
    if why is None or config.mode == "observe":
        return config
    log.warning("[brain] mode 'observe' instead of %r: %s", config.mode, why)
    return BrainConfig.from_dict({**config.to_dict(), "mode": "observe"})


def _gradients_are_averaged(trainer: Trainer) -> bool:
    """Does a step go through DistributedDataParallel? Trainer 0.4.0 makes one, and trains the model inside it."""
    return any(isinstance(m, DistributedDataParallel) for m in (trainer.model, trainer.wrapped_model))


def capabilities(trainer: Trainer) -> Capabilities:
    """What the trainer can show, and the brain turn."""
    stop = bool(trainer.config.stopnet)
    return Capabilities(
        host="coqui",
        losses=("total", "mel", "guided", "gate") if stop else ("total", "mel", "guided"),
        knobs=tuple(name for name in KNOBS if stop or name not in _STOP_KNOBS),
        alignment="attention",
        stop_token=stop,
        optimizers=len(trainer.optimizer),
        grad_clip=host_clip(trainer),
    )


def host_clip(trainer: Trainer) -> float | None:
    """Norm that the host clips gradients to; None where it does not, or to several (a list, one an optimizer)."""
    clip = getattr(trainer.config, "grad_clip", None)
    return float(clip) if isinstance(clip, int | float) and clip > 0.0 else None


def languages(samples: Any) -> set[Any]:
    """Those of the training clips, as far as they are said."""
    return {sample.get("language") for sample in samples or () if isinstance(sample, Mapping)}


def warn_of_order(loader: Any) -> None:
    """Coqui's dataset is sorted by length, and its loader keeps that order unless it is told to shuffle."""
    sampler = getattr(loader, "batch_sampler", None)
    in_turn = type(sampler) is BatchSampler and isinstance(sampler.sampler, SequentialSampler)
    if in_turn and isinstance(loader.dataset, TTSDataset):
        log.warning(
            "[brain] the loader gives the clips in the order of their length, shuffled within groups at the most, the "
            "same in each epoch: loss and attention go up and down with it, whatever is learned. Write shuffle=True"
        )


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Capacitron and accelerate wrap the real one."""
    for name in ("primary_optimizer", "optimizer"):
        optimizer = getattr(optimizer, name, optimizer)
    return optimizer


def parts_of(trainer: Trainer) -> dict[str, Any]:
    """What a snapshot holds beside model and brain."""
    parts: dict[str, Any] = {"scaler": trainer.scaler}
    return parts | {f"optimizer_{i}": o for i, o in enumerate(trainer.optimizer)}
