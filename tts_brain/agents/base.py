"""What every agent is: a function of the context and the knobs it owns, with a little memory of its own moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from tts_brain.types import Proposal, TrainingContext


class Agent(Protocol):
    """Proposes; never acts. To add one: one file beside this, one line in ``tts_brain.agents.build_agents``.

    ``owns`` names the knobs it may move; no two agents own the same. ``propose`` gets the current values of all
    knobs and may leave its own out (hold). ``learn`` is told whether its move stayed. State is plain numbers.
    """

    name: ClassVar[str]
    owns: ClassVar[tuple[str, ...]]

    def propose(self, context: TrainingContext, knobs: Mapping[str, float]) -> Proposal: ...

    def learn(self, moves: Mapping[str, tuple[float, float]], context: TrainingContext, *, kept: bool) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
