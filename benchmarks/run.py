"""The benchmarks: does the brain help, compared with what one would do otherwise?

    python benchmarks/run.py align [--data DIR] [--seeds 3] [--steps N] [--arms default,brain] [--jobs 2]
    python benchmarks/run.py align --quick              # a few minutes, to see that it works

A benchmark that was stopped goes on with the cells that are missing. Results are JSON lines, one per cell, in
``--json`` (default: ``benchmarks/results/NAME-CORPUS.jsonl``); the table of medians is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("align", "autofix150")
# Steps of one run; the other settings are in bench/setting.py.
STEPS = {"align": 500, "autofix150": 150}
QUICK = {"steps": 40, "held_out": 6, "evaluate_every": 10, "speak_every": 40, "speak_clips": 1, "batch_size": 4}
QUICK_ARMS = ("default", "static g300 lr0.002 fs0.03", "brain")


def main() -> int:
    args = _parser().parse_args()
    if args.worker:
        from bench.worker import run

        run(json.loads(args.worker))
        return 0
    if args.name is None:
        _parser().error(f"name a benchmark: {', '.join(NAMES)}")
    return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--data", type=Path, default=SHARED / "kathleen-en-us", help="LJSpeech layout, wav or flac")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--arms", help="comma-separated; default: all")
    parser.add_argument("--max-seconds", type=float, help="longest clip; default: where four fifths are shorter")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, three arms")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help="where rows go and are looked for")
    parser.add_argument("--list", action="store_true", help="print the arms and end")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace) -> int:
    from bench.plans import ARMS, arms_of, cells
    from bench.pool import run_missing
    from bench.setting import Setting
    from bench.store import Store
    from bench.summary import show
    from rich.console import Console

    from tts_brain.corpus import CorpusError

    console = Console()
    arms = arms_of(args.name)
    if args.list:
        print("\n".join(arms))
        return 0
    if args.arms:
        arms = tuple(name.strip() for name in args.arms.split(","))
    elif args.quick:
        arms = QUICK_ARMS
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        print(f"run.py: no arm {unknown[0]!r}; known are:\n  " + "\n  ".join(ARMS), file=sys.stderr)
        return 2
    try:
        max_s = args.max_seconds or _longest(args.data)
    except (CorpusError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    setting = replace(Setting(steps=args.steps or STEPS[args.name]), max_s=max_s)
    if args.quick:
        setting = replace(setting, **(QUICK | ({"steps": args.steps} if args.steps else {})))
    name = args.data.resolve().name
    todo = cells(args.name, name, setting, 1 if args.quick else args.seeds, arms)
    default = RESULTS / f"{args.name}-{name}{'-quick' if args.quick else ''}.jsonl"
    store = Store(args.json or default)

    def job_of(cell: Any) -> dict[str, Any]:
        return {**asdict(cell), "folder": str(args.data.resolve())}

    failed = run_missing(todo, store, args.jobs, job_of, console)
    wanted = {cell.key for cell in todo}
    show(args.name, [row for row in store.rows() if row["key"] in wanted], console)
    console.print(f"rows: {store.path}")
    return 1 if failed else 0


def _longest(folder: Path) -> float:
    """Where four fifths of the clips are shorter, in tenths of a second, from the headers of the files."""
    import soundfile

    from tts_brain.corpus import load_ljspeech

    lengths = sorted(soundfile.info(item["audio_file"]).duration for item in load_ljspeech(folder))
    return round(lengths[int(0.8 * (len(lengths) - 1))], 1)


if __name__ == "__main__":
    sys.exit(main())
