"""The brain on Coqui's Trainer: observe raw values, turn the knobs, save and load, detach.

Everything hangs on instances (``trainer.train_step``, the criterion's ``forward``, optimizer hooks) and comes off with
``detach``. Nothing of Coqui is changed on disk, and checkpoints load without tts-brain.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from trainer import Trainer
from TTS.tts.layers.losses import TacotronLoss

from tts_brain.config import BrainConfig
from tts_brain.feedback.diagnosis import BatchFacts
from tts_brain.pytorch.audio import look_at_some, speaking_rates
from tts_brain.pytorch.capture import tokens_per_utterance
from tts_brain.pytorch.replaced import Replaced
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import GUIDED_SIGMA, Decision, Verdict
from tts_brain_coqui.criterion import CriterionTap, host_sigma
from tts_brain_coqui.host import (
    capabilities,
    host_clip,
    languages,
    parts_of,
    torch_optimizer,
    warn_of_order,
    what_this_run_allows,
)

log = logging.getLogger("tts_brain")

_CHECKPOINT = re.compile(r"(?:checkpoint|best_model)_(\d+)\.pth")
_SIDECAR = re.compile(r"state_(\d+)\.safetensors")


def attach(trainer: Trainer, config: BrainConfig | Mapping[str, Any] | None = None) -> CoquiAdapter | None:
    """Put a brain on a trainer before ``fit``. A recipe with ``brain=True`` does this by itself.

    Args:
        trainer: an initialised Coqui ``Trainer`` of a Tacotron or Tacotron2.
        config: settings, as a ``BrainConfig`` or a mapping; None for the defaults.

    Returns:
        The adapter (also ``trainer.brain``); None for mode ``off``, which changes nothing, and on later processes.

    Raises:
        ValueError: a bad setting, or a model that is not a Tacotron.
        OSError: the run folder cannot be written.
    """
    if not isinstance(config, BrainConfig):
        config = BrainConfig.from_dict({} if config is None else config)
    existing = getattr(trainer, "brain", None)
    if existing is not None:
        return existing
    if config.mode == "off" or (trainer.num_gpus > 1 and trainer.args.rank > 0):
        return None
    if not all(isinstance(c, TacotronLoss) for c in trainer.criterion):
        raise ValueError(
            f"the brain steers Tacotron and Tacotron2; this model's loss is {type(trainer.criterion[0]).__name__}. "
            "Set brain=False in this recipe"
        )
    trainer.brain = CoquiAdapter(trainer, what_this_run_allows(trainer, config))
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
        try:
            self.session = self._make_session(config)
        except OSError as error:
            raise OSError(
                f"the brain cannot write its files to {self._folder}: {error}. "
                "Give an output_path that can be written, or set brain=False"
            ) from error
        self._criterion = CriterionTap(trainer.criterion[0], self.session)
        self._text_length: float | None = None
        self._in_step = False
        self._sidecar_due: int | None = None
        self._ended_at: int | None = None  # the host's step at which the journal was closed
        self._one_language = len(languages(trainer.train_samples)) <= 1
        self._train_step = Replaced(trainer, "train_step", self._on_train_step)
        self._save_checkpoint = Replaced(trainer, "save_checkpoint", self._on_save_checkpoint)
        self._save_best_model = Replaced(trainer, "save_best_model", self._on_save_best_model)
        self._fit = Replaced(trainer, "_fit", self._on_fit)
        if trainer.continue_run:
            # The trainer resumes one step after the checkpoint's. A missing file is said as plainly as a torn one.
            path = self._sidecar(trainer.total_steps_done - 1)
            self.session.load(path, step_otherwise=trainer.total_steps_done // trainer.grad_accum_steps)

    def _make_session(self, config: BrainConfig) -> BrainSession:
        trainer = self._trainer
        return BrainSession(
            config,
            capabilities(trainer),
            self._folder,
            optimizers=[torch_optimizer(o) for o in trainer.optimizer],
            model=trainer.model,
            parts=parts_of(trainer),
            host_values={GUIDED_SIGMA: host_sigma(trainer.criterion[0])},
            dashboard=self._show_dashboard,
        )

    def detach(self) -> None:
        """Give the host everything back; the journal is closed.

        A method that somebody wrapped after us stays wrapped; ours only passes the call on from here.
        """
        for replaced in (self._train_step, self._save_checkpoint, self._save_best_model, self._fit):
            replaced.give_back()
        self._trainer.__dict__.pop("brain", None)
        self._criterion.detach()
        self._close("detached")

    def _close(self, message: str) -> None:
        self._ended_at = self._trainer.total_steps_done
        with self.session.fence():
            self.session.close(message)

    # observe

    def _on_train_step(self, batch: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.session.active:
            return self._train_step.host(batch, *args, **kwargs)
        with self.session.fence():
            self._before_step(batch)
        self._in_step = True
        try:
            outputs, losses = self._train_step.host(batch, *args, **kwargs)
        finally:
            self._in_step = False
        decision = None
        if losses:
            with self.session.fence():
                decision = self._after_step(losses, batch)
        with self.session.fence():
            self._finish_checkpoint(decision)
        return outputs, losses

    def _before_step(self, batch: Mapping[str, Any]) -> None:
        """Lengths from the loader's batch, which is still on the CPU: reading them waits for nothing."""
        if self._text_length is None:
            warn_of_order(self._trainer.train_loader)
        tokens = batch["token_id_lengths"]
        self._criterion.tokens = tokens_per_utterance(tokens, batch["mel_lengths"])
        self._text_length = float(tokens.double().mean())
        trainer = self._trainer
        self._criterion.reduction_factor = int(trainer.model.decoder.r)
        # A gradual training writes another batch size into the config, which a loader that is there does not read.
        size = getattr(trainer.train_loader, "batch_size", None) or trainer.config.batch_size
        self.session.see_regime({"reduction factor": int(trainer.model.decoder.r), "batch size": int(size)})

    def _after_step(self, losses: Mapping[str, Any], batch: Mapping[str, Any]) -> Decision | None:
        raw = {"total": _number(self._criterion.host_total)}
        mel = [_number(losses[name]) for name in ("decoder_loss", "postnet_loss") if name in losses]
        if mel:
            raw["mel"] = sum(mel) / len(mel)
        if "stopnet_loss" in losses:
            raw["gate"] = _number(losses["stopnet_loss"])
        if "ga_loss" in losses:
            raw["guided"] = _number(losses["ga_loss"]) * self._criterion.tokens
        self.session.see_batch(self._facts(batch, raw))
        # 0 is what the host logs for a norm that was not finite, or not computed. Where it does not clip it measures
        # before the scaler has taken its scale back.
        scaled = self._trainer.scaler is not None and host_clip(self._trainer) is None
        norm = 0.0 if scaled else _number(losses.get("grad_norm", 0.0))
        return self.session.after_batch(
            raw,
            grad_norm=norm if norm > 0.0 else None,
            learning_rate=_number(losses.get("current_lr", math.nan)),
            text_length=self._text_length,
            ends_step="grad_norm" in losses,
        )

    def _facts(self, batch: Mapping[str, Any], raw: Mapping[str, float]) -> BatchFacts:
        """What the batch is like, from the loader's tensors on the CPU."""
        features, lengths = batch["mel"], batch["mel_lengths"]
        names = tuple(Path(str(name)).stem for name in batch.get("item_idxs", ()))
        bad: tuple[str, ...] = ()
        if not all(math.isfinite(value) for value in raw.values()):
            finite = torch.isfinite(features).flatten(1).all(1).tolist()
            known = names or tuple(f"clip {n} of the batch" for n in range(len(features)))
            bad = tuple(name for name, good in zip(known, finite, strict=True) if not good)
        measured = (self.session.step + 1) % self.session.config.attention_every == 0 and not bad
        some = look_at_some(features, lengths, batch.get("stop_targets"), lengths) if measured else {}
        # Scripts differ in how many signs a second takes.
        asked = self._one_language and not bad and self.session.wants_rates
        rates = speaking_rates(features, lengths, batch["token_id_lengths"]) if asked else ()
        return BatchFacts(len(features), names, bad, text_rates=rates, **some)

    def _show_dashboard(self, step: int, values: Mapping[str, float]) -> None:
        self._trainer.dashboard_logger.add_scalars("brain", dict(values), self._trainer.total_steps_done)

    # save and load

    def _on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.session.fence():
            self.session.heal()  # a NaN batch may just have gone through
        self._save_checkpoint.host(*args, **kwargs)
        # Inside train_step the brain has not seen this step yet; the sidecar must hold it.
        if self._in_step:
            self._sidecar_due = self._trainer.total_steps_done
        else:
            with self.session.fence():
                self._save_sidecar(self._trainer.total_steps_done)

    def _finish_checkpoint(self, decision: Decision | None) -> None:
        """The sidecar of a checkpoint that the host wrote in the step just done."""
        if self._sidecar_due is None:
            return
        step, self._sidecar_due = self._sidecar_due, None
        if decision is not None and decision.verdict is Verdict.ROLL_BACK:
            # That checkpoint holds the weights that broke: it is written again, under the step it was written at.
            trainer = self._trainer
            now, trainer.total_steps_done = trainer.total_steps_done, step
            try:
                self._save_checkpoint.host()
            finally:
                trainer.total_steps_done = now
        self._save_sidecar(step)

    def _on_save_best_model(self, *args: Any, **kwargs: Any) -> None:
        self._save_best_model.host(*args, **kwargs)
        with self.session.fence():
            self._save_sidecar(self._trainer.total_steps_done)

    def _sidecar(self, host_step: int) -> Path:
        return self._folder / f"state_{host_step}.safetensors"

    def _save_sidecar(self, host_step: int) -> None:
        """One sidecar per checkpoint there is; those of deleted checkpoints go too. None once the run went on alone."""
        if self._ended_at is not None and self._trainer.total_steps_done != self._ended_at:
            return
        steps = set(_numbered(self._folder.parent, _CHECKPOINT))
        if host_step in steps:
            self.session.save(self._sidecar(host_step))
        for step, path in _numbered(self._folder, _SIDECAR).items():
            if step not in steps:
                path.unlink()

    # end

    def _on_fit(self) -> None:
        if self._ended_at is not None:
            log.warning(
                "[brain] it ended with the fit() before, and this one goes on without it. To have it, before fit(): "
                "tts_brain_coqui.detach(trainer); tts_brain_coqui.attach(trainer)"
            )
        try:
            self._fit.host()
        except BaseException as error:
            self._close(f"the run ended with {type(error).__name__}: {error}")
            with self.session.fence():
                # On Ctrl+C the host writes a checkpoint before it looks whether there is one.
                if not (isinstance(error, KeyboardInterrupt) and self._trainer.config.save_on_interrupt):
                    self._rescue()
            raise
        self._close("finished")

    def _rescue(self) -> None:
        """The host removes a failed run's folder when it holds no checkpoint; the journal is worth keeping."""
        run = self._folder.parent
        if any(run.glob("*.pth")):
            return
        kept = run.with_name(f"{run.name}.brain")
        shutil.copytree(self._folder, kept, dirs_exist_ok=True)
        log.warning("[brain] the trainer removes a failed run without checkpoint; the brain's files are in %s", kept)


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    """Files by the step in their name; what a user put beside them is not ours."""
    found = ((name.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


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
