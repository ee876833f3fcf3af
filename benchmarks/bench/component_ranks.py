"""What a decision costs where several ranks take it: real gloo processes on this machine, and a model for more.

A decision of several ranks is a decision, a copy of the state before it, a merge of what all saw, a digest, and two
exchanges (``pytorch/meeting.py``). *Exchange* is those two alone, after a barrier. The simplest alternative is what
hosts do for their own log: an all-reduce of the losses at each step, ``decide_every`` of them per decision. It
outvotes nobody and tells nothing of the outcome.

Figures are the least of many, as ``timeit`` has it: with more ranks than cores, and other jobs on them, a median is
mostly the waiting for a core. What is left of that grows with the ranks, and is in what is measured.

Model: gloo gathers in a ring, so its time is a latency and a term per rank, neither of them below 0, fitted to what was
measured by least squares of the relative errors; the merge is measured at any number of ranks, in one process. It knows
of no network but this machine's own.
"""

from __future__ import annotations

import copy
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from bench.component_time import LOSSES, observations
from tts_brain.config import BrainConfig
from tts_brain.coordination.consensus import digest, median_of_ranks, pack, row_width
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.meeting import Meeting
from tts_brain.pytorch.ranks import Ranks
from tts_brain.types import GUIDED_SIGMA, KNOBS, Capabilities

PART = "ranks"
MEASURED, MODELLED = (1, 2, 4, 8), (16, 64, 256, 1024)
_WARM_UP = 20  # decisions: the windows are full then
_PATIENCE_S = 300.0

Row = dict[str, Any]


@dataclass(frozen=True)
class Cost:
    """In ms per decision: the whole of it, the two exchanges in it, and the all-reduces at each step."""

    whole: float
    exchange: float = 0.0
    each_step: float = 0.0


def _rank(index: int, count: int, folder: str, rounds: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=count)
    ranks = Ranks.of_this_run()
    config = BrainConfig()
    vector = np.zeros(1 + config.decide_every * row_width(LOSSES))
    losses = torch.zeros(len(LOSSES))

    def exchange() -> None:
        ranks.gather(vector)
        ranks.gather(np.zeros(1))

    def each_step() -> None:
        for _ in range(config.decide_every):
            dist.all_reduce(losses)

    whole = _whole(config, ranks, rounds)
    several = count > 1
    cost = Cost(whole, *(_timed(work, 10 * rounds) for work in (exchange, each_step) if several))
    if ranks.first:
        results.put(asdict(cost))
    dist.barrier()
    dist.destroy_process_group()


def _whole(config: BrainConfig, ranks: Ranks, rounds: int) -> float:
    """A decision as ``BrainSession`` takes it, less the observing, which is a cost of each step."""
    host = Capabilities("made-up", LOSSES, tuple(KNOBS), "attention", True)
    manager, stream = ContextAwareTrainingManager(config, host, {GUIDED_SIGMA: 0.4}), observations(config)
    meeting = Meeting(ranks, LOSSES, config.decide_every)
    taken = []
    for _ in range(_WARM_UP + rounds):
        mine = list(itertools.islice(stream, config.decide_every))
        dist.barrier()
        start = time.perf_counter()
        told = meeting.tell(mine[-1].step, mine, failed=False) if ranks.several else None
        spent = time.perf_counter() - start
        for seen in mine if told is None else told.seen:
            manager.observe(seen)
        dist.barrier()
        start = time.perf_counter()
        if ranks.several:
            copy.deepcopy(manager.state_dict())
        manager.decide()
        if ranks.several and not meeting.same_outcome(manager.state_dict()):
            raise RuntimeError("the ranks do not agree on what all were shown alike")
        taken.append(1000.0 * (spent + time.perf_counter() - start))
    return min(taken[_WARM_UP:])


def _timed(work: Callable[[], object], rounds: int) -> float:
    """ms, after a barrier each."""
    taken = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        work()
        taken.append(1000.0 * (time.perf_counter() - start))
    return min(taken)


