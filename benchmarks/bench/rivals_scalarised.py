"""Loss balancing from the literature, as TorchJD has it: uncertainty weighting, DWA and FAMO on the host's four losses.

Each takes the host's terms, l1, mse, bce and attn (which contains the guided weight), and makes one loss of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchjd.scalarization import DWA, FAMO, UW, Scalarizer

from bench.arms import Plain
from bench.host import Training
from tts_brain.feedback.rollback import RandomStates

TASKS = ("l1", "mse", "bce", "attn")


class Scalarised(Plain):
    """Puts ``scalarizer`` of the host's terms in place of their sum; what the host reports stays its own.

    A batch with a term that is not finite keeps the host's loss, so that the host skips the step as it always does,
    and the scalarizer never sees it.

    Args:
        scalarizer: of a tensor with one value per task, in the order of ``TASKS``.
        constants: as in ``Plain``; a forward-sum term is added to what the scalarizer makes.
    """

    def __init__(self, scalarizer: Scalarizer, **constants: float) -> None:
        super().__init__(**constants)
        self.scalarizer = scalarizer
        self._host: Callable[..., Any] | None = None
        self._terms: list[Tensor] = []
        self._handles: list[Any] = []

    def attach(self, run: Training) -> None:
        self.scalarizer.to(run.device)
        self._host = run.tts.forward
        self._handles = [
            run.tts.taco2_loss.register_forward_hook(self._keep),
            run.tts.attn_loss.register_forward_hook(self._keep),
        ]
        run.tts.forward = self._forward
        super().attach(run)  # around ours: a constant term is no task of the scalarizer's

    def detach(self, run: Training) -> None:
        for handle in self._handles:
            handle.remove()
        run.tts.__dict__.pop("forward", None)
        super().detach(run)

    def _keep(self, module: Any, inputs: Any, output: Any) -> None:
        self._terms += output if isinstance(output, tuple) else (output,)

    def _call_host(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        """What the host returns, and its terms (4,)."""
        assert self._host is not None
        self._terms = []
        returned = self._host(*args, **kwargs)
        values, self._terms = torch.stack(self._terms), []
        return returned, values

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        (loss, stats, rest), values = self._call_host(*args, **kwargs)
        if torch.is_grad_enabled() and bool(values.isfinite().all()):
            loss = self.scalarizer(values).reshape(loss.shape)
        return loss, stats, rest


class Uncertainty(Scalarised):
    """Uncertainty weighting (Kendall et al., CVPR 2018): a learned log-variance per task, from 0.

    As in the paper, one optimizer learns both: the log-variances are a parameter group of the host's Adam, so its own
    ``step`` trains them, its ``zero_grad`` clears them, and a step that it skips is skipped for them. The host's clip
    does not count them, as it takes the model's parameters.

    Args:
        pace: their rate in units of the model's. 1 is the paper's. The term of 0.1 % is at home at a log-variance near
            -6, which Adam at 1e-3 reaches after 6000 steps; short runs need about 25 to get anywhere.
    """

    def __init__(self, pace: float = 1.0, **constants: float) -> None:
        super().__init__(UW(len(TASKS)), **constants)
        self.pace = pace

    def attach(self, run: Training) -> None:
        super().attach(run)
        rate = self.pace * run.optimizer.param_groups[0]["lr"]
        run.optimizer.add_param_group({"params": list(self.scalarizer.parameters()), "lr": rate})

    def detach(self, run: Training) -> None:
        for parameter in run.optimizer.param_groups.pop()["params"]:
            run.optimizer.state.pop(parameter, None)
        super().detach(run)


class Dwa(Scalarised):
    """Dynamic weight average (Liu et al., CVPR 2019): a task that falls slowly counts more; temperature 2 as there.

    Args:
        every: steps of what it takes for an epoch; the weights stay equal for the first two.
    """

    def __init__(self, every: int = 25, **constants: float) -> None:
        super().__init__(DWA(temperature=2.0), **constants)
        self.every = every

    def step(self, run: Training, step: int) -> None:
        super().step(run, step)
        if step > 0 and step % self.every == 0:
            self.scalarizer.step()


class Famo(Scalarised):
    """FAMO (Liu et al., NeurIPS 2023): all losses shall fall at the same relative pace; logits from 0, rate 0.025.

    It wants the losses of the same batch after the update. They are computed before the next step, with the weights
    that the optimizer has left and the same dropout masks, so that the difference is the update's alone; the random
    state and the batch normalisation's averages are put back. This costs a forward per step, and counts as its time.

    Its weights sum to 1 and fall on the smallest loss, so the mel terms get some 0.3 % of the host's gradient. The
    host's Adam has eps 1e-6, which would eat that; the papers' code leaves 1e-8, and so does this arm.
    """

    def __init__(self, **constants: float) -> None:
        super().__init__(FAMO(len(TASKS)), **constants)
        self._batch: tuple[tuple[Any, ...], dict[str, Any], Tensor] | None = None

    def attach(self, run: Training) -> None:
        super().attach(run)
        for group in run.optimizer.param_groups:
            group["eps"] = 1e-8

    def step(self, run: Training, step: int) -> None:
        super().step(run, step)
        if self._batch is not None:
            values = self._after_update(run, *self._batch)
            if bool(values.isfinite().all()):
                self.scalarizer.update(values)
            self._batch = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        state = RandomStates().state_dict()
        (loss, stats, rest), values = self._call_host(*args, **kwargs)
        if torch.is_grad_enabled() and bool(values.isfinite().all()):
            loss = self.scalarizer(values).reshape(loss.shape)
            self._batch = args, kwargs, state
        return loss, stats, rest

    def _after_update(self, run: Training, args: tuple[Any, ...], kwargs: dict[str, Any], state: Any) -> Tensor:
        states = RandomStates()
        now = states.state_dict()
        buffers = {name: buffer.clone() for name, buffer in run.tts.named_buffers()}
        states.load_state_dict(state)
        with torch.no_grad():
            _, values = self._call_host(*args, **kwargs)
            for name, buffer in run.tts.named_buffers():
                buffer.copy_(buffers[name])
        states.load_state_dict(now)
        return values


def uncertainty(pace: float = 1.0, **constants: float) -> Uncertainty:
    """Uncertainty weighting; ``constants`` as in ``Plain``, else the host's."""
    return Uncertainty(pace, **constants)


def dwa(**constants: float) -> Dwa:
    """Dynamic weight average, an epoch of 25 steps; ``constants`` as in ``Plain``, else the host's."""
    return Dwa(**constants)


def famo(**constants: float) -> Famo:
    """FAMO; it takes logarithms, so the guided weight that it starts from plays no part."""
    return Famo(**constants)
