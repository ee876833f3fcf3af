import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.losses.controller import PHASE_GATE_WEIGHT, PHASE_MEL_WEIGHT, AdaptiveLossController
from tts_brain.types import (
    GATE_WEIGHT,
    MEL_WEIGHT,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    TVERSKY_OFF,
    TVERSKY_WEIGHT,
    StopTokenCounts,
)


def controller() -> AdaptiveLossController:
    return AdaptiveLossController(initial_guided_weight=4.5, tversky_A=0.3, tversky_B=0.4, adaptation_rate=0.1)


@pytest.mark.parametrize("phase", range(4))
def test_a_sure_phase_has_its_weights(phase: int) -> None:
    targets = controller().targets([float(i == phase) for i in range(4)])
    assert targets[MEL_WEIGHT] == PHASE_MEL_WEIGHT[phase] == (1.0, 1.0, 1.2, 1.5)[phase]
    assert targets[GATE_WEIGHT] == PHASE_GATE_WEIGHT[phase] == (0.5, 1.0, 1.0, 1.0)[phase]
    assert targets[TVERSKY_WEIGHT] == (TVERSKY_OFF, TVERSKY_OFF, 0.5, 0.5)[phase]


@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4))
def test_a_doubtful_phase_lies_between(odds: list[float]) -> None:
    targets = controller().targets([o / sum(odds) for o in odds])
    assert 1.0 <= targets[MEL_WEIGHT] <= 1.5 + 1e-12
    assert 0.5 - 1e-12 <= targets[GATE_WEIGHT] <= 1.0 + 1e-12


@given(st.lists(st.builds(StopTokenCounts, st.floats(), st.floats(), st.floats())))
def test_the_prices_sum_to_one_constant_whatever_was_seen(counts: list[StopTokenCounts]) -> None:
    losses = controller()
    for count in counts:
        losses.observe(count)
        if losses.stop_errors is not None:
            assert all(0.0 <= e <= 1.0 for e in losses.stop_errors)
        targets = losses.targets((1, 0, 0, 0))
        assert targets[TVERSKY_ALPHA] + targets[TVERSKY_BETA] == pytest.approx(2 * 0.3 + 0.4)
        assert 0.3 <= targets[TVERSKY_ALPHA] <= 0.7


def test_the_commoner_error_becomes_the_dearer() -> None:
    losses = controller()
    for _ in range(100):
        losses.observe(StopTokenCounts(0.1, 0.1, 0.8))
    targets = losses.targets((1, 0, 0, 0))
    assert targets[TVERSKY_BETA] == pytest.approx(0.3 + 0.4 * 0.8 / 0.9, rel=1e-3)
    assert targets[TVERSKY_BETA] > targets[TVERSKY_ALPHA]


def test_the_state_comes_back() -> None:
    first, second = controller(), controller()
    assert second.state_dict() == {"errors": None}
    first.observe(StopTokenCounts(0.5, 0.2, 0.3))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.stop_errors == first.stop_errors
    for wrong in ([0.1], [0.1, float("nan")], [0.1, -0.2], "x"):
        with pytest.raises((ValueError, IndexError)):
            second.load_state_dict({"errors": wrong})
    assert second.stop_errors == first.stop_errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"adaptation_rate": 0.0},
        {"adaptation_rate": 1.1},
        {"initial_guided_weight": 0.0},
        {"tversky_A": 0.0},
        {"tversky_weight": -0.1},
    ],
)
def test_a_setting_out_of_range_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*write"):
        AdaptiveLossController(**wrong)
