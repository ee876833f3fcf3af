"""Adam whose weights and moments a host keeps in float16: with the real optimizers, against the same in float32."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam

from tts_brain.config import BrainConfig
from tts_brain.journal import read_journal
from tts_brain.pytorch.moments import HalfMoments, lost_to_half
from tts_brain.pytorch.optimizer import OptimizerTap
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import Capabilities

RATE = 1e-2
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": lambda p: Adam(p, lr=RATE, eps=1e-6),
    "adam, decay": lambda p: Adam(p, lr=RATE, eps=1e-6, weight_decay=1e-6),
    "adam, amsgrad": lambda p: Adam(p, lr=RATE, eps=1e-6, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=RATE, eps=1e-6, weight_decay=1e-2),
    "radam": lambda p: RAdam(p, lr=3.0 * RATE, eps=1e-6),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


class Run:
    """A small network, its gradients some 1e-4 in size as those of a large model are."""

    def __init__(self, name: str = "adam", *, half: bool = True) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.faults: list[BaseException] = []
        self._batches = torch.Generator().manual_seed(1)
        if half:
            self.optimizer.register_step_post_hook(_halve)

    def tap(self, *, guard: bool = True) -> OptimizerTap:
        return OptimizerTap(self.optimizer, guard=guard, on_fault=self.faults.append)

    def backward(self, size: float = 1e-3) -> float:
        x = torch.randn(64, 8, generator=self._batches)
        loss = (self.model(x) - x[:, :1] * x[:, 1:2]).square().mean()
        self.optimizer.zero_grad()
        (size * loss).backward()
        return loss.item()

    def go(self, steps: int) -> float:
        """Mean loss of the last ten steps."""
        losses = []
        for _ in range(steps):
            losses.append(self.backward())
            self.optimizer.step()
        return sum(losses[-10:]) / 10

    def moments(self, name: str = "exp_avg_sq") -> torch.Tensor:
        return torch.cat([self.optimizer.state[p][name].flatten() for p in self.model.parameters()])


def _halve(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
            for tensor in (parameter.data, *values):
                tensor.copy_(tensor.half().float())


@every_optimizer
def test_moments_in_float16_are_lost_and_held_they_train_as_in_float32(name: str) -> None:
    whole, lost, held = Run(name, half=False), Run(name), Run(name)
    tap = held.tap()
    for run in (whole, lost, held):
        run.go(3)
    assert lost_to_half(lost.optimizer) and not lost_to_half(whole.optimizer)
    assert (lost.moments() == 0).float().mean() > 0.9
    assert tap.hold_moments() and not tap.hold_moments()
    ends = [run.go(300) for run in (whole, lost, held)]
    assert ends[2] < 1.2 * ends[0] < ends[1] / 2.0
    assert (held.moments() > 0).float().mean() > 0.95
    assert not held.faults


@every_optimizer
def test_groups_are_the_hosts_between_steps_and_moments_in_its_units_when_let_go(name: str) -> None:
    run = Run(name)
    tap = run.tap()
    run.go(20)
    before = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    assert tap.hold_moments()
    run.go(50)
    assert [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups] == before
    held = run.moments()
    tap.detach()
    ratios = (held / run.moments())[run.moments() > 0].sqrt()
    assert torch.equal(ratios, torch.exp2(ratios.log2().round()))
    assert ratios.min() > 16.0
    assert not run.optimizer._optimizer_step_pre_hooks


def test_a_checkpoint_has_the_hosts_units_and_goes_on_where_it_was() -> None:
    run = Run()
    tap = run.tap()
    run.go(20)
    assert tap.hold_moments()
    run.go(30)
    held, said = run.moments().clone(), copy.deepcopy(run.optimizer.state_dict())
    assert max(s["exp_avg_sq"].max().item() for s in said["state"].values()) < 1e-3 * held.max()
    assert torch.equal(run.moments(), held)  # saving changes nothing
    run.go(10)
    run.optimizer.load_state_dict(said)
    torch.testing.assert_close(run.moments(), held, rtol=0, atol=0)
    tap.detach()
    run.optimizer.load_state_dict(said)
    assert run.moments().max() < 1e-3 * held.max()


@given(st.integers(-12, 12))
def test_no_gradient_of_any_size_is_lost_or_infinite_in_a_squared_moment(power: int) -> None:
    run = Run()
    run.go(3)
    moments = HalfMoments(run.optimizer)
    for size in (10.0**power, 10.0 ** (power + 4)):
        run.backward(size)
        moments.multiply()
        largest = [p.grad.abs().max().item() for p in run.model.parameters() if p.grad is not None]
        assert max(largest) <= 200.0 * (1.0 + 1e-6) and max(largest) ** 2 < torch.finfo(torch.float16).max
        assert min(largest) > 6.0 or power < -2
    assert all(scale == 2.0 ** round(math.log2(scale)) for scale in map(float, moments.scales.values()))
    assert len(moments.scales) == 4


def test_what_is_not_lost_is_left_alone() -> None:
    observing = Run()
    tap = observing.tap(guard=False)
    observing.go(30)
    assert lost_to_half(observing.optimizer) and not tap.hold_moments()
    network = torch.nn.Linear(4, 4)
    sgd = SGD(network.parameters(), lr=0.1, momentum=0.9)
    unstarted = Adam(network.parameters())
    assert not lost_to_half(sgd) and not lost_to_half(unstarted)


def test_a_model_that_is_half_itself_is_kept_from_what_is_not_a_number() -> None:
    """With eps 1e-8, 0 in float16, the first step of Adam is 0 / 0 wherever a gradient is 0."""

    def trained(hold: bool) -> torch.Tensor:
        torch.manual_seed(0)
        network = torch.nn.Linear(8, 8).half()
        optimizer = Adam(network.parameters(), lr=1e-3)
        tap = OptimizerTap(optimizer, guard=True, on_fault=lambda error: pytest.fail(str(error)))
        for step in range(5):
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, 1e-4)
                parameter.grad[0] = 0.0 if step > 2 or not hold else 1e-4
            if step == 2 and hold:
                network.requires_grad_(False)
                for parameter in network.parameters():  # as they were before the first NaN
                    parameter.copy_(torch.full_like(parameter, 0.25))
                assert tap.hold_moments()
            optimizer.step()
        return network.weight

    assert not torch.isfinite(trained(False)).all()
    assert torch.isfinite(trained(True)).all()


class Watched(Run):
    """The same under a session that decides every other step."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__()
        self.folder, host = (
            folder,
            Capabilities("one", ("total", "mel"), ("learning_rate",), "attention", stop_token=False),
        )
        config = BrainConfig(**{"decide_every": 2, "journal_every": 1, **settings})
        self.session = BrainSession(
            config, host, folder, optimizers=[self.optimizer], model=self.model, parts={"optimizer": self.optimizer}
        )

    def go(self, steps: int) -> float:
        for _ in range(steps):
            loss = self.backward()
            self.optimizer.step()
            self.session.after_batch({"total": loss, "mel": loss}, text_length=12.0)
        return loss

    def said(self) -> list[int]:
        return [r["step"] for r in read_journal(self.folder) if r.get("event") == "moments_held"]


def test_a_session_holds_them_after_its_first_decision_and_says_so_once(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.go(40)
    assert run.said() == [3] and run.session.active
    assert (run.moments() > 0).float().mean() > 0.95
    run.session.fault(RuntimeError("a fault of ours"))  # it steps aside, and the moments are the host's again
    assert run.moments().max() < 1e-4
    run.go(5)
    assert (run.moments() == 0).float().mean() > 0.5


def test_a_mode_that_touches_nothing_leaves_them(tmp_path: Path) -> None:
    watched, alone = Watched(tmp_path, mode="observe"), Run()
    watched.go(40)
    alone.go(40)
    assert watched.said() == [] and torch.equal(watched.moments(), alone.moments())


def test_a_resumed_session_holds_them_again(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.go(20)
    run.session.save(tmp_path / "sidecar")
    said = copy.deepcopy(run.optimizer.state_dict())
    again = Watched(tmp_path)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(said)
    assert again.session.load(tmp_path / "sidecar")
    again.go(10)
    assert again.said()[0] == 3 and len(again.said()) == 2
    assert (again.moments() > 0).float().mean() > 0.95
