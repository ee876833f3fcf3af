"""Two real processes of one run, each a script that is told its rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_both(script: str, *arguments: str, folder: Path, timeout_s: float) -> None:
    """Run ``script RANK ARGUMENTS`` for ranks 0 and 1 to their ends; what they print goes to ``folder/rankN.log``."""
    command = [sys.executable, str(Path(__file__).with_name(script))]
    logs = [folder / f"rank{rank}.log" for rank in (0, 1)]
    started = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    [*command, str(rank), *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
    try:
        codes = [process.wait(timeout_s) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
