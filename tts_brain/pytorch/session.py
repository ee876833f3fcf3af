"""What every PyTorch host's adapter shares: the manager with its journal, knobs, guard, snapshots and sidecar.

An adapter has four duties — show what a step did (``after_batch``), turn the knobs (read ``knobs``), save and load
(``save``, ``load``), and detach (``close``) — and one promise, kept here: a fault of the brain is written down, the
brain steps aside, the training goes on.

In a data-parallel run every rank has a session. They meet once per decision (``pytorch/meeting.py``): what each saw
since the last meeting is merged, every rank decides on the same, and a checksum of the outcome is compared. When it
differs, or a rank is lost, all hold: the knobs stay those that were last agreed on. A rank whose brain fails keeps its
knobs until the next meeting, where all step aside together: until then, and after it, all train alike.
"""

from __future__ import annotations

import copy
import logging
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tts_brain.config import BrainConfig
from tts_brain.feedback.diagnosis import BatchFacts, Diagnosis
from tts_brain.feedback.rollback import RandomStates, Stateful
from tts_brain.journal import Journal, NoJournal
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.buffers import BufferGuard
from tts_brain.pytorch.capture import StopTally, measure_some
from tts_brain.pytorch.chronicle import Chronicle, Dashboard
from tts_brain.pytorch.meeting import Meeting
from tts_brain.pytorch.optimizer import OptimizerTap
from tts_brain.pytorch.ranks import Ranks, RanksLost
from tts_brain.pytorch.rescue import RanksParted, Rescue
from tts_brain.pytorch.sidecar import read_sidecar, write_sidecar
from tts_brain.pytorch.step import StepUnderWay
from tts_brain.statefile import StateFileError
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    LEARNING_RATE,
    Capabilities,
    Decision,
    Mode,
    Observation,
    Verdict,
)

log = logging.getLogger("tts_brain")

# Updates in a row that a gradient scaler may leave out while it looks for its scale: from 2^16 to 1 are 16 halvings.
_SCALE_SEARCH = 24


