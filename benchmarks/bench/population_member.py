"""One member of a population: a training that can be paused, copied and given other settings."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed

from bench.arms import Plain
from bench.data import Batch, Clip, Corpus, batches, collate
from bench.host import Measured, Training
from bench.setting import Setting
from tts_brain_espnet.probe import Probe

INTERVAL = 50
_VALIDATION = 16


def split(corpus: Corpus, count: int = _VALIDATION) -> tuple[Corpus, list[Clip]]:
    """The corpus with fewer clips to train on, and those taken out, which the population is chosen by.

    The held-out clips that are reported must stay unseen, and the loss of the training clips would favour the
    member that learns them by heart. At most a tenth is taken.
    """
    key = {clip.name: hashlib.sha256(f"validation {clip.name}".encode()).hexdigest() for clip in corpus.train}
    order = sorted(corpus.train, key=lambda clip: key[clip.name])
    count = max(1, min(count, len(order) // 10))
    taken = {clip.name for clip in order[:count]}
    return replace(corpus, train=[c for c in corpus.train if c.name not in taken]), order[:count]


class Member:
    """One training that can be paused, copied and given other settings.

    All members see the same batches in the same order; the first has the initial weights that the other arms have,
    the rest their own, as in the paper.
    """

    def __init__(
        self,
        corpus: Corpus,
        validation: list[Clip],
        setting: Setting,
        seed: int,
        number: int,
        folder: Path,
        model_conf: Mapping[str, Any] | None = None,
    ) -> None:
        self.setting, self.seed, self.corpus = setting, seed, corpus
        self.training = Training(corpus, setting, seed + 1000 * number, folder, model_conf)
        set_all_random_seed(self.training.seed)
        self._held_out = Probe(_collated(corpus.held_out))
        self._validation = Probe(_collated(validation))
        self._source: Iterator[Batch] = batches(corpus.train, setting.batch_size, seed)

    def advance(self, guided: float, rate: float, steps: int = INTERVAL) -> float:
        """Train on with these settings, to the end of the run at most; returns the validation loss."""
        training, setting = self.training, self.setting
        arm = Plain(guided=guided, rate=rate)
        arm.attach(training)
        end = min(len(training.trace) + steps, setting.steps)
        while (step := len(training.trace)) < end:
            # The looks come where they come in the other arms.
            count = min(setting.evaluate_every - step % setting.evaluate_every, end - step)
            training._train(arm, list(islice(self._source, count)), step)
            step += count
            if step % setting.evaluate_every == 0 or step == setting.steps:
                training.measured.append(training._measure(self._held_out, step))
        loss = self._validation.held_out(training.model).l1
        return loss if math.isfinite(loss) else 1e9

    @property
    def finished(self) -> bool:
        return len(self.training.trace) >= self.setting.steps

    def state(self) -> dict[str, Any]:
        training = self.training
        return {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "random": (torch.get_rng_state(), np.random.get_state(), random.getstate()),
            "trace": [dict(row) for row in training.trace],
            "measured": [asdict(measured) for measured in training.measured],
            "seconds": training.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        training = self.training
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.trace = [dict(row) for row in state["trace"]]
        training.measured = [Measured(**row) for row in state["measured"]]
        training.seconds = state["seconds"]
        source = batches(self.corpus.train, self.setting.batch_size, self.seed)
        self._source = islice(source, len(training.trace), None)
        torch_state, numpy_state, python_state = state["random"]
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _collated(clips: list[Clip]) -> list[dict[str, torch.Tensor]]:
    return [collate(clips[i : i + 16])[1] for i in range(0, len(clips), 16)]
