"""What the demo shows: the table, the JSON file, and the data of the report, from the files of its arms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tts_brain.journal import read_journal
from tts_brain.report.data import AlignmentPicture, ArmData, AudioClip, ReportData, TableRow

ALIGNED = 0.5
ALIGNED_IN_A_ROW = 3
_PICTURED_STEPS = 6
_MEASURED = ("held_out_l1", "held_out_l1_postnet", "held_out_l1_postnet_fresh", "attention_diag")
_SOUNDS = {
    "reference": "recorded (Griffin-Lim)",
    "teacher_forced": "predicted, teacher-forced",
    "free": "free-running",
}

Arms = Mapping[str, Mapping[str, Any]]
Summary = Mapping[str, Mapping[str, Any]]


def summarise(folder: Path) -> dict[str, Any]:
    """The figures of one arm, from whatever it has written; NaN where it did not come so far."""
    train, held_out = _rows(folder / "train.jsonl"), _rows(folder / "held_out.jsonl")
    last = held_out[-1] if held_out else {}
    norms = np.log([r["grad_norm"] for r in train[-50:] if r["grad_norm"] > 0])
    nan = math.nan
    return {
        "steps": len(train),
        "train_mel": float(np.mean([r["mel"] for r in train[-10:]])) if train else nan,
        **{k: last.get(k, nan) for k in _MEASURED},
        **{k: last.get(k, nan) for k in ("diagonality", "focus", "coverage")},
        "aligned_at": _first_aligned(held_out),
        "grad_stability": float(norms.std()) if len(norms) > 1 else nan,
        "speaks": _speaks(folder / "done.json", held_out),
        "seconds_per_step": float(np.median([r["seconds"] for r in train])) if train else nan,
    }


def _speaks(done: Path, held_out: list[dict[str, Any]]) -> float | str:
    """Share of the clips at the end; of a run that did not come so far, as last measured."""
    if done.exists():
        return float(json.loads(done.read_text(encoding="utf-8"))["speaks"])
    measured = [row["speaks"] for row in held_out if "speaks" in row]
    return measured[-1] if measured else "not measured"


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
    ("held-out L1, after postnet", "log-mel", "held_out_l1_postnet_fresh", "lower"),
    ("  by batch norm's running statistics", "log-mel", "held_out_l1_postnet", "lower"),
    ("attention_diag, held out", "0 to 1", "attention_diag", "higher"),
    ("  diagonality", "0 to 1", "diagonality", "higher"),
    ("  focus", "0 to 1", "focus", "higher"),
    ("  coverage", "0 to 1", "coverage", "higher"),
    ("first aligned", "step", "aligned_at", "lower"),
    ("speaks (free-running)", "share of clips", "speaks", "higher"),
    ("gradient stability, std of log norm", "", "grad_stability", "lower"),
    ("time per step, median", "s", "seconds_per_step", None),
)


def table(arms: Arms, summary: Summary) -> Table:
    """The result for the terminal."""
    shown = Table(title="same seed, same data order, same initial weights")
    shown.add_column("")
    for arm in arms.values():
        shown.add_column(arm["label"], justify="right")
    for label, unit, key, _ in _ROWS:
        cells = [summary[name][key] for name in arms]
        texts = [cell if isinstance(cell, str) else f"{cell:.3g}" for cell in cells]
        shown.add_row(f"{label} ({unit})" if unit else label, *texts)
    return shown


def report_data(arms: Arms, out: Path, summary: Summary, data: Path, *, stopped: bool) -> ReportData:
    """Everything the HTML report shows."""
    first = next(iter(arms.values()))
    rate = "a constant rate of 1e-3" if "lr" in first["config"] else "Coqui's own rate schedule"
    notes = [
        "Coqui's defaults are those of Tacotron2Config (guided attention 5, loss weights, RAdam, clipping at 5), "
        f"with {rate} in both arms.",
        "aligned: attention_diag of 0.5 or more at three evaluations in a row. speaks: free-running synthesis ends by "
        "itself between half and twice the recording's length, covers the text and does not loop.",
        "after postnet: batch norm takes the statistics of the measured clips. Its running statistics lag behind "
        "weights that move fast, so that early in a run the error by them jumps from one evaluation to the next.",
    ]
    if stopped:
        notes.append("The demo was stopped early; this is what there was.")
    return ReportData(
        title="tts-brain demo",
        intro=f"Coqui's full-size Tacotron2 on {data.name}, trained twice for {first['steps']} steps from the same "
        "seed: as the host's defaults would have it, and with the brain. Held-out clips are measured the same way.",
        arms=[_arm_data(out / name, arm, summary[name]) for name, arm in arms.items()],
        table=[
            TableRow(label, unit, {name: summary[name][key] for name in arms}, better)
            for label, unit, key, better in _ROWS
        ],
        notes=notes,
    )


def _arm_data(folder: Path, arm: Mapping[str, Any], summary: Mapping[str, Any]) -> ArmData:
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
        audio=_audio(folder),
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


def _audio(folder: Path) -> list[AudioClip]:
    texts, clips = _texts(folder), []
    done = folder / "done.json"
    if not done.exists():
        return []
    rate = json.loads(done.read_text(encoding="utf-8"))["sample_rate"]
    for path in sorted((folder / "audio").glob("*.npy")):
        number, _, kind = path.stem.partition("_")
        samples = np.nan_to_num(np.load(path))
        loudest = float(np.abs(samples).max(initial=0.0))
        title = f"clip {int(number) + 1}: {_SOUNDS[kind]}"
        clips.append(AudioClip(title, texts[int(number)], samples / max(loudest, 1.0), rate))
    return clips


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def as_json(settings: Mapping[str, Any], arms: Arms, summary: Summary, data: Path) -> dict[str, Any]:
    """The table with all that is needed to make it again; figures that are not finite are null."""
    rows = {name: {"label": a["label"], "brain": a["brain"], **_plain(summary[name])} for name, a in arms.items()}
    versions = {name: version(name) for name in ("tts-brain", "torch", "coqui-tts", "coqui-tts-trainer")}
    return {"data": data.name, "arms": rows, "settings": dict(settings), "versions": versions}


def _plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}
