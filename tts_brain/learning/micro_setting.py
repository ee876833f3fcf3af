"""What a run of the micro-Tacotron is made of, and what its host can show and turn."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tts_brain.learning.micro_task import CLEAN_EDGE
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GATE_WEIGHT,
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    LEARNING_RATE,
    MEL_WEIGHT,
    Capabilities,
)

CAPABILITIES = Capabilities(
    host="micro-tacotron",
    losses=("total", "mel", "gate", "guided"),
    knobs=(LEARNING_RATE, GUIDED_WEIGHT, GUIDED_SIGMA, FORWARD_SUM_WEIGHT, MEL_WEIGHT, GATE_WEIGHT, GRAD_CLIP),
    alignment="attention",
    stop_token=True,
)


@dataclass(frozen=True)
class MicroSetting:
    """What a run is made of: the host's own values, and what is wrong with it.

    Args:
        rate: Adam's, above 0.
        guided_weight: in normalised units (``types.KNOBS``), 0 or more; a host's weight over its mean text length.
        guided_sigma: width of the guide, above 0.
        forward_sum: weight of the forward-sum term; up to ``FORWARD_SUM_OFF`` it is not made.
        batch_size: utterances, at least 1.
        reduction_factor: mel frames per decoder step, at least 1. 1 costs four times the time of 4.
        clip: gradient norm clip of the host, above 0.
        noise: standard deviation in each band of the speech, that of the speech itself being 1.
        attention_every: steps between attention reports.
        edge_silence: least and most silent frames at each end of each training utterance.
        wrong_transcripts: share of the utterances that come with another one's text, in [0, 1].
        nan_steps: steps, the first is 1, whose batch holds ten NaN frames.
        redraw_steps: steps before which the attention's weights are drawn anew (Adam's moments stay, as in a host).
    """

    rate: float = 3e-3
    guided_weight: float = 2.0
    guided_sigma: float = 0.4
    forward_sum: float = 0.0
    batch_size: int = 16
    reduction_factor: int = 4
    clip: float = 1.0
    noise: float = 0.3
    attention_every: int = 5
    edge_silence: tuple[float, float] = CLEAN_EDGE
    wrong_transcripts: float = 0.0
    nan_steps: frozenset[int] = frozenset()
    redraw_steps: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        low, high = self.edge_silence
        checks = {
            "rate": (self.rate, "a positive number, such as 3e-3", 0.0 < self.rate < math.inf),
            "guided_weight": (self.guided_weight, "0 or more, such as 2.0", 0.0 <= self.guided_weight < math.inf),
            "guided_sigma": (self.guided_sigma, "a positive number, such as 0.4", 0.0 < self.guided_sigma < math.inf),
            "forward_sum": (self.forward_sum, "0 or more, such as 0.03", 0.0 <= self.forward_sum < math.inf),
            "batch_size": (self.batch_size, "at least 1, such as 16", self.batch_size >= 1),
            "reduction_factor": (self.reduction_factor, "at least 1, such as 4", self.reduction_factor >= 1),
            "clip": (self.clip, "a positive number, such as 1.0", self.clip > 0.0),
            "noise": (self.noise, "0 or more, such as 0.3", 0.0 <= self.noise < math.inf),
            "attention_every": (self.attention_every, "at least 1, such as 5", self.attention_every >= 1),
            "edge_silence": (self.edge_silence, "0 <= least <= most, such as (0.0, 2.0)", 0.0 <= low <= high < 1e4),
            "wrong_transcripts": (self.wrong_transcripts, "a share in [0, 1]", 0.0 <= self.wrong_transcripts <= 1.0),
        }
        for name, (value, write, good) in checks.items():
            if not good:
                raise ValueError(f"{name}={value}; write {write}")

    @property
    def capabilities(self) -> Capabilities:
        """``CAPABILITIES`` of a host with this clip."""
        return replace(CAPABILITIES, grad_clip=self.clip)

    @property
    def host_values(self) -> dict[str, float]:
        """The host's own values of the knobs whose neutral value only it knows."""
        return {GUIDED_WEIGHT: self.guided_weight, GUIDED_SIGMA: self.guided_sigma}

    @property
    def own_knobs(self) -> dict[str, float]:
        """All knobs as they stand when nobody turns them."""
        return {
            LEARNING_RATE: 1.0,
            FORWARD_SUM_WEIGHT: self.forward_sum,
            MEL_WEIGHT: 1.0,
            GATE_WEIGHT: 1.0,
            GRAD_CLIP: GRAD_CLIP_OFF,
            **self.host_values,
        }
