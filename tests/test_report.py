"""The HTML report: one well-formed file that needs nothing else, whatever the run looked like."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import wave
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

go = pytest.importorskip("plotly.graph_objects")
from PIL import Image  # noqa: E402

from tts_brain.report import html as html_module  # noqa: E402
from tts_brain.report.data import AlignmentPicture, ArmData, AudioClip, ReportData, TableRow  # noqa: E402
from tts_brain.report.figures import curve_panel, knob_panels, thin  # noqa: E402
from tts_brain.report.gallery import evenly  # noqa: E402
from tts_brain.report.html import render, write_report  # noqa: E402
from tts_brain.report.media import alignment_png, sound_wav  # noqa: E402
from tts_brain.report.page import best_arms, body  # noqa: E402
from tts_brain.report.story import knob_series, tally  # noqa: E402
from tts_brain.types import KNOBS  # noqa: E402

HOSTILE = "<script>alert('x')</script> & \"quotes\" ' \x1b[31m \ud800 </style>"
VOID = {"meta", "br", "img", "link", "hr"}


# ---- made-up runs --------------------------------------------------------------------------------------------------


def journal(steps: int = 600, *, finished: bool = True, reason: str = "gradients calm") -> list[dict[str, Any]]:
    """A run that aligns, with one undo, a NaN and a rollback in it."""
    knobs = {knob.name: 1.0 for knob in KNOBS.values()} | {"guided_weight": 0.05, "grad_clip": 100.0}
    records: list[dict[str, Any]] = [
        {"kind": "start", "step": 0, "host": "coqui", "mode": "full", "config": {"seed": 0, "decide_every": 10}}
        | {"versions": {"tts_brain": "0.1.0", "torch": "2.8"}}
    ]
    for step in range(10, steps + 1, 10):
        diag = 0.9 / (1 + math.exp(-(step - 300) / 60))
        phase = ("pre_alignment", "alignment_learning", "refinement", "convergence")[
            sum(diag >= x for x in (0.1, 0.5, 0.7))
        ]
        losses = {"total": "nan" if step == 410 else 3 / step**0.3, "mel": "inf" if step == 410 else 1 / step**0.3}
        records.append({"kind": "observation", "step": step, "losses": losses, "attention": {"attention_diag": diag}})
        before = dict(knobs)
        verdict = {30: "accept", 90: "accept", 130: "undo", 240: "accept", 420: "roll_back", 500: "accept"}.get(
            step, "hold"
        )
        if verdict == "accept":
            knobs["learning_rate"] *= 1.5
            knobs["guided_weight"] *= 1.35 if step < 200 else 0.8
            knobs["gate_weight"] *= 0.9
        elif verdict in ("undo", "roll_back"):
            knobs["learning_rate"] /= 1.5
        proposals = [
            {"agent": "learning_rate", "moves": {"learning_rate": knobs["learning_rate"]}, "reason": reason}
            | {"evidence": {"slope_z": -4.2, "noise": "nan"}},
            {"agent": "guided_attention", "moves": {}, "reason": "alignment grows by itself", "evidence": {}},
        ]
        records.append(
            {"kind": "decision", "step": step, "verdict": verdict, "phase": phase, "before": before}
            | {"after": dict(knobs), "proposals": proposals, "evidence": {"risk": 0.12, "votes": 3}, "applied": True}
            | {"reason": f"mel loss falls steadily (z −4.2), {reason}" if verdict != "hold" else "nothing to gain"}
        )
        if step == 410:
            records += [
                {"kind": "event", "step": s, "event": "skipped_gradient", "message": "gradient norm is inf"}
                for s in (411, 412, 413)
            ]
        if step == 420:
            records.append({"kind": "event", "step": step, "event": "rollback", "message": "restored step 400"})
    if finished:
        records.append({"kind": "end", "step": steps, "message": "all steps done"})
    return records


@pytest.mark.parametrize(
    ("restored", "sentence"),
    [
        (None, "4 moves: 4 kept, 0 taken back; 1 rollback"),
        (25, "4 moves: 3 kept, 1 taken back; 1 rollback"),
        (10, "4 moves: 2 kept, 2 taken back; 1 rollback"),
    ],
)
def test_a_rollback_takes_back_the_moves_that_it_goes_behind(restored: int | None, sentence: str) -> None:
    def decided(step: int, verdict: str) -> dict[str, Any]:
        values = {"before": {"learning_rate": 1.0}, "after": {"learning_rate": float(step)}}
        return {"kind": "decision", "step": step, "verdict": verdict, "applied": True, **values}

    event = {"kind": "event", "step": 40, "event": "rollback", "restored": restored, "knobs": {"learning_rate": 0.5}}
    records = [decided(10, "accept"), decided(20, "accept"), decided(30, "accept"), decided(40, "roll_back"), event]
    records.append(decided(50, "accept"))
    assert tally(records).sentence().startswith(sentence)
    assert knob_series(records)["learning_rate"][-2:] == [(40.0, 0.5), (50.0, 50.0)]


def alignment(frames: int, tokens: int, sharpness: float) -> np.ndarray:
    """Attention rows around the diagonal, shape (frames, tokens)."""
    where = np.linspace(0, 1, frames)[:, None] - np.linspace(0, 1, tokens)[None]
    weights = np.exp(-((sharpness * where) ** 2)) + 0.02
    return weights / weights.sum(axis=1, keepdims=True)


def arm(name: str, label: str, *, steps: int = 600, speed: float = 1.0, brain: bool = True) -> ArmData:
    noise = np.random.default_rng(len(name))
    every = range(1, steps + 1)
    mel = [(s, float(0.4 + 4 / (1 + speed * s / 20) + 0.05 * noise.standard_normal())) for s in every]
    if brain:
        mel[409] = (410, math.nan)
    grid = range(50, steps + 1, 50)
    diag = [(s, 0.9 / (1 + math.exp(-(s * speed - 300) / 60))) for s in grid]
    tone = np.sin(np.arange(11025) * 0.1 * speed).astype(np.float32) * 0.3
    return ArmData(
        name,
        label,
        curves={
            "train_mel": mel,
            "held_out_l1": [(s, 0.4 + 1 / (1 + speed * s / 60)) for s in grid],
            "attention_diag": diag,
            "diagonality": [(s, min(1.0, v * 1.05)) for s, v in diag],
            "focus": [(s, v**0.5) for s, v in diag],
            "coverage": diag,
            "learning_rate": [(s, 1e-3 * (1 + 3 * speed * s / steps)) for s in grid],
        },
        alignments=[
            AlignmentPicture(s, "LJ001-0002", "in being comparatively modern.", alignment(180, 31, 0.1 + 30 * v))
            for s, v in diag
        ],
        audio=[AudioClip("Held-out sentence 1", "She said so.", tone, 22050)],
        journal=journal(steps) if brain else [],
        summary={"parameters": 1_200_000, "corpus": "LJ Speech"},
    )


def two_arms() -> ReportData:
    plain, brain = arm("plain", "Coqui alone", brain=False, speed=0.6), arm("brain", "Coqui with tts-brain")
    return ReportData(
        "Tacotron 2 on LJ Speech, with and without tts-brain",
        "Two runs with the same seed, data and model. One is steered.\n\nThe numbers are from held-out sentences.",
        [plain, brain],
        [
            TableRow("Steps until aligned", "steps", {"plain": "never", "brain": 400}, "lower"),
            TableRow("Held-out mel L1", "log amplitude", {"plain": 0.61, "brain": 0.5}, "lower"),
            TableRow("Sentences that end by themselves", "%", {"plain": 20, "brain": 95}, "higher"),
            TableRow("Time per step", "ms", {"plain": 412.2, "brain": 413.1}, "lower"),
            TableRow("Final total loss", "", {"plain": math.nan, "brain": 1.25}, "lower"),
            TableRow("Device", "", {"plain": "CPU", "brain": "CPU"}),
        ],
        ["Both runs used one thread."],
    )


def hostile() -> ReportData:
    """Text that would break a page, values that are no numbers, pictures and sounds with nothing in them."""
    nan_matrix = np.full((20, 5), np.nan)
    return ReportData(
        HOSTILE,
        HOSTILE,
        [
            ArmData(
                HOSTILE,
                HOSTILE,
                curves={"train_mel": [(1, math.nan), (2, math.inf), (3, -math.inf)], "focus": [(5, 0.5)]},
                alignments=[
                    AlignmentPicture(1, HOSTILE, HOSTILE, nan_matrix),
                    AlignmentPicture(2, HOSTILE, HOSTILE, np.zeros((0, 4))),
                ],
                audio=[
                    AudioClip(HOSTILE, HOSTILE, np.array([np.nan, 5.0, -5.0], dtype=np.float32), 16000),
                    AudioClip(HOSTILE, HOSTILE, np.zeros(0, dtype=np.float32), 16000),
                ],
                journal=[
                    *journal(430, finished=False, reason=HOSTILE),
                    {"kind": "decision", "step": "nan", "verdict": HOSTILE, "phase": HOSTILE, "before": {HOSTILE: 1}}
                    | {"after": {HOSTILE: "nan"}, "reason": HOSTILE},
                    {"kind": "event", "step": 440, "event": HOSTILE, "message": HOSTILE},
                    {"kind": "event"},
                    {"kind": "decision"},
                ],
                summary={HOSTILE: math.nan},
            ),
            ArmData("empty", "Not started"),
        ],
        [(HOSTILE, HOSTILE, {HOSTILE: math.nan}, "lower")],
        [HOSTILE],
    )


# ---- reading the page ----------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags nest and gathers attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.json: list[Any] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            if self.tags[-1][1].get("type") == "application/json":
                self.json.append(json.loads(data))
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(two_arms()))


def test_one_file_without_any_outside_reference(tmp_path: Path) -> None:
    path = write_report(two_arms(), tmp_path / "new" / "report.html")
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert text.count("plotly.js v") == 1
    for tag, attrs in found.tags:
        assert tag not in ("link", "iframe", "base")
        for name in ("src", "href", "srcset", "poster", "data"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "://" not in body(two_arms())
    assert any("default-src 'none'" in (attrs.get("content") or "") for attrs in found.all("meta"))
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(html_module, "body", lambda data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(two_arms(), path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_sections_stand_in_order(page: Page) -> None:
    order = "Results,Losses,Attention,Alignments over time,Knobs,What was decided, and why,Listen,Notes"
    places = [page.text.index(f" {word} ") for word in re.split(",(?! and)", order)]
    assert places == sorted(places)
    assert "torch 2.8" in page.text[places[-1] :]


def test_the_better_arm_is_marked_in_words() -> None:
    rows = {row[0]: TableRow(*row) for row in two_arms().table}
    names = ["plain", "brain"]
    assert best_arms(rows["Steps until aligned"], names) == {"brain"}
    assert best_arms(rows["Sentences that end by themselves"], names) == {"brain"}
    assert best_arms(rows["Time per step"], names) == {"plain"}
    assert best_arms(rows["Final total loss"], names) == set()
    assert best_arms(rows["Device"], names) == set()
    assert best_arms(TableRow("x", "", {"plain": 1, "brain": 1.0}, "lower"), names) == set()
    # Equal as they are shown: a check mark beside one of two equal figures says nothing.
    assert best_arms(TableRow("x", "", {"plain": 4.03511, "brain": 4.03508}, "lower"), names) == set()
    assert best_arms(TableRow("x", "", {"plain": math.inf, "brain": 1.0}, "lower"), names) == {"brain"}
    text = Page(body(two_arms())).text
    assert text.count("✓ better") == 4
    assert "Steps until aligned steps, lower is better never 400 ✓ better" in text


def test_pictures_sounds_and_tables_are_accessible(page: Page) -> None:
    assert len(page.all("img")) == 2 * 6
    assert all("frames by 31 tokens" in (attrs["alt"] or "") for attrs in page.all("img"))
    assert len(page.all("audio")) == 2
    assert all(attrs.get("aria-label") and "controls" in attrs for attrs in page.all("audio"))
    assert all(attrs.get("scope") for attrs in page.all("th"))
    charts = [attrs for attrs in page.all("div") if attrs.get("class") == "chart"]
    assert all("at first" in (attrs["aria-label"] or "") for attrs in charts)


def test_the_story_folds_holds_and_marks_what_broke(page: Page) -> None:
    assert "Held 2 times: nothing to gain" in page.text
    assert "learning_rate 1.00 → 1.50" in page.text
    assert "took back the last move" in page.text
    assert "Event: skipped gradient, 3 times" in page.text
    assert "Event: rollback restored step 400" in page.text
    assert "4 moves: 3 kept, 1 taken back; 1 rollback; 54 holds; 3 skipped gradients" in page.text
    alarms = [attrs for attrs in page.all("li") if attrs.get("class") == "alarm"]
    assert len(alarms) == 3
    assert "Never moved: guided_sigma 1.00, forward_sum_weight" in page.text
    assert "guided_weight host weight / mean text length" in page.text


def test_moves_that_were_only_watched_are_not_counted_as_kept() -> None:
    records = [{**r, "applied": False} if r.get("verdict") == "accept" else r for r in journal()]
    text = Page(body(ReportData("t", "i", [ArmData("a", "A", journal=records)]))).text
    assert "4 moves only watched, none made; 1 rollback" in text and "kept" not in text


def test_charts_are_valid_plotly(page: Page) -> None:
    assert len(page.json) >= 8
    for spec in page.json:
        # plotly's own check knows no CSS variables
        go.Figure(json.loads(re.sub(r"var\(--[a-z0-9]+\)", "red", json.dumps(spec))))


@pytest.mark.parametrize("data", [hostile(), ReportData("", "", []), ReportData("t", "i", [ArmData("a", "A")])])
def test_any_content_gives_a_sound_page(data: ReportData) -> None:
    text = body(data)
    assert "<script>alert" not in text and "</style>" not in text and "\x1b" not in text
    text.encode("utf-8")
    found = Page(text)
    assert found.all("script") == [{"type": "application/json"}] * len(found.json)
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)


def test_hostile_reasons_are_shown_as_text() -> None:
    text = body(hostile())
    assert html.escape("<script>alert('x')</script> & \"quotes\"") in text
    assert "not finite" in text
    assert "no sound came out" in text
    assert "still running, or stopped from outside, at step 440" in text
    assert "No journal: this arm ran without the brain or has not started." in text


def test_a_number_beyond_every_float_is_shown_as_not_finite() -> None:
    records = [{**r, "after": {"learning_rate": 10**400}} if r["kind"] == "decision" else r for r in journal(100)]
    assert "not finite" in body(ReportData("t", "i", [ArmData("a", "A", journal=records)]))


def test_missing_parts_are_named() -> None:
    text = Page(body(ReportData("t", "i", [ArmData("a", "A")]))).text
    for words in (
        "no result table",
        "no arm wrote it",
        "no alignment pictures",
        "nothing to hear",
        "No knob was steered",
    ):
        assert words in text


def test_curves_fall_back_to_the_journal() -> None:
    bare = ArmData("a", "A", journal=journal(100))
    assert bare.curve("train_total").steps == list(range(10, 101, 10))
    assert bare.curve("held_out_l1").points == []
    panel = curve_panel([bare, ArmData("b", "B")], "attention_diag", "T", 100)
    assert panel is not None and "nothing from B" in panel.note


def test_losses_that_pass_zero_get_a_linear_axis() -> None:
    for values, scale in (([5.0, 0.1], "log"), ([5.0, -3.0], "linear"), ([5.0, 4.0], "linear")):
        panel = curve_panel([ArmData("a", "A", curves={"train_mel": list(enumerate(values))})], "train_mel", "T", 1)
        assert panel is not None and panel.spec["layout"]["yaxis"]["type"] == scale


def test_thinning_keeps_extremes_and_gaps() -> None:
    points = [(float(s), math.sin(s)) for s in range(10_000)]
    points[1234] = (1234.0, 99.0)
    points[5678] = (5678.0, math.nan)
    kept = thin(points, 500)
    assert len(kept) <= 501 and (1234.0, 99.0) in kept
    assert [p[0] for p in kept if math.isnan(p[1])] == [5678.0]
    assert kept == sorted(kept, key=lambda p: p[0])


def test_knobs_that_never_moved_get_no_panel() -> None:
    panels, still = knob_panels(arm("brain", "Brain"), 0, 600)
    assert {p.title for p in panels} == {"learning_rate", "guided_weight", "gate_weight"}
    assert "grad_clip 100" in still
    assert all(p.spec["layout"]["yaxis"]["type"] == "log" for p in panels)


def test_a_knob_that_moved_by_a_rounding_gets_no_panel() -> None:
    records = [{**r, "after": {"grad_clip": 1 - 3e-14}} if r["kind"] == "decision" else r for r in journal()]
    records[2] = {**records[2], "before": {"grad_clip": 1.0}}
    assert knob_panels(ArmData("a", "A", journal=records), 0, 600) == ([], ["grad_clip 1.00"])


def test_picture_and_sound_bytes() -> None:
    matrix = np.zeros((3, 2))
    matrix[0, 0] = 1.0
    address = alignment_png(matrix)
    assert address is not None
    image = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("L")
    assert image.size == (3, 2)
    assert image.getpixel((0, 1)) > 200 and image.getpixel((0, 0)) < 10  # first frame, first token: lower left
    sound = sound_wav(np.array([0.0, 2.0, np.nan, -2.0], dtype=np.float32), 8000)
    assert sound is not None
    with wave.open(io.BytesIO(base64.b64decode(sound.split(",")[1]))) as file:
        assert (file.getframerate(), file.getnframes()) == (8000, 4)
        assert list(np.frombuffer(file.readframes(4), "<i2")) == [0, 32767, 0, -32767]


def test_large_pictures_shrink_and_few_columns_are_kept() -> None:
    address = alignment_png(alignment(2000, 400, 30))
    assert address is not None and len(address) < 60_000
    assert evenly(list(range(0, 1000, 10)), 6)[0] == 0
    assert evenly(list(range(0, 1000, 10)), 6)[-1] == 990
    assert len(evenly(list(range(0, 1000, 10)), 6)) == 6
