"""Forty bad starts, each as data: what is wrong, its true cause, and how a run gets it.

Fractions are of the run's steps, weights in the host's units. "(m)" happens in mid-run. Held-out clips stay clean.

| start | what is wrong | true cause |
|---|---|---|
| rate-x0.03, rate-x0.1 | the arm's rate times 0.03, 0.1 | rate too low |
| rate-x3, rate-x10, rate-x30 | the arm's rate times 3, 10, 30 | rate too high |
| rate-spike | (m) rate times 30 for a twentieth of the run, then as before | rate too high |
| guided-0 | no guidance | guidance off |
| guided-1, guided-10 | the host's default, which never aligned on real speech; ten times it | guidance too weak |
| guided-1000 | the guide outshouts the spectrogram | guidance too strong |
| batch-4, batch-2 | batches of 4, of 2 clips | batch too small |
| silence-0.5s, silence-1s | that much room noise at both ends of each clip | edge silence |
| silence-ragged | 0 to 1.5 s of it at each end, drawn for each clip | edge silence |
| silence-tail | 1 s of it behind each clip: the attention waits on the last token | edge silence |
| transcripts-10, transcripts-30 | that many per cent of the texts permuted among their clips | wrong transcripts |
| transcripts-slipped | from the middle of the list on, each clip has the next one's text | wrong transcripts |
| nan-once | one batch with 0.1 s of NaN, at a quarter of the run | non-finite data |
| nan-every-50 | such a batch at every 50th step | non-finite data |
| nan-clip | a clip with 0.1 s of NaN, which comes back in each pass | non-finite data |
| nan-burst | (m) 20 such batches in a row | non-finite data |
| exploding-once | one batch with its features times 1000, at a third of the run | exploding batch |
| exploding-clip | a clip with features times 1000, which comes back in each pass | exploding batch |
| exploding-gradient | no clipping, one gradient times 1e6 at a third: Adam's moments are spoilt | exploding batch |
| stop-inverted | stop labels inverted: go on means stop | stop token |
| stop-early | the stop label at 70 % of each clip | stop token |
| stop-padding | padded frames counted as speech: the stop label at the end of the batch | stop token |
| r-1 | one mel frame per decoder step: teacher forcing leaks | reduction factor |
| fp16-overflow | float16 gradients, a loss scale that grows too fast: every other step overflows | half precision |
| fp16-pure | weights and Adam's moments rounded to float16 after each step | half precision |
| attention-reset | (m) the attention's weights drawn anew | alignment lost |
| attention-flat | (m) the energy vector set to 0: attention is uniform | alignment lost |
| query-shuffled | (m) the rows of the attention's query projection permuted | alignment lost |
| texts-shuffled | (m) a tenth of the run with texts permuted within each batch | alignment lost |
| batch-4+r-1 | both: a small card, and the paper's r | batch too small, reduction factor |
| silence-1s+transcripts-10 | both: a corpus as it was found | edge silence, wrong transcripts |
| rate-x10+guided-0 | both | rate too high, guidance off |
| rate-x10+fp16-overflow | both | rate too high, half precision |

There is no start with the corpora's own edge silence: cut at 40 dB below the loudest, they have next to none (kathleen
0.01 s in front and 0.00 s behind, LJSpeech 0.00 and 0.04 s, means of 25 clips), so that it would be a clean run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.data import HOP_S, Batch, Clip, Corpus
from bench.host import Training
from bench.setting import Setting
from bench.told import named

Spoil = Callable[[int, Batch], Batch]

# Quantile of each band over the frames that counts as room noise, and its spread from frame to frame, log-10 units.
_ROOM_QUANTILE = 0.02
_ROOM_SPREAD = 0.1


@dataclass(frozen=True)
class Change:
    """One thing that is wrong. What a kind does not touch is given back as it came."""

    def setting(self, setting: Setting) -> Setting:
        return setting

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        """Only the training clips may differ."""
        return corpus

    def arm(self, arm: Any) -> Any:
        """An arm that brings its own rate or guided weight would else cover up the bad one."""
        return arm

    def begin(self, run: Training) -> Spoil | None:
        """Hook what must be hooked; what is returned sees each training batch before the model does."""
        return None


@dataclass(frozen=True)
class RateTimes(Change):
    factor: float

    def setting(self, setting: Setting) -> Setting:
        return replace(setting, rate=setting.rate * self.factor)

    def arm(self, arm: Any) -> Any:
        own = getattr(arm, "rate", None)
        return arm if own is None else replace(arm, rate=own * self.factor)


@dataclass(frozen=True)
class RateSpike(Change):
    """Times ``factor`` from the middle on, for a twentieth of the run."""

    factor: float

    def begin(self, run: Training) -> Spoil:
        stretch = _stretch(run, 0.05)
        held: list[tuple[float, float]] = []  # (as it was, as written) of each group

        def spoil(step: int, batch: Batch) -> Batch:
            groups = run.optimizer.param_groups
            if step in stretch:
                # An arm that writes the rate at each step is not compounded, one that leaves it alone neither.
                before = [
                    (was if group["lr"] == wrote else group["lr"])
                    for group, (was, wrote) in zip(groups, held or [(0.0, math.nan)] * len(groups), strict=True)
                ]
                held[:] = [(was, was * self.factor) for was in before]
                for group, (_, spiked) in zip(groups, held, strict=True):
                    group["lr"] = spiked
            elif held:
                for group, (was, wrote) in zip(groups, held, strict=True):
                    group["lr"] = was if group["lr"] == wrote else group["lr"]
                held.clear()
            return batch

        return spoil


@dataclass(frozen=True)
class Guided(Change):
    weight: float

    def arm(self, arm: Any) -> Any:
        return replace(arm, guided=self.weight) if hasattr(arm, "guided") else arm

    def begin(self, run: Training) -> None:
        run.tts.attn_loss.alpha = self.weight


@dataclass(frozen=True)
class Sizes(Change):
    """Fields of the setting."""

    batch_size: int | None = None
    reduction_factor: int | None = None

    def setting(self, setting: Setting) -> Setting:
        return replace(setting, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class EdgeSilence(Change):
    """Frames of room noise, as quiet as the corpus gets; each end has its (least, most) seconds."""

    head_s: tuple[float, float]
    tail_s: tuple[float, float]

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        some = np.concatenate([clip.mel for clip in corpus.train[:: max(1, len(corpus.train) // 100)]])
        level, spread = np.quantile(some, _ROOM_QUANTILE, axis=0), _ROOM_SPREAD / corpus.std

        def padded(number: int, clip: Clip) -> Clip:
            draw = np.random.default_rng((seed, 1, number))
            head, tail = (
                draw.normal(level, spread, (round(draw.uniform(*ends) / HOP_S), len(level))).astype(np.float32)
                for ends in (self.head_s, self.tail_s)
            )
            return replace(clip, mel=np.concatenate([head, clip.mel, tail]))

        return replace(corpus, train=[padded(*pair) for pair in enumerate(corpus.train)])


@dataclass(frozen=True)
class Permuted(Change):
    """A share of the texts: each of the clips drawn has another one's."""

    share: float

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        count = max(2, round(self.share * len(corpus.train)))
        drawn = np.random.default_rng((seed, 2)).choice(len(corpus.train), count, replace=False)
        return _with_texts(corpus, dict(zip(drawn.tolist(), np.roll(drawn, 1).tolist(), strict=True)))


