"""Whatever breaks, the training goes on: bad data, a fault of the brain, a run that ends without a checkpoint."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("TTS", reason="Coqui is not installed: pip install 'tts-brain[coqui]'")

from coqui_run import assert_finite, assert_same, events, make_config, make_trainer, quick, records, weights
from trainer import TrainerArgs
from TTS.tts.layers.losses import TacotronLoss

from tts_brain.journal import read_journal
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.pytorch.session import BrainSession
from tts_brain_coqui import attach

NO_SSIM = {"decoder_ssim_alpha": 0.0, "postnet_ssim_alpha": 0.0}
ADAM = {"optimizer": "Adam", "optimizer_params": {}}


class SpoiltLoader:
    """The host's own loader; the mel of some batches holds a NaN.

    Args:
        trainer: whose training samples are loaded.
        spoilt: numbers of the batches, from 0.
        between: called with the trainer before each batch and after the last one.
    """

    def __init__(self, trainer: Any, spoilt: set[int], between: Callable[[Any], None] = lambda _: None) -> None:
        self._trainer, self._spoilt, self._between = trainer, spoilt, between
        self._loader = trainer.get_train_dataloader(trainer.train_samples)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self._loader):
            self._between(self._trainer)
            if number in self._spoilt:
                batch["mel"][0, 6, 3] = math.nan  # the last frame of a decoder step is what the next one is fed
            yield batch
        self._between(self._trainer)


def train(
    config: Any, steps: int, spoilt: set[int], between: Callable[[Any], None] = lambda _: None, **more: Any
) -> Any:
    trainer = make_trainer(config, steps=steps, **more)
    trainer.train_loader = SpoiltLoader(trainer, spoilt, between)
    trainer._fit()
    return trainer


@pytest.mark.parametrize("brain", [False, quick("observe")], ids=["plain", "observe"])
def test_plain_coqui_stops_at_one_nan(brain: Any, corpus: Path, tmp_path: Path) -> None:
    """Why there is a guard. With SSIM on, the default, one bad value in one clip ends the run."""
    with pytest.raises(AssertionError, match="got nan"):
        train(make_config(corpus, tmp_path, model="tacotron", brain=brain), 3, {1})


def test_plain_coqui_is_poisoned_by_one_nan(corpus: Path, tmp_path: Path) -> None:
    """Without SSIM every weight is NaN for good, and nothing is said."""
    trainer = train(make_config(corpus, tmp_path, model="tacotron", **NO_SSIM, **ADAM), 3, {1})
    assert trainer.total_steps_done == 3
    assert all(torch.isnan(parameter).all() for parameter in trainer.model.decoder.parameters())


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("full", {}),
        ("assist", {**NO_SSIM, "model": "tacotron"}),
        ("full", {**NO_SSIM, "grad_clip": 0.0, "model": "tacotron"}),
    ],
    ids=["full", "assist, no SSIM", "tacotron, no SSIM, no clip"],
)
def test_a_nan_never_reaches_the_weights(mode: str, settings: Any, corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, brain=quick(mode), **ADAM, **settings)
    trainer = train(config, 4, {1}, between=assert_finite)
    (event,) = events(trainer, "skipped_gradient")
    assert event["step"] == 2
    assert "running_mean" in event["message"] and "non-finite gradient" in event["message"]
    assert [e["event"] for e in records(trainer, "event")] == ["skipped_gradient", "advice"]
    # The user is told which clip it is.
    (advice,) = events(trainer, "advice")
    assert advice["cause"] == "non-finite data" and "espeak_" in advice["message"]
    observed = records(trainer, "observation")
    assert [o["skipped"] for o in observed] == [False, True, False, False]
    assert observed[1]["losses"]["mel"] == "nan" and math.isfinite(observed[2]["losses"]["mel"])
    # The skipped step is none for the optimizer either; the others are.
    assert {int(s["step"]) for s in trainer.optimizer[0].state_dict()["state"].values()} == {3}


def test_a_nan_among_accumulated_batches(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick(), **ADAM)
    trainer = train(config, 6, {2}, args=TrainerArgs(grad_accum_steps=2))
    assert_finite(trainer)
    assert [o["skipped"] for o in records(trainer, "observation")] == [False, True, False]


def test_a_gradient_scaler_that_leaves_the_step_out(corpus: Path, tmp_path: Path) -> None:
    """fp16: the scaler skips after a NaN, so no optimizer hook ever runs; the brain must see it all the same."""
    trainer = make_trainer(make_config(corpus, tmp_path, model="tacotron", **ADAM), steps=9)
    trainer.use_amp_scaler, trainer.scaler = True, torch.GradScaler("cpu", init_scale=2.0**126)  # overflows at first
    attach(trainer, quick())
    trainer.train_loader = SpoiltLoader(trainer, {5, 6, 7}, between=assert_finite)
    trainer._fit()
    skips = sum(1 for o in records(trainer, "observation") if o["skipped"])
    assert skips == 3 and len(events(trainer, "skipped_gradient")) == 3
    (event,) = events(trainer, "rollback")
    assert event["restored"] == 2
    # Steps of the optimizer and skips after a NaN; the scaler's own first tries are no steps.
    assert trainer.total_steps_done == 9 > trainer.brain.session.step


def test_moments_that_float16_loses_are_held_and_a_checkpoint_has_the_hosts_units(corpus: Path, tmp_path: Path) -> None:
    """With torch's Adam; Coqui's own RAdam keeps its moments in float32 whatever the weights are."""
    settings = {"optimizer": "Adam", "optimizer_params": {"eps": 1e-6}, "model": "tacotron", **NO_SSIM}
    config = make_config(corpus, tmp_path, brain=quick(), save_checkpoints=True, save_step=5, **settings)
    trainer = make_trainer(config, steps=6)
    trainer.optimizer[0].register_step_post_hook(_halve)
    trainer._fit()
    (event,) = events(trainer, "moments_held")
    assert event["step"] == 3 and not events(trainer, "fault")
    assert_finite(trainer)
    saved = torch.load(trainer.output_path / "checkpoint_5.pth")["optimizer"]
    states = (saved[0] if isinstance(saved, list) else saved)["state"].values()
    seconds = torch.cat([state["exp_avg_sq"].flatten() for state in states])
    assert seconds.max() < 1e-2 and (seconds > 0.0).float().mean() > 0.5


def _halve(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """As a model that was made half of: weights and moments are values of float16."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = [v for k, v in optimizer.state.get(parameter, {}).items() if k.startswith("exp_avg")]
            for tensor in (parameter.data, *moments):
                tensor.copy_(tensor.half().float())


