"""How well exchanged transcripts show in the amount of text, and what looks like them; no training.

    python benchmarks/speaking_rates.py [--data DIR] [--seeds 3] [--steps 500]

One row per bad start of `rescue`: the share of clips far off the usual rate after so many batches of 16, at which step
the user is told first, and which clips the attention's terms leave out at the end, of those with a wrong text and of
those with the right one; for each seed.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
from run import SHARED, _longest

STARTS = (
    "",
    "transcripts-10",
    "transcripts-30",
    "transcripts-slipped",
    "silence-1s+transcripts-10",
    "silence-0.5s",
    "silence-1s",
    "silence-ragged",
    "silence-tail",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "kathleen-en-us", help="LJSpeech layout, wav or flac")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()

    from bench.bad_starts import BAD_STARTS
    from bench.data import batches, collate, load
    from tts_brain.feedback.transcripts import SpeakingRates
    from tts_brain.pytorch.audio import speaking_rates

    corpus = load(args.data, min_s=1.0, max_s=_longest(args.data), held_out=24)
    print(f"{corpus.name}, {len(corpus.train)} clips\n{'start':26} share, first told at, left out: seed by seed")

    def left_out(clips, believable):
        """Shares of the clips with a wrong text, and of those with the right one."""
        right = {clip.name: clip.text for clip in corpus.train}
        least, most = believable or (0.0, math.inf)
        found = {True: [], False: []}
        for clip in clips:
            _, one = collate([clip])
            (rate,) = speaking_rates(one["speech"], one["speech_lengths"], one["text_lengths"])
            found[not np.array_equal(clip.text, right[clip.name])].append(not least <= rate <= most)
        return " of the wrong, ".join(f"{np.mean(found[wrong] or [0.0]):.0%}" for wrong in (True, False))

    for start in STARTS:
        said = []
        for seed in range(args.seeds):
            spoilt = BAD_STARTS[start].corpus(corpus, seed) if start else corpus
            rates, first = SpeakingRates(), None
            for step, (names, batch) in enumerate(islice(batches(spoilt.train, 16, seed), args.steps), start=1):
                rates.add(names, speaking_rates(batch["speech"], batch["speech_lengths"], batch["text_lengths"]))
                first = step if first is None and rates.suspicious else first
            out = left_out(spoilt.train, rates.believable)
            said.append(f"{rates.share:6.1%} {'never' if first is None else first:>5} ({out} of the right)")
        print(f"{start or 'clean':26} {'  '.join(said)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
