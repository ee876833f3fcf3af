"""ESPnet's Trainer with the brain around it. The host's is a class that is never made an object of; so is this."""

from __future__ import annotations

import argparse
import logging
from typing import Any, ClassVar

import torch
from espnet2.train.trainer import Trainer, TrainerOptions

from tts_brain_espnet.adapter import EspnetAdapter
from tts_brain_espnet.settings import read_settings

log = logging.getLogger("tts_brain")


class BrainTrainer(Trainer):
    """Attaches the brain at ``run``, and shows it each epoch and a resume.

    Attributes:
        adapter: of the run under way; None between runs.
    """

    adapter: ClassVar[EspnetAdapter | None] = None

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> TrainerOptions:
        options = super().build_options(args)
        options.brain = read_settings(args)
        return options

    @classmethod
    def run(
        cls, *, model: torch.nn.Module, optimizers: Any, schedulers: Any, trainer_options: Any, **more: Any
    ) -> None:
        host = {"model": model, "optimizers": optimizers, "schedulers": schedulers, "trainer_options": trainer_options}
        distributed = more["distributed_option"]
        if trainer_options.ngpu > 1 and not distributed.distributed:
            log.warning(
                "[brain] off: %d GPUs in one process. Write multiprocessing_distributed: true", trainer_options.ngpu
            )
            super().run(**host, **more)
            return
        cls.adapter = EspnetAdapter(trainer_options.brain, model, optimizers, trainer_options)
        message = "finished"
        try:
            super().run(**host, **more)
        except BaseException as error:
            message = f"the run ended with {type(error).__name__}: {error}"
            raise
        finally:
            cls.adapter.close(message)
            cls.adapter = None

    @classmethod
    def resume(cls, *, reporter: Any, scaler: Any, **more: Any) -> None:
        super().resume(reporter=reporter, scaler=scaler, **more)
        if cls.adapter is not None:
            cls.adapter.resumed(reporter, scaler)

    @classmethod
    def train_one_epoch(cls, *, reporter: Any, scaler: Any, summary_writer: Any, **more: Any) -> bool:
        host = {"reporter": reporter, "scaler": scaler, "summary_writer": summary_writer}
        if cls.adapter is None:
            return super().train_one_epoch(**host, **more)
        with cls.adapter.epoch(reporter, scaler, summary_writer):
            return super().train_one_epoch(**host, **more)
