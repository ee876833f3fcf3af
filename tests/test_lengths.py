import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_run import HOST, report

from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.context.lengths import LengthEffect
from tts_brain.feedback.manager import FeedbackLoopManager
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import GUIDED_SIGMA, Observation, Verdict

# Mean tokens of the batches of one epoch, a corpus of short and long clips.
LENGTHS = np.geomspace(20.0, 120.0, 50)


def observed(step: int, mel: float, length: float | None) -> Observation:
    return Observation(step, {"total": mel, "mel": mel}, text_length=length)


def course(
    effect: float, *, ordered: bool, steps: int, falls: float = 0.0, noise: float = 0.05, seed: int = 0
) -> Iterator[Observation]:
    """Batches in the order of their length, the same in each epoch, or shuffled; the loss falls by ``falls`` a step."""
    rng = np.random.default_rng(seed)
    order = np.arange(len(LENGTHS))
    for step in range(steps):
        if step % len(order) == 0 and not ordered:
            order = rng.permutation(len(order))
        length = LENGTHS[order[step % len(order)]]
        mel = 2.0 - falls * step + effect * math.log(length / 50.0) + noise * rng.normal()
        yield observed(step + 1, mel, length)


def losses(observations: Iterator[Observation], by: LengthEffect | None = None) -> np.ndarray:
    return np.array([(by.adjusted(o) if by else o).losses["mel"] for o in observations])


def noise_of(values: np.ndarray) -> float:
    changes = np.diff(values)
    return float(np.median(np.abs(changes - np.median(changes))))


@pytest.mark.parametrize("effect", [0.3, -0.3])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_effect_is_found_and_taken_out(effect: float, ordered: bool, seed: int) -> None:
    by = LengthEffect()
    after = losses(course(effect, ordered=ordered, steps=400, falls=0.001, seed=seed), by)
    assert by.effect() == pytest.approx(effect, rel=0.25)
    # What is left of it at the end: the adjusted loss over the lengths of the last four epochs.
    places = np.tile(np.log(LENGTHS), 4) if ordered else None
    if places is not None:
        assert abs(np.polyfit(places, after[-200:], 1)[0]) < 0.3 * abs(effect)
    else:
        before = losses(course(effect, ordered=False, steps=400, falls=0.001, seed=seed))
        assert noise_of(after[100:]) < 0.4 * noise_of(before[100:])


@pytest.mark.parametrize("ordered", [False, True])
def test_where_there_is_no_effect_hardly_anything_changes(ordered: bool) -> None:
    changed = []
    for seed in range(20):
        seen = list(course(0.0, ordered=ordered, steps=300, falls=0.002, seed=seed))
        by = LengthEffect()
        changed += [abs(by.adjusted(o).losses["mel"] - o.losses["mel"]) for o in seen]
    assert np.mean(np.array(changed) > 0.01) < 0.01  # a fifth of the noise, in a hundredth of the steps at most


def test_in_a_first_epoch_of_clips_in_order_the_fall_of_the_loss_is_not_put_down_to_their_length() -> None:
    rng, by = np.random.default_rng(0), LengthEffect()
    lengths = np.geomspace(20.0, 120.0, 300)
    for step, length in enumerate(lengths, start=1):
        shown = observed(step, 5.0 - 0.01 * step + 0.02 * rng.normal(), length)
        assert by.adjusted(shown) is shown


def test_a_level_is_kept_over_the_first_jump_back_to_the_shortest_clips() -> None:
    rng, by, after = np.random.default_rng(0), LengthEffect(), []
    lengths = np.geomspace(20.0, 120.0, 100)
    for step in range(1, 401):
        length = lengths[(step - 1) % 100]
        mel = 2.0 + 0.3 * math.log(length / 50.0) + 0.02 * rng.normal()  # 0.54 lower after the jump
        after.append(by.adjusted(observed(step, mel, length)).losses["mel"])
    before = np.mean(after[95:100])
    assert all(abs(np.mean(after[at : at + 5]) - before) < 0.1 for at in (100, 195, 395))


