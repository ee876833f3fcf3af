"""One series at several scales: slow trend, energy per octave, noise, and whether it oscillates. All of it causal.

    values ─▶ spikes clipped ─▶ undecimated db2 ─▶ level, slope, noise, energy per octave
                             └▶ one-sided Morlet atoms ─▶ strongest period against plain noise ─▶ oscillation

Two families of wavelets, as one cannot do both. Octave bands are right for energy per scale, but too wide to find an
oscillation soon. Fifty steps after a start at one noise deviation (period 2.3), the atoms found 35 %; undecimated db2
packets, an eighth of the band each, 11 %. Nothing is padded: only coefficients whose whole support was seen count, so
there is no edge to jump at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pywt
from scipy.special import erfc

from tts_brain.context.trends import noise_level
from tts_brain.types import Scales

HISTORY = 100
FEWEST = 30
SURPRISE_LIMIT = 6.0
ENERGY_LIMIT = 1e6

_WAVELET = "db2"
_OCTAVES = 4
_FEWEST_COEFFICIENTS = 8
# Spread (of values near their median) below which the rest is rounding, and sums of squares are still exact.
_FLAT = 1e-12
_LARGEST = 1e150
# Share of the series' mean square (so 0.1 % of its spread) under which a ripple is the misfit of a smooth curve.
_FLOOR = 1e-6
_SPIKE_WINDOW = 12
_SPIKE_DEVIATIONS = 4.0
_SPIKE_FEWEST = 5
_QUARTILE = 1.15  # standard deviations that three values in four of a normal distribution lie within
_WIDTHS = (16, 32, 64)
_ENVELOPE = 1.6
_CYCLES = 2.2
_SLOWEST = 48.0
# Directions of decays taken out beside all parabolas, by width of the atom: up to 31, 63, 95 and 100 values.
_DECAYS = (1, 2, 3, 4)
_PHI = (0.0, 0.17, 0.34, 0.5)
# Raw statistic exceeded with probability 0.1, 0.01 and 0.001, by count of values: the worst of the noise families of
# `bench.component_trends.NULLS`; `python -m bench.component_trends --calibrate` (in benchmarks/) prints the table.
_TAIL: dict[int, tuple[float, float, float]] = {
    30: (4.63, 7.87, 11.48),
    40: (5.14, 8.42, 12.13),
    50: (5.41, 8.54, 11.94),
    60: (5.61, 8.57, 11.85),
    70: (5.77, 8.64, 11.84),
    80: (6.01, 8.87, 11.76),
    90: (6.16, 8.9, 11.77),
    100: (6.28, 9.09, 11.98),
}


def scales(steps: Sequence[float], values: Sequence[float]) -> Scales:
    """The newest ``HISTORY`` finite values of ``values``, seen at ``steps`` (same length, rising), at several scales.

    Stateless over the recorded history. Values that are not finite, or beyond 1e150, are left out, which cuts phases:
    an oscillation is seen through a few gaps, not through many. Below ``FEWEST`` values nothing is said of oscillation.

    Raises:
        ValueError: the lengths differ.
    """
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{x.size} steps for {y.size} values; give one step for each value")
    keep = (np.abs(y) <= _LARGEST) & (np.abs(x) <= _LARGEST)  # False for NaN
    x, y = x[keep][-HISTORY:], y[keep][-HISTORY:]
    if not len(y):
        return Scales(0, 0.0, 0.0, 0.0, 0.0, (), 0.0, 0.0)
    middle, unit = _centre_and_spread(y)
    clean = np.zeros_like(y) if unit == 0.0 else clip_spikes((y - middle) / unit)
    level, slope, lag = _slow(x, clean)
    noise, energy = _noise_and_energy(clean)
    surprise, period = oscillation(clean[None]) if len(y) >= FEWEST else (np.zeros(1), np.zeros(1))
    gap = float(np.median(np.diff(x))) if len(x) > 1 else 1.0
    return Scales(
        count=len(y),
        level=middle + unit * level,
        slope=unit * slope,
        lag=lag,
        noise=unit * noise,
        energy=energy,
        period=float(period[0]) * gap,
        oscillation=float(surprise[0]),
    )


def clip_spikes(values: np.ndarray) -> np.ndarray:
    """Each value of (..., count) brought within four deviations of the median of the twelve up to and with itself.

    Hampel's filter, but it clips where that replaces, so a growing oscillation keeps its swing. The deviation is the
    upper quartile of the distances over 1.15, not their median, which is 0 for a noiseless alternation.
    """
    count, width = values.shape[-1], _SPIKE_WINDOW
    padding = np.full((*values.shape[:-1], width - 1), np.inf)  # sorts behind every value: never looked at
    window = np.lib.stride_tricks.sliding_window_view(np.concatenate([padding, values], -1), width, axis=-1)
    seen = np.minimum(np.arange(count) + 1, width)
    ordered = np.sort(window, -1)
    middle = (_pick(ordered, (seen - 1) // 2) + _pick(ordered, seen // 2)) / 2
    distance = np.sort(np.abs(window - middle[..., None]), -1)
    reach = _SPIKE_DEVIATIONS / _QUARTILE * _pick(distance, np.minimum(seen * 3 // 4, seen - 1))
    clipped = np.clip(values, middle - reach, middle + reach)
    clipped[..., : _SPIKE_FEWEST - 1] = values[..., : _SPIKE_FEWEST - 1]
    return np.asarray(clipped)


def details(values: np.ndarray) -> list[np.ndarray]:
    """Undecimated db2 details of ``values`` (count,), finest octave first; white noise keeps its deviation in each.

    À trous (Holschneider et al. 1989), each coefficient from its own and earlier values only. Octave j = 1, 2, … has
    ``count - 3 * (2**j - 1)`` coefficients, the last at the newest value; octaves with fewer than eight are left out.
    """
    return [np.convolve(values, h, "valid") for h in _octaves() if len(values) - len(h) + 1 >= _FEWEST_COEFFICIENTS]


def oscillation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(-log10 chance, period in values), each (rows,), for ``values`` (rows, count) without spikes, all under 1e150.

    Raises:
        ValueError: fewer than ``FEWEST`` values.
    """
    statistic, period = raw_statistic(values)
    return _surprise(statistic, _used(values.shape[-1])), period


