"""What the brain costs: per step of each host's full-size model, and whether that grows with the steps."""

from __future__ import annotations

import math
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.reporter import Reporter
from espnet2.train.trainer import Trainer

from bench.clock import Stopwatch, interleave, summarise, watch_adapter
from bench.data import Batch, Corpus, batches
from bench.host import Training
from bench.setting import Setting
from tts_brain.config import BrainConfig
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import KNOBS, Capabilities
from tts_brain_espnet.adapter import EspnetAdapter

BLOCKS = 10


def espnet_cost(corpus: Corpus, setting: Setting, iterations: int) -> dict[str, float]:
    """Figures of ``bench.clock.summarise`` for ESPnet's Tacotron2 at its default sizes."""
    watch = Stopwatch()
    setting = replace(setting, model="full", quick=False)
    with tempfile.TemporaryDirectory() as folder:
        plain, ours = (Training(corpus, setting, 0, Path(folder) / n) for n in ("plain", "ours"))
        adapter = EspnetAdapter(BrainConfig(), ours.model, [ours.optimizer], ours.options)
        adapter._save_sidecar = lambda epoch: None  # once per epoch, not per iteration
        watch_adapter(
            adapter, watch, {adapter: ("_after_iteration",), adapter._losses: ("_lengths", "_after", "_facts")}
        )
        source = batches(corpus.train, setting.batch_size, 0)
        rows = interleave(lambda b: _take(plain, b, None), lambda b: _take(ours, b, adapter), watch, source, iterations)
    parameters = sum(p.numel() for p in plain.model.parameters())
    return {**summarise(rows), "parameters": parameters}


def _take(run: Training, batch: Batch, adapter: EspnetAdapter | None) -> None:
    reporter = Reporter(1).start_epoch("train")
    with nullcontext() if adapter is None else adapter.epoch(reporter, None, None):
        Trainer.train_one_epoch(
            model=run.model,
            iterator=[(batch[0], dict(batch[1]))],
            optimizers=[run.optimizer],
            schedulers=[None],
            scaler=None,
            reporter=reporter,
            summary_writer=None,
            options=run.options,
            distributed_option=DistributedOption(),
        )


OVERHEADS = ("growth", "espnet", "coqui")


Make = Callable[[torch.nn.Module, torch.optim.Optimizer, Path], Any]


def real_session(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> BrainSession:
    """The brain's own, on a made-up host."""
    host = Capabilities("made-up", ("total", "mel", "gate", "guided"), tuple(KNOBS), "attention", True)
    return BrainSession(
        BrainConfig(),
        host,
        folder,
        optimizers=[optimizer],
        model=model,
        parts={"optimizer": optimizer},
        host_values={"guided_sigma": 0.4},
    )


def growth(steps: int = 100_000, make: Make = real_session) -> dict[str, Any]:
    """Time and memory of the session alone over many steps of a made-up run, in ten blocks.

    Args:
        steps: rounded down to whole blocks.
        make: the session, from a model, its optimizer and a folder.

    Returns:
        ``block_s`` per block, in seconds of the core; ``ratio`` of the median of the last three to that of the three
        after the first, which warms up; ``memory_mb`` gained from the end of the second block to that of the last;
        the journal's size.

    Raises:
        ValueError: fewer steps than blocks.
    """
    block = steps // BLOCKS
    if block < 1:
        raise ValueError(f"steps={steps}: growth is seen over {BLOCKS} blocks of a step or more")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = np.random.default_rng(0)
    block_s, memory_mb = [], []
    with tempfile.TemporaryDirectory() as folder:
        session = make(model, optimizer, Path(folder))
        attention = torch.softmax(torch.randn(4, 60, 20), 2)
        lengths = torch.tensor([60, 50, 40, 30]), torch.tensor([20, 18, 15, 10])
        spent = 0.0
        for step in range(1, BLOCKS * block + 1):
            mel = 0.5 + math.exp(-step / 5000) + 0.02 * generator.normal()
            model(torch.ones(1, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            start = time.process_time()
            if session.wants_attention:
                session.see_attention(attention, *lengths)
            losses = {"total": mel + 0.1, "mel": mel, "gate": 0.1, "guided": 0.01}
            session.after_batch(losses, grad_norm=1.0 + 0.1 * generator.random(), learning_rate=1e-3, text_length=20.0)
            spent += time.process_time() - start
            if step % block == 0:
                block_s.append(spent)
                memory_mb.append(_resident_mb())
                spent = 0.0
        journal = session.journal.path.stat().st_size
        session.close()
    return {
        "steps": BLOCKS * block,
        "block_s": block_s,
        "ratio": median(block_s[-3:]) / median(block_s[1:4]),
        "per_step_ms": 1000 * sum(block_s) / (BLOCKS * block),
        "memory_mb": memory_mb[-1] - memory_mb[1],
        "journal_bytes_per_step": journal / (BLOCKS * block),
    }


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20
