"""Clips whose text is too long or too short for their speech: transcripts that were mixed up show so, before training.

A speaker's rate, in tokens per frame of speech, hardly varies: on two corpora of read speech all but 0.2 to 1.0 % of
the clips lie within three robust standard deviations and a factor of 1.5 of the median. Where a tenth of the texts were
exchanged, 2.9 to 4.7 % do not. A text that happens to be as long as the right one is not found by this.

Whom to warn of asks for certainty. What to learn an alignment from does not: once texts are known to be mixed up, a
clip is left out by closer limits, which take five right ones in a hundred along.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_PAGE = 256  # clips that are judged together: a median of fewer is unsure
_DEVIATIONS, _FACTOR = 3.0, 1.5
_MAD_TO_STD = 1.4826
_SHARE, _FEWEST = 0.025, 12
_CLOSE_DEVIATIONS, _CLOSE_FACTOR = 2.0, 1.25
_NAMES = 32
_MOST_LOG = 700.0  # beyond it no float has an exponential


class SpeakingRates:
    """Counts the clips far off the usual rate and keeps the names of the farthest; a few hundred numbers."""

    def __init__(self) -> None:
        self._page: list[tuple[str, float]] = []
        self._clips = 0
        self._off = 0
        self._farthest: dict[str, float] = {}
        self._usual, self._spread = 0.0, 0.0  # of the newest page, logarithms

    def add(self, names: Sequence[str], rates: Sequence[float]) -> None:
        """Clips by name and their tokens per frame of speech; one that is not positive and finite is left out."""
        for number, rate in enumerate(rates):
            if math.isfinite(rate) and rate > 0.0:
                name = names[number] if number < len(names) else f"clip {number} of a batch"
                self._page.append((name, math.log(rate)))
        while len(self._page) >= _PAGE:
            self._judge(self._page[:_PAGE])
            self._page = self._page[_PAGE:]

    def _judge(self, page: Sequence[tuple[str, float]]) -> None:
        usual = median(rate for _, rate in page)
        spread = _MAD_TO_STD * median(abs(rate - usual) for _, rate in page)
        self._usual, self._spread = usual, spread
        limit = max(_DEVIATIONS * spread, math.log(_FACTOR))
        off = {name: abs(rate - usual) for name, rate in page if abs(rate - usual) > limit}
        self._clips += len(page)
        self._off += len(off)
        self._farthest |= off
        most = sorted(self._farthest, key=lambda name: -self._farthest[name])[:_NAMES]
        self._farthest = {name: self._farthest[name] for name in most}

    @property
    def clips(self) -> int:
        """Seen so far, each as often as it came."""
        return self._clips + len(self._page)

    @property
    def share(self) -> float:
        """Of the clips judged, those far off; 0 before the first 256, and where they are fewer than twelve."""
        return self._off / self._clips if self._off >= _FEWEST else 0.0

    @property
    def suspicious(self) -> bool:
        """Are there more of them than a speaker's own ways explain?"""
        return self.share > _SHARE

    @property
    def believable(self) -> tuple[float, float] | None:
        """Tokens per frame, the least and the most, of clips to learn an alignment from; None where all are."""
        if not self.suspicious:
            return None
        limit = max(_CLOSE_DEVIATIONS * self._spread, math.log(_CLOSE_FACTOR))
        return math.exp(self._usual - limit), math.exp(min(self._usual + limit, _MOST_LOG))

    @property
    def farthest(self) -> tuple[str, ...]:
        """Names of those farthest off, the farthest first."""
        return tuple(self._farthest)

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "page": [[name, rate] for name, rate in self._page],
            "clips": self._clips,
            "off": self._off,
            "farthest": dict(self._farthest),
            "usual": self._usual,
            "spread": self._spread,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        page = [(str(name), float(rate)) for name, rate in state["page"]]
        clips, off = int(state["clips"]), int(state["off"])
        farthest = {str(name): float(by) for name, by in state["farthest"].items()}
        usual, spread = float(state.get("usual", 0.0)), float(state.get("spread", math.inf))
        self._page, self._clips, self._off, self._farthest = page, clips, off, farthest
        self._usual, self._spread = usual, spread
