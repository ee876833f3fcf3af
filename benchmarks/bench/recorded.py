"""Recorded runs of hosts: what the simulation would have said of each move that was made, and what the run did then."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from bench.forks import HELD, VOTE, Decided
from bench.hindsight import HORIZON, Case, case_of, stirred
from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.context.lengths import LengthEffect
from tts_brain.coordination.outlook import dynamics, tracked
from tts_brain.feedback.filters import LOSS, RunFilters
from tts_brain.learning.micro_setting import CAPABILITIES
from tts_brain.learning.traces import Trace, load
from tts_brain.types import KNOBS, Verdict


def recorded_cases(folder: Path) -> dict[str, list[Case]]:
    """By the folder that the traces lie in; folders without a move are left out, and micro-Tacotrons: fresh ones are
    forked."""
    found: dict[str, list[Case]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        traces = [trace for trace in load(path) if trace.host != CAPABILITIES.host]
        found.setdefault(path.parent.name, []).extend(replayed(traces))
    return {name: some for name, some in found.items() if some}


def replayed(traces: Iterable[Trace]) -> Iterator[Case]:
    """A case for each step after which a knob whose effect is learned was turned so that it stirs."""
    learned = tracked(dict.fromkeys(KNOBS, 0.0))
    for number, trace in enumerate(traces):
        # The brain's own simulation, all but the knobs: what they stood at is in the trace.
        filters, analyzer, config = RunFilters(), ContextAnalyzer(forecasts=False), BrainConfig()
        lengths = LengthEffect()
        shown = [lengths.adjusted(one) for one in trace.observations()]
        values = {name: trace.column(f"knob.{name}").astype(float) for name in learned}
        mel = [one.losses.get("mel", np.nan) for one in shown]
        seen = np.stack([mel, trace.column("attention.attention_diag")], axis=1).astype(float)
        for at, observation in enumerate(shown[:-HORIZON]):
            held, made = ({k: float(v[row]) for k, v in values.items() if v[row] > 0.0} for row in (at, at + 1))
            filters.observe(observation, held)
            analyzer.observe(observation)
            if set(held) != set(made) or held == made:
                continue
            course = dynamics(filters, analyzer.context().best_attention_diag, config.divergence_sigmas)
            one = Decided(
                run=number,
                step=observation.step,
                seed=0,
                verdict=Verdict.ACCEPT,
                changed=(),
                level=filters.metric(LOSS).latent[0],
                noise=filters.metric(LOSS).noise,
                course=course,
                weighed=None,
                knobs={HELD: held, VOTE: made},
                before=seen[max(at - 9, 0) : at + 1],
                run_after=seen[at + 1 :],
            )
            if course is not None and stirred(one, VOTE):
                yield case_of(one, VOTE, one.run_after)
