"""Two real processes over gloo, through ESPnet's own distributed options: one brain, not two."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import torch
from espnet_run import Data, Run, assert_finite, assert_same, quick, write_config
from processes import run_both
from test_espnet_runs import with_nan

TIMEOUT_S = 280


def knobs(folder: Path, rank: int) -> list[dict[str, Any]]:
    return json.loads((folder / f"knobs{rank}.json").read_text())


@pytest.fixture(scope="module")
def runs(espnet_data: Data, module_folder: Path) -> dict[str, Path]:
    """All runs in one pair of processes: starting ESPnet takes longer than training."""
    data = with_nan(espnet_data, module_folder / "data", 1)
    good = espnet_data.config()["valid_data_path_and_name_and_type"]
    brain = {"brain": True, "brain_conf": quick(), "batch_size": 4}
    config = espnet_data.config(max_epoch=4, **brain)
    spoilt = data.config(max_epoch=4, valid_data_path_and_name_and_type=good, **brain)
    plan = [
        {"name": "well", "config": config},
        {"name": "resumed", "config": {**config, "max_epoch": 2}},
        {"name": "resumed", "config": config, "more": ["--resume", "true"]},
        {"name": "nan", "config": spoilt},
        {"name": "fault", "config": config, "fault": {"rank": 1, "step": 4, "kind": "raises"}},
        {"name": "differs", "config": config, "fault": {"rank": 0, "step": 6, "kind": "differs"}},
    ]
    for number, run in enumerate(plan):
        run["out"] = str(module_folder / run["name"])
        run["config"] = str(write_config(module_folder / f"config{number}", run["config"]))
        Path(run["out"]).mkdir(exist_ok=True)
    file = module_folder / "plan.json"
    file.write_text(json.dumps(plan))
    run_both("espnet_rank.py", "2", str(file), folder=module_folder, timeout_s=TIMEOUT_S)
    return {run["name"]: Path(run["out"]) for run in plan}


def assert_in_step(folder: Path, *, steps: int) -> list[dict[str, Any]]:
    """Knobs and multipliers of both ranks are the same at every step, and so are the weights at the end."""
    first, second = knobs(folder, 0), knobs(folder, 1)
    assert len(first) == steps
    assert first == second
    assert_same(*(dict(torch.load(folder / f"model{rank}.pth")) for rank in (0, 1)))
    return first


def test_both_ranks_hold_the_same_knobs_at_every_step(runs: dict[str, Path]) -> None:
    values = assert_in_step(runs["well"], steps=12)
    assert len({value["gate_weight"] for value in values}) > 4, "it moved"
    run = Run(runs["well"] / "exp")
    assert run.records("start")[0]["ranks"] == 2
    assert [d["step"] for d in run.records("decision")] == [2, 4, 6, 8, 10, 12]
    # One journal, and in it the whole batch's tokens, not one rank's.
    assert [o["step"] for o in run.records("observation")] == list(range(1, 13))
    assert not run.events("fault") and not run.events("stepped_aside")


def test_resumed_ranks_go_on_in_step(runs: dict[str, Path]) -> None:
    assert_in_step(runs["resumed"], steps=6)
    whole, parts = Run(runs["well"] / "exp"), Run(runs["resumed"] / "exp")
    assert [d["step"] for d in parts.records("decision")] == [d["step"] for d in whole.records("decision")]
    assert not parts.events("resume_failed") and not parts.events("stepped_aside")


def test_a_nan_of_one_rank_is_stepped_over_by_all(runs: dict[str, Path]) -> None:
    assert_in_step(runs["nan"], steps=12)
    run = Run(runs["nan"] / "exp")
    skipped = run.events("skipped_gradient")
    assert len(skipped) == 4, "one batch an epoch"
    assert_finite(run)
    # The rank without the NaN has said what it saw: its loss counts.
    seen = {o["step"]: o for o in run.records("observation")}
    for event in skipped:
        assert seen[event["step"]]["skipped"] and isinstance(seen[event["step"]]["losses"]["mel"], float)


def test_a_fault_of_one_rank_ends_the_brain_on_both(runs: dict[str, Path]) -> None:
    values = assert_in_step(runs["fault"], steps=12)
    assert [value["active"] for value in values] == [True] * 4 + [False] * 8
    run = Run(runs["fault"] / "exp")
    assert "the brain of a rank has failed" in run.events("stepped_aside")[0]["message"]


def test_ranks_that_decide_differently_hold_together(runs: dict[str, Path]) -> None:
    values = assert_in_step(runs["differs"], steps=12)
    assert all(value["active"] for value in values)
    assert values[0] != values[5] and all(value == values[5] for value in values[6:])
    held = [d for d in Run(runs["differs"] / "exp").records("decision") if d["step"] >= 6]
    assert [d["step"] for d in held] == [6, 8, 10, 12]
    assert all(d["verdict"] == "hold" and "did not come to one decision" in d["reason"] for d in held)
