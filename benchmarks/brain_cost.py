"""What the brain costs per step of Coqui's full-size Tacotron2.

    python benchmarks/brain_cost.py [--data DIR] [--steps 30] [--json FILE]

Two trainers, one plain and one with the brain, take the same batches in turn in one process (interleaved, so that
whatever else the machine does hits both). Two figures:

- ``ratio``: median of (brain's step / plain step on the same batch); contains everything, and the machine's noise.
- ``own``: time spent in the brain's own code (hooks, measuring, deciding, writing) as a share of the plain step, by
  clocks around it; median and worst step. The backward of the added loss terms is only in ``ratio``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.clock import WARM_UP, Stopwatch, interleave, summarise, watch_adapter
from tts_brain_coqui.espeak_corpus import default_cache, make_corpus
from tts_brain_coqui.experiment import Arm, ArmRun

# What of the brain is timed in a step, beside the session's own: by object, its methods.
TIMED: tuple[tuple[Callable[[Any], Any], tuple[str, ...]], ...] = (
    (lambda adapter: adapter, ("_before_step", "_after_step")),
    (lambda adapter: adapter.session, ("see_attention",)),
    (lambda adapter: adapter._criterion, ("_shaped",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LJSpeech layout; default: espeak-ng speech")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.data or make_corpus(default_cache())
    result = coqui_cost(data, args.steps, args.batch_size)
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def coqui_cost(data: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Figures of ``bench.clock.summarise`` for Coqui's full-size Tacotron2 on a folder in LJSpeech layout."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = (_trainer(Path(folder) / name, data, steps + WARM_UP, batch_size) for name in ("plain", "brain"))
        adapter = ours.brain
        watch_adapter(adapter, watch, {owner(adapter): names for owner, names in TIMED})
        # Both loaders give the same batches; a number stands for each.
        return summarise(interleave(_taker(plain), _taker(ours), watch, range(steps + WARM_UP), steps))


def _trainer(folder: Path, data: Path, steps: int, batch_size: int) -> Any:
    Arm(folder.name, folder.name, str(data), steps, brain=folder.name == "brain", batch_size=batch_size).save(folder)
    trainer = ArmRun(folder).build()
    trainer.model.train()
    return trainer


def _taker(trainer: Any) -> Callable[[int], None]:
    batches = iter(trainer.train_loader)

    def take(number: int) -> None:
        trainer.train_step(next(batches), number + 1, 0, time.perf_counter())

    return take


if __name__ == "__main__":
    main()
