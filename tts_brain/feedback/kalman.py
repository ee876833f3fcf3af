"""An extended Kalman filter per metric: level, slope, and what our own moves did to the slope.

    state     x = [latent level, latent slope per step, effect of knob 1, …, effect of knob K]
    moves     slope += Σ effect_k · move_k                                         once, when they are made
    time      level += slope;  slope = ρ · slope + w,  w ~ N(0, drift · noise²)    per step
    seen      y = h(level) + h'(level) · v,  v ~ N(0, noise²)    h: identity, exp or logistic, declared

The observation is what is not linear, and makes the filter an extended one: values are compared in the metric's own
units, so that a loss of 0 or an attention of exactly 0 or 1 is an ordinary value and not an infinite logarithm. The
effect of a move adds to the slope. One that multiplies it could neither turn its sign (a rate too high) nor be learned
on a plateau. The slope fades over ``SLOPE_MEMORY`` steps, so that a gap is not extrapolated for ever, and plateaus,
which is what trainings end in, are met sooner.

Nothing is tuned per run:

- ``noise`` is Huber's proposal 2 (Huber 1964) as a stochastic approximation on its logarithm: bounded per value.
- ``drift`` rises while innovations keep to one side and falls while they alternate: those of a filter that is right
  are white (Mehra 1970), and their smoothed past is a tracking signal (Trigg and Leach 1967).
- A value far out counts as under Student's t, so one spike moves little. Innovations that stay on one side add up in
  a cumulative sum (Page 1954); past its limit the covariance opens and the newest value is believed.

Two ways that lost on made-up runs: a fixed drift (worse on plateaus), and one large innovation as the sign of a break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from tts_brain.types import FilterReport

SLOPE_MEMORY = 250.0
SURPRISE_LIMIT = 1e6
SHIFT_LIMIT = 7.0
# About what float32 can hold; more counts as not finite (as in context.analyzer).
_LARGEST = 1e38
_LARGEST_MOVE = 20.0
_RHO = 1.0 - 1.0 / SLOPE_MEMORY

_CLIP = 3.0
# Mean of min(Z², _CLIP²) for a standard normal Z: what makes the learned noise right under normal noise.
_CLIPPED_MEAN = 0.99501
_DEGREES = 5.0
_NOISE_RATE = 1.0 / 64.0
_DRIFT_RATE = 0.15
# Toward quiet, as a drift too small shows and one too large hardly does. Stronger, or with a lower floor, plateaus come
# out a tenth better and the standard deviation of the slope too small.
_DRIFT_PULL = 0.03
_DRIFT_LOW, _DRIFT_START, _DRIFT_MOVING, _DRIFT_HIGH = (math.log(v) for v in (1e-7, 1e-5, 1e-4, 1e-1))
_TRACKING = 0.85
_TRACKING_STD = math.sqrt((1.0 - _TRACKING) / (1.0 + _TRACKING))
_SHIFT_SLACK = 0.5
_SLOW_SHIFT = 6
_MOVES_DOING = 60
_WARM_UP = 6
_WILD, _WILD_RUN = 5.0, 6
# Prior of a slope, and of what a move by a factor of e does to it, in noise widths per step. A quarter of it hid what
# bold moves did for a whole trial of 20 steps.
_SLOPE_PRIOR = 0.2
_EFFECT_DRIFT = 0.1
_BOLD = 0.4


@dataclass(frozen=True, slots=True)
class Link:
    """How a metric shows its latent level.

    Args:
        read: latent level to (metric, its first derivative, its second).
        latent: metric to latent level; None where the metric cannot be that value.
        bound: largest absolute latent level.
        finest: smallest noise that is believed, in latent units.
    """

    read: Callable[[float], tuple[float, float, float]]
    latent: Callable[[float], float | None]
    bound: float
    finest: float


def _read_log(level: float) -> tuple[float, float, float]:
    value = math.exp(level)
    return value, value, value


def _read_logit(level: float) -> tuple[float, float, float]:
    p = 1.0 / (1.0 + math.exp(-level))
    slope = p * (1.0 - p)
    return p, slope, slope * (1.0 - 2.0 * p)


def _latent_log(value: float) -> float | None:
    return math.log(max(value, 1e-30)) if value >= 0.0 else None


def _latent_logit(value: float) -> float | None:
    if not 0.0 <= value <= 1.0:
        return None
    p = min(max(value, 0.005), 0.995)
    return math.log(p / (1.0 - p))


LINKS: Mapping[str, Link] = MappingProxyType(
    {
        "identity": Link(lambda level: (level, 1.0, 0.0), lambda value: value, 1e40, 1e-100),
        "log": Link(_read_log, _latent_log, 100.0, 1e-9),
        # An attention of 0.003 and one of 0.0003 are the same to us; at 8 the derivative is still 3e-4.
        "logit": Link(_read_logit, _latent_logit, 8.0, 1e-9),
    }
)


@dataclass(slots=True)
class _Side:
    """Cumulative sum of clipped innovations on one side, and what it rests on.

    Args:
        total: the sum, less the slack per value; 0 to SHIFT_LIMIT.
        length: values since it was last 0.
        offset: sum of the clipped innovations since then, in latent units.
        last, last_offset: newest clipped innovation, and newest innovation in latent units as it was.
    """

    total: float = 0.0
    length: int = 0
    offset: float = 0.0
    last: float = 0.0
    last_offset: float = 0.0

    def follow(self, z: float, std: float, offset: float) -> _Change | None:
        """Take in one innovation (clipped ``z``, of standard deviation ``std``); the change if the limit is reached."""
        before, nearer = self.last, min(abs(offset), abs(self.last_offset))
        self.total = min(max(0.0, self.total + z - _SHIFT_SLACK), SHIFT_LIMIT)
        if self.total == 0.0:
            self.length, self.offset, self.last, self.last_offset = 0, 0.0, 0.0, 0.0
            return None
        self.length, self.offset, self.last, self.last_offset = self.length + 1, self.offset + z * std, z, offset
        # A value far out after one that was not may be a spike on top of an excursion: the next one decides.
        if self.total < SHIFT_LIMIT or (z == _CLIP and before < _CLIP):
            return None
        return _Change(self.length, self.offset / self.length, nearer)


@dataclass(frozen=True, slots=True)
class _Change:
    """A lasting change: its ``length`` in values, their mean clipped innovation, and the smaller of the last two."""

    length: int
    mean: float
    nearer: float


@dataclass(slots=True)
class _Memory:
    """All that a filter remembers besides the state vector and its covariance. Noise is a variance, in latent units."""

    last_moves: list[float]
    first: list[float] = field(default_factory=list)
    step: int = 0
    count: int = 0
    noise: float = 0.0
    log_drift: float = _DRIFT_START
    tracking: float = 0.0
    wild: int = 0
    moved_at: int = 0
    rising: _Side = field(default_factory=_Side)
    falling: _Side = field(default_factory=_Side)

    def follow(self, z: float, std: float, offset: float) -> _Change | None:
        """The lasting change that this innovation completes, else None."""
        z = min(max(z, -_CLIP), _CLIP)
        up, down = self.rising.follow(z, std, offset), self.falling.follow(-z, std, -offset)
        change = up or down
        if change is not None:
            self.rising, self.falling = _Side(), _Side()
        return change


def advance(state: Sequence[Any], gap: int, moves: Sequence[float]) -> list[Any]:
    """State after ``moves`` (log ratios, one per effect) and then ``gap`` steps without noise; any number type."""
    fade = _RHO**gap
    slope = state[1]
    for effect, move in zip(state[2:], moves, strict=True):
        slope = slope + effect * move
    return [state[0] + slope * ((1.0 - fade) * SLOPE_MEMORY), slope * fade, *state[2:]]


def transition(gap: int, moves: Sequence[float]) -> np.ndarray:
    """Jacobian of ``advance``, shape (2 + K, 2 + K); the same at every state."""
    fade = _RHO**gap
    jacobian = np.eye(2 + len(moves))
    jacobian[0, 1], jacobian[1, 1] = (1.0 - fade) * SLOPE_MEMORY, fade
    jacobian[:2, 2:] = np.outer(jacobian[:2, 1], moves)
    return jacobian


def process_noise(gap: int, size: int) -> np.ndarray:
    """Covariance that ``gap`` steps of unit noise on the slope add up to, shape (size, size): geometric sums."""
    once, twice = (1.0 - _RHO**gap) * SLOPE_MEMORY, (1.0 - _RHO ** (2 * gap)) / (1.0 - _RHO**2)
    total = np.zeros((size, size))
    total[0, 0] = SLOPE_MEMORY**2 * (gap - 2.0 * once + twice)
    total[0, 1] = total[1, 0] = SLOPE_MEMORY * (once - twice)
    total[1, 1] = twice
    return total


def correct(state: np.ndarray, spread: np.ndarray, offset: float, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """Posterior of ``state`` (n,) and ``spread`` (n, n) when the level was seen ``offset`` above the prediction.

    ``offset`` is the innovation over h', ``variance`` that of the observation over h'²: the scalar extended Kalman
    update (Jazwinski 1970, theorem 8.1) divided through by h'. The level's own row is computed as a product, which
    stays positive where the difference would round to nothing.
    """
    column = spread[:, 0].copy()
    total = float(column[0]) + variance
    after = spread - column[:, None] * (column / total)
    after[0] = after[:, 0] = column * (variance / total)
    # Rounding may take what is left of a variance below 0.
    np.fill_diagonal(after, np.maximum(after.diagonal(), 0.0))
    return state + column * (offset / total), after


def _sound(spread: np.ndarray) -> np.ndarray:
    """``spread``, without its correlations if rounding has left some that no covariance has.

    It takes values that differ by thirty orders of magnitude; a gain from such a matrix would be anything.
    """
    variances, level = spread.diagonal(), spread[0]
    if level[0] >= 0.0 and (level * level <= level[0] * variances * (1.0 + 1e-6)).all():
        return spread
    return np.diag(np.maximum(variances, 0.0))


class MetricFilter:
    """Filters one metric. State is a few numbers, whatever the length of the run.

    Args:
        link: how the metric shows its level: ``log`` (positive, falls by shares), ``logit`` (in [0, 1]), ``identity``
            (any sign).
        knobs: names of the knobs whose effect is learned.
        better: ``lower`` or ``higher``.

    Raises:
        ValueError: on another word, or a knob named twice.
    """

    def __init__(self, link: str = "identity", knobs: Sequence[str] = (), better: str = "lower") -> None:
        if link not in LINKS:
            raise ValueError(f"link={link!r} is unknown; write one of {', '.join(LINKS)}")
        if better not in ("lower", "higher"):
            raise ValueError(f"better={better!r} is unknown; write 'lower' or 'higher'")
        if len(set(knobs)) != len(knobs):
            raise ValueError(f"knobs={tuple(knobs)} names one twice; write each once")
        self.link, self.knobs, self.better = link, tuple(knobs), better
        self._link = LINKS[link]
        size = 2 + len(self.knobs)
        self._still = (0.0,) * len(self.knobs)
        self._one_step = transition(1, self._still), process_noise(1, size)
        self._x = np.zeros(size)
        self._p = np.zeros((size, size))
        self._memory = _Memory(last_moves=list(self._still))

    @property
    def count(self) -> int:
        """Usable values so far."""
        return self._memory.count

    @property
    def noise(self) -> float:
        """Learned standard deviation of one value, in latent units; 0 before the second value."""
        return math.sqrt(self._memory.noise)

    @property
    def drift(self) -> float:
        """Learned variance of the slope's change per step, in units of the noise's."""
        return math.exp(self._memory.log_drift)

    @property
    def latent(self) -> tuple[float, float, float, float]:
        """Level and slope per step, and the standard deviation of each, in latent units; 0 before the first value."""
        level_std, slope_std = (math.sqrt(max(float(self._p[at, at]), 0.0)) for at in (0, 1))
        return float(self._x[0]), float(self._x[1]), level_std, slope_std

    @property
    def effect_prior(self) -> float:
        """Standard deviation of the effect of a knob that was never turned, as ``effect`` has it; its mean is 0."""
        return math.sqrt(max(self._effect_variance(), 0.0))

    def update(self, step: int, value: float | None, moves: Mapping[str, float] | None = None) -> FilterReport | None:
        """Take in one step, and say what is known; None before the first usable value.

        Args:
            step: optimizer step. Steps may be left out; one that is not above the last counts as no time passed.
            value: the metric. None, a value that is not finite (or above 1e38) and one that the link cannot show (below
                0 for ``log``, outside [0, 1] for ``logit``) count as not seen.
            moves: of the knobs turned since the last update (``Knob.move``).

        Raises:
            ValueError: on an unknown knob, or a move that is not finite or beyond ±20. Nothing is changed then.
        """
        turned = self._turned(moves) if moves else self._still
        latent = self._link.latent(value) if value is not None and abs(value) <= _LARGEST else None
        memory = self._memory
        gap = max(step - memory.step, 0)
        memory.step = step
        surprise, changed = 0.0, False
        if memory.count:
            self._predict(gap, turned)
        if latent is not None and value is not None:
            surprise, changed = self._see(float(value), latent)
        return self._report(surprise, changed) if memory.count else None

    def effect(self, knob: str) -> tuple[float, float]:
        """Mean and standard deviation of the change in latent slope per unit of move (``Knob.move``).

        In noise-free latent units per step: for ``log`` the relative change per step. (0, 0) for a knob never turned.
        """
        at = 2 + self._index(knob)
        return float(self._x[at]), math.sqrt(max(float(self._p[at, at]), 0.0))

    def helped(self, moves: Mapping[str, float] | None = None) -> float:
        """Probability, in [0, 1], that the slope is better with ``moves`` than it would be without.

        ``moves`` are as in ``update``; the last ones seen if left out. 0.5 is "no idea".
        """
        turned = np.asarray(self._memory.last_moves if moves is None else self._turned(moves))
        mean = float(turned @ self._x[2:])
        std = math.sqrt(max(float(turned @ self._p[2:, 2:] @ turned), 0.0))
        if std == 0.0:
            return 0.5
        better = -mean if self.better == "lower" else mean
        return 0.5 * math.erfc(-better / std / math.sqrt(2.0))

    def reset(self) -> None:
        """Forget all, effects too as their unit goes: the metric means something else now."""
        self._x = np.zeros_like(self._x)
        self._p = np.zeros_like(self._p)
        self._memory = _Memory(last_moves=list(self._still))

    # -- one step ----------------------------------------------------------------------------------------------------

    def _predict(self, gap: int, turned: Sequence[float]) -> None:
        memory = self._memory
        if any(turned):
            self._open(turned)
            memory.last_moves, memory.moved_at = list(turned), memory.count
        if gap == 1 and not any(turned):
            jacobian, added = self._one_step
        else:
            jacobian, added = transition(gap, turned), process_noise(gap, len(self._x))
        self._x = jacobian @ self._x
        self._bound_level()
        self._p = _sound(jacobian @ self._p @ jacobian.T + added * (memory.noise * self.drift))

    def _open(self, turned: Sequence[float]) -> None:
        """Widen the effects of the knobs turned: by the whole prior at first, later by a part, as effects change.

        The prior is as wide as the slope itself, and at least as noise would show it, so it has the metric's unit.
        """
        prior = self._effect_variance()
        for at, move in enumerate(turned, start=2):
            known = float(self._p[at, at])
            if move and known == 0.0:
                self._p[at, at] = prior
            elif move:
                # Small steps of a smooth law must not wash out what bold ones taught.
                share = _EFFECT_DRIFT * min(1.0, abs(move) / _BOLD)
                self._p[at, at] = max(known, min(prior, known + share * prior))

    def _effect_variance(self) -> float:
        slope, sure = float(self._x[1]), float(self._p[1, 1])
        return slope * slope + sure + _SLOPE_PRIOR**2 * self._memory.noise

    def _see(self, value: float, latent: float) -> tuple[float, bool]:
        """Correct by one value; its surprise, and whether a lasting change was found."""
        memory = self._memory
        memory.count += 1
        if memory.count <= _WARM_UP:
            self._warm_up(latent)
            if memory.count == 1:
                return 0.0, False
        level = float(self._x[0])
        expected, tangent, _ = self._link.read(level)
        vague = float(self._p[0, 0])
        # Where the prediction is vaguer than the value, the tangent is taken at the value (one turn of an iterated
        # filter, Bell and Cathey 1993): the one at the prediction overshoots by orders of magnitude.
        offset = latent - level if vague > memory.noise else (value - expected) / tangent
        predicted = vague + memory.noise
        z = offset / math.sqrt(predicted)
        weight = min(1.0, (_DEGREES + 1.0) / (_DEGREES + z * z))
        change = memory.follow(z, math.sqrt(predicted), latent - level)
        if change is not None:
            self._open_level(change)
            offset, weight = latent - level, 1.0
        self._x, self._p = correct(self._x, self._p, offset, memory.noise / weight)
        self._bound_level()
        if memory.count > _WARM_UP:
            self._learn(z, offset, memory.noise / predicted)
        return min(max(z, -SURPRISE_LIMIT), SURPRISE_LIMIT), change is not None

    def _warm_up(self, latent: float) -> None:
        """Noise and scale of the covariance from the median step between the first values: one spike may be there."""
        memory = self._memory
        memory.first.append(latent)
        if memory.count == 1:
            self._x[0] = latent
            return
        steps = sorted(abs(b - a) for a, b in zip(memory.first, memory.first[1:], strict=False))
        middle = len(steps) // 2
        # A step between two values has √2 the noise; 0.6745 is the median of a normal's absolute value.
        typical = 0.5 * (steps[middle] + steps[-middle - 1])
        noise = max((typical / (0.6745 * math.sqrt(2.0))) ** 2, self._least())
        if memory.count == 2:
            self._p[0, 0], self._p[1, 1] = noise, _SLOPE_PRIOR**2 * noise
        else:
            self._p *= noise / memory.noise
        memory.noise = noise

    def _open_level(self, change: _Change) -> None:
        """Give up the level; give up the slope too if the change came slowly, as a new slope shows.

        A change that began after a move, and soon, may be the move's or may not: both are opened alike.
        """
        memory = self._memory
        self._p[0, 0] += change.mean**2 + change.nearer * change.nearer
        if change.length < _SLOW_SHIFT:
            return
        memory.log_drift = max(memory.log_drift, _DRIFT_MOVING)
        opened = (change.mean / change.length) ** 2
        self._p[1, 1] += opened
        moves = np.asarray(memory.last_moves)
        if change.length <= memory.count - memory.moved_at <= _MOVES_DOING and moves.any():
            along = np.concatenate(([0.0, 1.0], moves / (moves @ moves)))
            self._p += opened * np.outer(along, along)

    def _learn(self, z: float, offset: float, share: float) -> None:
        """Noise and drift from one normalised innovation ``z``; ``share`` of its variance was noise."""
        memory = self._memory
        memory.wild = memory.wild + 1 if abs(z) > _WILD else 0
        if memory.wild >= _WILD_RUN:
            self._noise_broke(offset)
            return
        clipped = min(max(z, -_CLIP), _CLIP)
        rate = max(_NOISE_RATE, 1.0 / (memory.count + 2.0)) * share
        memory.noise *= math.exp(rate * (clipped * clipped / _CLIPPED_MEAN - 1.0))
        memory.noise = max(memory.noise, self._least())
        signal = min(max(clipped * memory.tracking / _TRACKING_STD, -_CLIP), _CLIP)
        wanted = memory.log_drift + _DRIFT_RATE * (signal - _DRIFT_PULL)
        memory.log_drift = min(max(wanted, _DRIFT_LOW), _DRIFT_HIGH)
        memory.tracking = _TRACKING * memory.tracking + (1.0 - _TRACKING) * clipped

    def _noise_broke(self, offset: float) -> None:
        """The noise itself is another, as when a constant series wakes up; bounded learning would take too long."""
        memory = self._memory
        memory.wild = 0
        memory.noise = max(offset * offset, memory.noise)
        self._p[0, 0] += memory.noise
        self._p[1, 1] += _SLOPE_PRIOR**2 * memory.noise

    def _bound_level(self) -> None:
        self._x[0] = min(max(float(self._x[0]), -self._link.bound), self._link.bound)

    def _least(self) -> float:
        """Smallest variance of noise that is believed: what rounding leaves of a constant series."""
        least = self._link.finest + 1e-12 * abs(float(self._x[0]))
        return least * least

    def _report(self, surprise: float, changed: bool) -> FilterReport:
        memory = self._memory
        level, slope = float(self._x[0]), float(self._x[1])
        shown, tangent, curve = self._link.read(level)
        sure, cross, steep = float(self._p[0, 0]), float(self._p[0, 1]), float(self._p[1, 1])
        # Slope in the metric's units is h'(level) · slope: both are uncertain.
        lean = curve * slope
        variance = lean * lean * sure + 2.0 * lean * tangent * cross + tangent * tangent * steep
        return FilterReport(
            step=memory.step,
            level=shown,
            level_std=tangent * math.sqrt(max(sure, 0.0)),
            slope=tangent * slope,
            slope_std=math.sqrt(max(variance, 0.0)),
            noise=tangent * math.sqrt(memory.noise),
            surprise=surprise,
            shift=memory.rising.total if memory.rising.total >= memory.falling.total else -memory.falling.total,
            changed=changed,
            count=memory.count,
        )

    # -- moves -------------------------------------------------------------------------------------------------------

    def _turned(self, moves: Mapping[str, float]) -> list[float]:
        turned = list(self._still)
        for name, move in moves.items():
            if not abs(move) <= _LARGEST_MOVE:
                raise ValueError(f"move of {name!r} is {move}; write a Knob.move, within ±{_LARGEST_MOVE:g}")
            turned[self._index(name)] = float(move)
        return turned

    def _index(self, knob: str) -> int:
        if knob not in self.knobs:
            raise ValueError(f"no knob {knob!r} here; known are {', '.join(self.knobs) or 'none'}")
        return self.knobs.index(knob)

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings; no NaN."""
        return {
            "link": self.link,
            "knobs": list(self.knobs),
            "better": self.better,
            "x": self._x.tolist(),
            "p": self._p.tolist(),
            "memory": asdict(self._memory),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, all or nothing.

        Raises:
            ValueError: the state is of another filter, lacks something, or is not that of any filter.
        """
        try:
            for name, mine in (("link", self.link), ("knobs", list(self.knobs)), ("better", self.better)):
                if state[name] != mine:
                    raise ValueError(f"state of the filter has {name}={state[name]!r}; this one has {mine!r}")
            x = np.array(state["x"], dtype=np.float64)
            p = np.array(state["p"], dtype=np.float64)
            memory = _memory_from(state["memory"])
        except KeyError as error:
            raise ValueError(f"state of the filter lacks {error}") from error
        except TypeError as error:
            raise ValueError(f"state of the filter is damaged: {error}") from error
        size = len(self._x)
        if x.shape != (size,) or p.shape != (size, size) or len(memory.last_moves) != size - 2:
            raise ValueError(f"state of the filter has shapes x {x.shape}, p {p.shape}; {size} numbers are needed")
        if not (np.isfinite(x).all() and np.isfinite(p).all() and (p.diagonal() >= 0.0).all()):
            raise ValueError("state of the filter has x or p that is not finite, or a negative variance")
        self._x, self._p, self._memory = x, p, memory


def _memory_from(state: Mapping[str, Any]) -> _Memory:
    """The memory in ``state``; KeyError, TypeError or ValueError if it is none."""
    sides = {name: _Side(**{f.name: state[name][f.name] for f in fields(_Side)}) for name in ("rising", "falling")}
    memory = _Memory(
        last_moves=[float(v) for v in state["last_moves"]],
        first=[float(v) for v in state["first"]],
        step=int(state["step"]),
        count=int(state["count"]),
        noise=float(state["noise"]),
        log_drift=float(state["log_drift"]),
        tracking=float(state["tracking"]),
        wild=int(state["wild"]),
        moved_at=int(state["moved_at"]),
        **sides,
    )
    _check(memory)
    return memory


def _check(memory: _Memory) -> None:
    numbers = {
        "noise": [memory.noise],
        "log_drift": [memory.log_drift],
        "tracking": [memory.tracking],
        "last_moves": memory.last_moves,
        "first": memory.first,
        "rising": list(asdict(memory.rising).values()),
        "falling": list(asdict(memory.falling).values()),
    }
    for name, values in numbers.items():
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"state of the filter has {name}={values}; write finite numbers")
    if memory.count < 0 or memory.noise < 0.0 or (memory.count > 1 and memory.noise == 0.0):
        raise ValueError(f"state of the filter has count={memory.count}, noise={memory.noise}; neither may be negative")
    if not _DRIFT_LOW <= memory.log_drift <= _DRIFT_HIGH or abs(memory.tracking) > _CLIP:
        raise ValueError(f"state of the filter has log_drift={memory.log_drift}, tracking={memory.tracking}; too large")
    if len(memory.first) != min(memory.count, _WARM_UP):
        raise ValueError(f"state of the filter has {len(memory.first)} first values of {memory.count}")
