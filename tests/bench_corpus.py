"""A made-up corpus for tests of the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

TINY_MODEL = {
    "embed_dim": 8,
    "eunits": 8,
    "econv_layers": 1,
    "econv_chans": 8,
    "adim": 8,
    "aconv_chans": 2,
    "dunits": 16,
    "prenet_units": 8,
    "postnet_layers": 1,
    "postnet_chans": 8,
}


def tiny_corpus(clips: int = 24, held_out: int = 4) -> Any:
    """Clips whose frames say which letter is spoken, so that there is something to learn."""
    from bench.data import N_MELS, Clip, Corpus

    generator = np.random.default_rng(0)
    letters = generator.normal(size=(6, N_MELS)).astype(np.float32)
    made = []
    for number in range(clips):
        text = generator.integers(2, 8, size=int(generator.integers(4, 8)))
        frames = np.repeat(letters[text - 2], 4, axis=0)
        noise = 0.1 * generator.normal(size=frames.shape)
        made.append(Clip(f"clip{number:02d}", text, (frames + noise).astype(np.float32)))
    tokens = ["<blank>", "<unk>", *"abcdef", "<sos/eos>"]
    return Corpus("tiny", made[held_out:], made[:held_out], tokens, np.zeros(N_MELS), np.ones(N_MELS))


def tiny_setting(**changes: Any) -> Any:
    """A dozen steps of four clips."""
    from bench.setting import Setting

    small = {"steps": 12, "batch_size": 4, "reduction_factor": 2, "held_out": 4, "evaluate_every": 4, "speak_every": 8}
    return Setting(**{**small, "speak_clips": 2, **changes})
