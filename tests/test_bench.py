"""The instrument against itself: what it counts, what it keeps, and that it sees what is there."""

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import numpy as np
import torch
from bench_corpus import BENCHMARKS, TINY_MODEL, tiny_corpus, tiny_setting
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench import figures, overhead, summary
from bench.arms import Brain, Plain
from bench.data import collate, load
from bench.host import Measured, Training
from bench.plans import (
    ARMS,
    AT,
    BLIND,
    BRAINS,
    GRID,
    POPULATIONS,
    arm_name,
    arms_of,
    cells,
    make_arm,
    oracle,
)
from bench.pool import _Worker
from bench.speech import distortion, liveliness
from bench.store import Cell, Store
from tts_brain.corpus import CorpusError

QUICK_BRAIN = {"decide_every": 2, "attention_every": 1, "journal_every": 1}


def trained(tmp_path: Path, arm: Any, seed: int = 0, **setting: Any) -> Training:
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    run = Training(tiny_corpus(), tiny_setting(**setting), seed, folder, model_conf=TINY_MODEL)
    run.run(arm, lambda step, measured: None)
    return run


def without_clock(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("seconds", "aligned_s")}


# The same arm twice, and a worse one.


_TERMS = {"forward_sum": 0.1, "over_speech": True}


@pytest.mark.parametrize("arm", [Plain, lambda: Brain(settings=QUICK_BRAIN), lambda: Plain(**_TERMS)])
def test_the_same_arm_twice_gives_the_same_row(arm: Any, tmp_path: Path) -> None:
    rows = [without_clock(figures.figures(trained(tmp_path, arm()))) for _ in range(2)]
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    assert json.dumps(rows[0]) != json.dumps(without_clock(figures.figures(trained(tmp_path, arm(), seed=1))))


def test_arms_start_from_the_same_weights_and_see_the_same_batches(tmp_path: Path) -> None:
    seen: dict[str, list[list[str]]] = {}
    weights = []
    for name, arm in (("plain", Plain()), ("brain", Brain(settings=QUICK_BRAIN)), ("fast", Plain(rate=3e-3))):
        (tmp_path / name).mkdir()
        run = Training(tiny_corpus(), tiny_setting(), 0, tmp_path / name, model_conf=TINY_MODEL)
        weights.append([p.detach().clone() for p in run.model.parameters()])
        run.spoil = lambda step, batch, name=name: seen.setdefault(name, []).append(batch[0]) or batch
        run.run(arm, lambda step, measured: None)
    assert seen["plain"] == seen["brain"] == seen["fast"] and len(seen["plain"]) == 12
    assert all(torch.equal(a, b) for one in weights[1:] for a, b in zip(weights[0], one, strict=True))


def test_observing_changes_no_figure(tmp_path: Path) -> None:
    host = without_clock(figures.figures(trained(tmp_path, Plain())))
    watched = without_clock(figures.figures(trained(tmp_path, Brain(settings={**QUICK_BRAIN, "mode": "observe"}))))
    assert json.dumps(host) == json.dumps(watched)


def test_an_arm_made_worse_on_purpose_is_seen_as_worse(tmp_path: Path) -> None:
    good, bad = (figures.figures(trained(tmp_path, Plain(rate=r), steps=40)) for r in (1e-2, 1e-5))
    assert bad["l1"] > 1.05 * good["l1"] and bad["mel_loss"] > good["mel_loss"]


def test_measuring_more_often_changes_no_training(tmp_path: Path) -> None:
    often = trained(tmp_path, Plain(), evaluate_every=2, speak_every=2)
    seldom = trained(tmp_path, Plain(), evaluate_every=12, speak_every=12)
    assert [r["loss"] for r in often.trace] == [r["loss"] for r in seldom.trace]


# What is counted.


def measured(values: list[float], every: int = 25) -> list[Measured]:
    return [
        Measured(every * (n + 1), float(n), 1.0, 1.0, {"attention_diag": value, "diagonality": value})
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0.1, 0.6, 0.6, 0.4, 0.5, 0.7, 0.9], 125),
        ([0.6, 0.6, 0.4, 0.6, 0.6], None),
        ([0.5, 0.5, 0.5], 25),
        ([0.9], None),
    ],
)
def test_aligned_is_the_first_of_three_in_a_row(values: list[float], step: int | None) -> None:
    found = figures.aligned_at(measured(values))
    assert (None if found is None else found.step) == step


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([0.6, 0.6, 0.6, 0.2, 0.2, 0.2, 0.2, 0.6], 75),
        ([0.6, 0.6, 0.6, 0.2, 0.6, 0.2, 0.6], 0),
        ([0.2, 0.2, 0.2, 0.2], 0),
        ([0.6, 0.6, 0.6, 0.31], 0),
    ],
)
def test_a_planted_relapse_is_counted(values: list[float], steps: int) -> None:
    assert figures.relapse(measured(values)) == steps
    assert figures.relapsed({"relapse_steps": steps}) is (steps > 50)


