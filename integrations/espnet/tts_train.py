"""``python -m tts_brain_espnet.tts_train``: a drop-in for ``python -m espnet2.bin.tts_train`` that knows ``brain``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tts_brain_espnet.task import BrainTTSTask


def get_parser() -> Any:
    """The host's parser with ``--brain`` and ``--brain_conf``."""
    return BrainTTSTask.get_parser()


def main(cmd: Sequence[str] | None = None) -> None:
    """What ``espnet2.bin.tts_train.main`` does."""
    BrainTTSTask.main(cmd=cmd)


if __name__ == "__main__":
    main()