@pytest.mark.parametrize("ordered", [False, True])
def test_where_the_estimate_moves_the_level_does_not_jump(ordered: bool) -> None:
    by, before = LengthEffect(), None
    for shown in course(0.3, ordered=ordered, steps=300):
        now, place = by.adjusted(shown).losses["mel"] - shown.losses["mel"], math.log(shown.text_length)
        if before is not None:
            assert now - before[0] == pytest.approx(-by.effect() * (place - before[1]), abs=0.01)
        before = now, place


def test_one_broken_batch_does_not_say_what_length_does() -> None:
    clean, broken = LengthEffect(), LengthEffect()
    for observation in course(0.3, ordered=False, steps=300):
        clean.adjusted(observation)
        mel = 1e6 if observation.step == 150 else observation.losses["mel"]
        broken.adjusted(replace(observation, losses={"total": mel, "mel": mel}))
    assert broken.effect() == pytest.approx(clean.effect(), rel=0.1)


@pytest.mark.parametrize("length", [None, 0.0, -3.0, math.nan, math.inf])
def test_a_step_without_a_length_owes_what_the_one_before_did(length: float | None) -> None:
    by = LengthEffect()
    fresh = observed(1, 2.0, length)
    assert by.adjusted(fresh) is fresh
    losses(course(0.3, ordered=True, steps=240), by)
    before = observed(241, 2.0, LENGTHS[40])
    owed = before.losses["mel"] - by.adjusted(before).losses["mel"]
    assert abs(owed) > 0.1 and by.adjusted(observed(242, 2.1, length)).losses["mel"] == pytest.approx(2.1 - owed)


@pytest.mark.parametrize("curve", [20.0, 5.0, -5.0])
@pytest.mark.parametrize("seed", range(2))
def test_a_loss_that_is_no_straight_line_in_the_logarithm_keeps_its_level(curve: float, seed: int) -> None:
    """What silence of a fixed length adds goes as one over the length; clips are in buckets, buckets shuffled."""
    rng = np.random.default_rng([3, seed])
    buckets = np.sort(rng.lognormal(3.9, 0.5, 800)).reshape(50, 16).mean(1)
    by, monitor, after = LengthEffect(), FeedbackLoopManager(loss="mel"), []
    series: deque[tuple[int, float]] = deque(maxlen=100)
    context = ContextAnalyzer(forecasts=False).context()
    order = np.concatenate([rng.permutation(50) for _ in range(100)])
    for step, place in enumerate(order, start=1):
        length = buckets[place]
        mel = 2.0 + curve / length + 0.02 * rng.normal()
        now = by.adjusted(observed(step, mel, length)).losses["mel"]
        series.append((step, now))
        after.append(now)
        if step % 10 == 0:
            assert monitor.broken(context, list(series)) is None
    assert abs(np.median(after[-500:]) - np.median(after[500:1000])) < 0.03


def test_an_effect_that_fades_leaves_no_step_in_the_level() -> None:
    by, after = LengthEffect(), []
    for shown in course(0.0, ordered=True, steps=1500, noise=0.02):
        effect = 0.05 + 0.4 * math.exp(-shown.step / 300.0)
        mel = shown.losses["mel"] + effect * math.log(shown.text_length / LENGTHS[-1])
        after.append(by.adjusted(observed(shown.step, mel, shown.text_length)).losses["mel"])
    epochs = np.array(after[150:]).reshape(-1, 50).mean(1)
    assert np.abs(np.diff(epochs)).max() < 0.06  # three widths of the noise


