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
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tts_brain_coqui.espeak_corpus import default_cache, make_corpus
from tts_brain_coqui.experiment import Arm, ArmRun


class Stopwatch:
    """Adds up the seconds spent in wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="LJSpeech layout; default: espeak-ng speech")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.data or make_corpus(default_cache())
    with tempfile.TemporaryDirectory() as folder:
        plain, _ = _steps(Path(folder) / "plain", data, args, brain=False)
        ours, watch = _steps(Path(folder) / "brain", data, args, brain=True)
        plain_s, brain_s, own_s = [], [], []
        for step in range(args.steps):
            before = watch.seconds
            pair = [(plain, plain_s), (ours, brain_s)]
            for take, seconds in pair if step % 2 else reversed(pair):
                seconds.append(take())
            own_s.append(watch.seconds - before)
            print(
                f"step {step + 1}: plain {plain_s[-1]:.3f} s, brain {brain_s[-1]:.3f} s, own {own_s[-1]:.4f} s",
                flush=True,
            )
    warm = 2  # the first steps pay for lazy imports and allocations
    base = statistics.median(plain_s[warm:])
    result = {
        "steps": args.steps,
        "plain_step_s": base,
        "ratio": statistics.median(b / p for p, b in zip(plain_s[warm:], brain_s[warm:], strict=True)),
        "own_median": statistics.median(own_s[warm:]) / base,
        "own_mean": statistics.fmean(own_s[warm:]) / base,
        "own_worst": max(own_s[warm:]) / base,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _steps(folder: Path, data: Path, args: argparse.Namespace, *, brain: bool) -> tuple[Callable[[], float], Stopwatch]:
    """A function that takes one training step and returns its seconds."""
    Arm(folder.name, folder.name, str(data), args.steps, brain=brain, batch_size=args.batch_size).save(folder)
    trainer = ArmRun(folder).build()
    watch = Stopwatch()
    if brain:
        _watch_brain(trainer.brain, watch)
    trainer.model.train()
    batches = iter(trainer.train_loader)

    def take() -> float:
        batch = next(batches)
        start = time.perf_counter()
        trainer.train_step(batch, args.steps, 0, start)
        return time.perf_counter() - start

    return take, watch


def _watch_brain(adapter: Any, watch: Stopwatch) -> None:
    for owner, names in (
        (adapter, ("_before_step", "_after_step")),
        (adapter._criterion, ("_as_host", "_shaped")),
        (adapter.session, ("see_attention",)),
        (adapter.session._taps[0], ("_check_gradients", "_measure_update", "_watched")),
    ):
        for name in names:
            watch.around(owner, name)


if __name__ == "__main__":
    main()
