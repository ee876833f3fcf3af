"""Weights of the losses by phase, moved smoothly; prices of the stop token by its own errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tts_brain.losses.tversky import tversky_coefficients
from tts_brain.types import (
    GATE_WEIGHT,
    MEL_WEIGHT,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    TVERSKY_OFF,
    TVERSKY_WEIGHT,
    StopTokenCounts,
)

# One value per phase, in order (DESIGN.md). Before there is an alignment, "stop" cannot be learned from the text.
PHASE_MEL_WEIGHT = (1.0, 1.0, 1.2, 1.5)
PHASE_GATE_WEIGHT = (0.5, 1.0, 1.0, 1.0)
# Share of the Tversky weight. While an alignment forms the term delays it (docs/history.md); after that it brings
# up a stop token whose own loss leaves it unsure: one positive step among dozens, in Coqui weighed down to a fifth.
PHASE_TVERSKY_SHARE = (0.0, 0.0, 1.0, 1.0)


class AdaptiveLossController:
    """Targets for the mel, gate and Tversky weights and the Tversky prices.

    Args:
        initial_guided_weight: guided weight a run starts with, normalised (host weight / mean text length).
        tversky_A, tversky_B: see ``tversky_coefficients``.
        adaptation_rate: share of the way (in logarithms) to the target that one decision goes, and that the smoothed
            errors of the stop token go to the newest; in (0, 1].
        tversky_weight: of the Tversky loss beside the stop token's own once there is an alignment; 0 or more.
    """

    def __init__(
        self,
        initial_guided_weight: float = 4.5,
        tversky_A: float = 0.3,
        tversky_B: float = 0.4,
        adaptation_rate: float = 0.1,
        tversky_weight: float = 0.5,
    ) -> None:
        if not 0.0 < adaptation_rate <= 1.0:
            raise ValueError(f"adaptation_rate={adaptation_rate}; write a number above 0 and at most 1, such as 0.1")
        if not initial_guided_weight > 0.0:
            raise ValueError(f"initial_guided_weight={initial_guided_weight}; write a positive number, such as 4.5")
        if not (tversky_A > 0.0 and tversky_B >= 0.0):
            raise ValueError(f"tversky_A={tversky_A}, tversky_B={tversky_B}; write A > 0 and B >= 0, such as 0.3, 0.4")
        if not tversky_weight >= 0.0:
            raise ValueError(f"tversky_weight={tversky_weight}; write 0 or more, such as 0.5")
        self.initial_guided_weight = initial_guided_weight
        self.tversky_A = tversky_A
        self.tversky_B = tversky_B
        self.adaptation_rate = adaptation_rate
        self.tversky_weight = tversky_weight
        self._errors: tuple[float, float] | None = None

    @property
    def stop_errors(self) -> tuple[float, float] | None:
        """Smoothed (false positive, false negative) shares (``StopTokenCounts``); None before the first."""
        return self._errors

    def observe(self, stop: StopTokenCounts) -> None:
        """Take in the stop token's errors; counts that are not finite are left out, others brought into [0, 1]."""
        new = (stop.false_positive, stop.false_negative)
        if not all(math.isfinite(v) for v in new):
            return
        new = (min(max(new[0], 0.0), 1.0), min(max(new[1], 0.0), 1.0))
        old = new if self._errors is None else self._errors
        rate = self.adaptation_rate
        self._errors = (old[0] + rate * (new[0] - old[0]), old[1] + rate * (new[1] - old[1]))

    def targets(self, phase_posterior: Sequence[float]) -> dict[str, float]:
        """Where the weights and prices should go, averaged over the phases by their probability."""
        alpha, beta = tversky_coefficients(*(self._errors or (0.0, 0.0)), self.tversky_A, self.tversky_B)
        return {
            MEL_WEIGHT: _expected(PHASE_MEL_WEIGHT, phase_posterior),
            GATE_WEIGHT: _expected(PHASE_GATE_WEIGHT, phase_posterior),
            TVERSKY_WEIGHT: max(TVERSKY_OFF, self.tversky_weight * _expected(PHASE_TVERSKY_SHARE, phase_posterior)),
            TVERSKY_ALPHA: alpha,
            TVERSKY_BETA: beta,
        }

    def state_dict(self) -> dict[str, Any]:
        """The smoothed errors."""
        return {"errors": None if self._errors is None else list(self._errors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        errors = state["errors"]
        if errors is not None:
            errors = (float(errors[0]), float(errors[1]))
            if not all(0.0 <= v <= 1.0 for v in errors):
                raise ValueError(f"errors of the stop token {errors} are not shares in [0, 1]")
        self._errors = errors


def _expected(values: Sequence[float], posterior: Sequence[float]) -> float:
    return sum(v * p for v, p in zip(values, posterior, strict=True))
