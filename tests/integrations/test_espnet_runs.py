"""The brain at work in real runs of ESPnet's TTSTask: models, accumulation, AMP, faults, resume."""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import numpy as np
import soundfile
import torch
import yaml
from espnet2.tasks.tts import TTSTask
from espnet_run import Data, assert_finite, assert_same, quick, train

from tts_brain.config import BrainConfig
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain_espnet.adapter import EspnetAdapter

BRAIN = {"brain": True, "brain_conf": quick()}
STYLE = {"gst_conv_layers": 2, "gst_conv_chans_list": [2, 2]}
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "location": ({}, ()),
    "forward": ({"atype": "forward"}, ()),
    "forward_ta": ({"atype": "forward_ta"}, ()),
    "speaker embeddings": ({"spk_embed_dim": 4, "spk_embed_integration_type": "concat"}, ("spembs",)),
    "speaker ids": ({"spks": 3}, ("sids",)),
    "style tokens": ({"use_gst": True, "gst_tokens": 2, "gst_heads": 2, "gst_gru_units": 4, **STYLE}, ()),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_tacotron2_is_steered(name: str, espnet_data: Data, tmp_path: Path) -> None:
    tts_conf, extras = MODELS[name]
    run = train(tmp_path, espnet_data.config(tts_conf=tts_conf, extras=extras, **BRAIN))
    seen = run.records("observation")
    assert [o["step"] for o in seen] == list(range(1, 7))
    assert all(o["attention"] is not None and all(isinstance(v, float) for v in o["losses"].values()) for o in seen)
    # Whatever its attention is made like, it is not taken for a model that was trained before.
    assert max(o["attention"]["attention_diag"] for o in seen) < 0.5
    assert not run.events("fault")
    moved = {name for d in run.records("decision") for name in d["after"] if d["after"][name] != d["before"][name]}
    assert "forward_sum_weight" in moved and "gate_weight" in moved
    assert_finite(run)


@pytest.mark.parametrize(("most", "meant"), [(1e-2, 2e-3), (1.5e-3, 1.5e-3)])
def test_the_multiplier_reaches_the_step_and_nothing_else(
    espnet_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, meant: float
) -> None:
    """Twice the host's rate is a run of the host at twice the rate; what is saved and reported stays the host's.

    No multiplier carries it over ``max_learning_rate``, though.
    """
    config = espnet_data.config(optim="sgd", optim_conf={"lr": 1e-3}, use_tensorboard=False)
    double = train(tmp_path / "double", {**config, "optim_conf": {"lr": meant}}, TTSTask)

    def double_the_rate(adapter: EspnetAdapter) -> None:
        adapter.session.manager.knobs["learning_rate"] = 2.0
        adapter.session._turn_taps()

    on_attach(monkeypatch, double_the_rate)
    only_rate = quick(knobs="learning_rate", decide_every=100, max_learning_rate=most)
    ours = train(tmp_path / "ours", {**config, "brain": True, "brain_conf": only_rate})
    assert_same(ours.checkpoint["model"], double.checkpoint["model"])
    assert [g["lr"] for g in ours.checkpoint["optimizers"][0]["param_groups"]] == [1e-3]
    assert ours.reported[1]["train"]["optim0_lr0"] == pytest.approx(1e-3)


def on_attach(monkeypatch: pytest.MonkeyPatch, look: Callable[[EspnetAdapter], Any]) -> None:
    """Call ``look`` on each adapter as soon as it is made."""
    host = EspnetAdapter.__init__

    def init(self: EspnetAdapter, *args: Any, **kwargs: Any) -> None:
        host(self, *args, **kwargs)
        look(self)

    monkeypatch.setattr(EspnetAdapter, "__init__", init)


def test_only_optimizer_steps_count(espnet_data: Data, tmp_path: Path) -> None:
    run = train(tmp_path, espnet_data.config(accum_grad=4, max_epoch=3, **BRAIN))
    # Six batches an epoch, of which the last two are never stepped on; the host counts anew each epoch.
    assert [o["step"] for o in run.records("observation")] == [1, 2, 3]
    assert not run.events("skipped_gradient")


