"""``tts-brain espnet-measure EXP …``: held-out figures of finished runs, side by side.

tts-brain espnet-measure exp/tts_off exp/tts_on --clips dump/raw/eval [--model latest.pth] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from tts_brain.arguments import ready_for, whole_number

_SHOWN = ("diagonality", "focus", "coverage", "attention_diag")


def main(arguments: list[str] | None = None) -> int:
    """Held-out figures of ESPnet runs. Run it in the recipe's folder: paths in config.yaml are relative to that."""
    args = _parser().parse_args(arguments)
    # ESPnet warns of the same thing at each clip, hundreds of lines above the table.
    logging.getLogger().setLevel(logging.ERROR)
    rows = []
    try:
        if args.json is not None:
            ready_for(args.json)
        for run in args.runs:
            rows.append(_row(run, args.model, args.clips, args.limit, speak=not args.no_speech))
    except (OSError, ValueError) as error:
        print(f"tts-brain espnet-measure: {error}", file=sys.stderr)
        return 2
    _print(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tts-brain espnet-measure", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that hold config.yaml and the model")
    parser.add_argument("--clips", type=Path, default=Path("dump/raw/eval"), help="dump folder of held-out clips")
    parser.add_argument("--model", default="latest.pth", help="model file in each folder (latest.pth)")
    parser.add_argument("--limit", type=whole_number(1, 12), help="only the first so many clips")
    parser.add_argument("--no-speech", action="store_true", help="leave out free-running synthesis")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser


def _row(run: Path, model_name: str, folder: Path, limit: int | None, *, speak: bool) -> dict[str, Any]:
    config, model_file = run / "config.yaml", run / model_name
    for path in (config, model_file):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; give the folder of a finished run, and --model of a file in it"
            )
    # After the paths are known to be good: this takes seconds.
    from tts_brain_espnet.probe import Probe, clips, load_model

    probe = Probe(clips(config, folder, limit))
    if not len(probe):
        raise ValueError(f"{folder} holds no clips; give --clips a dump folder such as dump/raw/eval")
    model = load_model(config, model_file)
    held_out = probe.held_out(model)
    row = {"run": run.name, "model": model_name, "clips": len(probe), "l1": held_out.l1}
    row |= {"l1_postnet": held_out.l1_postnet, **held_out.values}
    if speak:
        row["speaks"] = sum(spoken.speaks for spoken in probe.speak(model)) / len(probe)
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(f"{rows[0]['clips']} clips, {rows[0]['model']}")
    for row in rows:
        table.add_column(row["run"], overflow="fold")
    names = ("l1", "l1_postnet", *_SHOWN, "speaks")
    for name in names:
        if name in rows[0]:
            table.add_row(name, *(f"{row[name]:.3f}" for row in rows))
    Console().print(table)
