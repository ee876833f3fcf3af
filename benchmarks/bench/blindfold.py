"""The brain with one of its parts off that no setting switches off: what the part is worth to the decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from tts_brain.coordination.risk import Weighed
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import TrainingContext, TrainingPhase

Sight = Callable[[TrainingContext], TrainingContext]


def _bare_phase(context: TrainingContext) -> TrainingContext:
    """The phase that ``attention_diag`` lies in, as if there were no doubt and no memory."""
    phase = TrainingPhase.from_attention_diag(0.0 if context.attention is None else context.attention.attention_diag)
    posterior = tuple(float(phase is other) for other in TrainingPhase)
    return replace(context, phase=phase, phase_posterior=posterior, certainty=1.0)


# The filter's forecasts inside the risk's simulation stay: without them there would be no simulation at all.
_SIGHTS: Mapping[str, Sight] = MappingProxyType(
    {
        "filter": lambda context: replace(context, filtered={}, effects={}),
        "scales": lambda context: replace(context, scales={}),
        "phases": _bare_phase,
        "forecasts": lambda context: replace(context, forecast=None),
    }
)
RISK = "risk"
EYES = (*_SIGHTS, RISK)
# No eye of a single decision: what it takes out of each loss is gone for good.
LENGTHS = "lengths"


def blindfold(manager: ContextAwareTrainingManager, eye: str) -> None:
    """Decisions of ``manager`` no longer see with ``eye``, one of ``EYES`` or ``LENGTHS``.

    A filter that is shut judges no move. A risk that is shut lets every joint move through: no book, no simulation.
    Without lengths a loss keeps what it owes to those of the texts.
    """
    if eye == LENGTHS:
        manager.lengths.adjusted = lambda observation: observation
        return
    if eye == RISK:
        manager.risk.weigh = lambda context, moves, course: Weighed(moves, 1.0, 1.0, None, {})
        return
    see, change = manager.context, _SIGHTS[eye]
    manager.context = lambda: change(see())
    if eye == "filter":
        manager.feedback.filters.helped = lambda metric, moves: 0.5
