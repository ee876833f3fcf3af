"""The ``tts-brain`` command. Integrations add sub-commands through the entry-point group ``tts_brain.commands``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from tts_brain.arguments import whole_number

GROUP = "tts_brain.commands"
_NEEDS = {
    "demo": 'pip install "tts-brain[demo]"',
    "coqui-train": 'pip install "tts-brain[coqui]"',
    "espnet-measure": 'uv pip install "tts-brain[espnet]"',
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {point.name: point for point in entry_points(group=GROUP)}
    if arguments and arguments[0] in commands:
        return _run_plugin(arguments[0], commands, arguments[1:])
    parser = _parser(sorted(commands))
    if arguments and not arguments[0].startswith("-") and arguments[0] != "explain":
        known = ["explain", *sorted(commands)]
        near = get_close_matches(arguments[0], known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        parser.error(f"{arguments[0]!r} is no command{hint}; commands are {', '.join(known)}")
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    return _explain(args)


def _run_plugin(name: str, commands: Mapping[str, EntryPoint], arguments: list[str]) -> int:
    try:
        command = commands[name].load()
    except ModuleNotFoundError as error:
        remedy = _NEEDS.get(name, f"install what {name} needs")
        print(f"tts-brain {name} needs the package {error.name!r}, which is not installed: {remedy}", file=sys.stderr)
        return 2
    return int(command(arguments))


def _parser(plugins: list[str]) -> argparse.ArgumentParser:
    others = f"further commands: {', '.join(plugins)} (tts-brain COMMAND --help)" if plugins else None
    parser = argparse.ArgumentParser(prog="tts-brain", description="Steers the training of TTS models.", epilog=others)
    commands = parser.add_subparsers(dest="command")
    explain = commands.add_parser("explain", help="say what the brain did in a run, and why")
    explain.add_argument("run", type=Path, help="a run folder, or a journal.jsonl")
    explain.add_argument(
        "--step", type=whole_number(0, 200), help="one decision in full: every proposal with its evidence"
    )
    explain.add_argument("--holds", action="store_true", help="also each decision that moved nothing")
    return parser


def _explain(args: argparse.Namespace) -> int:
    from rich.console import Console

    from tts_brain.journal import find_journal, read_journal
    from tts_brain.report.terminal import explain

    try:
        journal = find_journal(args.run)
        explain(read_journal(journal), Console(), show_holds=args.holds, step=args.step, journal=journal)
    except BrokenPipeError:
        _write_no_more()
    except SystemExit:  # what newer versions of rich make of a broken pipe
        pass
    except (OSError, ValueError) as error:
        print(f"tts-brain explain: {error}", file=sys.stderr)
        return 2
    return 0


def _write_no_more() -> None:
    """Nobody reads on, as behind ``| head``: Python's own flush at its end must not fail as well."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
