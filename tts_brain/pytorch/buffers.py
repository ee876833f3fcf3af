"""Running statistics (batch norm) that a NaN batch has poisoned: the weights are guarded, these change in the forward.

In training mode nobody notices, as batch norm uses the batch; evaluation and synthesis would be NaN for good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BufferGuard:
    """Keeps the last finite floating-point buffers of a model.

    Args:
        model: its buffers are read and, when poisoned, written in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}
        self.keep()

    def keep(self) -> None:
        """Copy all buffers if they are finite; call once per decision (one device sync, a few kilobytes)."""
        buffers = self._floating()
        if buffers and bool(_all_finite(list(buffers.values()))):
            self._kept = {name: buffer.detach().clone() for name, buffer in buffers.items()}

    def heal(self) -> list[str]:
        """Put back the kept values of buffers that are not finite any more; returns their names."""
        healed = []
        for name, buffer in self._floating().items():
            if name in self._kept and not bool(torch.isfinite(buffer).all()):
                buffer.copy_(self._kept[name])
                healed.append(name)
        return healed

    def _floating(self) -> dict[str, Tensor]:
        return {name: b for name, b in self._model.named_buffers() if b.is_floating_point()}


def _all_finite(tensors: list[Tensor]) -> Tensor:
    return torch.stack([torch.isfinite(t).all() for t in tensors]).all()
