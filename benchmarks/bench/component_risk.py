"""Is the simulated risk what it says, and was what each stage of the coordination changed right in hindsight?

Fresh micro-Tacotrons train under the brain, and some of their decisions are forked (``forks``). *Calibration*: the said
risk of a joint move against whether its fork diverged or lost its alignment within the horizon (``hindsight``); that of
a move made against the run itself, whose brain went on deciding; that of *probes*, raises of the rate that no decision
would make; and, with ``--traces``, that of the moves of recorded runs. *Stages*: how often each changed the move, and
whether its own fork ended better than that of what it was given. These seeds chose nothing: the constants of
``coordination.calibration`` come from others (``python -m bench.risk_fit``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from bench.calibration import base_brier, brier, calibration_error, reliability
from bench.forks import STAGES, Decided, gather
from bench.hindsight import CLEAR, Case, better, cases, risks, run_cases
from bench.recorded import recorded_cases
from tts_brain.coordination.calibration import ALIGNMENT_LOSS, DIVERGENCE

CALIBRATION, STAGE = "risk: calibration", "risk: stages"
CURVES = {"divergence": DIVERGENCE, "alignment_loss": ALIGNMENT_LOSS}
# Share of a normal law beyond the mean of its worst twentieth: 2.06 standard deviations from its mean.
_BEYOND_CVAR = 0.0196
# 900,000 to 920,000 have chosen that cuts of the rate are not put on trial.
SEEDS = (930_000, 940_000, 950_000)
QUICK = {"runs": 4, "steps": 90, "forked": 1}

Row = dict[str, Any]


def rows(quick: bool = False, traces: Path | None = None) -> list[Row]:
    """Calibration, then stages. ``traces``: a folder of recorded runs, or of folders of them; none are looked for
    without it."""
    batches = [gather(SEEDS[0], **QUICK)] if quick else map(gather, SEEDS)
    decided = [one for batch in batches for one in batch]
    moves, probes = cases(decided), cases(decided, probes=True)
    return [
        *calibration(moves, "forks"),
        *calibration(run_cases(decided), "runs"),
        *calibration(probes, "probes"),
        *(row for name, some in (recorded_cases(traces) if traces else {}).items() for row in calibration(some, name)),
        *gains(moves, "forks"),
        *gains(probes, "probes"),
        *stages(decided),
    ]


def calibration(some: Sequence[Case], where: str) -> list[Row]:
    """The reliability table, Brier score and expected calibration error of both risks; nothing without cases."""
    made = []
    for what, pairs in risks(some).items():
        if not pairs:
            continue
        plain, happened, _ = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
        said = np.array([CURVES[what].probability(share, draws) for share, _, draws in pairs])
        name, note = f"{what.replace('_', ' ')}, {where}", f"{len(said)} moves, {happened.sum():.0f} went bad"
        made += [
            _row(f"{name}: went bad, said {b.low:.0%} to {b.high:.0%}", "said", b.happened, b.said, f"{b.count} moves")
            for b in reliability(said, happened)
        ]
        score, error = brier(said, happened), calibration_error(said, happened)
        made += [
            _row(f"{name}: Brier score", "base rate", score, base_brier(happened), note),
            _row(f"{name}: Brier score", "share of plays", score, brier(plain, happened), note),
            _row(
                f"{name}: expected calibration error", "share of plays", error, calibration_error(plain, happened), note
            ),
        ]
    return made


def gains(some: Sequence[Case], where: str) -> list[Row]:
    """Does the expected gain rank the moves, and how often is the gain worse than its conditional value at risk?"""
    if len(some) < 3:
        return []
    said, happened = [case.said.gain for case in some], [case.gain for case in some]
    worse = sum(case.gain < case.said.cvar for case in some) / len(some)
    rank, note = float(spearmanr(said, happened).statistic), f"{len(some)} moves"
    return [
        _row(f"gain, {where}: rank correlation, said and seen", "no skill", rank, 0.0, note),
        _row(f"gain, {where}: share worse than its conditional value at risk", "normal law", worse, _BEYOND_CVAR, note),
    ]


def stages(decided: Sequence[Decided]) -> list[Row]:
    """A row a stage: of its forked changes the share that ended better, beside the share that ended worse."""
    made = []
    for stage in STAGES:
        changed = [one for one in decided if stage in one.changed]
        seen = np.array([by for one in changed if (by := better(one, stage)) is not None])
        good, bad = ((seen > 0.0).mean(), (seen < 0.0).mean()) if len(seen) else (math.nan, math.nan)
        clear, saved = (
            [int(limit(side * seen).sum()) for side in (1, -1)]
            for limit in (lambda by: by > CLEAR, lambda by: by == math.inf)
        )
        note = f"{1000 * len(changed) / max(len(decided), 1):.1f} per 1,000 decisions ({len(changed)}); "
        note += f"{len(seen)} forked: {clear[0]} clearly better, {clear[1]} clearly worse; "
        note += f"saved {saved[0]}, broke {saved[1]}"
        made.append(_row(f"{stage}: ended better, share", "ended worse", float(good), float(bad), note, STAGE))
    return made


def _row(figure: str, against: str, ours: float, theirs: float, note: str, part: str = CALIBRATION) -> Row:
    return {"part": part, "against": against, "figure": figure, "ours": ours, "theirs": theirs, "note": note}
