"""With real optimizers and schedulers: the rate is multiplied, and nobody but the weights notices."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.optim import SGD, Adam, AdamW, Optimizer, RAdam
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, LRScheduler, OneCycleLR, StepLR

from tts_brain.pytorch.optimizer import OptimizerTap, kept_in

STEPS = 12
RATE = 0.01
NAN, INF = math.nan, math.inf

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p, lr: SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "adam": lambda p, lr: Adam(p, lr=lr),
    "radam": lambda p, lr: RAdam(p, lr=lr),
    "adamw": lambda p, lr: AdamW(p, lr=lr, weight_decay=0.1),
}
SCHEDULERS: dict[str, Callable[[Optimizer, float], LRScheduler | None]] = {
    "none": lambda o, lr: None,
    "noam": lambda o, lr: LambdaLR(o, lambda s: 4**0.5 * min((s + 1) * 4**-1.5, (s + 1) ** -0.5)),
    "step": lambda o, lr: StepLR(o, 3, 0.5),
    "exponential": lambda o, lr: ExponentialLR(o, 0.9),
    "one_cycle": lambda o, lr: OneCycleLR(o, max_lr=lr, total_steps=STEPS + 1),
    "cosine": lambda o, lr: CosineAnnealingLR(o, STEPS),
}
every_pair = pytest.mark.parametrize("scheduler", SCHEDULERS)
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


class Run:
    """A few steps of a small network on fixed data; ``poison`` maps steps to a value put into a gradient."""

    def __init__(self, optimizer: str, scheduler: str = "none", rate: float = RATE) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        first, second = self.model[0], self.model[2]
        self.optimizer = OPTIMIZERS[optimizer]([{"params": first.parameters()}, {"params": second.parameters()}], rate)
        self.scheduler = SCHEDULERS[scheduler](self.optimizer, rate)
        self.faults: list[BaseException] = []
        self._batches = torch.Generator().manual_seed(1)

    def tap(self, *, guard: bool = True, **settings: float) -> OptimizerTap:
        tap = OptimizerTap(self.optimizer, guard=guard, on_fault=self.faults.append)
        for name, value in settings.items():
            setattr(tap, name, value)
        return tap

    def backward(self, poison: float | None = None, scale: float = 1.0) -> None:
        x = torch.randn(5, 6, generator=self._batches)
        self.optimizer.zero_grad()
        (scale * (self.model(x) - x.sum(1, keepdim=True)).square().mean()).backward()
        if poison is not None:
            self.model[0].weight.grad[0, 0] = poison

    def step(self, poison: float | None = None, scale: float = 1.0) -> None:
        self.backward(poison, scale)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def go(self, steps: int = STEPS) -> "Run":
        for _ in range(steps):
            self.step()
        return self

    @property
    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    @property
    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self.optimizer.state_dict())


def same(a: Any, b: Any) -> bool:
    """Equal in structure and every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@every_optimizer
