"""What the temporal model is trained on, and that training it makes what inference reads."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from bench import component_temporal
from tts_brain.context.temporal import HORIZONS, TemporalForecaster, by_then, load_net, quantiles
from tts_brain.learning.temporal_scores import CAP, auroc, last_value, ours, pinball, score
from tts_brain.learning.temporal_targets import Samples, course, observed, samples
from tts_brain.learning.temporal_traces import RUNS_PER_FILE, load_folder, plans
from tts_brain.learning.temporal_training import Model, Recipe, gather, main, objective, part_of, store
from tts_brain.learning.traces import Recorder, Trace, save
from tts_brain.types import KNOBS, LEARNING_RATE, AttentionReport, Observation

NOISE = 0.05


def trace(
    losses: Sequence[float],
    attention: Sequence[float] | None = None,
    *,
    name: str = "a",
    corpus: str = "c",
    faults: Sequence[str] = (),
) -> Trace:
    """A run with these mel losses, and ``attention_diag`` measured at every fifth step."""
    recorder = Recorder()
    for at, loss in enumerate(losses):
        measured = attention is not None and (at + 1) % 5 == 0
        diag = attention[at] if attention is not None else 0.0
        report = AttentionReport(diag, diag, diag, diag, 0.5, 1.0, 1.0, 5.0, 1.0) if measured else None
        seen = Observation(at + 1, {"total": loss, "mel": loss}, grad_norm=1.0, attention=report)
        recorder.add(seen, {LEARNING_RATE: 1.0})
    return recorder.trace(name, host="h", corpus=corpus, faults=faults)


def falling(steps: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 2.0 + 2.0 * np.exp(-np.arange(steps) / 80.0) + NOISE * rng.normal(size=steps)


@pytest.fixture(scope="module")
def some() -> Samples:
    attention = np.linspace(0.0, 0.7, 300)
    return samples([trace(falling(300, seed), attention) for seed in range(3)])


def test_a_calm_run_has_no_event() -> None:
    happened = course(trace(falling(300), np.linspace(0.0, 0.9, 300)))
    assert not happened.diverged.any() and (happened.lost_at == 0.0).all()


def test_divergence_is_what_the_brain_calls_so() -> None:
    losses = falling(300)
    losses[200:] += np.linspace(0.0, 5.0, 100)
    happened = course(trace(losses))
    first = int(np.flatnonzero(happened.diverged)[0])
    assert 205 <= first <= 230
    found = samples([trace(losses)])
    before = found.of(found.step == 195.0)
    assert before.diverged[0].tolist() == [float(first < 195 + h) for h in HORIZONS]
    after = found.of(found.step == 240.0)
    assert np.isnan(after.diverged).all()  # no news


def test_three_steps_that_are_not_finite_are_divergence() -> None:
    losses = falling(120)
    losses[60], losses[80:83] = math.nan, math.inf
    assert np.flatnonzero(course(trace(losses)).diverged).tolist() == [82]


def test_an_alignment_is_lost_when_it_stays_so() -> None:
    attention = np.full(300, 0.6)
    attention[100:130] = 0.1  # comes back
    attention[200:] = 0.1
    happened = course(trace(falling(300), attention))
    assert np.flatnonzero(happened.lost_at == 1.0).tolist() == [209]  # smoothed: 0.35, then 0.225
    found = samples([trace(falling(300), attention)])
    assert found.of(found.step == 180.0).lost[0].tolist() == [0.0, 1.0, 1.0]
    assert np.isnan(found.of(found.step == 220.0).lost).all()  # no alignment there


def test_what_the_end_of_the_run_hides_is_not_known() -> None:
    attention = np.full(300, 0.6)
    attention[270:] = 0.1
    found = samples([trace(falling(300), attention)])
    late = found.of(found.step == 240.0)
    assert late.lost[0, 0] == 0.0 and np.isnan(late.lost[0, 1:]).all()
    assert np.isnan(late.loss[0, 2]) and np.isfinite(late.loss[0, :2]).all()


def test_weak_attention_is_no_alignment() -> None:
    attention = np.full(300, 0.2)
    attention[150:] = 0.01
    found = samples([trace(falling(300), attention)])
    assert np.isnan(found.lost).all() and np.isfinite(found.attention[:, 0]).all()


def test_the_loss_to_come_is_a_median_of_five(some: Samples) -> None:
    losses = falling(300)
    at = int(np.flatnonzero((some.run == 0) & (some.step == 150.0))[0])
    wanted = np.median(losses[170:175])
    assert some.level[at] + some.scale[at] * math.sinh(some.loss[at, 0]) == pytest.approx(wanted, rel=1e-5)


def test_windows_are_what_the_forecaster_sees(some: Samples) -> None:
    """Trained on, and forecast from: the same."""
    made = TemporalForecaster()
    for observation, knobs in list(observed(trace(falling(300), np.linspace(0.0, 0.7, 300))))[:150]:
        made.observe(observation, knobs)
    found = made.forecast()
    one = some.of((some.run == 0) & (some.step == 150.0))
    assert found is not None
    answers = ours(load_net(), one)
    assert np.allclose(one.level[0] + one.scale[0] * answers.loss[0], found.loss, rtol=1e-4)
    assert np.allclose(answers.diverged[0], found.divergence, rtol=1e-3)
    assert np.allclose(answers.attention[0], found.attention_diag, atol=1e-4)


def test_runs_without_windows_are_refused() -> None:
    with pytest.raises(ValueError, match="record longer ones"):
        samples([trace(falling(30))])


def test_torch_and_numpy_say_the_same(some: Samples, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(Recipe(states=8, keys=4, hidden=8)).eval()
    store(tmp_path / "w.safetensors", model.net(), {})
    net = load_net(tmp_path / "w.safetensors")
    with torch.no_grad():
        raw = model(*(torch.from_numpy(part) for part in (some.blocks, some.filled, some.summary))).numpy()
    answers = ours(net, some)
    assert np.allclose(np.stack([by_then(one[:, 6]) for one in raw]), answers.diverged, atol=1e-5)
    assert np.allclose(np.sinh(np.stack([quantiles(one[:, :3]) for one in raw])), answers.loss, rtol=1e-3, atol=1e-4)


def test_what_is_not_known_teaches_nothing(some: Samples) -> None:
    model = Model(Recipe(states=8, keys=4, hidden=8)).eval()
    names = ("blocks", "filled", "summary", "loss", "attention_now", "attention", "diverged", "lost")
    tensors = {name: torch.from_numpy(getattr(some, name).copy()) for name in names}
    tensors = {name: value if value.dtype == torch.bool else value.float() for name, value in tensors.items()}
    for name in ("loss", "attention", "diverged", "lost"):
        tensors[name][:] = math.nan
    assert all(float(value.detach()) == 0.0 for value in objective(model, tensors).values())


def test_a_run_and_its_twin_are_in_one_part() -> None:
    parts = {}
    for fault in (f"f{i}" for i in range(60)):
        both = {part_of(trace([1.0], name=arm, faults=(fault,))) for arm in ("default", "brain")}
        assert len(both) == 1
        parts[fault] = both.pop()
    shares = [list(parts.values()).count(part) / 60 for part in ("train", "validation", "test")]
    assert shares[0] > 0.3 and min(shares[1:]) > 0.05


def test_another_corpus_is_for_the_test_only(some: Samples) -> None:
    runs = {corpus: [trace(falling(150), corpus=corpus, faults=(f"f{i}",)) for i in range(12)] for corpus in "xyz"}
    made = gather(runs["x"], runs["y"], runs["z"])
    assert {"y, runs not trained on", "z, another corpus", "micro-Tacotron, runs not trained on"} <= set(made.tests)
    whole = len(samples(runs["y"]))
    assert made.real is not None
    assert len(made.real) + len(made.validation) + len(made.tests["y, runs not trained on"]) == whole


def test_pinball_and_auroc() -> None:
    assert pinball(np.array([[0.0, 1.0, 2.0]]), np.array([1.0])) == pytest.approx([(0.1 + 0.0 + 0.1) / 3])
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, events = rng.integers(0, 5, 80).astype(float), (rng.random(80) < 0.3).astype(float)
    assert auroc(scores, events) == pytest.approx(roc_auc_score(events, scores))
    assert auroc(scores, np.where(np.arange(80) < 40, events, math.nan)) == pytest.approx(
        roc_auc_score(events[:40], scores[:40])
    )
    assert math.isnan(auroc(scores, np.zeros(80)))


def test_the_last_value_with_its_own_errors(some: Samples) -> None:
    still = last_value(some.run < 2, some)
    found = score(still, some)
    assert all(0.0 < value < CAP for value in found["loss"])
    assert (still.loss[:, :, 0] <= still.loss[:, :, 2]).all()
    assert (still.attention >= 0.0).all() and (still.attention <= 1.0).all()


def test_made_up_runs_are_a_function_of_seed_and_number() -> None:
    one, two, other = plans(1, 2, 50), plans(1, 2, 50), plans(1, 3, 50)
    assert one == two and one != other and len(one) == RUNS_PER_FILE
    assert plans(1, 2, 50, 3) == one[:3]
    rates = [plan.setting.rate for number in range(8) for plan in plans(1, number, 50)]
    assert min(rates) < 5e-4 and max(rates) > 3e-2
    moved = [plan for plan in one if len({knobs[LEARNING_RATE] for knobs in plan.knobs}) > 1]
    assert 0 < len(moved) < len(one)
    assert all(0.0 <= value < math.inf for plan in one for knobs in plan.knobs for value in knobs.values())
    assert all(set(knobs) <= set(KNOBS) for plan in one for knobs in plan.knobs)


def test_the_command_makes_weights_and_card_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    for i in range(9):
        save(real / f"{i}.safetensors", [trace(falling(100, i), np.linspace(0, 0.5, 100), faults=(f"f{i}",))])
    arguments = [
        "--micro",
        str(tmp_path / "micro"),
        "--runs",
        "3",
        "--steps",
        "50",
        "--epochs",
        "1",
        "--real",
        str(real),
    ]
    arguments += ["--batches", "3", "--out", str(tmp_path / "w.safetensors")]
    assert main(arguments) == 0
    micro = tmp_path / "micro" / "micro-000.safetensors"
    made, weights = micro.stat().st_mtime_ns, (tmp_path / "w.safetensors").read_bytes()
    assert len(load_folder(tmp_path / "micro")) == 3
    assert main(arguments) == 0
    assert micro.stat().st_mtime_ns == made  # kept
    assert (tmp_path / "w.safetensors").read_bytes() == weights  # the same seed, the same weights
    load_net(tmp_path / "w.safetensors")
    text = (tmp_path / "w.md").read_text(encoding="utf-8")
    assert "c, runs not trained on" in text and str(tmp_path) not in text
    assert "pinball loss" in capsys.readouterr().out


def test_rivals_go_on_as_they_should() -> None:
    attention = np.linspace(0.0, 0.5, 200)
    for rival, close in ((component_temporal.TheilSen(), 1e-6), (component_temporal.Kalman(), 0.35)):
        for step in range(1, 201):
            rival.observe(step, 5.0 - 0.01 * step, attention[step - 1] if step % 5 == 0 else None)
        losses, attentions = rival.points()
        assert losses == pytest.approx([3.0 - 0.01 * horizon for horizon in HORIZONS], abs=close + 0.021)
        assert attentions[0] == pytest.approx(0.5 + 25 * 0.5 / 199, abs=0.05)


def test_the_benchmark_judges_on_another_corpus_and_on_runs_kept_for_the_test(tmp_path: Path) -> None:
    attention = np.concatenate([np.linspace(0.0, 0.6, 100), np.full(100, 0.05)])
    for corpus in ("kathleen-en-us", "elsewhere"):
        for i in range(12):
            run = trace(falling(200, i), attention, corpus=corpus, faults=(f"f{i}",))
            save(tmp_path / corpus / f"{i}.safetensors", [run])
    rows = component_temporal.rows(False, tmp_path)
    assert all(set(row) == {"part", "against", "figure", "ours", "theirs", "note"} for row in rows)
    notes = {row["note"].split(";")[0] for row in rows}
    assert any(note.startswith("elsewhere, a corpus not trained on, 12 runs") for note in notes)
    assert {row["against"] for row in rows} >= {"last value", "Theil-Sen", "Kalman"}
    losses = [row for row in rows if row["figure"].startswith("pinball loss of the loss")]
    assert losses and all(0.0 < row["ours"] < CAP and 0.0 < row["theirs"] < CAP for row in losses)
