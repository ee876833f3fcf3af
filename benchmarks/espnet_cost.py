"""What the brain costs per iteration of an ESPnet recipe's training.

    python benchmarks/espnet_cost.py EXP/config.yaml [--iterations 40] [--batch-size N] [--json FILE]

Run it in the recipe's folder (paths in ``config.yaml`` are relative); a run with ``--dry_run true`` is enough to have
one. ESPnet's Trainer and ours take the same batches in turn, one iteration each, in one process (interleaved, so that
whatever else the machine does hits both):

- ``ratio``: median of (iteration with the brain / plain iteration on the same batch); all costs, and the noise.
- ``own``: time in the brain's own code as a share of the plain iteration, by clocks around it; median, mean and worst.
  The backward of the added loss terms is only in ``ratio``.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from espnet2.tasks.tts import TTSTask
from espnet2.torch_utils.set_all_random_seed import set_all_random_seed
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import Trainer

from bench.clock import Stopwatch, interleave, summarise, watch_adapter
from tts_brain.config import BrainConfig
from tts_brain_espnet.adapter import EspnetAdapter


class Arm:
    """One model with its optimizer; ``take`` trains on one batch and returns the seconds."""

    def __init__(self, args: argparse.Namespace, folder: Path, *, brain: bool) -> None:
        set_all_random_seed(0)
        args = argparse.Namespace(**{**vars(args), "output_dir": str(folder)})
        self.model = TTSTask.build_model(args)
        self.optimizers = TTSTask.build_optimizers(args, self.model)
        self.options = Trainer.build_options(args)
        self.watch = Stopwatch()
        self.adapter = None
        if brain:
            self.adapter = EspnetAdapter(BrainConfig(), self.model, self.optimizers, self.options)
            taps = {self.adapter: ("_after_iteration",), self.adapter._losses: ("_lengths", "_after", "_facts")}
            watch_adapter(self.adapter, self.watch, taps)
            # A step of this size lasts a fraction of a second; a sidecar is written once per epoch, not per iteration.
            self.adapter._save_sidecar = lambda epoch: None

    def take(self, batch: Any) -> None:
        reporter = Reporter(1).start_epoch("train")
        with nullcontext() if self.adapter is None else self.adapter.epoch(reporter, None, None):
            Trainer.train_one_epoch(
                model=self.model,
                iterator=[batch],
                optimizers=self.optimizers,
                schedulers=[None],
                scaler=None,
                reporter=reporter,
                summary_writer=None,
                options=self.options,
                distributed_option=DistributedOption(),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--batch-size", type=int, help="clips in a batch, where the config does not say")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    host = argparse.Namespace(**yaml.safe_load(args.config.read_text(encoding="utf-8")))
    if args.batch_size:
        host.batch_type, host.batch_size = "sorted", args.batch_size
    host.ngpu, host.num_workers, host.distributed = 0, 0, False
    factory = TTSTask.build_iter_factory(args=host, distributed_option=DistributedOption(), mode="train")
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = (Arm(host, Path(folder) / name, brain=name == "brain") for name in ("plain", "brain"))
        rows = interleave(plain.take, ours.take, ours.watch, factory.build_iter(1), args.iterations)
    result = summarise(rows) | {"parameters": sum(p.numel() for p in plain.model.parameters())}
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