def measure(count: int, rounds: int) -> Cost:
    """``count`` processes, as the first of them sees it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tts_brain.pytorch.session"])
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(i, count, folder, rounds, results), daemon=True) for i in range(count)
        ]
        for process in processes:
            process.start()
        cost = Cost(**results.get(timeout=_PATIENCE_S))
        for process in processes:
            process.join(30.0)
    return cost


def line(counts: Sequence[int], ms: Sequence[float]) -> tuple[float, float]:
    """Latency and term per rank, neither below 0: least squares of the relative errors, as the times lie far apart."""
    columns = np.stack([np.ones(len(counts)), np.asarray(counts, dtype=float)], axis=1)
    latency, per_rank = nnls(columns / np.asarray(ms, dtype=float)[:, None], np.ones(len(counts)))[0].tolist()
    return latency, per_rank


def merge_ms(count: int, rounds: int) -> float:
    """The merge of ``count`` ranks' rows in this process."""
    config = BrainConfig()
    rows = pack(list(itertools.islice(observations(config), config.decide_every)), LOSSES)
    noise = np.random.default_rng(0).normal(size=(count, *rows.shape))
    everybody = rows[None] * (1.0 + 0.01 * noise)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        median_of_ranks(everybody)
        taken.append(1000.0 * (time.perf_counter() - start))
    return min(taken)


def rows(quick: bool = False) -> list[Row]:
    """Measured, then modelled."""
    rounds = 5 if quick else 60
    costs = {count: measure(count, rounds) for count in (MEASURED[:3] if quick else MEASURED)}
    return _measured(costs, rounds) + _modelled(costs, rounds)


def _measured(costs: Mapping[int, Cost], rounds: int) -> list[Row]:
    found = []
    here = f"on {os.cpu_count()} cores"
    for count, cost in costs.items():
        note = f"measured, least of {rounds} decisions, processes: {count}, {here}"
        found.append(_row("one process", f"ms per decision, ranks: {count}", cost.whole, costs[1].whole, note))
    for count, cost in costs.items():
        if count > 1:
            note = f"measured, least of {10 * rounds} exchanges, processes: {count}, {here}"
            figure = f"ms of exchange per decision, ranks: {count}"
            found.append(_row(_each_step(), figure, cost.exchange, cost.each_step, note))
    return found


def _modelled(costs: Mapping[int, Cost], rounds: int) -> list[Row]:
    several = [count for count in costs if count > 1]
    lines = {
        name: line(several, [getattr(costs[count], name) for count in several]) for name in ("exchange", "each_step")
    }
    latency, per_rank = lines["exchange"]
    off = ", ".join(f"{(latency + per_rank * n) / costs[n].exchange - 1.0:+.0%} at {n}" for n in several)
    fitted = f"MODEL: {latency:.3f} ms + {per_rank:.3f} ms per rank; where measured, off by {off}"
    found = []
    for count in MODELLED:
        ours, theirs = (lines[name][0] + lines[name][1] * count for name in ("exchange", "each_step"))
        found.append(_row(_each_step(), f"ms of exchange per decision, ranks: {count} (model)", ours, theirs, fitted))
    own = costs[1].whole + _copy_and_digest_ms(rounds)
    for count in MODELLED:
        merged = merge_ms(count, rounds)
        whole = own + merged + latency + per_rank * count
        note = (
            f"MODEL: {own:.1f} ms of its own, {merged:.1f} ms to merge (both measured), the rest exchange; a core each"
        )
        found.append(_row("one process", f"ms per decision, ranks: {count} (model)", whole, costs[1].whole, note))
    return found


def _copy_and_digest_ms(rounds: int) -> float:
    """What several ranks do beside the exchange: the state is copied before the decision, and summed up after it."""
    config = BrainConfig()
    host = Capabilities("made-up", LOSSES, tuple(KNOBS), "attention", True)
    manager = ContextAwareTrainingManager(config, host, {GUIDED_SIGMA: 0.4})
    for seen in itertools.islice(observations(config), _WARM_UP * config.decide_every):
        manager.observe(seen)
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        copy.deepcopy(manager.state_dict())
        digest(manager.state_dict())
        taken.append(1000.0 * (time.perf_counter() - start))
    return min(taken)


def _each_step() -> str:
    return f"all-reduce of the losses, {BrainConfig().decide_every} times"


def _row(against: str, figure: str, ours: float, theirs: float, note: str) -> Row:
    found = {"part": PART, "against": against, "figure": figure, "ours": round(ours, 3), "theirs": round(theirs, 3)}
    return found | {"note": note}
