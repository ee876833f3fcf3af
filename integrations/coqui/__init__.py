"""tts-brain for Coqui-TTS: ``from tts_brain_coqui import Tacotron2Config`` and set ``brain=True``.

Names are loaded on first use, so that importing this package stays cheap and changes nothing in Coqui.
"""

from typing import Any

__all__ = ["BrainSection", "CoquiAdapter", "Tacotron2Config", "TacotronConfig", "attach", "detach", "install"]


def __getattr__(name: str) -> Any:
    if name in ("CoquiAdapter", "attach", "detach"):
        from tts_brain_coqui import adapter

        return getattr(adapter, name)
    if name in ("BrainSection", "install"):
        from tts_brain_coqui import config

        return getattr(config, name)
    if name in ("TacotronConfig", "Tacotron2Config"):
        from tts_brain_coqui.config import install

        return install()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
