"""Which snapshot a rollback goes back to."""

from __future__ import annotations

from pathlib import Path

import torch
from simulated_run import Stretch, make_manager, observations, show

from tts_brain.pytorch.ranks import Ranks
from tts_brain.pytorch.rescue import Rescue


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
    restored = [rescue.roll_back(step) for step in (130, 160, 190)]
    assert restored == [100, 80, 80]
    assert model.weight.item() == taken[80]
    assert manager.rollbacks_in_a_row == 3