@every_pair
@pytest.mark.parametrize("multiplier", [0.3, 2.5])
def test_a_multiplied_rate_trains_like_a_rate_that_large(optimizer: str, scheduler: str, multiplier: float) -> None:
    tapped, plain = Run(optimizer, scheduler), Run(optimizer, scheduler)
    tapped.tap(rate_multiplier=multiplier)
    meant = Run(optimizer, scheduler, RATE * multiplier).go()
    torch.testing.assert_close(tapped.go().weights, meant.weights, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(tapped.weights, plain.go().weights, rtol=1e-3)


class AppliedRates:
    """What each group's step was made with: its hook runs after the tap's."""

    def __init__(self, run: Run) -> None:
        self.rows: list[list[float]] = []
        run.optimizer.register_step_pre_hook(lambda o, *_: self.rows.append([g["lr"] for g in o.param_groups]))


@given(st.floats(1e-6, 1e3), st.floats(1e-6, 1.0), st.lists(st.floats(0.0, 10.0), min_size=1, max_size=5))
@example(2.0, 1.0, [0.5])
def test_a_multiplier_does_not_carry_a_rate_that_the_host_raises_beyond_the_most(
    multiplier: float, most: float, rates: list[float]
) -> None:
    run = Run("sgd")
    run.tap(rate_multiplier=multiplier, most_rate=most)
    applied = AppliedRates(run)
    for rate in rates:
        for group, times in zip(run.optimizer.param_groups, (1.0, 3.0), strict=True):
            group["lr"] = rate * times
        run.step()
        first, second = applied.rows[-1]
        # The highest group is the one that is kept in bounds; the other goes along.
        assert second <= max(most, 3.0 * rate) * 1.000001 and second == pytest.approx(3.0 * first)
        assert first <= rate * max(multiplier, 1.0) * 1.000001
        if 3.0 * rate * multiplier <= most or multiplier <= 1.0:
            assert first == pytest.approx(rate * multiplier)
    assert run.faults == []


def test_a_rate_that_is_a_tensor_is_multiplied_and_not_asked() -> None:
    run = Run("adam")
    run.tap(rate_multiplier=4.0, most_rate=1e-4)
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(1e-3)
    applied = AppliedRates(run)
    run.step()
    assert applied.rows[0] == [pytest.approx(4e-3)] * 2 and run.faults == []


@every_optimizer
@every_pair
def test_the_hosts_rates_never_show_the_multiplier(optimizer: str, scheduler: str) -> None:
    tapped, plain = Run(optimizer, scheduler), Run(optimizer, scheduler)
    tap = tapped.tap()
    for step in range(STEPS):
        tap.rate_multiplier = 1.5**step
        tapped.step()
        plain.step()
        assert tapped.state["param_groups"] == plain.state["param_groups"]
        if plain.scheduler is not None:
            assert tapped.scheduler.state_dict() == plain.scheduler.state_dict()


@every_optimizer
@pytest.mark.parametrize("guard", [False, True])
def test_with_nothing_to_do_the_run_is_the_same_to_the_bit(optimizer: str, guard: bool) -> None:
    tapped, plain = Run(optimizer, "noam"), Run(optimizer, "noam").go()
    tap = tapped.tap(guard=guard)
    for _ in range(STEPS):
        tap.watch_next()
        tapped.step()
    assert torch.equal(tapped.weights, plain.weights) and same(tapped.state, plain.state)
    assert tap.steps == STEPS and tapped.faults == []


@every_optimizer
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer: str, poison: float, multiplier: float) -> None:
    run = Run(optimizer)
    tap = run.tap(rate_multiplier=multiplier)
    run.go(3)
    weights, state = run.weights, run.state
    run.step(poison)
    assert tap.skipped and tap.steps == 4 and not math.isfinite(tap.grad_norm)
    assert torch.equal(run.weights, weights) and same(run.state, state)
    run.step()
    assert not tap.skipped and not torch.equal(run.weights, weights)
    assert torch.isfinite(run.weights).all() and run.faults == []


def test_a_first_gradient_that_is_not_finite_leaves_the_optimizer_as_new() -> None:
    run = Run("adam")
    run.tap()
    state = run.state
    run.step(NAN)
    assert same(run.state, state)


def test_without_the_guard_the_host_keeps_its_nans() -> None:
    run = Run("sgd")
    tap = run.tap(guard=False)
    run.step(NAN)
    assert torch.isnan(run.weights).any() and not tap.skipped and math.isnan(tap.grad_norm)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_clip_bounds_the_norm_and_leaves_smaller_ones_alone(scale: float) -> None:
    run, twin = Run("sgd"), Run("sgd")
    tap = run.tap(clip_norm=0.5)
    run.backward(scale=scale)
    twin.backward(scale=scale)
    run.optimizer.step()
    before, after = ([p.grad for p in r.model.parameters()] for r in (twin, run))
    norm = torch.nn.utils.get_total_norm(before).item()
    assert tap.grad_norm == pytest.approx(norm)
    factor = min(1.0, 0.5 / norm)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old * factor)
    assert (scale < 1) == (factor == 1.0)


@every_optimizer
def test_detach_takes_everything_off(optimizer: str) -> None:
    run, plain = Run(optimizer), Run(optimizer).go()
    tap = run.tap(rate_multiplier=3.0, clip_norm=1e-3)
    tap.detach()
    run.go()
    assert torch.equal(run.weights, plain.weights) and tap.steps == 0
    assert not run.optimizer._optimizer_step_pre_hooks and not run.optimizer._optimizer_step_post_hooks


def test_release_gives_the_host_its_own_behaviour_back() -> None:
    run, plain = Run("adam"), Run("adam").go()
    run.tap(rate_multiplier=3.0, clip_norm=1e-3).release()
    assert torch.equal(run.go().weights, plain.weights)


class Untouchable(float):
    """A rate that trains but cannot be multiplied: a fault in the midst of our hook."""

    def __mul__(self, other: object) -> float:
        raise RuntimeError("hands off")