class BrainSession:
    """One run under one brain.

    Args:
        config: settings; ``off`` needs no session.
        capabilities: what the host can show and turn.
        folder: where journal, sidecars and disk snapshots go; made when missing.
        optimizers: hooked; the first one's steps are counted.
        model: its weights are guarded and, with ``parts``, snapshot.
        parts: what else a snapshot holds (optimizers, scaler), not what keeps the host's time; a part that is None is
            left out. The brain and the random states are added. A gradient scaler must be called ``scaler``.
        host_values: the host's own values of knobs whose neutral value only it knows.
        dashboard: called once per decision with (step, values) for the host's own logger.
        ranks: the processes of a data-parallel run; each makes its own session, at the same point.

    Attributes:
        active: False once the brain has stepped aside.
        step: optimizer steps so far.
        parts: as given, and may be added to before the first step.

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
        dashboard: Dashboard | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.manager = ContextAwareTrainingManager(config, capabilities, host_values)
        self.active = True
        self.step = 0
        self.parts: dict[str, Stateful | None] = {
            **parts,
            "model": model,
            "random": RandomStates(),
            "brain": self.manager,
        }
        self._model = model
        self._ranks = ranks or Ranks()
        self._meeting = Meeting(self._ranks, capabilities.losses, config.decide_every) if self._ranks.several else None
        self._chronicle = Chronicle(folder, self.manager, self._ranks, dashboard)
        self._taps = [OptimizerTap(o, guard=self.manager.moves_allowed, on_fault=self.fault) for o in optimizers]
        self._taps[0].most_rate = config.max_learning_rate
        self._steps_seen = 0
        self._under_way = StepUnderWay()
        self._total = 0.0
        self._finite = True  # the loss of the newest step
        self._searching = 0  # updates in a row that a gradient scaler has left out
        self._stop = StopTally()
        self._buffers = BufferGuard(model) if self.manager.moves_allowed else None
        self._rescue = Rescue(self.manager, self.parts, folder / "snapshots", self._ranks)
        self._pending: list[Observation] = []
        self._diagnosis = Diagnosis()
        self._regime: dict[str, int | str] | None = None
        self._started = False
        self._resumed = False
        self._faulted = False
        self._lost = ""

    @property
    def journal(self) -> Journal | NoJournal:
        """Where the run is written down."""
        return self._chronicle.journal

    @property
    def knobs(self) -> Mapping[str, float]:
        """Values to run with; empty when the host is to run as it would without the brain."""
        return self.manager.knobs if self.active and self.manager.moves_allowed else {}

    @property
    def wants_attention(self) -> bool:
        """Should the adapter show the attention of the step under way?"""
        due = (self.step + 1) % self.config.attention_every == 0
        return due and self._heard and self._under_way.attention is None

    @property
    def wants_rates(self) -> bool:
        """Should the adapter show how fast the clips of the step under way are spoken? All at first, then few."""
        return self._heard and (self._diagnosis.few_rates or (self.step + 1) % self.config.decide_every == 0)

    @property
    def believable_rates(self) -> tuple[float, float] | None:
        """Where transcripts are mixed up: tokens per frame, the least and the most, of clips to learn to align from."""
        return self._diagnosis.believable_rates

    @property
    def _heard(self) -> bool:
        return self.active and not self._faulted and not self._lost

    @contextmanager
    def fence(self) -> Iterator[None]:
        """Nothing that goes wrong inside reaches the training."""
        try:
            yield
        except Exception as error:
            self.fault(error)

    def fault(self, error: BaseException) -> None:
        """The brain steps aside for the rest of the run and says so; with other ranks, when they next meet."""
        if self._faulted or not self.active:
            return
        self._faulted = True
        text = "".join(traceback.format_exception(error))
        log.error("[brain] fault of the brain, not of your run: it steps aside, the training goes on\n%s", text)
        if self._meeting is None:
            self._step_aside()
        try:
            self._start()  # a journal tells what stands below its start
            self._chronicle.event(self.step, "fault", f"{type(error).__name__}: {error}", traceback=text)
        except Exception:
            log.exception("[brain] the fault could not be written to %s", self.journal.path)

    def _step_aside(self) -> None:
        self.active = False
        for tap in self._taps:
            tap.release()

    def see_attention(self, attention: Tensor, frame_lengths: Tensor, token_lengths: Tensor) -> None:
        """Show the attention of the step under way: (B, T, N), lengths (B,) in decoder frames and tokens."""
        few = self.config.attention_utterances
        self._under_way.attention = measure_some(attention, frame_lengths, token_lengths, few)

    def see_batch(self, facts: BatchFacts) -> None:
        """Show what the data of one batch are like; several of one step are put together."""
        before = self._under_way.facts
        if before is not None:
            facts = before.and_then(facts)
        self._under_way.facts = facts

    def see_stop_token(self, true_positive: Tensor, false_positive: Tensor, false_negative: Tensor) -> None:
        """Show the stop token's soft counts of one batch; kept on the device until the next decision."""
        self._stop.add(true_positive, false_positive, false_negative)

    def see_regime(self, regime: Mapping[str, int | str]) -> None:
        """Show what the host's losses mean at the step to come; when that changed, baselines start anew.

        Args:
            regime: whole numbers or words by name, such as the reduction factor, the same on every rank. The first ones
                seen are the start, and a resume goes on with those of the sidecar.
        """
        before, self._regime = self._regime, dict(regime)
        # A sidecar of an older version lacks a name that has come since.
        changed = [
            f"{name} {before[name]} → {now}" for name, now in regime.items() if before and before.get(name, now) != now
        ]
        if not self.active or before is None or not changed:
            return
        if self._meeting is not None and self._meeting.untold(self.step):
            self._share(self._meeting, deciding=False)  # what was seen so far belongs to the old regime
        self.manager.regime_changed()
        self._chronicle.event(self.step, "regime_changed", ", ".join(changed))

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

        Batches that only accumulate gradients are averaged into the step they belong to. A fault of the brain is not
        raised. With other ranks, all must call it for each batch, with a ``total`` that is finite on all or on none.

        Args:
            losses: ``total`` is required.
            learning_rate: asked only where the optimizer's rates are tensors.
            text_length: mean tokens per utterance of the batch.
            ends_step: the host meant an optimizer step to follow, although it, or a gradient scaler (fp16), may have
                left it out for a gradient that was not finite. With a scaler and a finite loss that is the scaler
                looking for its scale, and no step, up to 24 times in a row; else it is a skipped step.
        """
        if not self.active:
            return None
        with self.fence():
            self._start()
            self._under_way.add(losses, text_length)
            # Not left to the optimizer step: it may be left out after a NaN batch.
            if not math.isfinite(losses["total"]):
                self._under_way.healed += self.heal()
        left_out = self._ended_step(losses["total"], ends_step)
        if left_out is None or not self.active:
            return None
        skipped = left_out or any(tap.skipped for tap in self._taps)
        self.step += 1
        due = self._due(skipped)
        with self.fence():
            observation = self._under_way.observation(
                self.step,
                self._taps[0],
                skipped=skipped,
                grad_norm=grad_norm,
                learning_rate=learning_rate if math.isnan(self._taps[0].host_rate) else self._taps[0].host_rate,
                stop=self._stop if due else None,
            )
            self._say_skipped(observation)
            self._advise(observation, self._under_way.facts)
            self._pending.append(observation)
        self._under_way = StepUnderWay()
        if self._meeting is None:
            mine, self._pending = self._pending, []
            with self.fence():
                self._take_in(mine)
            due = self._due(skipped)
        return self._decide() if due and self.active else None

    def _ended_step(self, total: float, ends_step: bool) -> bool | None:
        """None while the step is under way, else whether the host left it out. The same on every rank."""
        self._total += total
        left_out = self._taps[0].steps == self._steps_seen
        if left_out and not ends_step:
            return None
        self._steps_seen = self._taps[0].steps
        total, self._total = self._total, 0.0
        self._finite = math.isfinite(total)
        self._searching = self._searching + 1 if left_out and self._finite else 0
        if 0 < self._searching <= _SCALE_SEARCH and self.parts.get("scaler") is not None:
            self._under_way = StepUnderWay()
            return None
        return left_out

    def _due(self, skipped: bool) -> bool:
        if self._meeting is None:
            return self.manager.due(self.step)
        return self._meeting.due(self.step, skipped=skipped, finite=self._finite)

    def _say_skipped(self, observation: Observation) -> None:
        if observation.skipped:
            healed = list(dict.fromkeys(self._under_way.healed + self.heal()))
            also = f"; running statistics put back: {', '.join(healed)}" if healed else ""
            self._chronicle.event(
                self.step, "skipped_gradient", f"a non-finite gradient was kept from the weights{also}"
            )

    def _advise(self, observation: Observation, facts: BatchFacts | None) -> None:
        """Each rank looks at its own data; what it finds changes nothing, so they need not agree."""
        # A host that keeps the warnings of later ranks to itself lets errors through.
        level = logging.WARNING if self._ranks.first else logging.ERROR
        analyzer = self.manager.analyzer
        if facts is not None and self._ranks.several:  # the gradients of all ranks' clips are averaged
            facts = replace(facts, clips=facts.clips * self._ranks.count)
        kept_in = self._taps[0].take_kept_in()
        for advice in self._diagnosis.look(
            observation, facts, analyzer.phases.phase, analyzer.best_attention_diag, kept_in
        ):
            log.log(level, "[brain] step %d: %s", self.step, advice.message)
            self._chronicle.event(self.step, "advice", advice.message, cause=advice.cause)
            turned = self.knobs.keys() & {GUIDED_WEIGHT, GUIDED_SIGMA, FORWARD_SUM_WEIGHT}
            if turned and advice.cause == "wrong transcripts" and self.believable_rates is not None:
                least, most = self.believable_rates
                message = (
                    "the guide and the forward-sum term look only at clips that have the text that is spoken in their "
                    f"time: {least:.3g} to {most:.3g} tokens per frame"
                )
                self._chronicle.event(self.step, "clips_left_out", message)
        # Of several ranks one might fail to, and their weights would part.
        if kept_in == "float16" and not self._ranks.several:
            self._hold_moments()

    def _hold_moments(self) -> None:
        held = [tap.hold_moments() for tap in self._taps]
        if any(held):
            message = (
                "Adam's second moments are kept in float16, where the squares of most gradients are 0 and the steps "
                "then far too large: gradients are scaled for the moments from here on, which begin anew"
            )
            log.warning("[brain] step %d: %s", self.step, message)
            self._chronicle.event(self.step, "moments_held", message)

    def _take_in(self, observations: Sequence[Observation], *, deciding: bool = False) -> None:
        for observation in observations:
            self.manager.observe(observation)
            due = observation.step == self.step and (deciding or (self._meeting is None and self._due(False)))
            if due or observation.step % self.config.journal_every == 0 or observation.step == 1:
                self._chronicle.observation(observation)

    def _share(self, meeting: Meeting, *, deciding: bool) -> str:
        """What all ranks saw since they last told each other goes to every rank's manager.

        Returns:
            Why nothing can be decided on it; empty when something can, or the brain has just stepped aside.
        """
        mine, self._pending = self._pending, []
        if self._lost:
            return self._lost
        try:
            told = meeting.tell(self.step, mine, failed=self._faulted)
        except RanksLost as error:
            return self._lose(error)
        if told.failed:
            self._step_aside_together("the brain of a rank has failed")
            return ""
        with self.fence():
            if told.refused:
                whose = f"not listened to, as they report of other steps: ranks {', '.join(map(str, told.refused))}"
                self._chronicle.event(self.step, "ranks_refused", whose, ranks=told.refused)
            self._take_in(told.seen, deciding=deciding)
        return "" if told.seen else "too few ranks report of the steps at hand"

    def _decide(self) -> Decision | None:
        """Decide, with all ranks, and carry it out; None when the brain has just stepped aside."""
        with self.fence():
            if self._buffers is not None:
                self._buffers.keep()
        if self._meeting is not None:
            self._meeting.decided(self.step)
            why = self._share(self._meeting, deciding=True)
            if why:
                return self._hold(why)
            if not self.active:
                return None
        decision = before = None
        with self.fence():
            for tap in self._taps:
                tap.watch_next()
            before = None if self._meeting is None else copy.deepcopy(self.manager.state_dict())
            decision = self.manager.decide()
        if self._meeting is not None:
            why = self._apart(self._meeting, "the ranks did not come to one decision")
            if why:
                return self._hold(why, before)
        if decision is None or not self.active:
            return None
        self._carry_out(decision)
        return None if self._faulted else decision

    def _apart(self, meeting: Meeting, otherwise: str) -> str:
        """Why the brain is not known to be in one state on every rank; empty when it is, or has just stepped aside."""
        state = None
        with self.fence():
            state = {"step": self.step, "regime": self._regime, "manager": self.manager.state_dict()}
        try:
            agreed = meeting.same_outcome(None if self._faulted else state)
        except RanksLost as error:
            return self._lose(error)
        if agreed is None:
            self._step_aside_together("the brain of a rank has failed")
        return otherwise if agreed is False else ""

    def _lose(self, error: RanksLost) -> str:
        """No rank can be asked any more: hold from here on, with the knobs that all had."""
        self._lost = str(error)
        log.error("[brain] %s: it holds its knobs where they are, the training goes on", error)
        with self.fence():
            self._chronicle.event(self.step, "rank_lost", self._lost)
        return self._lost

    def _hold(self, why: str, before: Mapping[str, Any] | None = None) -> Decision | None:
        """The decision where the ranks have none in common.

        Nothing is turned, not even to the same value: what the clip is measured in may be what they differ in.

        Args:
            before: state of the manager to go back to.
        """
        with self.fence():
            if before is not None:
                self.manager.load_state_dict(before)
            knobs, phase = dict(self.manager.knobs), self.manager.analyzer.phases.phase
            decision = Decision(self.step, Verdict.HOLD, phase, knobs, knobs, why, applied=self.manager.moves_allowed)
            self._chronicle.decision(decision)
            if not self._lost:
                log.warning("[brain] step %d: held, as %s", self.step, why)
            return None if self._faulted else decision
        return None

    def _step_aside_together(self, why: str) -> None:
        self._step_aside()
        self._faulted = True
        log.error("[brain] %s: it steps aside on all ranks, the training goes on", why)
        with self.fence():
            self._chronicle.event(self.step, "stepped_aside", why)

    def _carry_out(self, decision: Decision) -> None:
        with self.fence():
            self._turn_taps()
        # Before anything is written: the ranks wait for each other in it, and a full disk is one rank's own trouble.
        back = decision.verdict is Verdict.ROLL_BACK
        restored = self._roll_back() if back else None
        with self.fence():
            self._chronicle.decision(decision)
            if back:
                self._say_rolled_back(decision, restored)
            elif self.manager.mode is Mode.FULL and decision.verdict is not Verdict.STOP:
                refusal = self._rescue.maybe_take(self.step)
                if refusal:
                    log.warning("[brain] no snapshot: %s", refusal)
                    self._chronicle.event(self.step, "no_snapshot", refusal)
            self._chronicle.dashboard(self.step, decision)

    def _turn_taps(self) -> None:
        knobs = self.knobs
        # Before anything that might fail on one rank only: two rates would part the weights of the ranks for good.
        for tap in self._taps:
            tap.rate_multiplier = knobs.get(LEARNING_RATE, 1.0)
        clip = knobs.get(GRAD_CLIP, GRAD_CLIP_OFF)
        usual = self.manager.usual_grad_norm if clip < GRAD_CLIP_OFF else math.nan
        for tap in self._taps:
            tap.clip_norm = clip * usual if math.isfinite(usual) else math.inf

    def _roll_back(self) -> int | None:
        """Go back to a snapshot, with all ranks; the step restored, None without one."""
        if self._meeting is not None:
            self._meeting.forgive()
        restored = None
        try:
            restored = self._rescue.roll_back(self.step, self._taps[0].multiplier)
            if restored is not None and self._buffers is not None:
                self._buffers.keep()  # what it held were the statistics of the weights that broke
        except (RanksParted, RanksLost) as error:
            self._step_aside_together(str(error))
        except Exception as error:
            self.fault(error)
        with self.fence():
            self._turn_taps()
        return restored

    def _say_rolled_back(self, decision: Decision, restored: int | None) -> None:
        message = f"step {self.step}: {decision.reason}; "
        if restored is None:
            message += "there is no snapshot to go back to"
        else:
            message += (
                f"the weights of step {restored} are back, the data since then is passed over, rate multiplier "
                f"{self.manager.knobs.get(LEARNING_RATE, 1.0):.3g}"
            )
        log.warning("[brain] %s", message)
        knobs = dict(self.manager.knobs)
        self._chronicle.event(self.step, "rollback", message, restored=restored, knobs=knobs)

    def save(self, path: Path) -> None:
        """Write the sidecar for a checkpoint of the host, atomically; none after a fault: the state is unsure then.

        With other ranks, all must call it; one writes. Once a rank is lost, the state is the one last agreed on. A file
        that cannot be written is reported, and the one before it is left as it is.
        """
        if self._meeting is not None and self.active and self._meeting.untold(self.step):
            self._share(self._meeting, deciding=False)
        if self._faulted or not self._ranks.first:
            return
        state = {
            "step": self.step,
            "regime": self._regime,
            "manager": self.manager.state_dict(),
            "stop": self._stop.sums,
            "watching": [tap.watching for tap in self._taps],
            "diagnosis": self._diagnosis.state_dict(),
        }
        try:
            write_sidecar(path, state, self._model)
        except OSError as error:
            message = f"{path} cannot be written ({error}): a resume from this checkpoint would start the brain afresh"
            log.error("[brain] %s", message)
            self._chronicle.event(self.step, "not_saved", message)

    def load(self, path: Path, *, step_otherwise: int = 0) -> bool:
        """Go on from a sidecar. One that cannot be used is reported and left as it is; the brain then starts afresh.

        The host has loaded its weights before: a sidecar of other weights is one that cannot be used.

        With other ranks, all must call it; they step aside when it gave them different states.

        Args:
            step_otherwise: the step a fresh start counts from; the journal keeps what stands before it.

        Returns:
            True when the decisions continue.
        """
        loaded = False
        with self.fence():
            loaded = self._load(path, step_otherwise)
        if self._meeting is not None:
            decided_at = self.manager.last_decision if loaded else self.step
            analyzer = self.manager.analyzer
            self._meeting.goes_on(self.step, decided_at, (analyzer.nonfinite_run, analyzer.nonfinite_losses))
            why = self._apart(self._meeting, f"the ranks do not read one and the same {path}")
            if why:
                self._step_aside_together(why)
        return self.active and loaded

    def _load(self, path: Path, step_otherwise: int) -> bool:
        try:
            state = read_sidecar(path, self._model)
            step, regime = int(state["step"]), state["regime"]
            self.manager.load_state_dict(state["manager"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            ours = isinstance(error, StateFileError)  # these name the file and say what to do
            reason = str(error) if ours else f"{path}: {error}; delete the file to start the brain afresh"
            log.error("[brain] cannot go on from the earlier run, the brain starts afresh: %s", reason)
            self.step = step_otherwise
            self._start()
            self._chronicle.event(self.step, "resume_failed", reason)
            return False
        self.step, self._regime = step, regime
        self._stop.sums = state.get("stop")
        if "diagnosis" in state:
            self._diagnosis.load_state_dict(state["diagnosis"])
        for tap, watching in zip(self._taps, state.get("watching", ()), strict=False):
            if watching:
                tap.watch_next()
        if self._buffers is not None:
            self._buffers.keep()  # the host has loaded its weights since the guard was made
        self._rescue.drop_after(self.step)
        self._resumed = True
        self._turn_taps()
        log.info("[brain] goes on at step %d", self.step)
        return True

    def close(self, message: str = "detached") -> None:
        """Take off all hooks and end the journal."""
        for tap in self._taps:
            tap.detach()
        self.active = False
        self._chronicle.end(self.step, message)

    def _start(self) -> None:
        if self._started:
            return
        self._started = True
        if not self._resumed:
            # Disk snapshots of an earlier run in this folder are of other weights.
            self._rescue.drop_after(-1)
        self._turn_taps()
        self._chronicle.start(self.step)
