"""What the commands are given, looked at before any work is done."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def whole_number(low: int, example: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers of ``low`` or more."""

    def read(text: str) -> int:
        # int() reads "1_000" and Arabic digits too, and refuses what isdigit() takes, such as "²".
        if not (text.isascii() and text.removeprefix("-").isdigit()) or int(text) < low:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of {low} or more; write for example {example}"
            )
        return int(text)

    return read


def ready_for(path: Path) -> None:
    """Make the folder of a file that is written when all is done, and see that it can be.

    Raises:
        OSError: it cannot.
    """
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}); give a file, such as figures.json") from error
    if not there:
        path.unlink()
