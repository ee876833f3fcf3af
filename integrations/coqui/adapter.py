"""The brain on Coqui's Trainer: observe raw values, turn the knobs, save and load, detach.

Everything hangs on instances (``trainer.train_step``, the criterion's ``forward``, optimizer hooks) and comes off with
``detach``. Nothing of Coqui is changed on disk, and checkpoints load without tts-brain.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from trainer import Trainer
from TTS.tts.layers.losses import GuidedAttentionLoss, TacotronLoss
from tts_brain_coqui.criterion import CriterionTap

from tts_brain.config import BrainConfig
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import GATE_WEIGHT, GUIDED_SIGMA, KNOBS, TVERSKY_ALPHA, TVERSKY_BETA, Capabilities

log = logging.getLogger("tts_brain")

_STOP_KNOBS = {GATE_WEIGHT, TVERSKY_ALPHA, TVERSKY_BETA}


def attach(trainer: Trainer, config: BrainConfig | Mapping[str, Any] | None = None) -> CoquiAdapter | None:
    """Put a brain on a trainer before ``fit``. A recipe with ``brain=True`` does this by itself.

    Args:
        trainer: an initialised Coqui ``Trainer`` of a Tacotron or Tacotron2.
        config: settings, as a ``BrainConfig`` or a mapping; None for the defaults.

    Returns:
        The adapter (also ``trainer.brain``); None for mode ``off``, which changes nothing.

    Raises:
        ValueError: a bad setting, or a model that is not a Tacotron.
        OSError: the run folder cannot be written.
    """
    if not isinstance(config, BrainConfig):
        config = BrainConfig.from_dict(config or {})
    existing = getattr(trainer, "brain", None)
    if existing is not None:
        return existing
    if config.mode == "off":
        return None
    if not all(isinstance(c, TacotronLoss) for c in trainer.criterion):
        raise ValueError(
            f"the brain steers Tacotron and Tacotron2; this model's loss is {type(trainer.criterion[0]).__name__}. "
            "Set brain=False in this recipe"
        )
    trainer.brain = CoquiAdapter(trainer, _what_this_run_allows(trainer, config))
    return trainer.brain


def detach(trainer: Trainer) -> None:
    """Take the brain off a trainer; without one, nothing happens."""
    adapter = getattr(trainer, "brain", None)
    if adapter is not None:
        adapter.detach()


class CoquiAdapter:
    """Made by ``attach``. ``session`` holds the manager, the journal and the snapshots."""

    def __init__(self, trainer: Trainer, config: BrainConfig) -> None:
        _make_visible()
        self._trainer = trainer
        self._folder = Path(trainer.output_path) / "brain"
        optimizers = [_torch_optimizer(o) for o in trainer.optimizer]
        self.session = BrainSession(
            config,
            _capabilities(trainer),
            self._folder,
            optimizers=optimizers,
            model=trainer.model,
            parts=_parts(trainer),
            host_values={GUIDED_SIGMA: _host_sigma(trainer)},
            dashboard=self._show_dashboard,
        )
        self._criterion = CriterionTap(trainer.criterion[0], self.session, config.tversky_weight)
        self._regime = self._read_regime()
        self._text_length: float | None = None
        self._in_step = False
        self._sidecar_due: int | None = None
        self._host_train_step, trainer.train_step = trainer.train_step, self._on_train_step
        self._host_save_checkpoint, trainer.save_checkpoint = trainer.save_checkpoint, self._on_save_checkpoint
        self._host_save_best_model, trainer.save_best_model = trainer.save_best_model, self._on_save_best_model
        self._host_fit, trainer._fit = trainer._fit, self._on_fit
        if trainer.continue_run:
            self._resume()

    def detach(self) -> None:
        """Give the host everything back; the journal is closed."""
        for name in ("train_step", "save_checkpoint", "save_best_model", "_fit"):
            self._trainer.__dict__.pop(name, None)
        self._criterion.detach()
        self.session.close()
        self._trainer.brain = None

    # observe

    def _on_train_step(self, batch: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        with self.session.fence():
            self._before_step(batch)
        self._in_step = True
        try:
            outputs, losses = self._host_train_step(batch, *args, **kwargs)
        finally:
            self._in_step = False
        if losses:
            with self.session.fence():
                self._after_step(losses)
        with self.session.fence():
            if self._sidecar_due is not None:
                self._save_sidecar(self._sidecar_due)
                self._sidecar_due = None
        return outputs, losses

    def _before_step(self, batch: Mapping[str, Any]) -> None:
        """Lengths from the loader's batch, which is still on the CPU: reading them waits for nothing."""
        tokens, frames = batch["token_id_lengths"].double(), batch["mel_lengths"].double()
        # The host averages over all (frame, token) cells of a batch; this undoes the division by tokens exactly.
        self._criterion.tokens = float((tokens * frames).sum() / frames.sum())
        self._text_length = float(tokens.mean())
        regime = self._read_regime()
        if regime != self._regime:
            message = f"reduction factor and batch size {self._regime} → {regime}"
            self._regime = regime
            self.session.regime_changed(message)

    def _after_step(self, losses: Mapping[str, Any]) -> None:
        raw = {"total": _number(self._criterion.host_total)}
        mel = [_number(losses[name]) for name in ("decoder_loss", "postnet_loss") if name in losses]
        if mel:
            raw["mel"] = sum(mel) / len(mel)
        if "stopnet_loss" in losses:
            raw["gate"] = _number(losses["stopnet_loss"])
        if "ga_loss" in losses:
            raw["guided"] = _number(losses["ga_loss"]) * self._criterion.tokens
        # 0 is what the host logs for a norm that was not finite, or not computed.
        norm = _number(losses.get("grad_norm", 0.0))
        self.session.after_batch(
            raw,
            grad_norm=norm if norm > 0.0 else None,
            learning_rate=_number(losses.get("current_lr", math.nan)),
            text_length=self._text_length,
        )

    def _read_regime(self) -> tuple[int, int]:
        return int(self._trainer.model.decoder.r), int(self._trainer.config.batch_size)

    def _show_dashboard(self, step: int, values: Mapping[str, float]) -> None:
        self._trainer.dashboard_logger.add_scalars("brain", dict(values), self._trainer.total_steps_done)

    # save and load

    def _on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._host_save_checkpoint(*args, **kwargs)
        # Inside train_step the brain has not seen this step yet; the sidecar must hold it.
        if self._in_step:
            self._sidecar_due = self._trainer.total_steps_done
        else:
            with self.session.fence():
                self._save_sidecar(self._trainer.total_steps_done)

    def _on_save_best_model(self, *args: Any, **kwargs: Any) -> None:
        self._host_save_best_model(*args, **kwargs)
        with self.session.fence():
            self._save_sidecar(self._trainer.total_steps_done)

    def _sidecar(self, host_step: int) -> Path:
        return self._folder / f"state_{host_step}.safetensors"

    def _save_sidecar(self, host_step: int) -> None:
        """One sidecar per checkpoint there is; those of deleted checkpoints go too."""
        steps = {int(p.stem.rpartition("_")[2]) for p in self._folder.parent.glob("*_[0-9]*.pth")}
        if host_step in steps:
            self.session.save(self._sidecar(host_step))
        for path in self._folder.glob("state_*.safetensors"):
            if int(path.stem.rpartition("_")[2]) not in steps:
                path.unlink()

    def _resume(self) -> None:
        # The trainer resumes one step after the checkpoint's.
        path = self._sidecar(self._trainer.total_steps_done - 1)
        if path.exists():
            self.session.load(path)
        else:
            log.warning("[brain] %s is not there: the run was begun without the brain; it starts afresh", path)

    # end

    def _on_fit(self) -> None:
        try:
            self._host_fit()
        except BaseException as error:
            with self.session.fence():
                self.session.close(f"the run ended with {type(error).__name__}: {error}")
                self._rescue()
            raise
        with self.session.fence():
            self.session.close("finished")

    def _rescue(self) -> None:
        """The host removes a failed run's folder when it holds no checkpoint; the journal is worth keeping."""
        run = self._folder.parent
        if any(run.glob("*.pth")):
            return
        kept = run.with_name(f"{run.name}.brain")
        shutil.copytree(self._folder, kept, dirs_exist_ok=True)
        log.warning("[brain] the trainer removes a failed run without checkpoint; the brain's files are in %s", kept)


