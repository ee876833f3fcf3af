"""``tts-brain run -- ./run.sh --stage 7 …``: every ``espnet2.bin.tts_train`` started below it knows ``brain``.

A folder with a ``sitecustomize.py`` is put in front of PYTHONPATH, which every Python below inherits; that file hands
out ``tts_brain_espnet.tts_train`` to whoever asks for ``espnet2.bin.tts_train``. All else runs untouched.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from pathlib import Path

_EPILOG = "The training yaml needs 'brain: true'; this command alone steers nothing."


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``tts-brain run``: becomes the command, so its exit status and signals are the command's own."""
    parser = argparse.ArgumentParser(
        prog="tts-brain run", description="Run an ESPnet recipe with the brain understood.", epilog=_EPILOG
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command, such as: -- ./run.sh --stage 7")
    command = parser.parse_args(arguments).command
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        parser.error("no command; write for example: tts-brain run -- ./run.sh --stage 7 --stop_stage 7")
    if shutil.which(command[0]) is None:
        print(f"tts-brain run: {command[0]!r} is no command that can be run; give its path", file=sys.stderr)
        return 127
    os.environ["PYTHONPATH"] = os.pathsep.join([_startup_folder(), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.stdout.flush()
    try:
        return os.execvp(command[0], command)  # does not come back
    except OSError as error:
        remedy = "give it a first line such as #!/bin/sh, or write: tts-brain run -- sh " + command[0]
        why = f"{command[0]!r} cannot be run ({error.strerror})"
        print(f"tts-brain run: {why}" + (f"; {remedy}" if error.errno == errno.ENOEXEC else ""), file=sys.stderr)
        return 126


def _startup_folder() -> str:
    return str(Path(__file__).resolve().parent / "startup")
