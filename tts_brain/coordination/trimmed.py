"""The mean that a few wrong values cannot bend."""

from __future__ import annotations

import math
from collections.abc import Sequence


def trimmed_mean(values: Sequence[float], trim: int) -> tuple[float, float, float]:
    """Mean of ``values`` without the ``trim`` lowest and highest, and the lowest and highest that were kept.

    All three lie within the range of any subset that leaves out at most ``trim`` of the values, so within that of the
    honest ones when no more than ``trim`` are not (Dolev et al. 1986, Reaching approximate agreement in the presence of
    faults; Yin et al. 2018 for means of gradients). ``consensus.median_of_ranks`` is the extreme case of it.

    Raises:
        ValueError: fewer than ``2 * trim + 1`` values.
    """
    if len(values) < 2 * trim + 1:
        raise ValueError(f"{len(values)} values, {trim} to cut off at each end; {2 * trim + 1} or more are needed")
    kept = sorted(values)[trim : len(values) - trim]
    return min(max(math.fsum(kept) / len(kept), kept[0]), kept[-1]), kept[0], kept[-1]
