"""Real processes, gloo on this machine, of which one is wrong, frozen or killed: what the others make of it.

One life of 2, 4 or 8 processes goes through all scenarios. There is no host between them, as its exchange of gradients
would die with the killed rank: only the brain's meetings do. All ranks see one stream, so what they come to, with
one of them telling anything, must be what this process comes to alone, to the last bit.
"""

import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tts_brain.config import BrainConfig
from tts_brain.coordination.consensus import Vector, digest
from tts_brain.journal import JOURNAL_NAME, read_journal
from tts_brain.pytorch import ranks as ranks_module
from tts_brain.pytorch.ranks import Ranks, RanksLost
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import GUIDED_SIGMA, KNOBS, Capabilities

HOST = Capabilities(host="ranks", losses=("total", "mel"), knobs=tuple(KNOBS), alignment="attention")
QUICK = {"decide_every": 2, "attention_every": 1, "trial_steps": 4, "cooldown_steps": 2, "adaptation_rate": 0.3}
STEPS, FAULT_AT = 12, 8  # a step at which they meet
TIMEOUT, SHORT_TIMEOUT = 20.0, 3.0
SLACK = 2.0  # of a busy machine
PATIENCE = 120.0  # for a whole life; a hang fails the tests instead of holding them

Outcome = dict[str, Any]
NAMES = ("honest", "one_nan", "one_stale", "one_lies", "one_lies_of_the_outcome", "values_of_their_own", "killed")


class Wrong(Ranks):
    """Tells the others something else than it should."""

    tell: Callable[[Vector], Vector] = staticmethod(lambda values: values)

    def gather(self, values: Vector) -> Vector:
        return super().gather(self.tell(values))


