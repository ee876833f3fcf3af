"""Rate, clip and the last guard before the weights, on any ``torch.optim.Optimizer`` through its step hooks.

A written ``param_groups["lr"]`` is lost under schedulers that recompute it and compounds under those that recurse on
it. So the rate is multiplied at the last moment, inside ``optimizer.step``, and put back right after: schedulers,
checkpoints and logs of the host never see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tts_brain.pytorch.moments import HalfMoments, lost_to_half

_WATCHED_TENSORS = 4
_WATCHED_SIZE = 2_000_000
# Values of each that are asked whether half precision holds them: of so many in float32 some never are.
_ASKED = 4096


class OptimizerTap:
    """Hooks one optimizer.

    Args:
        optimizer: the host's.
        guard: keep non-finite gradients from the weights, and apply rate and clip. False only counts and looks.
        on_fault: called with an exception of our own; the step then runs as the host meant it.

    Attributes:
        rate_multiplier: factor on every group's rate, 1.0 leaves it alone.
        most_rate: a multiplier above 1 carries no group's rate beyond this, should the host raise it between two
            decisions; the host's own rate may lie above. Infinity is off.
        clip_norm: gradients are scaled down to this L2 norm; infinity is off.
        host_rate: the host's own rate at the newest step, of several groups the highest; NaN before the first, and
            where rates are tensors, as reading those may wait for the device.
        steps: optimizer steps seen, skipped ones included; not those that a fused optimizer leaves out for its scaler.
        skipped: the newest step had a non-finite gradient, and nothing was changed by it.
        grad_norm: L2 norm of the newest gradient as the optimizer got it (after the host's own clipping); NaN with
            ``guard=False``.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, guard: bool, on_fault: Callable[[BaseException], None]
    ) -> None:
        self.rate_multiplier = 1.0
        self.most_rate = math.inf
        self.host_rate = math.nan
        self.clip_norm = math.inf
        self.steps = 0
        self.skipped = False
        self.grad_norm = math.nan
        self._update_ratio = math.nan
        self._kept_in: str | None = None
        self._optimizer = optimizer
        self._guard = guard
        self._on_fault = on_fault
        self._moments: HalfMoments | None = None
        self._turned: list[tuple[dict[str, Any], str, Any]] = []  # group, name, the host's value
        self._left_out = False
        self._watch = False
        self._before: list[tuple[Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
            # A step that was interrupted has no end, and a host may save then.
            optimizer.register_state_dict_pre_hook(lambda _: self._put_back()),
        ]

    def watch_next(self) -> None:
        """Measure ``update_ratio`` at the next step: copies of a few tensors, so once per decision only."""
        self._watch = True

    @property
    def watching(self) -> bool:
        """Will the next step be measured?"""
        return self._watch

    def take_update_ratio(self) -> float:
        """``|Δw| / |w|`` of the step that ``watch_next`` asked for, once; NaN before it and after."""
        ratio, self._update_ratio = self._update_ratio, math.nan
        return ratio

    def take_kept_in(self) -> str | None:
        """The coarsest type that holds the weights of that step as they are (see ``kept_in``); once, else None."""
        kept_in, self._kept_in = self._kept_in, None
        return kept_in

    def hold_moments(self) -> bool:
        """Keep Adam's moments from being lost in float16, from the next step on (``HalfMoments``).

        Returns:
            True when they were being lost, and nothing was done about it before.
        """
        if not self._guard or self._moments is not None or not lost_to_half(self._optimizer):
            return False
        self._moments = HalfMoments(self._optimizer, self._moments_failed)
        return True

    def _moments_failed(self, error: BaseException) -> None:
        self.release()
        self._on_fault(error)

    def release(self) -> None:
        """Back to the host's own behaviour, hooks left in place: a fault must not leave a rate multiplied."""
        self._guard = False
        self.rate_multiplier = 1.0
        self.clip_norm = math.inf
        moments, self._moments = self._moments, None
        if moments is not None:
            try:
                moments.release()
            except Exception as error:  # in the midst of a host's step, or of a fault
                self._on_fault(error)

    def detach(self) -> None:
        """Take the hooks off."""
        self._put_back()
        self.release()
        for handle in self._handles:
            handle.remove()

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        try:
            self._put_back()
            self.skipped = False
            rates = [group["lr"] for group in optimizer.param_groups if not isinstance(group["lr"], Tensor)]
            self.host_rate = float(max(rates, default=math.nan))
            # A gradient scaler calls the ``step`` of a fused optimizer in any case, and that leaves itself out.
            found = getattr(optimizer, "found_inf", None)
            self._left_out = self._guard and found is not None and float(found) > 0.0
            if self._guard and not self._left_out:
                self._check_gradients()
            multiplier = self.multiplier
            if multiplier != 1.0:
                for group in optimizer.param_groups:
                    self._turn(group, "lr", group["lr"] * multiplier)
            if self._watch and not self._left_out:
                self._before = [(p, p.detach().clone()) for p in self._watched()]
            # Last: after a fault the step is the host's own, its gradients too.
            if self._moments is not None and not self._left_out and not self.skipped:
                held = [(group, self._moments.during_step(group)) for group in optimizer.param_groups]
                self._moments.multiply()
                for group, values in held:
                    for name, value in values.items():
                        self._turn(group, name, value)
        except Exception as error:
            self._put_back()
            self._on_fault(error)

    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        try:
            self._put_back()
            self.steps += not self._left_out
            if self._before:
                self._measure_update()
        except Exception as error:
            self._on_fault(error)

    def _turn(self, group: dict[str, Any], name: str, value: Any) -> None:
        self._turned.append((group, name, group[name]))
        group[name] = value

    def _put_back(self) -> None:
        while self._turned:
            group, name, value = self._turned.pop()
            group[name] = value

    @property
    def multiplier(self) -> float:
        """What the host's rate is multiplied by: ``rate_multiplier``, less what ``most_rate`` cuts from it."""
        if self.rate_multiplier <= 1.0 or not self.host_rate > 0.0:
            return self.rate_multiplier
        return min(self.rate_multiplier, max(1.0, self.most_rate / self.host_rate))

    def _gradients(self) -> list[Tensor]:
        return [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _check_gradients(self) -> None:
        gradients = self._gradients()
        if not gradients:
            return
        # The one number that must be known before the step. Both hosts wait for the device at this point of every
        # step anyway (Coqui reads the norm and every loss, ESPnet tests the norm for finiteness).
        norm = torch.nn.utils.get_total_norm(gradients)
        # Under a gradient scaler a fused optimizer takes the scale back by itself, after this.
        scale = getattr(self._optimizer, "grad_scale", None)
        self.grad_norm = float(norm if scale is None else norm / scale)
        if not math.isfinite(self.grad_norm):
            self.skipped = True
            # An optimizer leaves parameters without a gradient alone, moments and weight decay included.
            for group in self._optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        elif self.grad_norm > self.clip_norm:
            torch._foreach_mul_(gradients, self.clip_norm / self.grad_norm)

    def _watched(self) -> list[Tensor]:
        matrices = [
            p
            for group in self._optimizer.param_groups
            for p in group["params"]
            if p.dim() >= 2 and p.numel() <= _WATCHED_SIZE and p.grad is not None
        ]
        stride = max(1, len(matrices) // _WATCHED_TENSORS)
        return matrices[::stride][:_WATCHED_TENSORS]

    def _measure_update(self) -> None:
        changes = [(p.detach() - old).norm() / old.norm().clamp(min=1e-12) for p, old in self._before]
        ratios = torch.stack(changes).cpu()
        self._update_ratio = float(ratios.median())
        moved = [
            old.flatten()[:_ASKED]
            for (_, old), ratio in zip(self._before, ratios.tolist(), strict=True)
            if ratio > 0.0 and old.layout is torch.strided
        ]
        self._kept_in = kept_in(moved)
        self._before, self._watch = [], False


def kept_in(weights: Sequence[Tensor]) -> str | None:
    """The coarsest of "bfloat16", "float16" and "float32" that holds every value as it is, whatever dtype they have.

    None where that cannot be said: no weights, all of them 0, or of a type that is none of the usual ones. "float32"
    where one is not a number.
    """
    usual = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if not weights or any(w.dtype not in usual for w in weights):
        return None
    # In this order: float16 holds most values of bfloat16, too.
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    some = torch.stack([w.count_nonzero() > 0 for w in weights]).any()
    held = [torch.stack([(w == w.to(kind).to(w.dtype)).all() for w in weights]).all() for kind in kinds.values()]
    nonzero, *told = torch.stack([some, *held]).tolist()
    if not nonzero:
        return None
    return next((name for name, holds in zip(kinds, told, strict=True) if holds), "float32")
