"""Which phase is the training in? A Gaussian mixture anchored to the thresholds, under a prior that sticks.

The bare thresholds chatter when ``attention_diag`` hovers near one. Here the four phases are the components of a
``GaussianMixture``. Its likelihood is that of a level, not of one measurement, and counts in units of the measured
noise; the prior favours the phase held so far. So a phase changes when the level has crossed a limit by about half
the noise, and the posterior says how sure we are.

The level is an EMA whose gain is a tracking signal (Trigg and Leach 1967): it follows a rise at once, and grows slow
where errors alternate. What lost on made-up courses, at equal delay: a forward filter over a four-state chain (1.8
times fewer switches than thresholds on an EMA, the level and a sticky prior 3.5 times), also with longer memory (2.4)
or with evidence in units of noise (1.6). Evidence that adds up lets noise add up as well.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from tts_brain.types import PHASE_LIMITS, TrainingPhase

_EDGES = np.array([0.0, *PHASE_LIMITS, 1.0])
_CENTRES = np.array([0.5, 1.5, 2.5, 3.5])
_SIGMA = 0.3
# Loss features may tip the scales near a boundary but never overrule the attention far from one.
_LOSS_VARIANCE_FLOOR = 1.0
_MOST_DROP = 1e6
_REFIT_EVERY = 20
# Of the level, per measurement: memories of the error's mean and of its size, least gain, errors clipped at so many
# sizes. On the phase coordinate: first guess and floor of the size.
_ERROR_RATE, _SIZE_RATE, _LEAST_GAIN, _CLIP = 0.07, 0.03, 0.05, 5.0
_FIRST_SIZE, _LEAST_SIZE = 0.05, 0.016
# Log odds between neighbours when the level is one deviation of the noise past their limit. Stickiness 0.9 then holds
# a phase up to half a deviation past it.
_EVIDENCE = 5.8


def phase_coordinate(attention_diag: float) -> float:
    """``attention_diag`` in [0, 1] on a scale where the thresholds lie at 1, 2 and 3 (piecewise linear, in [0, 4]).

    On this scale equal-width components half-way between the thresholds meet exactly at the thresholds.
    """
    return float(np.interp(attention_diag, _EDGES, np.arange(5.0)))


class PhaseClassifier:
    """Posterior over the four phases.

    Args:
        components: number of mixture components; the phases are four, so is this.
        stickiness: prior probability of the phase held so far, in [0.25, 1); a neighbour has half the rest.
        history_size: how many past feature vectors the mixture is fitted to.
    """

    def __init__(self, components: int = 4, stickiness: float = 0.9, history_size: int = 100) -> None:
        if components != len(TrainingPhase):
            raise ValueError(f"phase_classifier_components={components}; the phases are 4, write 4")
        self._stickiness = stickiness
        self._history: deque[list[float]] = deque(maxlen=history_size)
        self._posterior = np.array([1.0, 0.0, 0.0, 0.0])
        self._level, self._error, self._size = 0.0, 0.0, _FIRST_SIZE
        self._seen = 0
        self._fit_on: list[list[float]] = []
        self._mixture = _fit([])

    @property
    def posterior(self) -> tuple[float, float, float, float]:
        """Probabilities of the phases in order; PRE_ALIGNMENT for sure before the first measurement."""
        a, b, c, d = (float(p) for p in self._posterior)
        return a, b, c, d

    @property
    def phase(self) -> TrainingPhase:
        """The most probable phase."""
        return list(TrainingPhase)[int(np.argmax(self._posterior))]

    @property
    def certainty(self) -> float:
        """1 minus the normalised entropy of the posterior: 1 when one phase is sure, 0 when all are alike."""
        p = self._posterior[self._posterior > 0]
        return float(1.0 + np.sum(p * np.log(p)) / np.log(len(self._posterior)))

    def update(self, attention_diag: float, loss_fall_z: float, loss_drop: float) -> None:
        """Take in one measurement.

        Args:
            attention_diag: in [0, 1]; a value that is not finite changes nothing.
            loss_fall_z: ``z`` of the loss trend, negative when it falls.
            loss_drop: how far the loss has come down since the start, in units of its noise; infinity without noise.

        A loss feature that is not a number counts as 0.
        """
        if not np.isfinite(attention_diag):
            return
        loss_fall_z, loss_drop = (0.0 if np.isnan(v) else v for v in (loss_fall_z, loss_drop))
        fall, drop = np.tanh(loss_fall_z / 4), np.log10(1.0 + min(max(loss_drop, 0.0), _MOST_DROP))
        x = [phase_coordinate(attention_diag), float(fall), float(drop)]
        self._history.append(x)
        self._seen += 1
        if self._seen % _REFIT_EVERY == 0:
            self._fit_on = [list(row) for row in self._history]
            self._mixture = _fit(self._fit_on)
        self._follow(x[0])
        noise = 1.25 * self._size  # mean absolute to standard deviation, of a normal distribution
        likelihood = _likelihood(self._mixture, np.array([self._level, *x[1:]]), noise)
        posterior = likelihood * _sticky_prior(self._stickiness, int(np.argmax(self._posterior)))
        self._posterior = posterior / posterior.sum()

    def _follow(self, coordinate: float) -> None:
        """Level, mean error and mean size of the error, all on the phase coordinate."""
        if self._seen == 1:
            self._level = coordinate
        limit = _CLIP * self._size
        error = min(max(coordinate - self._level, -limit), limit)
        self._error += _ERROR_RATE * (error - self._error)
        self._size = max(self._size + _SIZE_RATE * (abs(error) - self._size), _LEAST_SIZE)
        gain = min(max(abs(self._error) / self._size, _LEAST_GAIN), 1.0)
        self._level += gain * (coordinate - self._level)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists; the mixture is refitted from what it was fitted to, not stored."""
        return {
            "history": [list(row) for row in self._history],
            "posterior": [float(p) for p in self._posterior],
            "level": [self._level, self._error, self._size],
            "seen": self._seen,
            "fit_on": [list(row) for row in self._fit_on],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        posterior = np.asarray(state["posterior"], dtype=np.float64)
        if posterior.shape != (4,) or not (np.all(posterior >= 0.0) and abs(posterior.sum() - 1.0) < 1e-6):
            raise ValueError(f"phase posterior {state['posterior']} is not four probabilities that sum to 1")
        level, error, size = (float(v) for v in state["level"])
        if not (np.all(np.isfinite([level, error])) and _LEAST_SIZE <= size < np.inf):
            raise ValueError(f"phase level {state['level']} is not three finite numbers, the last >= {_LEAST_SIZE}")
        history, fit_on = _rows(state["history"]), _rows(state["fit_on"])
        mixture, seen = _fit(fit_on), int(state["seen"])
        self._history = deque(history, maxlen=self._history.maxlen)
        self._posterior, self._seen = posterior, seen
        self._level, self._error, self._size = level, error, size
        self._fit_on, self._mixture = fit_on, mixture


def _rows(rows: Any) -> list[list[float]]:
    plain = [[float(v) for v in row] for row in rows]
    if not all(len(row) == 3 and np.all(np.isfinite(row)) for row in plain):
        raise ValueError("a feature row of the phase classifier is not three finite numbers")
    return plain


def _likelihood(mixture: GaussianMixture, x: np.ndarray, noise: float) -> np.ndarray:
    """Of one row under each component, up to a factor; the attention axis in units of ``noise`` (on its own scale).

    With equal weights ``mixture.predict_proba`` says nearly the same, but checks its input twenty times as long as
    this takes. Attention never weighs less than in the mixture, or the loss axes could overrule it.
    """
    squares = (x - mixture.means_) ** 2 * mixture.precisions_
    squares[:, 0] *= max(_EVIDENCE * _SIGMA**2 / noise, 1.0)
    logs = 0.5 * np.sum(np.log(mixture.precisions_) - squares, axis=1)
    odds = np.exp(logs - logs.max())
    shares: np.ndarray = odds / odds.sum() + 1e-12
    return shares


def _sticky_prior(stay: float, held: int) -> np.ndarray:
    """(4,), up to a factor: the held phase, and the others, which are never the likelier ones."""
    other = (1.0 - stay) / 2.0
    prior = np.full(len(TrainingPhase), other)
    prior[held] = max(stay, other)
    return prior


def _fit(rows: list[list[float]]) -> GaussianMixture:
    """Fit to the run's own rows plus pseudo-rows at the anchors, then put the attention axis back on its anchors.

    The pseudo-rows keep all four components alive while a run has only seen one or two phases. With a diagonal
    covariance the axes do not mix, so re-anchoring the first leaves what was learned on the others untouched.
    """
    data = np.asarray(rows, dtype=np.float64).reshape(-1, 3)
    centre = data[:, 1:].mean(axis=0) if len(data) else np.zeros(2)
    corners = np.array(list(product((-_SIGMA, _SIGMA), (-1.0, 1.0), (-1.0, 1.0))))
    pseudo = np.vstack([np.array([anchor, *centre]) + corners for anchor in _CENTRES])
    means = np.column_stack([_CENTRES, np.tile(centre, (4, 1))])
    precisions = np.tile([_SIGMA**-2, 1.0, 1.0], (4, 1))
    mixture = GaussianMixture(
        n_components=4,
        covariance_type="diag",
        means_init=means,
        weights_init=np.full(4, 0.25),
        precisions_init=precisions,
        random_state=0,
        max_iter=20,
    )
    with warnings.catch_warnings():
        # Twenty rounds of EM are enough here; the attention axis is re-anchored anyway.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(np.vstack([pseudo, data]))
    mixture.weights_ = np.full(4, 0.25)
    mixture.means_[:, 0] = _CENTRES
    mixture.covariances_[:, 0] = _SIGMA**2
    mixture.covariances_[:, 1:] = np.maximum(mixture.covariances_[:, 1:], _LOSS_VARIANCE_FLOOR)
    mixture.precisions_ = 1.0 / mixture.covariances_
    mixture.precisions_cholesky_ = np.sqrt(mixture.precisions_)
    return mixture
