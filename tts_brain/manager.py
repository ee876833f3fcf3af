"""The loop: ``observe`` folds, ``decide`` decides. No thread, no clock, no random state, no I/O.

Observation ─▶ ContextAnalyzer ─▶ TrainingContext
every ``decide_every`` steps:
    broken?      ─▶ ROLL_BACK (full mode)
    move open?   ─▶ judge it on what came after ─▶ UNDO, or wait
    agents       ─▶ Proposals ─▶ limits ─▶ equilibrium ─▶ risk ─▶ vote ─▶ ACCEPT or HOLD
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tts_brain.agents import Agent, build_agents
from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.context.lengths import LengthEffect
from tts_brain.context.reading import RISES, slope_z
from tts_brain.coordination.game import stirring
from tts_brain.coordination.optimizer import Coordination, MultiAgentOptimizer, averaged
from tts_brain.coordination.outlook import dynamics
from tts_brain.coordination.risk import RiskAssessor, Weighed
from tts_brain.feedback.manager import FeedbackLoopManager, Trial
from tts_brain.losses.controller import AdaptiveLossController
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GRAD_CLIP,
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

STATE_VERSION = 9
NONFINITE_LIMIT = 3  # steps in a row; then it is decided at once
# Steps in a row left out under finite losses. The guard has kept the weights, so that going back a few steps mends
# nothing. Where it lasts, the weights are where no gradient is finite.
_SKIPPED_LIMIT = 20
# As moves (``Knob.move``): below the first nothing is said to move, above the second a move is put on trial. What lies
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
            config.forecasts,
        )
        self.lengths = LengthEffect(self.loss_name)
        self.losses = AdaptiveLossController(
            config.initial_guided_weight,
            config.tversky_A,
            config.tversky_B,
            config.adaptation_rate,
            config.tversky_weight,
        )
        self.agents: tuple[Agent, ...] = build_agents(config, self.losses)
        self.optimizer = MultiAgentOptimizer(
            len(self.agents), config.consensus_threshold, agents=[agent.name for agent in self.agents]
        )
        # A move that hurts is judged after one length of a trial, and is undone and gone within about another.
        self.risk = RiskAssessor(config.max_move_risk, config.risk_draws, 2 * config.trial_steps, config.seed)
        self.feedback = FeedbackLoopManager(
            config.trial_steps, config.divergence_sigmas, config.lost_alignment_steps, self.loss_name
        )
        steered = set(config.knob_names()) & set(capabilities.knobs)
        self.knobs = {n: self._start_value(n, host_values or {}) for n in KNOBS if n in steered}
        self._rollbacks_in_a_row = 0
        self._healthy_since = 0
        self._cooling: dict[str, int] = {}  # by knob, the step until which it does not move
        self._last_decision = 0
        self._gave_up = False
        self._decided_on: TrainingContext | None = None
        self._usual_grad_norm = math.nan

    def _start_value(self, name: str, host: Mapping[str, float]) -> float:
        half = self.config.tversky_A + self.config.tversky_B / 2
        ours = {
            GUIDED_WEIGHT: self.losses.initial_guided_weight,
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
        observation = self.lengths.adjusted(observation)
        self.analyzer.observe(observation, self.knobs)
        self.feedback.observe(observation, self.knobs)
        if observation.stop is not None:
            self.losses.observe(observation.stop)

    def regime_changed(self) -> None:
        """The host changed what its losses mean (another reduction factor or batch size): start the trends anew.

        So with the best attention so far: held against the new steps it would count as lost, and going back would undo
        what the model has learned of them.
        """
        self._forget_levels()
        self.lengths.forget()
        self.analyzer.attention_changed()

    def _forget_levels(self) -> None:
        self.analyzer.regime_changed()
        self.feedback.reset_baseline()

    def due(self, step: int) -> bool:
        """Is it time to decide? Every ``decide_every`` steps, and at once when nothing is finite any more."""
        runs = (self.analyzer.nonfinite_run, self.analyzer.nonfinite_losses)
        return step - self._last_decision >= self.config.decide_every or NONFINITE_LIMIT in runs

    def context(self) -> TrainingContext:
        """What the agents would see now."""
        filters = self.feedback.filters
        return replace(
            self.analyzer.context(),
            stop_errors=self.losses.stop_errors,
            filtered=dict(filters.reports),
            effects=filters.effects,
            host_clip=self.capabilities.grad_clip,
        )

    @property
    def healthy(self) -> bool:
        """Is this a state to go back to?

        The newest loss is finite and does not rise, no move is on trial, the alignment is not on its way to be lost,
        and the run is not one that rollbacks could not save.
        """
        z = None if self._decided_on is None else slope_z(self._decided_on)
        rises = z is not None and z > RISES
        finite = self.analyzer.nonfinite_losses == 0 and self.analyzer.nonfinite_run < NONFINITE_LIMIT
        at_risk = self.feedback.losing or self._gave_up
        return finite and self.feedback.trial is None and not rises and not at_risk

    @property
    def decided_on(self) -> TrainingContext:
        """The context of the newest decision; afresh where there was none yet, or an earlier state has come back."""
        return self.context() if self._decided_on is None else self._decided_on

    @property
    def usual_grad_norm(self) -> float:
        """What the clip is measured in until the next decision: the median gradient norm at the newest one."""
        return self._usual_grad_norm

    def decide(self) -> Decision:
        """Take one decision and make it the manager's own: ``knobs`` holds the new values afterwards."""
        context = self._decided_on = self.context()
        self._last_decision = context.step
        self._usual_grad_norm = context.grad_norm_median
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
        # An alignment that is being lost is no sign of health: else the rollbacks in a row would never be counted up.
        if broken is not None or self.feedback.losing:
            self._healthy_since = context.step
        elif context.step - self._healthy_since > self.config.snapshot_every:
            self._rollbacks_in_a_row, self._gave_up = 0, False
        undo = self._judge_trial(context)
        if undo is not None:
            return undo
        proposals = tuple(agent.propose(context, self.knobs) for agent in self.agents)
        if context.nonfinite_losses or context.nonfinite_run >= NONFINITE_LIMIT:
            return self._hold(context, "the last steps were not finite: nothing moves until they are", proposals)
        cooling = self._cooling_down(context.step)
        if cooling and set(self.knobs) <= set(cooling):
            return self._hold(context, f"cooling down until step {max(cooling.values())}", proposals)
        return self._weigh(context, proposals)

    def _broken(self, context: TrainingContext) -> str | None:
        if context.nonfinite_losses >= NONFINITE_LIMIT:
            return f"the losses of {context.nonfinite_losses} steps in a row were not finite"
        if context.nonfinite_run >= _SKIPPED_LIMIT:
            return f"{context.nonfinite_run} steps in a row were left out, as their gradients were not finite"
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
        self._cooling |= dict.fromkeys(trial.moves, context.step + self.config.cooldown_steps)
        back = {name: old for name, (old, _) in trial.moves.items() if name in self.knobs}
        return self._decision(
            context, Verdict.UNDO, judgement.reason, after={**self.knobs, **back}, evidence=judgement.evidence
        )

    def _weigh(self, context: TrainingContext, proposals: tuple[Proposal, ...]) -> Decision:
        wanted = self._within_limits(context, proposals)
        settled = self._coordinate(context, proposals, wanted)
        after = {name: self._moved_by(settled.moves.get(name, 0.0), name, wanted) for name in self.knobs}
        risk = self.risk.assess(context, self.knobs, {**self.knobs, **wanted})
        evidence = {"risk": risk.probability, "certainty": context.certainty}
        moved = _moved(self.knobs, after)
        # Without a move all agents have their say, else those whose knobs move.
        speakers = [p for p in proposals if not moved or set(p.moves) & set(moved)]
        cooling = self._cooling_down(context.step)
        waits = [f"{n} cools down until step {cooling[n]}" for p in speakers for n in p.moves if n in cooling]
        reason = "; ".join([*settled.cuts, *waits, *(p.reason for p in speakers)])
        if not moved:
            return self._hold(context, reason, proposals, evidence, settled.record)
        after = {name: after[name] if name in moved else old for name, old in self.knobs.items()}
        decision = self._decision(context, Verdict.ACCEPT, reason, proposals, after, evidence, settled.record)
        moves = {n: KNOBS[n].move(self.knobs[n], after[n]) for n in moved}
        # What calms is not put on trial: where a cut was one too many, the search raises the rate again, and hindsight
        # says that cuts taken back were right (docs/components.md). Nor is a clip that is let go, as nothing has come
        # up to it, and a trial would keep the rate where it is.
        stirred = {name: move for name, move in stirring(moves).items() if name != GRAD_CLIP}
        bold = {name: (self.knobs[name], after[name]) for name, move in stirred.items() if abs(move) > _BOLD_MOVE}
        if decision.applied and bold:
            self.feedback.open(context.step, bold, context, self.analyzer.series(self.loss_name))
        return decision

    def _cooling_down(self, step: int) -> dict[str, int]:
        return {name: until for name, until in self._cooling.items() if step < until}

    def _within_limits(self, context: TrainingContext, proposals: tuple[Proposal, ...]) -> dict[str, float]:
        """What the agents want of the knobs that may move now, within the knobs' limits."""
        trial = self.feedback.trial
        cooling = self._cooling_down(context.step)
        wanted = {}
        for agent, proposal in zip(self.agents, proposals, strict=True):
            for name, value in proposal.moves.items():
                if name not in self.knobs or name not in agent.owns or name in cooling:
                    continue
                if trial is None:
                    wanted[name] = KNOBS[name].limit(self.knobs[name], value)
                elif name not in trial.moves:
                    wanted[name] = _drift(name, self.knobs[name], value)
        return wanted

    def _coordinate(
        self, context: TrainingContext, proposals: tuple[Proposal, ...], wanted: Mapping[str, float]
    ) -> Coordination:
        """The joint move (``Knob.move``): the agents' wishes, less what they, the risk and the vote cut."""
        wishes = {
            agent.name: {
                name: KNOBS[name].move(self.knobs[name], wanted[name]) for name in agent.owns if name in wanted
            }
            for agent in self.agents
        }
        if self.config.coordination == "full":
            return self.optimizer.coordinate(context, proposals, self.knobs, wishes, partial(self._simulate, context))
        plain = averaged(wishes) if self.config.coordination == "average" else _joined(wishes)
        weighed = self.risk.weigh(context, plain, None)
        return Coordination(weighed.moves, weighed.notes, {})

    def _simulate(self, context: TrainingContext, moves: Mapping[str, float]) -> Weighed:
        filters = self.feedback.filters
        course = dynamics(filters, context.best_attention_diag, self.config.divergence_sigmas)
        return self.risk.weigh(context, moves, course)

    def _moved_by(self, move: float, name: str, wanted: Mapping[str, float]) -> float:
        """Value of a knob after ``move``: the very value that was wanted where nothing was cut."""
        old = self.knobs[name]
        knob = KNOBS[name]
        if name in wanted and move == knob.move(old, wanted[name]):
            return wanted[name]
        return knob.limit(old, knob.moved(old, move))

    def _hold(
        self,
        context: TrainingContext,
        reason: str,
        proposals: tuple[Proposal, ...] = (),
        evidence: Mapping[str, float] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> Decision:
        return self._decision(context, Verdict.HOLD, reason, proposals, None, evidence, record)

    def _decision(
        self,
        context: TrainingContext,
        verdict: Verdict,
        reason: str,
        proposals: tuple[Proposal, ...] = (),
        after: Mapping[str, float] | None = None,
        evidence: Mapping[str, float] | None = None,
        record: Mapping[str, Any] | None = None,
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
            coordination=dict(record or {}),
        )

    @property
    def last_decision(self) -> int:
        """Step of the newest decision, 0 before the first."""
        return self._last_decision

    @property
    def rollbacks_in_a_row(self) -> int:
        """Rollbacks without ``snapshot_every`` healthy steps between them."""
        return self._rollbacks_in_a_row

    def rolled_back(
        self,
        *,
        failed_at: int,
        count: int,
        restored: bool,
        trial: Trial | None,
        multiplier: float = math.inf,
        host_rate: float = math.nan,
    ) -> None:
        """Told by the adapter after ROLL_BACK, when an earlier state is back (this manager's own included).

        The rate is lowered once more for each rollback in a row, and under that at which the run broke; levels are
        forgotten, and nothing moves for ``cooldown_steps``. What was learned of the failure must outlive the restored
        state, so it comes as arguments.

        Args:
            failed_at: step at which the run broke.
            count: rollbacks in a row, this one included.
            restored: False when there was no snapshot.
            trial: the bold move that was on trial when the run broke; it takes the blame.
            multiplier: of the host's rate, when the run broke; infinity where that is not known.
            host_rate: the host's own rate then, which is in force still; NaN where that is not known.
        """
        # A snapshot taken between two rollbacks holds the rate that the first one lowered.
        lower_by = max(count - self._rollbacks_in_a_row, 1)
        self._rollbacks_in_a_row = count
        self._healthy_since = failed_at
        self._cooling = dict.fromkeys(KNOBS, failed_at + self.config.cooldown_steps)
        self._last_decision = failed_at
        self._decided_on = None
        self._forget_levels()
        self.analyzer.earlier_weights_are_back(host_rate)
        if trial is not None:
            self._learn(trial.moves, self.context(), kept=False)
        if LEARNING_RATE in self.knobs and restored:
            knob = KNOBS[LEARNING_RATE]
            # The host's own rate has not gone back: a multiplier of before a cut would be above the one that broke.
            factor = self.config.rollback_rate_factor
            wanted = min(self.knobs[LEARNING_RATE] * factor**lower_by, multiplier * factor)
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
            "lengths": self.lengths.state_dict(),
            "controller": self.losses.state_dict(),
            "agents": {agent.name: agent.state_dict() for agent in self.agents},
            "optimizer": self.optimizer.state_dict(),
            "risk": self.risk.state_dict(),
            "feedback": self.feedback.state_dict(),
            "rollbacks_in_a_row": self._rollbacks_in_a_row,
            "healthy_since": self._healthy_since,
            "cooling": dict(self._cooling),
            "last_decision": self._last_decision,
            "usual_grad_norm": self._usual_grad_norm,
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
        self.lengths.load_state_dict(state["lengths"])
        self.losses.load_state_dict(state["controller"])
        for agent in self.agents:
            agent.load_state_dict(state["agents"][agent.name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.risk.load_state_dict(state["risk"])
        self.feedback.load_state_dict(state["feedback"])
        self._rollbacks_in_a_row = int(state["rollbacks_in_a_row"])
        self._healthy_since = int(state["healthy_since"])
        self._cooling = _deadlines(state["cooling"])
        self._last_decision = int(state["last_decision"])
        self._usual_grad_norm = float(state["usual_grad_norm"])
        self._gave_up = state["gave_up"]
        self._decided_on = None
        self.knobs = {name: KNOBS[name].limit(value, value) for name, value in knobs.items()}


def _deadlines(state: Mapping[str, Any]) -> dict[str, int]:
    if not set(state) <= set(KNOBS):
        raise ValueError(f"knobs that cool down are {sorted(state)}; known are {', '.join(KNOBS)}")
    return {name: int(step) for name, step in state.items()}


def _joined(wishes: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: move for moves in wishes.values() for name, move in moves.items()}


def _drift(name: str, old: float, wanted: float) -> float:
    """Only drifts are let through while a bold move is on trial, so that what follows can be put down to that move."""
    knob, most = KNOBS[name], _BOLD_MOVE * 0.99
    return knob.limit(old, min(max(wanted, knob.moved(old, -most)), knob.moved(old, most)))


def _moved(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    return [n for n, new in after.items() if abs(KNOBS[n].move(before[n], new)) > _SMALL_MOVE]
