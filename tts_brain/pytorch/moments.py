"""Adam's moments where a host keeps them in float16: what they lose there, and how it is kept from being lost.

float16 holds nothing between 0 and 6e-8. The second moment grows by (1 - β₂) g² a step, so that it stays 0 under every
|g| below 8e-3 (β₂ = 0.999), and the step there is m / eps: a thousand times the rate, or, where float16 makes eps 0
too, not a number.

The remedy is that of mixed-precision training (Micikevicius et al. 2018, section 3.2), given to the optimizer alone:
each parameter's gradient is multiplied by a power of two of its own, which does not change Adam's step (Kingma and Ba
2015, section 2) but for eps. That is raised, while the optimizer steps, to the gradient whose square is just lost, so
that no step is larger than under a second moment that was held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# The largest element of a gradient may become so large: its square is held. The first one leaves a factor of sixteen.
# float16 holds the highest scale itself.
_LARGEST, _ROOM, _HIGHEST_SCALE = 200.0, 16.0, 2.0**15
_FINEST = 2.0**-24  # of float16
_SECOND = "exp_avg_sq"
_POWERS = {"exp_avg": 1, _SECOND: 2, "max_exp_avg_sq": 2}
# RAdam's first five steps are the gradient's own size; it begins behind them.
_FIRST_STEPS = {torch.optim.Adam: 0, torch.optim.AdamW: 0, torch.optim.RAdam: 5}
_ASKED, _ASKED_OF_EACH = 4, 4096


class HalfMoments:
    """Scales the gradients of one optimizer from its next step on; its moments begin anew.

    Checkpoints do not show it: a ``state_dict`` has the moments in the host's units, and loading one scales them.

    Args:
        optimizer: ``lost_to_half`` of which is true.

    Attributes:
        scales: of the gradients by parameter, powers of two, each on the parameter's device; of those that had a
            gradient so far.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scales: dict[Tensor, Tensor] = {}
        self._optimizer = optimizer
        first = _FIRST_STEPS[type(optimizer)]
        for parameter in _parameters(optimizer):
            state = optimizer.state.get(parameter, {})
            for name in _POWERS.keys() & state.keys():
                state[name].zero_()
            if "step" in state:
                state["step"] = torch.full_like(state["step"], first) if isinstance(state["step"], Tensor) else first
        self._handles = [
            optimizer.register_state_dict_post_hook(self._as_the_host_knows),
            optimizer.register_load_state_dict_post_hook(lambda _: self._multiply_moments(1)),
        ]

    def multiply(self) -> None:
        """Scale finite gradients, in place; less where the largest element would come out above 200.

        Waits for the device when a parameter has its first gradient.
        """
        for group in self._optimizer.param_groups:
            held = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not held:
                continue
            gradients = [parameter.grad for parameter in held if parameter.grad is not None]
            if self._coupled(group):
                torch._foreach_add_(gradients, [parameter.detach() for parameter in held], alpha=group["weight_decay"])
            norms = torch._foreach_norm(gradients, ord=math.inf)
            for parameter, gradient, norm in zip(held, gradients, norms, strict=True):
                largest = norm.float()
                if parameter not in self.scales:
                    self.scales[parameter] = torch.full_like(largest, _scale(float(largest)))
                gradient.mul_(torch.minimum(self.scales[parameter], _LARGEST / largest.clamp(min=1e-30)))

    def during_step(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What one of the optimizer's groups is to hold while it steps."""
        held = {"eps": max(group["eps"], math.sqrt(_FINEST / (1.0 - group["betas"][1])))}
        # ``multiply`` has added it, in the unit of each parameter's gradient.
        return held | ({"weight_decay": 0.0} if self._coupled(group) else {})

    def release(self) -> None:
        """Give the moments back in the host's units, and leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()
        self._multiply_moments(-1)

    def _coupled(self, group: Mapping[str, Any]) -> bool:
        """Is its weight decay added to the gradient?"""
        decoupled = isinstance(self._optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        return bool(group["weight_decay"]) and not decoupled

    def _multiply_moments(self, sign: int) -> None:
        with torch.no_grad():
            for parameter, scale in self.scales.items():
                state = self._optimizer.state.get(parameter, {})
                for name in _POWERS.keys() & state.keys():
                    state[name].mul_(scale ** (sign * _POWERS[name]))

    def _as_the_host_knows(self, _: torch.optim.Optimizer, said: dict[str, Any]) -> dict[str, Any]:
        """The state is by number, in the order of the groups' parameters."""
        scales = dict(enumerate(self.scales.get(parameter) for parameter in _parameters(self._optimizer)))
        states = {}
        for at, state in said["state"].items():
            scale = scales[at]
            held = (
                {}
                if scale is None
                else {name: state[name] * scale ** -_POWERS[name] for name in _POWERS.keys() & state.keys()}
            )
            states[at] = {**state, **held}
        return {**said, "state": states}


def _scale(largest: float) -> float:
    """The power of two that brings ``largest`` to 6 to 12.5."""
    return min(2.0 ** math.floor(math.log2(_LARGEST / _ROOM / max(largest, 1e-30))), _HIGHEST_SCALE)


def lost_to_half(optimizer: torch.optim.Optimizer) -> bool:
    """Is it torch's Adam, AdamW or RAdam, and are its second moments kept in float16, whatever dtype they have?

    False for a fused one, which takes a gradient scaler's scale back by itself. Waits for the device.
    """
    if type(optimizer) not in _FIRST_STEPS or any(group.get("fused") for group in optimizer.param_groups):
        return False
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    seconds = [state[_SECOND] for state in states if _SECOND in state]
    large = [second for second in seconds if second.dim() >= 2 and second.layout is torch.strided]
    asked = [second.flatten()[:_ASKED_OF_EACH] for second in large[:: max(1, len(large) // _ASKED)][:_ASKED]]
    return bool(asked) and bool(torch.stack([(some == some.half().to(some.dtype)).all() for some in asked]).all())


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
