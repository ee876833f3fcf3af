"""Did the last move help? Judged only on what was seen after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from tts_brain.context.trends import noise_level
from tts_brain.types import TrainingContext

_HARM_Z = 2.0
_SPIKES_MORE = 0.2
_ATTENTION_LOST = 0.1
_LAST_BAD = 5


@dataclass(frozen=True, slots=True)
class Trial:
    """A move under observation.

    Args:
        step: optimizer step of the move; values up to and including it are "before".
        moves: knob name to (from, to).
        attention_diag: smoothed, at the move; NaN if not measured.
        grad_spikes: at the move.
    """

    step: int
    moves: Mapping[str, tuple[float, float]]
    attention_diag: float
    grad_spikes: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """``kept`` is None while it is too early to say."""

    kept: bool | None
    reason: str
    evidence: Mapping[str, float]


class FeedbackLoopManager:
    """Watches one move at a time, and the run as a whole.

    Args:
        trial_steps: how many steps a move is watched before it is judged.
        divergence_sigmas: rise above the best level, in noise units, that counts as divergence.
        lost_alignment_steps: how long ``attention_diag`` must stay under half its best.
    """

    def __init__(self, trial_steps: int = 20, divergence_sigmas: float = 8.0, lost_alignment_steps: int = 50) -> None:
        self._trial_steps = trial_steps
        self._sigmas = divergence_sigmas
        self._lost_steps = lost_alignment_steps
        self._best_level = math.inf
        self._lost_since: int | None = None
        self.trial: Trial | None = None

    def open(self, step: int, moves: Mapping[str, tuple[float, float]], context: TrainingContext) -> None:
        """Start watching a move."""
        attention = context.attention
        self.trial = Trial(
            step, dict(moves), math.nan if attention is None else attention.attention_diag, context.grad_spikes
        )

    def judge(self, context: TrainingContext, series: Sequence[tuple[int, float]]) -> Judgement:
        """Judge the open trial on the loss ``series`` (step, value) and the context.

        Harm is a mean loss after the move above that before it by more than two standard errors, clearly more
        gradient spikes, or a clear loss of alignment. Training should make a loss fall, so "no better" within the
        noise is kept and the trend decides later.
        """
        trial = self.trial
        if trial is None:
            return Judgement(None, "no move under observation", {})
        before = [v for s, v in series if trial.step - self._trial_steps < s <= trial.step and math.isfinite(v)]
        after = [v for s, v in series if s > trial.step and math.isfinite(v)]
        if context.step - trial.step < self._trial_steps or len(before) < 4 or len(after) < 4:
            return Judgement(None, "too early to judge the last move", {})
        # The first half of the window is the transient.
        settled = after[len(after) // 2 :]
        noise = max(noise_level(np.asarray(before)), noise_level(np.asarray(after)))
        error = noise * math.sqrt(1.0 / len(before) + 1.0 / len(settled))
        rise = fmean(settled) - fmean(before)
        z = rise / error if error > 0 else math.copysign(100.0, rise) if rise else 0.0
        evidence = {"loss_change_z": z, "spikes_before": trial.grad_spikes, "spikes_after": context.grad_spikes}
        if z > _HARM_Z:
            return Judgement(False, f"the loss is higher after the move than before (z {z:+.1f})", evidence)
        if context.grad_spikes > trial.grad_spikes + _SPIKES_MORE:
            return Judgement(False, "gradients spike since the move", evidence)
        now = math.nan if context.attention is None else context.attention.attention_diag
        evidence |= {"attention_before": trial.attention_diag, "attention_after": now}
        if trial.attention_diag - now > _ATTENTION_LOST:
            return Judgement(False, f"attention_diag fell {trial.attention_diag:.2f} → {now:.2f}", evidence)
        return Judgement(True, f"the loss after the move is no higher (z {z:+.1f})", evidence)

    def close(self) -> None:
        """Stop watching."""
        self.trial = None

    def broken(self, context: TrainingContext, series: Sequence[tuple[int, float]]) -> str | None:
        """One sentence if the run has diverged or lost its alignment for good, else None. Call once per decision."""
        recent = [v for _, v in series[-_LAST_BAD:] if math.isfinite(v)]
        older = [v for _, v in series[:-_LAST_BAD] if math.isfinite(v)]
        if len(recent) == _LAST_BAD and len(older) >= 2 * _LAST_BAD:
            noise = noise_level(np.asarray(older))
            level = median(recent)
            self._best_level = min(self._best_level, median(older[-2 * _LAST_BAD :]))
            if noise > 0 and min(recent) > self._best_level + self._sigmas * noise:
                return f"the loss stands {(level - self._best_level) / noise:.0f} noise widths above its best"
        return self._lost(context)

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

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_level": self._best_level,
            "lost_since": self._lost_since,
            "trial": None if self.trial is None else asdict(self.trial),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        trial = state["trial"]
        if trial is not None:
            moves = {k: (float(a), float(b)) for k, (a, b) in trial["moves"].items()}
            trial = Trial(int(trial["step"]), moves, float(trial["attention_diag"]), float(trial["grad_spikes"]))
        self._best_level = float(state["best_level"])
        self._lost_since = state["lost_since"]
        self.trial = trial
