"""The filters of a run: fed by observations, told of moves, saved and loaded."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import report

from tts_brain.feedback.filters import ATTENTION, GRAD_NORM, LOSS, RunFilters
from tts_brain.types import GUIDED_WEIGHT, LEARNING_RATE, FilterReport, Observation

KNOBS = {LEARNING_RATE: 1.0, GUIDED_WEIGHT: 4.5}


def seen(step: int, loss: float, norm: float | None = 1.0, attention: float | None = None) -> Observation:
    return Observation(
        step, {"total": loss, "mel": loss}, norm, attention=None if attention is None else report(attention)
    )


def run(filters: RunFilters, slopes: list[float], seed: int = 0, first: int = 1) -> None:
    """One step for each slope, at noise 0.02; the rate is raised by half whenever the slope changes."""
    rng, level, knobs, before = np.random.default_rng(seed), 5.0, dict(KNOBS), slopes[0]
    for step, slope in enumerate(slopes, start=first):
        if slope != before:
            knobs[LEARNING_RATE] *= 1.5
        before = slope
        level += slope
        filters.observe(seen(step, level + 0.02 * rng.normal()), knobs)


def test_level_and_slope_are_those_of_the_judged_loss() -> None:
    filters = RunFilters("mel")
    run(filters, [-0.01] * 80)
    loss = filters.reports[LOSS]
    assert loss.slope == pytest.approx(-0.01, abs=3 * loss.slope_std)
    assert loss.level == pytest.approx(5.0 - 0.8, abs=0.05)
    assert set(filters.reports) == {LOSS, GRAD_NORM}  # no attention was seen


def test_a_move_after_which_the_loss_falls_faster_helped_and_one_after_which_it_rises_did_not() -> None:
    better, worse = RunFilters("mel"), RunFilters("mel")
    run(better, [-0.002] * 60 + [-0.02] * 25)
    run(worse, [-0.002] * 60 + [0.02] * 25)
    move = {LEARNING_RATE: (1.0, 1.5)}
    assert better.helped(LOSS, move) > 0.8 and worse.helped(LOSS, move) < 0.2
    assert better.effects[LOSS][LEARNING_RATE][0] < 0.0 < worse.effects[LOSS][LEARNING_RATE][0]
    assert GUIDED_WEIGHT not in better.effects[LOSS]  # never turned


def test_of_a_knob_never_turned_nothing_is_known() -> None:
    filters = RunFilters("mel")
    run(filters, [-0.01] * 40)
    assert filters.effects == {} and filters.helped(LOSS, {GUIDED_WEIGHT: (4.5, 6.0)}) == 0.5


def test_a_move_between_two_looks_at_the_attention_is_not_lost_on_it() -> None:
    filters, knobs = RunFilters("mel"), dict(KNOBS)
    for step in range(1, 60):
        knobs[GUIDED_WEIGHT] = 4.5 if step < 32 else 9.0
        rise = 0.1 + 0.02 * max(0, step - 32)
        filters.observe(seen(step, 1.0, attention=min(rise, 0.9) if step % 5 == 0 else None), knobs)
    mean, std = filters.effects[ATTENTION][GUIDED_WEIGHT]
    assert std > 0.0 and mean > 0.0


def test_losses_that_mean_something_else_begin_anew_and_the_attention_goes_on() -> None:
    filters = RunFilters("mel")
    for step in range(1, 20):
        filters.observe(seen(step, 5.0, attention=0.3), KNOBS)
    filters.begin_anew()
    assert set(filters.reports) == {ATTENTION}
    filters.observe(seen(20, 1.0), KNOBS)
    assert filters.reports[LOSS].count == 1 and filters.reports[LOSS].level == 1.0


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.floats(), st.sampled_from([0.0, 1e30, -1e30, math.nan])),
            st.one_of(st.none(), st.floats()),
            st.one_of(st.none(), st.floats(0, 1)),
            st.floats(1 / 64, 64),
        ),
        max_size=60,
    )
)
def test_whatever_is_shown_every_report_is_finite_and_the_state_goes_through_json(rows: list) -> None:
    filters = RunFilters("mel")
    for step, (loss, norm, attention, rate) in enumerate(rows, start=1):
        filters.observe(seen(step, loss, norm, attention), {LEARNING_RATE: rate})
    for one in filters.reports.values():
        assert all(math.isfinite(getattr(one, name)) for name in FilterReport.__slots__)
    state = json.loads(json.dumps(filters.state_dict(), allow_nan=False))
    copy = RunFilters("mel")
    copy.load_state_dict(state)
    more = seen(len(rows) + 1, 1.0, 2.0, 0.5)
    for one in (filters, copy):
        one.observe(more, {LEARNING_RATE: 1.0})
    assert copy.state_dict() == filters.state_dict() and copy.reports == filters.reports
