"""The loop: ``observe`` folds, ``decide`` decides. No thread, no clock, no random state, no I/O.

Observation ─▶ ContextAnalyzer ─▶ TrainingContext
every ``decide_every`` steps:
    broken?      ─▶ ROLL_BACK (full mode)
    move open?   ─▶ judge it on what came after ─▶ UNDO, or wait
    agents       ─▶ Proposals ─▶ limits ─▶ RiskAssessor ─▶ ACCEPT or HOLD
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tts_brain.agents import Agent, build_agents
from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.coordination.risk import RiskAssessor
from tts_brain.feedback.manager import FeedbackLoopManager, Trial
from tts_brain.losses.controller import AdaptiveLossController
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    Capabilities,
    Decision,
    Mode,
    Observation,
    Proposal,
    TrainingContext,
    Verdict,
)

STATE_VERSION = 2
NONFINITE_LIMIT = 3  # steps in a row; then it is decided at once
# In natural logarithms: below the first nothing is said to move, above the second a move is put on trial. What lies
# between is the smooth drift of a law that reverses itself.
_SMALL_MOVE = 0.005
_BOLD_MOVE = 0.1


class ContextAwareTrainingManager:
    """Watches a run and decides. An adapter feeds it observations and carries its decisions out.

    Args:
        config: settings.
        capabilities: what the host can show and turn; knobs it lacks are never proposed.
        host_values: the host's own values of knobs whose neutral value only it knows (``guided_sigma``).
    """

    def __init__(
        self, config: BrainConfig, capabilities: Capabilities, host_values: Mapping[str, float] | None = None
    ) -> None:
        self.config = config
        self.mode = Mode(config.mode)
        self.capabilities = capabilities
        self.analyzer = ContextAnalyzer(
            config.history_size,
            config.phase_classifier_components,
            config.trend_window,
            config.stability_threshold,
            config.phase_stickiness,
        )
        self.losses = AdaptiveLossController(
            config.initial_guided_weight, config.tversky_A, config.tversky_B, config.adaptation_rate
        )
        self.agents: tuple[Agent, ...] = build_agents(config, self.losses)
        self.risk = RiskAssessor()
        self.feedback = FeedbackLoopManager(
            config.trial_steps, config.divergence_sigmas, config.lost_alignment_steps, self.loss_name
        )
        steered = set(config.knob_names()) & set(capabilities.knobs)
        self.knobs = {n: self._start_value(n, host_values or {}) for n in KNOBS if n in steered}
        self._rollbacks_in_a_row = 0
        self._healthy_since = 0
        self._cooldown_until = 0
        self._last_decision = 0
        self._gave_up = False

    def _start_value(self, name: str, host: Mapping[str, float]) -> float:
        half = self.config.tversky_A + self.config.tversky_B / 2
        ours = {
            GUIDED_WEIGHT: self.config.initial_guided_weight,
            FORWARD_SUM_WEIGHT: self.config.initial_forward_sum_weight,
            TVERSKY_ALPHA: half,
            TVERSKY_BETA: half,
        }
        value = ours.get(name, host.get(name, KNOBS[name].neutral))
        if value is None or not math.isfinite(value):
            raise ValueError(f"host_values has {name!r}: {value}; give the host's own value of it, a finite number")
        return KNOBS[name].limit(value, value)

    @property
    def moves_allowed(self) -> bool:
        """False in ``off`` and ``observe``."""
        return self.mode in (Mode.ASSIST, Mode.FULL)

    @property
    def loss_name(self) -> str:
        """The loss that moves are judged by: the spectrogram's, which no knob of ours rescales."""
        return "mel" if "mel" in self.capabilities.losses else "total"

    def observe(self, observation: Observation) -> None:
        """Take in one optimizer step."""
        self.analyzer.observe(observation)
        self.feedback.observe(observation, self.knobs)
        if observation.stop is not None:
            self.losses.observe(observation.stop)

    def regime_changed(self) -> None:
        """The host changed what its losses mean (another reduction factor or batch size): start the trends anew."""
        self.analyzer.regime_changed()
        self.feedback.reset_baseline()

    def due(self, step: int) -> bool:
        """Is it time to decide? Every ``decide_every`` steps, and at once when nothing is finite any more."""
        return step - self._last_decision >= self.config.decide_every or (
            self.analyzer.nonfinite_run == NONFINITE_LIMIT
        )

    def context(self) -> TrainingContext:
        """What the agents would see now."""
        filters = self.feedback.filters
        return replace(
            self.analyzer.context(),
            stop_errors=self.losses.stop_errors,
            filtered=dict(filters.reports),
            effects=filters.effects,
        )

    def decide(self) -> Decision:
        """Take one decision and make it the manager's own: ``knobs`` holds the new values afterwards."""
        context = self.context()
        self._last_decision = context.step
        self.risk.fade()
        decision = self._decide(context)
        if decision.applied:
            self.knobs = dict(decision.after)
        return decision

    def _decide(self, context: TrainingContext) -> Decision:
        broken = self._broken(context)
        # Where nothing is rolled back, the agents do what they can: a rising loss lowers the rate.
        if broken is not None and self.mode is Mode.FULL and not self._gave_up:
            return self._on_broken(context, broken)
        if broken is not None:
            self._healthy_since = context.step
        elif context.step - self._healthy_since > self.config.snapshot_every:
            self._rollbacks_in_a_row, self._gave_up = 0, False
        undo = self._judge_trial(context)
        if undo is not None:
            return undo
        proposals = tuple(agent.propose(context, self.knobs) for agent in self.agents)
        if context.nonfinite_run:
            return self._hold(context, "the last step was not finite: nothing moves until it is", proposals)
        if context.step < self._cooldown_until:
            return self._hold(context, f"cooling down until step {self._cooldown_until}", proposals)
        return self._weigh(context, proposals)

    def _broken(self, context: TrainingContext) -> str | None:
        if context.nonfinite_run >= NONFINITE_LIMIT:
            return f"{context.nonfinite_run} steps in a row were not finite"
        return self.feedback.broken(context, self.analyzer.series(self.loss_name))

    def _on_broken(self, context: TrainingContext, reason: str) -> Decision:
        limit = self.config.max_rollbacks_in_a_row
        if self._rollbacks_in_a_row >= limit:
            self._gave_up = True
            text = (
                f"{reason}, {limit} rollbacks in a row did not help. Look at the data around this step "
                "(silent, mislabelled or very long clips), the precision (fp16: use fp32 or bf16), and the rate"
            )
            return self._decision(context, Verdict.STOP, text)
        return self._decision(context, Verdict.ROLL_BACK, reason)

    def _judge_trial(self, context: TrainingContext) -> Decision | None:
        """UNDO, or None: no move on trial, too early to say, or kept."""
        trial = self.feedback.trial
        judgement = self.feedback.judge(context, self.analyzer.series(self.loss_name))
        if trial is None or judgement.kept is None:
            return None
        self.feedback.close()
        self._learn(trial.moves, context, kept=judgement.kept)
        if judgement.kept:
            return None
        self._cooldown_until = context.step + self.config.cooldown_steps
        back = {name: old for name, (old, _) in trial.moves.items() if name in self.knobs}
        return self._decision(
            context, Verdict.UNDO, judgement.reason, after={**self.knobs, **back}, evidence=judgement.evidence
        )

    def _weigh(self, context: TrainingContext, proposals: tuple[Proposal, ...]) -> Decision:
        trial = self.feedback.trial
        after = dict(self.knobs)
        for agent, proposal in zip(self.agents, proposals, strict=True):
            for name, wanted in proposal.moves.items():
                if name not in after or name not in agent.owns:
                    continue
                if trial is None:
                    after[name] = KNOBS[name].limit(after[name], wanted)
                elif name not in trial.moves:
                    after[name] = _drift(name, after[name], wanted)
        risk = self.risk.assess(context, self.knobs, after)
        evidence = {"risk": risk.probability, "certainty": context.certainty}
        vetoed = ""
        if risk.probability > self.config.max_move_risk:
            after = self._without_risky_part(context, after)
            vetoed = f"too risky ({risk.probability:.0%}), left out: {risk.reason}; "
        moved = _moved(self.knobs, after)
        if not moved:
            return self._hold(context, vetoed + "; ".join(p.reason for p in proposals), proposals, evidence)
        after = {name: after[name] if name in moved else old for name, old in self.knobs.items()}
        movers = [p.reason for p in proposals if set(p.moves) & set(moved)]
        decision = self._decision(context, Verdict.ACCEPT, vetoed + "; ".join(movers), proposals, after, evidence)
        bold = {n: (self.knobs[n], after[n]) for n in moved if abs(math.log(after[n] / self.knobs[n])) > _BOLD_MOVE}
        if decision.applied and bold:
            self.feedback.open(context.step, bold, context, self.analyzer.series(self.loss_name))
        return decision

    def _without_risky_part(self, context: TrainingContext, after: dict[str, float]) -> dict[str, float]:
        limit = self.config.max_move_risk
        return {
            name: old if self.risk.assess(context, {name: old}, {name: new}).probability > limit else new
            for (name, old), new in zip(self.knobs.items(), after.values(), strict=True)
        }

    def _hold(
        self,
        context: TrainingContext,
        reason: str,
        proposals: tuple[Proposal, ...] = (),
        evidence: Mapping[str, float] | None = None,
    ) -> Decision:
        return self._decision(context, Verdict.HOLD, reason, proposals, None, evidence)

    def _decision(
        self,
        context: TrainingContext,
        verdict: Verdict,
        reason: str,
        proposals: tuple[Proposal, ...] = (),
        after: Mapping[str, float] | None = None,
        evidence: Mapping[str, float] | None = None,
    ) -> Decision:
        before = dict(self.knobs)
        applied = self.moves_allowed
        return Decision(
            step=context.step,
            verdict=verdict,
            phase=context.phase,
            before=before,
            after=dict(after) if after is not None and applied else before,
            reason=reason,
            proposals=proposals,
            evidence=dict(evidence or {}),
            applied=applied,
        )

    @property
    def last_decision(self) -> int:
        """Step of the newest decision, 0 before the first."""
        return self._last_decision

    @property
    def rollbacks_in_a_row(self) -> int:
        """Rollbacks without ``snapshot_every`` healthy steps between them."""
        return self._rollbacks_in_a_row

    def rolled_back(self, *, failed_at: int, count: int, restored: bool, trial: Trial | None) -> None:
        """Told by the adapter after ROLL_BACK, when an earlier state is back (this manager's own included).

        The rate is lowered once more for each rollback in a row, levels are forgotten, and nothing moves for
        ``cooldown_steps``. What was learned of the failure must outlive the restored state, so it comes as arguments.

        Args:
            failed_at: step at which the run broke.
            count: rollbacks in a row, this one included.
            restored: False when there was no snapshot.
            trial: the bold move that was on trial when the run broke; it takes the blame.
        """
        # A snapshot taken between two rollbacks holds the rate that the first one lowered.
        lower_by = max(count - self._rollbacks_in_a_row, 1)
        self._rollbacks_in_a_row = count
        self._healthy_since = failed_at
        self._cooldown_until = failed_at + self.config.cooldown_steps
        self._last_decision = failed_at
        self.regime_changed()
        self.analyzer.forgive()
        if trial is not None:
            self._learn(trial.moves, self.context(), kept=False)
        if LEARNING_RATE in self.knobs and restored:
            knob = KNOBS[LEARNING_RATE]
            wanted = self.knobs[LEARNING_RATE] * self.config.rollback_rate_factor**lower_by
            self.knobs[LEARNING_RATE] = min(max(wanted, knob.low), knob.high)

    def _learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None:
        self.risk.learn(moves, kept=kept)
        for agent in self.agents:
            agent.learn({k: v for k, v in moves.items() if k in agent.owns}, context, kept=kept)

    def state_dict(self) -> dict[str, Any]:
        """Everything that bears on later decisions, as plain values; versioned."""
        return {
            "version": STATE_VERSION,
            "knobs": dict(self.knobs),
            "analyzer": self.analyzer.state_dict(),
            "controller": self.losses.state_dict(),
            "agents": {agent.name: agent.state_dict() for agent in self.agents},
            "risk": self.risk.state_dict(),
            "feedback": self.feedback.state_dict(),
            "rollbacks_in_a_row": self._rollbacks_in_a_row,
            "healthy_since": self._healthy_since,
            "cooldown_until": self._cooldown_until,
            "last_decision": self._last_decision,
            "gave_up": self._gave_up,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``: all or nothing.

        Raises:
            ValueError: another version, a missing part, or a value that makes no sense; nothing is changed then.
        """
        found = state.get("version") if isinstance(state, Mapping) else None
        if found != STATE_VERSION:
            raise ValueError(
                f"brain state has version {found!r}, this tts-brain reads {STATE_VERSION}; "
                "remove the brain's sidecar file to start the brain afresh"
            )
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except Exception as error:  # whatever it is, half a state must not stay
            self._load(before)
            raise ValueError(f"brain state is damaged ({type(error).__name__}: {error}); nothing was loaded") from error

    def _load(self, state: Mapping[str, Any]) -> None:
        knobs = {name: float(state["knobs"].get(name, value)) for name, value in self.knobs.items()}
        if not all(math.isfinite(v) for v in knobs.values()):
            raise ValueError(f"knob values {knobs} are not all finite")
        if not isinstance(state["gave_up"], bool):
            raise ValueError(f"gave_up={state['gave_up']!r} is neither true nor false")
        self.analyzer.load_state_dict(state["analyzer"])
        self.losses.load_state_dict(state["controller"])
        for agent in self.agents:
            agent.load_state_dict(state["agents"][agent.name])
        self.risk.load_state_dict(state["risk"])
        self.feedback.load_state_dict(state["feedback"])
        self._rollbacks_in_a_row = int(state["rollbacks_in_a_row"])
        self._healthy_since = int(state["healthy_since"])
        self._cooldown_until = int(state["cooldown_until"])
        self._last_decision = int(state["last_decision"])
        self._gave_up = state["gave_up"]
        self.knobs = {name: KNOBS[name].limit(value, value) for name, value in knobs.items()}


def _drift(name: str, old: float, wanted: float) -> float:
    """Only drifts are let through while a bold move is on trial, so that what follows can be put down to that move."""
    step = math.exp(_BOLD_MOVE * 0.99)
    return KNOBS[name].limit(old, min(max(wanted, old / step), old * step))


def _moved(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    return [n for n, new in after.items() if abs(math.log(new / before[n])) > _SMALL_MOVE]