def test_interventions_are_moves_of_what_was_used() -> None:
    path = [(1.0, 4.5), (1.0, 4.5), (1.04, 4.5), (1.0, 10.0), (0.5, 8.0), (0.5, 8.0)]
    trace = [{"used_rate": rate, "used_guided": weight} for rate, weight in path]
    assert figures.interventions(trace) == 3  # 4.5 to 10; 1.0 to 0.5 and 10 to 8


def test_gradient_stability_is_of_the_last_fifty() -> None:
    trace = [{"grad_norm": 1000.0}] * 10 + [{"grad_norm": math.exp(n % 2)} for n in range(50)]
    assert figures.gradient_stability(trace) == pytest.approx(np.std([0, 1] * 25, ddof=1))
    assert math.isnan(figures.gradient_stability([{"grad_norm": math.nan}] * 5))


def test_distortion_is_zero_for_the_same_and_free_of_pace_and_loudness() -> None:
    generator = np.random.default_rng(0)
    mel = generator.normal(size=(30, 80))
    assert distortion(mel, mel) == pytest.approx(0.0, abs=1e-9)
    assert distortion(np.repeat(mel, 2, axis=0), mel) == pytest.approx(0.0, abs=1e-9)
    assert distortion(mel + 3.0, mel) == pytest.approx(0.0, abs=1e-9)
    assert distortion(generator.normal(size=(30, 80)), mel) > 1.0
    assert math.isnan(distortion(np.full((30, 80), np.nan), mel))


def test_liveliness_is_one_for_the_recording_and_the_share_of_its_movement_for_a_blur() -> None:
    mel = np.random.default_rng(0).normal(size=(40, 80))
    blur = mel.mean(axis=0) + 0.2 * (mel - mel.mean(axis=0))
    assert liveliness(np.repeat(mel, 2, axis=0) + 3.0, mel) == pytest.approx(1.0)
    assert liveliness(blur, mel) == pytest.approx(0.2)
    assert liveliness(np.zeros((40, 80)), mel) < 1e-6
    assert math.isnan(liveliness(mel, np.full((30, 80), np.inf)))


# What is kept.


def test_cells_have_stable_keys_and_a_cut_off_row_is_run_again(tmp_path: Path) -> None:
    setting = tiny_setting()
    todo = cells("align", "tiny", setting, range(2), ["default", "brain"])
    assert [(c.seed, c.arm) for c in todo] == [(0, "default"), (0, "brain"), (1, "default"), (1, "brain")]
    assert len({c.key for c in todo}) == 4
    assert todo[0].key == Cell("align", "default", 0, "tiny", dict(reversed(setting.to_dict().items()))).key
    store = Store(tmp_path / "rows.jsonl")
    for cell in todo[:2]:
        store.add(cell, {"l1": math.nan})
    text = store.path.read_text()
    store.path.write_text(text[: len(text) // 2 + 20])  # killed while the second row was written
    assert store.done() == {todo[0].key}
    store.add(todo[1], {"l1": 1.0})
    rows = list(store.rows())
    assert [row["key"] for row in rows] == [cell.key for cell in todo[:2]]
    assert rows[0]["setting"] == setting.to_dict() and rows[1]["l1"] == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=9))
def test_the_interval_holds_the_median_and_lies_within_the_values(values: list[float]) -> None:
    middle, low, high = summary.median_interval(values)
    assert min(values) <= low <= middle <= high <= max(values)
    assert summary.median_interval(values) == (middle, low, high)


