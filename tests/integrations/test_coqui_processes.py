"""Two processes of Coqui's multi-GPU training: what the host makes of them, and that one of them has the brain."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("TTS", reason="Coqui-TTS is not installed: uv pip install 'tts-brain[coqui]'")

from coqui_run import make_config, make_trainer, quick, records
from torch.nn.parallel import DistributedDataParallel

from tts_brain_coqui import adapter

TIMEOUT_S = 200


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.fixture(scope="module")
def processes(corpus: Path, module_folder: Path) -> tuple[list[dict[str, Any]], Path]:
    script, port = Path(__file__).with_name("coqui_process.py"), free_port()
    logs = [(module_folder / f"{rank}.log").open("w") for rank in (0, 1)]
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port, str(corpus), str(module_folder)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(TIMEOUT_S) for process in started]
    finally:
        for process, log in zip(started, logs, strict=True):
            process.kill()
            log.close()
    assert codes == [0, 0], [(module_folder / f"{rank}.log").read_text()[-3000:] for rank in (0, 1)]
    return [json.loads((module_folder / f"{rank}.json").read_text()) for rank in (0, 1)], module_folder


def test_the_host_lets_each_train_alone(processes: Any) -> None:
    first, second = (found["seen"] for found in processes[0])
    assert len(first) == len(second) > 1
    assert all(not set(one["clips"]) & set(other["clips"]) for one, other in zip(first, second, strict=True))
    assert all(one["weights"] != other["weights"] for one, other in zip(first, second, strict=True)), (
        "this Trainer averages gradients: the Coqui adapter needs common decisions, and docs/coqui.md another text"
    )


def test_the_first_is_steered_and_says_so(processes: Any) -> None:
    (first, second), folder = processes
    assert (first["mode"], second["mode"]) == ("full", None)
    assert "each trains alone" in (folder / "0.log").read_text()
    assert "[brain]" not in (folder / "1.log").read_text()
    assert len(list(folder.rglob("journal.jsonl"))) == 1


def test_where_gradients_are_averaged_it_only_observes(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrapped(DistributedDataParallel):
        def __init__(self) -> None:
            pass

    trainer = make_trainer(make_config(corpus, tmp_path, brain=False), steps=2)
    trainer.num_gpus, trainer.wrapped_model = 2, Wrapped()
    monkeypatch.setattr(adapter.log, "propagate", True)
    brain = adapter.attach(trainer, quick())
    assert brain.session.config.mode == "observe" and "need a common decision" in caplog.text
    adapter.detach(trainer)
    trainer.num_gpus, trainer.wrapped_model = 1, None
    trainer._fit()
    assert not records(trainer, "decision")
