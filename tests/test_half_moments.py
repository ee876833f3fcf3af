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
from torch import Tensor
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
    "adam, decay": lambda p: Adam(p, lr=RATE, eps=1e-6, weight_decay=1e-4),
    "adam, amsgrad": lambda p: Adam(p, lr=RATE, eps=1e-6, amsgrad=True),
    "adamw": lambda p: AdamW(p, lr=RATE, eps=1e-6, weight_decay=1e-2),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def never(error: BaseException) -> None:
    raise error


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

    def moments(self, name: str = "exp_avg_sq") -> Tensor:
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


class One:
    """One weight of 1 under a constant gradient, in float32: what a step is, in rates."""

    def __init__(self, gradient: float, *, hold: bool, kind: type[Optimizer] = Adam, **settings: Any) -> None:
        self.weight = torch.nn.Parameter(torch.ones(1, 1))
        self.optimizer = kind([self.weight], lr=RATE, **settings)
        self.gradient = gradient
        if hold:
            self.moments = HalfMoments(self.optimizer, never)

    def steps(self, count: int) -> list[float]:
        moved = []
        for _ in range(count):
            before = self.weight.item()
            self.weight.grad = torch.full((1, 1), self.gradient)
            group = self.optimizer.param_groups[0]
            own = dict(group)
            if hasattr(self, "moments"):
                held = self.moments.during_step(group)
                self.moments.multiply()
                group.update(held)
            self.optimizer.step()
            group.update(own)
            moved.append((before - self.weight.item()) / RATE)
        return moved


@pytest.mark.parametrize("kind", [Adam, AdamW])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("gradient", [0.02, -0.4, 30.0])
def test_a_step_is_that_of_the_host_with_its_decay(kind: type[Optimizer], decay: float, gradient: float) -> None:
    made = [One(gradient, hold=hold, kind=kind, weight_decay=decay, eps=1e-8).steps(6) for hold in (False, True)]
    assert made[1] == pytest.approx(made[0], rel=2e-3)


@given(st.floats(-7, 0), st.floats(-9, 0))
def test_no_step_is_larger_than_the_hosts_in_float32(gradient: float, eps: float) -> None:
    """An eps of 1e-4 is what is advised for float16."""
    alone, held = (One(10.0**gradient, hold=hold, eps=10.0**eps) for hold in (False, True))
    assert all(0.0 <= ours <= host * 1.02 + 1e-4 for host, ours in zip(alone.steps(4), held.steps(4), strict=True))
    scale = next(iter(held.moments.scales.values())).item()
    assert scale == 2.0 ** round(math.log2(scale))


@given(st.integers(-4, 12))
def test_the_largest_of_a_gradient_is_neither_lost_nor_infinite_in_a_squared_moment(power: int) -> None:
    run = Run()
    run.go(3)
    for group in run.optimizer.param_groups:
        group["eps"] = 1e-12
    moments = HalfMoments(run.optimizer, never)
    for size in (10.0**power, 10.0 ** (power + 4)):
        run.backward(size)
        gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
        before = [g.abs().max().item() for g in gradients]
        moments.multiply()
        largest = [g.abs().max().item() for g in gradients]
        assert max(largest) <= 200.0 * (1.0 + 1e-6) and max(largest) ** 2 < torch.finfo(torch.float16).max
        assert all(now > 6.0 or now == old * 2.0**15 for old, now in zip(before, largest, strict=True))
    assert len(moments.scales) == 4


def test_a_gradient_of_nothing_but_zeros_fixes_no_scale() -> None:
    one = One(0.0, hold=True)
    assert one.steps(2) == [0.0, 0.0] and not one.moments.scales
    one.gradient = 1e-3
    one.steps(1)
    assert len(one.moments.scales) == 1


