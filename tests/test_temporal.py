"""The temporal model: any input is borne, units change nothing, a resume changes nothing."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import EVENTFUL, observations

from tts_brain.context.temporal import HORIZONS, WEIGHTS, Net, TemporalForecaster, load_net
from tts_brain.context.temporal_window import FEATURES, History, compress, expand, names
from tts_brain.types import GUIDED_WEIGHT, LEARNING_RATE, AttentionReport, Forecast, Observation

RUN = list(observations(EVENTFUL, seed=3))


def forecaster(run: Sequence[Observation], size: int = 100) -> TemporalForecaster:
    made = TemporalForecaster(size)
    for observation in run:
        made.observe(observation)
    return made


def numbers(forecast: Forecast) -> list[float]:
    nested = [forecast.loss, forecast.attention_diag, [forecast.divergence, forecast.alignment_loss]]
    return [value for part in nested for row in part for value in row] + [share for _, share in forecast.looked_at]


def sound(forecast: Forecast | None) -> bool:
    """What holds for every forecast, and for none."""
    if forecast is None:
        return True
    bands = (*forecast.loss, *forecast.attention_diag)
    chances = (forecast.divergence, forecast.alignment_loss)
    shares = [share for _, share in forecast.looked_at]
    return (
        all(math.isfinite(value) for value in numbers(forecast))
        and forecast.horizons == HORIZONS
        and all(low <= middle <= high for low, middle, high in bands)
        and all(0.0 <= value <= 1.0 for row in forecast.attention_diag for value in row)
        and all(0.0 <= chance <= 1.0 for row in chances for chance in row)
        and all(list(row) == sorted(row) for row in chances)
        and shares == sorted(shares, reverse=True)
        and 0.0 < sum(shares) <= 1.0 + 1e-9
    )


anything = st.floats(allow_nan=True, allow_infinity=True)
wild = st.one_of(anything, st.sampled_from([0.0, 1.0, -1.0, 1e30, -1e30, 1e-300, math.nan, math.inf]), st.just(2.5))
reports = st.builds(AttentionReport, *[wild] * len(fields(AttentionReport)))
steps = st.builds(
    Observation,
    step=st.integers(1, 400),
    losses=st.dictionaries(st.sampled_from(["total", "mel", "gate"]), wild),
    grad_norm=st.none() | wild,
    learning_rate=st.none() | wild,
    attention=st.none() | reports,
    skipped=st.booleans(),
)


@given(
    st.lists(steps, min_size=1, max_size=60),
    st.booleans(),
    st.none() | st.dictionaries(st.sampled_from([LEARNING_RATE, GUIDED_WEIGHT, "unknown"]), wild),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_observed_is_borne(run: list[Observation], in_order: bool, knobs: dict[str, float] | None) -> None:
    made = TemporalForecaster()
    for at, observation in enumerate(run):
        made.observe(replace(observation, step=at + 1) if in_order else observation, knobs)
        assert sound(made.forecast())
    made.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert sound(made.forecast())


@given(st.lists(wild, min_size=20, max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_the_losses_are_the_forecast_is_finite(losses: list[float], mel: bool) -> None:
    run = [Observation(at + 1, {"mel" if mel else "total": loss}) for at, loss in enumerate(losses)]
    found = forecaster(run).forecast()
    assert sound(found)
    assert (found is None) == (sum(abs(loss) <= 1e38 for loss in losses) < 20)


@pytest.mark.parametrize("loss", [0.0, 1.0, -3.0, 1e30, 1e-30])
def test_a_constant_loss_is_forecast_as_it_is(loss: float) -> None:
    found = forecaster([Observation(at, {"total": loss}) for at in range(1, 40)]).forecast()
    assert found is not None and all(value == loss for row in found.loss for value in row)


def test_too_few_losses_give_none() -> None:
    assert TemporalForecaster().forecast() is None
    assert forecaster(RUN[:19]).forecast() is None
    assert forecaster(RUN[:20]).forecast() is not None
    bad = [replace(o, losses={"total": math.nan, "mel": math.nan}) for o in RUN[:90]]
    assert forecaster(bad).forecast() is None


@pytest.mark.parametrize(("scale", "shift"), [(4.0, 0.0), (1.0, 16.0), (0.25, -8.0), (2.0**20, 2.0**20)])
@pytest.mark.parametrize("until", [40, 90, 150, 200])
def test_shift_and_scale_of_the_losses_change_nothing(scale: float, shift: float, until: int) -> None:
    moved = [replace(o, losses={k: scale * v + shift for k, v in o.losses.items()}) for o in RUN[:until]]
    one, two = forecaster(RUN[:until]).forecast(), forecaster(moved).forecast()
    assert one is not None and two is not None
    assert two.divergence == pytest.approx(one.divergence, rel=1e-9)
    assert two.alignment_loss == pytest.approx(one.alignment_loss, rel=1e-9)
    assert np.allclose(two.attention_diag, one.attention_diag, rtol=0.0, atol=1e-12)
    assert np.allclose(two.loss, scale * np.array(one.loss) + shift, rtol=1e-9, atol=1e-9 * scale)
    assert [step for step, _ in two.looked_at] == [step for step, _ in one.looked_at]


def test_units_of_rate_norm_and_knobs_change_nothing() -> None:
    def run(rate: float, norm: float, knob: float) -> Forecast | None:
        made = TemporalForecaster()
        for at, o in enumerate(RUN[:80]):
            said = replace(o, learning_rate=rate, grad_norm=o.grad_norm and norm * o.grad_norm)
            made.observe(said, {GUIDED_WEIGHT: knob * (1.0 if at < 60 else 1.5)})
        return made.forecast()

    one, two = run(1e-3, 1.0, 2.0), run(1e-5, 64.0, 0.5)
    assert one is not None and two is not None
    assert numbers(one) == pytest.approx(numbers(two), rel=1e-9)


def test_a_host_that_halves_its_rate_and_a_knob_that_does_are_the_same() -> None:
    def window(rate: float, knob: float) -> np.ndarray:
        made = History()
        for at, o in enumerate(RUN[:60]):
            late = at >= 40
            made.observe(replace(o, learning_rate=rate if late else 1e-3), {LEARNING_RATE: knob if late else 1.0})
        found = made.window()
        assert found is not None
        return found.blocks

    assert np.allclose(window(5e-4, 1.0), window(1e-3, 0.5))
    column = names().index(f"move of {LEARNING_RATE}")
    assert window(5e-4, 1.0)[:, column].sum() == pytest.approx(math.log(0.5))


@pytest.mark.parametrize("cut", [0, 1, 19, 60, 137])
def test_a_resume_changes_no_forecast(cut: int) -> None:
    whole, first = forecaster(RUN), forecaster(RUN[:cut])
    second = TemporalForecaster()
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    for observation in RUN[cut:]:
        second.observe(observation)
    assert second.forecast() == whole.forecast()
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rows", [[1.0]]),
        ("rows", None),
        ("best_level", [1.0]),
        ("smooth", "x"),
        ("smooth", math.inf),
        ("last", [True] * 7),
        ("best_attention", []),
    ],
)
def test_a_damaged_state_is_refused_whole(name: str, value: object) -> None:
    made = forecaster(RUN)
    before = made.state_dict()
    with pytest.raises(ValueError, match="state of the temporal model"):
        made.load_state_dict({**forecaster(RUN[:50]).state_dict(), name: value})
    with pytest.raises(ValueError, match="state of the temporal model"):
        made.load_state_dict({k: v for k, v in before.items() if k != name})
    assert made.state_dict() == before


def test_another_meaning_of_the_losses_forgets_them_only() -> None:
    made = forecaster(RUN[:140])
    made.regime_changed()
    assert made.forecast() is None
    for observation in RUN[140:162]:
        made.observe(observation)
    found = made.forecast()
    assert found is not None and found.alignment_loss[-1] > 0.0  # the alignment is still known


def test_a_step_back_forgets_what_came_after_it() -> None:
    made = forecaster(RUN[:60])
    for observation in RUN[40:60]:
        made.observe(observation)
    again, plain = made.forecast(), forecaster(RUN[:60]).forecast()
    assert again is not None and plain is not None
    assert again.loss == plain.loss


def test_steps_left_out_leave_holes() -> None:
    found = forecaster([o for o in RUN[:120] if not 40 < o.step <= 70]).forecast()
    assert sound(found)
    assert found is not None and not any(50 <= step <= 70 for step, _ in found.looked_at)


def test_without_attention_nothing_is_said_of_it() -> None:
    found = forecaster([replace(o, attention=None) for o in RUN[:80]]).forecast()
    assert found is not None
    assert found.attention_diag == ((0.0, 0.5, 1.0),) * 3 and found.alignment_loss == (0.0, 0.0, 0.0)


def test_without_an_alignment_none_is_lost() -> None:
    found = forecaster(RUN[:50]).forecast()  # attention_diag 0.05
    assert found is not None and found.alignment_loss == (0.0, 0.0, 0.0) and found.divergence[0] > 0.0


def test_mel_is_forecast_where_there_is_one_and_total_elsewhere() -> None:
    both = [Observation(at, {"total": 9.0, "mel": 2.0}) for at in range(1, 31)]
    found = forecaster(both).forecast()
    assert found is not None and found.loss[0][1] == 2.0
    found = forecaster([replace(o, losses={"total": 9.0}) for o in both]).forecast()
    assert found is not None and found.loss[0][1] == 9.0


def test_it_says_what_it_looked_at() -> None:
    found = forecaster(RUN[:150]).forecast()
    assert found is not None
    seen = [step for step, _ in found.looked_at]
    assert len(seen) == 3 and all(50 < step <= 150 and (150 - step) % 5 == 0 for step in seen)


def test_another_process_says_the_same() -> None:
    code = """
