"""How strongly, and how narrowly, attention is guided to the diagonal."""

from __future__ import annotations

import math

from tts_brain.types import AttentionReport

WIDE_SIGMA = 0.4
NARROW_SIGMA = 0.2


def smoothstep(x: float) -> float:
    """0 below 0, 1 above 1, ``3 x² - 2 x³`` between: no corner for a weight to stumble over."""
    x = min(max(x, 0.0), 1.0)
    return x * x * (3.0 - 2.0 * x)


class DynamicAttentionSupervisor:
    """Smooth laws of the guided weight, the guide's width, and the forward-sum term beside it.

    The weight is in *normalised* units, so that one setting serves every host and text length: hosts average
    ``mask * attention`` over frames and tokens, so their value falls as 1 / tokens; multiplied by the number of
    tokens it is the mean penalty per frame, in [0, 1] (FACTS: judge guidance by GA * T_in). The host's weight is
    ours times the mean text length.

    Where a run starts is no matter here: a weight that was set far too low or too high is brought to the law.

    Args:
        middle_weight: normalised weight around which the law works; positive.
        middle_forward_sum: weight of the forward-sum term around which its law works; positive.
    """

    def __init__(self, middle_weight: float = 2.25, middle_forward_sum: float = 0.1) -> None:
        if not middle_weight > 0.0:
            raise ValueError(f"middle_weight={middle_weight}; write a positive number, such as 2.25")
        if not middle_forward_sum > 0.0:
            raise ValueError(f"middle_forward_sum={middle_forward_sum}; write a positive number, such as 0.1")
        self.middle_weight = middle_weight
        self.middle_forward_sum = middle_forward_sum

    def weight(self, attention_diag: float) -> float:
        """Twice the middle weight at ``attention_diag`` 0.1 and under, half of it at 0.7 and over, smooth between."""
        return self.middle_weight * math.exp2(1.0 - 2.0 * smoothstep((attention_diag - 0.1) / 0.6))

    def forward_sum(self, report: AttentionReport) -> float:
        """Half the middle weight off the diagonal, twice it on the diagonal, a sixteenth once each token is stopped at.

        Any path is as good to this term as the diagonal, so that without a guide that holds it pulls the attention off
        (FACTS, first looks); on the diagonal it is what makes the attention stop at each token. Where it does, it needs
        the term no more, and rushes under it: each token is passed, all of them in a hurry, and the last one kept. So
        it goes by what the term brings (focus and coverage, 0.5 to 0.75) and not by what it costs, the diagonal.
        """
        on_diagonal = smoothstep((report.diagonality - 0.3) / 0.5)
        stops = _stops(report)
        return self.middle_forward_sum * math.exp2(2.0 * on_diagonal * (1.0 - stops) - 1.0 - 3.0 * stops)

    def sigma(self, report: AttentionReport) -> float:
        """Width of the guide: wide while searching, narrow on the diagonal or at each token but not both, wide again.

        A wide guide is content with a bare diagonal that skips five tokens in six; a narrow one asks for each in
        turn (FACTS, pilot runs: coverage .83 to .95), and holds back an attention that stops at each but rushes. Real
        speech pauses, so an alignment that follows the text is released from the straight line again.
        """
        on_diagonal = max(smoothstep((report.diagonality - 0.5) / 0.4), _stops(report))
        aligned = smoothstep((report.attention_diag - 0.6) / 0.2)
        return WIDE_SIGMA - (WIDE_SIGMA - NARROW_SIGMA) * on_diagonal * (1.0 - aligned)


def _stops(report: AttentionReport) -> float:
    """How far each token is stopped at, 0 to 1: wherever that lies, on the diagonal or off it."""
    return smoothstep((min(report.focus, report.coverage) - 0.5) / 0.25)
