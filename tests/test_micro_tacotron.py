"""The micro-Tacotron: a model that really trains, one run or many at once, the same wherever it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import bench_corpus  # noqa: F401 - the way to the benchmarks' package
import pytest

# ruff: isort: split
import torch

from bench.micro_grid import GRID, SIZES, Point, aligned_step, at_step, point_of, spearman, train
from tts_brain.config import BrainConfig
from tts_brain.learning.micro_loop import AttentionLoop
from tts_brain.learning.micro_model import forward_sum_loss
from tts_brain.learning.micro_tacotron import CAPABILITIES, MicroRun, MicroRuns, MicroSetting
from tts_brain.learning.micro_task import END, MAX_SYMBOLS, MIN_SYMBOLS, Speech, speak, uniform
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import Observation

CPU = torch.device("cpu")
SMALL = MicroSetting(batch_size=4, attention_every=2)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# How alignment comes and goes.

HURT_AT, END_AT = 91, 200
COURSES = {
    "good": MicroSetting(),
    "alone": MicroSetting(guided_weight=0.0, rate=1e-3),
    "hot": MicroSetting(rate=0.09),
    "hurt": MicroSetting(redraw_steps=frozenset({HURT_AT})),
}


@cache
def courses() -> dict[str, list[list[float]]]:
    """[step, L1, attention_diag] of each course, held out, every thirtieth step, after the hurt and at the end."""
    runs = MicroRuns(list(COURSES.values()), [0] * len(COURSES))
    seen: dict[str, list[list[float]]] = {name: [] for name in COURSES}
    for step in range(1, END_AT + 1):
        runs.step()
        if step % 30 == 0 or step in (HURT_AT, END_AT):
            for course, held_out in zip(seen.values(), runs.held_out(), strict=True):
                course.append([step, held_out["l1"], held_out["attention_diag"]])
    return seen


def attention_diag(course: str, step: int) -> float:
    return next(row[2] for row in courses()[course] if row[0] == step)


def test_alignment_emerges_with_guidance_and_rate() -> None:
    assert aligned_step(courses()["good"]) is not None
    assert attention_diag("good", END_AT) >= 0.5


def test_it_does_not_emerge_without() -> None:
    assert max(row[2] for row in courses()["alone"]) < 0.1


def test_a_rate_too_high_never_aligns() -> None:
    assert aligned_step(courses()["hot"]) is None
    assert courses()["hot"][-1][1] > courses()["good"][-1][1] + 0.05


def test_attention_drawn_anew_is_lost_and_recovers() -> None:
    assert attention_diag("hurt", HURT_AT - 1) == attention_diag("good", HURT_AT - 1) > 0.4
    assert attention_diag("hurt", HURT_AT) < 0.1
    assert attention_diag("hurt", END_AT) > 0.35


# One run, many runs, the same run.


def same(one: Observation, other: Observation) -> None:
    assert one.losses == pytest.approx(dict(other.losses), rel=1e-4, nan_ok=True)
    assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-3, nan_ok=True)
    assert (one.step, one.text_length, one.skipped) == (other.step, other.text_length, other.skipped)
    assert (one.attention is None) == (other.attention is None)


def test_a_run_among_others_is_the_run_alone() -> None:
    settings = [
        SMALL,
        replace(SMALL, rate=1e-3, guided_weight=0.1, edge_silence=(8.0, 20.0)),
        replace(SMALL, forward_sum=0.1, wrong_transcripts=0.5, nan_steps=frozenset({3})),
        replace(SMALL, attention_every=3, redraw_steps=frozenset({4})),
    ]
    knobs = [{}, {"guided_weight": 3.0, "mel_weight": 2.0}, {"gate_weight": 0.5}, {"learning_rate": 0.5}]
    together = MicroRuns(settings, [5, 6, 7, 8])
    alone = [MicroRun(setting, seed) for setting, seed in zip(settings, [5, 6, 7, 8], strict=True)]
    for _ in range(6):
        for run, turned, beside in zip(alone, knobs, together.step(knobs), strict=True):
            same(run.step(turned), beside)
    for i, run in enumerate(alone):
        # Adam's first steps are as large for a tiny gradient as for any: rounding shows in a few weights.
        far = (run.state_dict()["weights"][0] - together.state_dict()["weights"][i]).abs()
        assert far.mean() < 1e-5
        assert run.held_out() == pytest.approx(together.held_out()[i], abs=1e-2)


def test_the_same_seed_is_the_same_run_and_another_is_not() -> None:
    one, same_seed, other = MicroRun(SMALL, 0), MicroRun(SMALL, 0), MicroRun(SMALL, 1)
    first = [one.step() for _ in range(3)]
    assert first == [same_seed.step() for _ in range(3)]
    assert first != [other.step() for _ in range(3)]
    assert one.held_out() == same_seed.held_out()


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    run = MicroRun(replace(SMALL, redraw_steps=frozenset({2})), 0)
    first = [run.step(), run.step()]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    again = MicroRun(replace(SMALL, redraw_steps=frozenset({2})), 0)
    assert first == [again.step(), again.step()]


def test_measuring_changes_nothing() -> None:
    watched, unwatched = MicroRun(SMALL, 0), MicroRun(SMALL, 0)
    for _ in range(3):
        watched.held_out()
        assert watched.step() == unwatched.step()


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_resume_at_any_step_changes_nothing(cut: int) -> None:
    run, resumed = MicroRun(SMALL, 0), MicroRun(SMALL, 0)
    for _ in range(cut):
        run.step()
    state = run.state_dict()
    rest = [run.step() for _ in range(3)]
    resumed.load_state_dict(state)
    assert [resumed.step() for _ in range(3)] == rest
    run.load_state_dict(state)  # the state was a copy
    assert [run.step() for _ in range(3)] == rest


def test_a_rollback_without_rewind_goes_on_with_new_batches() -> None:
    run = MicroRun(SMALL, 0)
    state = run.state_dict()
    first = run.step()
    run.load_state_dict(state, rewind=False)
    second = run.step()
    assert (first.step, second.step) == (1, 2)
    assert first.losses != second.losses


def test_the_state_of_other_runs_is_refused_whole() -> None:
    run, other = MicroRun(SMALL, 0), MicroRuns([SMALL] * 2, [1, 2])
    before = run.state_dict()["weights"]
    with pytest.raises(ValueError, match="does not fit"):
        run.load_state_dict(other.state_dict())
    assert torch.equal(run.state_dict()["weights"], before)


# What a step shows, and what turns it.


def test_an_observation_is_in_the_brains_units() -> None:
    setting = replace(SMALL, forward_sum=0.1)
    run = MicroRun(setting, 0)
    seen = [run.step({"guided_weight": 9.0, "mel_weight": 3.0}) for _ in range(4)]
    assert [one.step for one in seen] == [1, 2, 3, 4]
    assert [one.attention is not None for one in seen] == [False, True, False, True]
    for one in seen:
        assert set(one.losses) == set(CAPABILITIES.losses)
        assert 0.0 <= one.losses["guided"] <= 1.0
        # In the host's weights, whatever the knobs say; the forward-sum term is on top.
        assert one.losses["total"] > one.losses["mel"] + one.losses["gate"] + 2.0 * one.losses["guided"]
        assert one.learning_rate == setting.rate
        assert one.stop is not None
        shares = one.stop.true_positive + one.stop.false_positive + one.stop.false_negative
        assert shares == pytest.approx(1.0)
        assert MIN_SYMBOLS + 1 <= (one.text_length or 0.0) <= MAX_SYMBOLS + 1


def test_a_nan_batch_is_kept_from_the_weights() -> None:
    run = MicroRun(replace(SMALL, nan_steps=frozenset({2})), 0)
    run.step()
    before = run.state_dict()
    seen = run.step()
    assert seen.skipped
    assert math.isnan(seen.losses["mel"])
    for name in ("weights", "moments", "updates"):
        assert torch.equal(run.state_dict()[name], before[name])
    after = run.step()
    assert not after.skipped
    assert math.isfinite(after.losses["total"])


def weights_after(setting: MicroSetting, knobs: Mapping[str, float] | None = None, steps: int = 3) -> torch.Tensor:
    run = MicroRun(setting, 0)
    for _ in range(steps):
        run.step(knobs)
    return run.state_dict()["weights"]


def test_knobs_at_the_settings_own_values_change_nothing() -> None:
    assert torch.equal(weights_after(SMALL, SMALL.own_knobs), weights_after(SMALL))


@pytest.mark.parametrize(
    ("knobs", "changes"),
    [
        ({"learning_rate": 2.0}, {"rate": 2 * SMALL.rate}),
        ({"guided_weight": 5.0}, {"guided_weight": 5.0}),
        ({"guided_sigma": 0.2}, {"guided_sigma": 0.2}),
        ({"forward_sum_weight": 0.1}, {"forward_sum": 0.1}),
    ],
)
def test_a_knob_is_what_the_setting_would_be(knobs: dict[str, float], changes: dict[str, float]) -> None:
    turned = weights_after(SMALL, knobs)
    assert torch.allclose(turned, weights_after(replace(SMALL, **changes)), atol=1e-6)
    assert not torch.equal(turned, weights_after(SMALL))


@pytest.mark.parametrize("name", ["mel_weight", "gate_weight", "grad_clip"])
def test_each_other_knob_turns_something(name: str) -> None:
    # Adam forgets a scale that never changes; the clip needs norms to compare with.
    run, turned = MicroRun(SMALL, 0), MicroRun(SMALL, 0)
    for step in range(8):
        run.step()
        turned.step({} if step < 4 else {name: 0.2})
    assert not torch.equal(run.state_dict()["weights"], turned.state_dict()["weights"])


def test_the_brain_can_steer_it() -> None:
    config = BrainConfig(decide_every=5, cooldown_steps=15, trial_steps=10)
    setting = MicroSetting(guided_weight=0.05, batch_size=4)
    manager = ContextAwareTrainingManager(config, setting.capabilities, setting.host_values)
    run, moved = MicroRun(setting, 0), set()
    for _ in range(40):
        seen = run.step(manager.knobs)
        manager.observe(seen)
        if manager.due(seen.step):
            moved |= set(manager.decide().moves)
    assert "guided_weight" in moved


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.0},
        {"rate": math.nan},
        {"guided_weight": -1.0},
        {"batch_size": 0},
        {"reduction_factor": 0},
        {"edge_silence": (3.0, 1.0)},
        {"wrong_transcripts": 1.5},
        {"attention_every": 0},
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*; write"):
        MicroSetting(**wrong)


def test_runs_that_cannot_train_together_are_refused() -> None:
    with pytest.raises(ValueError, match="differ"):
        MicroRuns([SMALL, MicroSetting()], [0, 1])
    with pytest.raises(ValueError, match="seeds"):
        MicroRuns([SMALL], [0, 1])
    with pytest.raises(ValueError, match="seeds"):
        MicroRuns([SMALL], [-1])
    with pytest.raises(ValueError, match="tversky_alpha"):
        MicroRun(SMALL, 0).step({"tversky_alpha": 0.5})
    with pytest.raises(ValueError, match="one a run"):
        MicroRuns([SMALL], [0]).step([{}, {}])


# The parts.


def test_the_loops_backward_is_its_forwards() -> None:
    generator = torch.Generator().manual_seed(0)
    runs, steps, batch, tokens, width, inner, taps, units = 2, 3, 2, 4, 2, 2, 3, 2

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inside = torch.ones(runs, batch, tokens, dtype=torch.float64)
    inside[0, 1, 2:] = 0.0
    arguments = (
        drawn(runs, batch, tokens, width),
        drawn(runs, batch, tokens, inner),
        drawn(runs, steps, batch, 4 * units),
        drawn(runs, taps, inner),
        drawn(runs, units, inner),
        drawn(runs, inner),
        drawn(runs, width + units, 4 * units),
        inside,
    )
    assert torch.autograd.gradcheck(AttentionLoop.apply, arguments, fast_mode=True)


def test_forward_sum_wants_every_token_in_order() -> None:
    diagonal = torch.eye(4).repeat_interleave(2, 0)
    even = torch.full_like(diagonal, 0.25)
    skipping = torch.eye(4)[[0, 0, 0, 0, 3, 3, 3, 3]]
    frames, tokens = torch.full((1, 1), 8), torch.full((1, 1), 4)
    right, blurred, skips = (float(forward_sum_loss(a[None, None], frames, tokens)) for a in (diagonal, even, skipping))
    assert right < blurred < skips
    assert float(forward_sum_loss(even[None, None], torch.full((1, 1), 0), tokens)) == 0.0


def test_uniform_numbers_hang_on_seed_step_stream_and_place_alone() -> None:
    many = uniform([1, 2], [5, 5], 0, 20_000, CPU)
    assert torch.equal(many[1:, :77], uniform([2], [5], 0, 77, CPU))
    others = [uniform(*key, 20_000, CPU)[0] for key in (([1], [6], 0), ([3], [5], 0), ([1], [5], 1))]
    for other in (many[1], *others, many[0].roll(1)):
        assert abs(float(torch.corrcoef(torch.stack([many[0], other]))[0, 1])) < 0.03
    assert 0.0 <= float(many.min()) < 1e-3
    assert 1.0 - 1e-3 < float(many.max()) < 1.0
    assert torch.histc(many, 20, 0.0, 1.0) == pytest.approx(torch.full((20,), 2000.0), rel=0.1)


def spoken(**changes: Any) -> Speech:
    batch = {"batch_size": 64, "reduction_factor": 4, "edges": [(0.0, 2.0)], "wrong": [0.0], "noise": 0.3}
    return speak([3], [1], **{**batch, **changes}, device=CPU)


def test_a_text_is_symbols_an_end_and_padding() -> None:
    speech = spoken()
    for text, length in zip(speech.tokens[0], speech.token_lengths[0], strict=True):
        assert MIN_SYMBOLS + 1 <= length <= MAX_SYMBOLS + 1
        assert text[length - 1] == END
        assert bool(((text[: length - 1] > 0) & (text[: length - 1] < END)).all())
        assert not text[length:].any()


def test_speech_lasts_as_long_as_it_says() -> None:
    speech = spoken()
    assert speech.mel.shape[2] % 4 == 0
    for mel, length in zip(speech.mel[0], speech.mel_lengths[0], strict=True):
        assert bool(mel[:length].abs().sum(1).all())
        assert not mel[length:].any()
    # 25 decoder steps at r = 4, whoever speaks.
    assert int(speech.mel_lengths.max()) <= 100


def test_edge_silence_is_at_both_ends() -> None:
    clean, silent = spoken(edges=[(0.0, 0.0)], noise=0.0), spoken(edges=[(12.0, 12.0)], noise=0.0)
    assert torch.equal(clean.tokens, silent.tokens)
    short = clean.mel_lengths[0] < 96  # longer ones are spoken faster, to end in time
    assert (silent.mel_lengths - clean.mel_lengths)[0][short] == pytest.approx(24, abs=1)
    length = int(silent.mel_lengths[0, 0])
    parts = (slice(11), slice(length - 11, length), slice(12, length - 12))
    first, last, middle = (float(silent.mel[0, 0, part].std(0).mean()) for part in parts)
    assert first < 1e-5 > last
    assert middle > 0.1


def test_wrong_transcripts_are_other_texts_for_the_same_speech() -> None:
    right, wrong = spoken(), spoken(wrong=[0.5])
    assert torch.equal(right.mel, wrong.mel)
    differ = (right.tokens != wrong.tokens).any(2).float().mean()
    assert 0.3 < float(differ) < 0.7


# The benchmark's grid.


def espnet_row(arm: str, attention_diag: float, l1: float, **changes: Any) -> dict[str, Any]:
    setting = {"steps": 500, "rate": 1e-3, "batch_size": 16, "reduction_factor": 4}
    return {"arm": arm, "attention_diag": attention_diag, "l1": l1, "aligned_step": None, "setting": setting} | changes


@pytest.mark.parametrize(
    ("arm", "point"),
    [
        ("default", Point(1.0, 1.0)),
        ("static g300 lr0.002 fs0.1", Point(300.0, 2.0, 0.1)),
        ("static g10 lr0.003", Point(10.0, 3.0)),
        ("brain", None),
        ("brain at static g10 lr0.003", None),
    ],
)
def test_an_arm_is_found_on_the_grid(arm: str, point: Point | None) -> None:
    assert point_of(espnet_row(arm, 0.0, 0.0)) == point
    assert point is None or point in GRID


def test_a_bad_start_is_no_setting() -> None:
    assert point_of(espnet_row("default", 0.0, 0.0, start="batch-4")) is None
    assert len({*GRID, *SIZES}) == len(GRID) + len(SIZES)


def test_spearman_is_of_medians_over_what_both_have() -> None:
    names = ("default", "static g1 lr0.002", "static g1 lr0.003", "static g300 lr0.003", "static g7 lr0.003")
    hosts = [espnet_row(name, 0.1 * n, 1.0 - 0.1 * n) for n, name in enumerate(names)]
    hosts += [espnet_row("default", 0.0, 1.0), espnet_row("default", 9.0, 9.0), espnet_row("brain", 1.0, 0.1)]
    points = (Point(1.0, 1.0), Point(1.0, 2.0), Point(1.0, 3.0), Point(300.0, 3.0))
    micro: Sequence[dict[str, Any]] = [
        {**vars(point), "attention_diag": n**3, "l1": n**2, "aligned_step": 100 - n, "steps": 400}
        for n, point in enumerate(points)
    ]
    found = spearman(hosts, micro)
    assert found["attention_diag"]["settings"] == 4
    assert found["attention_diag"]["rho"] == pytest.approx(1.0)
    assert found["l1"]["rho"] == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="in common"):
        spearman(hosts, micro[:2])


def test_aligned_is_three_in_a_row() -> None:
    curve = [[25, 1.0, 0.6], [50, 0.9, 0.4], [75, 0.8, 0.5], [100, 0.7, 0.6], [125, 0.6, 0.7]]
    assert aligned_step(curve) == 75
    assert at_step(curve, 100) == {
        "steps": 100,
        "l1": 0.7,
        "attention_diag": 0.6,
        "aligned_step": None,
        "curve": curve[:4],
    }


def test_the_grid_trains_points_of_any_shape() -> None:
    points = (Point(1.0, 1.0, 0.0, 2), Point(300.0, 3.0, 0.1, 2), Point(300.0, 1.0, 0.0, 2, 2))
    rows = list(train(points, [0], steps=2))
    assert [Point(**{name: row[name] for name in Point.__dataclass_fields__}) for row in rows] == list(points)
    assert all(row["steps"] == 2 and len(row["curve"]) == 1 and math.isfinite(row["l1"]) for row in rows)
