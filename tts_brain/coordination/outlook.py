"""What the filters of a run know, as the simulation takes it: in noise widths, from the present level on."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tts_brain.coordination.dynamics import Course, Dynamics
from tts_brain.feedback.filters import ATTENTION, LOSS, STEERED, RunFilters
from tts_brain.feedback.kalman import MetricFilter

# Fewer values, and the filter is still warming up.
_FEWEST = 8


def dynamics(filters: RunFilters, best_attention_diag: float, divergence_sigmas: float) -> Dynamics | None:
    """How the run is going; None while too little is known of the loss, or what is known is no number.

    The loss counts as diverged ``divergence_sigmas`` noise widths above its present level: the zero and the unit of a
    loss change no outlook. Of attention the level itself matters; it stays a logit.
    """
    loss = filters.metric(LOSS)
    if loss.count < _FEWEST or not loss.noise > 0.0:
        return None
    course = _course(loss, loss.noise, 0.0)
    if course is None:
        return None
    attention = filters.metric(ATTENTION)
    seen = _course(attention, 1.0, attention.latent[0]) if attention.count >= _FEWEST else None
    return Dynamics(course, divergence_sigmas, seen, min(max(best_attention_diag, 0.0), 1.0))


def tracked(moves: Mapping[str, float]) -> dict[str, float]:
    """The moves whose effect the filters learn; of others there is nothing to simulate."""
    return {knob: move for knob, move in moves.items() if knob in STEERED}


def _course(of: MetricFilter, unit: float, level: float) -> Course | None:
    _, slope, level_std, slope_std = of.latent
    effects = {knob: tuple(value / unit for value in of.effect(knob)) for knob in STEERED}
    numbers = [level, slope / unit, level_std / unit, slope_std / unit, of.effect_prior / unit]
    if not all(math.isfinite(v) for v in [*numbers, *(v for pair in effects.values() for v in pair)]):
        return None
    return Course(
        level=level,
        slope=slope / unit,
        level_std=level_std / unit,
        slope_std=slope_std / unit,
        noise=of.noise / unit,
        drift=of.drift,
        effects={knob: (mean, std) for knob, (mean, std) in effects.items()},
        prior_std=of.effect_prior / unit,
    )
