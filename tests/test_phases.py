import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tts_brain.context.phases import PhaseClassifier, phase_coordinate
from tts_brain.context.trends import trend
from tts_brain.types import PHASE_LIMITS, TrainingPhase

MIDDLES = (0.05, 0.3, 0.6, 0.85)


def follow(trace, falls=None, drops=None, classifier: PhaseClassifier | None = None) -> list[TrainingPhase]:
    """Phases after each measurement."""
    classifier = classifier or PhaseClassifier()
    phases = []
    for i, value in enumerate(trace):
        classifier.update(float(value), 0.0 if falls is None else falls[i], 0.0 if drops is None else drops[i])
        phases.append(classifier.phase)
    return phases


def switches(phases: list[TrainingPhase]) -> int:
    return sum(a is not b for a, b in pairwise(phases))


def hovering(limit: float, seed: int, count: int = 200) -> np.ndarray:
    """A value that wanders about a limit, as the attention of small batches does: half a slow wave, half noise."""
    rng = np.random.default_rng(seed)
    slow, noise = np.zeros(count), rng.normal(size=count)
    for i in range(1, count):
        slow[i] = 0.9 * slow[i - 1] + 0.4 * rng.normal()
    width = 0.02 if limit == PHASE_LIMITS[0] else 0.04
    return np.clip(limit + width * (slow + noise), 0.0, 1.0)


@given(st.floats(0, 1))
def test_the_limits_lie_at_whole_numbers_of_the_coordinate(attention_diag: float) -> None:
    assert int(phase_coordinate(attention_diag)) in (TrainingPhase.from_attention_diag(attention_diag).index, 4)
    assert [phase_coordinate(v) for v in (0.0, *PHASE_LIMITS, 1.0)] == [0, 1, 2, 3, 4]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from(MIDDLES), min_size=1, max_size=4),
    st.floats(-100, 100),
    st.floats(0, 1e6),
)
def test_in_the_middle_of_a_phase_it_says_what_the_bare_limits_say(path: list, fall: float, drop: float) -> None:
    classifier = PhaseClassifier()
    for middle in path:
        phases = follow([middle] * 15, [fall] * 15, [drop] * 15, classifier)
        assert phases[-1] is TrainingPhase.from_attention_diag(middle)
        assert classifier.certainty > 0.5


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10**6))
def test_loss_features_that_swing_do_not_overrule_the_attention(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for middle in MIDDLES:
        drops = 10.0 ** rng.uniform(0, 6, size=45)
        phases = follow([middle] * 45, rng.uniform(-100, 100, size=45), drops)
        assert set(phases[15:]) == {TrainingPhase.from_attention_diag(middle)}


@pytest.mark.parametrize("limit", PHASE_LIMITS)
def test_near_a_limit_it_switches_at_most_half_as_often_as_the_bare_limits(limit: float) -> None:
    bare = ours = 0
    for seed in range(3):
        trace = hovering(limit, seed)
        bare += switches([TrainingPhase.from_attention_diag(v) for v in trace])
        ours += switches(follow(trace))
    print(f"limit {limit}: bare limits {bare} switches, classifier {ours}")
    assert bare > 50
    assert ours <= bare / 2


@pytest.mark.parametrize("seed", range(4))
def test_on_a_rise_it_passes_the_phases_in_order_and_lags_little(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean = 0.9 / (1.0 + np.exp(-(np.arange(160) - 80) / 12))
    trace = np.clip(clean + 0.01 * rng.normal(size=160), 0, 1)
    losses = np.linspace(0, 40, 160)
    phases = [p.index for p in follow(trace, -4 * np.ones(160), losses)]
    assert phases == sorted(phases) and set(phases) == {0, 1, 2, 3}
    for phase, limit in enumerate(PHASE_LIMITS, start=1):
        passed = int(np.argmax(clean >= limit))
        assert -3 <= phases.index(phase) - passed <= 6


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(), st.floats(-100, 100) | st.just(float("nan")), st.floats(0) | st.just(float("nan")))
    ),
    st.floats(0.25, 0.999),
)
def test_the_posterior_is_one_whatever_comes(measurements: list, stickiness: float) -> None:
    classifier = PhaseClassifier(stickiness=stickiness)
    for measurement in measurements:
        classifier.update(*measurement)
        assert sum(classifier.posterior) == pytest.approx(1.0)
        assert all(0.0 <= p <= 1.0 for p in classifier.posterior)
        assert -1e-9 <= classifier.certainty <= 1.0 + 1e-9


