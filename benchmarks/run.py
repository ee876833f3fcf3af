"""The benchmarks: does the brain help, compared with what one would do otherwise?

    python benchmarks/run.py NAME [--data DIR] [--seeds 3] [--steps N] [--arms default,brain] [--jobs 2]
    python benchmarks/run.py align --quick              # a few minutes, to see that it works

NAME is one of:

    identity    off and observe against each host, to the bit
    overhead    time per step against each host's full-size model; growth over 100,000 steps
    autofix150  the old AutoFixManager and the brain, 150 steps
    align       steps to an alignment and to speech: host default, constants, schedules, the brain and its parts
    noharm      from the best constants of align: with and without the brain
    rescue      40 bad starts: host default, the best constants of align, the brain
    components  each part of the context and the coordination against the simplest alternative; trains micro models only

A benchmark that was stopped goes on with the cells that are missing. Results are JSON lines, one per cell, in
``--json`` (default: ``benchmarks/results/NAME-CORPUS.jsonl``); the table of medians is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
RESULTS = ROOT / "benchmarks" / "results"
# Steps of one run; the other settings are in bench/setting.py.
STEPS = {"align": 500, "noharm": 500, "rescue": 500, "autofix150": 150}
NAMES = ("identity", "overhead", "components", *STEPS)
QUICK = {"steps": 40, "held_out": 6, "evaluate_every": 10, "speak_every": 40, "speak_clips": 1, "batch_size": 4}
QUICK_ARMS = ("default", "static g300 lr0.002 fs0.03", "brain")
OVERHEAD_ITERATIONS = 20


class Refused(Exception):
    """What was asked for cannot be; the message says what to write instead."""


def main() -> int:
    args = _parser().parse_args()
    if args.worker:
        from bench.worker import serve

        serve(sys.stdin)
        return 0
    if args.name is None:
        _parser().error(f"name a benchmark: {', '.join(NAMES)}")
    from tts_brain.corpus import CorpusError

    try:
        if args.device != "cpu" and args.name not in STEPS:
            raise Refused(f"{args.name} runs on the processor: leave out --device, which is for {', '.join(STEPS)}")
        return {"identity": _identity, "overhead": _overhead, "components": _components}.get(args.name, _cells)(args)
    except (CorpusError, Refused, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--data", type=Path, default=SHARED / "kathleen-en-us", help="LJSpeech layout, wav or flac")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument(
        "--first-seed", type=int, default=0, help="the tables of the docs begin at 0; choose what you tune on higher"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--arms", help="comma-separated; default: all. Also the parts of overhead and components")
    parser.add_argument(
        "--starts", help="rescue: some of the bad starts, comma-separated; the clean run is always made"
    )
    parser.add_argument("--model", choices=("small", "pilot", "full"), default="small", help="sizes of the Tacotron2")
    parser.add_argument(
        "--host-decoder", action="store_true", help="the host's own decoder pass, slower (bench/quick_decoder.py)"
    )
    parser.add_argument("--max-seconds", type=float, help="longest clip; default: where four fifths are shorter")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps, three arms")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where models train; a GPU's rows go to a file of their own",
    )
    parser.add_argument("--json", type=Path, help="where rows go and are looked for")
    parser.add_argument(
        "--traces",
        type=Path,
        help="record each step of constants and brains into this folder; components: reads them from there",
    )
    parser.add_argument("--list", action="store_true", help="print the arms, parts or bad starts and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def _cells(args: argparse.Namespace) -> int:
    """Benchmarks made of training runs."""
    import torch
    from rich.console import Console

    from bench.bad_starts import BAD_STARTS
    from bench.plans import arms_of, cells, rescue_cells
    from bench.pool import run_missing
    from bench.setting import Setting
    from bench.store import Store
    from bench.summary import show

    if args.list:
        print("\n".join(arms_of(args.name)))
        if args.name == "rescue":
            print("\nbad starts, for --starts:", *BAD_STARTS, sep="\n")
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no GPU here; write --device cpu, or leave it out")
    corpus = args.data.resolve().name
    arms = _arms(args, corpus)
    setting = Setting(
        args.model,
        quick=not args.host_decoder,
        steps=args.steps or STEPS[args.name],
        max_s=args.max_seconds or _longest(args.data),
    )
    if args.quick:
        setting = replace(setting, **(QUICK | ({"steps": args.steps} if args.steps else {})))
    seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    if args.name == "rescue":
        starts = _starts(args, BAD_STARTS)
        todo = rescue_cells(corpus, setting, seeds, arms, starts)
    else:
        todo = cells(args.name, corpus, setting, seeds, arms)
    store = Store(args.json or _rows(args, corpus))

    def job_of(cell: Any) -> dict[str, Any]:
        traces = str(args.traces.resolve()) if args.traces else None
        where = {"folder": str(args.data.resolve()), "device": args.device, "traces": traces}
        return {**asdict(cell), "key": cell.key, **where}

    console = Console()
    failed = run_missing(todo, store, args.jobs, job_of, console)
    # All that was ever run at this setting, so that arms run at other times stand in one table.
    rows = [row for row in store.rows() if row["setting"] == setting.to_dict()]
    summary = store.path.with_suffix(".md")
    show(args.name, rows, summary, console)
    console.print(f"rows: {store.path}, table: {summary}")
    return 1 if failed else 0


def _starts(args: argparse.Namespace, known: Iterable[str]) -> list[str]:
    if not args.starts:
        return list(known)[:: 10 if args.quick else 1]
    starts = [name.strip() for name in args.starts.split(",")]
    unknown = [name for name in starts if name not in known]
    if unknown:
        raise Refused(f"no bad start {unknown[0]!r}; known are:\n  " + "\n  ".join(known))
    return starts


def _arms(args: argparse.Namespace, corpus: str) -> Sequence[str]:
    from bench.plans import ANY_CONSTANTS, ARMS, AT, GRID, POPULATIONS, arm_name, arms_of, oracle
    from bench.store import Store
    from bench.summary import of_one_setting

    if args.arms:
        try:
            arms = tuple(arm_name(name.strip()) for name in args.arms.split(","))
        except KeyError as unknown:
            known = "\n  ".join([ANY_CONSTANTS, *ARMS, *POPULATIONS])
            raise Refused(f"no arm {unknown}; known are:\n  {known}") from None
    elif args.name in ("noharm", "rescue"):
        path = _rows(args, corpus, "align")
        rows, others = of_one_setting(row for row in Store(path).rows() if row["arm"] in GRID)
        if others:
            print(f"the best constants: rows of other settings left out of {path}: {others}", file=sys.stderr)
        try:
            best = oracle(rows)
        except ValueError as error:
            raise Refused(str(error)) from error
        arms = (best, AT + best) if args.name == "noharm" else ("default", best, "brain")
    else:
        arms = QUICK_ARMS if args.quick else arms_of(args.name)
    if args.device != "cpu" and any(arm in POPULATIONS for arm in arms):
        if args.arms:
            raise Refused(f"the arms pbt run on the processor, not on {args.device}: leave out --device for them")
        print(f"without the arms pbt: they run on the processor, not on {args.device}", file=sys.stderr)
        arms = tuple(arm for arm in arms if arm not in POPULATIONS)
    if any(arm in POPULATIONS for arm in arms) and find_spec("ray") is None:
        if args.arms:
            raise Refused("the arms pbt need Ray: uv pip install -e '.[bench,pbt]'")
        print("without the arms pbt: they need Ray (uv pip install -e '.[bench,pbt]')", file=sys.stderr)
        arms = tuple(arm for arm in arms if arm not in POPULATIONS)
    return arms


def _rows(args: argparse.Namespace, corpus: str, name: str | None = None) -> Path:
    also = [""] if args.model == "small" else ["", args.model]
    # What is tuned on stands in no table, and makes no oracle; the oracle of the tables is asked for by name.
    seeds = f"-from-seed-{args.first_seed}" * (args.first_seed != 0 and name is None)
    on = f"-{args.device}" * (args.device != "cpu" and name is None)
    return RESULTS / f"{name or args.name}-{corpus}{'-'.join(also + ['quick'] * args.quick)}{seeds}{on}.jsonl"


def _identity(args: argparse.Namespace) -> int:
    from bench.identity import identity

    rows = identity()
    for row in rows:
        print(f"{'same' if row['identical'] else 'DIFFERS'}  {row['host']:7} {row['comparison']}")
    _write(args.json or RESULTS / "identity.json", rows)
    return 0 if rows and all(row["identical"] for row in rows) else 1


def _overhead(args: argparse.Namespace) -> int:
    import logging

    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    from brain_cost import coqui_cost

    from bench.data import load
    from bench.overhead import OVERHEADS, espnet_cost, growth
    from bench.setting import Setting

    parts = tuple(name.strip() for name in args.arms.split(",")) if args.arms else OVERHEADS
    unknown = [name for name in parts if name not in OVERHEADS]
    if args.list:
        print("\n".join(OVERHEADS))
        return 0
    if unknown:
        raise Refused(f"no part {unknown[0]!r} of overhead; write {', '.join(OVERHEADS)}")

    count = args.steps or (2 if args.quick else OVERHEAD_ITERATIONS)
    setting = Setting(max_s=args.max_seconds or _longest(args.data), reduction_factor=2)
    corpus = load(args.data, min_s=setting.min_s, max_s=setting.max_s, held_out=setting.held_out)
    path = args.json or RESULTS / f"overhead{'-quick' * args.quick}.json"
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if args.arms and path.exists() else {}
    result["data"] = corpus.name
    costs = {
        "growth": lambda: growth(5_000 if args.quick else 100_000),
        "espnet": lambda: espnet_cost(corpus, setting, count),
        "coqui": lambda: coqui_cost(args.data, count, setting.batch_size),
    }
    for name in parts:
        result[name] = costs[name]()
        print(json.dumps({name: result[name]}), flush=True)
    _write(path, result)
    return 0


def _components(args: argparse.Namespace) -> int:
    """Each part alone, those of ``--arms`` or all. A criterion that is not met is a result, no failure."""
    from rich.console import Console

    from bench.components import NAMES as PARTS
    from bench.components import collect, missing, plain, show, verdicts

    parts = tuple(name.strip() for name in args.arms.split(",")) if args.arms else PARTS
    unknown = [name for name in parts if name not in PARTS]
    if args.list:
        print("\n".join(PARTS))
        return 0
    if unknown or (args.traces is not None and not args.traces.is_dir()):
        raise Refused(f"no part {unknown[0]!r}; write {', '.join(PARTS)}" if unknown else f"no folder {args.traces}")
    console, path = Console(), args.json or RESULTS / f"components{'-quick' * args.quick}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["parts"] if path.exists() else {}
    for name in parts:
        if missing(name):
            console.print(f"without {name}: it has no module")
            continue
        rows = collect(name, args.quick, args.traces)
        # After each part, as the whole takes long; what other parts had given stays.
        found = {one: found[one] for one in PARTS if one in found and one != name} | {name: plain(rows)}
        _write(path, {"parts": found, "verdicts": verdicts([row for some in found.values() for row in some])})
    show([row for name in PARTS for row in found.get(name, [])], console)
    return 0


def _write(path: Path, result: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    print(f"written: {path}")


def _longest(folder: Path) -> float:
    """Where four fifths of the clips are shorter, in tenths of a second, from the headers of the files."""
    import soundfile

    from tts_brain.corpus import load_ljspeech

    lengths = sorted(soundfile.info(item["audio_file"]).duration for item in load_ljspeech(folder))
    return round(lengths[int(0.8 * (len(lengths) - 1))], 1)


if __name__ == "__main__":
    sys.exit(main())
