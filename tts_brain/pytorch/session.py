"""What every PyTorch host's adapter shares: the manager with its journal, knobs, guard, snapshots and sidecar.

An adapter has four duties — show what a step did (``after_step``), turn the knobs (read ``knobs``), save and load
(``save``, ``load``), and detach (``close``) — and one promise, kept here: a fault of the brain is written down, the
brain steps aside, the training goes on.
"""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tts_brain.attention.metrics import report
from tts_brain.config import BrainConfig
from tts_brain.feedback.rollback import RandomStates, RollbackManager, Stateful
from tts_brain.journal import FORMAT_VERSION, Journal, to_plain, versions
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.buffers import BufferGuard
from tts_brain.pytorch.capture import StopTally, measure_some
from tts_brain.pytorch.optimizer import OptimizerTap
from tts_brain.report.terminal import one_decision
from tts_brain.statefile import StateFileError, load_state, save_state
from tts_brain.types import (
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    LEARNING_RATE,
    Capabilities,
    Decision,
    Mode,
    Observation,
    Verdict,
)

log = logging.getLogger("tts_brain")

SIDECAR_KIND = "brain"
SIDECAR_VERSION = 1


@dataclass
class _Step:
    """What has been seen of the optimizer step under way; several batches under gradient accumulation."""

    sums: dict[str, float]
    batches: int = 0
    attention: Tensor | None = None
    healed: list[str] = field(default_factory=list)


