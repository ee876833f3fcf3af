"""Off means off: plain ESPnet, our door with the brain off, and with it only observing, are the same to the bit."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

from espnet2.tasks.tts import TTSTask
from espnet_run import Data, Run, assert_same, quick, train

# Six batches an epoch; two steps of three batches each, a scheduler per step, and the epochs' seeds.
HOST = {
    "max_epoch": 2,
    "accum_grad": 3,
    "scheduler": "warmuplr",
    "scheduler_conf": {"warmup_steps": 3},
}
# No draw of a random number more, no other order of clips: these change with each.
LOCATION: dict[str, Any] = {**HOST}
FORWARD: dict[str, Any] = {
    **HOST,
    "tts_conf": {"atype": "forward_ta", "spk_embed_dim": 4, "spk_embed_integration_type": "add"},
    "extras": ("spembs",),
}


@pytest.fixture(scope="module", params=[LOCATION, FORWARD], ids=["location", "forward_ta with speakers"])
def host(request: pytest.FixtureRequest, espnet_data: Data, module_folder: Path) -> tuple[dict[str, Any], Run]:
    """ESPnet alone."""
    config = espnet_data.config(**request.param)
    run = train(module_folder / f"plain-{request.param_index}", config, TTSTask)
    assert not (run.path / "brain").exists()
    return config, run


@pytest.mark.parametrize("keys", [{}, {"brain": False}, {"brain": True, "brain_conf": {"mode": "off"}}], ids=str)
def test_off_is_the_host(keys: dict[str, Any], host: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    config, alone = host
    run = train(tmp_path, {**config, **keys})
    assert not (run.path / "brain").exists()
    assert_same(run.checkpoint, alone.checkpoint)
    assert_same(run.reported, alone.reported)


def test_observe_is_the_host(host: tuple[dict[str, Any], Run], tmp_path: Path) -> None:
    config, alone = host
    run = train(tmp_path, {**config, "brain": True, "brain_conf": quick("observe")})
    assert_same(run.checkpoint, alone.checkpoint)
    assert_same(run.reported, alone.reported)
    decisions = run.records("decision")
    assert [d["step"] for d in decisions] == [2, 4]
    assert not any(d["applied"] for d in decisions)
    # It looked at everything, or being identical would mean nothing.
    seen = run.records("observation")
    assert [o["step"] for o in seen] == [1, 2, 3, 4]
    assert all(o["attention"] is not None and o["grad_norm"] > 0 and o["text_length"] > 1 for o in seen)
    assert all(set(o["losses"]) == {"total", "mel", "gate", "guided"} for o in seen)
    assert [o["stop"] is not None for o in seen] == [False, True] * 2
