"""Adam's moments where a host keeps them in float16: what they lose there, and how it is kept from being lost.

float16 holds nothing between 0 and 6e-8. The second moment grows by (1 - β₂) g² a step, so that it stays 0 under every
|g| below 8e-3 (β₂ = 0.999), and the step there is m / eps: a thousand times the rate, or, where float16 makes eps 0
too, not a number.

The remedy is that of mixed-precision training (Micikevicius et al. 2018, section 3.2), given to the optimizer alone:
its gradients are multiplied by a power of two, which does not change Adam's step (Kingma and Ba 2015, section 2) but
for eps. That is raised, while the optimizer steps, to the gradient whose square is just lost, so that no step is larger
than under a second moment that was held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The largest element of a gradient may become so large: its square is held. The first one leaves a factor of sixteen.
_LARGEST, _ROOM = 200.0, 16.0
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
        scale: of the gradients, a power of two; 1 until the first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.scale = 1.0
        self._optimizer = optimizer
        self._began = False
        for state in _states(optimizer):
            for name in _POWERS.keys() & state.keys():
                state[name].zero_()
            first = _FIRST_STEPS[type(optimizer)]
            state["step"] = torch.full_like(state["step"], first) if isinstance(state["step"], Tensor) else first
        self._handles = [
            optimizer.register_state_dict_post_hook(self._as_the_host_knows),
            optimizer.register_load_state_dict_post_hook(lambda _: self._multiply(self.scale)),
        ]

    def multiply(self, gradients: Sequence[Tensor]) -> None:
        """Scale finite gradients, in place; less where the largest element would come out above 200.

        Waits for the device at the first call alone.
        """
        largest = torch.nn.utils.get_total_norm(gradients, norm_type=math.inf)
        if not self._began:
            self._began = True
            self.scale = 2.0 ** math.floor(math.log2(_LARGEST / _ROOM / max(float(largest), 1e-6)))
        torch._foreach_mul_(list(gradients), (_LARGEST / largest.float().clamp(min=1e-30)).clamp(max=self.scale))

    def during_step(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What one of the optimizer's groups is to hold while it steps."""
        held = {"eps": max(group["eps"], math.sqrt(_FINEST / (1.0 - group["betas"][1])))}
        # Decay that is added to the gradient has its unit.
        coupled = not isinstance(self._optimizer, torch.optim.AdamW) and not group.get("decoupled_weight_decay", False)
        return held | ({"weight_decay": group["weight_decay"] * self.scale} if coupled else {})

    def release(self) -> None:
        """Give the moments back in the host's units, and leave the optimizer alone."""
        for handle in self._handles:
            handle.remove()
        self._multiply(1.0 / self.scale)

    def _multiply(self, factor: float) -> None:
        with torch.no_grad():
            for state in _states(self._optimizer):
                for name in _POWERS.keys() & state.keys():
                    state[name].mul_(factor ** _POWERS[name])

    def _as_the_host_knows(self, _: torch.optim.Optimizer, said: dict[str, Any]) -> dict[str, Any]:
        states = {
            key: {name: v * self.scale ** -_POWERS[name] if name in _POWERS else v for name, v in state.items()}
            for key, state in said["state"].items()
        }
        return {**said, "state": states}


def lost_to_half(optimizer: torch.optim.Optimizer) -> bool:
    """Is it Adam, AdamW or RAdam, and are its second moments kept in float16, whatever dtype they have?

    False for a fused one, which takes a gradient scaler's scale back by itself. Waits for the device.
    """
    if type(optimizer) not in _FIRST_STEPS or any(group.get("fused") for group in optimizer.param_groups):
        return False
    seconds = [state[_SECOND] for state in _states(optimizer) if _SECOND in state]
    large = [second for second in seconds if second.dim() >= 2 and second.layout is torch.strided]
    asked = [second.flatten()[:_ASKED_OF_EACH] for second in large[:: max(1, len(large) // _ASKED)][:_ASKED]]
    return bool(asked) and bool(torch.stack([(some == some.half().to(some.dtype)).all() for some in asked]).all())


def _states(optimizer: torch.optim.Optimizer) -> Iterator[dict[str, Any]]:
    for group in optimizer.param_groups:
        yield from (optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state)
