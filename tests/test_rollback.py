import copy
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from tts_brain.feedback.rollback import MIB, RandomStates, RollbackManager

PLACES = ["memory", "disk"]
SIZES = [0, 1, 200_000, 350_000, 520_000, 525_000, 900_000, MIB - 2000, MIB - 10, MIB, MIB + 1]  # bytes


class NoamLR(lr_scheduler.LambdaLR):
    """As Coqui's: rises for ``warmup`` steps, then falls with the root of the step."""

    def __init__(self, optimizer: torch.optim.Optimizer, warmup: int) -> None:
        super().__init__(optimizer, lambda s: warmup**0.5 * min((s + 1) * warmup**-1.5, (s + 1) ** -0.5))


class Box:
    """A part whose state is whatever it is given."""

    def __init__(self, state) -> None:
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state, /) -> None:
        self.state = state


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.Conv1d(4, 4, 1)
        self.middle = self.last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.norm(self.first(x)).tanh(), 0.5, self.training)
        return self.last(self.middle(x).tanh())


class Run:
    """A small real training: convolution, batch norm, dropout, tied weights, data drawn from three generators."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], scheduler: str) -> None:
        torch.manual_seed(0)
        self.model = Tied()
        self.optimizer = optimizer(self.model.parameters(), lr=1e-2)
        self.scheduler = {
            "noam": lambda: NoamLR(self.optimizer, 5),
            "one_cycle": lambda: lr_scheduler.OneCycleLR(self.optimizer, max_lr=1e-2, total_steps=100),
            "steps": lambda: lr_scheduler.MultiStepLR(self.optimizer, [4, 8]),
            "none": lambda: None,
        }[scheduler]()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        self.parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "off": torch.amp.GradScaler("cuda", enabled=False),
            "random": RandomStates(),
        }

    def train(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.randn(8, 4, 16) * random.random() + float(np.random.rand())
            loss = (self.model(x) - x).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scheduler is not None:
                self.scheduler.step()
            losses.append(loss.item())
        return losses

    def fingerprint(self) -> list:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        plain = [g["lr"] for g in self.optimizer.param_groups], self.scaler.get_scale(), torch.rand(1).item()
        return [[t.tolist() for t in tensors], plain, random.random(), np.random.rand()]


def manager(place: str, folder: Path, **settings) -> RollbackManager:
    return RollbackManager(place=place, folder=folder, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scheduler", ["noam", "one_cycle", "steps", "none"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RAdam])
def test_training_on_after_a_restore_is_bit_identical(tmp_path: Path, place: str, scheduler: str, optimizer) -> None:
    run, ring = Run(optimizer, scheduler), manager(place, tmp_path)
    run.train(7)
    assert ring.take(7, run.parts)
    first = run.train(9), run.fingerprint()
    for _ in range(2):  # twice: a restored optimizer must not train on inside the snapshot
        with torch.no_grad():
            for p in run.model.parameters():
                p.fill_(float("nan"))
        run.train(2)
        assert ring.restore(run.parts) == 7
        assert (run.train(9), run.fingerprint()) == first


@pytest.mark.parametrize("place", PLACES)
def test_taking_changes_nothing(tmp_path: Path, place: str) -> None:
    runs = []
    for every in (1, 100):
        run, ring = Run(torch.optim.Adam, "noam"), manager(place, tmp_path / f"{every}")
        random.seed(1)
        np.random.seed(1)
        for step in range(1, 9):
            run.train(1)
            if step % every == 0:
                ring.take(step, run.parts)
        runs.append(run.fingerprint())
    assert runs[0] == runs[1]


def test_another_process_finds_the_snapshots_on_disk(tmp_path: Path) -> None:
    run, ring = Run(torch.optim.Adam, "noam"), manager("disk", tmp_path, snapshots=3)
    for step in (1, 2, 3):
        run.train(1)
        ring.take(step, run.parts)
    run.train(4)
    last = tmp_path / "snapshot-0000000003.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    (tmp_path / "snapshot-0000000004.safetensors.77.tmp").write_bytes(b"torn")
    (tmp_path / "snapshot-final.safetensors").write_bytes(b"not ours")
    again = manager("disk", tmp_path, snapshots=3)
    assert again.steps == (1, 2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["snapshot-0000000001.safetensors", "snapshot-0000000002.safetensors", "snapshot-final.safetensors"]
    assert again.bytes_held == sum((tmp_path / name).stat().st_size for name in names[:2])
    other = Run(torch.optim.Adam, "noam")
    assert again.restore(other.parts) == 2
    first = other.train(3), other.fingerprint()
    assert again.restore(run.parts) == 2
    assert (run.train(3), run.fingerprint()) == first
    assert manager("disk", tmp_path, snapshots=1).steps == (2,)


def test_a_snapshot_torn_later_is_passed_over(tmp_path: Path) -> None:
    ring, box = manager("disk", tmp_path), Box({"x": 1})
    ring.take(1, {"box": box})
    box.state = {"x": 2}
    ring.take(2, {"box": box})
    (tmp_path / "snapshot-0000000002.safetensors").write_bytes(b"")
    assert ring.restore({"box": box}) == 1 and box.state == {"x": 1} and ring.steps == (1,)
    (tmp_path / "snapshot-0000000001.safetensors").unlink()
    assert ring.restore({"box": box}) is None and ring.steps == ()


@pytest.mark.parametrize("place", PLACES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    snapshots=st.integers(1, 4),
    moves=st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(0, 30), st.sampled_from(SIZES)),
            st.tuples(st.just("restore"), st.none() | st.integers(-1, 30), st.just(0)),
            st.tuples(st.just("drop_after"), st.integers(-1, 30), st.just(0)),
        ),
        max_size=15,
    ),
)
def test_laws_of_the_ring(tmp_path_factory: pytest.TempPathFactory, place: str, snapshots: int, moves) -> None:
    folder = tmp_path_factory.mktemp("ring")
    ring, box = manager(place, folder, snapshots=snapshots, budget_mb=1), Box(None)
    values: dict[int, tuple[int, int]] = {}
    for number, (move, step, size) in enumerate(moves):
        before = ring.steps
        if move == "take":
            box.state = {"big": torch.full((size,), number % 256, dtype=torch.uint8), "size": size}
            taken = ring.take(step, {"box": box})
            assert taken == (ring.last_refusal == "")
            assert taken or (ring.steps == before and size > 0.99 * MIB)
            if taken:
                values[step] = (size, number % 256)
                assert ring.steps[-1] == step and set(ring.steps) <= {*before, step}
        elif move == "restore":
            fitting = [held for held in before if step is None or held <= step]
            for _ in range(2):
                box.state = None
                restored = ring.restore({"box": box}, before=step)
                assert restored == (fitting[-1] if fitting else None)
                assert ring.steps == (tuple(fitting) if fitting else before)
                if restored is not None:
                    size, fill = values[restored]
                    assert box.state["size"] == size == len(box.state["big"])
                    assert (box.state["big"] == fill).all()
                    box.state["big"].zero_()  # must not reach the ring
        else:
            ring.drop_after(step)
            assert ring.steps == tuple(held for held in before if held <= step)
        assert len(ring.steps) <= snapshots and list(ring.steps) == sorted(set(ring.steps))
        assert ring.bytes_held <= MIB
        if place == "disk":
            assert ring.bytes_held == sum(path.stat().st_size for path in folder.iterdir())
        else:
            assert ring.bytes_held == sum(values[held][0] for held in ring.steps)


@pytest.mark.parametrize("place", PLACES)
def test_the_oldest_makes_room_within_the_budget(tmp_path: Path, place: str) -> None:
    ring, box = manager(place, tmp_path, snapshots=5, budget_mb=1), Box(torch.zeros(300_000, dtype=torch.uint8))
    held = []
    for step in range(5):
        assert ring.take(step, {"box": box})
        held.append(ring.steps)
    assert held == [(0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)]
    box.state = torch.zeros(800_000, dtype=torch.uint8)
    assert ring.take(5, {"box": box}) and ring.steps == (5,)


def test_refusal_says_what_to_write(tmp_path: Path) -> None:
    ring = RollbackManager(snapshots=2, budget_mb=1)
    ring.take(1, {"box": Box(torch.ones(1))})
    assert not ring.take(2, {"box": Box({"x": [torch.ones(MIB), np.ones(3)]})})
    assert "5 MiB, more than the budget of 1 MiB" in ring.last_refusal
    assert "snapshot_budget_mb: 10" in ring.last_refusal
    assert ring.steps == (1,)
    assert ring.take(3, {"box": Box(torch.ones(1))}) and ring.last_refusal == ""


def test_views_take_only_what_they_show() -> None:
    ring, box = RollbackManager(budget_mb=1), Box(torch.ones(MIB)[:10])
    assert ring.take(1, {"box": box}) and ring.bytes_held == 40
    ring.restore({"box": box})
    assert box.state.untyped_storage().nbytes() == 40


@pytest.mark.parametrize("place", PLACES)
def test_other_parts_are_refused_before_anything_is_loaded(tmp_path: Path, place: str) -> None:
    ring = manager(place, tmp_path)
    a, b, c = Box(1), Box(2), Box(3)
    ring.take(5, {"a": a, "b": b, "none": None})
    ring.take(6, {"a": a, "c": c})
    a.state = 10
    with pytest.raises(ValueError, match=r"step 6 .*missing from parts \['c'\], not in the snapshot \['b'\]"):
        ring.restore({"a": a, "b": b})
    assert a.state == 10 and ring.steps == (5, 6)
    assert ring.restore({"b": b, "a": a, "none": None}, before=5) == 5 and a.state == 1 and ring.steps == (5,)


class Callable:
    """What some schedulers keep: a bound method, with all of the host behind it."""

    def __deepcopy__(self, memo):
        raise AssertionError("the host was copied")

    def rate(self) -> float:
        return 1.0


def test_memory_keeps_what_no_file_can(tmp_path: Path) -> None:
    host = Callable()
    state = {"anneal": host.rate, "f": print, "rest": defaultdict(list, {1: [torch.ones(2)]}), "size": torch.Size([2])}
    ring, box = RollbackManager(), Box(state)
    assert ring.take(1, {"box": box}) and ring.bytes_held == 8
    state["rest"][1][0].zero_()
    ring.restore({"box": box})
    assert box.state["anneal"] == host.rate and box.state["f"] is print
    assert box.state["rest"][1][0].sum() == 2 and box.state["rest"]["new"] == []
    disk = manager("disk", tmp_path)
    disk.take(1, {"box": Box(1)})
    with pytest.raises(TypeError, match=r"^box\.anneal: a builtins\.method cannot be stored"):
        disk.take(2, {"box": Box({"anneal": host.rate})})
    assert disk.steps == (1,) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"snapshots": 0}, "snapshots=0"),
        ({"budget_mb": 0}, "budget_mb=0"),
        ({"place": "cloud"}, "place='memory' or place='disk'"),
        ({"place": "disk"}, "needs a folder"),
    ],
)
def test_bad_settings(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RollbackManager(**settings)


def test_negative_step_and_empty_ring() -> None:
    ring = RollbackManager()
    with pytest.raises(ValueError, match="step=-1 is negative"):
        ring.take(-1, {})
    assert ring.restore({}) is None and ring.steps == () and ring.bytes_held == 0


@pytest.mark.parametrize("place", PLACES)
def test_newest_is_the_one_that_restore_would_take(tmp_path: Path, place: str) -> None:
    """Ranks agree on a step before any of them goes back to it."""
    ring, parts = manager(place, tmp_path, snapshots=3), {"box": Box(0)}
    assert ring.newest() is None and ring.newest(5) is None
    for step in (10, 20, 30):
        ring.take(step, parts)
    for before in (None, 31, 30, 29, 20, 10, 9, -1):
        expected = max((s for s in (10, 20, 30) if before is None or s <= before), default=None)
        assert ring.newest(before) == expected
    assert ring.steps == (10, 20, 30)  # asking drops nothing
    assert ring.restore(parts, before=29) == 20 == ring.newest()


def test_random_states_do_not_alias_and_repeat() -> None:
    part = RandomStates()
    state = copy.deepcopy(part.state_dict())
    draws = []
    for _ in range(2):
        part.load_state_dict(state)
        draws.append((random.gauss(0, 1), np.random.randn(), torch.randn(2).tolist()))
    assert draws[0] == draws[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", PLACES)
def test_cuda_tensors_and_generators_repeat(tmp_path: Path, place: str) -> None:
    weight = torch.ones(4, device="cuda", requires_grad=True)
    optimizer, ring = torch.optim.Adam([weight]), manager(place, tmp_path)
    parts = {"optimizer": optimizer, "random": RandomStates()}
    (weight * torch.rand(4, device="cuda")).sum().backward()
    optimizer.step()
    ring.take(1, parts)
    first = torch.rand(4, device="cuda").tolist()
    optimizer.step()
    assert ring.restore(parts) == 1
    assert torch.rand(4, device="cuda").tolist() == first
    assert optimizer.state[weight]["exp_avg"].is_cuda and optimizer.state[weight]["step"] == 1
