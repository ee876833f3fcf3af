"""A host's rate that jumps far above all before it is told when the loss follows, and only then."""

import itertools
import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.feedback.diagnosis import Diagnosis
from tts_brain.feedback.rate_jump import Jump, RateJumps
from tts_brain.types import Observation, TrainingPhase


def told(rates: Iterable[float | None], losses: Iterable[float], resume_at: int | None = None) -> list[Jump]:
    jumps, found = RateJumps(), []
    for step, (rate, loss) in enumerate(zip(rates, losses, strict=False), 1):
        if step == resume_at:
            state, jumps = jumps.state_dict(), RateJumps()
            jumps.load_state_dict(state)
        jump = jumps.look(step, rate, loss)
        found += [] if jump is None else [jump]
    return found


def spike(at: int, times: float, until: int = 120, rate: float = 1e-3) -> list[float]:
    return [rate * (times if at <= step < at + 25 else 1.0) for step in range(1, until + 1)]


LATE = [2.0] * 51 + [2.6] * 100


@pytest.mark.parametrize("resume_at", [None, 20, 51, 52])
def test_a_jump_that_the_loss_follows_is_told_once_with_what_it_rests_on(resume_at: int | None) -> None:
    assert told(spike(51, 30.0), LATE, resume_at) == [Jump(51, 1e-3, 30.0 * 1e-3, 2.0)]


def test_a_loss_that_is_not_finite_follows_too() -> None:
    assert told(spike(51, 30.0), [2.0] * 51 + [math.nan] * 50) == [Jump(51, 1e-3, 30.0 * 1e-3, 2.0)]


def test_no_jump_is_told_where_the_loss_stays_or_rises_long_after() -> None:
    assert told(spike(51, 30.0), itertools.repeat(2.0)) == []
    assert told(spike(51, 30.0), [2.0] * 70 + [9.0] * 50) == []


def test_no_jump_is_told_of_a_smaller_one_an_early_one_or_one_that_came_before() -> None:
    assert told(spike(51, 9.0), LATE) == []
    assert told(spike(15, 30.0), [2.0] * 15 + [9.0] * 50) == []
    restarts = [1e-5 + 1e-3 * (1.0 - step % 40 / 40.0) for step in range(200)]
    assert told(restarts, [2.0 + 3.0 * (step % 40 < 5) for step in range(200)]) == []


def test_warm_ups_are_no_jumps() -> None:
    noam = [1e-3 * min((step + 1) ** -0.5, (step + 1) * 4000**-1.5) for step in range(300)]
    linear = [1e-7 + 1e-5 * step for step in range(300)]
    for rates in (noam, linear):
        assert told(rates, [1.5**step for step in range(300)]) == []


@given(
    st.lists(st.one_of(st.none(), st.floats()), min_size=1, max_size=80),
    st.lists(st.floats(), min_size=80, max_size=80),
    st.integers(1, 80),
)
def test_whatever_comes_nothing_breaks_and_a_resume_goes_on_alike(
    rates: list[float | None], losses: list[float], resume_at: int
) -> None:
    found = told(rates, losses)
    assert told(rates, losses, resume_at) == found
    for jump in found:
        assert jump.now >= 10.0 * jump.before > 0.0


def test_the_user_is_told_which_rate_it_was() -> None:
    diagnosis, said = Diagnosis(), []
    for step, (rate, loss) in enumerate(zip(spike(51, 30.0), LATE, strict=False), 1):
        observation = Observation(step, {"total": loss}, learning_rate=rate)
        said += [(step, a.cause, a.message) for a in diagnosis.look(observation, None, TrainingPhase.REFINEMENT)]
    ((step, cause, message),) = said
    assert (step, cause) == (52, "rate too high")
    assert "jumped from 1.0e-03 to 3.0e-02" in message and "since step 51 the host's own rate is too high" in message
