"""What may come of a joint move: the run is played forward many times, with all that the metric filters do not know.

    at once    slope += Σ effect_k · move_k        effect_k ~ N(mean, std²), drawn once per play
    per step   level += slope;  slope = ρ · slope + w          w ~ N(0, drift · noise²)

That is the model of ``feedback.kalman``, by its own ``advance`` and ``process_noise``: exact between two looks, however
far apart. Level and slope start from their own uncertainty. Each play is made twice with the same numbers, with the
move and without (common random numbers), so that the gain holds no luck but that of the effects.

Left out, and why:

- Interaction of two knobs, and curvature: no filter estimates them. The spread of an effect grows with the move, so a
  large or untried one is uncertain as it is.
- Correlations of level, slope and effects, which the filter knows: small beside the spread of the effects.
- What happens between two looks: a run that crosses a limit and comes back unseen is not counted. Twenty looks miss
  about one crossing in sixty of those that a look at every step sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from tts_brain.feedback.kalman import advance, process_noise
from tts_brain.types import KNOBS

Vector = NDArray[np.float64]

GAIN_LIMIT = 1e6
TAIL = 0.05
_LOOKS = 20
_LARGEST_MOVE = 20.0
# Beyond this nothing is known anyway; products of two such numbers still fit into a double.
_BOUND = 1e100
_ALIGNED = 0.5
_FEWEST_DRAWS = 20
_NO_EFFECTS: Mapping[str, tuple[float, float]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Course:
    """How one metric is going, in the latent units of its filter (for ``attention_diag`` the logit).

    Args:
        level, slope: now, and per step.
        level_std, slope_std: their standard deviations.
        noise: standard deviation of one value about the level; the unit of the gain.
        drift: variance of the slope's change per step, in units of that of the noise (``MetricFilter.drift``).
        effects: by knob, mean and standard deviation of what a move by a factor of e does to the slope
            (``MetricFilter.effect``).
        prior_std: the same standard deviation for a knob that was never tried: one that ``effects`` lacks, or has as
            (0, 0). Its mean is 0.

    Raises:
        ValueError: on a number that is not finite, one below 0 that may not be, or an unknown knob.
    """

    level: float
    slope: float = 0.0
    level_std: float = 0.0
    slope_std: float = 0.0
    noise: float = 0.0
    drift: float = 0.0
    effects: Mapping[str, tuple[float, float]] = field(default_factory=lambda: _NO_EFFECTS)
    prior_std: float = 0.0

    def __post_init__(self) -> None:
        for name in ("level", "slope", "level_std", "slope_std", "noise", "drift", "prior_std"):
            value = getattr(self, name)
            if not math.isfinite(value) or (value < 0.0 and name not in ("level", "slope")):
                raise ValueError(f"{name}={value}; write a finite number, 0 or more for all but level and slope")
        for knob, (mean, std) in self.effects.items():
            if knob not in KNOBS or not (math.isfinite(mean) and 0.0 <= std < math.inf):
                raise ValueError(f"effect of {knob!r} is {(mean, std)}; write a known knob, a mean and a std >= 0")

    def effect(self, knob: str) -> tuple[float, float]:
        """Mean and standard deviation; the prior where nothing is known."""
        known = self.effects.get(knob, (0.0, 0.0))
        return known if known != (0.0, 0.0) else (0.0, self.prior_std)


@dataclass(frozen=True, slots=True)
class Dynamics:
    """All that the simulation starts from.

    Args:
        loss: the loss that moves are judged by; lower is better.
        divergence_limit: level of that loss, in the same units, above which the run counts as diverged.
        attention: of ``attention_diag``, as a logit; None when it is not measured.
        best_attention_diag: best so far, in [0, 1]. From 0.5 on there is an alignment to lose, and half of it is lost.

    Raises:
        ValueError: on a limit that is not a number, or a best that is not in [0, 1].
    """

    loss: Course
    divergence_limit: float
    attention: Course | None = None
    best_attention_diag: float = 0.0

    def __post_init__(self) -> None:
        if math.isnan(self.divergence_limit):
            raise ValueError("divergence_limit=nan; write the level of the loss above which the run has diverged")
        if not 0.0 <= self.best_attention_diag <= 1.0:
            raise ValueError(f"best_attention_diag={self.best_attention_diag} is out of range; write 0 to 1")


@dataclass(frozen=True, slots=True)
class Outlook:
    """What came of the plays. Every field is finite.

    Args:
        divergence: share of the plays in which the loss was above its limit at one of the looks; in [0, 1].
        alignment_loss: the same of ``attention_diag`` under half its best; 0 where there is no alignment to lose.
        gain: mean fall of the loss by the end of the horizon against holding, in noise widths; within ±1e6.
        cvar: conditional value at risk: the mean gain of the worst twentieth of the plays (Rockafellar and Uryasev
            2000); at most ``gain``.
        divergence_held, alignment_loss_held: the two shares if nothing is moved, from the same draws: what a move adds
            is the difference.
        draws: how many plays.
        alignment: whether there is an alignment to lose; without one nothing is said of the chance of it.
    """

    divergence: float
    alignment_loss: float
    gain: float
    cvar: float
    divergence_held: float
    alignment_loss_held: float
    draws: int
    alignment: bool = True


def simulate(
    dynamics: Dynamics,
    moves: Mapping[str, float],
    *,
    horizon: int = 100,
    draws: int = 256,
    seed: int = 0,
    step: int = 0,
) -> Outlook:
    """Play a joint move forward.

    Args:
        dynamics: how the run is going.
        moves: by knob (``Knob.move``).
        horizon: steps to play, 1 or more.
        draws: plays, 20 or more.
        seed, step: of the run and of the decision, 0 or more. They alone choose the random numbers, so that the same
            decision is taken in another process, and joint moves of one decision are compared on the same draws.

    Raises:
        ValueError: on an unknown knob, a move that is not finite or beyond ±20, or a count out of range.
    """
    _check(moves, {"horizon": (horizon, 1), "draws": (draws, _FEWEST_DRAWS), "seed": (seed, 0), "step": (step, 0)})
    looks = np.unique(np.linspace(0, horizon, min(horizon, _LOOKS) + 1).round().astype(int))
    gaps = np.diff(looks).tolist()
    # Numbers for every knob, whether it moves or not: that of one knob must not depend on which others move.
    normal = np.random.default_rng([seed, step]).standard_normal((2, 2 + len(KNOBS) + 2 * len(gaps), draws))
    loss = _play(dynamics.loss, moves, gaps, normal[0])
    diverged = (loss > dynamics.divergence_limit).any(axis=0).mean(axis=1)
    lost = np.zeros(2)
    course = dynamics.attention if dynamics.best_attention_diag >= _ALIGNED else None
    if course is not None:
        half = dynamics.best_attention_diag / 2.0
        attention = _play(course, moves, gaps, normal[1])
        lost = (attention < math.log(half / (1.0 - half))).any(axis=0).mean(axis=1)
    gain = _in_noise_widths(loss[-1, 0] - loss[-1, 1], dynamics.loss.noise)
    worst = np.sort(gain)[: math.ceil(TAIL * draws)]
    return Outlook(
        divergence=float(diverged[1]),
        alignment_loss=float(lost[1]),
        gain=float(gain.mean()),
        cvar=float(min(worst.mean(), gain.mean())),
        divergence_held=float(diverged[0]),
        alignment_loss_held=float(lost[0]),
        draws=draws,
        alignment=course is not None,
    )


def _play(course: Course, moves: Mapping[str, float], gaps: list[int], normal: Vector) -> Vector:
    """Levels at each look, without the move and with it: (looks, 2, draws)."""
    level = _bounded(course.level) + _bounded(course.level_std) * normal[0]
    slope = _bounded(course.slope) + _bounded(course.slope_std) * normal[1]
    pull = np.zeros_like(slope)
    for number, knob in zip(normal[2 : 2 + len(KNOBS)], KNOBS, strict=True):
        if moves.get(knob, 0.0):
            mean, std = course.effect(knob)
            pull += moves[knob] * (_bounded(mean) + _bounded(std) * number)
    state = [np.stack([level, level]), np.stack([slope, slope + pull])]
    width = _bounded(course.noise) * math.sqrt(_bounded(course.drift))
    seen = []
    for gap, (first, second) in zip(gaps, normal[2 + len(KNOBS) :].reshape(len(gaps), 2, -1), strict=True):
        on_both, on_slope, on_level = _spread(gap)
        state = advance(state, gap, ())
        state = [state[0] + width * (on_both * first + on_level * second), state[1] + width * on_slope * first]
        seen.append(state[0])
    return np.array(seen)


def _spread(gap: int) -> tuple[float, float, float]:
    """Factors of two normal numbers that give level and slope the covariance of ``process_noise``: its Cholesky root.

    Slope first, as over a single step the level has no variance yet.
    """
    covariance = process_noise(gap, 2)
    on_slope = math.sqrt(float(covariance[1, 1]))
    on_both = float(covariance[0, 1]) / on_slope
    return on_both, on_slope, math.sqrt(max(float(covariance[0, 0]) - on_both**2, 0.0))


def _in_noise_widths(fall: Vector, noise: float) -> Vector:
    """``fall`` over ``noise``, within ``GAIN_LIMIT``; where there is no noise, any fall at all is the limit."""
    if noise == 0.0:
        return np.sign(fall) * GAIN_LIMIT
    with np.errstate(over="ignore"):
        return np.clip(fall / noise, -GAIN_LIMIT, GAIN_LIMIT)


def _check(moves: Mapping[str, float], counts: Mapping[str, tuple[int, int]]) -> None:
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name}={value} is too small; write {least} or more")
    for knob, move in moves.items():
        if knob not in KNOBS:
            raise ValueError(f"there is no knob {knob!r} to move; known are {', '.join(KNOBS)}")
        if not abs(move) <= _LARGEST_MOVE:
            raise ValueError(f"move of {knob!r} is {move}; write a Knob.move, within ±{_LARGEST_MOVE:g}")


def _bounded(value: float) -> float:
    return min(max(value, -_BOUND), _BOUND)
