"""Running statistics (batch norm) that a NaN batch has poisoned: the weights are guarded, these change in the forward.

In training mode nobody notices, as batch norm uses the batch; evaluation and synthesis would be NaN for good.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BufferGuard:
    """Keeps the last finite value of each floating-point buffer of a model.

    Args:
        model: its buffers are read and, when poisoned, written in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Tensor] = {}
        self.keep()

    def keep(self) -> None:
        """Copy the buffers that are finite; call once per decision (one device sync, a few kilobytes).

        Each on its own: a mask that is minus infinity by design must not stop the others from being kept.
        """
        buffers = self._floating()
        if not buffers:
            return
        finite = torch.stack([torch.isfinite(b).all() for b in buffers.values()]).tolist()
        for (name, buffer), good in zip(buffers.items(), finite, strict=True):
            if good:
                self._kept[name] = buffer.detach().clone()

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
