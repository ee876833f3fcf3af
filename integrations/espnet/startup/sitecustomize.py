"""Read at the start of every Python below ``tts-brain run``: ``espnet2.bin.tts_train`` becomes ours, nothing else.

Only the standard library is imported here, and of that what any Python has loaded already.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

_HOST = "espnet2.bin.tts_train"
_OURS = "tts_brain_espnet.tts_train"
_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib would cost every start


class _Door:
    """Hands out our training script under the host's name; ``python -m`` and ``import`` both ask here first."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _HOST:
            return None
        try:
            ours = find_spec(_OURS)
        except ImportError:
            ours = None
        if ours is None or ours.origin is None:
            raise ImportError(
                f"tts-brain run: {sys.executable} has no tts-brain. Install it in the environment that the recipe "
                "uses (its path.sh, or its option --python), or run the recipe without tts-brain run"
            )
        return spec_from_file_location(name, ours.origin)


def _read_the_next_one() -> None:
    """The sitecustomize that this one hides, if the machine has one."""
    others = [p for p in sys.path if os.path.abspath(p) != _HERE]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


sys.meta_path.insert(0, _Door())
_read_the_next_one()