def test_of_three_to_five_seeds_the_interval_is_the_range_and_of_more_it_is_narrower() -> None:
    for count in (1, 2, 3, 4, 5):
        values = [float(n) for n in range(count)]
        assert summary.median_interval(values) == (np.median(values), 0.0, count - 1.0)
    _, low, high = summary.median_interval([float(n) for n in range(9)])
    assert 0.0 < low < 4.0 < high < 8.0
    few, many = ([{"arm": "brain", "seed": seed} for seed in range(count)] for count in (3, 6))
    assert summary.caption(few) == "median over seeds (range over seeds)"
    assert summary.caption([*few, *many]).startswith("median over seeds (90 % bootstrap interval; of 5 seeds or fewer")


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, None])
def test_what_is_not_finite_counts_as_the_worst(broken: float | None) -> None:
    assert summary.median_interval([0.5, broken, 0.6]) == (0.6, 0.5, math.inf)
    assert summary.median_interval([0.5, broken, 0.6], -math.inf) == (0.5, -math.inf, 0.6)
    assert summary.cell([0.5, broken, 0.6], higher_is_better=False) == "0.600 (0.500–∞), 1 of 3 not finite"
    assert summary.cell([0.5, broken, 0.6], higher_is_better=True) == "0.500 (−∞–0.600), 1 of 3 not finite"
    assert summary.cell([broken, broken, 0.6], higher_is_better=False) == "– (2 of 3 not finite)"
    assert summary.cell([broken], higher_is_better=True) == "– (1 of 1 not finite)"
    # Of more seeds it is drawn, and an end may be infinite, but never NaN.
    nine = [float(n) for n in range(8)] + [broken]
    middle, low, high = summary.median_interval(nine)
    assert math.isfinite(middle) and math.isfinite(low) and not math.isnan(high)
    most = [0.0, 1.0, 2.0, 3.0, *[broken] * 5]
    assert summary.median_interval(most)[0] == math.inf and not math.isnan(summary.median_interval(most)[1])


def test_a_broken_arm_stands_last_in_the_table_and_says_so() -> None:
    common = {"setting": {"steps": 100}, "seconds": 5.0, "relapse_steps": 0, "gradient_stability": 0.1, "speaks": 0.0}
    common |= {"aligned_step": None, "aligned_s": None, "mcd": 8.0, "attention_diag": 0.4}
    rows = [common | {"arm": "broken", "l1": l1} for l1 in (0.1, math.nan, math.nan)]
    rows += [common | {"arm": "poor", "l1": 9.0, "attention_diag": value} for value in (0.9, math.nan, 0.8)]
    head, *body = summary.table(rows)
    assert [line[0] for line in body] == ["poor", "broken"]
    cells = [dict(zip(head, line, strict=True)) for line in body]
    assert cells[1]["held-out L1"] == "– (2 of 3 not finite)"
    assert cells[0]["attention_diag"] == "0.800 (−∞–0.900), 1 of 3 not finite"


def test_every_column_says_which_way_is_better() -> None:
    higher = summary._HIGHER_IS_BETTER
    assert higher <= {*summary.COLUMNS, *summary.AUTOFIX}
    assert not higher & {"held-out L1", "MCD dB", "steps to aligned", "final loss", "relapse steps"}


def shown(benchmark: str, rows: list[dict[str, Any]], folder: Path) -> tuple[str, str]:
    """What the table's file and the terminal say."""
    console = Console(file=io.StringIO(), width=200)
    summary.show(benchmark, rows, folder / "table.md", console)
    return (folder / "table.md").read_text(), console.file.getvalue()


def test_a_table_with_several_versions_of_the_brain_says_so(tmp_path: Path) -> None:
    common = {"setting": {"steps": 100}, "seconds": 5.0, "relapse_steps": 0, "gradient_stability": 0.1, "speaks": 0.0}
    common |= {"aligned_step": None, "aligned_s": None, "mcd": 8.0, "attention_diag": 0.4, "l1": 1.0}
    codes = {"brain": "aaa", "brain at static g1 lr0.002": "bbb", "brain without rate": None, "default": "ccc"}
    rows = [
        common | {"arm": arm, "seed": 0, "versions": {"python": "3"} | ({"code": code} if code else {})}
        for arm, code in codes.items()
    ]
    said = "The rows of the brain are of 3 versions of its code (rows of each): aaa (1), bbb (1), older, unnamed (1)."
    for text in shown("align", rows, tmp_path):
        assert said in text
    assert shown("align", rows, tmp_path)[0].splitlines()[-1] == said
    # One version, or the other arms' alone: nothing to say.
    for some in ([rows[0], rows[3]], [rows[2]], rows[3:]):
        assert all("version" not in text for text in shown("align", some, tmp_path))
    assert "Median over seeds (range over seeds)." in shown("align", rows, tmp_path)[0]