@every_optimizer
def test_groups_are_the_hosts_between_steps_and_moments_in_its_units_when_let_go(name: str) -> None:
    run = Run(name)
    tap = run.tap()
    run.go(20)
    before = [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups]
    assert tap.hold_moments()
    run.go(50)
    assert [{k: v for k, v in group.items() if k != "params"} for group in run.optimizer.param_groups] == before
    names = [n for n in ("exp_avg_sq", "max_exp_avg_sq") if n in run.optimizer.state[run.model[0].weight]]
    held = {n: run.moments(n) for n in names}
    tap.detach()
    for n in names:
        ratios = (held[n] / run.moments(n))[run.moments(n) > 0].sqrt()
        assert torch.equal(ratios, torch.exp2(ratios.log2().round())) and ratios.min() > 16.0
    for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_optimizer_state_dict_pre_hooks"):
        assert len(getattr(run.optimizer, hooks)) == (hooks == "_optimizer_step_post_hooks"), hooks  # _halve's
    for hooks in ("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_post_hooks"):
        assert not getattr(run.optimizer, hooks), hooks


def test_a_checkpoint_has_the_hosts_units_and_goes_on_where_it_was() -> None:
    run = Run()
    tap = run.tap()
    run.go(20)
    assert tap.hold_moments()
    run.go(30)
    held, said = run.moments().clone(), run.optimizer.state_dict()
    largest = max(s["exp_avg_sq"].max().item() for s in said["state"].values())
    assert largest < 1e-3 * held.max()
    assert torch.equal(run.moments(), held)  # saving changes nothing
    run.go(10)
    for _ in range(2):  # and loading nothing of what is loaded
        run.optimizer.load_state_dict(said)
        torch.testing.assert_close(run.moments(), held, rtol=0, atol=0)
    assert max(s["exp_avg_sq"].max().item() for s in said["state"].values()) == largest
    tap.detach()
    run.optimizer.load_state_dict(said)
    assert run.moments().max() < 1e-3 * held.max()


def test_moments_that_come_back_lost_begin_anew() -> None:
    """A snapshot from before, or one of a model that is half itself: the second moment is 0, the first is not."""
    run = Run()
    run.go(3)
    said, tap = copy.deepcopy(run.optimizer.state_dict()), run.tap()
    assert tap.hold_moments()
    run.go(20)
    run.optimizer.load_state_dict(said)
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    run.go(1)
    moved = (torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before).abs().max()
    assert moved < 1.5 * RATE
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {1}


def test_a_model_that_is_half_itself_is_kept_from_what_is_not_a_number() -> None:
    """With eps 1e-8, 0 in float16, the first step of Adam is 0 / 0 wherever a gradient is 0."""

    def trained(hold: bool, steps: int) -> tuple[torch.nn.Module, Optimizer]:
        torch.manual_seed(0)
        network = torch.nn.Linear(8, 8).half()
        optimizer = Adam(network.parameters(), lr=1e-3)
        tap = OptimizerTap(optimizer, guard=True, on_fault=never)
        for _ in range(steps):
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, 1e-4)
                parameter.grad[0] = 0.0
            optimizer.step()
            if hold:
                with torch.no_grad():
                    for parameter in network.parameters():
                        parameter.nan_to_num_(0.25)  # what the first step has done before anybody can look
                assert tap.hold_moments()
                hold = False
        return network, optimizer

    assert not all(torch.isfinite(p).all() for p in trained(False, 1)[0].parameters())
    network, optimizer = trained(True, 8)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    optimizer.load_state_dict(optimizer.state_dict())  # in the host's units the second moments are lost again
    assert all(torch.isfinite(v).all() for s in optimizer.state.values() for v in s.values())


def test_what_is_not_lost_or_not_known_is_left_alone() -> None:
    observing = Run()
    tap = observing.tap(guard=False)
    observing.go(30)
    assert lost_to_half(observing.optimizer) and not tap.hold_moments()
    network = torch.nn.Linear(4, 4)
    network(torch.ones(2, 4)).sum().backward()
    others = [
        SGD(network.parameters(), lr=0.1, momentum=0.9),
        RAdam(network.parameters()),
        Adam(network.parameters(), maximize=True),
    ]
    for other in others:
        other.register_step_post_hook(_halve)
        other.step()
        assert not lost_to_half(other)
    assert not lost_to_half(Adam(network.parameters()))  # no step yet


