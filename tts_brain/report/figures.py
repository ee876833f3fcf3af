"""Curves as plotly specifications in plain dicts; colours are CSS variables that the page's script fills in.

Arms differ by colour and by dash. Long noisy curves are drawn thin, with a thick running mean.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tts_brain.report.data import ArmData, Curve
from tts_brain.report.story import (
    Record,
    clean,
    count,
    decisions,
    is_seen,
    knob_series,
    knob_text,
    number_text,
    phase_runs,
    phase_text,
    step_of,
)
from tts_brain.types import KNOBS, PHASE_LIMITS, TrainingPhase

DASHES = ("solid", "dash", "dot", "dashdot")
SVG_DASHES = ("none", "8 4", "2 4", "8 4 2 4")  # the same in the page's own legend
ARM_COLOURS = 4

LOSSES = {
    "train_mel": "Training mel loss",
    "held_out_l1": "Held-out mel L1",
    "train_total": "Training total loss, as the host weighs it",
    "learning_rate": "Learning rate the optimizer used",
}
ATTENTION = {
    "attention_diag": "attention_diag, the weakest of the three",
    "diagonality": "Diagonality: mass near the diagonal, chance removed",
    "focus": "Focus: largest weight per frame",
    "coverage": "Coverage: largest weight per token",
}
_MAX_POINTS = 1200
_SMOOTH_FROM = 120
_LOG_FROM = 8.0  # a curve that spans this factor reads better on a log axis


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart: ``alt`` says in words what it shows, ``note`` (below it) what the eye would miss."""

    title: str
    unit: str
    alt: str
    note: str
    spec: Mapping[str, Any]


def curve_panel(arms: Sequence[ArmData], name: str, title: str, last_step: float) -> Panel | None:
    """All arms' curves of one name on one pair of axes; None when no arm has a value."""
    curves = [arm.curve(name) for arm in arms]
    finite = [v for curve in curves for v in curve.values if math.isfinite(v)]
    if not any(curve.points for curve in curves):
        return None
    share = name in ATTENTION
    log = not share and bool(finite) and min(finite) > 0 and max(finite) / min(finite) >= _LOG_FROM
    traces: list[dict[str, Any]] = []
    for index, (arm, curve) in enumerate(zip(arms, curves, strict=True)):
        traces += _lines(curve, clean(arm.label), index, min(finite, default=0.0))
    layout = _layout(last_step, "log" if log else "linear")
    if log:
        layout["yaxis"] |= _log_ticks(finite)
    if share:
        layout["yaxis"]["range"] = [-0.02, 1.02]
    if name == "attention_diag":
        layout["shapes"] = [_level(limit) for limit in PHASE_LIMITS]
    notes = ["log axis"] if log else []
    notes += ["dotted lines: phase limits"] if name == "attention_diag" else []
    notes += ["thick: running mean"] if any(len(c.points) >= _SMOOTH_FROM for c in curves) else []
    notes += [_gaps(arm, curve) for arm, curve in zip(arms, curves, strict=True) if curve.not_finite]
    missing = [clean(arm.label) for arm, curve in zip(arms, curves, strict=True) if not curve.points]
    notes += [f"nothing from {', '.join(missing)}"] if missing else []
    said = [_ends(arm, curve) for arm, curve in zip(arms, curves, strict=True) if curve.points]
    return Panel(title, "", f"{title}. " + " ".join(said), "; ".join(notes), {"data": traces, "layout": layout})


def knob_panels(arm: ArmData, index: int, last_step: float) -> tuple[list[Panel], list[str]]:
    """A panel for each knob that moved, and the others in words (``grad_clip 100``)."""
    panels, still = [], []
    bands = [_band(run.phase, run.first, run.last) for run in phase_runs(arm.journal)]
    marks = [_mark(step) for step in rollback_steps(arm.journal)]
    for knob, points in knob_series(arm.journal).items():
        values = [value for _, value in points if math.isfinite(value)]
        if not values or not is_seen(min(values), max(values)):
            still.append(f"{clean(knob)} {knob_text(points[-1][1])}")
            continue
        curve = Curve(points)
        layout = _layout(last_step, "log", height=190)
        layout["shapes"] = bands + marks
        layout["yaxis"] |= _log_ticks(values)
        unit = KNOBS[knob].unit if knob in KNOBS else "unknown unit"
        alt = f"{clean(knob)}, {unit}. {_ends(arm, curve)}"
        trace = _trace(curve.steps, curve.values, clean(arm.label), index) | {
            "line": {"color": _colour(index), "width": 2, "shape": "hv"}
        }
        gaps = _gaps(arm, curve) if curve.not_finite else ""
        panels.append(Panel(clean(knob), unit, alt, gaps, {"data": [trace], "layout": layout}))
    return panels, still


def rollback_steps(records: Sequence[Record]) -> list[int]:
    """Steps at which the run went back to a snapshot."""
    decided = {step_of(r) for r in decisions(records) if r.get("verdict") == "roll_back"}
    return sorted(decided | {step_of(r) for r in records if r.get("event") == "rollback"})


def phase_number(phase: str) -> int | None:
    """0 … 3, None for a phase nobody knows."""
    names = [known.value for known in TrainingPhase]
    return names.index(phase) if phase in names else None


