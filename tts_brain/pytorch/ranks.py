"""The processes of a data-parallel run, as far as the brain must know them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

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
        if self._group is None:
            return np.asarray(values)[None]
        mine = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        all_ranks = [torch.empty_like(mine) for _ in range(self.count)]
        with self._together():
            dist.all_gather(all_ranks, mine, group=self._group)
        return torch.stack(all_ranks).numpy()

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Write the first rank's values into every rank's tensors; each must pass as many, of the same shapes.

        Raises:
            RanksLost: as ``gather``.
        """
        if self._group is None:
            return
        for tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            with self._together():
                dist.broadcast(value, src=0, group=self._group)
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

    @contextmanager
    def _together(self) -> Iterator[None]:
        if self._lost:
            raise RanksLost("the ranks lost each other earlier")
        try:
            yield
        except RuntimeError as error:
            self._lost = True
            # Breaks the connections, so that those who wait for this rank know at once.
            with suppress(Exception):
                dist.destroy_process_group(self._group)
            limit = TIMEOUT.total_seconds()
            raise RanksLost(f"a rank is gone, or did not come within {limit:g} s ({error})") from error
