"""tts-brain: a decision engine that steers the training of attention-based speech synthesisers.

The names below are loaded when first asked for: ``tts-brain explain`` must not wait seconds for torch and scikit-learn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tts_brain.attention.supervisor import DynamicAttentionSupervisor
    from tts_brain.config import BrainConfig
    from tts_brain.context.analyzer import ContextAnalyzer
    from tts_brain.coordination.optimizer import MultiAgentOptimizer
    from tts_brain.coordination.risk import RiskAssessor
    from tts_brain.feedback.manager import FeedbackLoopManager
    from tts_brain.feedback.rollback import RollbackManager
    from tts_brain.losses.controller import AdaptiveLossController
    from tts_brain.manager import ContextAwareTrainingManager
    from tts_brain.types import (
        AttentionReport,
        Capabilities,
        Decision,
        Knob,
        Mode,
        Observation,
        Proposal,
        StopTokenCounts,
        TrainingContext,
        TrainingPhase,
        Verdict,
    )

__version__ = "0.1.0"

__all__ = [
    "AdaptiveLossController",
    "AttentionReport",
    "BrainConfig",
    "Capabilities",
    "ContextAnalyzer",
    "ContextAwareTrainingManager",
    "Decision",
    "DynamicAttentionSupervisor",
    "FeedbackLoopManager",
    "Knob",
    "Mode",
    "MultiAgentOptimizer",
    "Observation",
    "Proposal",
    "RiskAssessor",
    "RollbackManager",
    "StopTokenCounts",
    "TrainingContext",
    "TrainingPhase",
    "Verdict",
]

# Where each name lives; all others are in ``types``. tests/test_layering.py holds it against the imports above.
_HOMES = {
    "AdaptiveLossController": "losses.controller",
    "BrainConfig": "config",
    "ContextAnalyzer": "context.analyzer",
    "ContextAwareTrainingManager": "manager",
    "DynamicAttentionSupervisor": "attention.supervisor",
    "FeedbackLoopManager": "feedback.manager",
    "MultiAgentOptimizer": "coordination.optimizer",
    "RiskAssessor": "coordination.risk",
    "RollbackManager": "feedback.rollback",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tts_brain' has no attribute {name!r}")
    value = getattr(import_module(f"tts_brain.{_HOMES.get(name, 'types')}"), name)
    globals()[name] = value  # asked for once
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
