"""The constants of ``tts_brain.coordination.calibration``, anew: two for each kind of risk.

    python -m bench.risk_fit        # in benchmarks/; some minutes on one core

Learned on the forks and probes of seeds that no benchmark reports on, each kind of risk alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize

from bench.calibration import brier
from bench.forks import gather
from bench.hindsight import cases, risks, run_cases
from tts_brain.coordination.calibration import Curve, log_odds

SEEDS = (400_000, 410_000)
# Prior on both numbers, as a normal one about the identity: a kind of risk that never came true would have no level.
_PRIOR_STD = 3.0


def fit(shares: ArrayLike, happened: ArrayLike, draws: int) -> Curve:
    """The most probable curve: logistic regression on the log odds, with a slope above 0.

    Args:
        shares: (N,) of plays that went wrong, in [0, 1].
        happened: (N,) whether the run did.
        draws: plays a share is of.
    """
    x = np.array([log_odds(share, draws) for share in np.asarray(shares, dtype=float)])
    y = np.asarray(happened, dtype=float)

    def cost(at: Sequence[float]) -> float:
        odds = np.exp(at[0]) * x + at[1]
        likelihood = np.sum(np.logaddexp(0.0, odds) - y * odds)
        return float(likelihood + (at[0] ** 2 + at[1] ** 2) / (2.0 * _PRIOR_STD**2))

    found = minimize(cost, np.zeros(2)).x
    return Curve(float(np.exp(found[0])), float(found[1]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    decided = [one for seed in SEEDS for one in gather(seed)]
    some = [*cases(decided), *cases(decided, probes=True), *run_cases(decided)]
    for what, pairs in risks(some).items():
        share, happened, draws = (list(column) for column in zip(*pairs, strict=True))
        curve = fit(share, happened, draws[0])
        said = [curve.probability(one, draws[0]) for one in share]
        print(
            f"{what}: Curve({curve.slope:.2f}, {curve.level:.2f})  # {len(said)} moves, {sum(happened)} went bad;",
            end=" ",
        )
        print(f"Brier {brier(share, happened):.4f} as simulated, {brier(said, happened):.4f} so")


if __name__ == "__main__":
    main()
