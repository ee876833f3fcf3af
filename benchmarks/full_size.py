"""Coqui's full-size Tacotron2, one long run per arm: the host's defaults, the best constants, the brain, a part of it.

    python benchmarks/full_size.py --data DIR --out FOLDER [--steps 1000] [--arms default,constants,brain]

The arms are those of ``tts-brain demo`` and two more. ``constants`` are guided weight, rate and a constant forward-sum
term of the best cell of ``align``'s grid; ``brain without tversky`` shows what that term does for the stop token. On
one core 1,000 steps of an arm take some two and a half hours; with a GPU minutes, and ``--loaders 2`` keeps it fed. An
arm that has ended is not run again; one that was stopped starts anew, and what it wrote is kept beside it. Table,
figures (``--json``) and picture (``--picture``) are made of whatever the folder holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from trainer import Trainer

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.corpus import CorpusError, load_ljspeech
from tts_brain.journal import JOURNAL_NAME, read_journal
from tts_brain_coqui.demo import empty_folder
from tts_brain_coqui.demo_report import as_json, summarise, table
from tts_brain_coqui.experiment import Arm, ArmRun

# The best cell of align's grid, in the host's units, which are those of ESPnet's guide.
_GUIDED, _RATE, FORWARD_SUM = 300.0, 1e-2, 0.2
# A constant rate for the host's defaults too: their schedule hardly moves in so few steps.
_DEFAULT_RATE = {"lr": 1e-3, "lr_scheduler": None}
_PICTURED = 4
# Steps between two measurements of what share of the held-out clips is spoken.
_SPEAK_EVERY = 100
_STOPS = ("false_stops", "missed_stops")
_CURVES = ("held_out_l1", "held_out_l1_postnet_fresh", "attention_diag")

ARMS: dict[str, dict[str, Any]] = {
    "default": {"label": "Coqui's defaults", "config": _DEFAULT_RATE},
    "constants": {
        "label": f"guided {_GUIDED:g}, rate {_RATE:g}, forward-sum {FORWARD_SUM:g}",
        "config": {"lr": _RATE, "lr_scheduler": None, "ga_alpha": _GUIDED},
    },
    "brain": {"label": "with the brain", "config": _DEFAULT_RATE, "brain": True},
    "brain without tversky": {
        "label": "without its Tversky term",
        "config": _DEFAULT_RATE,
        "brain": {"enabled": True, "tversky_weight": 0.0},
    },
}


class ConstantsRun(ArmRun):
    """An arm whose loss has a forward-sum term of constant weight beside the host's guide."""

    def build(self) -> Trainer:
        trainer = super().build()
        add_forward_sum(trainer.criterion[0], FORWARD_SUM)
        return trainer