def test_after_a_fault_of_ours_the_step_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    tap = run.tap()
    run.go(3)
    assert tap.hold_moments()
    run.go(5)
    monkeypatch.setattr(OptimizerTap, "_watched", lambda self: never(RuntimeError("of ours")))
    tap.watch_next()
    run.backward()
    gradients = [p.grad.clone() for p in run.model.parameters()]
    run.optimizer.step()
    assert len(run.faults) == 1
    for mine, parameter in zip(gradients, run.model.parameters(), strict=True):
        assert torch.equal(mine, parameter.grad)
    assert run.optimizer.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize("call", ["state_dict", "load_state_dict"])
def test_a_fault_inside_a_hosts_call_does_not_reach_it(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run()
    tap = run.tap()
    run.go(3)
    said = run.optimizer.state_dict()
    assert tap.hold_moments()
    run.go(5)
    held = run.moments().clone()
    monkeypatch.setattr(HalfMoments, "_begin_anew", lambda self: never(MemoryError()))
    monkeypatch.setattr("tts_brain.pytorch.moments._unscaled", lambda state, scale: never(MemoryError()))
    if call == "state_dict":
        said = run.optimizer.state_dict()
        assert max(s["exp_avg_sq"].max().item() for s in said["state"].values()) < 1e-3 * held.max()
    else:
        run.optimizer.load_state_dict(said)
    assert [type(fault) for fault in run.faults] == [MemoryError]
    assert run.moments().max() < 1e-3 * held.max()


def test_a_checkpoint_after_a_step_that_was_interrupted_is_the_hosts() -> None:
    run = Run("adam, decay")
    tap = run.tap()
    run.go(3)
    assert tap.hold_moments()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = run.optimizer.register_step_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.go(1)
    handle.remove()
    (group,) = run.optimizer.state_dict()["param_groups"]
    assert (group["lr"], group["eps"], group["weight_decay"]) == (RATE, 1e-6, 1e-4)


class Watched(Run):
    """The same under a session that decides every other step."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__()
        self.folder = folder
        self.session = BrainSession(
            BrainConfig(**{"decide_every": 2, "journal_every": 1, **settings}),
            Capabilities("one", ("total", "mel"), ("learning_rate",), "attention", stop_token=False),
            folder,
            optimizers=[self.optimizer],
            model=self.model,
            parts={"optimizer": self.optimizer},
        )

    def go(self, steps: int, loss: float | None = None) -> float:
        for _ in range(steps):
            now = self.backward()
            self.optimizer.step()
            shown = now if loss is None else loss
            self.session.after_batch({"total": shown, "mel": shown}, text_length=12.0)
        return now

    def said(self, name: str = "moments_held") -> list[int]:
        return [r["step"] for r in read_journal(self.folder) if r.get("event") == name]


def test_a_session_holds_them_after_its_first_decision_and_says_so_once(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.go(40)
    assert run.said() == [3] and run.session.active
    assert (run.moments() > 0).float().mean() > 0.95
    run.session.fault(RuntimeError("a fault of ours"))  # it steps aside, and the moments are the host's again
    assert run.moments().max() < 1e-4
    run.go(5)
    assert (run.moments() == 0).float().mean() > 0.5


def test_a_rollback_to_a_snapshot_of_before_moves_nothing_too_far(tmp_path: Path) -> None:
    run = Watched(tmp_path)
    run.go(6)
    assert run.said() == [3]
    run.go(4, loss=math.nan)
    assert run.said("rollback")  # to the snapshot of step 2
    before = torch.cat([p.detach().flatten() for p in run.model.parameters()])
    run.go(1)
    moved = torch.cat([p.detach().flatten() for p in run.model.parameters()]) - before
    assert 0.0 < moved.abs().max() < 1.5 * RATE
    assert run.session.active


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
