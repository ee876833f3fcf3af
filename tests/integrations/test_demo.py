"""The demo and the recipe, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("TTS", reason="coqui-tts is not installed")
pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")

from tts_brain.cli import main
from tts_brain.journal import read_journal
from tts_brain_coqui.espeak_corpus import make_corpus

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "coqui" / "ljspeech" / "train_tacotron2.py"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("espeak") / "corpus", clips=24, seed=3)


@pytest.fixture(scope="module")
def demo(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    arguments = ["demo", "--data", str(clips), "--steps", "10", "--batch-size", "2", "--reduction-factor", "7"]
    assert main([*arguments, "--out", str(out), "--json", str(out.parent / "new" / "table.json")]) == 0
    return out


def test_both_arms_start_alike_and_take_the_same_batches(demo: Path):
    first = [json.loads((demo / arm / "train.jsonl").read_text().splitlines()[0]) for arm in ("default", "brain")]
    assert first[0]["mel"] == first[1]["mel"]
    held_out = [json.loads((demo / arm / "held_out.jsonl").read_text().splitlines()[0]) for arm in ("default", "brain")]
    assert held_out[0] == held_out[1]


def test_the_table_is_written(demo: Path):
    result = json.loads((demo.parent / "new" / "table.json").read_text(encoding="utf-8"))
    assert result["settings"]["steps"] == 10
    for arm in result["arms"].values():
        assert arm["steps"] == 10
        assert 0.0 < arm["held_out_l1"] < 10.0
        # Ten steps do not move an untrained batch norm's running statistics to where the clips' own are.
        assert 0.0 < arm["held_out_l1_postnet_fresh"] < 10.0
        assert abs(arm["held_out_l1_postnet_fresh"] - arm["held_out_l1_postnet"]) > 1e-3
        assert 0.0 <= arm["attention_diag"] <= 1.0


def test_the_report_holds_everything_itself(demo: Path):
    page = (demo / "report.html").read_text(encoding="utf-8")
    assert "Coqui&#x27;s defaults" in page or "Coqui's defaults" in page
    assert page.count("data:image/png;base64,") >= 4
    assert page.count("data:audio/wav;base64,") >= 4
    assert 'src="http' not in page


def test_the_brain_wrote_its_decisions(demo: Path, capsys: pytest.CaptureFixture[str]):
    records = list(read_journal(demo / "brain"))
    assert records[0]["kind"] == "start" and records[-1]["kind"] == "end"
    assert [r["step"] for r in records if r["kind"] == "decision"] == [10]
    assert not [r for r in records if r["kind"] == "event"]
    assert main(["explain", str(demo)]) == 0
    assert "step 10" in capsys.readouterr().out


def test_an_earlier_demo_is_kept(demo: Path, tmp_path: Path):
    from tts_brain_coqui.demo import empty_folder

    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "report.html").write_text("mine")
    assert empty_folder(folder) == folder and not any(folder.iterdir())
    assert (tmp_path / "demo.1" / "report.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere/at/all"], "nowhere/at/all"),
        (["--steps", "0"], "whole number of 1 or more"),
        (["--seed", "-1"], "'-1' is not a whole number of 0 or more"),
        (
            ["--batch-size", "22"],
            "holds 24 clips; a batch of 22 and 3 that are held out take 25. Give a corpus",
        ),
        (["--batch-size", "22"], "or write --batch-size 21"),
        (["--out", "/dev/null/demo"], "/dev/null"),
        (["--json", "/dev/null/table.json"], "/dev/null/table.json cannot be written"),
        (["--json", "."], ". cannot be written (Is a directory); give a file, such as"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: list[str],
    message: str,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tts_brain_coqui.demo._train", lambda *_: pytest.fail("training was begun"))
    try:
        status = main(["demo", "--data", str(clips), *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_a_corpus_of_one_clip_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "a.wav").touch()
    (tmp_path / "metadata.csv").write_text("a|One clip.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tts_brain_coqui.demo._train", lambda *_: pytest.fail("training was begun"))
    assert main(["demo", "--data", ".", "--batch-size", "1"]) == 2
    assert "holds 1 clip; a batch of 1 and 2 that are held out take 3. Give a corpus of so many\n" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "demo").exists()


def test_the_recipe_trains_with_one_flag(clips: Path, tmp_path: Path):
    flags = ["batch_size", "4", "eval_batch_size", "2", "r", "7", "epochs", "1", "brain.decide_every", "3"]
    host = [f"--coqpit.{flag}" if i % 2 == 0 else flag for i, flag in enumerate(flags)]
    text = _recipe(["--data", str(clips), "--out", str(tmp_path), *host])
    assert "[brain]" in text
    records = list(read_journal(tmp_path))
    assert records[0]["config"]["decide_every"] == 3
    assert [r for r in records if r["kind"] == "decision"]


def test_the_recipe_goes_on_with_a_run_as_it_was_made(clips: Path, tmp_path: Path):
    """Its r shapes the model; and a brain that is switched off stays off whatever the saved config says."""
    common = ["--data", str(clips), "--out", str(tmp_path)]
    flags = {"batch_size": 8, "eval_batch_size": 2, "r": 7, "epochs": 1, "run_eval": "false", "save_step": 2}
    _recipe([*common, *(word for name, value in flags.items() for word in (f"--coqpit.{name}", str(value)))])
    (run,) = (path for path in tmp_path.iterdir() if path.is_dir())
    text = _recipe([*common, "--no-brain", "--continue_path", str(run), "--coqpit.epochs", "2"])
    assert "Partial model initialization" not in text and "[brain]" not in text
    assert [r["kind"] for r in read_journal(run)].count("start") == 1
    assert json.loads((run / "config.json").read_text())["r"] == 7


def test_the_recipe_refuses_a_bad_corpus(tmp_path: Path):
    text = _recipe(["--data", str(tmp_path / "missing"), "--out", str(tmp_path)], status=1)
    assert "missing" in text and "Traceback" not in text


def _recipe(arguments: list[str], status: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(RECIPE), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout[-3000:]
    return done.stdout