def run(folder: Path, ranks: Ranks, *, apart: float = 0.0, before: Callable[[BrainSession, int], None] | None = None):
    """``STEPS`` under the brain. ``apart``: what the spectrogram losses of neighbours differ by."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    own = {"optimizers": [optimizer], "model": model, "parts": {"optimizer": optimizer}, "ranks": ranks}
    session = BrainSession(BrainConfig(**QUICK), HOST, folder, host_values={GUIDED_SIGMA: 0.4}, **own)
    found: Outcome = {"knobs": [], "active": [], "decisions": {}, "mine": [], "seconds": []}
    for step in range(1, STEPS + 1):
        if before is not None:
            before(session, step)
        rng = torch.Generator().manual_seed(step)
        attention = torch.rand(2, 12, 6, generator=rng) + 2 * torch.eye(6).repeat_interleave(2, 0)
        if session.wants_attention:
            session.see_attention(attention, torch.tensor([12, 12]), torch.tensor([6, 6]))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
        common = 3.0 - step / 10 + 0.05 * (step % 3)
        found["mine"].append(common + apart * ranks.index)
        began = time.monotonic()
        decision = session.after_batch({"total": common, "mel": found["mine"][-1]}, learning_rate=1e-3)
        found["seconds"].append(time.monotonic() - began)
        if decision is not None:
            found["decisions"][str(step)] = [decision.verdict.name, decision.reason]
        found["knobs"].append(dict(session.knobs))
        found["active"].append(session.active)
    found["seen"] = [value for _, value in session.manager.analyzer.series("mel")]
    found["state"] = digest(session.manager.state_dict())
    session.save(folder / "state.safetensors")
    session.close()
    return found


def with_one_wrong(folder: Path, tell: Callable[[Vector], Vector], **more: Any) -> Outcome:
    """The last rank tells what ``tell`` makes of what it should."""
    ranks = Wrong.of_this_run()
    if ranks.index == ranks.count - 1:
        ranks.tell = tell
    return run(folder, ranks, **more)


# The scenarios. Each is run by every rank. A vector longer than one number is what a rank saw: whether its brain has
# failed, then rows of step, whether skipped, and values; one number is the digest of the outcome.


def honest(folder: Path) -> Outcome:
    return run(folder, Ranks.of_this_run())


def one_nan(folder: Path) -> Outcome:
    """Whatever it sees is not a number, apart from the steps."""

    def tell(values: Vector) -> Vector:
        if values.size > 1:
            rows = values[1:].reshape(QUICK["decide_every"], -1)
            rows[:, 1:] = math.nan
        return values

    return with_one_wrong(folder, tell)


def one_stale(folder: Path) -> Outcome:
    """From its second meeting on it repeats what it told at its first."""
    first: list[Vector] = []

    def tell(values: Vector) -> Vector:
        if values.size == 1:
            return values
        first.append(values.copy())
        return first[0]

    return with_one_wrong(folder, tell)


def lie(values: Vector) -> Vector:
    """All of its values are far off, and every step was skipped."""
    if values.size > 1:
        values[1:].reshape(QUICK["decide_every"], -1)[:, 1:] = 1e300
    return values


def one_lies(folder: Path) -> Outcome:
    return with_one_wrong(folder, lie)


def values_of_their_own(folder: Path) -> Outcome:
    return with_one_wrong(folder, lie, apart=0.01)


def one_lies_of_the_outcome(folder: Path) -> Outcome:
    return with_one_wrong(folder, lambda values: values + 1.0 if values.size == 1 else values)


def dies(how: signal.Signals) -> None:
    os.kill(os.getpid(), how)


def killed(folder: Path) -> Outcome:
    """Of two, the last dies on its way to the meeting; of more, within it: all have told, none has the outcome."""
    ranks = Ranks.of_this_run()

    def before(session: BrainSession, step: int) -> None:
        if step == FAULT_AT and ranks.index == ranks.count - 1:
            if ranks.count == 2:
                dies(signal.SIGKILL)
            session.manager.decide = lambda: dies(signal.SIGKILL)

    found = run(folder, ranks, before=before)
    began = time.monotonic()
    try:
        ranks.gather(np.zeros(1))
    except RanksLost as error:
        found["again"] = [str(error), time.monotonic() - began]
    return found


def frozen(folder: Path) -> Outcome:
    """Among those that are left, one stops working and keeps its connections."""
    ranks_module.TIMEOUT = timedelta(seconds=SHORT_TIMEOUT)
    left = list(range(dist.get_world_size() - 1))
    group = dist.new_group(left, timeout=ranks_module.TIMEOUT, backend="gloo", use_local_synchronization=True)
    ranks = Ranks(group)

    def before(session: BrainSession, step: int) -> None:
        if step == FAULT_AT and ranks.index == ranks.count - 1:
            dies(signal.SIGSTOP)

    return run(folder, ranks, before=before)


def _rank(index: int, count: int, folder: Path) -> None:
    """One process; what each scenario returns, or its traceback, goes into a file."""
    torch.set_num_threads(1)
    ranks_module.TIMEOUT = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=index, world_size=count)
    for name in (*NAMES, "frozen") if count > 2 else NAMES:
        (folder / name).mkdir(exist_ok=True)
        try:
            outcome = globals()[name](folder / name)
        except Exception:
            outcome = {"error": traceback.format_exc()}
        (folder / f"{name}-{index}.json").write_text(json.dumps(outcome))
        if "error" in outcome:
            break  # the others no longer know where this rank is
    os._exit(0)  # the host's own group has lost a rank, too; taking it apart might wait for that one


class Life:
    """Processes that have lived through the scenarios; ``of`` has what each rank says of one."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        # Forked from one process that has imported everything, as that takes longer than all the rest. An optimizer of
        # torch's imports torch._dynamo at its first step.
        context = get_context("forkserver")
        context.set_forkserver_preload(["pytest", "tts_brain.pytorch.session", "torch._dynamo"])
        processes = [context.Process(target=_rank, args=(i, count, folder)) for i in range(count)]
        for process in processes:
            process.start()
        end = time.monotonic() + PATIENCE
        ended_by_itself = processes[: -2 if count > 2 else -1]
        for process in ended_by_itself:
            process.join(max(0.1, end - time.monotonic()))
        self.hung = [p.name for p in ended_by_itself if p.exitcode is None]
        for process in processes:
            process.kill()
            process.join()

    def of(self, name: str, gone: int = 0) -> list[Outcome]:
        """Of all but the last ``gone`` ranks; that these have not come to the end is part of the test."""
        found = [self.folder / f"{name}-{index}.json" for index in range(self.count)]
        assert [path.exists() for path in found] == [True] * (self.count - gone) + [False] * gone, self.hung
        outcomes = [json.loads(path.read_text()) for path in found[: self.count - gone]]
        assert not any("error" in o for o in outcomes), [o.get("error") for o in outcomes]
        assert not self.hung
        return outcomes

    def events(self, name: str) -> list[tuple[str, int]]:
        found = read_journal(self.folder / name)
        return [(r["event"], r["step"]) for r in found if r["kind"] == "event" and r["event"] != "advice"]


