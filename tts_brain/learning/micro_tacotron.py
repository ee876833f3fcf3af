"""A tiny attention model really trained, some milliseconds a step: the cheap environment for what learns to steer.

An endless made-up corpus is read aloud (``micro_task``): symbols of varying length at a varying rate, pauses, noise,
silence at the edges. Alignment emerges, fails, relapses and recovers here for the reasons it does in a host: rate,
guidance, batch, reduction factor, silence, wrong texts, a hurt attention.

``MicroRuns`` trains R runs at once, each with its own setting, seed, weights and knobs; run i of R is what it would be
alone, to rounding. ``MicroRun`` is one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tts_brain.attention.metrics import METRICS, measure, report
from tts_brain.learning.micro_model import (
    ATTENTION,
    Output,
    draw,
    dropout_count,
    forward_sum_loss,
    gate_loss,
    guided_loss,
    mel_loss,
    shapes,
    teacher_forced,
)
from tts_brain.learning.micro_optimizer import Adam
from tts_brain.learning.micro_setting import CAPABILITIES, MicroSetting
from tts_brain.learning.micro_task import CLEAN_EDGE, DROPOUT, Speech, speak, uniform
from tts_brain.types import (
    FORWARD_SUM_OFF,
    FORWARD_SUM_WEIGHT,
    GATE_WEIGHT,
    GRAD_CLIP,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    LEARNING_RATE,
    MEL_WEIGHT,
    Observation,
    StopTokenCounts,
)

__all__ = ["CAPABILITIES", "MicroRun", "MicroRuns", "MicroSetting"]

_MEASURED = 4  # utterances, as the adapters measure
_HELD_OUT_SEED, _HELD_OUT = 2**40, 32  # no run has this seed
_NAN_FRAMES = slice(20, 30)


class MicroRuns:
    """R runs trained side by side.

    Args:
        settings: one a run; batch size, reduction factor and noise must be the same in all.
        seeds: one a run, of initial weights, data and dropout; in [0, 2^40).
        device: where all tensors lie.

    Attributes:
        step_number: optimizer steps done.

    Raises:
        ValueError: settings that cannot be batched, or not as many seeds as settings.
    """

    def __init__(
        self, settings: Sequence[MicroSetting], seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        if len(settings) != len(seeds) or not settings:
            raise ValueError(f"{len(settings)} settings and {len(seeds)} seeds; pass as many of each, at least one")
        if len({(s.batch_size, s.reduction_factor, s.noise) for s in settings}) > 1:
            raise ValueError("batch_size, reduction_factor and noise differ between runs; train each kind by itself")
        if not all(0 <= seed < _HELD_OUT_SEED for seed in seeds):
            raise ValueError(f"seeds={list(seeds)}; write whole numbers in [0, 2**40)")
        self.settings, self.seeds, self.device = tuple(settings), tuple(seeds), torch.device(device)
        self.step_number = 0
        first = settings[0]
        self._batch_size, self._r, self._noise = first.batch_size, first.reduction_factor, first.noise
        self._flat = torch.stack([_fresh(seed, self._r) for seed in seeds]).to(self.device)  # (R, P)
        self._weights = self._views()
        self._adam = Adam(self._flat)
        self._rates = torch.tensor([one.rate for one in settings], device=self.device)
        self._clips = torch.tensor([one.clip for one in settings], device=self.device)

    def _views(self) -> dict[str, Tensor]:
        """Weights (R, …) that lie in ``_flat``: Adam sees one tensor."""
        views, at = {}, 0
        for name, shape in shapes(self._r).items():
            size = math.prod(shape)
            views[name] = self._flat[:, at : at + size].view(-1, *shape).requires_grad_()
            at += size
        return views

    def step(self, knobs: Sequence[Mapping[str, float]] | None = None) -> list[Observation]:
        """One optimizer step of every run.

        Args:
            knobs: one mapping a run, in the units of ``types.KNOBS``; those left out stand at the setting's own.

        Returns:
            One observation a run. A step whose gradient is not finite leaves weights and moments alone
            (``skipped``), as ESPnet does.

        Raises:
            ValueError: a knob that the model does not have, or not one mapping a run.
        """
        turned = self._turned(knobs)
        self.step_number += 1
        self._redraw()
        speech = self._speech()
        output = self._pass(speech, self.seeds, self.step_number)
        l1, mse = mel_loss(output, speech)
        gate, counts = gate_loss(output)
        guided = guided_loss(output, speech.token_lengths, self._column(turned, GUIDED_SIGMA))
        path = self._forward_sum(turned, output, speech)
        terms = {MEL_WEIGHT: l1 + mse, GATE_WEIGHT: gate, GUIDED_WEIGHT: guided, FORWARD_SUM_WEIGHT: path}
        # A sum over the runs: none has a part in another's weights.
        loss = torch.stack([self._column(turned, name) * term for name, term in terms.items()]).sum()
        grads = torch.autograd.grad(loss, list(self._weights.values()))
        gradient = torch.cat([grad.flatten(1) for grad in grads], dim=1)  # (R, P)
        rate = self._rates * self._column(turned, LEARNING_RATE)
        norm, ratio = self._adam.step(gradient, rate, self._clips, self._column(turned, GRAD_CLIP))
        read = torch.stack([*terms.values(), norm, ratio, *counts, speech.token_lengths.float().mean(1)]).detach()
        return self._observations(read.T.tolist(), output, speech)

    def held_out(self) -> list[dict[str, float]]:
        """``l1`` and the nine attention metrics of each run on 32 clean utterances, the same for all and always."""
        with torch.no_grad():
            runs = len(self.seeds)
            speech = speak(
                [_HELD_OUT_SEED] * runs,
                [0] * runs,
                batch_size=_HELD_OUT,
                reduction_factor=self._r,
                edges=[CLEAN_EDGE] * runs,
                wrong=[0.0] * runs,
                noise=self._noise,
                device=self.device,
            )
            output = self._pass(speech, [_HELD_OUT_SEED] * runs, 0)
            l1 = mel_loss(output, speech)[0].tolist()
            values = _measure(output, speech, _HELD_OUT).mean(1).tolist()
        return [{"l1": error, **dict(zip(METRICS, row, strict=True))} for error, row in zip(l1, values, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All that a run goes on from; tensors are copies."""
        return {"step": self.step_number, "weights": self._flat.detach().clone(), **self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], *, rewind: bool = True) -> None:
        """Inverse of ``state_dict``.

        Args:
            rewind: False leaves steps and data where they are, as in a host whose weights are put back.

        Raises:
            ValueError: the state of other runs; nothing is changed then.
        """
        for name, own in self.state_dict().items():
            if name not in state or (isinstance(own, Tensor) and state[name].shape != own.shape):
                raise ValueError(f"{name!r} does not fit {len(self.seeds)} runs with r={self._r}; pass their own state")
        with torch.no_grad():
            self._flat.copy_(state["weights"])
        self._adam.load_state_dict(state)
        if rewind:
            self.step_number = int(state["step"])

    def _turned(self, knobs: Sequence[Mapping[str, float]] | None) -> list[dict[str, float]]:
        knobs = [{}] * len(self.seeds) if knobs is None else knobs
        if len(knobs) != len(self.seeds):
            raise ValueError(f"{len(knobs)} mappings of knobs for {len(self.seeds)} runs; pass one a run")
        unknown = sorted({name for one in knobs for name in one} - set(CAPABILITIES.knobs))
        if unknown:
            raise ValueError(f"unknown knobs {unknown}; known are {', '.join(CAPABILITIES.knobs)}")
        return [{**setting.own_knobs, **one} for setting, one in zip(self.settings, knobs, strict=True)]

    def _column(self, turned: Sequence[Mapping[str, float]], name: str) -> Tensor:
        """(R,)."""
        return torch.tensor([one[name] for one in turned], device=self.device)

    def _speech(self) -> Speech:
        speech = speak(
            self.seeds,
            [self.step_number] * len(self.seeds),
            batch_size=self._batch_size,
            reduction_factor=self._r,
            edges=[s.edge_silence for s in self.settings],
            wrong=[s.wrong_transcripts for s in self.settings],
            noise=self._noise,
            device=self.device,
        )
        for i, setting in enumerate(self.settings):
            if self.step_number in setting.nan_steps:
                speech.mel[i, 0, _NAN_FRAMES] = math.nan
        return speech

    def _pass(self, speech: Speech, seeds: Sequence[int], step: int) -> Output:
        _, batch, frames, _ = speech.mel.shape
        count = dropout_count(batch, frames // self._r)
        draws = uniform(seeds, [step] * len(seeds), DROPOUT, count, self.device)
        return teacher_forced(self._weights, speech, self._r, draws)

    def _forward_sum(self, turned: Sequence[Mapping[str, float]], output: Output, speech: Speech) -> Tensor:
        """(R,), 0 where it has no weight: it is not made there."""
        path = torch.zeros(len(turned), device=self.device)
        on = [i for i, one in enumerate(turned) if one[FORWARD_SUM_WEIGHT] > FORWARD_SUM_OFF]
        if not on:
            return path
        made = forward_sum_loss(output.attention[on], output.steps[on], speech.token_lengths[on])
        return path.index_put((torch.tensor(on, device=self.device),), made)

    @torch.no_grad()
    def _redraw(self) -> None:
        for i, (setting, seed) in enumerate(zip(self.settings, self.seeds, strict=True)):
            if self.step_number in setting.redraw_steps:
                generator = torch.Generator().manual_seed(seed ^ (self.step_number << 40))
                for name in ATTENTION:
                    weight = self._weights[name]
                    weight[i] = draw(name, tuple(weight.shape[1:]), generator)

    def _observations(self, rows: list[list[float]], output: Output, speech: Speech) -> list[Observation]:
        due = [self.step_number % s.attention_every == 0 for s in self.settings]
        values = _measure(output, speech, _MEASURED) if any(due) else None
        made = []
        for i, (setting, row) in enumerate(zip(self.settings, rows, strict=True)):
            mel, gate, guided, path, norm, ratio, hit, false, missed, tokens = row
            whole = hit + false + missed
            made.append(
                Observation(
                    step=self.step_number,
                    # In the host's own weights, as the adapters report it.
                    losses={
                        "total": mel + gate + setting.guided_weight * guided + setting.forward_sum * path,
                        "mel": mel,
                        "gate": gate,
                        "guided": guided,
                    },
                    grad_norm=norm,
                    learning_rate=setting.rate,
                    update_ratio=ratio if due[i] else None,
                    attention=report(values[i]) if values is not None and due[i] else None,
                    stop=StopTokenCounts(hit / whole, false / whole, missed / whole) if math.isfinite(whole) else None,
                    text_length=tokens,
                    skipped=not math.isfinite(norm),
                )
            )
        return made


class MicroRun:
    """One run. Everything as in ``MicroRuns``, without the list."""

    def __init__(self, setting: MicroSetting, seed: int, device: torch.device | str = "cpu") -> None:
        self.setting, self.seed = setting, seed
        self._runs = MicroRuns([setting], [seed], device)

    @property
    def step_number(self) -> int:
        """Optimizer steps done."""
        return self._runs.step_number

    def step(self, knobs: Mapping[str, float] | None = None) -> Observation:
        """One optimizer step."""
        return self._runs.step(None if knobs is None else [knobs])[0]

    def held_out(self) -> dict[str, float]:
        """``l1`` and the attention metrics on the held-out utterances."""
        return self._runs.held_out()[0]

    def state_dict(self) -> dict[str, Any]:
        """All that the run goes on from."""
        return self._runs.state_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, rewind: bool = True) -> None:
        """Inverse of ``state_dict``; ``rewind=False`` leaves steps and data where they are."""
        self._runs.load_state_dict(state, rewind=rewind)


def _fresh(seed: int, reduction_factor: int) -> Tensor:
    """(P,) initial weights of one run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([draw(name, shape, generator).flatten() for name, shape in shapes(reduction_factor).items()])


def _measure(output: Output, speech: Speech, utterances: int) -> Tensor:
    """(R, utterances, 9) of the first utterances of each run: they come in no order."""
    attention = output.attention.detach()[:, :utterances]
    frames, tokens = output.steps[:, :utterances], speech.token_lengths[:, :utterances]
    return measure(attention.flatten(0, 1), frames.flatten(), tokens.flatten()).view(*attention.shape[:2], -1)
