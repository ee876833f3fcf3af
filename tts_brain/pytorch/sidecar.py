"""The file beside a host's checkpoint: the brain's state, and the norms of the weights that it is of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tts_brain.statefile import StateFileError, load_state, save_state

SIDECAR_KIND = "brain"
SIDECAR_VERSION = 1
# Another device sums in another order, which is seen from the seventh figure on. Checkpoints of two runs are many steps
# apart, and some norm farther than this.
_SAME = 1e-4


def write_sidecar(path: Path, state: Mapping[str, Any], model: nn.Module) -> None:
    """Write it atomically.

    Raises:
        OSError: it cannot be written; the one before it is left as it is.
    """
    save_state(path, {**state, "weights": _norms(model)}, kind=SIDECAR_KIND, version=SIDECAR_VERSION)


def read_sidecar(path: Path, model: nn.Module) -> dict[str, Any]:
    """The state, where it is of the weights that ``model`` has now.

    Raises:
        StateFileError: missing, torn, of another version, or of other weights, as of a run that was begun anew in the
            same folder without the brain; the message names the file and says what to do.
    """
    state: dict[str, Any] = load_state(path, kind=SIDECAR_KIND, version=SIDECAR_VERSION)
    weights, now = state.get("weights"), _norms(model)  # a sidecar of an older version lacks them
    if weights is not None and len(weights) != len(now):
        raise StateFileError(
            f"{path} is of a model with {len(weights)} tensors of weights, this one has {len(now)}. Delete the file to "
            "start the brain afresh"
        )
    if weights is not None and not _alike(weights, now):
        raise StateFileError(
            f"{path} is of other weights than the checkpoint that was read, as of an earlier run in this folder, "
            "or of a model of another shape. Delete it, or read the checkpoint that it belongs to"
        )
    return state


def _norms(model: nn.Module) -> list[float]:
    """L2 norm of each tensor of weights, in the model's order."""
    return [float(torch.linalg.vector_norm(weights.detach().float())) for weights in model.parameters()]


def _alike(before: Sequence[float], now: Sequence[float]) -> bool:
    """Up to rounding; NaN is like NaN, as a checkpoint may be of a run that broke."""
    return all(
        math.isclose(a, b, rel_tol=_SAME, abs_tol=_SAME) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(before, now, strict=True)
    )
