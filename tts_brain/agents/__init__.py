"""The agents. A new one is one file and one line here."""

from tts_brain.agents.base import Agent
from tts_brain.agents.guided_attention import GuidedAttentionAgent
from tts_brain.agents.learning_rate import LearningRateAgent
from tts_brain.agents.loss_balance import LossBalanceAgent
from tts_brain.attention.supervisor import DynamicAttentionSupervisor
from tts_brain.config import BrainConfig
from tts_brain.losses.controller import AdaptiveLossController

__all__ = ["Agent", "GuidedAttentionAgent", "LearningRateAgent", "LossBalanceAgent", "build_agents"]


def build_agents(config: BrainConfig, controller: AdaptiveLossController) -> tuple[Agent, ...]:
    """All agents, in the order in which they speak."""
    return (
        LearningRateAgent(config.max_learning_rate),
        GuidedAttentionAgent(DynamicAttentionSupervisor(), config.adaptation_rate),
        LossBalanceAgent(controller),
    )
