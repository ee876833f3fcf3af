"""Did the last move help? Judged only on what was seen after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np

from tts_brain.context.reading import FALLS, slope_z
from tts_brain.context.trends import noise_level, trend
from tts_brain.feedback.filters import LOSS, RunFilters
from tts_brain.types import KNOBS, LEARNING_RATE, Observation, TrainingContext

_HARM_Z = 2.0
_SPIKES_MORE = 0.2
_ATTENTION_LOST = 0.1
_LAST_BAD = 5
_FEWEST = 4
_RISING_Z = 3.0
# Probability that a move of the rate helped, under which it is taken back. A milder limit, 0.15 at the end of the
# trial, took back more bad ones, and raises from far too low a rate too (docs/components.md).
_HELPED_NOT = 0.05
# Losses seen before the move that its verdict must rest on: the first steps of a run fall as they never will again.
_FILTER_SETTLED = 40
# Standard error of a median over that of a mean, under normal noise.
_MEDIAN_ERROR = 1.25


@dataclass(frozen=True, slots=True)
class Trial:
    """A move under observation.

    Args:
        step: optimizer step of the move; values up to and including it are "before".
        moves: knob name to (from, to).
        attention_diag: smoothed, at the move; NaN if not measured.
        grad_spikes: at the move.
        loss_level: at the move; NaN when too little had been seen of the loss.
        loss_slope: rise per step up to the move; 0 unless the loss was surely rising.
        loss_noise: of one value, before the move.
        loss_count: values that the level rests on.
        loss_seen: values that the filter of the loss had seen.
    """

    step: int
    moves: Mapping[str, tuple[float, float]]
    attention_diag: float
    grad_spikes: float
    loss_level: float = math.nan
    loss_slope: float = 0.0
    loss_noise: float = 0.0
    loss_count: int = 0
    loss_seen: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """``kept`` is None while it is too early to say."""

    kept: bool | None
    reason: str
    evidence: Mapping[str, float]


class FeedbackLoopManager:
    """Watches one move at a time, and the run as a whole.

    Args:
        trial_steps: how many steps a move is watched before it is judged; half of them before there is an alignment.
        divergence_sigmas: rise above the best level, in noise units, that counts as divergence.
        lost_alignment_steps: how long ``attention_diag`` must stay under half its best.
        loss: name of the loss that moves are judged by.

    Attributes:
        trial: the move under observation, or None.
        filters: level, slope and effect of moves, filtered.
    """

    def __init__(
        self,
        trial_steps: int = 20,
        divergence_sigmas: float = 8.0,
        lost_alignment_steps: int = 50,
        loss: str = "mel",
    ) -> None:
        self._trial_steps = trial_steps
        self._sigmas = divergence_sigmas
        self._lost_steps = lost_alignment_steps
        self._best_level = math.inf
        self._lost_since: int | None = None
        self.trial: Trial | None = None
        self.filters = RunFilters(loss)

    def observe(self, observation: Observation, knobs: Mapping[str, float]) -> None:
        """Take in one step, made with ``knobs``."""
        self.filters.observe(observation, knobs)

    def open(
        self,
        step: int,
        moves: Mapping[str, tuple[float, float]],
        context: TrainingContext,
        series: Sequence[tuple[int, float]],
    ) -> None:
        """Start watching a move; the loss ``series`` (step, value) says from what level.

        The level is that of the newest quarter, not of all the steps before, whose mean is too low a bar after a rise
        and too high a one after a fall. It is kept here, as the history may have forgotten it when it is time to judge.
        """
        before = [(s, v) for s, v in series if step - self._trial_steps < s <= step and math.isfinite(v)]
        attention = math.nan if context.attention is None else context.attention.attention_diag
        self.trial = Trial(step, dict(moves), attention, context.grad_spikes, loss_seen=self.filters.seen(LOSS))
        if len(before) >= _FEWEST:
            course = trend([s for s, _ in before], [v for _, v in before])
            slope = course.slope if course.z > _RISING_Z else 0.0
            newest = before[-max(_FEWEST + 1, len(before) // 4) :]
            self.trial = replace(
                self.trial,
                loss_level=median(v - slope * (s - step) for s, v in newest),
                loss_slope=slope,
                loss_noise=course.noise,
                loss_count=len(newest),
            )

    def judge(self, context: TrainingContext, series: Sequence[tuple[int, float]]) -> Judgement:
        """Judge the open trial on the loss ``series`` (step, value) and the context.

        Harm is a median loss after the move above the level at it by more than two standard errors, a worse slope that
        the filter puts down to the moved rate, clearly more gradient spikes, or a clear loss of alignment. Training
        should make a loss fall, so "no better" within the noise is kept and the trend decides later. A mean would let
        one spike decide. A loss that was rising may go on as it was: else the lowered rate that has not yet stopped a
        divergence would be taken back.
        """
        trial = self.trial
        if trial is None:
            return Judgement(None, "no move under observation", {})
        after = [(s, v) for s, v in series if s > trial.step and math.isfinite(v)]
        # Without a level at the move (the losses had just begun anew) only gradients and attention can be judged.
        blind = math.isnan(trial.loss_level)
        helped = self._helped(trial, context)
        said = {"helped": round(helped, 6)}  # the last digits hang on the loss's unit, and no record of a decision may
        seen_for = context.step - trial.step
        # Before there is an alignment to lose, half a trial without harm is enough: the search of the rate is what
        # the way to the first alignment waits for.
        length = self._trial_steps if context.phase.index else (self._trial_steps + 1) // 2
        if helped < _HELPED_NOT and 2 * seen_for >= self._trial_steps:
            return Judgement(False, f"the loss falls less for the move (helped: {helped:.0%})", said)
        if seen_for < length or (len(after) < _FEWEST and not blind):
            return Judgement(None, "too early to judge the last move", {})
        z = math.nan if blind else _rise_z(trial, after)
        said |= {"loss_change_z": round(z, 6), "spikes_before": trial.grad_spikes, "spikes_after": context.grad_spikes}
        if z > _HARM_Z:
            return Judgement(False, f"the loss is higher after the move than before (z {z:+.1f})", said)
        if context.grad_spikes > trial.grad_spikes + _SPIKES_MORE:
            return Judgement(False, "gradients spike since the move", said)
        now = math.nan if context.attention is None else context.attention.attention_diag
        said |= {"attention_before": trial.attention_diag, "attention_after": now}
        if trial.attention_diag - now > _ATTENTION_LOST:
            return Judgement(False, f"attention_diag fell {trial.attention_diag:.2f} → {now:.2f}", said)
        seen = "the losses began anew" if blind else f"the loss after the move is no higher (z {z:+.1f})"
        return Judgement(True, f"{seen}, gradients and attention are no worse", said)

    def _helped(self, trial: Trial, context: TrainingContext) -> float:
        """Probability that the move of the rate made the loss fall faster; 0.5 where that cannot be said.

        Other knobs change what the loss is made of or help the attention first, so that the loss is no judge of them.
        """
        old, new = trial.moves.get(LEARNING_RATE, (1.0, 1.0))
        # A lowered rate that has not yet stopped a divergence would else be taken back.
        if new == old or (new < old and trial.loss_slope > 0.0) or trial.loss_seen < _FILTER_SETTLED:
            return 0.5
        # Every loss falls less and less: as long as it surely falls, a raise is not to blame for that.
        z = slope_z(context)
        if new > old and z is not None and z < FALLS:
            return 0.5
        return self.filters.helped(LOSS, {LEARNING_RATE: (old, new)})

    def close(self) -> None:
        """Stop watching."""
        self.trial = None

    def broken(self, context: TrainingContext, series: Sequence[tuple[int, float]]) -> str | None:
        """One sentence if the run has diverged or lost its alignment for good, else None. Call once per decision."""
        # The newest that are finite: a clip that is always bad must not hide a loss that stands high between.
        values = [v for _, v in series if math.isfinite(v)]
        recent, older = values[-_LAST_BAD:], values[:-_LAST_BAD]
        if len(older) >= 2 * _LAST_BAD:
            noise = noise_level(np.asarray(older))
            level = median(recent)
            self._best_level = min(self._best_level, median(older[-2 * _LAST_BAD :]))
            if noise > 0 and min(recent) > self._best_level + self._sigmas * noise:
                return f"the loss stands {(level - self._best_level) / noise:.0f} noise widths above its best"
        return self._lost(context)

    @property
    def losing(self) -> bool:
        """At the newest decision ``attention_diag`` was under half of its best."""
        return self._lost_since is not None

    def _lost(self, context: TrainingContext) -> str | None:
        best = context.best_attention_diag
        if context.attention is None or best < 0.5 or context.attention.attention_diag >= 0.5 * best:
            self._lost_since = None
            return None
        if self._lost_since is None:
            self._lost_since = context.step
        if context.step - self._lost_since < self._lost_steps:
            return None
        return f"the alignment was {best:.2f} and has been under half of that for {self._lost_steps} steps"

    def reset_baseline(self) -> None:
        """Forget the best level: the loss means something else now, or the run was rolled back."""
        self._best_level = math.inf
        self._lost_since = None
        self.trial = None
        self.filters.begin_anew()

    def state_dict(self) -> dict[str, Any]:
        return {
            "filters": self.filters.state_dict(),
            "best_level": self._best_level,
            "lost_since": self._lost_since,
            "trial": None if self.trial is None else asdict(self.trial),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trial, lost_since = state["trial"], state["lost_since"]
        trial = None if trial is None else _trial_from(trial)
        self.filters.load_state_dict(state["filters"])
        self._best_level = float(state["best_level"])
        self._lost_since = None if lost_since is None else int(lost_since)
        self.trial = trial


def _rise_z(trial: Trial, after: Sequence[tuple[int, float]]) -> float:
    """Rise of the loss since the move, beyond the way it was going, in standard errors."""
    beyond = [v - trial.loss_slope * (s - trial.step) for s, v in after]
    # The first half of the window is the transient.
    settled = beyond[len(beyond) // 2 :]
    noise = max(trial.loss_noise, noise_level(np.asarray([v for _, v in after])))
    error = _MEDIAN_ERROR * noise * math.sqrt(1.0 / trial.loss_count + 1.0 / len(settled))
    rise = median(settled) - trial.loss_level
    if error > 0:
        return rise / error
    return math.copysign(100.0, rise) if rise else 0.0


def _trial_from(state: Mapping[str, Any]) -> Trial:
    moves = {name: (float(old), float(new)) for name, (old, new) in state["moves"].items()}
    for name, pair in moves.items():
        if name not in KNOBS or not all(0.0 < v < math.inf for v in pair):
            raise ValueError(f"move of {name!r} on trial is {pair}; no such knob, or not positive")
    trial = Trial(
        step=int(state["step"]),
        moves=moves,
        attention_diag=float(state["attention_diag"]),
        grad_spikes=float(state["grad_spikes"]),
        loss_level=float(state["loss_level"]),
        loss_slope=float(state["loss_slope"]),
        loss_noise=float(state["loss_noise"]),
        loss_count=int(state["loss_count"]),
        loss_seen=int(state["loss_seen"]),
    )
    if trial.loss_count < 1 and math.isfinite(trial.loss_level):
        raise ValueError("the move on trial has a loss level that rests on no values")
    return trial
