"""Adam's moments where a host keeps them in float16: what they lose there, and how it is kept from being lost.

float16 holds nothing between 0 and 6e-8. The second moment grows by (1 - β₂) g² a step, so that it stays 0 under every
|g| below 5.5e-3 (β₂ = 0.999), and the step there is m / eps: far above the rate, or, where float16 makes eps 0 too, not
a number.

The remedy is that of mixed-precision training (Micikevicius et al. 2018, section 3.2), given to the optimizer alone:
each parameter's gradient is multiplied by a power of two of its own, which does not change Adam's step (Kingma and Ba
2015, section 2) but for eps. While the optimizer steps, that is at least the gradient whose square is the finest held,
so that no step is larger than under a second moment that was held, and never less than the host's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# The largest element of a gradient may become so large: its square is held. The first one leaves a factor of sixteen.
# float16 holds the highest scale itself.
_LARGEST, _ROOM, _HIGHEST_SCALE = 200.0, 16.0, 2.0**15
_FINEST = 2.0**-24  # of float16
_SECOND = "exp_avg_sq"
_POWERS = {"exp_avg": 1, _SECOND: 2, "max_exp_avg_sq": 2}
_ASKED, _ASKED_OF_EACH = 4, 4096


class HalfMoments:
    """Scales the gradients of one optimizer from its next step on; its moments begin anew.

    A ``state_dict`` has the moments in the host's units, and loading one scales them, or begins anew where it comes
    with second moments that float16 has lost. ``grad`` stays scaled after a step, until it is cleared.

    Args:
        optimizer: ``lost_to_half`` of which is true.
        on_fault: called with an exception of our own inside a host's ``state_dict`` or ``load_state_dict``; has to call
            ``release``.

    Attributes:
        scales: of the gradients by parameter, powers of two, each on the parameter's device; of those that had a
            gradient other than 0.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, on_fault: Callable[[BaseException], None]) -> None:
        self.scales: dict[Tensor, Tensor] = {}
        self._optimizer = optimizer
        self._on_fault = on_fault
        self._begin_anew()
        self._handles = [
            optimizer.register_state_dict_post_hook(self._saved),
            optimizer.register_load_state_dict_post_hook(self._loaded),
        ]

    def multiply(self) -> None:
        """Scale finite gradients, in place; less where the largest element would come out above 200.

        Call it before the groups are turned to ``during_step``: the host's eps and decay are read.

        Waits for the device when a parameter has its first gradient.
        """
        scaled = []
        for group in self._optimizer.param_groups:
            decay = group["weight_decay"] if self._coupled(group) else 0.0
            for parameter in group["params"]:
                if parameter.grad is None or not parameter.numel():
                    continue
                gradient = parameter.grad + decay * parameter.detach() if decay else parameter.grad
                largest = torch.linalg.vector_norm(gradient, math.inf, dtype=torch.float32)
                if parameter not in self.scales and float(largest) > 0.0:
                    self.scales[parameter] = torch.full_like(largest, _scale(float(largest), group))
                scale = self.scales.get(parameter, torch.ones_like(largest))
                factor = torch.minimum(scale, _LARGEST / largest.clamp(min=1e-30))
                scaled.append((parameter.grad, gradient, factor.to(gradient.dtype)))
        # Only now, when all that may fail has been done, is anything changed.
        for target, gradient, factor in scaled:
            torch.mul(gradient, factor, out=target)

    def during_step(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What one of the optimizer's groups is to hold while it steps."""
        # ``multiply`` has added a decay that is the gradient's, in the unit of each parameter's gradient.
        return {"eps": max(group["eps"], _eps(group))} | ({"weight_decay": 0.0} if self._coupled(group) else {})

    def release(self) -> None:
        """Give the moments back in the host's units, and leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()
        for state, scale in self._scaled():
            for name in _POWERS.keys() & state.keys():
                state[name].copy_(_times(state[name], scale, -_POWERS[name]))

    def _begin_anew(self) -> None:
        for parameter in _parameters(self._optimizer):
            state = self._optimizer.state.get(parameter, {})
            for name in _POWERS.keys() & state.keys():
                state[name] = torch.zeros_like(state[name])
            if "step" in state:
                state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], Tensor) else 0

    def _coupled(self, group: Mapping[str, Any]) -> bool:
        """Is its weight decay added to the gradient?"""
        decoupled = isinstance(self._optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        return bool(group["weight_decay"]) and not decoupled

    def _scaled(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for parameter, scale in self.scales.items():
            yield self._optimizer.state.get(parameter, {}), scale

    def _saved(self, _: torch.optim.Optimizer, said: dict[str, Any]) -> dict[str, Any] | None:
        """Its state is by number, in the order of the groups' parameters."""
        try:
            scales = {at: self.scales.get(parameter) for at, parameter in enumerate(_parameters(self._optimizer))}
            states = {
                at: state if (scale := scales.get(at)) is None else {**state, **_unscaled(state, scale)}
                for at, state in said["state"].items()
            }
        except Exception as error:
            self._on_fault(error)
            return None
        return {**said, "state": states}

    def _loaded(self, _: torch.optim.Optimizer) -> None:
        try:
            if lost_to_half(self._optimizer):
                self._begin_anew()
                return
            for state, scale in self._scaled():
                # Not in place: what is loaded may be the very tensors of the caller.
                state.update(
                    {name: _times(state[name], scale, _POWERS[name]) for name in _POWERS.keys() & state.keys()}
                )
        except Exception as error:
            self._on_fault(error)


def _unscaled(state: Mapping[str, Any], scale: Tensor) -> dict[str, Tensor]:
    return {name: _times(state[name], scale, -_POWERS[name]) for name in _POWERS.keys() & state.keys()}


def _times(moment: Tensor, scale: Tensor, power: int) -> Tensor:
    """In float32, as the square of a scale is beyond float16."""
    return (moment.float() * scale**power).to(moment.dtype)


def _scale(largest: float, group: Mapping[str, Any]) -> float:
    """The power of two that brings ``largest`` to 6 to 12.5, or as near as leaves the host's eps below ours."""
    most = min(_LARGEST / _ROOM / largest, _HIGHEST_SCALE, max(_eps(group) / max(group["eps"], 1e-30), 1.0))
    return 2.0 ** math.floor(math.log2(most))


def _eps(group: Mapping[str, Any]) -> float:
    """The gradient whose share of the second moment is the finest that float16 holds."""
    return math.sqrt(_FINEST / (1.0 - group["betas"][1]))


def lost_to_half(optimizer: torch.optim.Optimizer) -> bool:
    """Is it torch's Adam or AdamW, and are its second moments kept in float16, whatever dtype they have?

    False for a fused one, which takes a gradient scaler's scale back by itself, and for one that maximizes. Waits for
    the device.
    """
    odd = any(group.get("fused") or group.get("maximize") for group in optimizer.param_groups)
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or odd:
        return False
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    seconds = [state[_SECOND] for state in states if _SECOND in state]
    large = [second for second in seconds if second.dim() >= 2 and second.layout is torch.strided]
    asked = [second.flatten()[:_ASKED_OF_EACH] for second in large[:: max(1, len(large) // _ASKED)][:_ASKED]]
    return bool(asked) and bool(torch.stack([(some == some.half().to(some.dtype)).all() for some in asked]).all())


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
