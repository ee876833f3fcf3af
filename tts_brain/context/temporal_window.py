"""What the temporal model sees: the newest steps, in blocks, in units that no host chose.

Losses are taken from the window's own level and noise, gradient norms from their median, knobs as log ratios;
attention metrics are what they are everywhere. So neither shift nor scale of a loss changes what is seen.

Steps are taken five at a time: attention is measured that seldom, a block's median is calmer than its steps, and a
recurrent pass over twenty blocks costs a fifth of one over a hundred steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np

from tts_brain.context.trends import noise_level
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GATE_WEIGHT,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    LEARNING_RATE,
    MEL_WEIGHT,
    AttentionReport,
    Observation,
)

BLOCK = 5  # steps
LEVEL = 5  # newest values whose median is "the level now", as in feedback.broken
FEWEST = 20  # usable losses in the window; with fewer there is no telling noise from course
ALIGNED = 0.3  # best attention_diag from which on there is an alignment that can be lost
LIMIT = 8.0  # of compressed losses: about 1,500 noise widths

METRICS = tuple(field.name for field in fields(AttentionReport))
TURNED = (LEARNING_RATE, GUIDED_WEIGHT, GUIDED_SIGMA, FORWARD_SUM_WEIGHT, MEL_WEIGHT, GATE_WEIGHT)

# Columns of a row: one step.
STEP, MEL, TOTAL, BAD, NORM = range(5)
REPORT = slice(5, 5 + len(METRICS))
SMOOTH = REPORT.stop  # attention_diag as the analyzer smooths it
MOVES = slice(SMOOTH + 1, SMOOTH + 1 + len(TURNED))
ROW = MOVES.stop

FEATURES = 5 + 2 + len(METRICS) + 2 + len(TURNED)  # of a block
SUMMARY = 8  # of the window
_ATTENTION_MEMORY = 0.5  # as in context.analyzer
_LARGEST = 1e38
_COUNTS = {"skips": 4.0, "repeats": 4.0, "longest_dwell": 5.0}  # not in [0, 1]: logarithm of 1 + x, over this
_LARGEST_MOVE = 5.0
_FAINT = 0.02  # an attention_diag that is as good as none


@dataclass(frozen=True)
class Window:
    """What the model sees, and how to read its answers.

    Args:
        blocks: (B, FEATURES), the newest last; zeros where nothing was seen.
        filled: (B,) bool; the block has a step.
        steps: (B,), the last step of each block.
        summary: (SUMMARY,).
        level, scale: of the losses; ``scale`` is 0 for a constant loss.
        attention_diag: smoothed, now; NaN when not measured in the window.
        aligned: an alignment is there now, which could be lost.
    """

    blocks: np.ndarray
    filled: np.ndarray
    steps: np.ndarray
    summary: np.ndarray
    level: float
    scale: float
    attention_diag: float
    aligned: bool


class History:
    """The newest ``size`` steps, and the best that was ever seen.

    Args:
        size: steps kept, a multiple of BLOCK and at least FEWEST.
    """

    def __init__(self, size: int = 100) -> None:
        if size % BLOCK or size < FEWEST:
            raise ValueError(f"size={size}; write a multiple of {BLOCK} from {FEWEST} on, such as 100")
        self._rows = np.full((size, ROW), np.nan)
        self._smooth = self._best_attention = math.nan
        self._best_level = {MEL: math.nan, TOTAL: math.nan}
        self._last = [math.nan] * (1 + len(TURNED))  # logarithms of the host's rate, then of the knobs

    def observe(self, observation: Observation, knobs: Mapping[str, float] | None = None) -> None:
        """Take in one step, made with ``knobs`` (units of ``types.KNOBS``). A step back forgets what came after it."""
        later = self._rows[:, STEP] >= observation.step
        if later.any():
            self._rows[later] = np.nan
            self._smooth = _newest(self._rows[:, SMOOTH])
        row = np.full(ROW, np.nan)
        row[STEP] = observation.step
        row[MEL], row[TOTAL] = (_sane(observation.losses.get(name)) for name in ("mel", "total"))
        norm = _sane(observation.grad_norm)
        row[NORM] = math.log(max(norm, 1e-12)) if norm == norm else math.nan
        said = [*observation.losses.values(), *([] if observation.grad_norm is None else [observation.grad_norm])]
        row[BAD] = observation.skipped or any(math.isnan(_sane(value)) for value in said)
        self._measure(row, observation.attention)
        row[MOVES] = self._moves(observation.learning_rate, knobs or {})
        self._rows[:-1] = self._rows[1:]
        self._rows[-1] = row
        for name in (MEL, TOTAL):
            self._remember_level(name)

    def regime_changed(self) -> None:
        """The losses mean something else now: forget them, and the gradients; attention stays."""
        self._rows[:, [MEL, TOTAL, NORM]] = np.nan
        self._rows[:, BAD] = 0.0
        self._best_level = {MEL: math.nan, TOTAL: math.nan}

    def window(self) -> Window | None:
        """What is seen now; None with fewer than FEWEST usable losses."""
        grid = self._grid()
        if grid is None:
            return None
        name = MEL if np.isfinite(grid[:, MEL]).any() else TOTAL
        losses = grid[:, name]
        seen = losses[np.isfinite(losses)]
        if len(seen) < FEWEST:
            return None
        level, scale = float(np.median(seen[-LEVEL:])), scale_of(seen)
        blocks = grid.reshape(-1, BLOCK, ROW)
        filled = np.isfinite(blocks[:, :, STEP]).any(axis=1)
        smooth = _newest(grid[:, SMOOTH])
        best = self._best_attention
        aligned = bool(best >= ALIGNED and smooth >= 0.5 * best)
        return Window(
            blocks=np.concatenate(
                [
                    _loss_features(compress(blocks[:, :, name], level, scale), blocks[:, :, BAD]),
                    _norm_features(blocks[:, :, NORM]),
                    _attention_features(blocks[:, :, REPORT.start : SMOOTH + 1]),
                    np.clip(np.nansum(blocks[:, :, MOVES], axis=1), -_LARGEST_MOVE, _LARGEST_MOVE),
                ],
                axis=1,
            ),
            filled=filled,
            steps=grid[-1, STEP] - BLOCK * np.arange(len(blocks) - 1, -1, -1.0),
            summary=self._summary(seen, level, scale, smooth, self._best_level[name]),
            level=level,
            scale=scale,
            attention_diag=smooth,
            aligned=aligned,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None for what was not seen."""
        return {
            "rows": [[_plain(value) for value in row] for row in self._rows.tolist()],
            "smooth": _plain(self._smooth),
            "best_attention": _plain(self._best_attention),
            "best_level": [_plain(self._best_level[name]) for name in (MEL, TOTAL)],
            "last": [_plain(value) for value in self._last],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, all or nothing.

        Raises:
            ValueError: the state is of another size or version, or damaged.
        """
        try:
            rows = np.array([[_number(value) for value in row] for row in state["rows"]], dtype=np.float64)
            smooth, best = _number(state["smooth"]), _number(state["best_attention"])
            levels = [_number(value) for value in state["best_level"]]
            last = [_number(value) for value in state["last"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"state of the temporal model is damaged: {type(error).__name__} {error}") from error
        if rows.shape != self._rows.shape or len(levels) != 2 or len(last) != len(self._last):
            raise ValueError(f"state of the temporal model has rows {rows.shape}; {self._rows.shape} is read")
        if np.isinf(rows).any() or any(math.isinf(value) for value in (smooth, best, *levels, *last)):
            raise ValueError("state of the temporal model has infinite values; None stands for what was not seen")
        self._rows, self._smooth, self._best_attention, self._last = rows, smooth, best, last
        self._best_level = dict(zip((MEL, TOTAL), levels, strict=True))

    def _measure(self, row: np.ndarray, report: AttentionReport | None) -> None:
        values = () if report is None else astuple(report)
        if not values or any(math.isnan(_sane(value)) for value in values):
            return
        row[REPORT] = [_metric(name, value) for name, value in zip(METRICS, values, strict=True)]
        new = float(row[REPORT.start + METRICS.index("attention_diag")])
        old = self._smooth
        self._smooth = new if math.isnan(old) else _ATTENTION_MEMORY * old + (1.0 - _ATTENTION_MEMORY) * new
        row[SMOOTH] = self._smooth
        self._best_attention = max(self._smooth, self._best_attention)  # in this order: a NaN best gives way

    def _moves(self, rate: float | None, knobs: Mapping[str, float]) -> list[float]:
        """Log ratios since the last value known; the rate's is that of the product of the host's and ours."""
        moves = []
        for at, value in enumerate((rate, *(knobs.get(name) for name in TURNED))):
            value = _sane(value)
            now = math.log(value) if value > 0.0 else math.nan
            move = now - self._last[at]
            moves.append(0.0 if math.isnan(move) else move)
            self._last[at] = self._last[at] if math.isnan(now) else now
        return [moves[0] + moves[1], *moves[2:]]

    def _remember_level(self, name: int) -> None:
        """Best level so far, taken as ``feedback.broken`` does: of ten values, behind the newest five."""
        older = self._rows[-4 * LEVEL : -LEVEL, name]
        seen = sorted(older[np.isfinite(older)].tolist()[-2 * LEVEL :])
        if len(seen) == 2 * LEVEL:
            level = 0.5 * (seen[LEVEL - 1] + seen[LEVEL])
            best = self._best_level[name]
            self._best_level[name] = level if math.isnan(best) else min(best, level)

    def _grid(self) -> np.ndarray | None:
        """(size, ROW): a row for each of the newest ``size`` steps, NaN where one was left out."""
        rows = self._rows[np.isfinite(self._rows[:, STEP])]
        if not len(rows):
            return None
        age = (rows[-1, STEP] - rows[:, STEP]).astype(np.int64)
        grid = np.full_like(self._rows, np.nan)
        near = age < len(grid)
        grid[len(grid) - 1 - age[near]] = rows[near]
        return grid

    def _summary(self, seen: np.ndarray, level: float, scale: float, smooth: float, best_level: float) -> np.ndarray:
        low, high = np.quantile(seen, (0.25, 0.75))
        best = self._best_attention
        return np.array(
            [
                0.0 if math.isnan(smooth) else smooth,
                0.0 if math.isnan(best) else best,
                float(not math.isnan(smooth)),
                # How far the level stands above the best; as far as is known.
                0.0 if math.isnan(best_level) else -float(compress(np.array(best_level), level, scale)),
                float(compress(high, low, scale)),  # how much there is beside noise
                len(seen) / len(self._rows),
                # Logarithms of how near the alignment is to being lost, and of how far it is from there being one.
                0.0 if math.isnan(smooth) else math.log((smooth + _FAINT) / (best + _FAINT)),
                0.0 if math.isnan(best) else math.log((best + _FAINT) / ALIGNED),
            ]
        )


def scale_of(losses: np.ndarray) -> float:
    """Unit of the window: the step-to-step noise, or the mean distance from the median where most steps are equal."""
    noise = noise_level(losses)
    return noise if noise > 0.0 else float(np.mean(np.abs(losses - np.median(losses))))


def compress(losses: np.ndarray, level: float, scale: float) -> np.ndarray:
    """Distance from ``level`` in units of ``scale``, linear when small, logarithmic when large; within ±LIMIT.

    Quantiles survive any rising function, so the model may forecast these and be read back by ``expand``.
    """
    if not scale > 0.0:
        return np.where(np.isnan(losses), np.nan, 0.0)
    with np.errstate(over="ignore"):  # a noise of 1e-320 under a spike of 1e38
        compressed: np.ndarray = np.clip(np.arcsinh((losses - level) / scale), -LIMIT, LIMIT)
    return compressed


def expand(compressed: np.ndarray, level: float, scale: float) -> np.ndarray:
    """Inverse of ``compress``."""
    losses: np.ndarray = level + scale * np.sinh(np.clip(compressed, -LIMIT, LIMIT))
    return losses


def _loss_features(losses: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """(B, 5): middle, lowest and highest, whether there is any, and the share of steps that were not finite."""
    low, middle, high = _low_middle_high(losses)
    return np.stack([middle, low, high, np.isfinite(losses).any(axis=1), np.nansum(bad, axis=1) / BLOCK], axis=1)


def _norm_features(norms: np.ndarray) -> np.ndarray:
    """(B, 2): middle and highest logarithm of the gradient norm, less the window's median."""
    seen = norms[np.isfinite(norms)]
    _, middle, high = _low_middle_high(norms - (np.median(seen) if len(seen) else 0.0))
    features: np.ndarray = np.clip(np.stack([middle, high], axis=1), -LIMIT, LIMIT)
    return features


def _attention_features(reports: np.ndarray) -> np.ndarray:
    """(B, 11) from (B, BLOCK, 10): the newest report, kept until the next one; and whether it was made in the block."""
    measured = np.isfinite(reports[:, :, -1])
    newest = reports[np.arange(len(reports)), BLOCK - 1 - measured[:, ::-1].argmax(axis=1)]
    held = np.maximum.accumulate(np.where(measured.any(axis=1), np.arange(len(reports)), -1))
    kept = np.where(held[:, None] >= 0, newest[held], 0.0)
    return np.concatenate([kept, measured.any(axis=1)[:, None]], axis=1)


def _low_middle_high(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B,) each from (B, BLOCK); 0 where there is none. numpy's nanmedian says the same, ten times slower."""
    ordered = np.sort(values, axis=1)  # NaN come last
    count = np.isfinite(values).sum(axis=1)
    rows, last = np.arange(len(values)), np.maximum(count - 1, 0)
    picked = (ordered[:, 0], 0.5 * (ordered[rows, last // 2] + ordered[rows, (last + 1) // 2]), ordered[rows, last])
    low, middle, high = (np.where(count > 0, one, 0.0) for one in picked)
    return low, middle, high


def _newest(values: np.ndarray) -> float:
    seen = values[np.isfinite(values)]
    return float(seen[-1]) if len(seen) else math.nan


def _metric(name: str, value: float) -> float:
    divisor = _COUNTS.get(name)
    return min(max(value, 0.0), 1.0) if divisor is None else math.log1p(max(value, 0.0)) / divisor


def _sane(value: float | None) -> float:
    return float(value) if value is not None and abs(value) <= _LARGEST else math.nan


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value


def _number(value: Any) -> float:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise TypeError(f"{value!r} is no number")
    return math.nan if value is None else float(value)


def names() -> Sequence[str]:
    """Of a block's features, in order: for cards and plots."""
    return (
        *("loss", "lowest loss", "highest loss", "has a loss", "not finite"),
        *("grad norm", "highest grad norm"),
        *METRICS,
        *("attention_diag, smoothed", "measured"),
        *(f"move of {name}" for name in TURNED),
    )
