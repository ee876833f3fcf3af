"""The decisions of one arm as an HTML list: what moved and why, holds folded, what went wrong marked."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

from tts_brain.report.figures import phase_number
from tts_brain.report.story import (
    Entry,
    Record,
    change_text,
    clean,
    evidence_text,
    fold,
    knob_text,
    moves,
    phase_text,
    verdict_text,
    wishes,
)

_ALARMS = ("roll_back", "stop")
_OPEN_UP_TO = 60  # a longer story starts closed, so that the page stays readable


def escape(value: object) -> str:
    """Text for HTML, in one line."""
    return html.escape(clean(value))


def missing(text: str) -> str:
    """The sentence that stands where a part of the page would be."""
    return f"<p class='muted'>{escape(text)}</p>"


def timeline(records: Sequence[Record]) -> str:
    """All that happened, in order; a sentence when nothing did."""
    entries = [entry for entry in fold(records) if entry.kind != "end"]
    if not entries:
        return missing("No decision and no event was written for this arm.")
    items = f"<ol class='story'>{''.join(_item(entry) for entry in entries)}</ol>"
    if len(entries) <= _OPEN_UP_TO:
        return items
    return f"<details><summary>Show all {len(entries)} lines</summary>{items}</details>"


def _item(entry: Entry) -> str:
    last = entry.last
    if entry.kind == "hold":
        return _line("hold", entry.steps, _hold(entry), entry.records[0].get("phase"), last.get("phase"))
    if entry.kind == "event":
        often = f", {len(entry.records)} times" if len(entry.records) > 1 else ""
        name = escape(last.get("event", "event")).replace("_", " ")
        text = f"<p><span class='verdict'>Event: {name}{often}</span></p><p>{escape(last.get('message', ''))}</p>"
        return _line("alarm", entry.steps, text)
    if entry.kind == "start":
        return _line("resume", entry.steps, f"<p>Resumed, mode {escape(last.get('mode', 'unknown'))}.</p>")
    verdict = str(last.get("verdict"))
    css = "alarm" if verdict in _ALARMS else verdict if verdict in ("accept", "undo") else "other"
    return _line(css, entry.steps, _decision(last), last.get("phase"))


def _line(css: str, steps: str, content: str, *phases: object) -> str:
    tags = " → ".join(_tag(str(phase)) for phase in dict.fromkeys(phases) if phase is not None)
    return f"<li class='{css}'><div class='when'><div>{steps.capitalize()}</div>{tags}</div><div>{content}</div></li>"


def _tag(phase: str) -> str:
    number = phase_number(phase)
    colour = "" if number is None else f" phase{number}"
    return f"<span class='tag{colour}'>{html.escape(phase_text(phase))}</span>"


def _hold(entry: Entry) -> str:
    reasons = Counter(clean(record.get("reason", "")) for record in entry.records)
    last = clean(entry.last.get("reason", ""))
    if len(entry.records) == 1:
        return f"<p>Held: {html.escape(last)}</p>"
    text = f"<p>Held {len(entry.records)} times: {html.escape(last)}</p>"
    if len(reasons) > 1:
        rows = "".join(f"<p>{often} × {html.escape(reason)}</p>" for reason, often in reasons.most_common())
        text += f"<details><summary>All reasons</summary>{rows}</details>"
    return text


def _decision(record: Record) -> str:
    changed = "".join(
        f"<li><code>{escape(name)}</code> {change_text(old, new)}</li>" for name, old, new in moves(record)
    )
    wanted = "" if record.get("applied", True) else "".join(f"<p>Wanted by {escape(w)}</p>" for w in wishes(record))
    return (
        f"<p class='verdict'>{html.escape(verdict_text(record))}</p>"
        + (f"<ul class='moves'>{changed}</ul>" if changed else "")
        + wanted
        + f"<p>{escape(record.get('reason', 'No reason was given.'))}</p>"
        + _details(record)
    )


def _details(record: Record) -> str:
    proposals = [_proposal(p) for p in record.get("proposals") or ()]
    evidence = evidence_text(record.get("evidence"))
    if not proposals and not evidence:
        return ""
    behind = f"<p>Evidence: {html.escape(evidence)}</p>" if evidence else ""
    missing = "" if proposals else "<p>No agent proposed anything.</p>"
    return f"<details><summary>Proposals and evidence</summary>{behind}{missing}{''.join(proposals)}</details>"


def _proposal(proposal: Record) -> str:
    wanted = ", ".join(f"{clean(k)} to {knob_text(v)}" for k, v in (proposal.get("moves") or {}).items())
    evidence = evidence_text(proposal.get("evidence"))
    return (
        f"<div class='proposal'><p><strong>{escape(proposal.get('agent', 'agent'))}</strong>: "
        f"{html.escape(wanted) or 'no move'}</p><p>{escape(proposal.get('reason', ''))}</p>"
        + (f"<p class='muted'>Evidence: {html.escape(evidence)}</p>" if evidence else "")
        + "</div>"
    )
