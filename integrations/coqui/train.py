"""``tts-brain coqui-train``: Coqui's own training script, with the ``brain`` section understood.

tts-brain coqui-train --config_path config.json [--coqpit.brain.mode observe] [--continue_path RUN]
"""

from __future__ import annotations

import sys

from tts_brain_coqui.config import install
from tts_brain_coqui.corpus import register


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``tts-brain coqui-train``; takes what ``python -m TTS.bin.train_tts`` takes."""
    from TTS.bin.train_tts import main as host_main

    install()
    register()
    # The brain's flags are checked against sys.argv, as the host reads its own.
    sys.argv = ["tts-brain coqui-train", *(arguments or [])]
    host_main(sys.argv[1:])
    return 0
