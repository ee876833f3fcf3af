"""From the share of plays that go wrong to the probability that the run does: what the plays leave out, learned once.

    p = 1 / (1 + exp(-(slope · logit(share) + level)))     share = (wrong + ½) / (draws + 1)

Platt's map (1999, section 2.1) on the logit of the share: with a slope above 0 it keeps the order of any two risks, and
two numbers can be learned from the few runs that go wrong. Isotonic regression, the free monotone map, would fit the
seeds it was learned on.

The constants are of micro-Tacotrons that are in no benchmark: ``python -m bench.risk_fit`` (in ``benchmarks/``) prints
them. How right they are on other seeds stands in ``docs/components.md``; on a host they are a guess, better than the
share itself where the host resembles the small model in how its runs go wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tts_brain.coordination.dynamics import Outlook


@dataclass(frozen=True, slots=True)
class Curve:
    """The map of one kind of risk.

    Args:
        slope: above 0; under 1 the plays are surer than they should be.
        level: log odds of a share of one half.

    Raises:
        ValueError: a number that is not finite, or a slope of 0 or less: two risks would change places.
    """

    slope: float
    level: float

    def __post_init__(self) -> None:
        if not 0.0 < self.slope < math.inf or not math.isfinite(self.level):
            raise ValueError(f"slope={self.slope}, level={self.level}; write a finite slope above 0 and a finite level")

    def probability(self, share: float, draws: int) -> float:
        """Of a ``share`` in [0, 1] of ``draws`` plays, 1 or more; in [0, 1]."""
        odds = self.slope * log_odds(share, draws) + self.level
        return 1.0 / (1.0 + math.exp(-odds)) if odds > 0.0 else math.exp(odds) / (1.0 + math.exp(odds))


DIVERGENCE = Curve(3.18, 2.63)
ALIGNMENT_LOSS = Curve(0.47, -1.52)


def log_odds(share: float, draws: int) -> float:
    """log(p / (1 - p)) of a share; half a play is added to either side, as 0 of 256 plays is not never."""
    wrong = share * draws
    return math.log((wrong + 0.5) / (draws - wrong + 0.5))


def probabilities(outlook: Outlook) -> dict[str, float]:
    """``divergence`` of a joint move and, where there is an alignment, ``alignment_loss``; probabilities in [0, 1]."""
    said = {"divergence": DIVERGENCE.probability(outlook.divergence, outlook.draws)}
    if outlook.alignment:
        said["alignment_loss"] = ALIGNMENT_LOSS.probability(outlook.alignment_loss, outlook.draws)
    return said
