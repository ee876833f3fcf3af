"""tts-brain: a decision engine that steers the training of attention-based speech synthesisers."""

from tts_brain.attention.supervisor import DynamicAttentionSupervisor
from tts_brain.config import BrainConfig
from tts_brain.context.analyzer import ContextAnalyzer
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
    "Observation",
    "Proposal",
    "RiskAssessor",
    "RollbackManager",
    "StopTokenCounts",
    "TrainingContext",
    "TrainingPhase",
    "Verdict",
]
