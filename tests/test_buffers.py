import torch
from torch import nn

from tts_brain.pytorch.buffers import BufferGuard


class Net(nn.Module):
    """Batch norm, a counter, and a mask that is minus infinity by design."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def batch(seed: int) -> torch.Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) + seed


def test_statistics_that_a_nan_batch_poisoned_are_put_back() -> None:
    net = Net()
    guard = BufferGuard(net)
    net(batch(1))
    guard.keep()
    kept = {name: buffer.clone() for name, buffer in net.named_buffers()}
    net(batch(2) * torch.nan)
    assert torch.isnan(net.norm.running_mean).all()
    assert guard.heal() == ["norm.running_mean", "norm.running_var"]
    for name in ("norm.running_mean", "norm.running_var", "mask"):
        assert torch.equal(dict(net.named_buffers())[name], kept[name])
    net.eval()
    assert torch.isfinite(net(batch(3))).all()


def test_what_is_kept_while_poisoned_is_the_last_that_was_good() -> None:
    net = Net()
    guard = BufferGuard(net)
    net(batch(1))
    guard.keep()
    good = net.norm.running_mean.clone()
    net(batch(2) * torch.nan)
    guard.keep()
    guard.heal()
    assert torch.equal(net.norm.running_mean, good)


def test_healthy_buffers_are_left_alone() -> None:
    net = Net()
    guard = BufferGuard(net)
    net(batch(1))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    assert guard.heal() == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_what_is_kept_does_not_change_with_the_model() -> None:
    net = Net()
    guard = BufferGuard(net)
    for seed in range(5):
        net(batch(seed))
    net.norm.running_var.fill_(torch.inf)
    guard.heal()
    assert torch.equal(net.norm.running_var, torch.ones(3))  # as at the start: keep was not called since


def test_a_model_without_buffers_needs_none() -> None:
    guard = BufferGuard(nn.Linear(2, 2))
    guard.keep()
    assert guard.heal() == []
