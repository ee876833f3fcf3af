"""One rank of ESPnet's own data-parallel training on CPUs: python espnet_rank.py RANK WORLD PLAN.json

The plan is a list of runs, one after the other: each a training yaml, an output folder, and what goes wrong at this
rank. Each rank leaves behind the knobs of every step, and its weights at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tts_brain.manager import ContextAwareTrainingManager
from tts_brain_espnet.losses import LossTap
from tts_brain_espnet.task import BrainTTSTask
from tts_brain_espnet.trainer import BrainTrainer


def main(rank: int, world: int, plan: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for number, run in enumerate(plan):
        out = Path(run["out"])
        trace: list[dict[str, Any]] = []
        with _patched(run.get("fault"), rank, trace, out):
            BrainTTSTask.main(
                cmd=[
                    *("--config", run["config"], "--output_dir", str(out / "exp"), "--ngpu", "0"),
                    *("--dist_backend", "gloo", "--dist_world_size", str(world), "--dist_rank", str(rank)),
                    *("--dist_init_method", f"file://{out}/meet{number}", *run.get("more", [])),
                ]
            )
        (out / f"knobs{rank}.json").write_text(json.dumps(trace))
        torch.distributed.destroy_process_group()


class _patched:
    """Keeps the knobs of each step, the weights at the end; and breaks the brain where the plan says so."""

    def __init__(self, fault: dict[str, Any] | None, rank: int, trace: list[dict[str, Any]], out: Path) -> None:
        self._before = (LossTap._forward, BrainTrainer.run.__func__, ContextAwareTrainingManager.decide)
        forward, run, decide = self._before

        def traced(tap: LossTap, *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                session = tap._session
                trace.append({"active": session.active, "rate": session._taps[0].rate_multiplier, **session.knobs})
            return forward(tap, *args, **kwargs)

        def kept(cls: type, *, model: torch.nn.Module, **more: Any) -> None:
            run(cls, model=model, **more)
            torch.save(model.state_dict(), out / f"model{rank}.pth")

        def broken(manager: ContextAwareTrainingManager) -> Any:
            decision = decide(manager)
            if fault and fault["rank"] == rank and decision.step >= fault["step"]:
                if fault["kind"] == "raises":
                    raise ZeroDivisionError("made by the test")
                manager.knobs["guided_weight"] *= 1.01  # a rank that computes something else
            return decision

        LossTap._forward = traced
        BrainTrainer.run = classmethod(kept)
        ContextAwareTrainingManager.decide = broken

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        LossTap._forward, run, ContextAwareTrainingManager.decide = self._before
        BrainTrainer.run = classmethod(run)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(Path(sys.argv[3]).read_text()))