def raw_statistic(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As ``oscillation``, before the calibration that this one is calibrated by: it is larger the rarer.

    -ln of the chance of the strongest atom under noise whose level the median atom gives; the noise is AR(1) with the
    coefficient in [0, 0.5] that explains the strongest atom best, and a jump is taken out where that leaves less. The
    count is rounded down to tens, so that few banks and one table serve all.
    """
    count = _used(values.shape[-1])
    newest = values[:, -count:]
    centred = newest - np.median(newest, -1, keepdims=True)
    statistic, period = _strongest(np.stack([centred, _without_jump(centred)]), _bank(count))
    row, calmer = np.arange(len(values)), statistic.argmin(0)
    return statistic[calmer, row], period[calmer, row]


def _used(count: int) -> int:
    if count < FEWEST:
        raise ValueError(f"{count} values are too few to judge; give at least {FEWEST}")
    return min(count, HISTORY) // 10 * 10


def _centre_and_spread(y: np.ndarray) -> tuple[float, float]:
    """Median and largest distance from it; a distance that is rounding only counts as 0."""
    middle = float(np.median(y))
    spread = float(np.max(np.abs(y - middle)))
    return middle, spread if spread > _FLAT * float(np.max(np.abs(y))) else 0.0


def _pick(ordered: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.asarray(ordered[..., np.arange(len(at)), at])


@lru_cache(maxsize=1)
def _filters() -> tuple[np.ndarray, np.ndarray]:
    """db2's low and high pass, scaled so that their squares sum to 1/2: the undecimated transform keeps energy.

    The reconstruction's order of taps, not the decomposition's: the same bands, a lag of 10 steps rather than 35.
    """
    wavelet = pywt.Wavelet(_WAVELET)
    return np.asarray(wavelet.rec_lo) / np.sqrt(2.0), np.asarray(wavelet.rec_hi) / np.sqrt(2.0)


def _spread_out(taps: np.ndarray, octave: int) -> np.ndarray:
    """The holes of "à trous": 2**octave - 1 zeros between taps."""
    out = np.zeros((len(taps) - 1) * 2**octave + 1)
    out[:: 2**octave] = taps
    return out


def _lowpass(octave: int) -> np.ndarray:
    """Smoothing filter after ``octave`` octaves; its taps sum to 1."""
    taps = np.ones(1)
    for below in range(octave):
        taps = np.convolve(taps, _spread_out(_filters()[0], below))
    return taps


@lru_cache(maxsize=1)
def _octaves() -> tuple[np.ndarray, ...]:
    """Filters of the details, finest first, each of unit energy."""
    high = _filters()[1]
    found = [np.convolve(_lowpass(octave), _spread_out(high, octave)) for octave in range(_OCTAVES)]
    return tuple(taps / np.linalg.norm(taps) for taps in found)


@lru_cache(maxsize=1)
def _quarters() -> tuple[np.ndarray, ...]:
    """The finest octave split into four narrower bands (wavelet packets), each of unit energy."""
    bands = [_filters()[1]]
    for octave in (1, 2):
        bands = [np.convolve(band, _spread_out(taps, octave)) for band in bands for taps in _filters()]
    return tuple(taps / np.linalg.norm(taps) for taps in bands)


def _slow(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Level, slope and lag. The steps go through the same filter as the values, so uneven steps are no special case."""
    octave = max(j for j in range(_OCTAVES + 1) if j == 0 or len(y) >= 3 * (2**j - 1) + 1 + 2**j)
    taps = _lowpass(octave)
    values, steps = np.convolve(y, taps, "valid"), np.convolve(x - x[-1], taps, "valid")
    before = -1 - 2**octave
    if len(values) < -before or not steps[-1] > steps[before]:
        return float(values[-1]), 0.0, max(0.0, float(-steps[-1]))
    slope = (values[-1] - values[before]) / (steps[-1] - steps[before])
    return float(values[-1]), float(slope), max(0.0, float(-steps[-1]))


def _noise_and_energy(y: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """Noise from the finest octave, and the energy of each octave over that of such noise.

    The finest octave holds a period-2 oscillation too. So its median absolute deviation (over 0.6745, Donoho &
    Johnstone 1994) is taken in four narrower bands, of which an oscillation fills two at most, and their median counts.
    """
    if len(y) < FEWEST:
        noise = noise_level(y)
    else:
        bands = np.array([np.convolve(y, taps, "valid") for taps in _quarters()])
        noise = float(np.median(np.median(np.abs(bands), 1))) / 0.6745
    squares = [float(np.mean(detail**2)) for detail in details(y)]
    floor = max(noise**2, _FLAT**2)
    return noise, tuple(min(square / floor, ENERGY_LIMIT) for square in squares)


@dataclass(frozen=True, slots=True)
class _Bank:
    """Atoms for one count of values, ordered by width; the widest give the reference.

    Args:
        atoms: (2 * atoms, count), an orthonormal pair for each; the second is 0 at period 2, which has no phase.
        single: (atoms,), true where the second is 0.
        power: (phi, atoms), mean square of a coefficient under AR(1) noise with unit innovations.
        period: (atoms,), in values.
        groups: slices of equal width, narrowest first.
    """

    atoms: np.ndarray
    single: np.ndarray
    power: np.ndarray
    period: np.ndarray
    groups: tuple[slice, ...]


@lru_cache(maxsize=HISTORY // 10)
def _bank(count: int) -> _Bank:
    pairs: list[np.ndarray] = []
    periods: list[float] = []
    groups: list[slice] = []
    for width in (*(w for w in _WIDTHS if w <= 0.8 * count), count):
        frequencies, found = _atoms(width)
        groups.append(slice(len(pairs), len(pairs) + len(found)))
        periods.extend(1.0 / frequencies)
        pairs.extend(np.pad(pair, ((0, 0), (count - width, 0))) for pair in found)
    atoms = np.array(pairs)
    single = np.asarray(np.all(atoms[:, 1] == 0.0, axis=-1))
    lag = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    power = [np.einsum("kpi,ij,kpj->k", atoms, phi**lag / (1.0 - phi**2), atoms, optimize=True) for phi in _PHI]
    halves = np.where(single, 1.0, 2.0)
    return _Bank(atoms.reshape(-1, count), single, np.array(power) / halves, np.array(periods), tuple(groups))


def _atoms(width: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Frequencies (per value) and orthonormal pairs (2, width): Morlet wavelets with the future half cut away.

    Cosine and sine under half a Gaussian, highest at the newest value. The whole Gaussian, centred in the past, is
    slower: 30 steps after a start at two deviations (period 4.5) it found 42 %, this 73 %. The atoms are made blind to
    parabolas and decays, whose bend would look like a slow oscillation. That costs power at the slowest periods, and
    whatever turns less than 2.2 times within the width.
    """
    time = np.arange(width) - (width - 1.0)
    envelope = np.exp(-0.5 * (_ENVELOPE * time / (width - 1.0)) ** 2)
    smooth = _smooth(width)
    lowest = max(_CYCLES / width, 1.0 / _SLOWEST)
    frequencies = np.linspace(lowest, 0.5, round((0.5 - lowest) * 1.5 * width) + 1)
    pairs = []
    for frequency in frequencies:
        angle = 2.0 * np.pi * frequency * time
        pair = envelope * np.array([np.cos(angle), np.sin(angle)])
        _, strength, axes = np.linalg.svd(pair - pair @ smooth.T @ smooth, full_matrices=False)
        # Near period 2 sine and cosine are nearly one: the weaker would be rounding and envelope.
        pairs.append(axes * (strength > 0.15 * strength[0])[:, None])
    return frequencies, pairs


def _smooth(width: int) -> np.ndarray:
    """Orthonormal directions (directions, width): every parabola, and nearly every decay with any time constant."""
    time = np.linspace(-1.0, 1.0, width)
    parabolas = np.linalg.qr(np.vander(time, 3))[0].T
    decays = np.exp(-np.arange(width) / np.geomspace(6.0, 20.0 * width, 24)[:, None])
    rest = decays - decays @ parabolas.T @ parabolas
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    return np.concatenate(
        [parabolas, np.linalg.svd(rest, full_matrices=False)[2][: _DECAYS[min(width, HISTORY) // 32]]]
    )


def _without_jump(values: np.ndarray) -> np.ndarray:
    """``values`` (rows, count) less the one jump that explains most: a change of level is no oscillation."""
    count = values.shape[1]
    left = np.arange(1, count)
    before = np.cumsum(values, 1)[:, :-1]
    jump = (values.sum(1, keepdims=True) - before) / (count - left) - before / left
    at = np.argmax(np.abs(jump) * np.sqrt(left * (count - left)), 1)
    height = jump[np.arange(len(values)), at]
    return values - np.where(np.arange(count) > at[:, None], height[:, None], 0.0)


def _strongest(values: np.ndarray, bank: _Bank) -> tuple[np.ndarray, np.ndarray]:
    """Statistic and period, each (2, rows), for ``values`` (2, rows, count)."""
    parts = (values @ bank.atoms.T).reshape(*values.shape[:-1], -1, 2)
    energy = np.sum(parts**2, -1) / np.where(bank.single, 1.0, 2.0)
    ratio = energy / bank.power[:, None, None]  # (phi, 2, rows, atoms)
    floor = _FLOOR * np.mean(values**2, -1, keepdims=True) + np.finfo(float).tiny
    ratio /= np.maximum(_typical(ratio[..., bank.groups[-1]]), floor)
    for group in bank.groups[:-1]:
        # Noise that has lately grown at all periods alike is no oscillation.
        ratio[..., group] /= np.maximum(_typical(ratio[..., group]), 1.0)
    # Under noise a pair's energy over its mean is exponential, a single one's chi-square.
    ratio[..., bank.single] = -np.log(np.maximum(erfc(np.sqrt(ratio[..., bank.single] / 2.0)), 1e-300))
    best = ratio.argmax(-1)
    peak = np.take_along_axis(ratio, best[..., None], -1)[..., 0]
    kindest = peak.argmin(0)[None]
    statistic = np.take_along_axis(peak, kindest, 0)[0]
    return statistic, bank.period[np.take_along_axis(best, kindest, 0)[0]]


def _typical(ratio: np.ndarray) -> np.ndarray:
    """Mean that the median over atoms stands for: an oscillation fills few of them."""
    mean: np.ndarray = np.median(ratio, -1, keepdims=True) / np.log(2.0)
    return mean


def _surprise(statistic: np.ndarray, count: int) -> np.ndarray:
    """-log10 of the chance, by straight lines through the calibrated tail."""
    tenth, hundredth, thousandth = _TAIL[count]
    known = np.interp(statistic, [0.0, tenth, hundredth, thousandth], [0.0, 1.0, 2.0, 3.0])
    beyond = np.maximum(statistic - thousandth, 0.0) / (thousandth - hundredth)
    return np.asarray(np.minimum(known + beyond, SURPRISE_LIMIT))
