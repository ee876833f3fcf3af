import json
import math
from dataclasses import astuple, fields, is_dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import EVENTFUL, Stretch, make_manager, observations, report

from tts_brain.context.analyzer import ContextAnalyzer
from tts_brain.journal import to_plain
from tts_brain.types import Observation, TrainingPhase


def after(stream, analyzer: ContextAnalyzer | None = None) -> ContextAnalyzer:
    analyzer = analyzer or ContextAnalyzer()
    for observation in stream:
        analyzer.observe(observation)
    return analyzer


def calm(steps: int, **changes) -> list[Observation]:
    return [replace(o, **changes) for o in observations([Stretch(steps)])]


def test_the_call_of_the_docs_works() -> None:
    analyzer = ContextAnalyzer(
        history_size=100, phase_classifier_components=4, trend_window=20, stability_threshold=0.05
    )
    context = analyzer.context()
    assert context.phase is TrainingPhase.PRE_ALIGNMENT and context.certainty == 1.0
    assert context.attention is None and context.trends == {} and not context.stable


def test_the_context_shows_what_was_seen() -> None:
    context = after(observations([Stretch(100, slope=-0.05, attention=0.6)])).context()
    assert context.step == 100 and context.phase is TrainingPhase.REFINEMENT
    assert context.trends["mel"].z < -2 and context.trends["mel"].slope == pytest.approx(-0.05, rel=0.3)
    assert context.attention.attention_diag == pytest.approx(0.6, abs=0.1)
    assert context.best_attention_diag >= context.attention.attention_diag
    assert context.grad_norm_median == pytest.approx(1.0, rel=0.2) and context.grad_spikes == 0.0
    assert (context.learning_rate, context.text_length, context.nonfinite_run) == (1e-4, 40.0, 0)


def test_spikes_are_the_share_of_norms_far_above_the_median() -> None:
    stream = [replace(o, grad_norm=20.0 if o.step in (35, 38) else 1.0) for o in calm(40)]
    assert after(stream).context().grad_spikes == pytest.approx(0.1)


def test_steps_in_a_row_that_are_not_finite_are_counted() -> None:
    stream = calm(10)
    bad = [
        replace(stream[0], losses={"total": math.nan}),
        replace(stream[0], losses={"total": 1.0, "mel": 1e300}),
        replace(stream[0], grad_norm=math.inf),
        replace(stream[0], skipped=True),
    ]
    analyzer = after([*stream, *bad])
    assert analyzer.nonfinite_run == 4
    assert after(stream[:1], analyzer).nonfinite_run == 0


def test_an_attention_report_with_a_hole_is_left_out_whole() -> None:
    analyzer = after(calm(10))
    before = analyzer.context().attention
    for value in (math.nan, math.inf):
        after([replace(calm(1)[0], attention=report(0.9, focus=value))], analyzer)
    assert analyzer.context().attention == before
    after([replace(calm(1)[0], attention=report(0.9))], analyzer)
    assert all(math.isfinite(v) for v in astuple(analyzer.context().attention))


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_a_text_length_without_sense_is_left_out(value: float) -> None:
    analyzer = after(calm(10))
    after([replace(calm(1)[0], text_length=value)], analyzer)
    assert analyzer.context().text_length == pytest.approx(40.0)


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2.0**-10, 0.25, 8.0, 2.0**20]))
def test_the_unit_of_the_losses_bears_on_nothing_but_levels(seed: int, scale: float) -> None:
    contexts = [after(observations(EVENTFUL, seed, s)).context() for s in (1.0, scale)]
    assert contexts[0].phase_posterior == contexts[1].phase_posterior
    assert contexts[0].stable == contexts[1].stable
    assert [t.z for t in contexts[0].trends.values()] == [t.z for t in contexts[1].trends.values()]


def test_a_loss_that_settled_is_stable_and_one_that_only_jitters_is_not() -> None:
    settled = [Stretch(80, slope=-0.05, noise=0.01), Stretch(40, noise=0.01)]
    assert after(observations(settled)).context().stable
    assert not after(observations([Stretch(120, noise=0.5)])).context().stable


def seen(*attention: float) -> ContextAnalyzer:
    analyzer = ContextAnalyzer()
    for step, diag in enumerate(attention, 1):
        analyzer.observe(Observation(step, {"total": 1.0}, attention=report(diag)))
    return analyzer


@pytest.mark.parametrize(
    ("attention", "trained"),
    [
        ((0.7,), False),  # one measurement is luck
        ((0.7, 0.6), True),
        ((0.7, 0.6, 0.4), True),
        ((0.7, 0.6, 0.2, 0.1, 0.1), False),  # lost
        ((0.7, 0.6, 0.2, 0.1, 0.1, 0.7, 0.7), True),
        ((0.1, 0.7, 0.7, 0.7), False),
        ((0.7, 0.4, 0.7, 0.7), False),
    ],
)
def test_a_model_is_found_trained_by_its_first_measurements(attention: tuple[float, ...], trained: bool) -> None:
    analyzer = seen(*attention)
    assert analyzer.context().found_trained is trained
    again = ContextAnalyzer()
    again.load_state_dict(json.loads(json.dumps(analyzer.state_dict())))
    assert again.context().found_trained is trained


