"""``tts-brain demo``: Coqui's real Tacotron2 twice from the same seed, as the host would train it and with the brain."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from tts_brain_coqui.corpus import CorpusError, load_ljspeech

from tts_brain.journal import read_journal
from tts_brain.report.data import AlignmentPicture, ArmData, AudioClip, ReportData, TableRow
from tts_brain.report.html import write_report

ALIGNED = 0.5
ALIGNED_IN_A_ROW = 3
_DEFAULT_STEPS = 200
_PICTURED_STEPS = 6


def main(arguments: list[str] | None = None) -> int:
    """Entry of ``tts-brain demo``; returns the exit status."""
    args = _parser().parse_args(arguments)
    console = Console()
    try:
        data = _corpus(args.data, console)
        out = _output(args.out)
    except (CorpusError, OSError, ImportError) as error:
        console.print(f"[red]{error}[/red]", markup=True, highlight=False)
        return 2
    arms = _arms(args, data)
    started = time.monotonic()
    stopped = _train(arms, out, args.jobs, console)
    summary = {name: summarise(out / name) for name in arms}
    report_path = write_report(_report_data(arms, out, summary, data, stopped), out / "report.html")
    console.print(_table(arms, summary))
    console.print(f"{(time.monotonic() - started) / 60:.1f} minutes · report: {report_path.resolve()}", highlight=False)
    journals = list((out / "brain").rglob("journal.jsonl"))
    if journals:
        console.print(f"why each move was made: tts-brain explain {journals[0].parent}", highlight=False)
    if args.json:
        args.json.write_text(json.dumps(_as_json(args, arms, summary, data), indent=2) + "\n", encoding="utf-8")
    failed = [name for name in arms if summary[name]["steps"] == 0]
    for name in failed:
        console.print(f"[red]arm {name!r} did not train; its log is {(out / name / 'log.txt').resolve()}[/red]")
    return 130 if stopped else int(bool(failed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tts-brain demo", description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="a corpus in LJSpeech layout (wav or flac); default: espeak-ng speech"
    )
    parser.add_argument("--steps", type=_positive, default=_DEFAULT_STEPS, help="optimizer steps per arm (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where everything is written (%(default)s/)")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and dropout (%(default)s)")
    parser.add_argument("--batch-size", type=_positive, default=16, help="clips per step (%(default)s)")
    parser.add_argument(
        "--reduction-factor", type=_positive, default=5, help="mel frames per decoder step (%(default)s)"
    )
    parser.add_argument(
        "--jobs", type=_positive, default=min(2, os.cpu_count() or 1), help="arms at a time (%(default)s)"
    )
    parser.add_argument(
        "--host-schedule",
        action="store_true",
        help="both arms at Coqui's own rate, 1e-4 under a 4000-step warm-up, which hardly moves in a short run; "
        "without it both run at a constant 1e-3, which makes a stronger default",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more; write for example 200")
    return int(text)


def _corpus(folder: Path | None, console: Console) -> Path:
    if folder is not None:
        load_ljspeech(folder)
        return folder
    from tts_brain_coqui.espeak_corpus import default_cache, make_corpus

    console.print("making the demo's corpus with espeak-ng (cached for the next time) …", highlight=False)
    return make_corpus(default_cache())


def _output(folder: Path) -> Path:
    """An empty folder to write to; results of an earlier demo are kept beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()):
        number = 1
        while folder.with_name(f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(folder.with_name(f"{folder.name}.{number}"))
    folder.mkdir(exist_ok=True)
    return folder


def _arms(args: argparse.Namespace, data: Path) -> dict[str, dict[str, Any]]:
    rate = {} if args.host_schedule else {"lr": 1e-3, "lr_scheduler": None}
    common = {
        "data": str(data.resolve()),
        "steps": args.steps,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "reduction_factor": args.reduction_factor,
        "measure_every": max(5, args.steps // 16 // 5 * 5),
        "config": rate,
    }
    return {
        "default": {"name": "default", "label": "Coqui's defaults", "brain": False, **common},
        "brain": {"name": "brain", "label": "with the brain", "brain": True, **common},
    }


def _train(arms: dict[str, dict[str, Any]], out: Path, jobs: int, console: Console) -> bool:
    """Run all arms, ``jobs`` at a time, one thread each; True when Ctrl-C ended it early."""
    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    slots = threading.Semaphore(jobs)
    running: list[subprocess.Popen[str]] = []
    with Progress(*columns, console=console) as progress:
        bars = {
            name: progress.add_task(arm["label"], total=arm["steps"], state="waiting") for name, arm in arms.items()
        }
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
            return False
        except KeyboardInterrupt:
            console.print("stopping; the report is made of what there is …")
            for process in running:
                process.terminate()
            for process in running:
                process.wait(20)
            return True


def _run_arm(
    folder: Path, arm: dict[str, Any], slots: threading.Semaphore, running: list[Any], progress: Progress, bar: TaskID
) -> None:
    folder.mkdir(parents=True)
    (folder / "arm.json").write_text(json.dumps(arm, indent=2), encoding="utf-8")
    # PyTorch gains little from a second thread here, two arms side by side gain almost all of it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "tts_brain_coqui.experiment", str(folder)]
    with slots, (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        running.append(process)
        seen = {"mel": "", "attention_diag": ""}
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith('{"step"'):
                log.write(line)
                log.flush()
                continue
            message = json.loads(line)
            seen |= {k: f"{v:.2f}" for k, v in message.items() if k in seen}
            state = f"mel loss {seen['mel']} · attention_diag {seen['attention_diag']}"
            progress.update(bar, completed=message["step"], state=state)
        failed = process.wait() != 0
        progress.update(bar, state="[red]failed, see log.txt" if failed else "done")


def summarise(folder: Path) -> dict[str, Any]:
    """The figures of one arm, from whatever it has written; NaN where it did not come so far."""
    train, held_out = _rows(folder / "train.jsonl"), _rows(folder / "held_out.jsonl")
    last = held_out[-1] if held_out else {}
    norms = np.log([r["grad_norm"] for r in train[-50:] if r["grad_norm"] > 0])
    done = folder / "done.json"
    nan = math.nan
    return {
        "steps": len(train),
        "train_mel": float(np.mean([r["mel"] for r in train[-10:]])) if train else nan,
        **{k: last.get(k, nan) for k in ("held_out_l1", "held_out_l1_postnet", "attention_diag")},
        **{k: last.get(k, nan) for k in ("diagonality", "focus", "coverage")},
        "aligned_at": _first_aligned(held_out),
        "grad_stability": float(norms.std()) if len(norms) > 1 else nan,
        "speaks": json.loads(done.read_text(encoding="utf-8"))["speaks"] if done.exists() else nan,
        "seconds_per_step": float(np.median([r["seconds"] for r in train])) if train else nan,
    }


def _first_aligned(held_out: list[dict[str, Any]]) -> float | str:
    """Step of the first of three evaluations in a row with ``attention_diag`` at 0.5 or more."""
    row = 0
    for index, measured in enumerate(held_out):
        row = row + 1 if measured["attention_diag"] >= ALIGNED else 0
        if row == ALIGNED_IN_A_ROW:
            return float(held_out[index - ALIGNED_IN_A_ROW + 1]["step"])
    return "never"


_ROWS = (
    ("training mel loss, last 10 steps", "", "train_mel", "lower"),
    ("held-out L1, decoder", "log-mel", "held_out_l1", "lower"),
    ("held-out L1, after postnet", "log-mel", "held_out_l1_postnet", "lower"),
    ("attention_diag, held out", "0 to 1", "attention_diag", "higher"),
    ("  diagonality", "0 to 1", "diagonality", "higher"),
    ("  focus", "0 to 1", "focus", "higher"),
    ("  coverage", "0 to 1", "coverage", "higher"),
    ("first aligned", "step", "aligned_at", "lower"),
    ("speaks (free-running)", "share of clips", "speaks", "higher"),
    ("gradient stability, std of log norm", "", "grad_stability", "lower"),
    ("time per step, median", "s", "seconds_per_step", None),
)


def _table(arms: dict[str, dict[str, Any]], summary: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="same seed, same data order, same initial weights")
    table.add_column("")
    for arm in arms.values():
        table.add_column(arm["label"], justify="right")
    for label, unit, key, _ in _ROWS:
        cells = [summary[name][key] for name in arms]
        table.add_row(
            f"{label}{f' ({unit})' if unit else ''}", *[c if isinstance(c, str) else f"{c:.3g}" for c in cells]
        )
    return table


def _report_data(
    arms: dict[str, dict[str, Any]], out: Path, summary: dict[str, dict[str, Any]], data: Path, stopped: bool
) -> ReportData:
    steps = next(iter(arms.values()))["steps"]
    rate = "a constant rate of 1e-3" if "lr" in next(iter(arms.values()))["config"] else "Coqui's own rate schedule"
    notes = [
        "Coqui's defaults are those of Tacotron2Config (guided attention 5, loss weights, RAdam, clipping at 5), "
        f"with {rate} in both arms.",
        "aligned: attention_diag of 0.5 or more at three evaluations in a row. speaks: free-running synthesis ends by "
        "itself between half and twice the recording's length, covers the text and does not loop.",
    ]
    if stopped:
        notes.append("The demo was stopped early; this is what there was.")
    return ReportData(
        title="tts-brain demo",
        intro=f"Coqui's full-size Tacotron2 on {data.name}, trained twice for {steps} steps from the same seed: as the "
        "host's defaults would have it, and with the brain. Held-out clips are measured the same way in both.",
        arms=[_arm_data(out / name, arm, summary[name]) for name, arm in arms.items()],
        table=[TableRow(l, u, {name: summary[name][k] for name in arms}, b) for l, u, k, b in _ROWS],  # noqa: E741
        notes=notes,
    )


def _arm_data(folder: Path, arm: dict[str, Any], summary: dict[str, Any]) -> ArmData:
    train, held_out = _rows(folder / "train.jsonl"), _rows(folder / "held_out.jsonl")
    curves = {
        "train_mel": [(r["step"], r["mel"]) for r in train],
        "learning_rate": [(r["step"], r["rate"]) for r in train],
    }
    for name in ("held_out_l1", "attention_diag", "diagonality", "focus", "coverage"):
        curves[name] = [(r["step"], r[name]) for r in held_out]
    journals = list(folder.rglob("journal.jsonl"))
    return ArmData(
        name=arm["name"],
        label=arm["label"],
        curves=curves,
        alignments=_pictures(folder),
        audio=_audio(folder, arm["label"]),
        journal=list(read_journal(journals[0])) if journals else [],
        summary=summary,
    )


def _texts(folder: Path) -> list[str]:
    path = folder / "texts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def _pictures(folder: Path) -> list[AlignmentPicture]:
    path = folder / "alignments.npz"
    if not path.exists():
        return []
    texts = _texts(folder)
    with np.load(path) as held:
        keys = sorted((k for k in held if k.endswith("/0")), key=lambda k: int(k.split("/")[0]))
        chosen = [keys[i] for i in sorted({round(i) for i in np.linspace(0, len(keys) - 1, _PICTURED_STEPS)})]
        return [
            AlignmentPicture(int(k.split("/")[0]), "held-out clip", texts[0], held[k].astype(np.float32))
            for k in chosen
        ]


def _audio(folder: Path, label: str) -> list[AudioClip]:
    names = {
        "reference": "recorded (Griffin-Lim)",
        "teacher_forced": "predicted, teacher-forced",
        "free": "free-running",
    }
    rate = 22050
    clips = []
    for path in sorted((folder / "audio").glob("*.npy")) if (folder / "audio").exists() else []:
        clip, _, kind = path.stem.partition("_")
        samples = np.nan_to_num(np.load(path))
        peak = max(float(np.abs(samples).max(initial=0.0)), 1e-6)
        clips.append(
            AudioClip(f"clip {int(clip) + 1}: {names[kind]}", _texts(folder)[int(clip)], samples / max(peak, 1.0), rate)
        )
    return clips


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _as_json(args: argparse.Namespace, arms: dict[str, Any], summary: dict[str, Any], data: Path) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "data": data.name,
        "arms": {
            name: {"label": arm["label"], "brain": arm["brain"], **_plain(summary[name])} for name, arm in arms.items()
        },
        "settings": {k: getattr(args, k) for k in ("steps", "seed", "batch_size", "reduction_factor", "host_schedule")},
        "versions": {name: version(name) for name in ("tts-brain", "torch", "coqui-tts", "coqui-tts-trainer")},
    }


def _plain(summary: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
