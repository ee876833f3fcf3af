"""Which arms there are, and which cells a benchmark is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bench.arms import Brain, Plain
from bench.host import Arm
from bench.setting import Setting
from bench.store import Cell
from tts_brain.types import GRAD_CLIP, GUIDED_SIGMA, GUIDED_WEIGHT, KNOBS, LEARNING_RATE

GUIDED = (1.0, 10.0, 100.0, 300.0)
RATES = (1e-3, 2e-3, 3e-3)
# Beside strong guidance at the rate that pilot runs liked; all are part of the oracle.
FORWARD_SUMS = ((100.0, 0.03), (100.0, 0.1), (300.0, 0.03), (300.0, 0.1))
_BALANCE = ("mel_weight", "gate_weight", "tversky_alpha", "tversky_beta")


def _without(*names: str) -> dict[str, Any]:
    return {"knobs": ", ".join(name for name in KNOBS if name not in names)}


def static_name(guided: float, rate: float, forward_sum: float = 0.0) -> str:
    also = f" fs{forward_sum:g}" if forward_sum else ""
    return f"static g{guided:g} lr{rate:g}{also}"


def _statics() -> dict[str, Callable[[], Arm]]:
    arms: dict[str, Callable[[], Arm]] = {}
    for guided in GUIDED:
        for rate in RATES:
            if (guided, rate) != (GUIDED[0], RATES[0]):  # that one is the default
                arms[static_name(guided, rate)] = lambda g=guided, r=rate: Plain(guided=g, rate=r)
    for guided, weight in FORWARD_SUMS:
        arms[static_name(guided, 2e-3, weight)] = lambda g=guided, w=weight: Plain(guided=g, rate=2e-3, forward_sum=w)
    return arms


BRAINS: dict[str, dict[str, Any]] = {
    "brain": {},
    "brain without rate": _without(LEARNING_RATE),
    "brain without guidance": _without(GUIDED_WEIGHT, GUIDED_SIGMA),
    "brain without balance": _without(*_BALANCE) | {"tversky_weight": 0.0},
    "brain without clip": _without(GRAD_CLIP),
    "brain without rollback": {"mode": "assist"},
    "brain without risk": {"max_move_risk": 1.0},
}
STATICS = _statics()
ARMS: dict[str, Callable[[], Arm]] = {
    "default": Plain,
    **STATICS,
    **{name: lambda s=settings: Brain(settings=dict(s)) for name, settings in BRAINS.items()},
}


def cells(benchmark: str, data: str, setting: Setting, seeds: int, arms: Iterable[str]) -> list[Cell]:
    """All cells, seed by seed, so that a benchmark that is stopped has whole comparisons."""
    return [Cell(benchmark, arm, seed, data, setting.to_dict()) for seed in range(seeds) for arm in arms]


def arms_of(benchmark: str) -> tuple[str, ...]:
    """The arms of a benchmark, the shortest comparison first."""
    if benchmark == "autofix150":
        return tuple(name for name in ("autofix", "brain", "default") if name in ARMS)
    first = ("default", "brain", *(static_name(*cell) for cell in ((300.0, 2e-3, 0.03), (100.0, 2e-3))))
    return tuple(dict.fromkeys([*first, *ARMS]))