def test_a_value_that_is_not_finite_changes_nothing() -> None:
    classifier = PhaseClassifier()
    follow([0.3] * 5, classifier=classifier)
    before = classifier.state_dict()
    for value in (float("nan"), float("inf"), -float("inf")):
        classifier.update(value, 0.0, 0.0)
    assert classifier.state_dict() == before


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 90), st.integers(0, 1000))
def test_a_saved_state_continues_alike(cut: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = np.clip(np.linspace(0, 0.9, 100) + 0.1 * rng.normal(size=100), 0, 1)
    whole, first, second = PhaseClassifier(), PhaseClassifier(), PhaseClassifier()
    follow(trace, classifier=whole)
    follow(trace[:cut], classifier=first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    follow(trace[cut:], classifier=second)
    assert second.state_dict() == whole.state_dict()
    assert second.posterior == whole.posterior


@pytest.mark.parametrize(
    "damage",
    [
        {"posterior": [1.0, 0.0, 0.0]},
        {"posterior": [float("nan")] * 4},
        {"posterior": [2.0, -1.0, 0.0, 0.0]},
        {"history": [[1.0, 2.0]]},
        {"fit_on": [[1.0, 2.0, float("nan")]]},
        {"level": [1.0, 0.0]},
        {"level": [float("nan"), 0.0, 0.1]},
        {"level": [1.0, 0.0, 0.0]},
    ],
)
def test_a_damaged_state_is_refused_whole(damage: dict) -> None:
    classifier = PhaseClassifier()
    follow([0.3] * 5, classifier=classifier)
    before = classifier.state_dict()
    with pytest.raises(ValueError):
        classifier.load_state_dict({**before, **damage})
    assert classifier.state_dict() == before


def test_the_phases_are_four() -> None:
    with pytest.raises(ValueError, match="write 4"):
        PhaseClassifier(components=5)


# A real run: step, attention_diag, mel loss every ten steps (benchmarks/results/first-light-kathleen-300.json).
RECORDED = json.loads((Path(__file__).parent / "data" / "kathleen_trace.json").read_text(encoding="utf-8"))["rows"]
FALLS = [trend(range(i + 1), [mel for *_, mel in RECORDED[: i + 1]]).z for i in range(len(RECORDED))]


def test_on_a_recorded_run_it_passes_the_phases_in_order() -> None:
    values = [a for _, a, _ in RECORDED]
    bare = [TrainingPhase.from_attention_diag(v).index for v in values]
    said = [phase.index for phase in follow(values, FALLS)]
    assert said == sorted(said) and (said[0], said[-1]) == (0, bare[-1])
    assert 0 <= said.index(1) - bare.index(1) <= 3, "how late, in measurements"


def test_on_a_recorded_run_under_noise_it_chatters_less() -> None:
    ours = theirs = 0
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0.0, 0.03, (len(RECORDED), 8))
        values = [np.clip(a + n, 0.0, 1.0) for (_, a, _), row in zip(RECORDED, noise, strict=True) for n in row]
        ours += switches(follow(values, np.repeat(FALLS, 8)))
        theirs += switches([TrainingPhase.from_attention_diag(v) for v in values])
    print(f"recorded run with noise: thresholds switch {theirs} times, the classifier {ours}")
    assert ours <= 0.5 * theirs
