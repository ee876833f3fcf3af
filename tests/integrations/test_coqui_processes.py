"""Two processes of Coqui's multi-GPU training: what the host makes of them, and that one of them has the brain."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("TTS", reason="Coqui-TTS is not installed: uv pip install 'tts-brain[coqui]'")

from coqui_run import make_config, make_trainer, quick, records
from processes import run_both
from torch.nn.parallel import DistributedDataParallel

from tts_brain_coqui import adapter

TIMEOUT_S = 200


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.fixture(scope="module")
def processes(corpus: Path, module_folder: Path) -> tuple[list[dict[str, Any]], Path]:
    run_both(
        "coqui_process.py", free_port(), str(corpus), str(module_folder), folder=module_folder, timeout_s=TIMEOUT_S
    )
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
    assert "each trains alone" in (folder / "rank0.log").read_text()
    assert "[brain]" not in (folder / "rank1.log").read_text()
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
