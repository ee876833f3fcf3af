"""Both doors to a brain-aware training: the drop-in script, and ``tts-brain run`` around a whole recipe."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import yaml
from espnet2.bin import tts_train as host_script
from espnet2.tasks.tts import TTSTask
from espnet_run import Data, Run, quick, write_config

from tts_brain.config import BrainConfig
from tts_brain_espnet import run as run_command
from tts_brain_espnet import tts_train
from tts_brain_espnet.task import BrainTTSTask

BIN = Path(sys.executable).parent
# Plain ESPnet by somebody who never heard of tts-brain: importing it fails.
PLAIN_INFERENCE = """
import sys
for name in ("tts_brain", "tts_brain_espnet"):
    sys.modules[name] = None
from espnet2.bin.tts_inference import main
main(sys.argv[1:])
"""


def below(*command: str, path: Path | None = None, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    """``tts-brain run -- command``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    line = [str(BIN / "tts-brain"), "run", "--", *command]
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=environment, check=False)


# The drop-in script.


def test_help_shows_both_keys_and_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tts_train.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--brain BRAIN" in text and "--brain_conf BRAIN_CONF" in text
    assert all(f"{name}=" in text for name in BrainConfig().to_dict())


def test_print_config_shows_the_settings() -> None:
    text = io.StringIO()
    BrainTTSTask.print_config(text)
    shown = yaml.safe_load(text.getvalue())
    assert shown["brain"] is False and shown["brain_conf"] == BrainConfig().to_dict()


@pytest.mark.parametrize(
    ("brain", "conf", "said"),
    [
        (False, {"mode": "observe"}, True),
        (False, {"decide_every": 5}, True),
        (False, {"mode": "off", "decide_every": 5}, False),
        (False, {}, False),
        (False, BrainConfig().to_dict(), False),
        (True, {"mode": "observe"}, False),
    ],
)
def test_settings_of_no_brain_are_told_of(
    brain: bool, conf: dict[str, Any], said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TTSTask, "main_worker", classmethod(lambda cls, args: None))
    with caplog.at_level(logging.WARNING):
        BrainTTSTask.main_worker(SimpleNamespace(brain=brain, brain_conf=conf, collect_stats=True))
    assert [("write brain: true" in line) for line in caplog.messages] == [True] * said


def test_our_script_has_what_the_hosts_has() -> None:
    ours, host = tts_train.get_parser(), host_script.get_parser()
    added = {a.dest for a in ours._actions} - {a.dest for a in host._actions}
    assert added == {"brain", "brain_conf"}
    assert {n for n in vars(host_script) if not n.startswith("_")} - {"TTSTask"} <= set(vars(tts_train))


# tts-brain run.

RECIPE = """set -eu
$PY -m espnet2.bin.tts_train --config $YAML --collect_stats true --output_dir $OUT/stats \
    --train_shape_file $TEXT --valid_shape_file $TEXT > $OUT/stats.log 2>&1
$PY -m espnet2.bin.tts_train --config $YAML --output_dir $OUT/exp > $OUT/train.log 2>&1
"""


