"""The report's sections as HTML. Every text goes through ``escape``; what is missing gets one sentence."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tts_brain.report.data import ArmData, ReportData, TableRow
from tts_brain.report.figures import (
    ARM_COLOURS,
    ATTENTION,
    LOSSES,
    SVG_DASHES,
    Panel,
    curve_panel,
    knob_panels,
    last_step,
    phase_number,
    phase_words,
)
from tts_brain.report.gallery import alignments, listen
from tts_brain.report.story import number, number_text, phase_runs, status, tally
from tts_brain.report.timeline import escape, missing, timeline


def body(data: ReportData) -> str:
    """All sections in order."""
    sections = (_intro, _table, _curves, alignments, _knobs, _story, listen, _notes, _footer)
    return "<main>" + "\n".join(section(data) for section in sections) + "</main>"


def _intro(data: ReportData) -> str:
    blocks = [block for block in data.intro.split("\n\n") if block.strip()]
    text = "".join(f"<p class='intro'>{escape(block)}</p>" for block in blocks)
    arms = "".join(f"<dt>{escape(arm.label)}</dt><dd>{html.escape(status(arm.journal))}</dd>" for arm in data.arms)
    return f"<h1>{escape(data.title)}</h1>{text}" + (f"<dl>{arms}</dl>" if arms else "")


# ---- results -------------------------------------------------------------------------------------------------------


def _table(data: ReportData) -> str:
    head = "<h2>Results</h2>"
    rows = [TableRow(*row) for row in data.table]
    if not rows or not data.arms:
        return head + missing("There is no result table: no arm was evaluated.") + _summaries(data)
    columns = "".join(f"<th scope='col'>{escape(arm.label)}</th>" for arm in data.arms)
    lines = "".join(_row(row, [arm.name for arm in data.arms]) for row in rows)
    return (
        f"{head}<div class='scroll' tabindex='0' role='region' aria-label='Results'><table><thead><tr>"
        f"<th scope='col'>Measure</th>{columns}</tr></thead><tbody>{lines}</tbody></table></div>" + _summaries(data)
    )


def _row(row: TableRow, names: Sequence[str]) -> str:
    best = best_arms(row, names)
    hint = f", {row.better} is better" if row.better else ""
    word = "best" if sum(math.isfinite(number(row.values.get(n))) for n in names) > 2 else "better"
    cells = ""
    for name in names:
        value = html.escape(number_text(row.values.get(name)))
        mark = f"<span class='badge'>✓ {word}</span>" if name in best else ""
        cells += f"<td class='best'>{value}{mark}</td>" if mark else f"<td>{value}</td>"
    unit = f"{escape(row.unit)}{hint}".lstrip(", ")
    return f"<tr><th scope='row'>{escape(row.label)}<small>{unit}</small></th>{cells}</tr>"


def best_arms(row: TableRow, names: Sequence[str]) -> set[str]:
    """Arms with the best value, empty when that says nothing: no direction, fewer than two numbers, or all equal as
    they are shown.

    An infinite value or the text "never" can lose; NaN and other texts take no part.
    """
    sign = {"lower": 1.0, "higher": -1.0}.get(row.better or "")
    if sign is None:
        return set()
    scores = {n: math.inf if row.values.get(n) == "never" else sign * number(row.values.get(n)) for n in names}
    scores = {n: score for n, score in scores.items() if not math.isnan(score)}
    shown = {n: number_text(row.values.get(n)) for n in scores}
    if len(scores) < 2 or len(set(shown.values())) < 2:
        return set()
    best = min(scores, key=scores.__getitem__)
    return {n for n, text in shown.items() if text == shown[best]}


def _summaries(data: ReportData) -> str:
    text = ""
    for arm in data.arms:
        if arm.summary:
            items = "".join(
                f"<dt>{escape(k)}</dt><dd>{html.escape(number_text(v))}</dd>" for k, v in arm.summary.items()
            )
            text += f"<details><summary>More about {escape(arm.label)}</summary><dl>{items}</dl></details>"
    return text


# ---- charts --------------------------------------------------------------------------------------------------------


def _curves(data: ReportData) -> str:
    end = last_step(data.arms)
    text = ""
    for title, names in (("Losses", LOSSES), ("Attention", ATTENTION)):
        found = [(words, curve_panel(data.arms, name, words, end)) for name, words in names.items()]
        panels = [panel for _, panel in found if panel]
        absent = [words.split(":")[0].split(",")[0] for words, panel in found if panel is None]
        text += f"<h2>{title}</h2>"
        text += _legend(data.arms) + _grid(panels) if panels else ""
        text += missing(f"Not shown, because no arm wrote it: {', '.join(absent)}.") if absent else ""
    return text


def _legend(arms: Sequence[ArmData]) -> str:
    items = ""
    for index, arm in enumerate(arms):
        dash = SVG_DASHES[index % len(SVG_DASHES)]
        line = f"stroke='var(--arm{index % ARM_COLOURS})' stroke-width='3' stroke-dasharray='{dash}'"
        items += (
            "<li><svg width='36' height='8' aria-hidden='true'>"
            f"<line x1='0' x2='36' y1='4' y2='4' {line}/></svg>{escape(arm.label)}</li>"
        )
    return f"<ul class='legend' aria-label='Arms'>{items}</ul>"


def _grid(panels: Sequence[Panel], css: str = "panels") -> str:
    return f"<div class='{css}'>{''.join(_panel(panel) for panel in panels)}</div>"


def _panel(panel: Panel) -> str:
    unit = f"<small>{html.escape(panel.unit)}</small>" if panel.unit else ""
    note = f"<p class='note'>{html.escape(panel.note)}</p>" if panel.note else ""
    # "<" must not stand in a script element; JSON may say it otherwise.
    spec = json.dumps(panel.spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f"<figure><figcaption>{html.escape(panel.title)}{unit}</figcaption>"
        f"<div class='chart' role='img' aria-label='{html.escape(panel.alt)}'></div>"
        f"<script type='application/json'>{spec}</script>{note}</figure>"
    )


def _knobs(data: ReportData) -> str:
    text = "<h2>Knobs</h2>"
    end = last_step(data.arms)
    quiet = []
    for index, arm in enumerate(data.arms):
        panels, still = knob_panels(arm, index, end)
        if not panels and not still:
            quiet.append(arm.label)
            continue
        text += f"<h3>{escape(arm.label)}</h3>{_strip(arm, end)}"
        text += _grid(panels, "panels small") if panels else ""
        text += missing(f"Never moved: {', '.join(still)}.") if still else ""
    return text + (missing(f"No knob was steered in: {', '.join(quiet)}.") if quiet else "")


def _strip(arm: ArmData, end: float) -> str:
    runs = phase_runs(arm.journal)
    if not runs:
        return ""
    parts = [f"<span style='width:{100 * runs[0].first / end:.2f}%'></span>"]
    parts += [
        f"<span class='phase{phase_number(run.phase)}' style='width:{100 * (run.last - run.first) / end:.2f}%'></span>"
        for run in runs
    ]
    words = "".join(
        f"<li><span class='tag phase{phase_number(run.phase)}'>{html.escape(phase)}</span> {first}–{last}</li>"
        for run, (phase, first, last) in zip(runs, phase_words(arm.journal), strict=True)
    )
    return (
        f"<p class='note'>The shading is the phase, by step; a dashed upright line is a rollback. Log axes.</p>"
        f"<div class='strip' aria-hidden='true'>{''.join(parts)}</div>"
        f"<ul class='legend note' aria-label='Phases by step'>{words}</ul>"
    )


# ---- words ---------------------------------------------------------------------------------------------------------


def _story(data: ReportData) -> str:
    text = "<h2>What was decided, and why</h2>"
    quiet = [arm.label for arm in data.arms if not arm.journal]
    for arm in data.arms:
        if arm.journal:
            counts = html.escape(tally(arm.journal).sentence())
            text += f"<h3>{escape(arm.label)}</h3><p class='note'>{counts}.</p>{timeline(arm.journal)}"
    return text + (missing(f"Without a journal: {', '.join(quiet)}.") if quiet or not data.arms else "")


def _notes(data: ReportData) -> str:
    if not data.notes:
        return ""
    return "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in data.notes) + "</ul>"


def _footer(data: ReportData) -> str:
    lines = ""
    for arm in data.arms:
        start = next((r for r in arm.journal if r.get("kind") == "start"), None)
        if start is not None:
            what = f"{escape(arm.label)}: host {escape(start.get('host', 'unknown'))}, "
            what += f"mode {escape(start.get('mode', 'unknown'))}. {_pairs(start.get('versions'))}"
            config = _pairs(start.get("config"))
            more = f"<details><summary>Configuration</summary><p>{config}</p></details>" if config else ""
            lines += f"<p>{what}</p>{more}"
    return f"<footer>{lines or '<p>No journal names the versions used.</p>'}</footer>"


def _pairs(values: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{escape(k)} {escape(v)}" for k, v in (values or {}).items())
