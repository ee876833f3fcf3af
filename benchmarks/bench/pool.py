"""Runs cells in processes of their own, a few at a time, with live progress."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.store import Cell, Store

_RUN = Path(__file__).parents[1] / "run.py"


def run_missing(
    cells: Sequence[Cell], store: Store, jobs: int, job_of: Callable[[Cell], Mapping[str, Any]], console: Console
) -> int:
    """Run the cells that ``store`` lacks; returns how many failed. Ctrl-C ends the children too.

    Args:
        job_of: what a worker is told of a cell (``worker.run``).
    """
    done = store.done()
    missing = [cell for cell in cells if cell.key not in done]
    console.print(f"{len(cells)} cells, {len(cells) - len(missing)} done, {len(missing)} to run, {jobs} at a time")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    lock, stopped = threading.Lock(), threading.Event()
    failed = []
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        overall = progress.add_task("all", total=len(missing), note="")
        queue = iter(missing)
        workers = [_Worker(progress) for _ in range(min(jobs, len(missing)))]

        def work(worker: _Worker) -> None:
            while True:
                with lock:
                    cell = None if stopped.is_set() else next(queue, None)
                if cell is None:
                    return
                result = worker.run(job_of(cell), str(cell), cell.setting["steps"])
                with lock:
                    if result is not None:
                        store.add(cell, result)
                    elif not stopped.is_set():
                        failed.append(cell)
                        progress.console.print(f"[red]failed:[/] {cell}")
                    progress.advance(overall)

        with ThreadPoolExecutor(max_workers=max(len(workers), 1)) as pool:
            try:
                for future in [pool.submit(work, worker) for worker in workers]:
                    future.result()
            finally:
                stopped.set()
                for worker in workers:
                    worker.close()
    return len(failed)


class _Worker:
    """A process that trains the cells it is told, one after the other; started at the first, anew after a crash."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._process: subprocess.Popen[str] | None = None
        self._errors: deque[str] = deque(maxlen=15)

    def run(self, job: Mapping[str, Any], name: str, steps: int) -> dict[str, Any] | None:
        """The cell's result, or None when it failed; what it last said on the way is printed then."""
        task = self._progress.add_task(name, total=steps, note="")
        process = self._started(job["device"])
        assert process.stdin is not None and process.stdout is not None
        result = None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            message = _message(line)
            if "result" in message:
                result = message["result"]
            elif "step" in message:
                self._progress.update(task, completed=message["step"], note=message["note"])
            elif "done" in message:
                result = result if message["done"] else None
                break
        else:  # it ended without an answer
            self.close()
            result = None
        if result is None:
            self._progress.console.print("".join(self._errors), markup=False)
        self._progress.remove_task(task)
        return result

    def _started(self, device: str) -> subprocess.Popen[str]:
        if self._process is None:
            # Where there is a GPU and cells are of the CPU: a fork of a process that has seen it could not train.
            unseen = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
            self._process = subprocess.Popen(
                [sys.executable, str(_RUN), "--worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **unseen},
                start_new_session=True,  # its children end with it
            )
            errors = self._process.stderr
            threading.Thread(target=lambda: self._errors.extend(errors or ()), daemon=True).start()
        return self._process

    def close(self) -> None:
        """End the process and the cell it is training."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _message(line: str) -> dict[str, Any]:
    """What a worker says; the host prints, too."""
    try:
        message = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return message if isinstance(message, dict) else {}
