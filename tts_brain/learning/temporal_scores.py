"""How good forecasts are: quantiles by their pinball loss, probabilities by how well they rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tts_brain.context.temporal import QUANTILES, Net, by_then, quantiles
from tts_brain.context.temporal_window import LIMIT, Window
from tts_brain.learning.temporal_targets import Samples

# Of loss errors, in units of the window's noise: a run that diverged to 1e6 widths must not be all that counts.
CAP = 20.0


def pinball(forecast: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(N,) mean over the quantiles of the pinball loss (Koenker and Bassett 1978).

    Args:
        forecast: (N, 3) at the ``QUANTILES``.
        truth: (N,); where it is NaN, so is the result.
    """
    error = truth[:, None] - forecast
    level = np.array(QUANTILES)
    losses: np.ndarray = np.maximum(level * error, (level - 1.0) * error).mean(axis=1)
    return losses


def auroc(score: np.ndarray, happened: np.ndarray) -> float:
    """Probability that an event's score is above that of a non-event (Mann and Whitney 1947), ties count half.

    Entries whose ``happened`` is NaN are left out. NaN where there is no event, or nothing else.
    """
    known = np.isfinite(happened)
    score, event = score[known], happened[known] == 1.0
    yes, no = int(event.sum()), int((~event).sum())
    if not yes or not no:
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - 0.5 * (count - 1.0))[place]
    return float((rank[event].sum() - yes * (yes + 1) / 2.0) / (yes * no))


@dataclass(frozen=True)
class Answers:
    """Forecasts of N windows at K horizons, by whatever method.

    Args:
        loss: (N, K, 3) quantiles in units of the window: (loss - level) / scale.
        attention: (N, K, 3) quantiles of ``attention_diag``.
        diverged, lost: (N, K), the higher the likelier.
    """

    loss: np.ndarray
    attention: np.ndarray
    diverged: np.ndarray
    lost: np.ndarray


def score(answers: Answers, some: Samples) -> dict[str, list[float]]:
    """For each horizon: mean pinball loss of ``loss`` and ``attention``, AUROC of ``diverged`` and ``lost``.

    Losses and their forecasts count within ``CAP`` noise widths of the level.
    """
    truth = np.clip(np.sinh(some.loss), -CAP, CAP)
    found: dict[str, list[float]] = {"loss": [], "attention": [], "diverged": [], "lost": []}
    for k in range(some.loss.shape[1]):
        found["loss"].append(_mean(pinball(np.clip(answers.loss[:, k], -CAP, CAP), truth[:, k])))
        found["attention"].append(_mean(pinball(answers.attention[:, k], _known_attention(some, k))))
        found["diverged"].append(auroc(answers.diverged[:, k], some.diverged[:, k]))
        found["lost"].append(auroc(answers.lost[:, k], some.lost[:, k]))
    return found


def coverage(answers: Answers, some: Samples) -> dict[str, list[float]]:
    """Share of the truth within the outer quantiles, which should be 0.8, for each horizon."""
    found: dict[str, list[float]] = {"loss": [], "attention": []}
    for k in range(some.loss.shape[1]):
        for name, forecast, truth in (
            ("loss", answers.loss[:, k], np.sinh(some.loss[:, k])),
            ("attention", answers.attention[:, k], _known_attention(some, k)),
        ):
            known = np.isfinite(truth)
            inside = (forecast[known, 0] <= truth[known]) & (truth[known] <= forecast[known, 2])
            found[name].append(float(inside.mean()) if known.any() else float("nan"))
    return found


def ours(net: Net, some: Samples) -> Answers:
    """What the model says of the windows."""
    raw = np.stack([net(_window(some, i))[0] for i in range(len(some))])
    attention = some.attention_now[:, None, None] + np.stack([quantiles(one[:, 3:6]) for one in raw])
    return Answers(
        loss=np.sinh(np.clip(np.stack([quantiles(one[:, 0:3]) for one in raw]), -LIMIT, LIMIT)),
        attention=np.clip(attention, 0.0, 1.0),
        diverged=np.stack([by_then(one[:, 6]) for one in raw]),
        lost=np.stack([by_then(one[:, 7]) for one in raw]),
    )


def with_residuals(loss: np.ndarray, attention: np.ndarray, tuned: np.ndarray, some: Samples) -> tuple[np.ndarray, ...]:
    """Quantiles for a method that gives points: those of its own errors on the windows under ``tuned``.

    Args:
        loss, attention: (N, K) points, ``loss`` in units of the window.
        tuned: (N,) bool, at least one.

    Returns:
        (N, K, 3) quantiles of the loss and of the attention; errors of the loss count within ``CAP``.
    """
    results = []
    for points, truth in ((loss, np.sinh(some.loss)), (attention, some.attention)):
        errors = np.clip(truth - points, -CAP, CAP)[tuned]
        results.append(
            np.stack([points[:, k, None] + _quantiles(errors[:, k]) for k in range(points.shape[1])], axis=1)
        )
    return results[0], np.clip(results[1], 0.0, 1.0)


def last_value(tuned: np.ndarray, some: Samples) -> Answers:
    """All stays as it is; the quantiles are those of its errors on the windows under ``tuned``.

    The chance of an event is how near it is: the level above its best, the attention above half its best.
    """
    still = np.zeros_like(some.loss)
    attention = np.repeat(some.attention_now[:, None], still.shape[1], axis=1)
    loss, attention = with_residuals(still, attention, tuned, some)
    above = np.repeat(some.summary[:, 3:4].astype(np.float64), still.shape[1], axis=1)
    best = some.summary[:, 1:2]
    return Answers(loss, attention, above, 0.5 * best - np.repeat(some.attention_now[:, None], still.shape[1], axis=1))


def _window(some: Samples, i: int) -> Window:
    return Window(
        blocks=some.blocks[i].astype(np.float64),
        filled=some.filled[i],
        steps=np.zeros(len(some.filled[i])),
        summary=some.summary[i].astype(np.float64),
        level=0.0,
        scale=1.0,
        attention_diag=float(some.attention_now[i]),
        aligned=True,
    )


def _known_attention(some: Samples, k: int) -> np.ndarray:
    """(N,) where it was measured then and now."""
    return np.where(np.isfinite(some.attention_now), some.attention[:, k], np.nan)


def _quantiles(errors: np.ndarray) -> np.ndarray:
    known = errors[np.isfinite(errors)]
    return np.quantile(known, QUANTILES) if len(known) else np.zeros(len(QUANTILES))


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