def test_a_fault_of_ours_is_reported_and_the_step_is_the_hosts() -> None:
    run, plain = Run("sgd"), Run("sgd")
    tap = run.tap(rate_multiplier=3.0)
    run.optimizer.param_groups[1]["lr"] = Untouchable(RATE)  # the first group is multiplied by then
    run.step()
    plain.step()
    assert [str(f) for f in run.faults] == ["hands off"]
    assert torch.equal(run.weights, plain.weights)
    assert [g["lr"] for g in run.optimizer.param_groups] == [RATE, RATE]
    assert tap.steps == 1


def test_a_fused_optimizer_that_leaves_itself_out_makes_no_step() -> None:
    """Its gradients still hold the scaler's scale where the host does not clip."""
    run = Run("sgd")
    run.optimizer = torch.optim.Adam(run.model.parameters(), lr=RATE, fused=True)
    tap, scaler = run.tap(), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run.backward(scale=2.0**12)
    own = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item() / 2.0**12
    scaler.scale(torch.zeros(()))  # as a host's backward would have
    scaler.step(run.optimizer)
    scaler.update()
    assert (tap.steps, tap.skipped) == (1, False) and tap.grad_norm == pytest.approx(own)
    before = run.weights.clone()
    run.backward(NAN, scale=2.0**12)
    scaler.step(run.optimizer)
    assert (tap.steps, tap.skipped) == (1, False) and torch.equal(run.weights, before)


def test_the_update_ratio_is_measured_when_asked_for() -> None:
    run = Run("sgd", rate=1e-3)
    tap = run.tap()
    run.step()
    assert math.isnan(tap.take_update_ratio())
    tap.watch_next()
    old = [m.weight.detach().clone() for m in (run.model[0], run.model[2])]
    run.step()
    now = [m.weight.detach() for m in (run.model[0], run.model[2])]
    ratios = [((n - o).norm() / o.norm()).item() for n, o in zip(now, old, strict=True)]
    assert tap.take_update_ratio() == pytest.approx(min(ratios))  # torch's median of two is the lower
    run.step()
    assert math.isnan(tap.take_update_ratio())


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        (lambda w: w, "float32"),
        (lambda w: w.half().float(), "float16"),
        (lambda w: w.bfloat16().float(), "bfloat16"),
        (torch.zeros_like, None),
    ],
    ids=["float32", "float16", "bfloat16", "zeros"],
)
def test_what_type_the_weights_are_kept_in_is_told_by_their_values(kept: Callable, told: str | None) -> None:
    run = Run("sgd", rate=1e-3)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(kept(parameter))
    tap = run.tap()
    run.step()
    assert tap.take_kept_in() is None
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(kept(parameter))
    tap.watch_next()
    run.step()
    assert tap.take_kept_in() == told and tap.take_kept_in() is None


def test_parameters_of_half_precision_are_seen_as_such() -> None:
    for kind, told in ((torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        assert kept_in([torch.randn(64, 8).to(kind)]) == told
    assert kept_in([torch.zeros(3), torch.randn(100)]) == "float32"
    assert kept_in([torch.full((3,), math.nan), torch.ones(3)]) == "float32"
    for weights in ([], [torch.zeros(3)], [torch.ones(3, dtype=torch.complex64)], [torch.ones(3, dtype=torch.int8)]):
        assert kept_in(weights) is None


def test_of_weights_that_do_not_move_no_type_is_told() -> None:
    run = Run("sgd", rate=0.0)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.copy_(parameter.half().float())
    tap = run.tap()
    tap.watch_next()
    run.step()
    assert tap.take_kept_in() is None


def test_a_skipped_step_is_not_measured_but_the_next_one_is() -> None:
    run = Run("sgd")
    tap = run.tap()
    tap.watch_next()
    run.step(NAN)
    assert math.isnan(tap.take_update_ratio())
    run.step()
    assert tap.take_update_ratio() > 0


def test_a_step_that_died_does_not_leave_the_rate_multiplied_for_the_next() -> None:
    run, meant = Run("sgd"), Run("sgd", rate=2 * RATE)
    run.tap(rate_multiplier=2.0)

    def dies() -> float:
        raise MemoryError

    with pytest.raises(MemoryError):
        run.optimizer.step(dies)
    torch.testing.assert_close(run.go().weights, meant.go().weights, rtol=1e-5, atol=1e-7)
    assert run.optimizer.param_groups[0]["lr"] == RATE
