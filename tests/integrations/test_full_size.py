"""The full-size comparison: its third arm, and what it makes of a folder of arms."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("TTS", reason="coqui-tts is not installed")
pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

import full_size
from coqui_run import make_config
from TTS.tts.layers.losses import TacotronLoss

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.types import TVERSKY_OFF
from tts_brain_coqui.espeak_corpus import make_corpus
from tts_brain_coqui.experiment import Arm


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["full_size.py", *arguments])
    return full_size.main()


def test_constants_have_the_forward_sum_term_in_training_alone(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, ga_alpha=100.0)
    attention = torch.rand(2, 9, 5).softmax(2).requires_grad_()
    mel, frames, tokens = torch.rand(2, 63, 80), torch.tensor([9, 7]), torch.tensor([5, 4])
    inputs = (mel + 0.1, mel + 0.2, mel, None, torch.zeros(2, 9), torch.zeros(2, 9), frames, None, frames * 7, None)
    host, ours = TacotronLoss(config), TacotronLoss(config)
    full_size.add_forward_sum(ours, 0.1)
    plain, with_term = (one(*inputs, attention, frames, None, tokens) for one in (host, ours))
    term = 0.1 * forward_sum(attention, frames, tokens).mean()
    assert term > 0.0
    torch.testing.assert_close(with_term["loss"], plain["loss"] + term)
    assert {k: v for k, v in with_term.items() if k != "loss"} == {k: v for k, v in plain.items() if k != "loss"}
    with torch.no_grad():
        assert torch.equal(ours(*inputs, attention, frames, None, tokens)["loss"], plain["loss"])


def test_an_arm_is_run_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out, table, picture = (tmp_path / name for name in ("corpus", "out", "figures.json", "arms.png"))
    make_corpus(data, clips=16, seed=3)
    flags = ["--data", str(data), "--out", str(out), "--json", str(table), "--picture", str(picture)]
    assert _run(monkeypatch, *flags, "--arms", "constants", "--steps", "2", "--batch-size", "2") == 0
    found = json.loads(table.read_text(encoding="utf-8"))
    assert list(found["arms"]) == ["constants"]
    assert found["arms"]["constants"]["steps"] == 2
    assert found["arms"]["constants"]["curve"]["step"] == [0, 2]
    arm = json.loads((out / "constants" / "arm.json").read_text(encoding="utf-8"))
    assert arm["config"] == {"lr": 1e-2, "lr_scheduler": None, "ga_alpha": 300.0}
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = (out / "constants" / "train.jsonl").read_bytes()
    assert _run(monkeypatch, *flags, "--arms", "constants", "--steps", "2", "--batch-size", "2") == 0
    assert (out / "constants" / "train.jsonl").read_bytes() == written


def test_what_is_spoken_and_decided_on_the_way_is_kept_and_loaders_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, table = tmp_path / "corpus", tmp_path / "figures.json"
    make_corpus(data, clips=16, seed=3)
    monkeypatch.setattr(full_size, "_SPEAK_EVERY", 5)
    monkeypatch.setitem(full_size.ARMS["brain"], "brain", {"enabled": True, "decide_every": 5})
    monkeypatch.setattr(full_size, "Arm", partial(Arm, measure_every=5))
    flags = ["--data", str(data), "--arms", "brain", "--steps", "6", "--batch-size", "2", "--json", str(table)]
    seen = []
    for loaders in ("0", "2"):
        out = tmp_path / loaders
        assert _run(monkeypatch, *flags, "--out", str(out), "--loaders", loaders) == 0
        rows = [json.loads(line) for line in (out / "brain" / "train.jsonl").read_text().splitlines()]
        seen.append([(row["step"], row["mel"], row["stop"]) for row in rows])
    assert seen[0] == seen[1] and len(seen[0]) == 6
    found = json.loads(table.read_text(encoding="utf-8"))["arms"]["brain"]
    assert found["curve"]["speaks"] == {"5": 0.0}
    assert [row["step"] for row in found["decided"]] == [5]
    assert found["decided"][0]["missed_stops"] > 0.0 and found["decided"][0]["tversky_weight"] == TVERSKY_OFF
    # Of a run that was ended by force, the share is that of the last measurement.
    (out / "brain" / "done.json").unlink()
    assert _run(monkeypatch, *flags, "--out", str(out), "--arms", "") == 0
    assert json.loads(table.read_text(encoding="utf-8"))["arms"]["brain"]["speaks"] == 0.0


def test_clips_are_spoken_when_they_are_looked_at() -> None:
    with pytest.raises(ValueError, match=r"speak_every=30.*write speak_every: 25"):
        Arm(name="a", label="a", data="nowhere", steps=1, speak_every=30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--arms", "brain,magic"], "no arm 'magic'"), (["--data", "nowhere/at/all"], "nowhere/at/all")],
)
def test_bad_input_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(monkeypatch, "--data", str(tmp_path), "--out", str(tmp_path / "out"), *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
