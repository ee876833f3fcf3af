"""Micro-Tacotrons under the brain, forked at its decisions: what would have come of each stage's move, and of none.

A decision goes through stages, each of which takes a joint move and hands on another (``STAGES``). The branches of a
decision are the settings of the knobs before and after each of its stages, and that of no move. Each branch is trained
on from the same weights, on the same batches and with the same dropout, its knobs held: all that differs is the move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tts_brain.config import BrainConfig
from tts_brain.coordination.dynamics import Dynamics
from tts_brain.coordination.game import stirring
from tts_brain.coordination.optimizer import Coordination, MultiAgentOptimizer
from tts_brain.coordination.outlook import dynamics
from tts_brain.coordination.risk import Weighed
from tts_brain.feedback.filters import LOSS
from tts_brain.feedback.rollback import RollbackManager
from tts_brain.learning.micro_tacotron import MicroRuns, MicroSetting
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import KNOBS, LEARNING_RATE, Observation, Verdict

EQUILIBRIUM, BOOK, SIMULATION, VOTE, UNDO, ROLLBACK = STAGES = (
    "equilibrium", "book", "simulation", "vote", "undo", "rollback",
)  # fmt: skip
HELD, WISHED, FORESEEN, PROBE = "held", "wished", "foreseen", "probe"
# Factors on the rate that no decision would make: the brain's own moves are hardly ever called risky.
PROBES = (2.0, 4.0, 8.0, 16.0)
ATTENTION_EVERY = 5  # steps; what the brain sees. The judges see each step.
AFTER = 50  # steps that a branch is trained on
RUNS, STEPS = 24, 210
# Smaller moves are not made (tts_brain.manager).
_SMALL = 0.005
_BEFORE = 10

Vector = NDArray[np.float64]
Moves = Mapping[str, float]


# By stage the branch of what it was given; the branch of what it handed on has the stage's name.
GIVEN = {EQUILIBRIUM: WISHED, BOOK: EQUILIBRIUM, SIMULATION: BOOK, VOTE: SIMULATION, UNDO: HELD, ROLLBACK: HELD}


@dataclass
class Decided:
    """One decision.

    Args:
        run, step: where.
        seed: of the run; no two runs that are gathered have the same.
        verdict: what came of it.
        changed: the stages that changed anything.
        level, noise: of the judged loss by its filter, in the loss's units.
        course: what the simulation starts from; None while the filters know too little.
        weighed: what the risk stage said; None where nothing was coordinated.
        knobs: of each branch: ``held`` (no move), ``wished``, ``foreseen`` (what the simulation said its last word on),
            ``probe`` (the rate alone, raised by more than any decision would), and, named for each stage, what that
            stage handed on.
        before: (steps, 2) mel and attention_diag of the last steps, newest last.
        after: the same of the steps after, by branch; empty where it was not forked.
        run_after: the same of the run itself, whose brain went on deciding.
    """

    run: int
    step: int
    seed: int
    verdict: Verdict
    changed: tuple[str, ...]
    level: float
    noise: float
    course: Dynamics | None
    weighed: Weighed | None
    knobs: dict[str, dict[str, float]]
    before: Vector
    after: dict[str, Vector] = field(default_factory=dict)
    run_after: Vector = field(default_factory=lambda: np.empty((0, 2)))

    def moves(self, branch: str) -> dict[str, float]:
        """Of a branch against no move (``Knob.move``)."""
        held = self.knobs[HELD]
        return {
            knob: KNOBS[knob].move(held[knob], new) for knob, new in self.knobs[branch].items() if new != held[knob]
        }


def settings(seed: int, count: int) -> list[MicroSetting]:
    """Starts at rates from 1e-3 to 0.5, every third one above 0.03, where runs get into trouble; half of either with a
    fault: wrong texts, silent edges, or an attention that is drawn anew."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        faults: list[dict[str, Any]] = [
            {"wrong_transcripts": 0.25},
            {"edge_silence": (0.0, 12.0)},
            {"redraw_steps": frozenset({int(draw.integers(60, STEPS))})},
        ]
        fault = faults[number // 6 % len(faults)] if number % 6 < 3 else {}
        low, high = (1e-3, 0.03) if number % 3 else (0.03, 0.5)
        rate, guided = math.exp(draw.uniform(math.log(low), math.log(high))), float(draw.choice([0.02, 2.0]))
        made.append(MicroSetting(rate=rate, guided_weight=guided, attention_every=1, **fault))
    return made


def gather(seed: int, *, runs: int = RUNS, steps: int = STEPS, forked: int = 2) -> list[Decided]:
    """All decisions of ``runs`` runs side by side.

    Args:
        seed: of the settings and, from it on, of the runs.
        forked: of the decisions of each step in which no stage changed anything but a move was simulated, how many are
            forked too, those with an alignment to lose first; those in which a stage changed anything all are.
    """
    kinds = settings(seed, runs)
    seeds = [seed + number for number in range(runs)]
    micro = MicroRuns(kinds, seeds)
    brains = [_Brain(micro, number) for number in range(runs)]
    draw, found = np.random.default_rng([seed, 1]), []
    for step in range(1, steps + 1):
        seen = micro.step([brain.knobs for brain in brains])
        decided = [one for brain, o in zip(brains, seen, strict=True) if (one := brain.see(o)) is not None]
        found += decided
        if step <= steps - AFTER:
            _fork(micro, brains, _chosen(decided, forked, draw))
    for one in found:
        one.run_after = np.array(brains[one.run].history[one.step : one.step + AFTER]).reshape(-1, 2)
    return found


def _chosen(decided: Sequence[Decided], most: int, draw: np.random.Generator) -> list[Decided]:
    plain = [one for one in decided if not one.changed and one.weighed is not None and one.weighed.outlook is not None]
    plain = [plain[at] for at in draw.permutation(len(plain))]
    plain.sort(key=lambda one: one.course is None or one.course.best_attention_diag < 0.5)
    chosen = [one for one in decided if one.changed] + plain[:most]
    for one in chosen:
        if LEARNING_RATE in one.knobs[HELD] and one.verdict is not Verdict.ROLL_BACK:
            one.knobs[PROBE] = _faster(one.knobs[HELD], float(draw.choice(PROBES)))
    return chosen


def _faster(knobs: Moves, factor: float) -> dict[str, float]:
    return {**knobs, LEARNING_RATE: min(knobs[LEARNING_RATE] * factor, KNOBS[LEARNING_RATE].high)}


def _fork(micro: MicroRuns, brains: Sequence[_Brain], chosen: Sequence[Decided]) -> None:
    """Train all branches of the chosen decisions on, side by side; those with equal knobs once."""
    state, branches = micro.state_dict(), []
    for one in chosen:
        for name, knobs in one.knobs.items():
            same = next((b for b in branches if b[0] is one and one.knobs[b[1][0]] == knobs and name != ROLLBACK), None)
            if same is not None:
                same[1].append(name)
            else:
                branches.append((one, [name]))
    if not branches:
        return
    rows = [brains[one.run].rows.get(names[0]) or _rows(state, one.run) for one, names in branches]
    where = [one.run for one, _ in branches]
    fork = MicroRuns([micro.settings[at] for at in where], [micro.seeds[at] for at in where])
    fork.load_state_dict({**_joined(rows), "step": state["step"]})
    knobs = [one.knobs[names[0]] for one, names in branches]
    seen = np.array([[_seen(o) for o in fork.step(knobs)] for _ in range(AFTER)])  # (AFTER, branches, 2)
    for at, (one, names) in enumerate(branches):
        one.after |= dict.fromkeys(names, seen[:, at])


class _Brain:
    """One run's brain, its snapshots, and what it saw."""

    def __init__(self, micro: MicroRuns, run: int) -> None:
        self._run, self._seed = run, micro.seeds[run]
        setting = micro.settings[run]
        self._manager = ContextAwareTrainingManager(BrainConfig(), setting.capabilities, setting.host_values)
        agents = [agent.name for agent in self._manager.agents]
        self._stages = _Watched(len(agents), self._manager.config.consensus_threshold, agents=agents)
        self._manager.optimizer = self._stages
        self._snapshots = RollbackManager(snapshots=2)
        self._row = _Row(micro, run)
        self.rows: dict[str, Mapping[str, Any]] = {}  # by branch, where it does not go on from the run itself
        self.history: list[tuple[float, float]] = []

    @property
    def knobs(self) -> Moves:
        return self._manager.knobs

    def see(self, observation: Observation) -> Decided | None:
        """Take in one step; the decision, where one was due."""
        manager = self._manager
        hidden = {} if observation.step % ATTENTION_EVERY == 0 else {"attention": None, "update_ratio": None}
        manager.observe(replace(observation, **hidden))
        self.history.append(_seen(observation))
        if not manager.due(observation.step):
            return None
        self._stages.clear()
        self.rows = {}
        filters = manager.feedback.filters
        before, loss = dict(manager.knobs), filters.metric(LOSS)
        course = dynamics(filters, manager.context().best_attention_diag, manager.config.divergence_sigmas)
        level, noise = loss.latent[0], loss.noise
        decision = manager.decide()
        branches = {HELD: before, **self._branches(before)}
        if decision.verdict is Verdict.UNDO:
            branches[UNDO] = dict(manager.knobs)
        if decision.verdict is Verdict.ROLL_BACK and self._roll_back(observation.step):
            branches[ROLLBACK] = dict(manager.knobs)
        elif decision.verdict is not Verdict.STOP:
            self._maybe_take(observation.step)
        return Decided(
            run=self._run,
            step=observation.step,
            seed=self._seed,
            verdict=decision.verdict,
            changed=_changed(branches),
            level=level,
            noise=noise,
            course=course,
            weighed=self._stages.weighed,
            knobs=branches,
            before=np.array(self.history[-_BEFORE:]),
        )

    def _branches(self, before: Moves) -> dict[str, dict[str, float]]:
        return {
            name: {knob: _turned(knob, old, moves.get(knob, 0.0)) for knob, old in before.items()}
            for name, moves in self._stages.moves.items()
        }

    def _maybe_take(self, step: int) -> None:
        """As ``pytorch.rescue`` does."""
        newest = self._snapshots.newest()
        far_enough = newest is None or step - newest >= self._manager.config.snapshot_every
        if far_enough and (newest is None or self._manager.healthy):
            self._snapshots.take(step, {"run": self._row, "brain": self._manager})

    def _roll_back(self, step: int) -> bool:
        manager = self._manager
        count, trial = manager.rollbacks_in_a_row + 1, manager.feedback.trial
        target = self._snapshots.newest(step - manager.config.trial_steps)
        parts = {"run": self._row, "brain": manager}
        broken, multiplier = self._row.state_dict(), manager.knobs[LEARNING_RATE]
        restored = self._snapshots.restore(parts, before=target)
        found = restored is not None
        manager.rolled_back(failed_at=step, count=count, restored=found, trial=trial, multiplier=multiplier)
        self.rows = {HELD: broken, ROLLBACK: self._row.state_dict()}
        return found


class _Row:
    """One of the runs that are trained side by side, as a part of a snapshot; steps and data do not go back."""

    def __init__(self, micro: MicroRuns, run: int) -> None:
        self._micro, self._run = micro, run

    def state_dict(self) -> dict[str, Any]:
        return _rows(self._micro.state_dict(), self._run)

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        whole = self._micro.state_dict()
        for name, value in state.items():
            _run_axis_first(name, whole[name])[self._run] = _run_axis_first(name, value)[0]
        self._micro.load_state_dict(whole, rewind=False)


class _Watched(MultiAgentOptimizer):
    """Coordination that remembers what each stage was given and handed on, by knob (``Knob.move``)."""

    moves: dict[str, Moves]
    weighed: Weighed | None

    def clear(self) -> None:
        self.moves, self.weighed = {}, None

    def coordinate(self, context: Any, proposals: Any, knobs: Any, wishes: Any, weigh: Any) -> Coordination:
        def weigh_and_note(moves: Moves) -> Weighed:
            self.weighed = weighed = weigh(moves)
            booked = {knob: move for knob, move in moves.items() if knob not in weighed.left_out}
            self.moves |= {EQUILIBRIUM: moves, BOOK: booked, SIMULATION: weighed.moves}
            if weighed.outlook is not None:
                # Held, the half of it was simulated last.
                half = {knob: move / 2.0 for knob, move in stirring(booked).items()}
                self.moves[FORESEEN] = weighed.moves if weighed.size else booked | half
            return weighed

        self.moves[WISHED] = {knob: move for moves in wishes.values() for knob, move in moves.items()}
        made = super().coordinate(context, proposals, knobs, wishes, weigh_and_note)
        self.moves[VOTE] = made.moves
        return made


def _changed(branches: Mapping[str, Moves]) -> tuple[str, ...]:
    return tuple(
        stage
        for stage, given in GIVEN.items()
        if stage in branches and (stage == ROLLBACK or _differ(branches[stage], branches[given]))
    )


def _differ(one: Moves, other: Moves) -> bool:
    return any(abs(KNOBS[knob].move(old, other[knob])) > _SMALL for knob, old in one.items())


def _turned(knob: str, old: float, move: float) -> float:
    return KNOBS[knob].limit(old, KNOBS[knob].moved(old, move)) if abs(move) > _SMALL else old


def _seen(observation: Observation) -> tuple[float, float]:
    attention = observation.attention
    assert attention is not None  # measured at each step
    return observation.losses["mel"], attention.attention_diag


def _rows(state: Mapping[str, Any], run: int) -> dict[str, Any]:
    """State of one run of several; without the step, which all share."""
    return {
        name: _run_axis_first(name, value)[run : run + 1].clone().transpose(0, 1 if name == "moments" else 0)
        for name, value in state.items()
        if name != "step"
    }


def _run_axis_first(name: str, value: Tensor) -> Tensor:
    """A view; the moments have the runs on their second axis."""
    return value.transpose(0, 1) if name == "moments" else value


def _joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows], dim=int(name == "moments")) for name in rows[0]}
