import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_run import report

from tts_brain.attention.supervisor import DynamicAttentionSupervisor, smoothstep

shares = st.floats(0, 1)


@given(st.floats(0.01, 20), st.floats(max_value=0.1), st.floats(min_value=0.7))
def test_twice_the_weight_at_the_bottom_and_half_of_it_at_the_top(initial: float, low: float, high: float) -> None:
    supervisor = DynamicAttentionSupervisor(initial)
    assert supervisor.weight(low) == pytest.approx(2 * initial)
    assert supervisor.weight(high) == pytest.approx(initial / 2)


@given(shares, shares)
def test_between_the_weight_falls_without_a_jump(a: float, b: float) -> None:
    low, high = sorted((a, b))
    heavy, light = (DynamicAttentionSupervisor(1.0).weight(v) for v in (low, high))
    assert 0.0 <= heavy - light <= 6.0 * (high - low) + 1e-9  # 2 ln 2 · (steepest smoothstep 1.5) / 0.6 · weight 2 < 7


@given(shares, shares, shares)
def test_the_width_stays_within_its_range_without_a_jump(diagonality: float, attention: float, other: float) -> None:
    supervisor = DynamicAttentionSupervisor()
    width = supervisor.sigma(report(attention, diagonality=diagonality))
    assert 0.2 - 1e-12 <= width <= 0.4 + 1e-12
    beside = supervisor.sigma(report(other, diagonality=diagonality))
    assert abs(width - beside) <= 1.6 * abs(attention - other) + 1e-9
    beside = supervisor.sigma(report(attention, diagonality=other))
    assert abs(width - beside) <= 0.8 * abs(diagonality - other) + 1e-9


def test_wide_while_searching_narrow_on_a_bare_diagonal_wide_when_aligned() -> None:
    supervisor = DynamicAttentionSupervisor()
    assert supervisor.sigma(report(0.1, diagonality=0.2)) == pytest.approx(0.4)
    assert supervisor.sigma(report(0.2, diagonality=0.95)) == pytest.approx(0.2)
    assert supervisor.sigma(report(0.85, diagonality=0.95)) == pytest.approx(0.4)


@given(st.floats(allow_nan=False))
def test_smoothstep_ends_flat(x: float) -> None:
    assert 0.0 <= smoothstep(x) <= 1.0
    assert smoothstep(min(x, 0.0)) == 0.0 and smoothstep(max(x, 1.0)) == 1.0


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"such as 2\.25"):
        DynamicAttentionSupervisor(weight)


@given(st.floats(0.001, 1), shares, shares)
def test_the_forward_sum_weight_stays_within_its_range(initial: float, diagonality: float, attention: float) -> None:
    weight = DynamicAttentionSupervisor(4.5, initial).forward_sum(report(attention, diagonality=diagonality))
    assert initial / 16 - 1e-12 <= weight <= 2 * initial + 1e-12


def test_the_forward_sum_weight_is_high_where_the_diagonal_holds_and_tokens_are_missing() -> None:
    law = DynamicAttentionSupervisor(4.5, 0.1).forward_sum
    assert law(report(0.05, diagonality=0.1)) == pytest.approx(0.05)
    assert law(report(0.3, diagonality=0.9)) == pytest.approx(0.2)
    assert law(report(0.85)) == pytest.approx(0.1 / 16)


def test_an_attention_that_stops_at_each_token_but_rushes_is_held_to_the_line_and_not_hurried() -> None:
    """As constants of 0.2 do on long clips: focus and coverage near 1, the last token kept, diagonality under 0.5."""
    law = DynamicAttentionSupervisor(2.25, 0.1)
    rushing = report(0.4, focus=0.9, coverage=0.92)
    assert law.forward_sum(rushing) == pytest.approx(0.1 / 16)
    assert law.sigma(rushing) == pytest.approx(0.2)
    assert law.weight(rushing.attention_diag) > law.weight(0.8)


def test_a_forward_sum_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="middle_forward_sum=0"):
        DynamicAttentionSupervisor(4.5, 0.0)