def _what_this_run_allows(trainer: Trainer, config: BrainConfig) -> BrainConfig:
    """Only observe where steering could harm: ranks that would drift apart, optimizers that are not torch's."""
    why = None
    if trainer.num_gpus > 1 or trainer.use_accelerate:
        why = "several processes need a common decision, which this version cannot take yet"
    elif len(trainer.optimizer) > 1 or not isinstance(trainer.optimizer[0], torch.optim.Optimizer):
        why = f"{type(trainer.optimizer[0]).__name__} steps two optimizers"
    if why is None or config.mode == "observe":
        return config
    log.warning("[brain] mode 'observe' instead of %r: %s", config.mode, why)
    return BrainConfig.from_dict({**config.to_dict(), "mode": "observe"})


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Capacitron and accelerate wrap the real one."""
    for name in ("primary_optimizer", "optimizer"):
        optimizer = getattr(optimizer, name, optimizer)
    return optimizer


def _parts(trainer: Trainer) -> dict[str, Any]:
    parts: dict[str, Any] = {"scaler": trainer.scaler}
    parts |= {f"optimizer_{i}": o for i, o in enumerate(trainer.optimizer)}
    parts |= {f"scheduler_{i}": s for i, s in enumerate(trainer.scheduler)}
    return parts


def _capabilities(trainer: Trainer) -> Capabilities:
    stop = bool(trainer.config.stopnet)
    return Capabilities(
        host="coqui",
        losses=("total", "mel", "guided", "gate") if stop else ("total", "mel", "guided"),
        knobs=tuple(name for name in KNOBS if stop or name not in _STOP_KNOBS),
        alignment="attention",
        stop_token=stop,
        optimizers=len(trainer.optimizer),
    )


def _host_sigma(trainer: Trainer) -> float:
    guide = getattr(trainer.criterion[0], "criterion_ga", None) or GuidedAttentionLoss()
    return float(guide.sigma)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _make_visible() -> None:
    """Coqui's trainer prints through its own logger; without a handler of somebody's, ours would say nothing."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