def test_the_table_counts_never_as_twice_the_budget() -> None:
    common = {"setting": {"steps": 100}, "seconds": 5.0, "relapse_steps": 0, "gradient_stability": 0.1}
    row = {**common, "mcd": 8.0, "attention_diag": 0.4, "speaks": 0.0}
    never = {**row, "arm": "bad", "aligned_step": None, "aligned_s": None, "l1": 0.5}
    soon = {**row, "arm": "good", "aligned_step": 50, "aligned_s": 2.0, "l1": 0.7}
    head, first, second = summary.table([never, soon, {**never, "l1": 0.6}])
    assert (first[0], second[0]) == ("good", "bad")
    assert dict(zip(head, second, strict=True))["steps to aligned"] == "200"
    assert dict(zip(head, second, strict=True))["aligned"] == "0 of 2"
    assert summary.markdown([head, first]).count("\n") == 3


def test_every_arm_of_every_benchmark_is_known() -> None:
    for name in ("align", "autofix150"):
        assert set(arms_of(name)) <= {*ARMS, *POPULATIONS}
    assert set(arms_of("autofix150")) == {"autofix", "default", "brain"}
    assert arms_of("align")[0] == "default" and len(arms_of("align")) == len(set(arms_of("align")))


@pytest.mark.parametrize("said", ["static g30.0 lr1e-2 fs.5", "static g30 lr0.01 fs0.5"])
def test_constants_off_the_grid_have_one_name_and_are_what_it_says(said: str) -> None:
    assert arm_name(said) == "static g30 lr0.01 fs0.5" not in ARMS
    arm, brain = make_arm(arm_name(said)), make_arm(arm_name(AT + said))
    assert isinstance(arm, Plain) and isinstance(brain, Brain)
    assert (arm.guided, arm.rate, arm.forward_sum, arm.over_speech) == (30.0, 0.01, 0.5, False)
    assert (brain.guided, brain.rate, brain.forward_sum) == (30.0, 0.01, 0.5)
    speech = make_arm(arm_name("static g0 lr0.01 speech"))
    assert isinstance(speech, Plain) and (speech.guided, speech.over_speech) == (0.0, True)
    assert all(arm_name(name) == name for name in (*ARMS, *POPULATIONS))
    assert (arm_name("static g1 lr1e-3"), arm_name(AT + "static g1 lr1e-3")) == ("default", "brain")
    assert arm_name("static g-0 lr1") == "static g0 lr1"


def test_seeds_to_tune_on_have_rows_of_their_own() -> None:
    import run

    told = {"model": "small", "name": "noharm", "quick": False}
    places = ((0, "cpu"), (10, "cpu"), (0, "cuda"))  # rows of a GPU compare among themselves
    several = [SimpleNamespace(first_seed=first, device=device, **told) for first, device in places]
    names = [run._rows(args, "x").name for args in several]
    assert names == ["noharm-x.jsonl", "noharm-x-from-seed-10.jsonl", "noharm-x-cuda.jsonl"]
    # Where the oracle is looked for.
    assert len({run._rows(args, "x", "align") for args in several}) == 1


