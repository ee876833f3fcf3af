"""What distortion says of a model that says nothing; no training.

    python benchmarks/distortion_floor.py [--data DIR]

Mel-cepstral distortion of `align`'s held-out clips against the corpus's mean frame, held from start to end, and against
the recording itself with its movement scaled down to a fifth: a blur. Synthesis above the first is not told from none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from run import SHARED, _longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "kathleen-en-us", help="LJSpeech layout, wav or flac")
    args = parser.parse_args()

    from bench.data import load
    from bench.speech import distortion

    corpus = load(args.data, min_s=1.0, max_s=_longest(args.data), held_out=24)
    said = {"mean frame, held": [], "recording, a fifth of its movement": []}
    for clip in corpus.held_out:
        recording = clip.mel * corpus.std + corpus.mean
        middle = recording.mean(axis=0)
        made = (np.broadcast_to(corpus.mean, recording.shape), middle + 0.2 * (recording - middle))
        for row, spoken in zip(said.values(), made, strict=True):
            row.append(distortion(spoken, recording))
    print(f"{corpus.name}, {len(corpus.held_out)} held-out clips")
    for name, row in said.items():
        print(f"{name:35} {np.mean(row):.2f} dB ({min(row):.2f} to {max(row):.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
