"""The run's story for people at a terminal, and the line that the trainer prints at each decision."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tts_brain.journal import to_plain
from tts_brain.report.coordination import coordination_lines
from tts_brain.report.story import (
    Entry,
    Record,
    clean,
    decisions,
    evidence_text,
    fold,
    is_seen,
    knob_series,
    knob_text,
    move_text,
    moves,
    phase_runs,
    phase_text,
    status,
    step_of,
    tally,
    verdict_text,
    wishes,
)
from tts_brain.types import KNOBS, Decision

LOG_WIDTH = 110
_ASCII = str.maketrans({"→": "->", "·": "-", "–": "-", "−": "-", "×": "x", "…": "...", "≥": ">=", "≤": "<=", "’": "'"})
_STYLES = {"accept": "green", "undo": "yellow", "roll_back": "bold red", "stop": "bold red", "hold": "dim"}


def one_decision(record: Record | Decision, *, encoding: str = "utf-8") -> str:
    """A decision as the trainer logs it: what, then why; three lines of ``LOG_WIDTH`` at the most."""
    plain: Record = to_plain(record) if isinstance(record, Decision) else record
    head = f"[brain] step {step_of(plain)} · {clean(plain.get('phase'))} · "
    moved = ", ".join(move_text(move) for move in moves(plain))
    if plain.get("verdict") == "accept" and moved:
        head += moved
    else:
        head += verdict_text(plain) + (f": {moved}" if moved else "")
    why = textwrap.wrap(
        clean(plain.get("reason", "no reason given")),
        LOG_WIDTH,
        initial_indent=" " * 8 + "why: ",
        subsequent_indent=" " * 13,
        max_lines=2,
        placeholder=" …",
    )
    return speakable("\n".join([head, *why]), encoding)


def explain(
    records: Iterable[Record],
    console: Console,
    *,
    show_holds: bool = False,
    step: int | None = None,
    journal: Path | None = None,
) -> None:
    """Print a journal as a story; with ``step`` print all that is known of the decision taken there.

    ``journal`` is printed above: of several runs below a folder, the reader is told which one this is.
    """
    story = list(records)
    if journal is not None:
        # In one line however long, to be copied.
        console.print(Text(speakable(clean(journal), console.encoding), "dim"), soft_wrap=True)
    if not story:
        _say(console, "The journal is empty: the run wrote nothing yet.")
    elif step is None:
        _header(console, story)
        for entry in fold(story, fold_holds=not show_holds):
            _entry(console, entry)
        _closing(console, story)
    else:
        _one_step(console, story, step)


def speakable(text: str, encoding: str) -> str:
    """``text`` with what the encoding lacks replaced (→ becomes ->)."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return text.translate(_ASCII).encode("ascii", "replace").decode("ascii")
    return text


def _say(console: Console, *parts: str | tuple[str, str], indent: int = 0) -> None:
    """Print one indented paragraph; a part is a text or a (text, style)."""
    styled = [(part, "") if isinstance(part, str) else part for part in parts]
    text = Text.assemble(*[(speakable(part, console.encoding), style) for part, style in styled])
    hang = 4  # later lines stand further in, so that the eye finds the next paragraph
    for number, line in enumerate(text.wrap(console, max(20, console.width - indent - hang))):
        line.rstrip()
        console.print(Text(" " * (indent + hang * (number > 0))) + line, soft_wrap=True)


def _header(console: Console, story: Sequence[Record]) -> None:
    start = next((r for r in story if r.get("kind") == "start"), {})
    host, mode = clean(start.get("host", "unknown host")), clean(start.get("mode", "unknown"))
    last = max(step_of(r) for r in story)
    _say(console, (f"{host} · mode {mode} · steps {step_of(start)}–{last}", "bold"))
    console.print()


