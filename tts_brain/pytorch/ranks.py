"""The processes of a data-parallel run, as far as the brain must know them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tts_brain.coordination.consensus import Vector

# A rank that was killed is noticed at once, as its connections break; this is for one that hangs, or whose network
# does. Long enough for a checkpoint or a validation that one rank does alone.
TIMEOUT = timedelta(minutes=10)


class RanksLost(RuntimeError):
    """A rank is gone, or did not come in time. For good: who was heard last differs from rank to rank by now."""


class Ranks:
    """All ranks of a run, or the one process there is.

    The brain talks over a gloo group of its own: small vectors on the CPU, so that no GPU is waited for, whatever
    backend the host trains with.

    Args:
        group: the brain's own group, None for one process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._lost = False
        self.count = 1 if group is None else dist.get_world_size(group)
        self.index = 0 if group is None else dist.get_rank(group)

    @classmethod
    def of_this_run(cls) -> Ranks:
        """Call on every rank, once the host has started ``torch.distributed``; one process when it has not."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def several(self) -> bool:
        """Is there anybody to agree with?"""
        return self.count > 1

    @property
    def first(self) -> bool:
        """The rank that writes files and speaks."""
        return self.index == 0

    def gather(self, values: Vector) -> Vector:
        """``values`` of every rank, stacked along a new first axis; every rank must call it with one shape.

        Raises:
            RanksLost: a rank is gone, or did not come within ``TIMEOUT``; from then on every call raises it, at once.
        """
        if not self.several:
            return np.asarray(values)[None]
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        all_ranks = [torch.empty_like(mine) for _ in range(self.count)]
        self._together(dist.all_gather, all_ranks, mine)
        return torch.stack(all_ranks).numpy()

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Write the first rank's values into every rank's tensors; each must pass as many, of the same shapes.

        Raises:
            RanksLost: as ``gather``.
        """
        if not self.several:
            return
        for tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            self._together(partial(dist.broadcast, src=0), value)
            tensor.detach().copy_(value)

    def agree(self, value: float | None) -> bool:
        """True when every rank called it with the same number; None agrees with nobody.

        Raises:
            RanksLost: as ``gather``.
        """
        if not self.several:
            return value is not None
        values = self.gather(np.array([math.nan if value is None else value]))
        return bool((values == values[0]).all())

    def _together(self, exchange: Callable[..., object], *what: object) -> None:
        failure = "the ranks lost each other earlier" if self._lost else ""
        if not failure:
            try:
                exchange(*what, group=self._group)
            except RuntimeError as error:
                failure = f"a rank is gone, or did not come within {TIMEOUT.total_seconds():g} s ({error})"
                self._lost = True
        if failure:
            # Outside of the except, as the error's frames keep the group. With the group the connections go, so that
            # those who wait for this rank know at once and not after a time-out of their own.
            if self._group is not None:
                with suppress(Exception):
                    dist.destroy_process_group(self._group)
            self._group = None
            raise RanksLost(failure)