@pytest.mark.parametrize(
    "said",
    [
        "static",
        "static g1",
        "static g1 lr0",
        "static g-1 lr0.1",
        "static g1 lrnan",
        "static g1 lr.1 fsx",
        "none",
        "brain at static g2 lr1 speech",
    ],
)
def test_what_is_no_arm_is_refused_with_what_to_write(said: str) -> None:
    with pytest.raises(KeyError, match=re.escape(repr(said))):
        arm_name(said)
    run = [sys.executable, str(BENCHMARKS / "run.py"), "align", "--arms", said]
    if said in ("static g1 lrnan", "none"):  # one word of each kind through the command
        done = subprocess.run(run, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 2 and f"no arm {said!r}" in done.stderr
        assert "static g300 lr0.01 fs0.5" in done.stderr


def test_the_oracle_is_the_best_constant_and_nothing_else() -> None:
    grid = list(GRID)
    common = {"setting": {"steps": 100}, "l1": 0.5, "relapse_steps": 0}
    rows = [{**common, "arm": grid[0], "aligned_step": step} for step in (None, 40, 60)]
    rows += [{**common, "arm": grid[1], "aligned_step": step} for step in (30, None, None)]
    rows += [{**common, "arm": "brain", "aligned_step": 10}, {**common, "arm": "default", "aligned_step": 10}]
    rows += [{**common, "arm": grid[2], "aligned_step": 10}]  # one seed, and luck
    assert oracle(rows) == grid[0]
    assert AT + oracle(rows) in ARMS
    lost = [{**common, "arm": grid[3], "aligned_step": 10, "relapse_steps": 75} for _ in range(3)]
    assert oracle(rows + lost) == grid[0]
    assert oracle(rows + [{**row, "relapse_steps": 50} for row in lost]) == grid[3]
    with pytest.raises(ValueError, match="run the benchmark 'align' on this corpus first"):
        oracle([row for row in rows if row["arm"] == "default"])


def test_the_oracle_does_not_mix_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import run

    first, second = list(GRID)[:2]
    long = [
        {"arm": first, "l1": 0.5, "relapse_steps": 0, "aligned_step": 300, "setting": {"steps": 500}} for _ in range(3)
    ]
    short = [
        {"arm": second, "l1": 0.5, "relapse_steps": 0, "aligned_step": None, "setting": {"steps": 40}} for _ in range(2)
    ]
    assert summary.of_one_setting([*short, *long]) == (long, 2)
    assert summary.of_one_setting([]) == ([], 0) and summary.of_one_setting(long) == (long, 0)
    with pytest.raises(ValueError, match="2 of the rows are of another setting"):
        oracle([*short, *long])
    # Never within 40 steps counts as 80, which would have won over 300 of 500.
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    (tmp_path / "align-made-up.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*short, *long]))
    arguments = SimpleNamespace(first_seed=0, arms=None, name="noharm", model="small", quick=False, device="cpu")
    assert run._arms(arguments, "made-up") == (first, AT + first)
    assert "rows of other settings left out of" in capsys.readouterr().err


# What grows.


def test_the_session_costs_no_more_after_many_steps() -> None:
    found = overhead.growth(10_000)
    assert len(found["block_s"]) == 10 and found["ratio"] < _GROWS and found["memory_mb"] < _GAINS_MB


_GROWS, _GAINS_MB = 1.8, 5.0


class Stub:
    """A session whose step takes a time and keeps a number of bytes, each of the step's number."""

    wants_attention = True

    def __init__(self, folder: Path, cost: Callable[[int], float], keeps: Callable[[int], int]) -> None:
        self.clock, self.steps, self.kept, self.looked = 0.0, 0, [], 0
        self.cost, self.keeps = cost, keeps
        self.journal = SimpleNamespace(path=folder / "journal")
        self.journal.path.write_bytes(b"x" * 3000)

    def see_attention(self, *_: Any) -> None:
        self.looked += 1

    def after_batch(self, *_: Any, **__: Any) -> None:
        self.steps += 1
        self.clock += self.cost(self.steps)
        self.kept.append(os.urandom(self.keeps(self.steps)))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("steps", [1000, 1009])
@pytest.mark.parametrize(
    ("cost", "keeps", "slower", "larger"),
    [
        (lambda step: 1e-3, lambda step: 0, False, False),
        (lambda step: 1e-3 if step > 100 else 1.0, lambda step: 0, False, False),  # the first block warms up
        (lambda step: 1e-3 * step, lambda step: 0, True, False),
        (lambda step: 1e-3 * (2.0 if step > 600 else 1.0), lambda step: 0, True, False),
        (lambda step: 1e-3, lambda step: 20_000, False, True),
    ],
)
def test_a_planted_growth_is_seen_and_a_flat_session_is_not(
    cost: Callable[[int], float],
    keeps: Callable[[int], int],
    slower: bool,
    larger: bool,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Stub] = []

    def make(model: Any, optimizer: Any, folder: Path) -> Stub:
        made.append(Stub(folder, cost, keeps))
        return made[0]

    monkeypatch.setattr(overhead.time, "process_time", lambda: made[0].clock)
    # What a process holds says little in one that has freed much before.
    monkeypatch.setattr(overhead, "_resident_mb", lambda: sum(map(len, made[0].kept)) / 1e6)
    found = overhead.growth(steps, make)
    assert found["steps"] == made[0].steps == made[0].looked == 1000 and len(found["block_s"]) == 10
    assert (found["ratio"] > _GROWS) is slower and (found["memory_mb"] > _GAINS_MB) is larger
    assert found["journal_bytes_per_step"] == 3.0
    assert found["per_step_ms"] == pytest.approx(1000 * sum(map(cost, range(1, 1001))) / 1000)


def test_growth_over_100000_steps_is_of_blocks_of_10000_and_over_less_than_ten_is_refused() -> None:
    rows = json.loads((BENCHMARKS / "results" / "overhead.json").read_text())["growth"]
    late, early = sorted(rows["block_s"][-3:])[1], sorted(rows["block_s"][1:4])[1]
    assert rows["steps"] // overhead.BLOCKS == 10_000 and len(rows["block_s"]) == overhead.BLOCKS
    assert rows["ratio"] == late / early
    with pytest.raises(ValueError, match="10 blocks of a step or more"):
        overhead.growth(9)


def row(arm: str, seed: int, aligned: int | None, **more: Any) -> dict[str, Any]:
    curve = [[step, 1.0 / step, min(1.0, step / 100)] for step in (25, 50, 75, 100)]
    return {"arm": arm, "seed": seed, "aligned_step": aligned, "curve": curve, "setting": {"steps": 100}, **more}


def test_pictures_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import plot

    rows = tmp_path / "align-made-up.jsonl"
    found = [row("default", 0, None), row("brain", 0, 50), row("brain", 1, 75)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in found))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(rows), "--out", str(tmp_path / "images")])
    assert plot.main() == 0
    made = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert made == ["align-made-up-curves.png", "align-made-up-steps.png"]
    monkeypatch.setattr(sys, "argv", ["plot.py", str(rows), "--arms", "brainy"])
    assert plot.main() == 2 and "no rows of 'brainy'; there are default, brain" in capsys.readouterr().err


