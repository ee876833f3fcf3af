"""The brain on a run of ESPnet's Trainer: observe raw values, turn the knobs, save and load, detach.

Everything hangs on instances (the model's ``tts.forward``, an epoch's ``reporter.next``, optimizer hooks) and comes
off with ``close``. Nothing of ESPnet is changed on disk; checkpoints and model files hold nothing of ours.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from espnet2.train.reporter import Reporter, SubReporter
from espnet2.tts.tacotron2 import Tacotron2

from tts_brain.config import BrainConfig
from tts_brain.pytorch.ranks import Ranks
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import GUIDED_SIGMA, KNOBS, Capabilities
from tts_brain_espnet.losses import LossTap, host_sigma

log = logging.getLogger("tts_brain")

_SIDECAR = re.compile(r"state_(\d+)\.safetensors")
# The host writes its checkpoint after our sidecar; a run killed in between resumes one epoch earlier.
_SIDECARS = 2


class EspnetAdapter:
    """One run of the host's Trainer under one brain.

    Args:
        config: settings.
        model: the host's, whose ``tts`` is a ``Tacotron2``.
        options: the host's ``TrainerOptions``.

    Raises:
        ValueError: a model that is not a Tacotron2.
        OSError: the run folder cannot be written.
    """

    def __init__(
        self,
        config: BrainConfig,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        options: Any,
    ) -> None:
        tts = getattr(model, "tts", None)
        if not isinstance(tts, Tacotron2):
            raise ValueError(
                f"brain: true steers tts: tacotron2; this recipe trains {type(tts or model).__name__}. "
                "Write brain: false"
            )
        self._options = options
        self._folder = Path(options.output_dir) / "brain"
        self._writer: Any = None
        self._iterations = 0
        try:
            self.session = BrainSession(
                _what_this_run_allows(config, options),
                _capabilities(len(optimizers), options),
                self._folder,
                optimizers=list(optimizers),
                model=model,
                parts={f"optimizer_{i}": o for i, o in enumerate(optimizers)},
                host_values={GUIDED_SIGMA: host_sigma(tts)},
                dashboard=self._show_dashboard,
                ranks=Ranks.of_this_run(),
            )
        except OSError as error:
            raise OSError(
                f"the brain cannot write its files to {self._folder}: {error}. "
                "Give an --output_dir that can be written, or write brain: false"
            ) from error
        self._losses = LossTap(tts, self.session)
        # ESPnet hands the ids of a batch to its model, which keeps them from ``tts``.
        self._names = model.register_forward_pre_hook(self._keep_names, with_kwargs=True)
        self._regime = {
            "reduction factor": int(tts.reduction_factor),
            "accum_grad": int(options.accum_grad),
            "loss_type": str(tts.loss_type),
        }
        if not options.grad_clip > 0.0:
            log.warning(
                "[brain] grad_clip: %s is no way to switch clipping off: torch's clip %s then. Write a large one, such "
                "as grad_clip: 1.0e+9",
                options.grad_clip,
                "turns every gradient round"
                if options.grad_clip < 0.0
                else "makes every gradient 0, and nothing is learned",
            )

    def resumed(self, reporter: Reporter, scaler: Any) -> None:
        """The host has read a checkpoint: go on from the sidecar of its epoch."""
        self.session.parts["scaler"] = scaler
        steps = 0
        with self.session.fence():
            steps = _steps_done(reporter, self._options.accum_grad)
        self.session.load(self._sidecar(reporter.get_epoch()), step_otherwise=steps)

    @contextmanager
    def epoch(self, reporter: SubReporter, scaler: Any, writer: Any) -> Iterator[None]:
        """Watch one training epoch; its sidecar is written at the end, for the checkpoint the host writes next."""
        self.session.parts["scaler"] = scaler
        self._writer, self._iterations = writer, 0
        with self.session.fence():
            self.session.see_regime(self._regime)
        host_next = reporter.next

        def after_iteration() -> None:
            self._after_iteration(reporter)
            host_next()

        reporter.next = after_iteration
        try:
            yield
        finally:
            del reporter.next
        with self.session.fence():
            self.session.heal()  # a NaN batch may just have gone through
        with self.session.fence():
            self._save_sidecar(reporter.epoch)

    def close(self, message: str) -> None:
        """Give the host everything back; the journal is closed."""
        self._losses.detach()
        self._names.remove()
        with self.session.fence():
            self.session.close(message)

    def _keep_names(self, model: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._losses.names = tuple(kwargs.get("utt_id", ()))

    def _after_iteration(self, reporter: SubReporter) -> None:
        """Everything here that decides whether a step ended is common to all ranks: the host has averaged it."""
        self._iterations += 1
        total = _newest(reporter, "loss")
        if total is None:  # not a training iteration
            return
        self.session.after_batch(
            {"total": total, **self._losses.raw},
            # Another norm than L2 cannot be held against the gradients' own.
            grad_norm=_newest(reporter, "grad_norm") if float(self._options.grad_clip_type) == 2.0 else None,
            learning_rate=_newest(reporter, "optim0_lr0"),
            text_length=self._losses.text_length,
            ends_step=self._iterations % self._options.accum_grad == 0,
        )

    def _show_dashboard(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"brain/{name}", value, step)

    def _sidecar(self, epoch: int) -> Path:
        return self._folder / f"state_{epoch}.safetensors"

    def _save_sidecar(self, epoch: int) -> None:
        """One for this epoch; of the others the one before stays. Those of later epochs are of an earlier run here."""
        self.session.save(self._sidecar(epoch))
        found = ((_SIDECAR.fullmatch(path.name), path) for path in self._folder.glob("state_*"))
        for match, path in found:
            if match and not epoch - _SIDECARS < int(match[1]) <= epoch:
                path.unlink(missing_ok=True)


def _newest(reporter: SubReporter, name: str) -> float | None:
    """A value that the host has registered in this iteration, NaN kept; None when it has not."""
    values = reporter.stats.get(name, ())
    return float(values[-1].value) if values and len(values) == reporter.count else None


def _steps_done(reporter: Reporter, accum_grad: int) -> int:
    """Optimizer steps of the epochs so far; each epoch begins to accumulate anew."""
    iterations = [stats["train"]["total_count"] for _, stats in sorted(reporter.stats.items()) if "train" in stats]
    return sum((now - before) // accum_grad for before, now in pairwise([0, *iterations]))


def _what_this_run_allows(config: BrainConfig, options: Any) -> BrainConfig:
    """Only observe where steering could harm."""
    if not options.sharded_ddp or config.mode == "observe":
        return config
    log.warning(
        "[brain] mode 'observe' instead of %r: sharded_ddp gives each rank a part of the optimizer", config.mode
    )
    return BrainConfig.from_dict({**config.to_dict(), "mode": "observe"})


def _capabilities(optimizers: int, options: Any) -> Capabilities:
    clips = options.grad_clip > 0.0 and float(options.grad_clip_type) == 2.0
    return Capabilities(
        host="espnet",
        losses=("total", "mel", "guided", "gate"),
        knobs=tuple(KNOBS),
        alignment="attention",
        stop_token=True,
        optimizers=optimizers,
        grad_clip=float(options.grad_clip) if clips else None,
    )
