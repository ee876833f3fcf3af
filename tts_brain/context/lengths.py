"""What a loss owes to the length of the batch's texts, and the loss without it.

A loss is a mean over frames, and what share of them is silence, onset or reverberation hangs on how long the clips are.
A loader that gives clips in the order of their length makes such a loss rise and fall with each epoch, whatever is
learned; one that shuffles adds it to the noise. On clips with silent ends it is 62 to 94 % of the variance of the loss
from step to step, on trimmed clips less than a tenth (docs/components.md).
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
# Standard errors up to which an effect is taken for none; nominal ones, as changes of white noise hang together.
_NONE_WITHIN = 3.0
# Per step, of what a moved estimate would have shifted the level by: it is let in slowly.
_KEEP_LEVEL = 0.99
# Changes that only say what is usual, before any is learned from; and as many again before an effect is told.
_FEWEST = 30
# About what float32 can hold; squares of more would overflow, and the loss is lost anyway.
_LARGEST = 1e38


class LengthEffect:
    """Least squares of the loss's change from step to step on that of the logarithm of the text length.

    Changes, not values, as both loss and length may follow the time; with an intercept, as a loss falls of itself:
    while length rises evenly with it, as in the first epoch of clips in order, the two cannot be told apart, and
    nothing is taken out. (Of recorded runs with silent ends the logarithm explains as much as it and the reciprocal
    together.) An effect counts by ``1 - (3 / t)²``, t in standard errors, and not at all under 3.

    Args:
        loss: name of the loss that is looked at.
    """

    def __init__(self, loss: str = "mel") -> None:
        self._loss = loss
        self.forget()

    def forget(self) -> None:
        """Begin anew, with no effect: the loss means something else now."""
        self._last: tuple[float, float] | None = None  # logarithm of the length, and loss, of the newest step
        self._usual_place = 0.0  # the logarithm of the length for which nothing is taken out, once there is an effect
        self._told = 0.0  # the effect at the newest step
        self._offset = 0.0
        self._owed = 0.0
        self._first: list[tuple[float, float]] = []  # sizes of the first changes, of length and loss
        self._usual = (0.0, 0.0)  # sizes of usual ones; of the loss, what the fit leaves of it
        self._sums = [0.0] * 6  # of 1, x, y, xx, xy, yy over the changes

    def adjusted(self, observation: Observation) -> Observation:
        """The observation as if its texts were as long as those before the step at which an effect was first told.

        Before that it is the same one. Where an estimate moves, the level does not jump: it follows over some hundred
        steps. A step whose length is not known owes what the one before did.
        """
        length, loss = observation.text_length, observation.losses.get(self._loss)
        if loss is None or not abs(loss) <= _LARGEST:
            return observation
        if length is not None and 0.0 < length < math.inf:
            self._see(math.log(length), loss)
        if self._owed == 0.0:
            return observation
        return replace(observation, losses={**observation.losses, self._loss: loss - self._owed})

    def _see(self, place: float, loss: float) -> None:
        before, self._last = self._last, (place, loss)
        if before is None:
            return
        self._learn(place - before[0], loss - before[1])
        effect = self.effect()
        if effect != 0.0 and self._told == self._offset == 0.0:
            # The place before the change: if it is a jump, the level stays that of the long stretch before it.
            self._usual_place = before[0]
        # A sum over changes, each by the estimate of its time, would be as continuous, but never come back: where the
        # loss is not straight in the logarithm of the length, it drifts without end.
        self._offset = _KEEP_LEVEL * self._offset - (effect - self._told) * (before[0] - self._usual_place)
        self._told = effect
        self._owed = effect * (place - self._usual_place) + self._offset

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
        """One change: of the logarithm of the length, and of the loss in its own unit."""
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
            "usual_place": self._usual_place,
            "told": self._told,
            "offset": self._offset,
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
        place, told, offset, owed = (float(state[name]) for name in ("usual_place", "told", "offset", "owed"))
        sums = [float(value) for value in state["sums"]]
        first, usual = [_pair(sizes) for sizes in state["first"]], _pair(state["usual"])
        last = None if state["last"] is None else _pair(state["last"])
        if len(sums) != len(self._sums) or len(first) > _FEWEST:
            raise ValueError("state of the text length's effect has another length; it is of another version")
        if not all(
            math.isfinite(value) for value in (place, told, offset, owed, *usual, *chain(*first), *sums, *(last or ()))
        ):
            raise ValueError("state of the text length's effect is not finite")
        self._last, self._usual_place, self._told, self._offset, self._owed = last, place, told, offset, owed
        self._first, self._usual, self._sums = first, usual, sums


def _smooth(old: float, new: float) -> float:
    return _USUAL_MEMORY * old + (1.0 - _USUAL_MEMORY) * new


def _pair(state: Sequence[Any]) -> tuple[float, float]:
    """Two numbers of a state; ValueError where there are not two."""
    first, second = state
    return float(first), float(second)