@pytest.fixture(scope="module")
def recipe(espnet_data: Data, module_folder: Path) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Statistics and training by a recipe that has never heard of tts-brain, with a yaml that has."""
    config = espnet_data.config(brain=True, brain_conf=quick())
    config["train_shape_file"] = config["valid_shape_file"] = []
    shape = ["--train_shape_file", str(espnet_data.folder / "text_shape")]
    script = module_folder / "run.sh"
    training = " ".join([*shape, "--valid_shape_file", shape[1]])
    script.write_text(RECIPE.replace("--output_dir $OUT/exp", f"--output_dir $OUT/exp {training}"))
    names = {
        "PY": sys.executable,
        "YAML": write_config(module_folder, config),
        "OUT": module_folder,
        "TEXT": espnet_data.folder / "text",
    }
    done = below("env", *(f"{name}={value}" for name, value in names.items()), "sh", str(script))
    logs = "".join(path.read_text()[-2000:] for path in module_folder.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    return done, module_folder


def test_a_recipe_that_knows_nothing_trains_with_the_brain(
    recipe: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    run = Run(recipe[1] / "exp")
    assert [d["step"] for d in run.records("decision")] == [2, 4, 6]
    assert "[brain] step" in (recipe[1] / "train.log").read_text()
    # Statistics ran through the same script and yaml, and no brain looked on.
    assert (recipe[1] / "stats" / "train" / "feats_stats.npz").exists()
    assert not (recipe[1] / "stats" / "brain").exists()


def test_plain_espnet_speaks_with_the_model(
    recipe: tuple[subprocess.CompletedProcess[str], Path], espnet_data: Data
) -> None:
    _, folder = recipe
    key_file = folder / "one.scp"
    key_file.write_text((espnet_data.folder / "text").read_text().splitlines()[0] + "\n")
    command = [sys.executable, "-c", PLAIN_INFERENCE, "--output_dir", str(folder / "spoken")]
    command += ["--data_path_and_name_and_type", f"{espnet_data.folder}/text,text,text", "--key_file", str(key_file)]
    command += ["--train_config", str(folder / "exp" / "config.yaml"), "--maxlenratio", "2"]
    command += ["--model_file", str(folder / "exp" / "latest.pth"), "--vocoder_file", "none"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((folder / "spoken" / "wav").glob("*.wav"))


def test_the_commands_own_exit_status_and_output() -> None:
    done = below("sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


def test_only_the_training_script_is_another(tmp_path: Path) -> None:
    """Whatever else Python starts below finds what it always finds, the machine's own sitecustomize too."""
    (tmp_path / "sitecustomize.py").write_text("print('the machine speaks')\n")
    code = """
import importlib.util, sys
for name in ("tts_train", "tts_inference", "asr_train"):
    print(importlib.util.find_spec(f"espnet2.bin.{name}").origin)
print("torch" in sys.modules, "espnet2.tasks.tts" in sys.modules)
"""
    done = below(sys.executable, "-c", code, path=tmp_path)
    assert done.returncode == 0, done.stderr
    # Once for tts-brain itself, once for what it started.
    *spoken, training, inference, other, loaded = done.stdout.splitlines()
    assert spoken == ["the machine speaks"] * 2
    assert Path(training) == Path(tts_train.__file__).resolve()
    assert Path(inference).parent == Path(other).parent == Path(host_script.__file__).parent
    assert loaded == "False False", "a start of Python must not wait for us"


def test_a_python_without_tts_brain_says_so(tmp_path: Path) -> None:
    """The recipe's path.sh may activate another environment than the one of ``tts-brain run``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    for package in ("espnet2", "espnet2/bin"):
        (tmp_path / "lib" / package).mkdir(parents=True)
        (tmp_path / "lib" / package / "__init__.py").touch()
    (tmp_path / "lib" / "espnet2" / "bin" / "tts_train.py").write_text("print('plain')\n")
    python = str(tmp_path / "venv" / "bin" / "python")
    done = below(python, "-m", "espnet2.bin.tts_train", path=tmp_path / "lib")
    assert done.returncode != 0 and "plain" not in done.stdout
    assert f"tts-brain run: {python} has no tts-brain. Install it in the environment" in done.stderr


@pytest.mark.parametrize(("arguments", "says"), [([], "no command"), (["--"], "no command")])
def test_no_command_is_explained(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command.main(arguments)
    assert says in capsys.readouterr().err


def test_a_command_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command.main(["--", "./no-such-recipe.sh"]) == 127
    assert "'./no-such-recipe.sh' is no command that can be run" in capsys.readouterr().err


def test_a_script_that_does_not_say_what_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "noshebang.sh"
    script.write_text("echo ran\n")
    script.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "")
    assert run_command.main(["--", str(script)]) == 126
    text = capsys.readouterr().err
    assert f"tts-brain run: '{script}' cannot be run (Exec format error); give it a first line such as" in text
    assert len(text.splitlines()) == 1
