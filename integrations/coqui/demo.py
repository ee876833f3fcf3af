"""``tts-brain demo``: Coqui's real Tacotron2 twice from one seed, as the host would train it and with the brain."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tts_brain.arguments import ready_for, whole_number
from tts_brain.corpus import CorpusError, load_ljspeech
from tts_brain.report.html import write_report
from tts_brain.report.story import count
from tts_brain_coqui.demo_report import as_json, report_data, summarise, table

_DEFAULT_STEPS = 110
_POSITIVE = whole_number(1, 200)
_GRACE_S = 20


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``tts-brain demo``; returns the exit status."""
    args = _parser().parse_args(arguments)
    console = Console()
    try:
        if args.json:
            ready_for(args.json)
        data = _corpus(args.data, console)
        arms = _arms(args, data, len(load_ljspeech(data)))
        out = empty_folder(args.out)
    except (CorpusError, OSError, ImportError, RuntimeError) as error:
        print(f"tts-brain demo: {error}", file=sys.stderr)
        return 2
    started = time.monotonic()
    stopped = _train(arms, out, args.jobs, console)
    minutes = (time.monotonic() - started) / 60
    summary = {name: summarise(out / name) for name in arms}
    report = write_report(report_data(arms, out, summary, data, stopped=stopped), out / "report.html")
    console.print(table(arms, summary))
    console.print(f"{minutes:.1f} minutes of training · report: {report.resolve()}", highlight=False, soft_wrap=True)
    console.print(f"why each move was made: tts-brain explain {out}", highlight=False, soft_wrap=True)
    if args.json:
        names = ("steps", "seed", "batch_size", "reduction_factor", "host_schedule")
        result = as_json({name: getattr(args, name) for name in names}, arms, summary, data)
        args.json.parent.mkdir(parents=True, exist_ok=True)  # --out may have put it aside with an earlier demo
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    failed = [name for name in arms if summary[name]["steps"] < args.steps and not stopped]
    for name in failed:
        log = (out / name / "log.txt").resolve()
        print(f"tts-brain demo: arm {name!r} ended early, the reason is at the end of {log}", file=sys.stderr)
    return 130 if stopped else int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tts-brain demo", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="a corpus in LJSpeech layout, wav or flac; without it, espeak-ng speech is made")
    add("--steps", type=_POSITIVE, default=_DEFAULT_STEPS, help="optimizer steps per arm (%(default)s)")
    add("--out", type=Path, default=Path("demo"), help="where everything is written (%(default)s/)")
    add("--json", type=Path, help="also write the table to this file")
    add("--seed", type=whole_number(0, 1), default=0, help="of weights, data order and dropout (%(default)s)")
    add("--batch-size", type=_POSITIVE, default=16, help="clips per step (%(default)s)")
    add("--reduction-factor", type=_POSITIVE, default=5, help="mel frames per decoder step (%(default)s)")
    add("--jobs", type=_POSITIVE, default=min(2, os.cpu_count() or 1), help="arms at a time (%(default)s)")
    add(
        "--host-schedule",
        action="store_true",
        help="both arms at Coqui's own rate, 1e-4 under a 4000-step warm-up, which hardly moves in a short run; "
        "without it both run at a constant 1e-3, which makes a stronger default",
    )
    return parser


def _corpus(folder: Path | None, console: Console) -> Path:
    if folder is not None:
        load_ljspeech(folder)
        return folder
    from tts_brain_coqui.espeak_corpus import default_cache, make_corpus

    console.print("making the demo's corpus with espeak-ng (kept for the next time) …", highlight=False)
    return make_corpus(default_cache())


def empty_folder(folder: Path) -> Path:
    """An empty folder to write to; what an earlier demo wrote is kept beside it under another name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number = 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
    folder.mkdir(exist_ok=True)
    return folder


def _arms(args: argparse.Namespace, data: Path, clips: int) -> dict[str, dict[str, Any]]:
    held_out = max(2, min(12, clips // 8))
    _check_enough(data, clips, held_out, args.batch_size)
    common = {
        "data": str(data.resolve()),
        "steps": args.steps,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "reduction_factor": args.reduction_factor,
        "held_out": held_out,
        "measure_every": max(5, 5 * round(args.steps / 60)),
        "config": {} if args.host_schedule else {"lr": 1e-3, "lr_scheduler": None},
    }
    return {
        "default": {"name": "default", "label": "Coqui's defaults", "brain": False, **common},
        "brain": {"name": "brain", "label": "with the brain", "brain": True, **common},
    }


def _check_enough(data: Path, clips: int, held_out: int, batch_size: int) -> None:
    """One batch at least beside the clips that are held out; with less the table would be of nothing."""
    if clips >= held_out + batch_size:
        return
    remedy = f", or write --batch-size {clips - held_out}" if clips > held_out else ""
    raise CorpusError(
        f"{data} holds {count(clips, 'clip')}; a batch of {batch_size} and {held_out} that are held out take "
        f"{held_out + batch_size}. Give a corpus of so many{remedy}"
    )


def _train(arms: dict[str, dict[str, Any]], out: Path, jobs: int, console: Console) -> bool:
    """Run all arms, ``jobs`` at a time, one thread each; True when Ctrl-C ended it early."""
    state = TextColumn("{task.fields[state]}")
    columns = (TextColumn("{task.description:<17}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn(), state)
    slots = threading.Semaphore(jobs)
    running: list[subprocess.Popen[str]] = []
    with Progress(*columns, console=console) as progress:
        bars = {n: progress.add_task(arm["label"], total=arm["steps"], state="waiting") for n, arm in arms.items()}
        workers = [
            threading.Thread(target=_run_arm, args=(out / name, arm, slots, running, progress, bars[name]), daemon=True)
            for name, arm in arms.items()
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
        except KeyboardInterrupt:
            console.print("stopping; the report is made of what there is …")
            _stop(running)
            return True
    return False


def _stop(running: list[subprocess.Popen[str]]) -> None:
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _run_arm(
    folder: Path,
    arm: dict[str, Any],
    slots: threading.Semaphore,
    running: list[subprocess.Popen[str]],
    progress: Progress,
    bar: TaskID,
) -> None:
    folder.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps(arm, indent=2), encoding="utf-8")
    # PyTorch gains little from a second thread here; two arms side by side gain almost all of it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tts_brain_coqui.experiment", str(folder)]
    with slots, (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        running.append(process)
        assert process.stdout is not None
        seen = {"mel": "", "attention_diag": ""}
        for line in process.stdout:
            if not line.startswith('{"step"'):
                log.write(line)
                log.flush()
                continue
            message = json.loads(line)
            seen |= {key: f"{value:.2f}" for key, value in message.items() if key in seen}
            text = f"mel loss {seen['mel']}, attention_diag {seen['attention_diag']}"
            progress.update(bar, completed=message["step"], state=text)
        failed = process.wait() != 0
        progress.update(bar, state="[red]ended early, see log.txt" if failed else "done")
