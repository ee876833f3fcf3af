"""The full-size comparison: its third arm, and what it makes of a folder of arms."""

from __future__ import annotations

import json
import sys
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
from tts_brain_coqui.espeak_corpus import make_corpus


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
    assert arm["config"] == {"lr": 5e-3, "lr_scheduler": None, "ga_alpha": 300.0}
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = (out / "constants" / "train.jsonl").read_bytes()
    assert _run(monkeypatch, *flags, "--arms", "constants", "--steps", "2", "--batch-size", "2") == 0
    assert (out / "constants" / "train.jsonl").read_bytes() == written


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
