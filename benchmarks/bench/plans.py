"""Which arms there are, and which cells a benchmark is made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import median
from typing import Any

from bench.arms import Brain, Plain
from bench.figures import relapsed
from bench.host import Arm
from bench.rivals import AutoFix, hand_decayed, plateau
from bench.rivals_scalarised import dwa, famo, uncertainty
from bench.setting import Setting
from bench.store import Cell
from bench.summary import by_arm, median_interval, of_one_setting, steps_to_aligned
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GRAD_CLIP,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    OVER_FRAMES,
)

GUIDED = (1.0, 10.0, 100.0, 300.0)
RATES = (1e-3, 2e-3, 3e-3)
# Guided weight, rate and weight of a forward-sum term beside strong guidance: at the rate that pilot runs liked, and
# at those and the weights that the brain goes through by itself. All are part of the oracle.
FORWARD_SUMS = (
    (100.0, 2e-3, 0.03),
    (100.0, 2e-3, 0.1),
    (300.0, 2e-3, 0.03),
    (300.0, 2e-3, 0.1),
    *((guided, rate, weight) for guided in (100.0, 300.0) for rate in (3e-3, 5e-3) for weight in (0.1, 0.2)),
    *((guided, rate, 0.2) for guided in (100.0, 300.0) for rate in (1e-2, 2e-2)),
)
# With the guide over the clips' speech, which is the brain's: the same term at constant weights.
OVER_SPEECH = ((100.0, 0.0), (100.0, 0.1), (300.0, 0.1))
_BALANCE = ("mel_weight", "gate_weight", "tversky_weight", "tversky_alpha", "tversky_beta")


def _without(*names: str) -> dict[str, Any]:
    return {"knobs": ", ".join(name for name in KNOBS if name not in names)}


def static_name(guided: float, rate: float, forward_sum: float = 0.0, over_speech: bool = False) -> str:
    also = f" fs{forward_sum:g}" if forward_sum else ""
    return f"static g{guided:g} lr{rate:g}{also}{' speech' if over_speech else ''}"


def _point(guided: float, rate: float, forward_sum: float, over_speech: bool) -> dict[str, Any]:
    return {"guided": guided, "rate": rate, "forward_sum": forward_sum, "over_speech": over_speech}


_HOSTS = _point(GUIDED[0], RATES[0], 0.0, False)  # its default


def _grid() -> dict[str, dict[str, Any]]:
    points = [(guided, rate, 0.0, False) for guided in GUIDED for rate in RATES]
    points += [(guided, rate, weight, False) for guided, rate, weight in FORWARD_SUMS]
    points += [(guided, 2e-3, weight, True) for guided, weight in OVER_SPEECH]
    return {static_name(*point): _point(*point) for point in points if _point(*point) != _HOSTS}


BRAINS: dict[str, dict[str, Any]] = {
    "brain": {},
    "brain without rate": _without(LEARNING_RATE),
    "brain without guidance": _without(GUIDED_WEIGHT, GUIDED_SIGMA, FORWARD_SUM_WEIGHT),
    "brain without forward-sum": _without(FORWARD_SUM_WEIGHT),
    "brain with the guide over frames": {"guide_over": OVER_FRAMES},
    "brain without balance": _without(*_BALANCE) | {"tversky_weight": 0.0},
    "brain without tversky": {"tversky_weight": 0.0},
    "brain without clip": _without(GRAD_CLIP),
    "brain without rollback": {"mode": "assist"},
    "brain without forecasts": {"forecasts": False},
    "brain without coordination": {"coordination": "none"},
    "brain with plain averaging": {"coordination": "average"},
}
BLIND = {
    "brain without filter": "filter",
    "brain without scales": "scales",
    "brain without lengths": "lengths",
    "brain with bare phases": "phases",
    "brain without risk": "risk",
}
GRID = _grid()
AT = "brain at "
# Population-based training: does every member get all the steps (four times the cost), or its share of them?
POPULATIONS = {"pbt 1x": False, "pbt 4x": True}
RIVALS: dict[str, Callable[..., Arm]] = {
    "hand-decayed": hand_decayed,
    "plateau": plateau,
    "uncertainty": uncertainty,
    "dwa": dwa,
    "famo": famo,
    "autofix": AutoFix,
}
# The same from constants of the grid: "plateau at static g100 lr0.005 fs0.1".
FROM_CONSTANTS: dict[str, Callable[..., Arm]] = {
    "hand-decayed": hand_decayed,
    "plateau": plateau,
    # At the paper's own pace the weights hardly move in so few steps (``Uncertainty``).
    "fast uncertainty": partial(uncertainty, 25.0),
    "dwa": dwa,
}


def _at(point: Mapping[str, Any]) -> dict[str, float]:
    """Where a brain or a rival starts; what a brain's guide is drawn over is its own."""
    return {name: value for name, value in point.items() if name != "over_speech"}


