import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.config import BrainConfig
from tts_brain.types import KNOBS, Mode


def from_yaml(tmp_path: Path, text: str) -> BrainConfig:
    path = tmp_path / "brain.yaml"
    path.write_text(text)
    return BrainConfig.from_yaml(path)


# The three of the Tversky term go together.
THREE = "tversky_weight,tversky_alpha,tversky_beta"
KNOB_SETS = (*sorted(set(KNOBS) - set(THREE.split(","))), THREE)


@pytest.mark.parametrize(
    ("wrong", "near"), [("trail_steps", "trial_steps"), ("Mode", "mode"), ("max_lerning_rate", "max_learning_rate")]
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(wrong: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"unknown brain key '{wrong}' .did you mean '{near}'"):
        BrainConfig.from_dict({wrong: 1})


def test_a_key_unlike_any_is_refused_with_all_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown brain key 'qqqq'; known keys are mode, decide_every"):
        BrainConfig.from_dict({"qqqq": 1})
    with pytest.raises(ValueError, match="unknown brain key 7"):
        BrainConfig.from_dict({7: 1})


@pytest.mark.parametrize(
    ("key", "value", "span"),
    [
        ("decide_every", 0, "from 1 to"),
        ("decide_every", 2.5, "a whole number"),
        ("decide_every", True, "a whole number"),
        ("cooldown_steps", -1, "from 0 to"),
        ("trend_window", 101, "write history_size: 101"),
        ("trend_window", 501, "from 4 to 500, default 20"),
        ("history_size", 29, "from 30 to"),
        ("trial_steps", 3, "from 4 to"),
        ("attention_every", 17, "write lost_alignment_steps: 51"),
        ("phase_classifier_components", 5, "write 4"),
        ("adaptation_rate", 0.0, "above 0.0 to 1.0, default 0.1"),
        ("adaptation_rate", math.nan, "above 0.0 to 1.0"),
        ("adaptation_rate", "fast", "is not a number; write a number above 0.0 to 1.0, default 0.1"),
        ("adaptation_rate", None, "is not a number; write a number above 0.0 to 1.0, default 0.1"),
        ("max_learning_rate", 10**400, "is out of range; write a number above 0.0 to 1.0"),
        ("trial_steps", "30", "is not a whole number; write trial_steps: 30$"),
        ("trial_steps", "3", "is not a whole number; write a whole number from 4 to 10000000, default 20"),
        ("trial_steps", "many", "is not a whole number; write a whole number from 4"),
        ("decide_every", 10.0, "is not a whole number; write decide_every: 10$"),
        ("seed", math.inf, "is not a whole number; write a whole number from 0"),
        ("seed", False, "is not a whole number; write a whole number from 0"),
        ("forecasts", "false", "is neither true nor false; write forecasts: false$"),
        ("forecasts", 1, "is neither true nor false; write forecasts: true$"),
        ("snapshot_place", "cloud", "write snapshot_place='memory', or one of"),
        ("guide_over", "x", "write guide_over='speech', or one of"),
        ("mode", "observing", "write mode='observe', or one of"),
        ("initial_guided_weight", 1e3, "from 0.005 to 20.0"),
        ("phase_stickiness", 1.0, "from 0.25 and under 1.0"),
        ("mode", "fast", "off, observe, assist, full"),
        ("mode", None, "off, observe, assist, full"),
        ("coordination", "vote", "none, average, full"),
        ("consensus_threshold", 0.5, "above 0.5 to 1.0, default 0.67"),
        ("consensus_threshold", 1.01, "above 0.5 to 1.0"),
        ("risk_draws", 19, "from 20 to"),
        ("snapshot_place", "cloud", "memory, disk"),
        ("knobs", "learning_rte", "did you mean 'learning_rate'"),
        ("knobs", "all,", "names all and more; write knobs: all"),
        ("knobs", ["learning_rate"], "knobs: learning_rate,guided_weight"),
        ("seed", -1, "from 0 to"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_value_and_range(key: str, value: object, span: str) -> None:
    with pytest.raises(ValueError, match=span) as refusal:
        BrainConfig.from_dict({key: value})
    assert key in str(refusal.value)
    if key != "knobs":
        assert repr(value) in str(refusal.value)


@given(st.data())
def test_any_value_at_any_key_is_taken_or_refused_never_worse(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([f.name for f in dataclasses.fields(BrainConfig)]))
    value = data.draw(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
    try:
        config = BrainConfig.from_dict({key: value})
    except ValueError as refusal:
        assert key in str(refusal)
    else:
        assert BrainConfig.from_dict(config.to_dict()) == config


@given(
    mode=st.sampled_from([m.value for m in Mode]),
    knobs=st.lists(st.sampled_from(KNOB_SETS), unique=True),
    decide_every=st.integers(1, 1000),
    rate=st.floats(1e-6, 1.0),
)
def test_reading_back_what_was_written_changes_nothing(mode: str, knobs: list, decide_every: int, rate: float) -> None:
    config = BrainConfig(mode=mode, knobs=",".join(knobs), decide_every=decide_every, max_learning_rate=rate)
    assert BrainConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("mode", ["off", "'off'", '"off"', "observe", "full"])
def test_every_way_to_write_a_mode_in_yaml_works(tmp_path: Path, mode: str) -> None:
    assert from_yaml(tmp_path, f"mode: {mode}\n").mode == mode.strip("'\"")  # YAML 1.1 reads a bare off as false


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_every_way_to_write_a_small_number_in_yaml_works(tmp_path: Path, written: str) -> None:
    assert from_yaml(tmp_path, f"max_learning_rate: {written}\n").max_learning_rate == 1e-4


def test_a_whole_number_serves_where_a_float_is_meant(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "initial_guided_weight: 5\n")
    assert config.initial_guided_weight == 5.0 and isinstance(config.initial_guided_weight, float)


@pytest.mark.parametrize("text", ["", "- mode\n", "full\n", "mode: [\n", "mode: \x00"])
def test_yaml_that_is_no_mapping_is_refused_with_the_file_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"brain\.yaml"):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_yaml_that_cannot_be_read_is_said_with_what_to_give(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=r"cannot be read \(.* directory\); give a YAML file of lines like 'mode: full'"):
        BrainConfig.from_yaml(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "mode"), [("observe", "observe"), (True, "full"), (False, "off"), (5, "full"), ([], "full")]
)
def test_settings_that_are_no_mapping_are_refused(settings: Any, mode: str) -> None:
    with pytest.raises(ValueError, match=f"is no mapping of settings; write {{'mode': '{mode}'}}"):
        BrainConfig.from_dict(settings)


def test_the_knobs_of_a_term_that_is_left_out_are_not_steered() -> None:
    names = set(BrainConfig(tversky_weight=0.0).knob_names())
    assert names == set(KNOBS) - {"tversky_weight", "tversky_alpha", "tversky_beta"}
    assert BrainConfig(tversky_weight=0.0, knobs="tversky_alpha,gate_weight").knob_names() == ("gate_weight",)
    with pytest.raises(ValueError, match=r"names tversky_alpha alone.*write them all, or tversky_weight: 0"):
        BrainConfig(knobs="tversky_alpha,gate_weight")
    assert BrainConfig(knobs=THREE).knob_names() == tuple(THREE.split(","))


def test_knobs_are_read_in_any_spacing() -> None:
    assert BrainConfig(knobs="learning_rate,guided_weight").knob_names() == ("learning_rate", "guided_weight")
    assert BrainConfig(knobs=" learning_rate , guided_weight, ").knob_names() == ("learning_rate", "guided_weight")
    assert BrainConfig(knobs=" all ", tversky_weight=0.5).knob_names() == tuple(KNOBS)
    assert BrainConfig(knobs="").knob_names() == ()
