"""Runs cells in processes of their own, a few at a time, with live progress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    lock = threading.Lock()
    children: set[subprocess.Popen[str]] = set()
    failed = []
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        overall = progress.add_task("all", total=len(missing), note="")

        def work(cell: Cell) -> None:
            task = progress.add_task(str(cell), total=cell.setting["steps"], note="")
            result = _run_one(job_of(cell), progress, task, children)
            progress.remove_task(task)
            with lock:
                if result is None:
                    failed.append(cell)
                    progress.console.print(f"[red]failed:[/] {cell}")
                else:
                    store.add(cell, result)
                progress.advance(overall)

        try:
            with ThreadPoolExecutor(max_workers=jobs) as pool:
                for future in [pool.submit(work, cell) for cell in missing]:
                    future.result()
        except BaseException:
            for child in children:
                child.terminate()
            raise
    return len(failed)


def _run_one(
    job: Mapping[str, Any], progress: Progress, task: TaskID, children: set[subprocess.Popen[str]]
) -> dict[str, Any] | None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, str(_RUN), "--worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    children.add(child)
    errors: list[str] = []
    assert child.stdout is not None and child.stderr is not None
    reader = threading.Thread(target=lambda: errors.extend(child.stderr or ()), daemon=True)
    reader.start()
    result = None
    for line in child.stdout:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            continue  # the host prints, too
        if not isinstance(message, dict):
            continue
        if "result" in message:
            result = message["result"]
        elif "step" in message:
            progress.update(task, completed=message["step"], note=message["note"])
    code = child.wait()
    reader.join()
    children.discard(child)
    if code != 0 or result is None:
        progress.console.print("".join(errors[-15:]), markup=False)
        return None
    return result
