"""How many decisions each part of the brain changes: the same brain, in the same state, with that part off.

At each decision a copy of the brain decides once more for each part, with the part off (``blindfold``; no coordination
is the setting ``none``), and is thrown away. What a part does over a run is more than that, as one changed decision
brings others; a part that changes none does nothing. Two kinds of runs:

- micro-Tacotrons that the whole brain steers, from the healthy and the troubled starts of ``component_coordination``;
- recorded runs, replayed: there the knobs are those of the record, whatever is decided.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.blindfold import EYES, blindfold
from bench.component_coordination import HEALTHY, TROUBLED, WEAK, rolled_back
from bench.setting import Setting
from tts_brain.config import BrainConfig
from tts_brain.learning.micro_tacotron import CAPABILITIES, MicroRuns, MicroSetting
from tts_brain.learning.temporal_traces import load_folder
from tts_brain.learning.traces import Trace
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import GUIDED_SIGMA, KNOBS, Capabilities, Decision, Observation, Verdict

PART = "eyes"
SEED, STEPS = 200, 300
LARGE = 0.05
COORDINATION = "coordination"
PARTS = (*EYES, COORDINATION)

Row = dict[str, Any]


class Watched:
    """One brain, and how many of its decisions each part changed.

    Attributes:
        decisions: so far.
        changed: by part, decisions that another verdict or another value of a knob came out of without it.
        large: of these, those of another verdict, or of a value that is more than 5 % off: an intervention, or none.
        knobs: by part, how often each knob was among them.
    """

    def __init__(self, capabilities: Capabilities, host_values: Mapping[str, float]) -> None:
        self.manager = ContextAwareTrainingManager(BrainConfig(), capabilities, host_values)
        self.decisions = 0
        self.changed: Counter[str] = Counter()
        self.large: Counter[str] = Counter()
        self.knobs: dict[str, Counter[str]] = {part: Counter() for part in PARTS}

    def see(self, observation: Observation) -> None:
        """One step; where a decision is due, it is taken, and once more without each part."""
        manager = self.manager
        manager.observe(observation)
        if not manager.due(observation.step):
            return
        without = {part: _without(part, manager) for part in PARTS}
        decision = manager.decide()
        self.decisions += 1
        for part, other in without.items():
            moved = {k: v / other.after[k] for k, v in decision.after.items() if not math.isclose(v, other.after[k])}
            self.knobs[part].update(moved.keys())
            verdict = decision.verdict is not other.verdict
            self.changed[part] += bool(moved) or verdict
            self.large[part] += verdict or any(abs(math.log(ratio)) > LARGE for ratio in moved.values())
        if decision.verdict is Verdict.ROLL_BACK:
            rolled_back(manager, observation.step)


def _without(part: str, manager: ContextAwareTrainingManager) -> Decision:
    other = copy.deepcopy(manager)
    if part == COORDINATION:
        other.config = BrainConfig.from_dict({**other.config.to_dict(), "coordination": "none"})
    else:
        blindfold(other, part)
    return other.decide()


def steered(kinds: Mapping[str, Mapping[str, Any]], seeds: int, steps: int) -> list[Watched]:
    """Micro-Tacotrons of all kinds of start under the whole brain."""
    settings = [MicroSetting(guided_weight=WEAK, **kind) for kind in kinds.values() for _ in range(seeds)]
    runs = MicroRuns(settings, [SEED + number % seeds for number in range(len(settings))])
    brains = [Watched(setting.capabilities, setting.host_values) for setting in settings]
    for _ in range(steps):
        for brain, seen in zip(brains, runs.step([brain.manager.knobs for brain in brains]), strict=True):
            brain.see(seen)
    return brains


def replayed(trace: Trace) -> Watched:
    """A recorded run, from what stands in it."""
    observations = trace.observations()
    losses = tuple(observations[0].losses) if observations else ("total",)
    turned = {knob: trace.column(f"knob.{knob}").tolist() for knob in KNOBS}
    turned = {knob: values for knob, values in turned.items() if all(math.isfinite(value) for value in values)}
    # What is recorded here are the benchmark's own runs.
    host = Capabilities(trace.host, losses, tuple(turned), "attention", True, grad_clip=Setting().clip)
    sigma = {GUIDED_SIGMA: turned[GUIDED_SIGMA][0]} if turned.get(GUIDED_SIGMA) else {}
    brain = Watched(host, sigma)
    for at, seen in enumerate(observations):
        brain.manager.knobs |= {knob: values[at] for knob, values in turned.items()}
        brain.see(seen)
    return brain


def rows(quick: bool, traces: Path | None = None) -> list[Row]:
    """A row for each part and kind of runs. ``traces``: a folder that holds a folder for each corpus."""
    seeds, steps, few = (1, 60, 2) if quick else (2, STEPS, None)
    made = []
    for name, kinds in (("healthy", HEALTHY), ("troubled", TROUBLED)):
        some = dict(list(kinds.items())[:few])
        made += _rows(steered(some, seeds, steps), f"micro-Tacotrons, {name} starts")
    for folder in _folders(traces):
        found = [trace for trace in load_folder(folder) if trace.host != CAPABILITIES.host]
        if found:
            made += _rows([replayed(trace) for trace in found[:few]], f"recorded {folder.name}")
    return made


def _folders(traces: Path | None) -> Iterator[Path]:
    yield from sorted(path for path in traces.iterdir() if path.is_dir()) if traces is not None else ()


def _rows(brains: list[Watched], runs: str) -> list[Row]:
    decisions = sum(brain.decisions for brain in brains)
    made = []
    for part in PARTS:
        changed = sum(brain.changed[part] for brain in brains)
        large = sum(brain.large[part] for brain in brains)
        knobs = sum((brain.knobs[part] for brain in brains), Counter())
        most = ", ".join(f"{knob} {count}" for knob, count in knobs.most_common(3))
        made.append(
            {
                "part": PART,
                "against": f"without {part}",
                "figure": f"share of the decisions that it changes, {runs}",
                "ours": changed / max(decisions, 1),
                "theirs": None,
                "note": f"{changed} of {decisions} decisions of {len(brains)} runs, {large} in the verdict or by over "
                f"{LARGE:.0%}{f'; {most}' if most else ''}",
            }
        )
    return made