def test_at_another_reduction_factor_the_attention_is_no_worse_than_it_was() -> None:
    analyzer = seen(0.7, 0.7)
    analyzer.attention_changed()
    assert analyzer.context().attention is None and analyzer.context().best_attention_diag == 0.0
    assert analyzer.context().found_trained
    analyzer.observe(Observation(3, {"total": 1.0}, attention=report(0.2)))
    assert analyzer.context().best_attention_diag == pytest.approx(0.2)


def test_a_new_regime_forgets_the_losses_and_keeps_the_attention() -> None:
    analyzer = after(observations([Stretch(60, attention=0.6)]))
    was = analyzer.context()
    analyzer.regime_changed()
    now = analyzer.context()
    assert set(now.trends) == {"attention_diag"}
    assert (now.phase, now.attention, now.best_attention_diag) == (was.phase, was.attention, was.best_attention_diag)


def test_no_series_outgrows_the_history() -> None:
    analyzer = after(observations([Stretch(300)]), ContextAnalyzer(history_size=50))
    assert [len(analyzer.series(n)) for n in ("mel", "grad_norm", "attention_diag")] == [50, 50, 50]
    assert len(json.dumps(analyzer.state_dict())) < 40_000


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 299), st.integers(0, 1000))
def test_a_saved_state_continues_alike(cut: int, seed: int) -> None:
    stream = list(observations(EVENTFUL, seed))
    whole, second = after(stream), ContextAnalyzer()
    second.load_state_dict(json.loads(json.dumps(after(stream[:cut]).state_dict())))
    after(stream[cut:], second)
    assert to_plain(second.context()) == to_plain(whole.context())
    assert to_plain(second.state_dict()) == to_plain(whole.state_dict())


def test_the_window_must_fit_the_history() -> None:
    with pytest.raises(ValueError, match="from 4 to history_size=10"):
        ContextAnalyzer(history_size=10, trend_window=20)


def test_a_plateau_without_noise_is_read_alike_in_every_unit() -> None:
    found = []
    for scale in (1.0, 2.0**30):
        levels = [4.0] * 20 + [1.0] * 60
        stream = [replace(o, losses={"total": v * scale}) for o, v in zip(calm(80), levels, strict=True)]
        found.append(after(stream).context().phase_posterior)
    np.testing.assert_array_equal(*found)


BAD = {
    "constant": lambda step, rng: 1.0,
    "not a number": lambda step, rng: math.nan,
    "huge": lambda step, rng: 1e30,
    "huge and below 0": lambda step, rng: -1e30,
    "below 0": lambda step, rng: -1.0 + 0.1 * rng.normal(),
    "0": lambda step, rng: 0.0,
    "spikes": lambda step, rng: 1e30 if step % 7 == 0 else 1.0,
    "late": lambda step, rng: 1.0 if step > 40 else None,
    "vanishing": lambda step, rng: 1.0 if step < 40 else None,
    "now and then": lambda step, rng: [1.0, None, math.inf, math.nan][int(rng.integers(4))],
}
UNKNOWN = {
    "learning_rate",
    "update_ratio",
    "text_length",
    "grad_norm_median",
}  # NaN says so, as ``TrainingContext`` has it


def not_finite(value, name: str = "") -> list[str]:
    """Names of the fields, at any depth, that hold what is not finite."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return [bad for key, part in value.items() for bad in not_finite(part, f"{name}.{key}")]
    if isinstance(value, tuple | list):
        return [bad for i, part in enumerate(value) for bad in not_finite(part, f"{name}[{i}]")]
    return [name] if isinstance(value, float) and not math.isfinite(value) else []


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["total", "mel", "gate", "grad_norm"]), st.sampled_from(sorted(BAD))),
    st.integers(0, 10**6),
)
@pytest.mark.parametrize("steps", [0, 1, 90])
def test_nothing_that_agents_see_is_not_finite_but_what_is_not_known(
    steps: int, kinds: dict[str, str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    manager = make_manager()
    seen = [manager.context()]
    for step in range(1, steps + 1):
        made = {name: BAD[kind](step, rng) for name, kind in kinds.items()}
        norm = made.pop("grad_norm", None)
        losses = {"total": 1.0} | {name: value for name, value in made.items() if value is not None}
        manager.observe(Observation(step, losses, grad_norm=norm))
        if manager.due(step):
            seen.append(manager.context())
            manager.decide()
    for context in [*seen, manager.context()]:
        assert {name.removeprefix("context.") for name in not_finite(context, "context")} <= UNKNOWN
