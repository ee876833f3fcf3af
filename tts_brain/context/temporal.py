"""The temporal model: an LSTM with attention over the newest steps, which says where loss and alignment are going.

    blocks (B, F) ─▶ LSTM ─▶ states (B, H) ─▶ attention of the newest state over all ─▶ what it found (H)
    newest state, what it found, summary of the window ─▶ tanh layer ─┐
                                      summary of the window ─────────┴▶ for each horizon: three quantiles of the loss,
    three of ``attention_diag``, hazard of divergence, hazard of losing the alignment

The LSTM is that of Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000), the attention the
scaled dot product of Vaswani et al. (2017, eq. 1). Only numpy, on one core, some tenths of a millisecond a call. The
weights are made by ``python -m tts_brain.learning.temporal_training`` and described in ``weights/temporal.md``.

What is forecast, at step t for t + h:

- the loss: the median of the five values up to t + h, "the level" as ``feedback.broken`` takes it, not one noisy value;
- ``attention_diag``: smoothed as the analyzer does;
- divergence by then: ``feedback.broken`` finds the loss too far above its best, or three steps in a row were not
  finite, at some step in (t, t + h];
- alignment lost by then: at some step in (t, t + h] the smoothed ``attention_diag`` falls under half its best, and
  stays there for 50 steps. There must be an alignment: the best is at least 0.3, and now is not under half of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tts_brain.context.temporal_window import BLOCK, FEATURES, SUMMARY, History, Window, expand
from tts_brain.types import Forecast, Observation

HORIZONS = (25, 50, 100)
QUANTILES = (0.1, 0.5, 0.9)
OUTPUTS = 8  # of a horizon: the loss's and the attention's middle, gap below, gap above; two hazards
WEIGHTS = Path(__file__).parents[1] / "weights" / "temporal.safetensors"
KIND = "tts-brain temporal model 1"
_LOOKED_AT = 3
_UNKNOWN = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Net:
    """Weights, float64. H states, F features of a block, D of the attention's keys, M in the tanh layer.

    Args:
        inputs: (F, 4H), gates in the order input, forget, candidate, output.
        recurrent: (H, 4H).
        bias: (4H,).
        query, key: (H, D).
        hidden: (2H + SUMMARY, M).
        hidden_bias: (M,).
        output: (M, horizons * OUTPUTS).
        direct: (SUMMARY, horizons * OUTPUTS), past the tanh layer: how near an event is tells much of its hazard.
        output_bias: (horizons * OUTPUTS,).
    """

    inputs: np.ndarray
    recurrent: np.ndarray
    bias: np.ndarray
    query: np.ndarray
    key: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    output: np.ndarray
    direct: np.ndarray
    output_bias: np.ndarray

    def __call__(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Raw answers (horizons, OUTPUTS), and how much the attention rested on each block (B,), which sums to 1."""
        states = self._states(window.blocks)
        scores = (states @ self.key) @ (states[-1] @ self.query) / np.sqrt(self.key.shape[1])
        shares = np.exp(scores - scores.max()) * window.filled
        shares /= shares.sum()
        found = np.concatenate([states[-1], shares @ states, window.summary])
        hidden = np.tanh(found @ self.hidden + self.hidden_bias)
        answers = hidden @ self.output + window.summary @ self.direct + self.output_bias
        return answers.reshape(-1, OUTPUTS), shares

    def _states(self, blocks: np.ndarray) -> np.ndarray:
        size = len(self.recurrent)
        states, state, cell = np.empty((len(blocks), size)), np.zeros(size), np.zeros(size)
        for at, driven in enumerate(blocks @ self.inputs + self.bias):
            gates = driven + state @ self.recurrent
            candidate = np.tanh(gates[2 * size : 3 * size])
            inward, keep, outward = (_sigmoid(gates[i * size : (i + 1) * size]) for i in (0, 1, 3))
            cell = keep * cell + inward * candidate
            state = outward * np.tanh(cell)
            states[at] = state
        return states