def test_the_picture_of_what_was_called_risky(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plot

    file = tmp_path / "components.json"
    said = {"figure": "divergence, runs: went bad, said 5% to 15%", "ours": 0.25, "theirs": 0.1, "note": "4 moves"}
    file.write_text(json.dumps({"parts": {"risk": [said, {**said, "ours": 1.0, "theirs": 0.6, "note": "1 moves"}]}}))
    monkeypatch.setattr(sys, "argv", ["plot.py", str(file), "--out", str(tmp_path / "images")])
    assert plot.main() == 0 and (tmp_path / "images" / "reliability.png").stat().st_size > 10_000
    (panel,) = plot.reliability([said, {**said, "ours": 1.0, "theirs": 0.6, "note": "1 moves"}]).axes
    line, (bars,) = panel.get_lines()[1], panel.collections
    assert list(zip(*line.get_data(), strict=True)) == [(0.1, 0.25), (0.6, 1.0)]
    (_, low), (_, high) = bars.get_paths()[0].vertices
    assert (low, high) == pytest.approx((0.046, 0.651), abs=0.001), "Jeffreys, 1 of 4"
    file.write_text(json.dumps({"parts": {}}))
    assert plot.main() == 2 and "run components --arms risk first" in capsys.readouterr().err


def test_pictures_leave_out_the_brains_ablations_and_rows_of_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import plot

    ablations = ("brain without rate", "brain with bare phases", "brain without filter", "brain without lengths")
    others = [*ablations, "brain at static g1 lr0.002", "default", "brain", *(f"static {n}" for n in range(9))]
    groups = summary.by_arm(row(arm, 0, 25 * n) for n, arm in enumerate(others))
    picked = plot._shown(groups)
    assert picked[:2] == ["brain", "default"] and not set(picked) & set(ablations) and len(picked) == 7
    assert "brain at static g1 lr0.002" in picked
    assert all(arm.startswith("brain with") for arm in ARMS if arm in {*BRAINS, *BLIND} and arm != "brain")

    rows = tmp_path / "align-made-up.jsonl"
    found = [row("default", 0, None), row("brain", 0, 50), row("brain", 0, 75) | {"setting": {"steps": 50}}]
    rows.write_text("".join(json.dumps(r) + "\n" for r in found))
    drawn: list[dict[str, Any]] = []
    monkeypatch.setattr(plot, "curves", lambda groups, draw=plot.curves: (drawn.append(groups), draw(groups))[1])
    monkeypatch.setattr(sys, "argv", ["plot.py", str(rows), "--out", str(tmp_path / "images")])
    assert plot.main() == 0 and "rows of other settings than the commonest left out: 1" in capsys.readouterr().err
    assert [r["aligned_step"] for r in drawn[0]["brain"]] == [50]


def test_the_rescue_table_counts_against_each_arms_own_clean_run() -> None:
    good = {"curve": [[25, 1.0, 0.6]] * 3, "l1": 0.5, "l1_postnet": 0.5}
    bad = {**good, "curve": [[25, 1.0, 0.1]] * 3}
    rows = [
        row("default", 0, None, start="") | bad,
        row("brain", 0, 25, start="", named=["exploding batch"], told=False) | good,
        row("default", 0, None, start="rate-x10") | bad,
        row("brain", 0, 25, start="rate-x10", named=["rate too high"], told=True) | good,
        row("brain", 0, 25, start="nan-once", named=[], told=False) | {**good, "l1": 0.6},
        row("brain", 0, 25, start="nan-clip", named=["non-finite data", "rate too high"], told=True) | good,
        # Both causes of a combination are true.
        row("brain", 0, 25, start="rate-x10+guided-0", named=["guidance off"], told=False) | good,
    ]
    assert summary.rescue_table(rows) == [
        ["bad start", "default", "brain", "cause told", "false causes"],
        ["clean", "–", "–", "–", "1 of 1"],
        ["rate-x10", "0 of 1", "1 of 1", "1 of 1", "0 of 1"],
        ["nan-once", "–", "0 of 1", "0 of 1", "0 of 1"],
        ["nan-clip", "–", "1 of 1", "1 of 1", "1 of 1"],
        ["rate-x10+guided-0", "–", "1 of 1", "0 of 1", "0 of 1"],
        ["all", "0 of 1", "3 of 4", "2 of 4", "1 of 4"],
    ]


# The corpus and the command.


def test_a_corpus_is_read_split_and_cached_whatever_the_order(corpus: Path, tmp_path: Path) -> None:
    first = load(corpus, min_s=0.3, max_s=9.0, held_out=5, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    lines = (corpus / "metadata.csv").read_text().splitlines()
    other = tmp_path / corpus.name
    other.mkdir()
    (other / "wavs").symlink_to(corpus / "wavs")
    (other / "metadata.csv").write_text("\n".join(reversed(lines)) + "\n")
    second = load(other, min_s=0.3, max_s=9.0, held_out=5, cache=tmp_path)
    assert [c.name for c in first.held_out] == [c.name for c in second.held_out]
    assert len(first.held_out) == 5 and not {c.name for c in first.held_out} & {c.name for c in first.train}
    everything = np.concatenate([c.mel for c in first.train])
    np.testing.assert_allclose(everything.mean(0), 0.0, atol=1e-3)
    np.testing.assert_allclose(everything.std(0), 1.0, atol=1e-3)
    names, batch = collate(first.train[:4])
    assert batch["text_lengths"].tolist() == sorted(batch["text_lengths"].tolist(), reverse=True)
    assert len(names) == 4 and batch["speech"].shape[0] == 4
    with pytest.raises(CorpusError, match="only 0 clips last"):
        load(corpus, min_s=50.0, max_s=60.0, held_out=5, cache=tmp_path)


def command(corpus: Path, folder: Path, *more: str) -> list[str]:
    line = [sys.executable, str(BENCHMARKS / "run.py"), "align", "--quick", "--data", str(corpus), "--jobs", "1"]
    return [*line, "--steps", "10", "--arms", "default,brain", "--json", str(folder / "rows.jsonl"), *more]


def test_a_killed_benchmark_goes_on_with_what_is_missing(corpus: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    line = command(corpus, tmp_path, "--max-seconds", "9")
    rows = tmp_path / "rows.jsonl"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(line, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while not rows.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
        first.wait(60)
    assert rows.read_text().count("\n") == 1, (tmp_path / "first.log").read_text()[-2000:]
    second = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "2 cells, 1 done, 1 to run" in second.stdout
    found = [json.loads(text) for text in rows.read_text().splitlines()]
    assert [row["arm"] for row in found] == ["default", "brain"]
    assert all({"versions", "setting", "seed", "data", "l1", "mcd", "liveliness"} <= set(row) for row in found)


@pytest.mark.parametrize(
    ("more", "says"),
    [(["--arms", "brainy"], "no arm 'brainy'; known are:"), (["--data", "nowhere"], "nowhere does not exist")],
)
def test_bad_input_is_explained(
    more: list[str],
    says: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import run

    monkeypatch.setattr(sys, "argv", [*command(corpus, tmp_path)[1:], *more])
    assert run.main() == 2
    assert says in capsys.readouterr().err


def test_some_of_the_bad_starts_can_be_named() -> None:
    import run

    known = ("a", "b", "c")
    assert run._starts(SimpleNamespace(starts="c, a", quick=False), known) == ["c", "a"]
    assert run._starts(SimpleNamespace(starts=None, quick=False), known) == list(known)
    with pytest.raises(run.Refused, match="no bad start 'd'; known are:\n  a"):
        run._starts(SimpleNamespace(starts="a,d", quick=False), known)


def test_what_is_timed_at_coqui_is_there() -> None:
    pytest.importorskip("TTS", reason="Coqui is not installed: uv pip install 'tts-brain[coqui]'")
    import brain_cost

    from tts_brain.pytorch.session import BrainSession
    from tts_brain_coqui.adapter import CoquiAdapter
    from tts_brain_coqui.criterion import CriterionTap

    timed = [name for _, names in brain_cost.TIMED for name in names]
    assert all(any(hasattr(owner, name) for owner in (CoquiAdapter, BrainSession, CriterionTap)) for name in timed)


def test_rows_say_which_brain_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tts_brain
    from bench.worker import code

    before = code()
    assert len(before) == 12 and code() == before
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "one.py").write_text("RAISE = 2.0\n")
    monkeypatch.setattr(tts_brain, "__file__", str(tmp_path / "__init__.py"))
    other = code()
    (tmp_path / "agents" / "one.py").write_text("RAISE = 3.0\n")
    assert len({before, other, code()}) == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused_before_a_cell_runs(tmp_path: Path) -> None:
    run = [sys.executable, str(BENCHMARKS / "run.py"), "align", "--device", "cuda", "--json", str(tmp_path / "rows")]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "torch sees no GPU here; write --device cpu" in done.stderr


@pytest.mark.parametrize(("device", "unseen"), [("cpu", True), ("cuda", False)])
def test_only_cells_of_the_processor_do_not_see_a_gpu(
    device: str, unseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    started: list[Any] = []

    def start(*args: Any, **kwargs: Any) -> Any:
        started.append(kwargs["env"])
        return SimpleNamespace(stderr=())

    monkeypatch.setattr("bench.pool.subprocess.Popen", start)
    _Worker(None)._started(device)  # type: ignore[arg-type]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in started] == ["" if unseen else "3"]


def test_parts_that_know_no_gpu_refuse_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "identity", "--device", "cuda"])
    assert run.main() == 2
    assert "identity runs on the processor: leave out --device" in capsys.readouterr().err


def test_populations_stay_on_the_processor() -> None:
    import run

    asked = {"name": "align", "quick": False, "device": "cuda"}
    with pytest.raises(run.Refused, match="pbt run on the processor, not on cuda"):
        run._arms(SimpleNamespace(arms="brain,pbt 1x", **asked), "kathleen-en-us")
    arms = run._arms(SimpleNamespace(arms=None, **asked), "kathleen-en-us")
    assert "brain" in arms and not any(arm.startswith("pbt") for arm in arms)


def test_a_table_says_where_its_rows_were_trained() -> None:
    assert summary.devices([{}, {"device": "cpu"}]) == ""
    assert (
        summary.devices([{}, {"device": "cuda"}, {"device": "cpu"}])
        == "Where the models trained (rows of each): cpu (2), cuda (1)."
    )


def test_an_unknown_part_of_overhead_is_refused() -> None:
    run = [sys.executable, str(BENCHMARKS / "run.py"), "overhead", "--arms", "memory"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "growth, espnet, coqui" in done.stderr


@pytest.mark.parametrize("eye", ["filter", "scales", "phases", "forecasts"])
def test_a_blindfolded_brain_decides_without_that_eye_and_trains(eye: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looked(Brain):
        def attach(self, run: Training) -> None:
            super().attach(run)
            manager = self.adapter.session.manager
            see = manager.context
            manager.context = lambda: (seen.append(see()), seen[-1])[1]

    run = Training(tiny_corpus(), tiny_setting(steps=24), 0, tmp_path, TINY_MODEL)
    run.run(Looked(settings={"decide_every": 4, "attention_every": 2}, blind=eye), lambda *_: None)
    assert len(seen) >= 6 and len(run.trace) == 24
    last = seen[-1]
    assert (last.filtered == {} and last.effects == {}) is (eye == "filter")
    assert (last.scales == {}) is (eye == "scales")
    assert (max(last.phase_posterior) == last.certainty == 1.0) is (eye == "phases")
    assert (last.forecast is None) is (eye == "forecasts")