class BrainSession:
    """One run under one brain.

    Args:
        config: settings; ``off`` needs no session.
        capabilities: what the host can show and turn.
        folder: where journal, sidecars and disk snapshots go; made when missing.
        optimizers: hooked; the first one's steps are counted.
        model: its weights are guarded and, with ``parts``, snapshot.
        parts: what else a snapshot holds (optimizers, schedulers, scaler); a part that is None is left out. The brain
            and the random states are added.
        host_values: the host's own values of knobs whose neutral value only it knows.
        dashboard: called once per decision with (step, values) for the host's own logger.

    Raises:
        OSError: ``folder`` cannot be written.
    """

    def __init__(
        self,
        config: BrainConfig,
        capabilities: Capabilities,
        folder: Path,
        *,
        optimizers: list[torch.optim.Optimizer],
        model: torch.nn.Module,
        parts: Mapping[str, Stateful | None],
        host_values: Mapping[str, float] | None = None,
        dashboard: Callable[[int, Mapping[str, float]], None] | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.journal = Journal(folder)
        self.manager = ContextAwareTrainingManager(config, capabilities, host_values)
        self.active = True
        self.step = 0
        self._dashboard = dashboard
        self._taps = [OptimizerTap(o, guard=self.manager.moves_allowed, on_fault=self.fault) for o in optimizers]
        self._steps_seen = 0
        self._seen = _Step({})
        self._stop = StopTally()
        self._buffers = BufferGuard(model) if self.manager.moves_allowed else None
        self._parts: dict[str, Stateful | None] = {
            **parts,
            "model": model,
            "random": RandomStates(),
            "brain": self.manager,
        }
        self._snapshots = RollbackManager(
            snapshots=config.snapshots,
            budget_mb=config.snapshot_budget_mb,
            place=config.snapshot_place,
            folder=folder / "snapshots" if config.snapshot_place == "disk" else None,
        )
        self._snapshot_refused = False
        self._regime: dict[str, int] | None = None
        self._started = False
        self._resumed = False
        self._faulted = False

    @property
    def knobs(self) -> Mapping[str, float]:
        """Values to run with; empty when the host is to run as it would without the brain."""
        return self.manager.knobs if self.active and self.manager.moves_allowed else {}

    @property
    def wants_attention(self) -> bool:
        """Should the adapter show the attention of the step under way?"""
        return self.active and self._seen.attention is None and (self.step + 1) % self.config.attention_every == 0

    @contextmanager
    def fence(self) -> Iterator[None]:
        """Nothing that goes wrong inside reaches the training."""
        try:
            yield
        except Exception as error:
            self.fault(error)

    def fault(self, error: BaseException) -> None:
        """The brain steps aside for the rest of the run and says so."""
        if not self.active:
            return
        self.active = False
        self._faulted = True
        for tap in self._taps:
            tap.release()
        text = "".join(traceback.format_exception(error))
        log.error("[brain] fault of the brain, not of your run: it steps aside, the training goes on\n%s", text)
        try:
            self._event("fault", f"{type(error).__name__}: {error}", traceback=text)
        except Exception:
            log.exception("[brain] the fault could not be written to %s", self.journal.path)

    def see_attention(self, attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor) -> None:
        """Show the attention of the step under way: (B, T, N), lengths (B,) in decoder frames and tokens."""
        self._seen.attention = measure_some(attention, frame_lengths, token_lengths, self.config.attention_utterances)

    def see_stop_token(self, true_positive: Tensor, false_positive: Tensor, false_negative: Tensor) -> None:
        """Show the stop token's soft counts of one batch; kept on the device until the next decision."""
        self._stop.add(true_positive, false_positive, false_negative)

    def see_regime(self, regime: Mapping[str, int]) -> None:
        """Show what the host's losses mean at the step to come; when that changed, baselines start anew.

        Args:
            regime: whole numbers by name, such as the reduction factor. The first ones seen are the start, and a
                resume goes on with those of the sidecar.
        """
        before, self._regime = self._regime, dict(regime)
        if not self.active or before is None or before == self._regime:
            return
        self.manager.regime_changed()
        changed = [
            f"{name} {before.get(name)} → {value}" for name, value in regime.items() if before.get(name) != value
        ]
        self._event("regime_changed", ", ".join(changed))

    def heal(self) -> list[str]:
        """Put back running statistics that a NaN batch has poisoned; also before a host writes a checkpoint.

        Returns:
            Their names; empty when all were finite, and always in a mode that touches nothing.
        """
        return self._buffers.heal() if self._buffers is not None and self.active else []

    def after_batch(
        self,
        losses: Mapping[str, float],
        *,
        grad_norm: float | None = None,
        learning_rate: float | None = None,
        text_length: float | None = None,
        ends_step: bool = False,
    ) -> Decision | None:
        """Show one batch's raw losses; when it ended with an optimizer step, observe and, if due, decide.

        Batches that only accumulate gradients are averaged into the step they belong to.

        Args:
            ends_step: the host meant an optimizer step to follow, although a gradient scaler (fp16) may have left it
                out. After a NaN loss that is a skipped step, after a finite one the scaler looking for its scale.
        """
        if not self.active:
            return None
        self._start()
        for name, value in losses.items():
            self._seen.sums[name] = self._seen.sums.get(name, 0.0) + value
        self._seen.batches += 1
        # Not left to the optimizer step: a gradient scaler (fp16) leaves that out after a NaN batch.
        if not math.isfinite(losses["total"]):
            self._seen.healed += self.heal()
        tap = self._taps[0]
        left_out = tap.steps == self._steps_seen
        if left_out and not ends_step:
            return None
        self._steps_seen = tap.steps
        seen, self._seen = self._seen, _Step({})
        if left_out and math.isfinite(seen.sums["total"]):
            return None
        self.step += 1
        due = self.manager.due(self.step)
        skipped = left_out or any(t.skipped for t in self._taps)
        observation = Observation(
            step=self.step,
            losses={name: value / seen.batches for name, value in seen.sums.items()},
            grad_norm=math.nan if skipped else (grad_norm or _finite_or_none(tap.grad_norm)),
            learning_rate=learning_rate,
            update_ratio=_finite_or_none(tap.update_ratio),
            attention=None if seen.attention is None else report(seen.attention),
            stop=self._stop.take() if due else None,
            text_length=text_length,
            skipped=skipped,
        )
        return self._observe(observation, seen.healed)

    def _observe(self, observation: Observation, healed: list[str]) -> Decision | None:
        self.manager.observe(observation)
        if observation.skipped:
            healed = list(dict.fromkeys(healed + self.heal()))
            also = f"; running statistics put back: {', '.join(healed)}" if healed else ""
            self._event("skipped_gradient", f"a non-finite gradient was kept from the weights{also}")
        due = self.manager.due(self.step)
        if due or self.step % self.config.journal_every == 0 or self.step == 1:
            self.journal.write("observation", observation)
        if not due:
            return None
        for tap in self._taps:
            tap.watch_next()
        if self._buffers is not None:
            self._buffers.keep()
        decision = self.manager.decide()
        self.journal.write("decision", decision)
        self._announce(decision)
        if decision.verdict is Verdict.ROLL_BACK:
            self._roll_back(decision)
        elif self.manager.mode is Mode.FULL and decision.verdict is not Verdict.STOP:
            self._maybe_snapshot()
        self._turn_taps()
        self._show_dashboard(decision)
        return decision

    def _turn_taps(self) -> None:
        knobs = self.knobs
        clip = knobs.get(GRAD_CLIP, GRAD_CLIP_OFF)
        median = self.manager.context().grad_norm_median if clip < GRAD_CLIP_OFF else math.nan
        for tap in self._taps:
            tap.rate_multiplier = knobs.get(LEARNING_RATE, 1.0)
            tap.clip_norm = clip * median if math.isfinite(median) else math.inf

    def _maybe_snapshot(self) -> None:
        newest = self._snapshots.steps[-1] if self._snapshots.steps else None
        far_enough = newest is None or self.step - newest >= self.config.snapshot_every
        healthy = self.manager.analyzer.nonfinite_run == 0 and self.manager.feedback.trial is None
        # A first one at once, so that an early break has something to go back to: in a bad stretch too, as the guard
        # has kept its weights and statistics finite.
        if not far_enough or self._snapshot_refused or (newest is not None and not healthy):
            return
        if not self._snapshots.take(self.step, self._parts):
            self._snapshot_refused = True
            log.warning("[brain] no snapshots, so no rollback: %s", self._snapshots.last_refusal)
            self._event("no_snapshot", self._snapshots.last_refusal)

    def _roll_back(self, decision: Decision) -> None:
        count = self.manager.rollbacks_in_a_row + 1
        trial = self.manager.feedback.trial
        margin = self.config.trial_steps
        restored = self._snapshots.restore(self._parts, before=self.step - margin)
        if restored is None:
            restored = self._snapshots.restore(self._parts)
        self.manager.rolled_back(failed_at=self.step, count=count, restored=restored is not None, trial=trial)
        if restored is None:
            message = f"step {self.step}: {decision.reason}; there is no snapshot to go back to"
        else:
            message = (
                f"step {self.step}: {decision.reason}; the weights of step {restored} are back, the data since then "
                f"is passed over, rate multiplier {self.manager.knobs.get(LEARNING_RATE, 1.0):.3g}"
            )
        log.warning("[brain] %s", message)
        self._event("rollback", message, restored=restored)

    def save(self, path: Path) -> None:
        """Write the sidecar for a checkpoint of the host, atomically; none after a fault: the state is unsure then."""
        if self._faulted:
            return
        state = {"step": self.step, "regime": self._regime, "manager": self.manager.state_dict()}
        save_state(path, state, kind=SIDECAR_KIND, version=SIDECAR_VERSION)

    def load(self, path: Path, *, step_otherwise: int = 0) -> bool:
        """Go on from a sidecar. One that cannot be used is reported and left as it is; the brain then starts afresh.

        Args:
            step_otherwise: the step a fresh start counts from; the journal keeps what stands before it.

        Returns:
            True when the decisions continue.
        """
        try:
            state = load_state(path, kind=SIDECAR_KIND, version=SIDECAR_VERSION)
            step, regime = int(state["step"]), state["regime"]
            self.manager.load_state_dict(state["manager"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            ours = isinstance(error, StateFileError)  # these name the file and say what to do
            reason = str(error) if ours else f"{path}: {error}; delete the file to start the brain afresh"
            log.error("[brain] cannot go on from the earlier run, the brain starts afresh: %s", reason)
            self.step = step_otherwise
            self._start()
            self._event("resume_failed", reason)
            return False
        self.step, self._regime = step, regime
        self._snapshots.drop_after(self.step)
        self._resumed = True
        self._turn_taps()
        log.info("[brain] goes on at step %d", self.step)
        return True

    def close(self, message: str = "detached") -> None:
        """Take off all hooks and end the journal."""
        for tap in self._taps:
            tap.detach()
        self.active = False
        try:
            if self._started:
                self.journal.write("end", {"step": self.step, "message": message})
        finally:
            self.journal.close()

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        if not self._resumed:
            # Disk snapshots of an earlier run in this folder are of other weights.
            self._snapshots.drop_after(-1)
        self._turn_taps()
        record = {
            "step": self.step,
            "format": FORMAT_VERSION,
            "host": self.manager.capabilities.host,
            "mode": self.config.mode,
            "config": self.config.to_dict(),
            "capabilities": self.manager.capabilities,
            "versions": versions(),
        }
        self.journal.write("start", record)

    def _event(self, name: str, message: str, **more: Any) -> None:
        self.journal.write("event", {"step": self.step, "event": name, "message": message, **more})

    def _announce(self, decision: Decision) -> None:
        if decision.verdict is Verdict.STOP:
            log.error("[brain] %s", decision.reason)
        elif decision.moves:
            log.info("%s", one_decision(to_plain(decision)))

    def _show_dashboard(self, decision: Decision) -> None:
        if self._dashboard is None:
            return
        context = self.manager.context()
        values = {f"knob_{name}": value for name, value in decision.after.items()}
        values |= {"phase": float(context.phase.index), "certainty": context.certainty}
        if context.attention is not None:
            values |= {n: getattr(context.attention, n) for n in ("diagonality", "focus", "coverage", "attention_diag")}
        self._dashboard(self.step, values)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
