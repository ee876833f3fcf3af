"""The benchmark's rivals: each trains, and does what its paper or its story says."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")
pytest.importorskip("torchjd", reason="TorchJD is not installed: uv pip install torchjd")


from bench.arms import Plain
from bench.data import N_MELS, Clip, Corpus, batches
from bench.host import Training
from bench.population import GUIDED, RATE, within
from bench.population_member import Member, split
from bench.rivals import AutoFix, hand_decayed, hand_weight, plateau, sabotaged
from bench.rivals_scalarised import Scalarised, dwa, famo, uncertainty
from bench.setting import MODELS, Setting

SETTING = Setting(steps=4, batch_size=4, held_out=2, evaluate_every=2, speak_every=10**6, speak_clips=1)
SMALL = {name: min(size, 16) for name, size in MODELS["small"].items()} | {"postnet_layers": 2}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    generator = np.random.default_rng(0)

    def clip(number: int) -> Clip:
        text = generator.integers(2, 9, int(generator.integers(5, 9)))
        return Clip(f"c{number}", text, generator.normal(size=(5 * len(text), N_MELS)).astype(np.float32))

    clips = [clip(number) for number in range(18)]
    tokens = [str(number) for number in range(10)]
    return Corpus("made-up", clips[2:], clips[:2], tokens, np.zeros(N_MELS), np.ones(N_MELS))


@pytest.fixture
def training(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    # Free-running synthesis is another file's matter.
    monkeypatch.setattr(Training, "_speak", lambda self, clips: (0.0, 0.0, 0.0))
    return lambda **changes: Training(corpus, replace(SETTING, **changes), 0, tmp_path, SMALL)


def nothing(step: int, measured: Any) -> None:
    pass


def weights(training: Training) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


ARMS: dict[str, Callable[[], Any]] = {
    "hand": hand_decayed,
    "plateau": plateau,
    "uncertainty": uncertainty,
    "uncertainty, fast": lambda: uncertainty(pace=25.0),
    "dwa": dwa,
    "famo": famo,
    "autofix": AutoFix,
    "sabotaged": sabotaged,
}


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains(name: str, training: Callable[..., Training]) -> None:
    run = training()
    before = weights(run)
    run.run(ARMS[name](), nothing)
    assert len(run.trace) == 4 and all(math.isfinite(row["loss"]) for row in run.trace)
    after = weights(run)
    assert all(parameter.isfinite().all() for parameter in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert "forward" not in run.tts.__dict__ and len(run.optimizer.param_groups) == 1


# Hand-made schedule, and the self-check.


def test_hand_made_schedule_falls_and_scales() -> None:
    for steps in (50, 600, 1000):
        path = [hand_weight(step, steps) for step in range(steps)]
        assert path == sorted(path, reverse=True) and path[0] == 100.0 and path[-1] == 5.0
        assert set(path) == {100.0, 50.0, 25.0, 12.5, 6.25, 5.0}
    assert hand_weight(239, 600) == 100.0 and hand_weight(240, 600) == 50.0 and hand_weight(420, 600) == 6.25


def test_hand_made_schedule_reaches_the_host(training: Callable[..., Training]) -> None:
    run = training()
    run.run(hand_decayed(rate=2e-3), nothing)
    assert [row["used_guided"] for row in run.trace] == [100.0, 100.0, 25.0, 6.25]
    assert {row["used_rate"] for row in run.trace} == {2e-3}


def test_sabotage_is_a_hundredth_of_the_rate(training: Callable[..., Training]) -> None:
    run = training()
    run.run(sabotaged(), nothing)
    assert {row["used_rate"] for row in run.trace} == {1e-5}


# Rules that watch the log.


def shown(arm: Any, losses: list[float], norms: list[float] | None = None) -> tuple[list[float], list[float]]:
    """Guided weight and rate after each step, as the arm is shown this log."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    run: Any = SimpleNamespace(
        tts=SimpleNamespace(attn_loss=SimpleNamespace(alpha=1.0, sigma=0.4)),
        optimizer=optimizer,
        set_rate=lambda rate: optimizer.param_groups[0].update(lr=rate),
    )
    guided, rates = [], []
    arm.attach(run)
    reporter = SimpleNamespace(stats={"loss": [], "grad_norm": []})
    with arm.epoch(run, reporter):
        for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
            arm.step(run, step)
            guided.append(run.tts.attn_loss.alpha)
            rates.append(optimizer.param_groups[0]["lr"])
            reporter.stats["loss"].append(SimpleNamespace(value=loss))
            reporter.stats["grad_norm"].append(SimpleNamespace(value=norm))
    return guided, rates