def test_no_checkpoint_holds_a_nan(corpus: Path, tmp_path: Path) -> None:
    """The host writes its checkpoint inside the very step that met the NaN, before anybody else sees the losses."""
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick(), save_checkpoints=True, save_step=2)
    trainer = train(config, 3, {2})  # its third batch is global step 2
    saved = torch.load(trainer.output_path / "checkpoint_2.pth")["model"]
    assert all(torch.isfinite(value).all() for value in saved.values() if value.is_floating_point())
    assert records(trainer, "observation")[2]["skipped"]


@pytest.fixture(scope="module")
def rolled_back(corpus: Path, module_folder: Path) -> dict[str, Any]:
    """Four spoilt batches in a row after a snapshot at step 2; Adam has state by then."""
    kept: list[dict[str, Any]] = []

    def keep(trainer: Any) -> None:
        assert_finite(trainer)
        state = {"weights": weights(trainer), "optimizer": trainer.optimizer[0].state_dict()["state"]}
        kept.append(torch.utils._pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state))
        trainer.dashboard_logger.flush()

    config = make_config(corpus, module_folder, model="tacotron", brain=quick(), **ADAM)
    trainer = train(config, 9, {3, 4, 5}, between=keep)
    return {"trainer": trainer, "kept": kept}


def test_three_in_a_row_roll_back(rolled_back: dict[str, Any]) -> None:
    trainer, kept = rolled_back["trainer"], rolled_back["kept"]
    (event,) = events(trainer, "rollback")
    assert (event["step"], event["restored"]) == (6, 2)
    assert "3 steps in a row were not finite" in event["message"] and "weights of step 2" in event["message"]
    assert_same(kept[6], kept[2])  # between step 6 and 7: what stood between step 2 and 3
    moved = not torch.equal(kept[5]["weights"]["embedding.weight"], kept[2]["weights"]["embedding.weight"])
    assert moved, "step 3 was a good one, so something was taken back"


def test_rolled_back_runs_go_on_slower(rolled_back: dict[str, Any]) -> None:
    trainer, kept = rolled_back["trainer"], rolled_back["kept"]
    assert trainer.total_steps_done == 9
    (decision,) = (d for d in records(trainer, "decision") if d["verdict"] == "roll_back")
    later = [d for d in records(trainer, "decision") if d["step"] > 6]
    assert decision["before"]["learning_rate"] == 1.0
    assert later and all(d["before"]["learning_rate"] == 0.5 for d in later)
    assert not torch.equal(kept[7]["weights"]["embedding.weight"], kept[6]["weights"]["embedding.weight"])
    assert trainer.optimizer[0].param_groups[0]["lr"] == trainer.config.lr
    assert not events(trainer, "fault")


def test_a_checkpoint_of_the_rollback_step_holds_what_was_restored(corpus: Path, tmp_path: Path) -> None:
    """The host writes it before the brain has seen the step; the sidecar beside it says "rolled back"."""
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick(), save_checkpoints=True, save_step=5)
    trainer = train(config, 6, {3, 4, 5})
    (event,) = events(trainer, "rollback")
    assert event["step"] == 6  # the host counts from 0: its step 5
    saved = torch.load(trainer.output_path / "checkpoint_5.pth")
    assert saved["step"] == 5 and trainer.total_steps_done == 6
    assert_same(saved["model"], weights(trainer))
    assert (trainer.output_path / "brain" / "state_5.safetensors").exists()


