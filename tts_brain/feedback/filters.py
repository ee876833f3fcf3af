"""The Kalman filters of one run: the judged loss, the gradient norm and the attention, and what moves did to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tts_brain.feedback.kalman import MetricFilter
from tts_brain.types import GUIDED_WEIGHT, KNOBS, LEARNING_RATE, FilterReport, Observation

LOSS, GRAD_NORM, ATTENTION = "loss", "grad_norm", "attention_diag"
# The moves strong enough that an effect can be told from noise within a trial.
STEERED = (LEARNING_RATE, GUIDED_WEIGHT)
_SMALL = 1e-9


class RunFilters:
    """Feeds each step to the filters.

    Args:
        loss: name of the loss that moves are judged by.

    Attributes:
        reports: newest report by metric: ``loss``, ``grad_norm`` (natural logarithm), ``attention_diag``; those seen.
    """

    def __init__(self, loss: str = "mel") -> None:
        self._loss = loss
        self._filters = {
            # A loss may have any zero and unit, negative too: shifting or scaling it changes no decision.
            LOSS: MetricFilter("identity", STEERED, "lower"),
            GRAD_NORM: MetricFilter("identity", STEERED, "lower"),
            ATTENTION: MetricFilter("logit", STEERED, "higher"),
        }
        self._unseen: dict[str, dict[str, float]] = {name: {} for name in self._filters}
        self._knobs: dict[str, float] = {}
        self.reports: dict[str, FilterReport] = {}

    def metric(self, name: str) -> MetricFilter:
        """The filter of ``loss``, ``grad_norm`` or ``attention_diag``."""
        return self._filters[name]

    def observe(self, observation: Observation, knobs: Mapping[str, float]) -> None:
        """Take in one step, made with ``knobs``."""
        self._note_moves(knobs)
        loss = observation.losses.get(self._loss)
        self._update(LOSS, observation.step, loss)
        norm = observation.grad_norm
        self._update(GRAD_NORM, observation.step, _log(norm))
        if observation.attention is not None:
            self._update(ATTENTION, observation.step, observation.attention.attention_diag)

    def _note_moves(self, knobs: Mapping[str, float]) -> None:
        for name in STEERED:
            new, old = knobs.get(name), self._knobs.get(name)
            if new is not None and old is not None and new != old:
                for moves in self._unseen.values():
                    moves[name] = moves.get(name, 0.0) + KNOBS[name].move(old, new)
        self._knobs = {name: knobs[name] for name in STEERED if name in knobs}

    def _update(self, name: str, step: int, value: float | None) -> None:
        moves = {knob: move for knob, move in self._unseen[name].items() if abs(move) > _SMALL}
        self._unseen[name] = {}
        report = self._filters[name].update(step, value, moves)
        if report is not None:
            self.reports[name] = report

    @property
    def effects(self) -> dict[str, dict[str, tuple[float, float]]]:
        """By metric and knob: (mean, standard deviation), as ``MetricFilter.effect``; knobs never turned left out."""
        found = {
            name: {knob: one.effect(knob) for knob in STEERED if one.effect(knob)[1] > 0.0}
            for name, one in self._filters.items()
        }
        return {name: effects for name, effects in found.items() if effects}

    def helped(self, metric: str, moves: Mapping[str, tuple[float, float]]) -> float:
        """Probability that ``moves`` (from, to) made the metric's slope better than it would be; 0.5 is "no idea"."""
        sizes = {name: KNOBS[name].move(old, new) for name, (old, new) in moves.items() if name in STEERED}
        return self._filters[metric].helped(sizes)

    def seen(self, metric: str) -> int:
        """Usable values of the metric so far."""
        return self._filters[metric].count

    def begin_anew(self) -> None:
        """The losses mean something else now, or earlier weights are back."""
        for name in (LOSS, GRAD_NORM):
            self._filters[name].reset()
            self.reports.pop(name, None)
            self._unseen[name] = {}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings."""
        return {
            "filters": {name: one.state_dict() for name, one in self._filters.items()},
            "unseen": {name: dict(moves) for name, moves in self._unseen.items()},
            "knobs": dict(self._knobs),
            "reports": {name: [getattr(r, f) for f in FilterReport.__slots__] for name, r in self.reports.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError, KeyError, TypeError: not such a state; filters may be changed then (the manager puts all back).
        """
        unseen = {name: {k: float(v) for k, v in state["unseen"][name].items()} for name in self._filters}
        knobs = {name: float(value) for name, value in state["knobs"].items()}
        if not all(0.0 < value < math.inf for value in knobs.values()):
            raise ValueError(f"knobs that the filters saw are {knobs}; positive and finite ones are needed")
        reports = {name: _report(values) for name, values in state["reports"].items()}
        for name, one in self._filters.items():
            one.load_state_dict(state["filters"][name])
        if set(reports) != {name for name, one in self._filters.items() if one.count}:
            raise ValueError(f"filter reports are of {sorted(reports)}, which are not the filters that saw values")
        self._unseen, self._knobs, self.reports = unseen, knobs, reports


def _report(values: Sequence[Any]) -> FilterReport:
    step, *numbers, changed, count = values
    if not isinstance(changed, bool):
        raise ValueError(f"report of a filter has changed={changed!r}; it is true or false")
    level, level_std, slope, slope_std, noise, surprise, shift = (float(number) for number in numbers)
    return FilterReport(
        int(step), level, level_std, slope, slope_std, noise, surprise, shift, changed=changed, count=int(count)
    )


def _log(norm: float | None) -> float | None:
    return math.log(max(norm, 1e-12)) if norm is not None and 0.0 <= norm < math.inf else None
