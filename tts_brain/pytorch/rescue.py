"""When a snapshot is taken, and how one is put back.

Weights, moments and the brain go back; the host's clock does not: its steps, epochs and data go on. So schedulers are
in no snapshot, and what they have written into an optimizer by now stays there. A rate that was restored would be that
of a step long past, after a milestone ten times too high, and a schedule of epochs would lag behind from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tts_brain.feedback.rollback import RollbackManager, Stateful
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.ranks import Ranks

# What torch's schedulers write into a group.
_SCHEDULED = (
    "lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "base_momentum", "max_momentum", "swa_lr",
)  # fmt: skip


class RanksParted(RuntimeError):
    """A rank could not do what all did."""


class Rescue:
    """The snapshots of one run.

    Args:
        manager: decides; its settings say how often and how many.
        parts: what a snapshot holds, by name; read anew at each one.
        folder: for snapshots on disk.
        ranks: each keeps its own snapshots, of the same steps.
    """

    def __init__(
        self,
        manager: ContextAwareTrainingManager,
        parts: Mapping[str, Stateful | None],
        folder: Path,
        ranks: Ranks,
    ) -> None:
        config = manager.config
        self._manager = manager
        self._parts = parts
        self._ranks = ranks
        own = folder / f"rank{ranks.index}" if ranks.several else folder
        self._snapshots = RollbackManager(
            snapshots=config.snapshots,
            budget_mb=config.snapshot_budget_mb,
            place=config.snapshot_place,
            folder=own if config.snapshot_place == "disk" else None,
        )
        self._refused = False
        self._failed_at: int | None = None  # the newest snapshot that could not be written
        self._restored: int | None = None  # the newest one that was put back

    def maybe_take(self, step: int) -> str:
        """Take a snapshot when it is time; returns why there is none, else an empty text."""
        newest = self._snapshots.steps[-1] if self._snapshots.steps else None
        tried = max((at for at in (newest, self._failed_at) if at is not None), default=None)
        far_enough = tried is None or step - tried >= self._manager.config.snapshot_every
        # A first one at once, so that an early break has something to go back to: in a bad stretch too, as the guard
        # has kept its weights and statistics finite.
        if not far_enough or self._refused or (newest is not None and not self._manager.healthy):
            return ""
        try:
            self._refused = not self._snapshots.take(step, self._parts)
        except OSError as error:
            self._failed_at = step
            return f"the one of step {step} cannot be written ({error}); the next is tried in its turn"
        return self._snapshots.last_refusal

    def roll_back(self, step: int, multiplier: float) -> int | None:
        """Put a snapshot back that is older than the move on trial, or the newest, and tell the manager.

        What has just failed to help is not put back again where there is an older one.

        Whatever goes wrong on this rank, it makes every call that the other ranks wait for.

        Args:
            multiplier: of the host's rate, in force when the run broke.

        Returns:
            The step restored; None when there is no snapshot that every rank has.

        Raises:
            RanksParted: on every rank, when one could not put its snapshot back; all hold the first rank's weights.
        """
        manager = self._manager
        count, trial = manager.rollbacks_in_a_row + 1, manager.feedback.trial
        host_rate = manager.analyzer.learning_rate
        before = step - manager.config.trial_steps
        target = self._snapshots.newest(before)
        target = self._snapshots.newest() if target is None else target
        if count > 1 and target is not None and target == self._restored:
            older = self._snapshots.newest(target - 1)
            target = target if older is None else older
        restored = self._restore(target) if self._ranks.agree(target) else None
        self._restored = restored
        manager.rolled_back(
            failed_at=step,
            count=count,
            restored=restored is not None,
            trial=trial,
            multiplier=multiplier,
            host_rate=host_rate,
        )
        return restored

    def _restore(self, target: int | None) -> int | None:
        restored, reason = None, None
        try:
            with _schedules_kept(self._optimizers()):
                restored = self._snapshots.restore(self._parts, before=target)
        except Exception as error:  # whatever it is, the other ranks are waiting
            if not self._ranks.several:
                raise
            reason = error
        if not self._ranks.agree(restored) and self._ranks.several:
            self._ranks.copy_first(self._tensors())
            raise RanksParted(
                f"this rank went back to step {restored}, another one did not; all go on with the first rank's weights"
            ) from reason
        return restored

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [part for part in self._parts.values() if isinstance(part, torch.optim.Optimizer)]

    def _tensors(self) -> list[Tensor]:
        """Weights, running statistics and optimizer state, in the same order on every rank."""
        found: list[Tensor] = []
        for name in sorted(self._parts):
            part = self._parts[name]
            if isinstance(part, nn.Module):
                found += part.state_dict().values()
            elif isinstance(part, torch.optim.Optimizer):
                states = (part.state.get(p, {}) for group in part.param_groups for p in group["params"])
                found += [state[key] for state in states for key in sorted(state) if isinstance(state[key], Tensor)]
        return found

    def drop_after(self, step: int) -> None:
        """Forget snapshots later than ``step``; -1 forgets all."""
        self._snapshots.drop_after(step)


@contextmanager
def _schedules_kept(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """What the host's schedule has set stays, whatever is loaded into the optimizers, and if that fails too."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    before = [{name: group[name] for name in _SCHEDULED if name in group} for group in groups]
    try:
        yield
    finally:
        now = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, own in zip(now, before, strict=True):
            group.update(own)