def test_without_a_snapshot_a_rollback_says_so(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick(decide_every=50))
    trainer = train(config, 5, {1, 2, 3})
    assert_finite(trainer)
    (event,) = events(trainer, "rollback")
    assert event["restored"] is None and "no snapshot" in event["message"]


# Faults of the brain.


def broken(*_: Any) -> Any:
    raise ZeroDivisionError("made by the test")


def assert_fault(trainer: Any, step: int) -> None:
    (event,) = events(trainer, "fault")
    assert event["step"] == step and event["message"] == "ZeroDivisionError: made by the test"
    assert "Traceback" in event["traceback"]
    assert [o["step"] for o in records(trainer, "observation")][-1] <= step


def test_a_fault_of_the_brain_leaves_the_host_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only knobs that are neutral at first, so the whole run must be the host's, the fault in its middle or not."""
    host = train(make_config(corpus, tmp_path / "host", model="tacotron", **ADAM), 5, set())
    monkeypatch.setattr(ContextAwareTrainingManager, "decide", broken)
    brain = quick(knobs="learning_rate, mel_weight, grad_clip")
    ours = train(make_config(corpus, tmp_path / "ours", model="tacotron", brain=brain, **ADAM), 5, set())
    assert ours.total_steps_done == 5
    assert_fault(ours, 2)
    assert "fault of the brain, not of your run" in caplog.text
    assert_same(weights(ours), weights(host))
    assert_same(ours.optimizer[0].state_dict(), host.optimizer[0].state_dict())


def test_after_a_fault_no_knob_is_left_turned(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, model="tacotron", brain=quick()), steps=4)
    session = trainer.brain.session
    session.manager.knobs["learning_rate"] = 3.0
    session._turn_taps()
    monkeypatch.setattr(ContextAwareTrainingManager, "decide", broken)
    losses: list[tuple[float, float]] = []
    plain, forward = TacotronLoss(trainer.config), trainer.criterion[0].forward

    def both(*args: Any) -> Any:
        result = forward(*args)
        losses.append((result["loss"].item(), plain(*args)["loss"].item()))
        return result

    trainer.criterion[0].forward = both
    trainer._fit()
    assert_fault(trainer, 2)
    assert dict(session.knobs) == {} and session._taps[0].rate_multiplier == 1.0
    assert [ours == host for ours, host in losses] == [False, False, True, True]


@pytest.mark.parametrize("where", ["see_attention", "see_regime", "_take_in", "save"])
def test_a_fault_anywhere_is_fenced(where: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BrainSession, where, broken)
    config = make_config(
        corpus, tmp_path, model="tacotron", brain=quick(), save_checkpoints=True, save_step=1, save_n_checkpoints=1
    )
    trainer = train(config, 3, set())
    assert trainer.total_steps_done == 3
    assert len(events(trainer, "fault")) == 1
    assert (trainer.output_path / "checkpoint_2.pth").exists()
    # The brain's state is unsure after a fault: better none than a wrong one.
    assert not list(trainer.output_path.glob("brain/state_*"))


# Files.


def test_folder_that_cannot_be_written_is_said_before_training(corpus: Path, tmp_path: Path) -> None:
    def block(trainer: Any) -> None:
        (trainer.output_path / "brain").write_text("a file where the brain wants its folder")

    config = make_config(corpus, tmp_path, model="tacotron", brain=True)
    with pytest.raises(OSError, match=r"cannot write its files to .*brain: .*output_path.* or set brain=False"):
        make_trainer(config, steps=1, callbacks={"on_init_start": block})


def fail_before(number: int, error: type[BaseException]) -> Callable[[Any], None]:
    def between(trainer: Any) -> None:
        if trainer.total_steps_done == number:
            raise error("made by the test")

    return between


def test_a_run_that_fails_without_checkpoint_keeps_its_journal(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick())
    trainer = make_trainer(config, steps=4)
    trainer.train_loader = SpoiltLoader(trainer, set(), fail_before(2, RuntimeError))
    with pytest.raises(SystemExit) as end:
        trainer.fit()
    assert end.value.code == 1
    folder = trainer.output_path
    assert not folder.exists(), "Coqui removes it"
    kept = list(read_journal(folder.with_name(folder.name + ".brain")))
    assert [r["step"] for r in kept if r["kind"] == "observation"] == [1, 2]
    assert kept[-1]["kind"] == "end" and kept[-1]["message"] == "the run ended with RuntimeError: made by the test"


def test_ctrl_c_keeps_the_checkpoint_and_the_sidecar(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick())
    trainer = make_trainer(config, steps=4)
    trainer.train_loader = SpoiltLoader(trainer, set(), fail_before(2, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        trainer._fit()
    trainer.save_checkpoint()  # what fit() does next; it then ends the process
    assert (trainer.output_path / "checkpoint_2.pth").exists()
    assert (trainer.output_path / "brain" / "state_2.safetensors").exists()
    assert not trainer.output_path.with_name(trainer.output_path.name + ".brain").exists()
    assert "KeyboardInterrupt" in records(trainer, "end")[0]["message"]