@dataclass(frozen=True)
class Slipped(Change):
    """A line was lost in the middle of the list of texts: the last clip has the text of the middle one."""

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        later = list(range(len(corpus.train) // 2, len(corpus.train)))
        return _with_texts(corpus, dict(zip(later, [*later[1:], later[0]], strict=True)))


@dataclass(frozen=True)
class OneClip(Change):
    """Spoils one clip of middling length: the longest do not come in each pass."""

    make: Callable[[np.ndarray], np.ndarray]

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        order = sorted(range(len(corpus.train)), key=lambda n: len(corpus.train[n].mel))
        third = len(order) // 3
        chosen = int(np.random.default_rng((seed, 3)).choice(order[third : len(order) - third]))
        return replace(
            corpus, train=[replace(c, mel=self.make(c.mel)) if n == chosen else c for n, c in enumerate(corpus.train)]
        )


@dataclass(frozen=True)
class Batches(Change):
    """Spoils whole batches.

    Args:
        when: (step, steps of the run).
        make: (step, seed, tensors of the batch) to the tensors that are different.
    """

    when: Callable[[int, int], bool]
    make: Callable[[int, int, Mapping[str, Tensor]], dict[str, Tensor]]

    def begin(self, run: Training) -> Spoil:
        def spoil(step: int, batch: Batch) -> Batch:
            if not self.when(step, run.setting.steps):
                return batch
            names, tensors = batch
            return names, {**tensors, **self.make(step, run.seed, tensors)}

        return spoil


@dataclass(frozen=True)
class ExplodingGradient(Change):
    """Without clipping: a clipped gradient of any size is one ordinary step."""

    factor: float

    def setting(self, setting: Setting) -> Setting:
        return replace(setting, clip=1e12)

    def begin(self, run: Training) -> Spoil:
        now = {"factor": 1.0}

        def grow(parameter: Tensor) -> None:
            if now["factor"] != 1.0:
                parameter.grad.mul_(now["factor"])

        _hook_gradients(run, grow)

        def spoil(step: int, batch: Batch) -> Batch:
            now["factor"] = self.factor if step == run.setting.steps // 3 else 1.0
            return batch

        return spoil


@dataclass(frozen=True)
class StopLabels(Change):
    """On the loss itself, as the host makes the labels from the lengths.

    Args:
        make: (labels (B, T), frames (B,)) to labels.
    """

    make: Callable[[Tensor, Tensor], Tensor]

    def begin(self, run: Training) -> None:
        def wrong(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            *before, labels, frames = inputs
            return (*before, self.make(labels, frames), frames)

        run.tts.taco2_loss.register_forward_pre_hook(wrong)


@dataclass(frozen=True)
class HalfGradients(Change):
    """Gradients as float16 holds them; the loss scale is doubled after each good step and halved after a bad one.

    Too large becomes infinite, and the host skips the step. At a fixed scale it would hang on the guided weight
    whether no step overflows or all do.
    """

    first_scale: float = 2.0**16

    def begin(self, run: Training) -> Spoil:
        now = {"scale": self.first_scale, "bad": None}

        def halve(parameter: Tensor) -> None:
            grad = parameter.grad
            grad.copy_((grad * now["scale"]).half().float() / now["scale"])
            now["bad"] = bool(now["bad"]) or not bool(grad.isfinite().all())

        _hook_gradients(run, halve)

        def spoil(step: int, batch: Batch) -> Batch:
            if now["bad"] is not None:
                now["scale"] *= 0.5 if now["bad"] else 2.0
                now["bad"] = None
            return batch

        return spoil


@dataclass(frozen=True)
class HalfWeights(Change):
    """Weights and Adam's moments as float16 would hold them; a squared gradient under 6e-8 is 0 there."""

    def begin(self, run: Training) -> None:
        def halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        moments = [v for v in optimizer.state[parameter].values() if v.shape == parameter.shape]
                        for tensor in (parameter, *moments):
                            tensor.copy_(tensor.half().float())

        run.optimizer.register_step_post_hook(halve)


@dataclass(frozen=True)
class AttentionHurt(Change):
    """In mid-run. ``make``: changes the attention module in place; the random state is its own."""

    make: Callable[[torch.nn.Module], None]

    def begin(self, run: Training) -> Spoil:
        def spoil(step: int, batch: Batch) -> Batch:
            if step == run.setting.steps // 2:
                devices = [] if run.device == "cpu" else [run.device]
                with torch.random.fork_rng(devices), torch.no_grad():
                    torch.manual_seed(run.seed)
                    self.make(run.tts.dec.att)
            return batch

        return spoil


@dataclass(frozen=True)
class BadStart:
    """One start that is to be rescued. Use all four: ``setting``, ``corpus``, ``arm``, then ``begin`` on the new run.

    Args:
        what: for people, one line.
        causes: from ``told.CAUSES``; two for a combination.
    """

    name: str
    what: str
    causes: tuple[str, ...]
    changes: tuple[Change, ...]

    def setting(self, setting: Setting) -> Setting:
        for change in self.changes:
            setting = change.setting(setting)
        return setting

    def corpus(self, corpus: Corpus, seed: int) -> Corpus:
        for change in self.changes:
            corpus = change.corpus(corpus, seed)
        return corpus

    def arm(self, arm: Any) -> Any:
        for change in self.changes:
            arm = change.arm(arm)
        return arm

    def begin(self, run: Training) -> None:
        """Before ``run.run``; every arm gets the same hooks."""
        spoilers = [s for s in (change.begin(run) for change in self.changes) if s is not None]

        def spoil(step: int, batch: Batch) -> Batch:
            for one in spoilers:
                batch = one(step, batch)
            return batch

        if spoilers:
            run.spoil = spoil

    def told(self, journal: Path | Iterable[Mapping[str, Any]]) -> bool:
        """Was the user told all that is wrong?"""
        return set(self.causes) <= named(journal)


def _stretch(run: Training, share: float) -> range:
    """From the middle on, at least one step."""
    half = run.setting.steps // 2
    return range(half, half + max(1, round(share * run.setting.steps)))


def _with_texts(corpus: Corpus, source: Mapping[int, int]) -> Corpus:
    clips = corpus.train
    return replace(
        corpus, train=[replace(c, text=clips[source[n]].text) if n in source else c for n, c in enumerate(clips)]
    )


def _hook_gradients(run: Training, change: Callable[[Tensor], None]) -> None:
    """On each parameter as soon as its gradient is there: before the host looks at the norm and clips."""
    for parameter in run.model.parameters():
        parameter.register_post_accumulate_grad_hook(change)


def _middle(frames: int) -> slice:
    """A tenth of a second: the decoder is fed but each r-th frame."""
    return slice(frames // 2, frames // 2 + round(0.1 / HOP_S))


def _nan_mel(mel: np.ndarray) -> np.ndarray:
    spoilt = mel.copy()
    spoilt[_middle(len(mel))] = np.nan
    return spoilt


def _nan_batch(step: int, seed: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    speech = tensors["speech"].clone()
    speech[0, _middle(int(tensors["speech_lengths"][0]))] = math.nan
    return {"speech": speech}


def _huge_batch(step: int, seed: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"speech": tensors["speech"] * 1000.0}


def _padding_as_speech(step: int, seed: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lengths = tensors["speech_lengths"]
    return {"speech_lengths": torch.full_like(lengths, int(lengths.max()))}


def _texts_shuffled(step: int, seed: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Speech is moved, not text: the host's encoder wants the longest text first."""
    count = len(tensors["speech"])
    by = 1 + int(np.random.default_rng((seed, 4, step)).integers(max(1, count - 1)))
    return {name: tensors[name].roll(by, 0) for name in ("speech", "speech_lengths")}


def _stop_early(labels: Tensor, frames: Tensor) -> Tensor:
    """1 from 70 % of each clip on."""
    position = torch.arange(labels.shape[1], device=labels.device)
    return (position >= (0.7 * frames).long().unsqueeze(1)).to(labels.dtype)


def _anew(attention: torch.nn.Module) -> None:
    for module in attention.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def _flat(attention: torch.nn.Module) -> None:
    attention.gvec.weight.zero_()


def _query_shuffled(attention: torch.nn.Module) -> None:
    weight = attention.mlp_dec.weight
    weight.copy_(weight[torch.randperm(len(weight))])


def _at(share: float) -> Callable[[int, int], bool]:
    return lambda step, steps: step == int(share * steps)


_SILENCE_1S = EdgeSilence((1.0, 1.0), (1.0, 1.0))
_OVERFLOW = HalfGradients()
_HIGH, _LOW = ("rate too high",), ("rate too low",)
_EDGE, _TEXTS = ("edge silence",), ("wrong transcripts",)
_DATA, _EXPLODING, _STOP = ("non-finite data",), ("exploding batch",), ("stop token",)
_HALF, _LOST = ("half precision",), ("alignment lost",)

BAD_STARTS: Mapping[str, BadStart] = MappingProxyType(
    {
        start.name: start
        for start in (
            BadStart("rate-x0.03", "rate times 0.03", _LOW, (RateTimes(0.03),)),
            BadStart("rate-x0.1", "rate times 0.1", _LOW, (RateTimes(0.1),)),
            BadStart("rate-x3", "rate times 3", _HIGH, (RateTimes(3.0),)),
            BadStart("rate-x10", "rate times 10", _HIGH, (RateTimes(10.0),)),
            BadStart("rate-x30", "rate times 30", _HIGH, (RateTimes(30.0),)),
            BadStart("rate-spike", "rate times 30 for a twentieth of the run", _HIGH, (RateSpike(30.0),)),
            BadStart("guided-0", "no guidance", ("guidance off",), (Guided(0.0),)),
            BadStart("guided-1", "guided weight 1", ("guidance too weak",), (Guided(1.0),)),
            BadStart("guided-10", "guided weight 10", ("guidance too weak",), (Guided(10.0),)),
            BadStart("guided-1000", "guided weight 1000", ("guidance too strong",), (Guided(1000.0),)),
            BadStart("batch-4", "batches of 4", ("batch too small",), (Sizes(batch_size=4),)),
            BadStart("batch-2", "batches of 2", ("batch too small",), (Sizes(batch_size=2),)),
            BadStart("silence-0.5s", "0.5 s at both ends", _EDGE, (EdgeSilence((0.5, 0.5), (0.5, 0.5)),)),
            BadStart("silence-1s", "1 s at both ends", _EDGE, (_SILENCE_1S,)),
            BadStart("silence-ragged", "0 to 1.5 s at each end", _EDGE, (EdgeSilence((0.0, 1.5), (0.0, 1.5)),)),
            BadStart("silence-tail", "1 s behind each clip", _EDGE, (EdgeSilence((0.0, 0.0), (1.0, 1.0)),)),
            BadStart("transcripts-10", "10 % of the texts permuted", _TEXTS, (Permuted(0.1),)),
            BadStart("transcripts-30", "30 % of the texts permuted", _TEXTS, (Permuted(0.3),)),
            BadStart("transcripts-slipped", "half of the texts off by one clip", _TEXTS, (Slipped(),)),
            BadStart("nan-once", "one NaN batch", _DATA, (Batches(_at(0.25), _nan_batch),)),
            BadStart("nan-every-50", "every 50th batch NaN", _DATA, (Batches(lambda s, n: s % 50 == 49, _nan_batch),)),
            BadStart("nan-clip", "a NaN clip in each pass", _DATA, (OneClip(_nan_mel),)),
            BadStart(
                "nan-burst", "20 NaN batches in a row", _DATA, (Batches(lambda s, n: 0 <= s - n // 2 < 20, _nan_batch),)
            ),
            BadStart("exploding-once", "one batch times 1000", _EXPLODING, (Batches(_at(1 / 3), _huge_batch),)),
            BadStart("exploding-clip", "a clip times 1000 in each pass", _EXPLODING, (OneClip(lambda m: m * 1000.0),)),
            BadStart("exploding-gradient", "one unclipped gradient times 1e6", _EXPLODING, (ExplodingGradient(1e6),)),
            BadStart(
                "stop-inverted", "stop labels inverted", _STOP, (StopLabels(lambda labels, frames: 1.0 - labels),)
            ),
            BadStart("stop-early", "stop label at 70 %", _STOP, (StopLabels(_stop_early),)),
            BadStart(
                "stop-padding", "padding counted as speech", _STOP, (Batches(lambda s, n: True, _padding_as_speech),)
            ),
            BadStart("r-1", "one frame per decoder step", ("reduction factor",), (Sizes(reduction_factor=1),)),
            BadStart("fp16-overflow", "float16 gradients that overflow", _HALF, (_OVERFLOW,)),
            BadStart("fp16-pure", "float16 weights and moments", _HALF, (HalfWeights(),)),
            BadStart("attention-reset", "attention drawn anew in mid-run", _LOST, (AttentionHurt(_anew),)),
            BadStart("attention-flat", "attention uniform in mid-run", _LOST, (AttentionHurt(_flat),)),
            BadStart(
                "query-shuffled", "query projection permuted in mid-run", _LOST, (AttentionHurt(_query_shuffled),)
            ),
            BadStart(
                "texts-shuffled",
                "a tenth of the run with permuted texts",
                _LOST,
                (Batches(lambda s, n: 0 <= s - n // 2 < max(1, n // 10), _texts_shuffled),),
            ),
            BadStart(
                "batch-4+r-1",
                "batches of 4 and r = 1",
                ("batch too small", "reduction factor"),
                (Sizes(batch_size=4, reduction_factor=1),),
            ),
            BadStart(
                "silence-1s+transcripts-10",
                "1 s at both ends, 10 % of the texts permuted",
                (*_EDGE, *_TEXTS),
                (_SILENCE_1S, Permuted(0.1)),
            ),
            BadStart(
                "rate-x10+guided-0",
                "rate times 10, no guidance",
                (*_HIGH, "guidance off"),
                (RateTimes(10.0), Guided(0.0)),
            ),
            BadStart(
                "rate-x10+fp16-overflow",
                "rate times 10, float16 gradients that overflow",
                (*_HIGH, *_HALF),
                (RateTimes(10.0), _OVERFLOW),
            ),
        )
    }
)
