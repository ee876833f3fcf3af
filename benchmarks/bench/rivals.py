"""What people do today instead of the brain: hand-made schedules, ReduceLROnPlateau, and the old AutoFixManager.

The loss-balancing rivals are in ``rivals_scalarised.py``, population-based training in ``population.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from bench.arms import Plain
from bench.host import Training

HAND_START, HAND_END = 100.0, 5.0
# Shares of the run: how long the full weight stays, and how far apart the halvings are.
HAND_HOLD, HAND_EVERY = 0.4, 0.1


def hand_weight(step: int, steps: int, start: float = HAND_START, end: float = HAND_END) -> float:
    """Guided weight of the hand-made schedule: ``start``, halved at 0.4, 0.5, … of the run, never below ``end``."""
    # Rounded, as 0.7 - 0.4 is not quite three times 0.1.
    halvings = math.floor(round((step / steps - HAND_HOLD) / HAND_EVERY, 9)) + 1
    return max(end, start * 0.5 ** max(0, halvings))


def hand_decayed(
    steps: int | None = None, rate: float | None = None, guided: float = HAND_START, forward_sum: float = 0.0
) -> Plain:
    """Strong guidance while attention forms, then halved step by step, by the clock alone.

    Weight 100 is where the pilot runs (FACTS.md, 5) reach a diagonal at once and still form a true alignment; 300
    skips tokens. It is halved down to 5, as in the best of them. At constant weight the alignment of real speech came
    at 0.15 (rate 2e-3) to 0.85 (1e-3) of the run, so 0.4 lies between letting go too early and not at all. The last
    fifth, at 5, is there because guidance kept too long harms long sentences (mozilla/TTS#13).

    Args:
        steps: length of the schedule; None takes the run's.
        rate: constant; None leaves the setting's.
        guided: first weight, in the host's units.
        forward_sum: as in ``Plain``.
    """

    def schedule(run: Training, step: int) -> None:
        run.tts.attn_loss.alpha = hand_weight(step, steps or run.setting.steps, guided, min(guided, HAND_END))

    return Plain(guided=guided, rate=rate, forward_sum=forward_sum, schedule=schedule)


def sabotaged(factor: float = 0.01) -> Plain:
    """Self-check of the benchmark: the host's default with a hundredth of the rate must be seen as worse."""

    def schedule(run: Training, step: int) -> None:
        run.set_rate(factor * run.setting.rate)

    return Plain(schedule=schedule)


class Watching(Plain):
    """A rival that is shown loss and gradient norm of each step before the next one: what the host's log has."""

    _reporter: Any = None
    _seen: int = 0

    def see(self, run: Training, loss: float, grad_norm: float) -> None:
        """One finished step; may turn anything."""
        raise NotImplementedError

    def step(self, run: Training, step: int) -> None:
        super().step(run, step)
        self._catch_up(run)

    @contextmanager
    def epoch(self, run: Training, reporter: Any) -> Iterator[None]:
        self._reporter, self._seen = reporter, 0
        yield
        self._catch_up(run)  # the last step of the stretch has no next one

    def _catch_up(self, run: Training) -> None:
        losses, norms = self._reporter.stats.get("loss", []), self._reporter.stats.get("grad_norm", [])
        for number in range(self._seen, len(losses)):
            # The host logs no norm while there has been none that is finite.
            norm = float(norms[number].value) if number < len(norms) else math.nan
            self.see(run, float(losses[number].value), norm)
        self._seen = len(losses)


class Plateau(Watching):
    """torch's ReduceLROnPlateau on the mean training loss of each ``every`` steps.

    ESPnet's own recipes that use it have factor 0.5 and patience 1 (``scheduler: reducelronplateau``); torch's default
    patience of 10 epochs would never come due in a short run. The smallest rate and the threshold are torch's.
    """

    def __init__(
        self,
        every: int = 50,
        factor: float = 0.5,
        patience: int = 1,
        **constants: float,
    ) -> None:
        super().__init__(**constants)
        self.every, self.factor, self.patience = every, factor, patience
        self._losses: list[float] = []
        self._scheduler: ReduceLROnPlateau | None = None

    def attach(self, run: Training) -> None:
        super().attach(run)
        self._scheduler = ReduceLROnPlateau(run.optimizer, factor=self.factor, patience=self.patience)

    def see(self, run: Training, loss: float, grad_norm: float) -> None:
        assert self._scheduler is not None
        self._losses.append(loss)
        if len(self._losses) == self.every:
            # As ESPnet's reporter: a step that broke is left out of the mean.
            self._scheduler.step(fmean([value for value in self._losses if math.isfinite(value)] or [math.inf]))
            self._losses.clear()


def plateau(**constants: float) -> Plateau:
    """ReduceLROnPlateau as ESPnet's recipes set it, an epoch of 50 steps; ``constants`` as in ``Plain``, else the
    host's."""
    return Plateau(**constants)


class AutoFix(Watching):
    """A small model of the user's old AutoFixManager, rule by rule as DESIGN.md tells it.

    - "the guided weight jumped 4.5 → 10 → 8": *loss does not fall* sets 10 at once; *unstable* takes 10 to 8 at once.
    - "the rate 1e-3 → 2.5e-5 within a few steps": each further verdict halves it, down to that floor.
    - "set off chains of fixes": a fix empties the history, so the next verdict rests on a few noisy batches again;
      and a lower rate makes the loss fall less, which is what the rule that lowered it looks for.
    - "ignored phase and attention quality": it reads the total loss and the gradient norm, nothing else.
    - "could not undo": nothing is judged afterwards; 4.5 never comes back, the rate never rises.
    - "weight erratic": with the rate at its floor, the two rules that are left move the weight between 8 and 10.

    How large a change counts is not handed down. The values are set by the story: on kathleen, batch 16, they fire
    from step 17 to 66 until the rate is at its floor, and make about the ten interventions in 150 steps that the user
    counted. No rule runs by the clock: a loss that falls steadily is left alone.

    Attributes:
        fixes: what was done, in words, in order.
    """

    WINDOW = 4
    FLOOR = 2.5e-5
    # "Does not fall": by less than 2 % between two windows. "Unstable": norm 40 % over its mean, or loss up by 10 %.
    FALL, NORM, RISE = 0.98, 1.4, 1.1

    def __init__(self) -> None:
        super().__init__(guided=4.5, rate=1e-3)
        self.fixes: list[str] = []
        self._losses: list[float] = []
        self._norms: list[float] = []

    def see(self, run: Training, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._losses.append(loss)
            self._norms.append(grad_norm)
            if len(self._losses) < 2 * self.WINDOW:
                return
            older = fmean(self._losses[-2 * self.WINDOW : -self.WINDOW])
            unstable = grad_norm > self.NORM * fmean(self._norms[:-1]) or loss > self.RISE * older
            stuck = fmean(self._losses[-self.WINDOW :]) > self.FALL * older
        else:
            unstable, stuck = True, False
        done = self._unstable(run) if unstable else self._stuck(run) if stuck else []
        if done:
            self.fixes += done
            self._losses.clear()
            self._norms.clear()

    def _unstable(self, run: Training) -> list[str]:
        done = self._halve(run)
        return done + (self._set_guided(run, 8.0) if run.tts.attn_loss.alpha == 10.0 else [])

    def _stuck(self, run: Training) -> list[str]:
        if run.tts.attn_loss.alpha < 8.0:
            return self._set_guided(run, 10.0)
        return self._halve(run) or (self._set_guided(run, 10.0) if run.tts.attn_loss.alpha == 8.0 else [])

    def _set_guided(self, run: Training, weight: float) -> list[str]:
        before, run.tts.attn_loss.alpha = run.tts.attn_loss.alpha, weight
        return [f"guided {before:g} -> {weight:g}"]

    def _halve(self, run: Training) -> list[str]:
        rate = run.optimizer.param_groups[0]["lr"]
        lower = max(self.FLOOR, 0.5 * rate)
        if lower >= rate:
            return []
        run.set_rate(lower)
        return [f"rate {rate:g} -> {lower:g}"]