import math
from tts_brain.context.temporal import TemporalForecaster
from tts_brain.types import Observation
made = TemporalForecaster()
for step in range(1, 80):
    made.observe(Observation(step, {"mel": 3.0 - 0.01 * step + 0.1 * math.sin(step * step)}, grad_norm=2.0))
said = repr(made.forecast())
"""
    here: dict[str, str] = {}
    exec(code, here)
    there = subprocess.run(
        [sys.executable, "-c", code + "print(said)"], capture_output=True, text=True, check=True, timeout=300
    )
    assert there.stdout.strip() == here["said"]


def test_compressed_losses_come_back() -> None:
    losses = np.array([-3.0, 0.0, 2.0, 2.5, 40.0])
    assert np.allclose(expand(compress(losses, 2.0, 0.1), 2.0, 0.1), losses)
    assert compress(np.array([math.nan, 1e38]), 0.0, 1e-300).tolist()[1] == 8.0


def test_sizes() -> None:
    assert len(names()) == FEATURES
    with pytest.raises(ValueError, match="size=33"):
        TemporalForecaster(33)
    assert sound(forecaster(RUN, 40).forecast())


def test_the_weights_are_small_and_have_a_card() -> None:
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert "temporal_training" in WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    assert all(np.isfinite(part).all() for part in vars(load_net()).values())


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "other.safetensors"
    save_file({"inputs": np.zeros((2, 2))}, path, metadata={"model": '{"kind": "other"}'})
    with pytest.raises(ValueError, match="temporal_training"):
        load_net(path)
    save_file({"inputs": np.zeros((2, 2))}, path)
    with pytest.raises(ValueError, match="temporal_training"):
        load_net(path)
    with pytest.raises(OSError, match="missing"):
        load_net(tmp_path / "missing.safetensors")


def test_attention_over_the_blocks_sums_to_one() -> None:
    made = History()
    for observation in RUN[:47]:
        made.observe(observation)
    window = made.window()
    assert window is not None
    net: Net = load_net()
    answers, shares = net(window)
    assert answers.shape == (3, 8) and shares.sum() == pytest.approx(1.0) and (shares[~window.filled] == 0.0).all()
    assert astuple(window)[1].sum() == 10