ARMS: dict[str, Callable[[], Arm]] = {
    "default": Plain,
    **RIVALS,
    **{name: lambda p=point: Plain(**p) for name, point in GRID.items()},
    **{AT + name: lambda p=point: Brain(**_at(p)) for name, point in GRID.items()},
    **{
        f"{rival} at {name}": lambda m=make, p=point: m(**_at(p))
        for rival, make in FROM_CONSTANTS.items()
        for name, point in GRID.items()
        if not point["over_speech"]
    },
    **{name: lambda s=settings: Brain(settings=dict(s)) for name, settings in BRAINS.items()},
    **{name: lambda e=eye: Brain(blind=e) for name, eye in BLIND.items()},
}


_CONSTANTS = re.compile(rf"({AT})?static g(\S+) lr(\S+?)(?: fs(\S+?))?( speech)?")
ANY_CONSTANTS = "static g300 lr0.01 fs0.5, with any numbers (guided weight, rate, forward-sum); 'brain at ' that"


def arm_name(said: str) -> str:
    """The name that the rows of an arm bear, from what was asked for: constants are not bound to the grid.

    Raises:
        KeyError: there is no such arm.
    """
    if said in ARMS or said in POPULATIONS:
        return said
    at, point = _own_constants(said)
    if point == _HOSTS:
        return "brain" if at else "default"
    return at + static_name(**point)


def make_arm(name: str) -> Arm:
    """The arm of a name, ready to be attached. Raises KeyError when there is none, or when it needs a population."""
    if name in ARMS:
        return ARMS[name]()
    at, point = _own_constants(name)
    return Brain(**_at(point)) if at else Plain(**point)


def _own_constants(said: str) -> tuple[str, dict[str, Any]]:
    found = _CONSTANTS.fullmatch(said)
    try:
        # Plus 0, as there is a -0 too.
        numbers = [float(text or 0.0) + 0.0 for text in found.group(2, 3, 4)] if found else []
    except ValueError:
        numbers = []
    if not found or not all(0.0 <= number < math.inf for number in numbers) or not numbers or numbers[1] == 0.0:
        raise KeyError(said)
    at, over_speech = found.group(1) or "", found.group(5) is not None
    if at and over_speech:  # what a brain's guide is drawn over is its own
        raise KeyError(said)
    return at, _point(*numbers, over_speech)


def cells(benchmark: str, data: str, setting: Setting, seeds: Iterable[int], arms: Iterable[str]) -> list[Cell]:
    """All cells, seed by seed, so that a benchmark that is stopped has whole comparisons."""
    return [Cell(benchmark, arm, seed, data, setting.to_dict()) for seed in seeds for arm in arms]


def rescue_cells(
    data: str, setting: Setting, seeds: Iterable[int], arms: Iterable[str], starts: Iterable[str]
) -> list[Cell]:
    """Each arm's clean run, then start by start, so that what is there can be compared when it is stopped."""
    arms = tuple(arms)
    return [
        Cell("rescue", arm, seed, data, setting.to_dict(), start)
        for seed in seeds
        for start in ("", *starts)
        for arm in arms
    ]


def arms_of(benchmark: str) -> tuple[str, ...]:
    """The arms of a benchmark, the shortest comparison first."""
    if benchmark == "autofix150":
        return ("autofix", "brain", "default")
    first = ("default", "brain", static_name(300.0, 2e-3, 0.03), static_name(100.0, 2e-3))
    # What starts from constants of the grid is run from the best of them, once they are known.
    return tuple(name for name in dict.fromkeys([*first, *ARMS, *POPULATIONS]) if " at " not in name)


def _steps_kept(row: Mapping[str, Any]) -> float:
    return steps_to_aligned({**row, "aligned_step": None} if relapsed(row) else row)


def oracle(rows: Iterable[Mapping[str, Any]]) -> str:
    """The constants that did best in ``align``, of those with the most seeds: steps to aligned, then L1; medians.

    A run that lost its alignment again (``figures.relapsed``) counts as one that never had it: constants that align
    first and speak nothing at the end are nobody's choice.

    Raises:
        ValueError: none of the rows is of a constant setting, or they are of several settings of the benchmark, which
            do not compare (``summary.of_one_setting``).
    """
    groups = {arm: group for arm, group in by_arm(rows).items() if arm in GRID}
    if not groups:
        raise ValueError("no constant setting among the rows: run the benchmark 'align' on this corpus first")
    _, others = of_one_setting(row for group in groups.values() for row in group)
    if others:
        raise ValueError(f"{others} of the rows are of another setting than the rest, and steps do not compare")
    most = max(len(group) for group in groups.values())
    best = {
        arm: (median(map(_steps_kept, group)), median_interval([row["l1"] for row in group])[0])
        for arm, group in groups.items()
        if len(group) == most  # one with fewer seeds may have had luck
    }
    return min(best, key=best.__getitem__)
