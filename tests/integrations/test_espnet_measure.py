"""Held-out figures of a real ESPnet run."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import numpy as np
import soundfile
import torch
import yaml
from espnet_run import Data, Run, train

from tts_brain_espnet import measure
from tts_brain_espnet.probe import Probe, clips, load_model


@pytest.fixture(scope="module")
def run(espnet_data: Data, module_folder: Path) -> Run:
    return train(module_folder, espnet_data.config())


def test_forced_figures_are_those_of_the_hosts_own_forward(run: Run, espnet_data: Data) -> None:
    batches = clips(run.path / "config.yaml", espnet_data.folder)
    model = load_model(run.path / "config.yaml", run.path / "latest.pth")
    held_out = Probe(batches).held_out(model)
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        _, stats, _ = model(**batches[0])
    # The host sums both spectrograms' errors over valid frames, cut to whole decoder frames.
    assert held_out.l1 + held_out.l1_postnet == pytest.approx(float(stats["l1_loss"]), rel=1e-4)
    assert len(held_out.matrices) == 12
    assert all(abs(float(m.sum(1).mean()) - 1.0) < 1e-4 for m in held_out.matrices)


def test_measuring_is_repeatable_and_leaves_no_trace(run: Run, espnet_data: Data) -> None:
    probe = Probe(clips(run.path / "config.yaml", espnet_data.folder, limit=3))
    model = load_model(run.path / "config.yaml", run.path / "latest.pth").train()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (probe.held_out(model) for _ in range(2))
    assert first.l1 == second.l1 and first.values == second.values
    spoken = [list(probe.speak(model)) for _ in range(2)]
    assert len(spoken[0]) == len(probe) == 3
    assert all((a.mel == b.mel).all() and a.speaks is b.speaks for a, b in zip(*spoken, strict=True))
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_free_running_stops_at_twice_the_reference(run: Run, espnet_data: Data) -> None:
    batches = clips(run.path / "config.yaml", espnet_data.folder)
    model = load_model(run.path / "config.yaml", run.path / "latest.pth")
    _, lengths = model.feats_extract(batches[0]["speech"], batches[0]["speech_lengths"])
    longest = max(len(s.mel) / (int(n) // 3 * 3) for s, n in zip(Probe(batches).speak(model), lengths, strict=True))
    assert longest <= 2.0


def test_the_command_prints_both_and_writes_json(
    run: Run, espnet_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "figures.json"
    folder = str(espnet_data.folder)
    arguments = [str(run.path), str(run.path), "--clips", folder, "--limit", "2", "--json", str(file)]
    assert measure.main(arguments) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    assert rows[0] == rows[1] and rows[0]["clips"] == 2
    assert {"l1", "l1_postnet", "attention_diag", "speaks"} <= set(rows[0])
    assert f"{rows[0]['l1']:.3f}" in capsys.readouterr().out


def test_further_inputs_of_the_model_are_read_too(espnet_data: Data, tmp_path: Path, capsys: Any) -> None:
    tts_conf = {"spks": 3, "spk_embed_dim": 4, "spk_embed_integration_type": "concat"}
    run = train(tmp_path, espnet_data.config(tts_conf=tts_conf, extras=("sids", "spembs")))
    arguments = [str(run.path), "--limit", "2", "--clips"]
    assert measure.main([*arguments, str(espnet_data.folder)]) == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("text", "wav.scp"):
        (bare / name).write_text((espnet_data.folder / name).read_text())
    assert measure.main([*arguments, str(bare)]) == 2
    assert "trained with sids, and neither" in capsys.readouterr().err


def test_speech_is_read_as_the_run_itself_reads_it(run: Run, espnet_data: Data, tmp_path: Path) -> None:
    """A run on numbers, in a file by another name: ``sound`` would take the file's name for a recording's."""
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    lines = (espnet_data.folder / "wav.scp").read_text().split()
    for name, path in zip(lines[::2], lines[1::2], strict=True):
        np.save(tmp_path / f"{name}.npy", soundfile.read(path, dtype="float32")[0])
    listed = "".join(f"{name} {tmp_path / name}.npy\n" for name in lines[::2])
    (tmp_path / "waves.scp").write_text(listed)
    (tmp_path / "text").write_text((espnet_data.folder / "text").read_text())
    config["valid_data_path_and_name_and_type"] = [["x/text", "text", "text"], ["x/waves.scp", "speech", "npy"]]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (same,), (plain,) = clips(tmp_path / "config.yaml", tmp_path), clips(run.path / "config.yaml", espnet_data.folder)
    assert all(torch.equal(same[name], plain[name]) for name in plain) and set(same) == set(plain)
    (tmp_path / "waves.scp").unlink()
    with pytest.raises(FileNotFoundError, match=r"waves\.scp is missing"):
        clips(tmp_path / "config.yaml", tmp_path)


@pytest.mark.parametrize(
    ("run_folder", "clip_folder", "says"),
    [("nowhere", "", "nowhere/config.yaml is missing"), ("", "nowhere", "nowhere/text is missing")],
)
def test_what_is_missing_is_named(
    run_folder: str, clip_folder: str, says: str, run: Run, espnet_data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run.path / run_folder), "--clips", str(espnet_data.folder / clip_folder)]
    assert measure.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    run: Run, espnet_data: Data, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "_row", lambda *_, **__: pytest.fail("measuring was begun"))
    assert measure.main([str(run.path), "--clips", str(espnet_data.folder), "--json", "/dev/null/figures.json"]) == 2
    assert "/dev/null/figures.json cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "many"])
def test_a_limit_that_leaves_no_clip_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        measure.main(["run", f"--limit={limit}"])
    assert stop.value.code == 2
    assert f"'{limit}' is not a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("tts: [\n", "config.yaml is not YAML ("),
        ("- tts\n", "config.yaml is not of an ESPnet TTS run, it has no tts, token_list"),
        ("tts: tacotron2\n", "it has no token_list, valid_data_path_and_name_and_type; give the folder"),
        ("7: x\n", "it has no tts"),
    ],
)
def test_a_config_of_no_run_is_named(
    config: str, says: str, espnet_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "latest.pth").touch()
    assert measure.main([str(tmp_path), "--clips", str(espnet_data.folder)]) == 2
    text = capsys.readouterr().err
    assert says in text and str(tmp_path) in text and len(text.splitlines()) == 1


def test_a_file_that_is_no_model_is_named(run: Run, espnet_data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    (run.path / "notes.log").write_text("[epoch 1] not a model\n")
    assert measure.main([str(run.path), "--clips", str(espnet_data.folder), "--model", "notes.log"]) == 2
    text = capsys.readouterr().err
    assert "notes.log is no model of the run of" in text and "--model" in text and len(text.splitlines()) == 1


def test_a_checkpoint_of_a_whole_run_is_not_measured_as_an_untrained_model(
    run: Run, espnet_data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (run.path / "checkpoint.pth").exists()
    assert measure.main([str(run.path), "--clips", str(espnet_data.folder), "--model", "checkpoint.pth"]) == 2
    text = capsys.readouterr().err
    assert "checkpoint.pth lacks" in text and "latest.pth" in text and len(text.splitlines()) == 1