@pytest.mark.parametrize(("clip", "does"), [(0.0, "makes every gradient 0"), (-1.0, "turns every gradient round")])
def test_a_clip_that_is_meant_as_none_is_named(
    clip: float, does: str, espnet_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        train(tmp_path, espnet_data.config(grad_clip=clip, **BRAIN))
    said = [line for line in caplog.messages if "grad_clip" in line and "[brain]" in line]
    assert len(said) == 1 and does in said[0] and "such as grad_clip: 1.0e+9" in said[0]


class CpuScaler(torch.cuda.amp.GradScaler):
    """The host's scaler only works on a GPU; torch's own for the CPU is the same code."""

    def __init__(self, init_scale: float) -> None:
        torch.amp.GradScaler.__init__(self, "cpu", init_scale=init_scale)


def test_amp_the_scaler_may_look_for_its_scale(
    espnet_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients overflow at first: no steps, and no fault of the run."""
    scalers: list[CpuScaler] = []

    def make() -> CpuScaler:
        scalers.append(CpuScaler(2.0**125))
        return scalers[-1]

    monkeypatch.setattr("espnet2.train.trainer.GradScaler", make)
    run = train(tmp_path, espnet_data.config(use_amp=True, max_epoch=3, **BRAIN))
    skipped = round(np.log2(2.0**125 / scalers[0].get_scale()))
    assert 0 < skipped < 18
    assert [o["step"] for o in run.records("observation")] == list(range(1, 19 - skipped))
    assert not run.events("skipped_gradient") and not run.events("rollback")
    assert_finite(run)


def test_amp_a_scale_that_is_never_found_is_said(
    espnet_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Gradients that are not finite at any scale: after the search, each is a step left out."""
    monkeypatch.setattr("espnet2.train.trainer.GradScaler", lambda: CpuScaler(2.0**16))

    def spoil(adapter: EspnetAdapter) -> None:
        weight = next(iter(adapter.session.parts["model"].parameters()))
        weight.register_hook(lambda gradient: gradient * math.inf)

    on_attach(monkeypatch, spoil)
    with caplog.at_level(logging.WARNING):
        run = train(tmp_path, espnet_data.config(use_amp=True, num_iters_per_epoch=48, **BRAIN))
    assert [o["step"] for o in run.records("observation")] == list(range(1, 48 - 24 + 1))
    assert len(run.events("skipped_gradient")) == 24
    assert "half precision overflows like that" in caplog.text
    assert run.events("rollback")


def test_another_norm_than_l2_is_not_held_against_the_gradients(espnet_data: Data, tmp_path: Path) -> None:
    seen, clips = {}, []
    for kind in (2.0, "inf"):
        config = espnet_data.config(grad_clip_type=kind, grad_clip=1e6, **BRAIN)
        run = train(tmp_path / str(kind), config)
        seen[kind] = run.records("observation")[0]["grad_norm"]
        clips.append(run.records("start")[0]["capabilities"]["grad_clip"])
    assert seen["inf"] == pytest.approx(seen[2.0], rel=1e-4)
    assert clips == [1e6, None]


# Faults of the run.


def with_nan(data: Data, folder: Path, count: int) -> Data:
    """The same clips, the first ``count`` of which hold a NaN in the middle."""
    shutil.copytree(data.folder, folder)
    lines = [line.split() for line in (data.folder / "wav.scp").read_text().splitlines()]
    for number, (name, path) in enumerate(lines[:count]):
        audio, rate = soundfile.read(path, dtype="float32")
        audio[len(audio) // 2] = np.nan
        soundfile.write(folder / f"{name}.wav", audio, rate, subtype="FLOAT")
        lines[number][1] = str(folder / f"{name}.wav")
    (folder / "wav.scp").write_text("".join(f"{name} {path}\n" for name, path in lines))
    return Data(folder, data.ids)


def test_a_nan_clip_leaves_no_trace(espnet_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = with_nan(espnet_data, tmp_path / "data", 1)
    good = espnet_data.config()["valid_data_path_and_name_and_type"]
    config = data.config(max_epoch=2, valid_data_path_and_name_and_type=good)
    host = train(tmp_path / "host", config, TTSTask)
    running = {n: v for n, v in host.checkpoint["model"].items() if "running" in n}
    assert not all(torch.isfinite(v).all() for v in running.values()), "the host alone is poisoned"
    run = train(tmp_path / "ours", {**config, **BRAIN})
    assert_finite(run)
    events = run.events("skipped_gradient")
    assert len(events) == 2 and "running statistics put back" in events[0]["message"]
    # The user is told which clip it is, once.
    (advice,) = run.events("advice")
    assert (
        advice["cause"] == "non-finite data"
        and data.ids[0] in advice["message"]
        and advice["step"] in (1, 2, 3, 4, 5, 6)
    )
    assert not any(name in advice["message"] for name in data.ids[1:])
    steps = {e["step"] for e in events}
    assert [o["losses"]["mel"] == "nan" for o in run.records("observation")] == [
        o["step"] in steps for o in run.records("observation")
    ]
    assert all(np.isfinite(run.reported[epoch]["valid"]["loss"]) for epoch in (1, 2))


def test_three_in_a_row_bring_a_snapshot_back(espnet_data: Data, tmp_path: Path) -> None:
    data = with_nan(espnet_data, tmp_path / "data", 8)
    good = espnet_data.config()["valid_data_path_and_name_and_type"]
    config = data.config(max_epoch=3, valid_data_path_and_name_and_type=good, **BRAIN)
    run = train(tmp_path / "ours", config)
    back = run.events("rollback")
    assert back and "3 steps in a row were not finite" in back[0]["message"]
    assert all(event["restored"] is not None for event in back)
    assert_finite(run)


@pytest.mark.parametrize("where", ["observe", "decide", "state_dict"])
def test_a_fault_of_the_brain_never_stops_a_run(
    where: str, espnet_data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("made by the test")

    monkeypatch.setattr(ContextAwareTrainingManager, where, broken)
    # Only knobs that are neutral at first: the run must be the host's throughout.
    knobs = quick(knobs="learning_rate, mel_weight, grad_clip")
    with caplog.at_level(logging.ERROR):
        run = train(tmp_path / "ours", espnet_data.config(brain=True, brain_conf=knobs))
    host = train(tmp_path / "host", espnet_data.config(), TTSTask)
    assert_same(run.checkpoint, host.checkpoint)
    assert [e["message"] for e in run.events("fault")] == ["ZeroDivisionError: made by the test"]
    assert "fault of the brain, not of your run" in caplog.text
    assert not list(run.path.glob("brain/state_*"))


# Resume.


@pytest.mark.parametrize("every", [2, 4], ids=["between decisions", "with a decision half made"])
def test_resume_goes_on_where_it_was(every: int, espnet_data: Data, tmp_path: Path) -> None:
    brain = quick(decide_every=every)
    config = espnet_data.config(max_epoch=3, keep_nbest_models=2, brain=True, brain_conf=brain)
    whole = train(tmp_path / "whole", config)
    train(tmp_path / "parts", {**config, "max_epoch": 1})
    parts = train(tmp_path / "parts", config, None, "--resume", "true")
    assert_same(parts.checkpoint, whole.checkpoint)
    assert parts.records("decision") == whole.records("decision")
    assert any(d["before"] != d["after"] for d in whole.records("decision") if d["step"] > 6)
    assert len(parts.records("start")) == 2
    assert sorted(p.name for p in parts.path.glob("brain/state_*")) == ["state_2.safetensors", "state_3.safetensors"]


def test_a_run_begun_anew_keeps_its_own_sidecars(espnet_data: Data, tmp_path: Path) -> None:
    """Those of an earlier run in this folder have higher numbers."""
    brain = train(tmp_path, espnet_data.config(**BRAIN)).path / "brain"
    for epoch in (9, 10):
        shutil.copy(brain / "state_1.safetensors", brain / f"state_{epoch}.safetensors")
    (brain / "state_of_mind.txt").write_text("mine")
    train(tmp_path, espnet_data.config(max_epoch=2, **BRAIN), None, "--resume", "false")
    kept = {"state_1.safetensors", "state_2.safetensors", "state_of_mind.txt"}
    assert {path.name for path in brain.glob("state_*")} == kept


@pytest.mark.parametrize("harm", ["missing", "damaged", "of another run"])
def test_a_bad_sidecar_is_said_and_left(
    harm: str, espnet_data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = espnet_data.config(**BRAIN)
    path = train(tmp_path, config).path / "brain" / "state_1.safetensors"
    if harm == "missing":
        path.unlink()
    elif harm == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        train(tmp_path, espnet_data.config(seed=1), None, "--resume", "false")  # begun anew without the brain
    with caplog.at_level(logging.ERROR):
        run = train(tmp_path, {**config, "max_epoch": 2}, None, "--resume", "true")
    assert "the brain starts afresh" in caplog.text and "state_1.safetensors" in caplog.text
    assert len(run.events("resume_failed")) == 1
    # The journal keeps what stands before the resume, and goes on in the same count.
    assert [o["step"] for o in run.records("observation")] == list(range(1, 13))
    assert_finite(run)


# What a user sees.


def test_files_of_the_host_are_there_and_the_keys_are_saved(espnet_data: Data, tmp_path: Path) -> None:
    settings = {"max_epoch": 2, "keep_nbest_models": 2, "num_att_plot": 1, "use_matplotlib": True}
    config = espnet_data.config(**settings, use_tensorboard=True, **BRAIN)
    run = train(tmp_path, config, None, "--brain_conf", "cooldown_steps=7")
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert saved["brain"] is True and saved["brain_conf"] == {**quick(), "cooldown_steps": 7}
    assert run.records("start")[0]["config"]["cooldown_steps"] == 7
    assert (run.path / "valid.loss.ave_2best.pth").exists() and list((run.path / "att_ws").rglob("*.png"))
    weights = torch.load(run.path / "valid.loss.ave_2best.pth")
    model, _ = TTSTask.build_model_from_file(run.path / "config.yaml", run.path / "valid.loss.ave_2best.pth")
    assert model.state_dict().keys() == weights.keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run.path / "tensorboard" / "train"))
    board.Reload()
    assert {f"brain/knob_{name}" for name in BrainConfig().knob_names()} | {"brain/phase"} <= set(
        board.Tags()["scalars"]
    )
    assert [e.step for e in board.Scalars("brain/knob_guided_weight")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"brain": True, "brain_conf": {"decide_evry": 5}},
            "unknown brain key 'decide_evry' (did you mean 'decide_every'",
        ),
        ({"brain": False, "brain_conf": {"mode": "ful"}}, "mode='ful' is not known; write mode="),
        ({"brain": "observe"}, "brain: 'observe' is neither true nor false; write 'brain: true', and a mode as"),
        ({"brain": True, "brain_conf": "observe"}, "brain_conf: 'observe' is no mapping"),
        ({"brain": True, "use_deepspeed": True}, "use_deepspeed"),
    ],
    ids=["unknown key", "bad value", "mode as flag", "no mapping", "deepspeed"],
)
def test_bad_keys_are_refused_before_anything_is_built(
    keys: dict[str, Any], says: str, espnet_data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        train(tmp_path, espnet_data.config(**keys))
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "exp").exists()


def test_another_model_is_refused_with_the_line_to_write(espnet_data: Data, tmp_path: Path) -> None:
    config = espnet_data.config(tts="transformer", **BRAIN)
    config["tts_conf"] = {"embed_dim": 0, "adim": 8, "aheads": 2, "elayers": 1, "eunits": 8, "dlayers": 1, "dunits": 8}
    with pytest.raises(ValueError, match=r"steers tts: tacotron2; this recipe trains Transformer\. Write brain: false"):
        train(tmp_path, config)


def test_a_folder_that_cannot_be_written_is_said(espnet_data: Data, tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "brain").write_text("a file where the brain wants its folder")
    with pytest.raises(OSError, match=r"cannot write its files to .*brain: .*--output_dir.* or write brain: false"):
        train(tmp_path, espnet_data.config(**BRAIN))
