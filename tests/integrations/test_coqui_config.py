"""The flag: in Python, in config.json and on the command line; and ``attach`` for own scripts."""

import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("TTS", reason="Coqui is not installed: pip install 'tts-brain[coqui]'")

from coqui_run import assert_same, events, make_config, make_trainer, quick, records, run, weights
from TTS.config import load_config
from TTS.tts.configs.fast_pitch_config import FastPitchConfig

from tts_brain.config import BrainConfig
from tts_brain_coqui import BrainSection, Tacotron2Config, TacotronConfig, attach, detach, install, train

ON: dict[str, tuple[Any, str]] = {
    "true": (True, "full"),
    "mapping": ({"mode": "observe"}, "observe"),
    "mapping that says it": ({"enabled": True, "mode": "assist"}, "assist"),
    "section": (BrainSection(enabled=True, mode="observe"), "observe"),
}
OFF: dict[str, Any] = {
    "false": False,
    "none": None,
    "mapping": {"enabled": False},
    "section": BrainSection(),
    "mode off": {"mode": "off"},
}


def written(folder: Path, brain: Any, **settings: Any) -> Path:
    """A config.json with this ``brain``."""
    data = Tacotron2Config(**settings).to_dict()
    path = folder / "config.json"
    path.write_text(json.dumps({**data, "brain": brain}))
    return path


def attached(config: Any, **more: Any) -> Any:
    """The mode the real Trainer ends up with; None without a brain."""
    trainer = make_trainer(config, steps=1, **more)
    brain = getattr(trainer, "brain", None)
    return None if brain is None else brain.session.config.mode


@pytest.mark.parametrize("form", ON)
def test_on_in_python(form: str, corpus: Path, tmp_path: Path) -> None:
    brain, mode = ON[form]
    assert attached(make_config(corpus, tmp_path, model="tacotron", brain=brain)) == mode


@pytest.mark.parametrize("form", OFF)
def test_off_in_python(form: str, corpus: Path, tmp_path: Path) -> None:
    assert attached(make_config(corpus, tmp_path, model="tacotron", brain=OFF[form])) is None


def test_off_is_the_default(corpus: Path, tmp_path: Path) -> None:
    assert attached(make_config(corpus, tmp_path, model="tacotron")) is None
    assert Tacotron2Config().brain == TacotronConfig().brain == BrainSection(enabled=False)


@pytest.mark.parametrize("form", ["true", "mapping"])
def test_in_config_json(form: str, tmp_path: Path) -> None:
    brain, mode = ON[form]
    config = load_config(written(tmp_path, brain, r=7))
    assert type(config) is Tacotron2Config and config.r == 7
    assert isinstance(config.brain, BrainSection) and config.brain.enabled and config.brain.mode == mode


def test_config_json_without_a_brain(tmp_path: Path) -> None:
    """What plain Coqui wrote."""
    data = Tacotron2Config().to_dict()
    del data["brain"]
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert load_config(tmp_path / "config.json").brain == BrainSection()


def test_saved_config_comes_back(tmp_path: Path) -> None:
    settings = {"mode": "assist", "tversky_A": 0.25, "decide_every": 7, "knobs": "learning_rate, mel_weight"}
    config = Tacotron2Config(r=7, lr=3e-4, brain=settings)
    config.save_json(str(tmp_path / "config.json"))
    again = load_config(tmp_path / "config.json")
    assert again.to_dict() == config.to_dict()
    assert again.brain.to_brain() == BrainConfig(**settings) and again.brain.enabled


def test_a_run_folder_says_what_it_ran_with(corpus: Path, tmp_path: Path) -> None:
    trainer = run(make_config(corpus, tmp_path, model="tacotron", brain=quick("observe")), steps=1)
    again = load_config(trainer.output_path / "config.json")
    assert again.brain.to_brain() == trainer.brain.session.config
    assert records(trainer, "start")[0]["config"] == trainer.brain.session.config.to_dict()


FLAGS = {
    "on": (["--coqpit.brain.enabled", "true", "--coqpit.brain.mode", "observe"], "observe"),
    "equals sign": (["--coqpit.brain.enabled=true", "--coqpit.brain.tversky_A=0.2"], "full"),
    "beside the host's": (["--coqpit.lr", "0.5", "--coqpit.brain.enabled", "true"], "full"),
    "off": (["--coqpit.brain.mode", "off"], None),
    "none": ([], None),
}