def test_a_host_without_that_loss_is_left_alone() -> None:
    by = LengthEffect("mel")
    total = Observation(1, {"total": 2.0}, text_length=30.0)
    assert by.adjusted(total) is total


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, 1e30, -1e30]),
            st.floats(-1.0, 1e4) | st.sampled_from([math.nan, math.inf, 1e-300, 1e300]),
        ),
        max_size=150,
    )
)
def test_nothing_that_a_host_can_show_makes_a_finite_loss_infinite(shown: list[tuple[float, float]]) -> None:
    by = LengthEffect()
    for step, (mel, length) in enumerate(shown * 2, start=1):
        now = by.adjusted(observed(step, mel, length)).losses["mel"]
        assert math.isfinite(now) or not math.isfinite(mel)
        assert math.isfinite(by.effect())


@given(st.integers(0, 50), st.sampled_from([0.25, 4.0, 1024.0]), st.floats(-100.0, 100.0))
def test_unit_and_zero_of_the_loss_do_not_matter(seed: int, scale: float, shift: float) -> None:
    was, now = LengthEffect(), LengthEffect()
    seen = list(course(0.2, ordered=False, steps=120, seed=seed))
    moved = [replace(o, losses={n: scale * v + shift for n, v in o.losses.items()}) for o in seen]
    assert losses(iter(moved), now) == pytest.approx(scale * losses(iter(seen), was) + shift, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 20, 40, 200])
def test_a_resumed_estimate_goes_on_to_the_last_digit(cut: int) -> None:
    seen = list(course(0.2, ordered=True, steps=300))
    one, first, second = LengthEffect(), LengthEffect(), LengthEffect()
    whole = losses(iter(seen), one)
    losses(iter(seen[:cut]), first)
    second.load_state_dict(first.state_dict())
    assert losses(iter(seen[cut:]), second).tolist() == whole[cut:].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"sums": [1.0]},
        {"usual": [1.0, math.nan]},
        {"last": [1.0]},
        {"first": [[0.1, 0.1]] * 99},
        {"owed": None},
        {"told": math.inf},
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changed(change: dict) -> None:
    by = LengthEffect()
    losses(course(0.2, ordered=False, steps=100), by)
    before = by.state_dict()
    with pytest.raises((ValueError, KeyError, TypeError)):
        by.load_state_dict({**before, **change})
    assert by.state_dict() == before


def taken_for_harm(with_length: bool) -> int:
    """Decisions after the second epoch of eight that lower the rate or roll back, as the loss rises.

    The clips are in order, and the loss falls but for their length.
    """
    manager = ContextAwareTrainingManager(BrainConfig(forecasts=False), HOST, {GUIDED_SIGMA: 0.4})
    count = 0
    for shown in course(0.3, ordered=True, steps=400, falls=0.0005, noise=0.01):
        length = shown.text_length if with_length else None
        attention = report(0.7) if shown.step % 5 == 0 else None
        manager.observe(replace(shown, text_length=length, learning_rate=1e-3, grad_norm=1.0, attention=attention))
        if manager.due(shown.step):
            decision = manager.decide()
            harm = decision.verdict is Verdict.ROLL_BACK or "the loss rises" in decision.reason
            count += harm and shown.step > 100
    return count


def test_clips_that_get_longer_are_not_taken_for_a_run_that_breaks() -> None:
    assert taken_for_harm(with_length=False) >= 20
    assert taken_for_harm(with_length=True) == 0


def test_the_manager_forgets_the_effect_where_the_loss_means_something_else() -> None:
    manager = ContextAwareTrainingManager(BrainConfig(), HOST, {GUIDED_SIGMA: 0.4})
    for shown in course(0.3, ordered=False, steps=200):
        manager.observe(shown)
    assert manager.lengths.effect() == pytest.approx(0.3, rel=0.25)
    kept = ContextAwareTrainingManager(BrainConfig(), HOST, {GUIDED_SIGMA: 0.4})
    kept.load_state_dict(manager.state_dict())
    assert kept.lengths.state_dict() == manager.lengths.state_dict()
    manager.regime_changed()
    one = observed(201, 2.0, 30.0)
    assert manager.lengths.effect() == 0.0 and manager.lengths.adjusted(one) is one
