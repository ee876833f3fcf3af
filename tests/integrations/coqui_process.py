"""One process of Coqui's own multi-GPU training, on the CPU: python coqui_process.py RANK PORT CORPUS FOLDER

Only what needs CUDA at the start is replaced: the check for it, NCCL by gloo, and the devices of the wrapper. What the
Trainer then does with its processes is its own. Leaves behind the clips and the sum of the weights of each step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import trainer.trainer as host
from coqui_run import make_config, make_trainer, quick
from trainer import TrainerArgs

WORLD = 2


def main(rank: int, port: str, corpus: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(WORLD))
    wrapper = host.DDP_th
    host.setup_torch_training_env = lambda *args, **kwargs: (False, WORLD)
    host.init_distributed = lambda *args: dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    host.DDP_th = lambda model, device_ids, output_device: wrapper(model, find_unused_parameters=True)

    args = TrainerArgs()
    args.rank = rank
    trainer = make_trainer(make_config(corpus, folder / str(rank), brain=quick()), steps=8, args=args)
    seen: list[dict[str, Any]] = []
    step = trainer.train_step

    def train_step(batch: Any, *more: Any) -> Any:
        clips = [Path(str(name)).stem for name in batch["item_idxs"]]
        result = step(batch, *more)
        total = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
        seen.append({"clips": clips, "weights": total})
        return result

    trainer.train_step = train_step
    trainer._fit()
    brain = getattr(trainer, "brain", None)
    found = {"seen": seen, "mode": None if brain is None else brain.session.manager.mode.value}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
