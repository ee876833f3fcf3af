"""Folds observations into the ``TrainingContext`` that agents look at."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, fields
from statistics import median
from typing import Any

from tts_brain.context.phases import PhaseClassifier
from tts_brain.context.scales import scales
from tts_brain.context.temporal import TemporalForecaster
from tts_brain.context.trends import trend
from tts_brain.types import AttentionReport, Observation, Scales, TrainingContext, Trend

_ATTENTION_MEMORY = 0.5
_TEXT_MEMORY = 0.95
_SPIKE = 3.0
_NAN = float("nan")
# About what float32 can hold. A host that reports more is as lost as one that reports infinity, and sums and squares of
# it would overflow all the way down.
_LARGEST = 1e38
# A model that is not trained yet shows next to nothing at its first measurements, and no alignment at two in a row.
_FIRST_SEEN, _ALIGNED = 2, 0.5


class ContextAnalyzer:
    """Keeps the last ``history_size`` values of every series and the phase posterior.

    Args:
        history_size: values kept per series.
        phase_classifier_components: four, one per phase.
        trend_window: newest values that a trend rests on.
        stability_threshold: noise of the loss over the height that it has come down from, under which the run counts
            as stable: it is told to people, and decides nothing.
        phase_stickiness: see ``PhaseClassifier``.
        forecasts: also ask the temporal model, which looks at the newest 100 steps whatever ``history_size`` is.
    """

    def __init__(
        self,
        history_size: int = 100,
        phase_classifier_components: int = 4,
        trend_window: int = 20,
        stability_threshold: float = 0.05,
        phase_stickiness: float = 0.9,
        forecasts: bool = True,
    ) -> None:
        if not 4 <= trend_window <= history_size:
            raise ValueError(f"trend_window={trend_window}; write a number from 4 to history_size={history_size}")
        self._history_size = history_size
        self._window = trend_window
        self._stability_threshold = stability_threshold
        self.phases = PhaseClassifier(phase_classifier_components, phase_stickiness, history_size)
        self._forecaster = TemporalForecaster() if forecasts else None
        self._series: dict[str, deque[tuple[int, float]]] = {}
        self._attention: AttentionReport | None = None
        self.best_attention_diag = 0.0
        self._first_seen: list[float] = []  # ``attention_diag`` at the first measurements
        self._first_level: float | None = None
        self._scalars = {"learning_rate": _NAN, "update_ratio": _NAN, "text_length": _NAN}
        self._nonfinite_run = 0
        self._nonfinite_losses = 0
        self._step = 0

    @property
    def nonfinite_run(self) -> int:
        """How many observations in a row were not finite, up to the newest."""
        return self._nonfinite_run

    @property
    def nonfinite_losses(self) -> int:
        """How many observations in a row had a loss that was not finite, up to the newest."""
        return self._nonfinite_losses

    @property
    def learning_rate(self) -> float:
        """The host's newest; NaN when unknown."""
        return self._scalars["learning_rate"]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) pairs kept for a loss, ``grad_norm`` (natural logarithm) or ``attention_diag``."""
        return list(self._series.get(name, ()))

    def observe(self, observation: Observation, knobs: Mapping[str, float] | None = None) -> None:
        """Take in one step, made with ``knobs``; those left out count as not moved."""
        self._step = observation.step
        if self._forecaster is not None:
            self._forecaster.observe(observation, knobs)
        for name, value in observation.losses.items():
            self._append(name, observation.step, value)
        norm = _NAN if observation.skipped else observation.grad_norm
        if norm is not None:
            self._append("grad_norm", observation.step, math.log(max(norm, 1e-12)) if _sane(norm) else _NAN)
        bad_loss = not all(_sane(v) for v in observation.losses.values())
        bad = bad_loss or observation.skipped or (norm is not None and not _sane(norm))
        self._nonfinite_run = self._nonfinite_run + 1 if bad else 0
        self._nonfinite_losses = self._nonfinite_losses + 1 if bad_loss else 0
        self._remember_scalars(observation)
        # One NaN in the running mean would stay there for good.
        if observation.attention is not None and all(_sane(v) for v in astuple(observation.attention)):
            self._observe_attention(observation.step, observation.attention)

    def regime_changed(self) -> None:
        """Forget levels and trends of the losses: they mean something else now."""
        kept = self._series.get("attention_diag")
        self._series = {} if kept is None else {"attention_diag": kept}
        if self._forecaster is not None:
            self._forecaster.regime_changed()
        self._first_level = None

    def attention_changed(self) -> None:
        """Forget how good the attention was: at another reduction factor it has other steps to stand on."""
        self._attention = None
        self.best_attention_diag = 0.0

    def earlier_weights_are_back(self, host_rate: float) -> None:
        """Forget how many steps in a row were not finite; the host's rate, where it is known, has not gone back."""
        self._nonfinite_run = self._nonfinite_losses = 0
        if math.isfinite(host_rate):
            self._scalars["learning_rate"] = host_rate

    def context(self) -> TrainingContext:
        """Everything known now."""
        every = {name: self._trend(name) for name in self._series}
        trends = {name: one for name, one in every.items() if one.count}  # of no finite value there is no level
        loss = trends.get("mel") or trends.get("total")
        newest = [v for _, v in self._tail("grad_norm")]
        norms = [math.exp(v) for v in newest if math.isfinite(v)]
        middle = median(norms) if norms else _NAN
        return TrainingContext(
            step=self._step,
            phase=self.phases.phase,
            phase_posterior=self.phases.posterior,
            certainty=self.phases.certainty,
            trends=trends,
            attention=self._attention,
            stable=loss is not None and loss.count >= 4 and self._relative_noise(loss) < self._stability_threshold,
            grad_spikes=sum(n > _SPIKE * middle for n in norms) / len(norms) if norms else 0.0,
            grad_norm_median=middle,
            left_out=1.0 - len(norms) / len(newest) if newest else 0.0,
            nonfinite_run=self._nonfinite_run,
            nonfinite_losses=self._nonfinite_losses,
            best_attention_diag=self.best_attention_diag,
            learning_rate=self._scalars["learning_rate"],
            update_ratio=self._scalars["update_ratio"],
            text_length=self._scalars["text_length"],
            scales={self._judged: self._scales(self._judged)},
            forecast=None if self._forecaster is None else self._forecaster.forecast(),
            found_trained=self._found_trained,
        )

    @property
    def _found_trained(self) -> bool:
        stands = self._attention is None or self._attention.attention_diag >= 0.5 * self.best_attention_diag
        return len(self._first_seen) == _FIRST_SEEN and min(self._first_seen) >= _ALIGNED and stands

    @property
    def _judged(self) -> str:
        """The loss that moves are judged by."""
        return "mel" if "mel" in self._series else "total"

    def _scales(self, name: str) -> Scales:
        series = self.series(name)
        return scales([s for s, _ in series], [v for _, v in series])

    def _trend(self, name: str) -> Trend:
        tail = self._tail(name)
        return trend([s for s, _ in tail], [v for _, v in tail])

    def _tail(self, name: str) -> list[tuple[int, float]]:
        return list(self._series.get(name, ()))[-self._window :]

    def _relative_noise(self, loss: Trend) -> float:
        """Noise over the height the loss has come down from; free of the loss's own zero and unit."""
        start = loss.level if self._first_level is None else self._first_level
        return loss.noise / max(abs(start - loss.level), loss.noise, 1e-12)

    def _append(self, name: str, step: int, value: float) -> None:
        value = float(value) if _sane(value) else _NAN
        self._series.setdefault(name, deque(maxlen=self._history_size)).append((step, value))

    def _remember_scalars(self, observation: Observation) -> None:
        for name in ("learning_rate", "update_ratio"):
            value = getattr(observation, name)
            if value is not None and _sane(value):
                self._scalars[name] = float(value)
        new = observation.text_length
        if new is not None and _sane(new):
            old = self._scalars["text_length"]
            self._scalars["text_length"] = new if math.isnan(old) else _TEXT_MEMORY * old + (1 - _TEXT_MEMORY) * new

    def _observe_attention(self, step: int, report: AttentionReport) -> None:
        if self._attention is None:
            self._attention = report
        else:
            pairs = zip(astuple(self._attention), astuple(report), strict=True)
            self._attention = AttentionReport(*(_ATTENTION_MEMORY * a + (1 - _ATTENTION_MEMORY) * b for a, b in pairs))
        if len(self._first_seen) < _FIRST_SEEN:
            self._first_seen.append(report.attention_diag)
        smooth = self._attention.attention_diag
        self._append("attention_diag", step, smooth)
        self.best_attention_diag = max(self.best_attention_diag, smooth)
        loss = self._trend(self._judged)
        if self._first_level is None and loss.count >= 4:
            self._first_level = loss.level
        # Raw: the classifier smooths by itself, and two smoothings are slower and no calmer.
        self.phases.update(report.attention_diag, loss.z, self._drop(loss))

    def _drop(self, loss: Trend) -> float:
        """How far the loss has come down, in units of its noise."""
        if self._first_level is None or not self._first_level > loss.level:
            return 0.0
        fallen = self._first_level - loss.level
        return fallen / loss.noise if loss.noise > 0.0 else math.inf

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""
        return {
            "series": {name: [list(pair) for pair in values] for name, values in self._series.items()},
            "attention": None if self._attention is None else list(astuple(self._attention)),
            "best_attention": self.best_attention_diag,
            "first_seen": list(self._first_seen),
            "first_level": self._first_level,
            "scalars": dict(self._scalars),
            "nonfinite_run": self._nonfinite_run,
            "nonfinite_losses": self._nonfinite_losses,
            "step": self._step,
            "phases": self.phases.state_dict(),
            "forecaster": None if self._forecaster is None else self._forecaster.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        attention, first_level = state["attention"], state["first_level"]
        if attention is not None and len(attention) != len(fields(AttentionReport)):
            raise ValueError("state of the attention report has another length; it is of another version")
        scalars = {name: float(state["scalars"][name]) for name in self._scalars}
        self.phases.load_state_dict(state["phases"])
        # A run may be resumed with the forecasts switched on or off: they then begin anew.
        if self._forecaster is not None and state["forecaster"] is not None:
            self._forecaster.load_state_dict(state["forecaster"])
        self._series = {
            name: deque(((int(s), float(v)) for s, v in values), maxlen=self._history_size)
            for name, values in state["series"].items()
        }
        self._attention = None if attention is None else AttentionReport(*(float(v) for v in attention))
        self.best_attention_diag = float(state["best_attention"])
        self._first_seen = [float(value) for value in state["first_seen"]]
        self._first_level = None if first_level is None else float(first_level)
        self._scalars = scalars
        self._nonfinite_run = int(state["nonfinite_run"])
        self._nonfinite_losses = int(state["nonfinite_losses"])
        self._step = int(state["step"])


def _sane(value: float) -> bool:
    return abs(value) <= _LARGEST  # False for NaN