@cache
def load_net(path: Path = WEIGHTS) -> Net:
    """The weights in a file.

    Raises:
        OSError: no such file.
        ValueError: it is of another model.
    """
    with safe_open(path, framework="numpy") as file:
        said = json.loads((file.metadata() or {}).get("model", "{}"))
        wanted = {"kind": KIND, "features": FEATURES, "summary": SUMMARY, "block": BLOCK, "horizons": list(HORIZONS)}
        if {name: said.get(name) for name in wanted} != wanted:
            raise ValueError(
                f"{path} holds weights of {said}; this tts-brain reads {wanted}: "
                "make them with `python -m tts_brain.learning.temporal_training`"
            )
        return Net(**{name: file.get_tensor(name).astype(np.float64) for name in file.keys()})  # noqa: SIM118


class TemporalForecaster:
    """Folds observations, and forecasts.

    Args:
        history_size: steps looked at; the weights are made for 100.
        net: other weights than those shipped.
    """

    def __init__(self, history_size: int = 100, net: Net | None = None) -> None:
        self._history = History(history_size)
        self._net = load_net() if net is None else net

    def observe(self, observation: Observation, knobs: Mapping[str, float] | None = None) -> None:
        """Take in one step, made with ``knobs`` (units of ``types.KNOBS``; those left out count as not moved)."""
        self._history.observe(observation, knobs)

    def forecast(self) -> Forecast | None:
        """What is expected now; None with fewer than 20 usable losses among the newest ``history_size`` steps.

        The loss is ``mel``, or ``total`` where no ``mel`` is seen. Without a measured attention its quantiles say that
        it may be anything: (0, 0.5, 1). The hazard of divergence is for a run that has not diverged yet.
        """
        window = self._history.window()
        return None if window is None else read(window, *self._net(window))

    def regime_changed(self) -> None:
        """The host changed what its losses mean: forget them. Attention is kept."""
        self._history.regime_changed()

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and None."""
        return self._history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, all or nothing; ValueError when it is of another size or damaged."""
        self._history.load_state_dict(state)


def read(window: Window, answers: np.ndarray, shares: np.ndarray) -> Forecast:
    """The forecast that raw answers stand for. ``answers``: (horizons, OUTPUTS), ``shares``: (B,)."""
    loss = expand(quantiles(answers[:, 0:3]), window.level, window.scale)
    attention = np.clip(window.attention_diag + quantiles(answers[:, 3:6]), 0.0, 1.0)
    unknown = np.isnan(window.attention_diag)
    lost = by_then(answers[:, 7]) if window.aligned else np.zeros(len(answers))
    most = np.argsort(-shares, kind="stable")[: min(_LOOKED_AT, int(window.filled.sum()))]
    return Forecast(
        horizons=HORIZONS,
        loss=_triples(loss),
        attention_diag=(_UNKNOWN,) * len(answers) if unknown else _triples(attention),
        divergence=tuple(by_then(answers[:, 6]).tolist()),
        alignment_loss=tuple(lost.tolist()),
        looked_at=tuple((int(window.steps[at]), float(shares[at])) for at in most),
    )


def quantiles(answers: np.ndarray) -> np.ndarray:
    """(horizons, 3) that never cross, from (middle, gap below, gap above) before the softplus."""
    middle = answers[:, 0]
    return np.stack([middle - _softplus(answers[:, 1]), middle, middle + _softplus(answers[:, 2])], axis=1)


def by_then(hazards: np.ndarray) -> np.ndarray:
    """(horizons,) probability of the event by each horizon, which only rises, from the hazards of the stretches."""
    chances: np.ndarray = -np.expm1(-np.cumsum(_softplus(hazards)))
    return chances


def _triples(values: np.ndarray) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(low), float(middle), float(high)) for low, middle, high in values)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.logaddexp(0.0, x)
    return result