@pytest.fixture(scope="module", params=[2, 4, 8])
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    yield Life(request.param, tmp_path_factory.mktemp(f"faults{request.param}"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one process comes to, this one."""
    return json.loads(json.dumps(run(tmp_path_factory.mktemp("alone"), Ranks())))


def decided_as(outcomes: list[Outcome], alone: Outcome) -> None:
    """On every rank the same decisions, knobs and state as in one process alone."""
    verdicts = {verdict for verdict, _ in alone["decisions"].values()}
    assert "ACCEPT" in verdicts and alone["knobs"][0] != alone["knobs"][-1]  # else there was nothing to agree on
    for outcome in outcomes:
        for name in ("decisions", "knobs", "active", "seen", "state"):
            assert outcome[name] == alone[name], name


def held(outcomes: list[Outcome], alone: Outcome, first: int, why: str) -> None:
    """All decided as one process would, until ``first``; from then on every decision is to hold."""
    before = outcomes[0]["knobs"][first - 2]
    for outcome in outcomes:
        assert all(outcome["active"])
        assert outcome["knobs"] == alone["knobs"][: first - 1] + [before] * (STEPS - first + 1)
        assert outcome["decisions"].keys() == alone["decisions"].keys()
        for step, (verdict, reason) in outcome["decisions"].items():
            if int(step) < first:
                assert [verdict, reason] == alone["decisions"][step]
            else:
                assert verdict == "HOLD" and why in reason


@pytest.mark.parametrize("name", ["honest", "one_nan", "one_stale"])
def test_one_rank_that_is_wrong_changes_no_decision(life: Life, alone: Outcome, name: str) -> None:
    decided_as(life.of(name), alone)
    refused = [("ranks_refused", step) for step in range(4, STEPS + 1, 2)] if name == "one_stale" else []
    assert life.events(name) == refused


def test_from_four_ranks_on_a_liar_changes_no_decision(life: Life, alone: Outcome) -> None:
    outcomes = life.of("one_lies")
    if life.count >= 4:
        decided_as(outcomes, alone)
    else:  # of two nobody knows who lies; both believe the same
        assert outcomes[0]["state"] == outcomes[1]["state"] != alone["state"]


def test_what_is_decided_on_lies_between_what_honest_ranks_saw(life: Life) -> None:
    outcomes = life.of("values_of_their_own")
    assert len({o["state"] for o in outcomes}) == 1
    if life.count >= 4:
        honest_ones = np.array([o["mine"] for o in outcomes[:-1]])
        seen = np.array(outcomes[0]["seen"])
        assert len(seen) == STEPS and (honest_ones.min(0) <= seen).all() and (seen <= honest_ones.max(0)).all()


def test_where_outcomes_differ_all_hold(life: Life, alone: Outcome) -> None:
    held(life.of("one_lies_of_the_outcome"), alone, 2, "did not come to one decision")
    decisions = [r for r in read_journal(life.folder / "one_lies_of_the_outcome") if r["kind"] == "decision"]
    assert {r["reason"] for r in decisions} == {"the ranks did not come to one decision"}


def lost(life: Life, outcomes: list[Outcome], name: str, alone: Outcome) -> None:
    held(outcomes, alone, FAULT_AT, "a rank is gone, or did not come within")
    assert life.events(name) == [("rank_lost", FAULT_AT)]
    # The state goes on to be saved, and is the one that was last agreed on.
    assert len({o["state"] for o in outcomes}) == 1 and (life.folder / name / "state.safetensors").exists()
    assert (life.folder / name / JOURNAL_NAME).exists()


def test_where_one_rank_is_killed_the_others_hold_and_train_on(life: Life, alone: Outcome) -> None:
    outcomes = life.of("killed", gone=1)
    lost(life, outcomes, "killed", alone)
    for outcome in outcomes:
        assert max(outcome["seconds"]) < TIMEOUT / 2  # broken connections tell at once
        assert "earlier" in outcome["again"][0] and outcome["again"][1] < 0.5


def test_a_frozen_rank_is_waited_for_no_longer_than_the_time_out(life: Life, alone: Outcome) -> None:
    if life.count == 2:
        pytest.skip("of two, the one left over has nobody to wait for")
    outcomes = life.of("frozen", gone=2)
    lost(life, outcomes, "frozen", alone)
    for outcome in outcomes:
        assert outcome["seconds"][FAULT_AT - 1] < SHORT_TIMEOUT + SLACK
        assert max(outcome["seconds"][FAULT_AT:]) < SLACK  # it is not waited for again
    assert max(o["seconds"][FAULT_AT - 1] for o in outcomes) > SHORT_TIMEOUT / 2
