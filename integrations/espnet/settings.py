"""The keys ``brain`` and ``brain_conf`` of ESPnet's training yaml and command line."""

from __future__ import annotations

import argparse

from espnet2.utils.nested_dict_action import NestedDictAction
from espnet2.utils.types import str2bool

from tts_brain.config import BrainConfig

_NO_FLAG = "brain: {!r} is neither true nor false; write 'brain: true', and a mode as 'brain_conf: {{mode: observe}}'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add both keys to ESPnet's parser, which reads yaml and command line alike."""
    group = parser.add_argument_group("tts-brain related")
    group.add_argument(
        "--brain",
        type=_flag,
        default=False,
        help="Let tts-brain steer the training: guided attention, loss weights, learning rate, rollback",
    )
    group.add_argument(
        "--brain_conf",
        action=NestedDictAction,
        default={},
        help="Settings of tts-brain, such as mode=observe. All with defaults: " + _all_settings(),
    )


def read_settings(args: argparse.Namespace) -> BrainConfig | None:
    """The brain's settings, None when it is not wanted.

    Raises:
        ValueError: a key that is not known, a value out of its range, or a ``brain`` that is neither true nor false.
    """
    brain, conf = getattr(args, "brain", False), getattr(args, "brain_conf", None) or {}
    if not isinstance(brain, bool):
        raise ValueError(_NO_FLAG.format(brain))
    if not isinstance(conf, dict):
        raise ValueError(f"brain_conf: {conf!r} is no mapping; write 'brain_conf: {{mode: observe}}'")
    # Read in any case: a misspelt key must not wait for the day somebody sets brain: true.
    config = BrainConfig.from_dict(conf)
    if not brain or config.mode == "off":
        return None
    if getattr(args, "use_deepspeed", False):
        raise ValueError("brain: true does not go with use_deepspeed: true; write one of them as false")
    return config


def is_set_for_nothing(args: argparse.Namespace) -> bool:
    """Settings of a brain that is not switched on, which somebody must have meant: not off, nor all the defaults."""
    conf = getattr(args, "brain_conf", None) or {}
    return not args.brain and bool(conf) and conf != BrainConfig().to_dict() and conf.get("mode") != "off"


def _flag(text: str) -> bool:
    try:
        return str2bool(text)
    except ValueError:
        raise argparse.ArgumentTypeError(_NO_FLAG.format(text)) from None


def _all_settings() -> str:
    return ", ".join(f"{name}={value}" for name, value in BrainConfig().to_dict().items())
