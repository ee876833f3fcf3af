"""ESPnet's text-to-speech task with the keys ``brain`` and ``brain_conf``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from espnet2.tasks.tts import TTSTask
from espnet2.train.trainer import Trainer

from tts_brain.config import BrainConfig
from tts_brain_espnet.settings import add_arguments, is_set_for_nothing, read_settings

log = logging.getLogger("tts_brain")


class BrainTTSTask(TTSTask):
    """``TTSTask``, and with ``brain: true`` the brain on its Trainer. Without it, ``TTSTask`` to the letter.

    The host starts the processes of a multi-GPU run with this class's ``main_worker``, so they find it by themselves.
    """

    @classmethod
    def get_parser(cls) -> Any:
        parser = super().get_parser()
        add_arguments(parser)
        return parser

    @classmethod
    def get_default_config(cls) -> dict[str, Any]:
        """For ``--print_config``."""
        return {**super().get_default_config(), "brain_conf": BrainConfig().to_dict()}

    @classmethod
    def main(cls, args: argparse.Namespace | None = None, cmd: Sequence[str] | None = None) -> None:
        if args is None:
            parser = cls.get_parser()
            args = parser.parse_args(cmd)
            try:
                read_settings(args)
            except ValueError as error:
                parser.error(str(error))
        super().main(args=args)

    @classmethod
    def main_worker(cls, args: argparse.Namespace) -> None:
        cls.trainer = Trainer
        if is_set_for_nothing(args):
            log.warning("[brain] brain_conf is given, but no brain: write brain: true, or leave brain_conf out")
        if read_settings(args) is not None and not args.collect_stats:
            # Not earlier: statistics, and a run without the brain, need not wait for its libraries.
            from tts_brain_espnet.trainer import BrainTrainer

            cls.trainer = BrainTrainer
        super().main_worker(args)