def test_plateau_lowers_the_rate_on_a_flat_loss_only() -> None:
    _, falling = shown(plateau(), [5.0 * 0.999**step for step in range(400)])
    assert set(falling) == {1e-3}
    guided, flat = shown(plateau(), [5.0] * 400)
    assert flat == sorted(flat, reverse=True) and set(guided) == {1.0}
    # The first epoch is the best, the second is forgiven, the third brings the first cut.
    assert flat[149] == 1e-3 and flat[150] == 5e-4


def bad_stretch() -> tuple[list[float], list[float]]:
    """150 steps as of a run that learns for a while and then gets nowhere: noisy batches, now and then a spike."""
    generator = np.random.default_rng(1)
    losses = [(1.5 + 2.5 * 0.9**step) * generator.uniform(0.94, 1.06) for step in range(150)]
    norms = [generator.uniform(0.7, 1.3) * (3.0 if step % 25 == 24 else 1.0) for step in range(150)]
    return losses, norms


def test_autofix_jumps_chains_and_never_undoes() -> None:
    arm = AutoFix()
    guided, rates = shown(arm, *bad_stretch())
    assert guided[0] == 4.5 and rates[0] == 1e-3
    path = [weight for weight, before in zip(guided, [None, *guided], strict=False) if weight != before]
    assert path[:3] == [4.5, 10.0, 8.0] and 4.5 not in path[1:]
    assert rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(2.5e-5)
    # From the first fix to the floor it takes a few tens of steps.
    first = next(step for step, rate in enumerate(rates) if rate < 1e-3)
    assert next(step for step, rate in enumerate(rates) if rate == 2.5e-5) - first <= 60
    assert 7 <= len(arm.fixes) <= 14


def test_autofix_leaves_a_falling_loss_alone_and_acts_on_what_it_sees() -> None:
    arm = AutoFix()
    guided, rates = shown(arm, [5.0 * 0.98**step for step in range(100)])
    assert set(guided) == {4.5} and set(rates) == {1e-3} and not arm.fixes
    broken = AutoFix()
    _, rates = shown(broken, [math.nan] * 5)
    assert rates == [1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


# Scalarised losses.


def one_batch(run: Training) -> dict[str, torch.Tensor]:
    return next(batches(run.corpus.train, 4, 0))[1]


def gradient(run: Training, loss: torch.Tensor) -> torch.Tensor:
    run.model.zero_grad()
    loss.sum().backward()
    return torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None])