def add_forward_sum(criterion: torch.nn.Module, weight: float) -> None:
    """Let a ``TacotronLoss`` add ``weight`` times the forward-sum loss in training; what it reports is untouched."""
    host = criterion.forward
    arguments = signature(host)

    def forward(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        losses = host(*args, **kwargs)
        if torch.is_grad_enabled():
            seen = arguments.bind(*args, **kwargs).arguments
            path = forward_sum(seen["alignments"], seen["alignment_lens"], seen["input_lens"])
            losses["loss"] = losses["loss"] + weight * path.mean()
        return losses

    criterion.forward = forward


def main() -> int:
    args = _parser().parse_args()
    names = [name for name in args.arms.split(",") if name]
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        print(f"full_size.py: no arm {unknown[0]!r}; there are {', '.join(ARMS)}", file=sys.stderr)
        return 2
    try:
        load_ljspeech(args.data)
    except CorpusError as error:
        print(f"full_size.py: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for name in names:
        _train(args.out / name, _arm(name, args))
    _show({name: ARMS[name] for name in ARMS if (args.out / name / "held_out.jsonl").exists()}, args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="LJSpeech layout, wav or flac")
    parser.add_argument("--out", type=Path, required=True, help="a folder per arm is made in it")
    parser.add_argument(
        "--arms", default="default,constants,brain", help=f"of {', '.join(ARMS)}; '' only shows what there is"
    )
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--reduction-factor", type=int, default=7)
    parser.add_argument("--loaders", type=int, default=0, help="processes that make features; 0 is the run's own")
    parser.add_argument("--json", type=Path, help="where the figures and curves go")
    parser.add_argument("--picture", type=Path, help="where the picture goes, PNG")
    return parser


def _arm(name: str, args: argparse.Namespace) -> Arm:
    return Arm(
        name=name,
        data=str(args.data.resolve()),
        steps=args.steps,
        seed=args.seed,
        batch_size=args.batch_size,
        reduction_factor=args.reduction_factor,
        speak_every=_SPEAK_EVERY,
        loaders=args.loaders,
        **ARMS[name],
    )


def _train(folder: Path, arm: Arm) -> None:
    """Run one arm, unless it has ended."""
    if (folder / "done.json").exists():
        return
    arm.save(empty_folder(folder))
    run = ConstantsRun if arm.name == "constants" else ArmRun
    run(folder).run()


def _show(arms: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    summary = {name: summarise(args.out / name) for name in arms}
    Console().print(table(arms, summary))
    if args.json:
        settings = {name: getattr(args, name) for name in ("steps", "seed", "batch_size", "reduction_factor")}
        found = as_json(settings, {n: {"brain": False, **a} for n, a in arms.items()}, summary, args.data)
        for name in arms:
            found["arms"][name]["curve"] = _curve(args.out / name)
            found["arms"][name]["decided"] = _decided(args.out / name)
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.picture:
        figure = picture(args.out, arms)
        figure.savefig(args.picture, dpi=110)
        plt.close(figure)


def _curve(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    spoken = {str(r["step"]): r["speaks"] for r in rows if "speaks" in r}
    curves = {key: [round(r[key], 4) for r in rows] for key in _CURVES}
    return {"step": [r["step"] for r in rows], **curves, "speaks": spoken}


def _decided(folder: Path) -> list[dict[str, float]]:
    """What the brain saw of the stop token and where its knobs stood, every ``_SPEAK_EVERY`` steps."""
    kept = []
    for journal in sorted(folder.rglob(JOURNAL_NAME)):
        for record in read_journal(journal.parent):
            if record["kind"] == "decision" and record["step"] % _SPEAK_EVERY == 0:
                seen = {k: v for p in record["proposals"] for k, v in p["evidence"].items() if k in _STOPS}
                kept.append({"step": record["step"], **seen, **record["after"]})
    return [{k: float(f"{v:.4g}") for k, v in row.items()} for row in kept]


def picture(out: Path, arms: dict[str, dict[str, Any]]) -> Any:
    """A row per arm: the attention of one held-out clip as the run goes on; below, held-out error and attention."""
    figure = plt.figure(figsize=(11, 1.9 * len(arms) + 3.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.9 * len(arms), 3.2))
    for row, (name, arm) in enumerate(arms.items()):
        with np.load(out / name / "alignments.npz") as held:
            steps = sorted(int(key.split("/")[0]) for key in held if key.endswith("/0"))
            for column in range(_PICTURED):
                step = steps[round((column + 1) / _PICTURED * (len(steps) - 1))]
                axis = above.add_subplot(len(arms), _PICTURED, row * _PICTURED + column + 1)
                axis.imshow(held[f"{step}/0"].T.astype(float), origin="lower", aspect="auto", vmin=0.0)
                axis.set_title(f"step {step}" if column else f"{arm['label']}\nstep {step}", fontsize=8)
                axis.set(xticks=[], yticks=[])
    axes = below.subplots(1, 2)
    for name, arm in arms.items():
        curve = _curve(out / name)
        for axis, key in zip(axes, ("attention_diag", "held_out_l1"), strict=True):
            axis.plot(curve["step"], curve[key], label=arm["label"])
    axes[0].axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes[0].set(xlabel="optimizer step", ylabel="attention_diag, held out", ylim=(0, 1))
    late = [value for name in arms for value in _curve(out / name)["held_out_l1"][3:]]
    axes[1].set(xlabel="optimizer step", ylabel="L1, held out")
    if late:
        axes[1].set_ylim(min(late) - 0.02, max(late) + 0.02)
    axes[0].legend(fontsize=8, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