def _entry(console: Console, entry: Entry) -> None:
    last, times = entry.last, len(entry.records)
    if entry.kind == "hold":
        steps = entry.steps.replace("steps ", "from step ").replace("–", " to ") if times > 1 else f"at {entry.steps}"
        _say(console, (f"held {steps}: {clean(last.get('reason', ''))}", "dim"))
    elif entry.kind == "event":
        often = f" ({times} times)" if times > 1 else ""
        name = clean(last.get("event", "event")).replace("_", " ")
        _say(console, (f"!! {entry.steps} · {name}{often}", "bold red"), f": {clean(last.get('message', ''))}")
    elif entry.kind == "start":
        _say(console, (f"-- resumed at step {step_of(last)}, mode {clean(last.get('mode'))}", "bold"))
    elif entry.kind == "decision":
        _decision(console, last)


def _decision(console: Console, record: Record) -> None:
    style = _STYLES.get(str(record.get("verdict")), "")
    where = f"step {step_of(record)} · {phase_text(record.get('phase'))} · "
    moved = ", ".join(move_text(move) for move in moves(record))
    _say(console, where, (verdict_text(record), style), f": {moved}" if moved else "")
    if not record.get("applied", True):
        for wish in wishes(record):
            _say(console, f"wanted by {wish}", indent=4)
    _say(console, f"why: {clean(record.get('reason', 'no reason given'))}", indent=4)


def _closing(console: Console, story: Sequence[Record]) -> None:
    console.print()
    _say(console, (status(story), "bold"))
    if not decisions(story):
        _say(console, "No decision was taken yet.")
        return
    _say(console, tally(story).sentence() + ".")
    runs = [f"{phase_text(run.phase)} {run.first}–{run.last}" for run in phase_runs(story)]
    _say(console, f"Phases by step: {', '.join(runs)}.")
    ends = {knob: (points[0][1], points[-1][1]) for knob, points in knob_series(story).items()}
    moved = [(knob, old, new) for knob, (old, new) in ends.items() if is_seen(old, new)]
    still = [f"{clean(knob)} {knob_text(new)}" for knob, (old, new) in ends.items() if not is_seen(old, new)]
    for move in moved:
        unit = KNOBS[move[0]].unit if move[0] in KNOBS else "unknown unit"
        _say(console, f"{move_text(move)}  ({unit})", indent=4)
    if still:
        _say(console, f"as at the start: {', '.join(still)}", indent=4)


def _one_step(console: Console, story: Sequence[Record], step: int) -> None:
    here = [r for r in story if step_of(r) == step and r.get("kind") in ("decision", "event")]
    if not any(r.get("kind") == "decision" for r in here):
        taken = sorted({step_of(r) for r in decisions(story)}, key=lambda s: abs(s - step))[:3]
        near = f"the nearest are at step {', '.join(map(str, taken))}" if taken else "none was taken at all"
        _say(console, f"No decision was taken at step {step}; {near}.")
    for record in here:
        if record.get("kind") == "event":
            _entry(console, Entry("event", (record,)))
        else:
            _in_full(console, record)


def _in_full(console: Console, record: Record) -> None:
    _decision(console, record)
    if record.get("evidence"):
        _say(console, f"evidence: {evidence_text(record['evidence'])}", indent=4)
    for title, lines in coordination_lines(record.get("coordination")):
        console.print()
        _say(console, (title, "bold"))
        for line in lines:
            _say(console, line, indent=2)
    console.print()
    proposals = record.get("proposals") or ()
    _say(console, ("Proposals" if proposals else "No agent proposed anything.", "bold"))
    for proposal in proposals:
        wanted = ", ".join(f"{clean(k)} to {knob_text(v)}" for k, v in (proposal.get("moves") or {}).items())
        _say(console, (clean(proposal.get("agent", "agent")), "bold"), f": {wanted or 'no move'}", indent=2)
        _say(console, clean(proposal.get("reason", "")), indent=4)
        if proposal.get("evidence"):
            _say(console, f"evidence: {evidence_text(proposal['evidence'])}", indent=4)
    console.print()
    _say(console, ("Knobs, before and after", "bold"))
    before, after = record.get("before") or {}, record.get("after") or {}
    changed = {move[0] for move in moves(record)}
    for knob in dict.fromkeys([*before, *after]):
        old, new = (knob_text(side[knob]) if knob in side else "unset" for side in (before, after))
        line = f"{clean(knob)} {old} → {new}" if knob in changed or old != new else f"{clean(knob)} {old}"
        _say(console, (line, "green" if knob in changed else "dim"), indent=2)
