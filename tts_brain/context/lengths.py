"""What a loss owes to the length of the batch's texts, and the loss without it.

A loss is a mean over frames, and what share of them is silence, onset or reverberation hangs on how long the clips are.
A loader that gives clips in the order of their length makes such a loss rise and fall with each epoch, whatever is
learned; one that shuffles adds it to the noise. On a corpus with 0.5 s of silence at each end it is nearly nine tenths
of the noise of the loss, on trimmed clips less than a tenth (docs/components.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import mean, median
from typing import Any

from tts_brain.types import Observation

# Of the sums, per step: about the newest 1,000 steps count, so that the jump from the longest clips back to the
# shortest, which tells most where the order is fixed, is remembered for more than an epoch of most corpora.
_MEMORY = 0.999
# What is beyond so many times the usual is cut there: one broken batch must not say what length does.
_MOST_USUAL = 6.0
_USUAL_MEMORY = 0.95
# Standard errors up to which an effect is taken for none.
_NONE_WITHIN = 3.0
# Changes that only say what is usual, before any is learned from; and as many again before an effect is told.
_FEWEST = 30
# About what float32 can hold; squares of more would overflow, and the loss is lost anyway.
_LARGEST = 1e38


class LengthEffect:
    """Least squares of the loss's change from step to step on that of the logarithm of the text length.

    Changes, not values, as both loss and length may follow the time; with an intercept, as a loss falls of itself:
    while length rises evenly with it, as in the first epoch of clips in order, the two cannot be told apart, and
    nothing is taken out. An effect counts by ``1 - (3 / t)²``, t in standard errors, and not at all under 3.

    Args:
        loss: name of the loss that is looked at.
    """

    def __init__(self, loss: str = "mel") -> None:
        self._loss = loss
        self.forget()

    def forget(self) -> None:
        """The loss means something else now."""
        self._last: tuple[float, float] | None = None
        self._owed = 0.0
        self._first: list[tuple[float, float]] = []  # sizes of the first changes, of length and loss
        self._usual = (0.0, 0.0)  # sizes of usual ones; of the loss, what the fit leaves of it
        self._sums = [0.0] * 6  # of 1, x, y, xx, xy, yy over the changes

    def adjusted(self, observation: Observation) -> Observation:
        """The observation as if the texts were as long as when an effect was first told; the same one before.

        What is taken out is added up change by change, so that it never jumps where the estimate moves.
        """
        length, loss = observation.text_length, observation.losses.get(self._loss)
        if length is None or loss is None or not 0.0 < length < math.inf or not abs(loss) <= _LARGEST:
            return observation
        place = math.log(length)
        if self._last is not None:
            longer = place - self._last[0]
            self._learn(longer, loss - self._last[1])
            self._owed += self.effect() * longer
        self._last = (place, loss)
        if self._owed == 0.0:
            return observation
        return replace(observation, losses={**observation.losses, self._loss: loss - self._owed})

    def effect(self) -> float:
        """Rise of the loss, in its own unit, for texts e times as long; 0 where there is none to be told."""
        slope, certain = self._fit()
        return slope * max(0.0, 1.0 - _NONE_WITHIN**2 / certain) if certain > 0.0 else 0.0

    def _fit(self) -> tuple[float, float]:
        """The slope, and the square of it over its standard error; (0, 0) where lengths or losses hardly change."""
        count, x, y, xx, xy, yy = self._sums
        if count < _FEWEST:
            return 0.0, 0.0
        spread, along, across = xx - x * x / count, xy - x * y / count, yy - y * y / count
        if not (spread > 1e-12 and across > 0.0):
            return 0.0, 0.0
        slope = along / spread
        left = max(across - slope * along, 1e-12 * across)
        return slope, slope * slope * spread * (count - 2.0) / left

    def _learn(self, longer: float, higher: float) -> None:
        size = abs(longer)
        if len(self._first) < _FEWEST:
            self._first.append((size, abs(higher)))
            self._usual = (mean(one for one, _ in self._first), median(other for _, other in self._first))
            return
        # What the fit leaves is cut, the further the less usual the change of length is: where the order is fixed, the
        # jump back to the shortest clips says most, and moves the loss most.
        owed = self._fit()[0] * longer
        usual_size, usual_left = self._usual
        most = _MOST_USUAL * (usual_left or abs(higher - owed))
        far = max(1.0, size / usual_size) if usual_size > 0.0 else 1.0
        left = min(max(higher - owed, -most * far), most * far)
        self._usual = (_smooth(usual_size, size), _smooth(usual_left, min(abs(left), most)))
        change = owed + left
        new = (1.0, longer, change, longer * longer, longer * change, change * change)
        self._sums = [_MEMORY * old + one for old, one in zip(self._sums, new, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "last": None if self._last is None else list(self._last),
            "owed": self._owed,
            "first": [list(sizes) for sizes in self._first],
            "usual": list(self._usual),
            "sums": list(self._sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``.

        Raises:
            ValueError, KeyError, TypeError: not such a state; nothing is changed then.
        """
        owed, sums = float(state["owed"]), [float(value) for value in state["sums"]]
        first, usual = [_pair(sizes) for sizes in state["first"]], _pair(state["usual"])
        last = None if state["last"] is None else _pair(state["last"])
        if len(sums) != len(self._sums) or len(first) > _FEWEST:
            raise ValueError("state of the text length's effect has another length; it is of another version")
        if not all(math.isfinite(value) for value in (owed, *usual, *chain(*first), *sums, *(last or ()))):
            raise ValueError("state of the text length's effect is not finite")
        self._last, self._owed = last, owed
        self._first, self._usual, self._sums = first, usual, sums


def _smooth(old: float, new: float) -> float:
    return _USUAL_MEMORY * old + (1.0 - _USUAL_MEMORY) * new


def _pair(state: Sequence[Any]) -> tuple[float, float]:
    first, second = state
    return float(first), float(second)
