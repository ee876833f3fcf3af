"""Is this move worth its risk? Learns from how earlier moves of the same kind ended."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tts_brain.types import KNOBS, TrainingContext

# Beta(1, 5) prior: before anything was tried, one move in six is expected to hurt.
_PRIOR_BAD = 1.0
_PRIOR_GOOD = 5.0
# Half of what was learned is forgotten after 70 decisions: phases differ in what they bear.
# A move by half again counts whole, also where a knob may go further.
_WHOLE = 1.5
_MEMORY = 0.99


@dataclass(frozen=True, slots=True)
class Risk:
    """Probability in [0, 1] that a move will have to be taken back, and the sentence that says why."""

    probability: float
    reason: str


class RiskAssessor:
    """Beta-Bernoulli estimate per knob and direction of how often a move had to be taken back.

    A full-sized move (the knob's whole ``max_ratio``) carries the full estimate, a smaller one its share; gradient
    spikes raise it. The record of the run is the only source: no constant is fitted to a corpus.
    """

    def __init__(self) -> None:
        self._kept: dict[str, float] = {}
        self._undone: dict[str, float] = {}

    def assess(self, context: TrainingContext, before: Mapping[str, float], after: Mapping[str, float]) -> Risk:
        """Risk of a joint move: that of its riskiest part."""
        worst = Risk(0.0, "nothing moves")
        for name, new in after.items():
            part = self._part(context, name, before[name], new)
            if part.probability > worst.probability:
                worst = part
        return worst

    def _part(self, context: TrainingContext, name: str, old: float, new: float) -> Risk:
        if new == old:
            return Risk(0.0, "nothing moves")
        key = _kind(name, old, new)
        undone, kept = self._undone.get(key, 0.0), self._kept.get(key, 0.0)
        base = (_PRIOR_BAD + undone) / (_PRIOR_BAD + _PRIOR_GOOD + undone + kept)
        size = min(abs(math.log(new / old)) / math.log(min(KNOBS[name].max_ratio, _WHOLE)), 1.0)
        probability = min(1.0, base * size * (1.0 + 5.0 * context.grad_spikes * (new > old)))
        way = "up" if new > old else "down"
        return Risk(probability, f"{name} {way}: about {undone:.0f} of {undone + kept:.0f} such moves hurt")

    def fade(self) -> None:
        """Forget a little; once per decision. A kind of move that is vetoed could else never show a change."""
        for book in (self._kept, self._undone):
            for kind in book:
                book[kind] *= _MEMORY

    def learn(self, moves: Mapping[str, tuple[float, float]], *, kept: bool) -> None:
        """Take in how a move ended; moves under a tenth of ``max_ratio`` are not blamed nor credited."""
        for name, (old, new) in moves.items():
            if abs(math.log(new / old)) < 0.1 * math.log(KNOBS[name].max_ratio):
                continue
            book = self._kept if kept else self._undone
            key = _kind(name, old, new)
            book[key] = book.get(key, 0.0) + 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self._kept), "undone": dict(self._undone)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept, self._undone = _book(state["kept"]), _book(state["undone"])


def _book(counts: Mapping[str, Any]) -> dict[str, float]:
    book = {kind: float(count) for kind, count in counts.items()}
    if not all(0.0 <= count < math.inf for count in book.values()):
        raise ValueError(f"counts of moves {book} are not all 0 or more")
    return book


def _kind(name: str, old: float, new: float) -> str:
    return f"{name}:{'up' if new > old else 'down'}"