@pytest.mark.parametrize("form", FLAGS)
def test_on_the_command_line(form: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, mode = FLAGS[form]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    config = make_config(corpus, tmp_path, model="tacotron")
    assert attached(config, command_line=True) == mode
    assert config.lr == (0.5 if "--coqpit.lr" in flags else 1e-3)
    assert config.brain.tversky_A == (0.2 if form == "equals sign" else 0.3)


def test_a_recipe_without_any_argument(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for number, brain in enumerate((True, False)):
        config = make_config(corpus, tmp_path / str(number), model="tacotron", brain=brain)
        assert attached(config) == ("full" if brain else None)


def test_the_command_line_can_switch_off(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--coqpit.brain.enabled", "false"])
    assert attached(make_config(corpus, tmp_path, model="tacotron", brain=True), command_line=True) is None


@pytest.mark.parametrize("flags", [["--coqpit.brain.mode", "observe"], ["--coqpit.lr", "1", "--coqpit.brain.seed=3"]])
def test_a_flag_of_a_brain_that_nobody_switched_on_is_refused(
    flags: list[str], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(ValueError, match=r"sets a brain that is off; write --coqpit\.brain\.enabled true, too"):
        attached(make_config(corpus, tmp_path, model="tacotron"), command_line=True)


def in_python(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    Tacotron2Config(brain={key: value})


def in_json(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    load_config(written(folder, {key: value}))


def in_flags(corpus: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any) -> None:
    flags = ["--coqpit.brain.enabled", "true", f"--coqpit.brain.{key}", str(value)]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    make_trainer(make_config(corpus, folder, model="tacotron"), steps=1, command_line=True)


PLACES: list[Callable[..., None]] = [in_python, in_json, in_flags]
BAD = {"decide_every": 0, "tversky_A": -0.5, "mode": "agressive", "initial_guided_weight": 1e6, "knobs": "learning_rat"}


@pytest.mark.parametrize("place", PLACES)
def test_unknown_keys_are_refused(
    place: Callable[..., None], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"decide_evry.*did you mean .*decide_every"):
        place(corpus, tmp_path, monkeypatch, "decide_evry", 5)


@pytest.mark.parametrize("key", BAD)
@pytest.mark.parametrize("place", PLACES)
def test_values_out_of_bounds_are_refused(
    place: Callable[..., None], key: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"(?s){key}.*(write|known are)"):
        place(corpus, tmp_path, monkeypatch, key, BAD[key])


@pytest.mark.parametrize("brain", ["full", 1, ["full"]])
def test_other_types_are_refused(brain: Any) -> None:
    with pytest.raises(ValueError, match="write true, false, or a mapping"):
        Tacotron2Config(brain=brain)


@pytest.mark.parametrize(
    ("enabled", "meant"), [("false", "false"), ("true", "true"), ("off", "false"), (0, "false"), (1, "true")]
)
def test_text_does_not_switch_the_brain_on(enabled: Any, meant: str, tmp_path: Path) -> None:
    says = f'brain.enabled={enabled!r} is neither true nor false; write "enabled": {meant}'
    with pytest.raises(ValueError, match=re.escape(says)):
        load_config(written(tmp_path, {"enabled": enabled}))
    with pytest.raises(ValueError, match=re.escape(says)):
        Tacotron2Config(brain=BrainSection(enabled=enabled))
    assert Tacotron2Config(brain={"enabled": None}).brain.enabled is False


def test_installing_twice_changes_nothing() -> None:
    from TTS.tts.models.base_tacotron import BaseTacotron

    hook, before = BaseTacotron.on_init_end, Tacotron2Config.__init__
    install()
    assert BaseTacotron.on_init_end is hook and Tacotron2Config.__init__ is before
    assert not hasattr(FastPitchConfig(), "brain")


def test_hosts_fields_and_checks_are_kept() -> None:
    config = Tacotron2Config()
    assert (config.model, config.out_channels, TacotronConfig().out_channels) == ("tacotron2", 80, 513)
    assert config.optimizer_params is not Tacotron2Config().optimizer_params
    assert config == Tacotron2Config() and config != Tacotron2Config(r=3)
    with pytest.raises(AssertionError, match="first scheduled gradual training"):
        Tacotron2Config(r=2, gradual_training=[[0, 7, 8]])


# tts-brain coqui-train


def trains(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """``tts-brain coqui-train``, up to where the host begins; 0 when it is let begin."""
    monkeypatch.setattr("TTS.bin.train_tts.main", lambda arguments: None)
    monkeypatch.setattr(sys, "argv", [])
    return train.main(list(arguments))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "no configuration; give --config_path config.json, or --continue_path"),
        (("--config_path", "nowhere.json"), "nowhere.json is missing; give --config_path"),
        (("--config_path", "."), ". is a folder; give --config_path"),
        (("--continue_path", "no_run"), "no_run/config.json is missing"),
        (("--config_path", "list.json"), "list.json: "),
        (("--config_path", "torn.json"), "torn.json: "),
        (("--config_path", "bad.json"), "bad.json: decide_every=0 is out of range; write a whole number from 1"),
        (("--config_path", "good.json", "--coqpit.brain.decide_every", "0"), "good.json: decide_every=0 is out of"),
        (("--config_path", "good.json", "--coqpit.brain.decide_evry", "5"), "did you mean --coqpit.brain.decide_every"),
        (("--config_path", "none.json", "--coqpit.brain.decide_every", "5"), "decide_every sets a brain that is off"),
    ],
)
def test_what_cannot_be_trained_with_is_one_line(
    arguments: tuple[str, ...],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written(tmp_path, {"decide_every": 0}).rename(tmp_path / "bad.json")
    written(tmp_path, True).rename(tmp_path / "good.json")
    written(tmp_path, False).rename(tmp_path / "none.json")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text('{"model": ')
    monkeypatch.chdir(tmp_path)
    assert trains(monkeypatch, *arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("tts-brain coqui-train: ") and says in text and len(text.splitlines()) == 1


def test_what_can_be_trained_with_reaches_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(written(tmp_path, True, r=7))
    assert trains(monkeypatch, "--config_path", path, "--coqpit.brain.mode", "observe", "--coqpit.lr", "0.5") == 0
    assert trains(monkeypatch, "--continue_path", str(tmp_path), "--coqpit.brain.mode", "off") == 0


# attach and detach


def footprint(trainer: Any) -> dict[str, Any]:
    """Everything of the host's that an integration could hang something on."""
    return {
        "trainer": set(vars(trainer)),
        "criterion": set(vars(trainer.criterion[0])),
        "model": set(vars(trainer.model)),
        "hooks": [(len(o._optimizer_step_pre_hooks), len(o._optimizer_step_post_hooks)) for o in trainer.optimizer],
        "module hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in trainer.model.modules()],
        "alpha": (trainer.criterion[0].ga_alpha, trainer.criterion[0].criterion_ga.sigma),
        "methods": [getattr(trainer, n).__func__ for n in ("train_step", "save_checkpoint", "save_best_model", "_fit")],
    }


ADAM = {"model": "tacotron", "optimizer": "Adam", "optimizer_params": {}}


@pytest.fixture(scope="module")
def host(corpus: Path, module_folder: Path) -> dict[str, Any]:
    """Four steps that never saw a brain."""
    trainer = make_trainer(make_config(corpus, module_folder, **ADAM), steps=4)
    before = footprint(trainer)
    trainer._fit()
    return {"footprint": before, "weights": weights(trainer), "optimizer": trainer.optimizer[0].state_dict()}


def test_attach_by_hand(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, **ADAM), steps=2)
    adapter = attach(trainer, quick())
    assert adapter is trainer.brain is attach(trainer, quick("observe"))
    trainer._fit()
    assert [r["step"] for r in records(trainer, "decision")] == [2]
    assert adapter.session.manager.knobs["gate_weight"] != 1.0


def test_attach_refuses_what_it_cannot_do(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, **ADAM), steps=1)
    with pytest.raises(ValueError, match="did you mean 'decide_every'"):
        attach(trainer, {"decide_evry": 3})
    for settings in (True, False, 5, "observe"):
        with pytest.raises(ValueError, match=f"{settings!r} is no mapping of settings; write {{'mode': "):
            attach(trainer, settings)  # type: ignore[arg-type]
    assert attach(trainer, {"mode": "off"}) is None
    trainer.criterion = [object()]
    with pytest.raises(ValueError, match=r"steers Tacotron and Tacotron2; this model's loss is object.*brain=False"):
        attach(trainer)
    assert not hasattr(trainer, "brain")


def test_detach_before_training_leaves_the_host(host: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, **ADAM), steps=4)
    attach(trainer, quick())
    assert footprint(trainer) != host["footprint"]
    detach(trainer)
    detach(trainer)
    assert footprint(trainer) == host["footprint"]
    trainer._fit()
    assert_same(weights(trainer), host["weights"])
    assert_same(trainer.optimizer[0].state_dict(), host["optimizer"])


def test_detach_between_two_steps(host: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Two steps under knobs that are neutral yet, then without: the host's four steps, to the bit."""

    def off(trainer: Any) -> None:
        if trainer.total_steps_done == 2:
            detach(trainer)

    brain = quick(knobs="learning_rate, grad_clip, gate_weight", decide_every=3)
    config = make_config(corpus, tmp_path, brain=brain, **ADAM)
    trainer = make_trainer(config, steps=4, callbacks={"on_train_step_end": off})
    session = trainer.brain.session
    trainer._fit()
    assert footprint(trainer) == host["footprint"]
    assert_same(weights(trainer), host["weights"])
    assert_same(trainer.optimizer[0].state_dict(), host["optimizer"])
    assert session.step == 1 and not session.active
    assert [r["message"] for r in records(trainer, "end")] == ["detached"]


def wrap(owner: Any, method: str, name: str, calls: list[str]) -> Callable[..., Any]:
    """Put a function of somebody else's around a method of an object; it notes its name at each call."""
    inner = getattr(owner, method)

    def around(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return inner(*args, **kwargs)

    setattr(owner, method, around)
    return around


def test_a_loss_that_others_have_wrapped_is_read_all_the_same(corpus: Path, tmp_path: Path) -> None:
    """Before us and after: theirs stays, and is called."""
    trainer = make_trainer(make_config(corpus, tmp_path, **ADAM), steps=3)
    criterion, calls = trainer.criterion[0], []
    before = wrap(criterion, "forward", "before", calls)
    attach(trainer, quick())
    detach(trainer)
    assert criterion.forward is before
    adapter = attach(trainer, quick())
    after = wrap(criterion, "forward", "after", calls)
    trainer._fit()
    assert calls == ["after", "before"] * 3
    assert adapter.session.step == 3 and not events(trainer, "fault")
    detach(trainer)
    assert criterion.forward is after


def test_a_second_fit_says_that_it_is_without_the_brain(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(corpus, tmp_path, save_checkpoints=True, save_step=2, **ADAM)
    trainer = make_trainer(config, steps=3)
    attach(trainer, quick())
    trainer._fit()
    sidecars = sorted((trainer.output_path / "brain").glob("state_*"))
    with caplog.at_level(logging.WARNING):
        trainer._fit()
    assert "this one goes on without it" in caplog.text
    assert trainer.total_steps_done == 6
    assert not set((trainer.output_path / "brain").glob("state_*")) - set(sidecars)


@pytest.mark.parametrize(("host", "said", "clip"), [({}, 1, 5.0), ({"shuffle": True, "grad_clip": 0.0}, 0, None)])
def test_what_the_host_does_to_clips_and_gradients_is_known(
    host: dict[str, Any],
    said: int,
    clip: float | None,
    corpus: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The order of the clips is said once; a schedule is the host's own, and in no snapshot."""
    schedule = {"lr_scheduler": "StepLR", "lr_scheduler_params": {"step_size": 2, "gamma": 0.5}}
    trainer = make_trainer(make_config(corpus, tmp_path, **{"grad_clip": 5.0, **schedule, **ADAM, **host}), steps=3)
    adapter = attach(trainer, quick())
    with caplog.at_level(logging.WARNING):
        trainer._fit()
    assert sum("in the order of their length" in line for line in caplog.messages) == said
    assert adapter.session.manager.capabilities.grad_clip == clip
    assert not any(isinstance(part, torch.optim.lr_scheduler.LRScheduler) for part in adapter.session.parts.values())


def test_detach_leaves_what_others_wrapped(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, **ADAM), steps=2)
    calls: list[str] = []
    before = wrap(trainer, "train_step", "before", calls)
    attach(trainer, quick())
    detach(trainer)
    assert trainer.train_step is before
    attach(trainer, quick())
    after = wrap(trainer, "train_step", "after", calls)
    detach(trainer)
    assert trainer.train_step is after
    trainer._fit()
    assert calls == ["after", "before"] * 2
    assert len(list((trainer.output_path / "brain").glob("journal.jsonl"))) == 1
