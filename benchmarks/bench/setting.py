"""What a benchmark run is made of, apart from arm, seed and corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """Length, size and rhythm of one run.

    Args:
        model: sizes of the Tacotron2, a name of ``MODELS``.
        quick: ``bench.quick_decoder`` in training and measuring, else the host's own pass: the same but for rounding.
        steps: optimizer steps.
        batch_size: clips.
        reduction_factor: mel frames per decoder step.
        min_s, max_s: clip lengths kept, seconds, edge silence cut off.
        held_out: clips that are measured, never trained on.
        evaluate_every: steps between held-out measurements.
        speak_every: steps between free-running syntheses of some held-out clips; they cost the most.
        speak_clips: how many.
        rate: Adam's, where the arm does not say.
        clip: gradient norm clip of the host.
    """

    model: str = "small"
    quick: bool = True
    steps: int = 500
    batch_size: int = 16
    reduction_factor: int = 4
    min_s: float = 1.0
    max_s: float = 4.0
    held_out: int = 24
    evaluate_every: int = 25
    speak_every: int = 100
    speak_clips: int = 8
    rate: float = 1e-3
    clip: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Of ESPnet's Tacotron2. "small" is for many runs: 0.49 million parameters; "pilot" has 1.7 million, those of the first
# figures; "full" is ESPnet's own default, 26.6 million.
MODELS: dict[str, dict[str, int]] = {
    "small": {
        "embed_dim": 64,
        "eunits": 64,
        "econv_chans": 64,
        "adim": 64,
        "dunits": 128,
        "prenet_units": 32,
        "postnet_layers": 3,
        "postnet_chans": 64,
    },
    "pilot": {
        "embed_dim": 128,
        "eunits": 128,
        "econv_chans": 128,
        "adim": 128,
        "dunits": 256,
        "prenet_units": 64,
        "postnet_layers": 3,
        "postnet_chans": 128,
    },
    "full": {},
}
