"""Every setting of the brain in one flat dataclass, so that a recipe, a YAML file and a command line say the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from tts_brain.types import (
    KNOBS,
    OVER_FRAMES,
    OVER_SPEECH,
    TVERSKY_ALPHA,
    TVERSKY_BETA,
    TVERSKY_OFF,
    TVERSKY_WEIGHT,
    Mode,
)

_MODES = tuple(mode.value for mode in Mode)
_COORDINATION = ("none", "average", "full")
_GUIDES = (OVER_FRAMES, OVER_SPEECH)
_TVERSKY = (TVERSKY_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA)
_SNAPSHOT_PLACES = ("memory", "disk")
_LINES = " of lines like 'mode: full'"
_COUNTS = (
    "decide_every",
    "attention_every",
    "attention_utterances",
    "journal_every",
    "snapshot_every",
    "snapshots",
    "snapshot_budget_mb",
    "lost_alignment_steps",
)


@dataclass
class BrainConfig:
    """Settings, all with defaults that suit a first run. Steps are optimizer steps.

    Raises:
        ValueError: a value out of its range; the message says what to write instead.
    """

    mode: str = "full"
    decide_every: int = 10
    attention_every: int = 5
    attention_utterances: int = 4
    journal_every: int = 10
    seed: int = 0

    # ContextAnalyzer
    history_size: int = 100
    phase_classifier_components: int = 4
    trend_window: int = 20
    stability_threshold: float = 0.05
    phase_stickiness: float = 0.9
    forecasts: bool = True

    # AdaptiveLossController and DynamicAttentionSupervisor; the guided weight is in normalised units
    initial_guided_weight: float = 4.5
    guide_over: str = OVER_SPEECH
    initial_forward_sum_weight: float = 0.1
    tversky_A: float = 0.3
    tversky_B: float = 0.4
    tversky_weight: float = 0.5  # once there is an alignment
    adaptation_rate: float = 0.1

    # what may be steered: comma-separated knob names, or "all"
    knobs: str = "all"
    max_learning_rate: float = 1e-2
    max_move_risk: float = 0.4

    # MultiAgentOptimizer and the simulation of RiskAssessor
    coordination: str = "full"
    consensus_threshold: float = 0.67
    risk_draws: int = 256

    # monitor
    trial_steps: int = 20
    cooldown_steps: int = 60

    # RollbackManager
    snapshot_every: int = 100
    snapshots: int = 2
    snapshot_place: str = "memory"
    snapshot_budget_mb: int = 2048
    max_rollbacks_in_a_row: int = 3
    rollback_rate_factor: float = 0.5
    divergence_sigmas: float = 8.0
    lost_alignment_steps: int = 50

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, _MODES)
        _one_of("coordination", self.coordination, _COORDINATION)
        _one_of("guide_over", self.guide_over, _GUIDES)
        _one_of("snapshot_place", self.snapshot_place, _SNAPSHOT_PLACES)
        for name in _COUNTS:
            _whole(name, getattr(self, name), 1, 10**7)
        # A move is judged on four losses or more.
        _whole("trial_steps", self.trial_steps, 4, 10**7)
        for name in ("cooldown_steps", "max_rollbacks_in_a_row"):
            _whole(name, getattr(self, name), 0, 10**7)
        _whole("risk_draws", self.risk_draws, 20, 10**5)
        _whole("seed", self.seed, 0, 2**31 - 1)
        # Divergence and oscillation are seen against 30 values; the slope of a window costs its length squared.
        _whole("history_size", self.history_size, 30, 10**6)
        _whole("trend_window", self.trend_window, 4, 500)
        if self.trend_window > self.history_size:
            raise ValueError(
                f"trend_window={self.trend_window} is longer than history_size={self.history_size}, the values kept; "
                f"write history_size: {self.trend_window}"
            )
        if 3 * self.attention_every > self.lost_alignment_steps:
            raise ValueError(
                f"attention_every={self.attention_every} is too seldom for lost_alignment_steps="
                f"{self.lost_alignment_steps}: an alignment is called lost on three measurements or more; write "
                f"lost_alignment_steps: {3 * self.attention_every}"
            )
        _whole("phase_classifier_components", self.phase_classifier_components, 4, 4)
        if not isinstance(self.forecasts, bool):
            meant = flag_meant(self.forecasts)
            raise ValueError(f"forecasts={self.forecasts!r} is neither true nor false; write forecasts: {meant}")
        _number("stability_threshold", self.stability_threshold, 0.0, 10.0, open_low=True)
        _number("phase_stickiness", self.phase_stickiness, 0.25, 1.0, open_high=True)
        guided = KNOBS["guided_weight"]
        _number("initial_guided_weight", self.initial_guided_weight, guided.low, guided.high)
        forward = KNOBS["forward_sum_weight"]
        _number("initial_forward_sum_weight", self.initial_forward_sum_weight, forward.low, forward.high)
        _number("tversky_A", self.tversky_A, 0.0, 1.0, open_low=True)
        _number("tversky_B", self.tversky_B, 0.0, 1.0)
        _number("tversky_weight", self.tversky_weight, 0.0, KNOBS[TVERSKY_WEIGHT].high)
        _number("adaptation_rate", self.adaptation_rate, 0.0, 1.0, open_low=True)
        _number("max_learning_rate", self.max_learning_rate, 0.0, 1.0, open_low=True)
        _number("max_move_risk", self.max_move_risk, 0.0, 1.0)
        _number("consensus_threshold", self.consensus_threshold, 0.5, 1.0, open_low=True)
        _number("rollback_rate_factor", self.rollback_rate_factor, 0.0, 1.0, open_low=True)
        _number("divergence_sigmas", self.divergence_sigmas, 1.0, 1e6)
        self.knob_names()

    def knob_names(self) -> tuple[str, ...]:
        """The knobs that may be steered; those of a term that is left out are not."""
        if not isinstance(self.knobs, str):
            raise ValueError(
                f"knobs={self.knobs!r} is not text; write knobs: all, or knobs: learning_rate,guided_weight"
            )
        names = tuple(KNOBS) if self.knobs.strip() == "all" else self._written_knobs()
        without = () if self.tversky_weight > TVERSKY_OFF else _TVERSKY
        named = [name for name in _TVERSKY if name in names]
        if not without and named and len(named) < len(_TVERSKY):
            raise ValueError(
                f"knobs: {self.knobs!r} names {', '.join(named)} alone, and the Tversky term takes all of "
                f"{', '.join(_TVERSKY)}; write them all, or tversky_weight: 0"
            )
        return tuple(name for name in names if name not in without)

    def _written_knobs(self) -> tuple[str, ...]:
        names = tuple(name.strip() for name in self.knobs.split(",") if name.strip())
        if "all" in names:
            raise ValueError(f"knobs: {self.knobs!r} names all and more; write knobs: all")
        for name in names:
            if name not in KNOBS:
                raise ValueError(f"knobs: {name!r} is unknown{_hint(name, KNOBS)}; known are {', '.join(KNOBS)}")
        return names

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> BrainConfig:
        """Read a mapping; an unknown key is refused, with the nearest known one.

        Raises:
            ValueError: no mapping, an unknown key, or a value out of range.
        """
        if not isinstance(data, Mapping):
            mode = data if isinstance(data, str) and data in _MODES else flag_meant(data, "full", "off")
            raise ValueError(f"{data!r} is no mapping of settings; write {{'mode': {mode!r}}}, or give a BrainConfig")
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise ValueError(
                    f"unknown brain key {key!r}{_hint(str(key), known)}; known keys are {', '.join(known)}"
                )
        return cls(**{f.name: _coerce(data[f.name], f.type) for f in fields(cls) if f.name in data})

    @classmethod
    def from_yaml(cls, path: str | Path) -> BrainConfig:
        """Read a YAML file holding one mapping of keys to values.

        Raises:
            OSError: the file cannot be read.
            ValueError: not YAML, not a mapping, an unknown key, or a value out of range.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise type(error)(f"{path} cannot be read ({error.strerror}); give a YAML file{_LINES}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
        if not isinstance(data, dict):
            raise ValueError(f"{path} holds {type(data).__name__}, no settings; give a YAML file{_LINES}")
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``from_dict`` reads them."""
        return asdict(self)


def _hint(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def flag_meant(value: Any, true: str = "true", false: str = "false") -> str:
    """What to write for a flag that was given as ``value``: text such as ``"no"`` means false."""
    return false if str(value).strip().lower() in ("false", "no", "off", "0") else true


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = get_close_matches(str(value), allowed, n=1)
        instead = near[0] if near else _default(name)
        raise ValueError(f"{name}={value!r} is not known; write {name}={instead!r}, or one of {', '.join(allowed)}")


def _whole(name: str, value: Any, low: int, high: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool)
    if right and low <= value <= high:
        return
    span = f"{low}" if low == high else f"a whole number from {low} to {high}, default {_default(name)}"
    what = "out of range" if right else "not a whole number"
    raise ValueError(f"{name}={value!r} is {what}; write {_as_whole(name, value, low, high) or span}")


def _as_whole(name: str, value: Any, low: int, high: int) -> str:
    """The line for text and decimals that say a whole number in range: ``"30"`` and ``30.0``."""
    try:
        meant = int(value) if isinstance(value, str) or value == int(value) else None
    except (TypeError, ValueError, OverflowError):
        return ""
    good = meant is not None and not isinstance(value, bool) and low <= meant <= high
    return f"{name}: {meant}" if good else ""


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and value == value
    # A comparison, not math.isfinite: that overflows on a whole number beyond every float.
    if right and -math.inf < value < math.inf:
        above = value > low if open_low else value >= low
        if above and (value < high if open_high else value <= high):
            return
    span = f"{'above' if open_low else 'from'} {low} {'and under' if open_high else 'to'} {high}"
    what = "out of range" if right else "not a number"
    raise ValueError(f"{name}={value!r} is {what}; write a number {span}, default {_default(name)}")


def _default(name: str) -> Any:
    return BrainConfig.__dataclass_fields__[name].default


def _coerce(value: Any, kind: Any) -> Any:
    """YAML reads 1e-4 as a string and 5 for 5.0; both mean what they say. What says no number is refused later."""
    if kind == "float" and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    if kind == "str" and value is False:  # YAML 1.1 reads a bare `off` as false
        return "off"
    return value
