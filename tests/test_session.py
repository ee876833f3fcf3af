"""One process under a session: what users do to a run, and what disks do to it."""

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_run import Stretch, drive, make_manager, observations
from torch import Tensor

from tts_brain.config import BrainConfig
from tts_brain.feedback import rollback
from tts_brain.feedback.diagnosis import BatchFacts
from tts_brain.journal import read_journal
from tts_brain.pytorch import sidecar as sidecar_module
from tts_brain.pytorch.session import BrainSession
from tts_brain.statefile import save_state
from tts_brain.types import GUIDED_SIGMA, KNOBS, LEARNING_RATE, Capabilities, Verdict

HOST = Capabilities(host="one", losses=("total", "mel"), knobs=tuple(KNOBS), alignment="attention", stop_token=False)
QUICK = {"decide_every": 2, "attention_every": 1, "trial_steps": 4, "cooldown_steps": 2, "snapshot_every": 4}


class Run:
    """A network with a batch norm, that a session looks at; losses and attention are what a test says."""

    def __init__(self, folder: Path, rates: tuple[float, ...] = (1e-3,), **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        layers = [list(layer.parameters()) for layer in self.model]
        groups = [{"params": layers[n] if n else [*layers[0], *layers[1]], "lr": r} for n, r in zip((0, 2), rates)]  # noqa: B905
        self.optimizer = torch.optim.Adam(groups if len(rates) > 1 else self.model.parameters(), lr=rates[0])
        self.session = BrainSession(
            BrainConfig(**QUICK | settings),
            HOST,
            folder,
            optimizers=[self.optimizer],
            model=self.model,
            parts={"optimizer": self.optimizer},
            host_values={GUIDED_SIGMA: 0.4},
        )
        self.verdicts: list[Verdict] = []

    @property
    def statistics(self) -> Tensor:
        return self.model[1].running_var

    def step(self, mel: float = 1.0, diag: float | None = None) -> None:
        x = torch.randn(16, 4)
        self.optimizer.zero_grad()
        (self.model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        if diag is not None and self.session.wants_attention:
            self.session.see_attention(attention(diag), torch.tensor([12]), torch.tensor([12]))
        self.optimizer.step()
        decision = self.session.after_batch({"total": mel, "mel": mel}, text_length=12.0)
        if decision is not None:
            self.verdicts.append(decision.verdict)

    def go(self, steps: int, **seen: Any) -> "Run":
        for _ in range(steps):
            self.step(**seen)
        return self


def attention(diag: float) -> Tensor:
    """So much of a perfect diagonal, the rest spread over the text."""
    return (diag * torch.eye(12) + (1.0 - diag) * torch.full((12, 12), 1.0 / 12)).unsqueeze(0)


def test_after_a_rollback_a_nan_batch_finds_the_statistics_of_the_weights_that_came_back(tmp_path: Path) -> None:
    run = Run(tmp_path).go(10)
    healthy = run.statistics.clone()
    for _ in range(3):
        run.step(mel=float("nan"))
        run.statistics.fill_(1e9)  # of weights that have gone far off, finite all the same
    run.step(mel=float("nan"))
    assert run.verdicts.count(Verdict.ROLL_BACK) >= 1
    run.statistics.fill_(float("nan"))
    assert run.session.heal() == ["1.running_var"]
    assert float(run.statistics.max()) < 10.0 * float(healthy.max())


@pytest.mark.parametrize("changes", [True, False])
def test_what_an_alignment_was_at_another_reduction_factor_is_not_held_against_it(
    tmp_path: Path, changes: bool
) -> None:
    run = Run(tmp_path, lost_alignment_steps=20)
    run.session.see_regime({"reduction factor": 7})
    run.go(30, diag=0.9)
    run.session.see_regime({"reduction factor": 2 if changes else 7})
    run.go(60, diag=0.3)
    assert (Verdict.ROLL_BACK in run.verdicts) is not changes


def test_a_name_that_an_older_sidecar_lacks_is_no_change_and_a_word_may_be_one(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for regime in ({"r": 7}, {"r": 7, "loss_type": "L1"}, {"r": 7, "loss_type": "L1+L2"}):
        run.session.see_regime(regime)
        run.go(1)
    changed = [r["message"] for r in read_journal(tmp_path) if r.get("event") == "regime_changed"]
    assert changed == ["loss_type L1 → L1+L2"]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_records_and_sidecars_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(tmp_path).go(10)
    before = dict(run.session.knobs)
    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(run.session.journal, "write", full)
        patch.setattr(sidecar_module, "save_state", full)
        run.go(10)
        run.session.save(tmp_path / "sidecar")
    said = [r.getMessage() for r in caplog.records]
    assert sum("journal.jsonl cannot be written" in line for line in said) == 1
    assert sum("start the brain afresh" in line for line in said) == 1
    assert run.session.active and run.session.knobs and before
    run.go(10)
    run.session.save(tmp_path / "sidecar")
    steps = {r["step"] for r in read_journal(tmp_path) if r["kind"] == "decision"}
    assert steps == {*range(2, 11, 2), *range(22, 31, 2)}
    resumed = Run(tmp_path / "resumed")
    resumed.model.load_state_dict(run.model.state_dict())
    assert resumed.session.load(tmp_path / "sidecar")


def test_a_snapshot_that_cannot_be_written_is_tried_again_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, snapshot_place="disk")
    with monkeypatch.context() as patch:
        patch.setattr(rollback._Disk, "put", full)
        run.go(12)
    tried = [r["step"] for r in read_journal(tmp_path) if r.get("event") == "no_snapshot"]
    assert tried == [2, 6, 10]
    run.go(8)
    assert run.session.active and list((tmp_path / "snapshots").glob("snapshot-*"))


def test_of_several_groups_the_highest_rate_is_looked_at_and_kept_in_bounds(tmp_path: Path) -> None:
    run = Run(tmp_path, rates=(1e-5, 1e-3), journal_every=1)
    used: list[list[float]] = []
    run.optimizer.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    run.session.manager.knobs[LEARNING_RATE] = 64.0
    run.session._turn_taps()
    run.step()
    assert used[0] == pytest.approx([1e-4, 1e-2])
    run.session.manager.knobs[LEARNING_RATE] = 4.0
    run.session._turn_taps()
    run.step()
    assert used[1] == pytest.approx([4e-5, 4e-3])
    assert {r["learning_rate"] for r in read_journal(tmp_path) if r["kind"] == "observation"} == {1e-3}


def test_a_model_that_was_trained_before_keeps_the_hosts_rate() -> None:
    stream = [Stretch(400, slope=-0.005, attention=0.75)]
    trained = drive(make_manager(), observations(stream))
    assert max(d.after[LEARNING_RATE] for d in trained) <= 1.0
    fresh = drive(make_manager(), observations([Stretch(20, slope=-0.005, attention=0.05), *stream]))
    assert max(d.after[LEARNING_RATE] for d in fresh) > 4.0


@pytest.mark.parametrize(
    ("settings", "any_is"), [({}, True), ({"mode": "observe"}, False), ({"knobs": "learning_rate"}, False)]
)
def test_what_is_left_out_for_a_wrong_text_is_said_where_anything_is(
    settings: dict[str, Any], any_is: bool, tmp_path: Path
) -> None:
    run = Run(tmp_path, **settings)
    for rates in [*[(0.1,) * 16] * 15, (0.9,) * 16]:
        assert run.session.believable_rates is None
        run.session.see_batch(BatchFacts(16, text_rates=rates))
        run.step()
    assert run.session.believable_rates == pytest.approx((0.08, 0.125))
    said = [record["message"] for record in read_journal(tmp_path) if record.get("event") == "clips_left_out"]
    assert len(said) == any_is and all("0.08 to 0.125 tokens per frame" in one for one in said)


def test_speaking_rates_are_asked_for_at_first_and_then_once_per_decision(tmp_path: Path) -> None:
    run, asked = Run(tmp_path, decide_every=4), []
    for _ in range(40):
        asked.append(run.session.wants_rates)
        rates = (0.1,) * 16 if asked[-1] else ()
        run.session.see_batch(BatchFacts(16, text_rates=rates))
        run.step()
    assert asked[:32] == [True] * 32  # 512 clips
    assert asked[32:] == [False, False, False, True] * 2
    run.session.fault(RuntimeError("of ours"))
    assert not run.session.wants_rates


def test_a_sidecar_is_used_with_the_weights_that_it_is_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also after rounding, as another device sums in another order; not with those of another run."""
    run = Run(tmp_path / "run").go(6)
    sidecar = tmp_path / "state.safetensors"
    run.session.save(sidecar)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    rounded = Run(tmp_path / "rounded")
    rounded.model.load_state_dict({n: v * (1.0 + 1e-6) if v.is_floating_point() else v for n, v in weights.items()})
    assert rounded.session.load(sidecar) and rounded.session.step == 6
    other = Run(tmp_path / "other").go(5)
    assert not other.session.load(sidecar, step_otherwise=5) and other.session.step == 5
    assert "is of other weights than the checkpoint" in caplog.text and str(sidecar) in caplog.text
    assert other.session.active and other.go(3).session.step == 8
    larger = torch.nn.Sequential(run.model, torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"of a model with 6 tensors of weights, this one has 8\. Delete the file"):
        sidecar_module.read_sidecar(sidecar, larger)


def test_a_sidecar_without_norms_or_of_weights_that_broke_is_used(tmp_path: Path) -> None:
    run = Run(tmp_path / "run").go(6)
    with torch.no_grad():
        run.model[0].weight[0, 0] = torch.nan
    run.session.save(tmp_path / "nan.safetensors")
    assert run.session.load(tmp_path / "nan.safetensors")
    state = sidecar_module.read_sidecar(tmp_path / "nan.safetensors", run.model)
    del state["weights"]
    save_state(
        tmp_path / "old.safetensors", state, kind=sidecar_module.SIDECAR_KIND, version=sidecar_module.SIDECAR_VERSION
    )
    assert Run(tmp_path / "later").session.load(tmp_path / "old.safetensors")


def test_a_fault_before_the_first_step_is_told_with_the_run(tmp_path: Path) -> None:
    """Records above a run's start are those of an earlier run in the folder."""
    run = Run(tmp_path)
    run.session.fault(RuntimeError("at once"))
    run.go(3)
    run.session.close()
    kinds = [(record["kind"], record.get("event")) for record in read_journal(tmp_path)]
    assert kinds == [("start", None), ("event", "fault"), ("end", None)]
