"""Which snapshot a rollback goes back to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from simulated_run import Stretch, make_manager, observations, show
from torch.optim import lr_scheduler

from tts_brain.pytorch.ranks import Ranks
from tts_brain.pytorch.rescue import Rescue
from tts_brain.types import LEARNING_RATE


def test_what_has_just_failed_to_help_is_not_put_back_again_where_there_is_an_older_one(tmp_path: Path) -> None:
    """Three rollbacks in a row: the newest snapshot, the one before it, and that again as there is none older."""
    manager, model = make_manager(snapshot_every=20, lost_alignment_steps=30), torch.nn.Linear(1, 1)
    rescue = Rescue(manager, {"model": model, "brain": manager}, tmp_path, Ranks())
    taken: dict[int, float] = {}
    for observation in observations([Stretch(100, attention=0.8)]):
        show(manager, observation)
        with torch.no_grad():
            model.weight.fill_(observation.step)
        if observation.step % 20 == 0:
            rescue.maybe_take(observation.step)
            taken[observation.step] = observation.step
    restored = [rescue.roll_back(step, 1.0) for step in (130, 160, 190)]
    assert restored == [100, 80, 80]
    assert model.weight.item() == taken[80]
    assert manager.rollbacks_in_a_row == 3


SCHEDULES = {
    "a milestone": lambda o: lr_scheduler.MultiStepLR(o, [6, 30]),
    "steps": lambda o: lr_scheduler.StepLR(o, 4, gamma=0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 40),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=40),
    "recomputed": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0 / (1.0 + step)),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


@pytest.mark.parametrize("place", ["memory", "disk"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_and_moments_go_back_and_the_hosts_schedule_does_not(tmp_path: Path, schedule: str, place: str) -> None:
    """The rates of a run that goes back from step 12 to step 4 are those of one that does not, to the end."""

    def hyperparameters(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
        return [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]

    told = []
    for goes_back in (False, True):
        manager, model = make_manager(snapshot_every=4, snapshot_place=place), torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        scheduler = SCHEDULES[schedule](optimizer)
        parts = {"model": model, "optimizer": optimizer, "brain": manager}
        rescue = Rescue(manager, parts, tmp_path / str(goes_back), Ranks())
        rates, taken = [], None
        for step in range(1, 25):
            model(torch.randn(8, 3)).square().mean().backward()
            optimizer.step()
            scheduler.step(1.0) if schedule == "plateau" else scheduler.step()
            if step == 4:
                assert rescue.maybe_take(step) == ""
                taken = [model.weight.clone(), optimizer.state[model.weight]["exp_avg"].clone()]
            if step == 12 and goes_back:
                assert rescue.roll_back(step, 1.0) == 4
                now = [model.weight, optimizer.state[model.weight]["exp_avg"]]
                assert taken is not None and all(map(torch.equal, now, taken))
            rates.append(hyperparameters(optimizer))
        told.append(rates)
    assert told[0] == told[1]
    assert told[0][3] != told[0][11], "a schedule that does not move would show nothing"


def test_a_rollback_that_fails_half_way_leaves_the_hosts_rates_alone(tmp_path: Path) -> None:
    """Also of the second optimizer, and one whose rate is a tensor, which stays the same one."""
    models = [torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]
    rate = torch.tensor(1e-3)
    optimizers = [torch.optim.AdamW(models[0].parameters(), 1e-3), torch.optim.AdamW(models[1].parameters(), rate)]
    manager = make_manager()
    parts = {"a": optimizers[0], "b": optimizers[1], "model": models[0], "brain": manager}
    rescue = Rescue(manager, parts, tmp_path, Ranks())
    assert rescue.maybe_take(4) == ""
    optimizers[0].param_groups[0]["lr"] = 1e-4
    rate.fill_(2e-4)
    parts["model"] = _Torn()
    with pytest.raises(RuntimeError, match="torn"):
        rescue.roll_back(12, 1.0)
    assert optimizers[0].param_groups[0]["lr"] == 1e-4
    assert optimizers[1].param_groups[0]["lr"] is rate and rate.item() == pytest.approx(2e-4)


class _Torn:
    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: object) -> None:
        raise RuntimeError("torn")


def test_the_rate_that_hurt_is_told_by_the_hosts_rate_of_then_and_of_now(tmp_path: Path) -> None:
    """The trial was made at a tenth of the rate that the host had when the snapshot was taken."""
    manager = make_manager(trial_steps=1000)
    rescue = Rescue(manager, {"brain": manager}, tmp_path, Ranks())
    for observation in observations([Stretch(100, slope=-0.05)]):
        late = observation.step > 10
        show(manager, replace(observation, learning_rate=1e-4 if late else 1e-3))
        if observation.step == 10:
            rescue.maybe_take(observation.step)
    trial = manager.feedback.trial
    assert trial is not None
    hurt = trial.moves[LEARNING_RATE][1] * 1e-4
    assert rescue.roll_back(100, trial.moves[LEARNING_RATE][1]) == 10
    assert manager.agents[0].state_dict()["ceiling"] == pytest.approx(hurt)
