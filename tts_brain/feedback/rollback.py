"""A ring of snapshots of a running training: what the brain goes back to when the run breaks.

Knows no framework: a part is anything with ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import copy
import random
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tts_brain.statefile import StateFileError, check_state, load_state, pack, packed_bytes, write_packed

MIB = 2**20
_KIND = "snapshot"
_VERSION = 2
_NAME = re.compile(r"snapshot-(\d{10,})\.safetensors")

States = dict[str, Any]


class Stateful(Protocol):
    """A model, an optimizer, a scheduler, a scaler, a sampler: anything that can say and take back its state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class RandomStates:
    """The process-wide generators of Python, numpy (the legacy one) and torch (CPU, and each CUDA device) as a part.

    With it among the parts, dropout and shuffling after a restore are those of the first time.
    """

    def state_dict(self) -> States:
        """All states. CUDA is left out until the host has started it: asking would start it."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "cuda": cuda,
        }

    def load_state_dict(self, state: States, /) -> None:
        """Put all states back; those of CUDA devices that this process does not see are left out."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if state["cuda"]:
            for device, cuda_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
                torch.cuda.set_rng_state(cuda_state, device)


class RollbackManager:
    """Keeps the newest few snapshots of a run's parts, and puts one back on request.

    Args:
        snapshots: most that are held at a time, at least 1.
        budget_mb: MiB that all held snapshots may take together. In memory the tensors and arrays count, not the few
            plain numbers beside them; on disk the files do.
        place: ``"memory"`` (main memory, gone with the process) or ``"disk"`` (one file each in ``folder``).
        folder: for ``"disk"``, where complete snapshots of an earlier process are found again; after a resume call
            ``drop_after`` with the step resumed at. One process, one folder: ranks must not share it.

    Attributes:
        last_refusal: why the last ``take`` returned False; empty after one that did not.

    Raises:
        ValueError: a setting out of its range.
        OSError: the folder cannot be read or written.
    """

    def __init__(
        self, *, snapshots: int = 2, budget_mb: int = 2048, place: str = "memory", folder: Path | None = None
    ) -> None:
        if snapshots < 1 or budget_mb < 1:
            raise ValueError(
                f"snapshots={snapshots}, budget_mb={budget_mb}: both must be at least 1; "
                "write RollbackManager(snapshots=2, budget_mb=2048)"
            )
        self.last_refusal = ""
        self._most = snapshots
        self._budget = budget_mb * MIB
        self._place = _make_place(place, folder)
        self._sizes = self._place.found()  # bytes by step, oldest first
        self._make_room(0, count=self._most)

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the held snapshots, oldest first."""
        return tuple(self._sizes)

    @property
    def bytes_held(self) -> int:
        """Bytes that all held snapshots take, counted as ``budget_mb`` is."""
        return sum(self._sizes.values())

    def take(self, step: int, parts: Mapping[str, Stateful | None]) -> bool:
        """Keep the state of ``parts`` as it is at ``step``; older snapshots make room for it first.

        Snapshots at ``step`` or later are dropped too: the run has gone back behind them since. A part that is None
        (no scheduler, say) is left out.

        Returns:
            False when this one snapshot alone is larger than the budget: nothing changes, ``last_refusal`` says why.

        Raises:
            ValueError: a negative step.
            TypeError: on disk, a part holds what no file can; the message has its place. Nothing changes.
            OSError: on disk, the file cannot be written; the older snapshots that made room are gone.
        """
        if step < 0:
            raise ValueError(f"step={step} is negative; give the number of optimizer steps done")
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        content, size = self._place.weigh(states)
        if size > self._budget:
            self.last_refusal = (
                f"a snapshot takes {-(-size // MIB)} MiB, more than the budget of {self._budget // MIB} MiB; "
                f"write snapshot_budget_mb: {-(-size // MIB) * self._most} for {self._most} of them"
            )
            return False
        self.last_refusal = ""
        self.drop_after(step - 1)
        self._make_room(size, count=self._most - 1)
        self._place.put(step, content)
        self._sizes[step] = size
        return True

    def newest(self, before: int | None = None) -> int | None:
        """The step of the newest snapshot, or of the newest at or before step ``before``; None without one."""
        return max((held for held in self._sizes if before is None or held <= before), default=None)

    def restore(self, parts: Mapping[str, Stateful | None], *, before: int | None = None) -> int | None:
        """Put the newest snapshot back into ``parts``, or the newest at or before step ``before``.

        The snapshot stays and can be restored again; newer ones are dropped, as they hold the run that broke. One
        that can no longer be read from disk is dropped, and the next older one taken.

        Returns:
            The step restored; None, with nothing changed, when there is no such snapshot.

        Raises:
            ValueError: the snapshot has other parts than ``parts``; nothing was loaded.
        """
        for step in sorted(self._sizes, reverse=True):
            if before is not None and step > before:
                continue
            try:
                states = self._place.get(step)
            except StateFileError:
                self._drop(step)
                continue
            _load(step, states, {name: part for name, part in parts.items() if part is not None})
            self.drop_after(step)
            return step
        return None

    def drop_after(self, step: int) -> None:
        """Forget all snapshots later than ``step``; ``drop_after(-1)`` forgets all."""
        for held in [held for held in self._sizes if held > step]:
            self._drop(held)

    def _make_room(self, size: int, *, count: int) -> None:
        while self._sizes and (len(self._sizes) > count or self.bytes_held + size > self._budget):
            self._drop(next(iter(self._sizes)))

    def _drop(self, step: int) -> None:
        self._place.drop(step)
        del self._sizes[step]


def _load(step: int, states: States, parts: Mapping[str, Stateful]) -> None:
    missing, extra = sorted(states.keys() - parts.keys()), sorted(parts.keys() - states.keys())
    if missing or extra:
        raise ValueError(
            f"the snapshot of step {step} does not fit: missing from parts {missing}, not in the snapshot {extra}; "
            "give restore() the same parts as take()"
        )
    for name, part in parts.items():
        part.load_state_dict(states[name])


class _Place(Protocol):
    def found(self) -> dict[int, int]:
        """Sizes in bytes by step of what is there already, oldest first."""

    def weigh(self, states: States) -> tuple[Any, int]:
        """What ``put`` needs, and the bytes it will take; not a copy yet."""

    def put(self, step: int, content: Any) -> None: ...

    def get(self, step: int) -> States:
        """Fresh states: what is done to them does not reach the snapshot."""

    def drop(self, step: int) -> None: ...


def _make_place(place: str, folder: Path | None) -> _Place:
    if place == "memory":
        return _Memory()
    if place != "disk":
        raise ValueError(f"place={place!r} is not known; write place='memory' or place='disk'")
    if folder is None:
        raise ValueError("place='disk' needs a folder; write folder=Path(run_folder) / 'brain' / 'snapshots'")
    return _Disk(folder)


class _Memory:
    def __init__(self) -> None:
        self._held: dict[int, States] = {}

    def found(self) -> dict[int, int]:
        return {}

    def weigh(self, states: States) -> tuple[Any, int]:
        return states, _count_bytes(states)

    def put(self, step: int, content: Any) -> None:
        self._held[step] = _copy_to_cpu(content)

    def get(self, step: int) -> States:
        states: States = _copy_to_cpu(self._held[step])
        return states

    def drop(self, step: int) -> None:
        del self._held[step]


class _Disk:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def found(self) -> dict[int, int]:
        for torn in self._folder.glob("snapshot-*.tmp"):
            torn.unlink()
        sizes = {}
        for path in self._folder.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None or path != self._path(int(match[1])):
                continue
            try:
                check_state(path, kind=_KIND, version=_VERSION)
            except StateFileError:
                path.unlink()
            else:
                sizes[int(match[1])] = path.stat().st_size
        return dict(sorted(sizes.items()))

    def weigh(self, states: States) -> tuple[Any, int]:
        packed = pack(states, copy=False)
        return packed, packed_bytes(*packed, kind=_KIND, version=_VERSION)

    def put(self, step: int, content: Any) -> None:
        write_packed(self._path(step), *content, kind=_KIND, version=_VERSION)

    def get(self, step: int) -> States:
        states: States = load_state(self._path(step), kind=_KIND, version=_VERSION)
        return states

    def drop(self, step: int) -> None:
        self._path(step).unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self._folder / f"snapshot-{step:010d}.safetensors"


def _count_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # not nbytes: a sparse tensor refuses that
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(_count_bytes(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_count_bytes(item) for item in value)
    return 0


# A scheduler may keep its host's functions in its state; deepcopy of a bound method would copy the optimizer and the
# model behind it.
_BY_REFERENCE = (types.FunctionType, types.MethodType, types.BuiltinFunctionType)


def _copy_to_cpu(value: Any) -> Any:
    """A copy of any nested state that shares nothing with it but functions; tensors detached and on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        # copy.copy keeps what a subclass carries: a default factory, the layer versions of a module's state_dict.
        result = copy.copy(value)
        for key, item in value.items():
            result[key] = _copy_to_cpu(item)
        return result
    if isinstance(value, list):
        return [_copy_to_cpu(item) for item in value]
    if isinstance(value, tuple):
        items = [_copy_to_cpu(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, _BY_REFERENCE):
        return value
    return copy.deepcopy(value)