def terms(run: Training, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The host's four terms, had without any arm."""
    kept: list[torch.Tensor] = []
    hooks = [
        run.tts.taco2_loss.register_forward_hook(lambda m, i, out: kept.extend(out)),
        run.tts.attn_loss.register_forward_hook(lambda m, i, out: kept.append(out)),
    ]
    torch.manual_seed(3)
    run.model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(kept)


def with_log_variances(arm: Scalarised, values: torch.Tensor) -> torch.Tensor:
    arm.scalarizer.log_var.data.copy_(torch.tensor([0.5, -0.5, 1.0, -3.0]))
    return 0.5 * torch.exp(-arm.scalarizer.log_var.detach())


def with_epochs(arm: Scalarised, values: torch.Tensor) -> torch.Tensor:
    for average in ([2.0, 2.0, 1.0, 0.1], [1.0, 1.8, 1.0, 0.09]):
        arm.scalarizer(torch.tensor(average))
        arm.scalarizer.step()
    return 4 * torch.softmax(torch.tensor([0.5, 0.9, 1.0, 0.9]) / 2.0, 0)


def with_equal_logits(arm: Scalarised, values: torch.Tensor) -> torch.Tensor:
    return (1 / values) / (1 / values).sum()


@pytest.mark.parametrize(
    ("make", "expected"),
    [(uncertainty, with_log_variances), (dwa, with_epochs), (famo, with_equal_logits)],
    ids=["uw", "dwa", "famo"],
)
def test_gradient_is_the_formula_s(
    make: Callable[[], Scalarised], expected: Callable[[Scalarised, torch.Tensor], torch.Tensor], training: Any
) -> None:
    run = training()
    batch = one_batch(run)
    values = terms(run, batch)
    host = values.detach().sum()
    arm = make()
    arm.attach(run)
    weight = expected(arm, values.detach())
    wanted = gradient(run, (weight * values).sum())
    torch.manual_seed(3)
    loss, stats, _ = run.model(**batch)
    torch.testing.assert_close(gradient(run, loss), wanted, rtol=1e-4, atol=1e-7)
    # What the host reports stays its own.
    torch.testing.assert_close(stats["loss"].squeeze(), host)
    arm.detach(run)


def test_dwa_is_the_host_s_sum_for_two_epochs(training: Callable[..., Training]) -> None:
    plain, run = training(), training()
    plain.run(Plain(), nothing)
    run.run(dwa(), nothing)
    assert [row["loss"] for row in run.trace] == pytest.approx([row["loss"] for row in plain.trace], rel=1e-5)


def test_uncertainties_are_trained_by_the_host_s_optimizer(training: Callable[..., Training]) -> None:
    for pace in (1.0, 25.0):
        run, arm = training(), uncertainty(pace)
        run.run(arm, nothing)
        moved = arm.scalarizer.log_var.detach()
        # Adam moves by about its rate per step: up where the loss is above 1, down where it is below.
        assert moved.abs() == pytest.approx([4e-3 * pace] * 4, rel=0.4)
        assert moved[1] > 0 > moved[3]


def test_famo_learns_from_the_same_batch_after_the_update(training: Callable[..., Training]) -> None:
    run, arm = training(), famo()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    update = arm.scalarizer.update
    arm.scalarizer.update = lambda values: (seen.append((arm.scalarizer._prev_losses, values)), update(values))
    run.run(arm, nothing)
    assert len(seen) == 3  # the last step has no next one
    for before, after in seen:
        assert not torch.equal(before, after)
        assert (before / after).log().abs().max() < 0.3  # same clips, same dropout
    assert arm.scalarizer._w.abs().max() > 0


def test_famo_s_second_look_leaves_no_mark(training: Callable[..., Training]) -> None:
    """With logits that cannot learn, the run is the same with and without it."""
    marks = []
    for look in (True, False):
        run, arm = training(), famo()
        arm.scalarizer.lr = 0.0
        if not look:
            arm._after_update = lambda *given: torch.full((4,), math.nan)
        run.run(arm, nothing)
        marks.append(torch.cat([value.flatten().double() for value in run.model.state_dict().values()]))
    assert torch.equal(*marks)


def test_a_broken_batch_never_reaches_the_scalarizer(training: Callable[..., Training]) -> None:
    for make in (uncertainty, dwa, famo):
        run, arm = training(), make()
        run.spoil = lambda step, pair: (
            (pair[0], pair[1] | {"speech": pair[1]["speech"] * math.nan}) if step == 1 else pair
        )
        run.run(arm, nothing)
        assert math.isfinite(run.trace[-1]["loss"]) and math.isnan(run.trace[1]["loss"])
        assert all(value.isfinite().all() for value in arm.scalarizer.state_dict().values())
        assert all(parameter.isfinite().all() for parameter in run.model.parameters())


# Population-based training, without Ray.


def test_the_population_is_judged_by_clips_of_its_own(corpus: Corpus) -> None:
    less, validation = split(corpus)
    names = [{clip.name for clip in clips} for clips in (less.train, validation, corpus.held_out)]
    assert len(names[1]) == 1 and not names[0] & names[1] and not names[2] & (names[0] | names[1])
    assert names[0] | names[1] == {clip.name for clip in corpus.train}
    assert [clip.name for clip in split(corpus)[1]] == [clip.name for clip in validation]


def test_settings_stay_in_the_space() -> None:
    assert within({"guided": 1e4, "rate": 1e-9, "number": 3}) == {"guided": GUIDED[1], "rate": RATE[0], "number": 3}


def test_a_member_continues_in_another_s_place(
    corpus: Corpus, tmp_path: Path, training: Callable[..., Training]
) -> None:
    less, validation = split(corpus)

    def member(number: int) -> Member:
        return Member(less, validation, SETTING, 0, number, tmp_path, SMALL)

    straight = member(0)
    assert straight.advance(10.0, 1e-3, 2) > 0
    saved = straight.state()
    # As through a file.
    torch.save(saved, tmp_path / "member.pt")
    loss = straight.advance(100.0, 2e-3, 2)
    other = member(1)
    other.advance(3.0, 1e-3, 1)
    other.load(torch.load(tmp_path / "member.pt", weights_only=False))
    assert other.advance(100.0, 2e-3, 2) == loss and other.finished
    assert all(torch.equal(a, b) for a, b in zip(weights(straight.training), weights(other.training), strict=True))
    assert [row["used_guided"] for row in other.training.trace] == [10.0, 10.0, 100.0, 100.0]
    assert [measured.step for measured in other.training.measured] == [2, 4]
