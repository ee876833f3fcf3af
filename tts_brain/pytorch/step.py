"""The optimizer step under way: its batches' losses, attention and stop token, until it becomes an observation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from tts_brain.attention.metrics import report
from tts_brain.feedback.diagnosis import BatchFacts
from tts_brain.pytorch.capture import StopTally
from tts_brain.pytorch.optimizer import OptimizerTap
from tts_brain.types import AttentionReport, Observation


@dataclass
class StepUnderWay:
    """What has been seen of it; several batches under gradient accumulation."""

    sums: dict[str, float] = field(default_factory=dict)
    batches: int = 0
    lengths: list[float] = field(default_factory=list)
    attention: Tensor | None = None
    healed: list[str] = field(default_factory=list)
    facts: BatchFacts | None = None

    def add(self, losses: Mapping[str, float], text_length: float | None = None) -> None:
        """One batch's raw losses, and its mean tokens per utterance where the host says them."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.batches += 1
        if text_length is not None:
            self.lengths.append(text_length)

    def observation(
        self,
        step: int,
        tap: OptimizerTap,
        *,
        skipped: bool,
        grad_norm: float | None,
        learning_rate: float | None,
        stop: StopTally | None,
    ) -> Observation:
        """The step as the manager sees it; losses and text length are means over its batches.

        Args:
            grad_norm: the host's; without it, the one ``tap`` measured.
            stop: read only when given: that waits for the device.
        """
        norm = grad_norm or _finite_or_none(tap.grad_norm)
        return Observation(
            step=step,
            losses={name: value / self.batches for name, value in self.sums.items()},
            grad_norm=math.nan if skipped else norm,
            learning_rate=learning_rate,
            update_ratio=_finite_or_none(tap.take_update_ratio()),
            attention=None if self.attention is None else _told(self.attention),
            stop=None if stop is None else stop.take(),
            text_length=fmean(self.lengths) if self.lengths else None,
            skipped=skipped,
        )


def _told(values: Tensor) -> AttentionReport | None:
    """Over the utterances of which something can be told; None without one."""
    values = values.cpu()  # the one wait for the device
    known = values[values.isfinite().all(1)]
    return report(known) if len(known) else None


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
