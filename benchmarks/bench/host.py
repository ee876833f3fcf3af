"""ESPnet's real Tacotron2 and the real loop of its Trainer, a few steps at a time, with an arm at the controls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from espnet2.tasks.tts import TTSTask
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import Trainer
from espnet2.tts.espnet_model import ESPnetTTSModel
from espnet2.tts.tacotron2 import Tacotron2

from bench.data import N_MELS, Batch, Clip, Corpus, batches, collate
from bench.quick_decoder import quicken
from bench.setting import MODELS, Setting
from bench.speech import distortion, liveliness
from tts_brain_espnet.probe import Probe


class Arm(Protocol):
    """One way of training. ``attach`` is called once; ``step`` before each optimizer step, from 0."""

    def attach(self, run: Training) -> None: ...

    def step(self, run: Training, step: int) -> None: ...

    @contextmanager
    def epoch(self, run: Training, reporter: Any) -> Iterator[None]: ...

    def detach(self, run: Training) -> None: ...


@dataclass
class Measured:
    """One look at the held-out clips."""

    step: int
    seconds: float
    l1: float
    l1_postnet: float
    values: dict[str, float]
    speaks: float | None = None
    mcd: float | None = None
    liveliness: float | None = None


@dataclass
class Training:
    """One run under way: what an arm may read and turn.

    Args:
        folder: scratch space.
        model_conf: sizes of the Tacotron2 in place of the setting's.
        trace: one dictionary per step: raw losses in the host's weights, gradient norm, and the rate and guided weight
            that were used.
        spoil: changes a training batch before the model sees it (step, batch).
        device: ``cpu`` or ``cuda``; the weights are drawn on the processor, the same on both.
        rate_multiplier, guided_weight: what an arm turns beside the host's own rate and weight, for the trace; the
            weight in whatever unit, as only its moves are counted.
    """

    corpus: Corpus
    setting: Setting
    seed: int
    folder: Path
    model_conf: Mapping[str, Any] | None = None
    model: ESPnetTTSModel = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    options: Any = field(init=False)
    trace: list[dict[str, float]] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    spoil: Callable[[int, Batch], Batch] | None = None
    device: str = "cpu"
    rate_multiplier: float = 1.0
    guided_weight: float | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        set_all_random_seed(self.seed)
        sizes = MODELS[self.setting.model] if self.model_conf is None else self.model_conf
        tts = Tacotron2(
            idim=len(self.corpus.tokens), odim=N_MELS, reduction_factor=self.setting.reduction_factor, **sizes
        )
        if self.setting.quick:
            quicken(tts)
        self.model = ESPnetTTSModel(None, None, None, None, None, None, tts).to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.setting.rate, eps=1e-6)
        host = TTSTask.get_parser().parse_args(["--output_dir", str(self.folder), "--log_interval", str(10**9)])
        host.grad_clip = self.setting.clip
        host.ngpu = int(self.device != "cpu")
        self.options = Trainer.build_options(host)

    @property
    def tts(self) -> Tacotron2:
        return self.model.tts

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def run(self, arm: Arm, progress: Callable[[int, Measured | None], None]) -> None:
        """Train to the end. Seconds are of one core, and of the training alone, not the measuring."""
        setting = self.setting
        probe = self._probe(*(self.corpus.held_out[i : i + 16] for i in range(0, setting.held_out, 16)))
        source = batches(self.corpus.train, setting.batch_size, self.seed)
        arm.attach(self)
        set_all_random_seed(self.seed)
        try:
            step = 0
            while step < setting.steps:
                count = min(setting.evaluate_every, setting.steps - step)
                self._train(arm, list(islice(source, count)), step)
                step += count
                measured = self._measure(probe, step)
                self.measured.append(measured)
                progress(step, measured)
        finally:
            arm.detach(self)

    def _train(self, arm: Arm, some: list[Batch], first: int) -> None:
        reporter = Reporter(1).start_epoch("train")
        start = time.process_time()
        with arm.epoch(self, reporter):
            Trainer.train_one_epoch(
                model=self.model,
                iterator=_Feed(self, arm, some, first),
                optimizers=[self.optimizer],
                schedulers=[None],
                scaler=None,
                reporter=reporter,
                summary_writer=None,
                options=self.options,
                distributed_option=DistributedOption(),
            )
        self.seconds += time.process_time() - start
        for row, number in zip(self.trace[first:], range(len(some)), strict=True):
            for name in ("loss", "l1_loss", "mse_loss", "bce_loss", "attn_loss", "grad_norm"):
                values = reporter.stats.get(name, [])
                row[name] = float(values[number].value) if number < len(values) else math.nan

    def _measure(self, probe: Probe, step: int) -> Measured:
        held_out = probe.held_out(self.model)
        measured = Measured(step, self.seconds, held_out.l1, held_out.l1_postnet, held_out.values)
        if step % self.setting.speak_every == 0 or step == self.setting.steps:
            last = step == self.setting.steps
            clips = self.corpus.held_out if last else self.corpus.held_out[: self.setting.speak_clips]
            measured.speaks, measured.mcd, measured.liveliness = self._speak(clips)
        return measured

    def _probe(self, *groups: list[Clip]) -> Probe:
        made = (collate(group)[1] for group in groups)
        return Probe([{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in made])

    def _speak(self, clips: list[Clip]) -> tuple[float, float, float]:
        spoken = [next(iter(self._probe([clip]).speak(self.model))) for clip in clips]
        std, mean = self.corpus.std, self.corpus.mean
        pairs = [(s.mel * std + mean, c.mel * std + mean) for s, c in zip(spoken, clips, strict=True)]
        found = [(s.speaks, distortion(*pair), liveliness(*pair)) for s, pair in zip(spoken, pairs, strict=True)]
        speaks, mcd, lively = np.mean(found, axis=0).tolist()
        return speaks, mcd, lively


class _Feed:
    """The batches of one stretch; before each is handed out, the arm turns what it turns."""

    def __init__(self, run: Training, arm: Arm, some: list[Batch], first: int) -> None:
        self._run, self._arm, self._some, self._first = run, arm, some, first

    def __len__(self) -> int:
        return len(self._some)

    def __iter__(self) -> Iterator[Batch]:
        run = self._run
        for number, (names, batch) in enumerate(self._some, start=self._first):
            self._arm.step(run, number)
            guided = run.tts.attn_loss.alpha if run.guided_weight is None else run.guided_weight
            rate = run.optimizer.param_groups[0]["lr"] * run.rate_multiplier
            run.trace.append({"used_rate": rate, "used_guided": guided})
            pair = (names, dict(batch))
            yield pair if run.spoil is None else run.spoil(number, pair)
