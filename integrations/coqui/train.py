"""``tts-brain coqui-train``: Coqui's own training script, with the ``brain`` section understood.

tts-brain coqui-train --config_path config.json [--coqpit.brain.mode observe] [--continue_path RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tts_brain.corpus import CorpusError
from tts_brain_coqui.config import install, refuse_flags_without_effect, refuse_unknown_flags
from tts_brain_coqui.corpus import register

_GIVE = "give --config_path config.json, or --continue_path with the folder of a run"


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``tts-brain coqui-train``; takes what ``python -m TTS.bin.train_tts`` takes."""
    from TTS.bin.train_tts import main as host_main

    install()
    register()
    # The brain's flags are checked against sys.argv, as the host reads its own.
    sys.argv = ["tts-brain coqui-train", *(arguments or [])]
    try:
        _check(sys.argv[1:])
        host_main(sys.argv[1:])
    except (_Refused, CorpusError) as error:
        print(f"tts-brain coqui-train: {error}", file=sys.stderr)
        return 2
    return 0


class _Refused(Exception):
    """What stands in arguments or configuration and cannot be trained with."""


def _check(arguments: list[str]) -> None:
    """Read all as the host will, so that a slip of the pen is one line, and a fault of the training a traceback."""
    from TTS.bin.train_tts import TrainTTSArgs

    args, overrides = TrainTTSArgs().init_argparse(arg_prefix="").parse_known_args(arguments)
    path = args.config_path or (args.continue_path and str(Path(args.continue_path) / "config.json"))
    if not path:
        raise _Refused(f"no configuration; {_GIVE}")
    if "://" not in path and not Path(path).is_file():  # the host reads from remote places, too
        raise _Refused(f"{path} {'is a folder' if Path(path).is_dir() else 'is missing'}; {_GIVE}")
    try:
        config = _read(path, overrides)
        refuse_unknown_flags(arguments)
        brain = getattr(config, "brain", None)
        if brain is not None:
            refuse_flags_without_effect(arguments, brain)
        if brain is not None and brain.enabled and brain.mode != "off":
            brain.to_brain()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise _Refused(f"{path}: {kind}{' '.join(str(error).split())}") from error


def _read(path: str, overrides: list[str]) -> Any:
    from TTS.config import load_config

    config = load_config(path)
    if overrides:
        config.parse_known_args(overrides, relaxed_parser=True)
    return config