def last_step(arms: Sequence[ArmData]) -> float:
    """The right end of every x axis."""
    steps = [float(step_of(record)) for arm in arms for record in arm.journal]
    steps += [s for arm in arms for name in (*LOSSES, *ATTENTION) for s in arm.curve(name).steps if math.isfinite(s)]
    return max(steps, default=1.0) or 1.0


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Centred mean over ``width`` values, blind to those that are not finite; NaN where none is."""
    raw = np.asarray(values, dtype=np.float64)
    good = np.isfinite(raw)
    kernel = np.ones(width)
    sums = np.convolve(np.where(good, raw, 0.0), kernel, mode="same")
    counts = np.convolve(good.astype(np.float64), kernel, mode="same")
    return [float(v) for v in np.where(good & (counts > 0.5), sums / np.maximum(counts, 1.0), np.nan)]


def thin(points: Sequence[tuple[float, float]], limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about ``limit`` points: of each stretch the lowest, the highest, and one gap if there is any."""
    if len(points) <= limit:
        return list(points)
    kept: list[tuple[float, float]] = []
    size = math.ceil(2 * len(points) / limit)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [p for p in part if math.isfinite(p[1])]
        gap = next((p for p in part if not math.isfinite(p[1])), None)
        chosen = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else set()
        kept += sorted(chosen | ({gap} if gap else set()), key=lambda p: p[0])
    return kept


def _lines(curve: Curve, label: str, index: int, floor: float) -> list[dict[str, Any]]:
    if not curve.points:
        return []
    many = len(curve.points) >= _SMOOTH_FROM
    thinned = Curve(thin(curve.points))
    traces = [_trace(thinned.steps, thinned.values, label, index)]
    if many:
        traces[0] |= {"line": {"color": _colour(index), "width": 1}, "opacity": 0.3, "hoverinfo": "skip"}
        smooth = running_mean(curve.values, max(5, len(curve.points) // 40))
        mean = Curve(thin(list(zip(curve.steps, smooth, strict=True)), _MAX_POINTS // 4))
        traces.append(_trace(mean.steps, mean.values, label, index))
    elif len(curve.points) < 40:
        traces[0] |= {"mode": "lines+markers", "marker": {"size": 6, "symbol": index, "color": _colour(index)}}
    if curve.not_finite:
        steps = curve.not_finite[:50]
        marker = {"symbol": "x", "size": 8, "color": _colour(index)}
        lost = {"type": "scatter", "mode": "markers", "x": steps, "y": [floor] * len(steps), "marker": marker}
        traces.append(lost | {"hovertemplate": f"{html.escape(label)}: not finite at step %{{x}}<extra></extra>"})
    return traces


def _trace(steps: Sequence[float], values: Sequence[float], label: str, index: int) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": html.escape(label),
        "x": [_finite(step) for step in steps],
        "y": [_finite(value) for value in values],
        "line": _line(index),
        "hovertemplate": f"%{{y:.4~g}} at step %{{x}}<extra>{html.escape(label)}</extra>",
    }


def _finite(value: float) -> float | None:
    """Six digits are more than a screen shows; None makes a gap."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _line(index: int) -> dict[str, Any]:
    return {"color": _colour(index), "width": 2, "dash": DASHES[index % len(DASHES)]}


def _colour(index: int) -> str:
    return f"var(--arm{index % ARM_COLOURS})"


def _layout(last: float, scale: str, height: int = 250) -> dict[str, Any]:
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True}
    return {
        "height": height,
        "margin": {"l": 44, "r": 10, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "var(--ink)"},
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}},
        "showlegend": False,
        "xaxis": axis | {"title": {"text": "optimizer step", "standoff": 6}, "range": [0, last * 1.01], "nticks": 6},
        "yaxis": axis | {"type": scale, "nticks": 6},
    }


def _log_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Range and a handful of ticks (plotly's own crowd a log axis): 1-2-5 steps, or the ends of a short range."""
    low, high = min(values), max(values)
    pad = 0.08 * math.log10(high / low) + 0.01
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 30 else (1, 3) if high / low < 300 else (1,)
    ticks = [d * 10.0**e for e in decades for d in digits if low / 1.05 <= d * 10.0**e <= high * 1.05]
    if len(ticks) < 3:
        ticks = [low, math.sqrt(low * high), high]
    return {
        "range": [math.log10(low) - pad, math.log10(high) + pad],
        "tickvals": ticks,
        "ticktext": [knob_text(t, 3 if high / low < 1.5 else 2) for t in ticks],
    }


def _level(value: float) -> dict[str, Any]:
    line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": value, "y1": value, "line": line, "layer": "below"}


def _band(phase: str, first: float, last: float) -> dict[str, Any]:
    index = phase_number(phase)
    fill = f"var(--phase{index})" if index is not None else "rgba(0,0,0,0)"
    place = {"xref": "x", "yref": "paper", "x0": first, "x1": last, "y0": 0, "y1": 1}
    return {"type": "rect", "layer": "below", "fillcolor": fill, "line": {"width": 0}} | place


def _mark(step: float) -> dict[str, Any]:
    line = {"color": "var(--alarm)", "width": 2, "dash": "dash"}
    return {"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1, "line": line}


def _gaps(arm: ArmData, curve: Curve) -> str:
    lost = curve.not_finite
    return f"× {clean(arm.label)}: {count(len(lost), 'value')} not finite, the first at step {number_text(lost[0])}"


def _ends(arm: ArmData, curve: Curve) -> str:
    first, last = curve.values[0], curve.values[-1]
    return f"{clean(arm.label)}: {number_text(first)} at first, {number_text(last)} at last."


def phase_words(records: Sequence[Record]) -> list[tuple[str, int, int]]:
    """Phases in order as (words, first step, last step)."""
    return [(phase_text(run.phase), run.first, run.last) for run in phase_runs(records)]
