"""In full mode a knob reaches the host: the update, the loss, and nothing else."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("TTS", reason="Coqui is not installed: pip install 'tts-brain[coqui]'")

from coqui_run import assert_same, make_config, make_trainer, quick, records, run, weights
from trainer import TrainerArgs
from TTS.tts.layers.losses import GuidedAttentionLoss, TacotronLoss
from TTS.tts.utils.helpers import sequence_mask

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.guide import guided_loss, guided_places
from tts_brain.feedback.transcripts import SpeakingRates
from tts_brain.losses.tversky import soft_counts, tversky_loss
from tts_brain.pytorch.audio import speaking_rates
from tts_brain.types import OVER_SPEECH

NEVER = 10_000
SCHEDULERS = {
    "none": {},
    "NoamLR": {"lr_scheduler": "NoamLR", "lr_scheduler_params": {"warmup_steps": 2}},
    "ExponentialLR": {"lr_scheduler": "ExponentialLR", "lr_scheduler_params": {"gamma": 0.5}},
}


def turn(trainer: Any, **knobs: float) -> None:
    """Set knobs as a decision would."""
    session = trainer.brain.session
    session.manager.knobs = {**session.manager.knobs, **knobs}
    session._turn_taps()


# The rate.


def run_watched(config: Any, **knobs: float) -> dict[str, Any]:
    """Three steps; rates as the host, its log and its checkpoint see them after each, and the weights."""
    seen: dict[str, Any] = {"rates": [], "saved": [], "weights": []}

    def look(trainer: Any) -> None:
        optimizer = trainer.optimizer[0]
        seen["rates"].append([group["lr"] for group in optimizer.param_groups])
        seen["saved"].append(optimizer.state_dict()["param_groups"])
        seen["weights"].append(weights(trainer))

    trainer = make_trainer(config, steps=3, callbacks={"on_train_step_end": look})
    seen["start"] = weights(trainer)
    if knobs:
        turn(trainer, **knobs)
    trainer._fit()
    seen["scheduler"] = None if trainer.scheduler[0] is None else trainer.scheduler[0].state_dict()
    if knobs:
        assert [r["learning_rate"] for r in records(trainer, "observation")] != []
        seen["observed"] = [r["learning_rate"] for r in records(trainer, "observation")]
    return seen


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_rate_is_multiplied_in_the_update_only(scheduler: str, corpus: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "tacotron", "lr": 0.01, **SCHEDULERS[scheduler]}
    brain = quick(knobs="learning_rate", decide_every=NEVER, max_learning_rate=1.0)
    host = run_watched(make_config(corpus, tmp_path / "host", **settings))
    ours = run_watched(make_config(corpus, tmp_path / "ours", brain=brain, **settings), learning_rate=3.0)
    # SGD: the first update is the gradient times the rate, so three times the host's.
    for name, start in host["start"].items():
        if name.endswith("weight") and start.is_floating_point():
            by_host, by_us = host["weights"][0][name] - start, ours["weights"][0][name] - start
            assert torch.allclose(by_us, 3.0 * by_host, rtol=1e-3, atol=1e-6), name
    assert not torch.equal(ours["weights"][0]["embedding.weight"], host["weights"][0]["embedding.weight"])
    # What the host keeps, writes and logs is its own, at every step.
    for what in ("rates", "saved", "scheduler"):
        assert_same(ours[what], host[what])
    before_each = [[0.01], *host["rates"][:-1]] if scheduler == "none" else None
    if before_each is not None:
        assert ours["observed"] == [rate for (rate,) in before_each]
    if scheduler != "none":
        assert len({rate for (rate,) in host["rates"]}) == 3


# The loss, for one batch of the real model.


class Recorder:
    """Passes a call on to the criterion and keeps its arguments."""

    def __init__(self, criterion: Any) -> None:
        self.criterion = criterion
        self.inputs: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> Any:
        self.inputs = args
        return self.criterion(*args)


class OneBatch:
    """A trainer with a brain, and what its model made of one batch."""

    def __init__(self, config: Any) -> None:
        self.trainer = make_trainer(config, steps=1)
        self.plain = TacotronLoss(self.trainer.config)
        batch = next(iter(self.trainer.get_train_dataloader(self.trainer.train_samples)))
        self.trainer.brain._before_step(batch)
        self.tokens = self.trainer.brain._criterion.tokens
        recorder = Recorder(self.plain)
        torch.manual_seed(2)
        self.trainer.model.train()
        self.trainer.model.train_step(self.trainer.format_batch(batch), recorder)
        names = list(self.trainer.brain._criterion._signature.parameters)
        self.inputs = dict(zip(names, recorder.inputs, strict=True))
        for name in ("postnet_output", "decoder_output", "stopnet_output", "alignments"):
            self.inputs[name] = self.inputs[name].detach()
        self.neutral = dict(self.trainer.brain.session.manager.knobs)

    @contextmanager
    def knobs(self, **knobs: float) -> Iterator[None]:
        """These knobs and no others."""
        manager = self.trainer.brain.session.manager
        manager.knobs = knobs
        yield
        manager.knobs = dict(self.neutral)

    def host(self) -> dict[str, torch.Tensor]:
        return self.plain(**self.inputs)

    def ours(self) -> dict[str, torch.Tensor]:
        return self.trainer.criterion[0](**self.inputs)

    def guided(self, sigma: float) -> torch.Tensor:
        """By hand: sum of weight times attention over the cells there are, divided by their number."""
        total, cells = torch.zeros(()), 0
        lengths = zip(self.inputs["alignment_lens"].tolist(), self.inputs["input_lens"].tolist(), strict=True)
        for attention, (frames, tokens) in zip(self.inputs["alignments"], lengths, strict=True):
            off = torch.arange(tokens) / tokens - torch.arange(frames)[:, None] / frames
            total = total + ((1 - torch.exp(-(off**2) / (2 * sigma**2))) * attention[:frames, :tokens]).sum()
            cells += frames * tokens
        return total / cells

    def tversky(self, alpha: float, beta: float) -> torch.Tensor:
        logits = self.inputs["stopnet_output"]
        mask = sequence_mask(self.inputs["stop_target_length"], logits.size(1))
        return tversky_loss(*soft_counts(logits, self.inputs["stopnet_target"], mask), alpha, beta)

    def mel(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """All spectrogram terms with Coqui's own weights (all 0.25)."""
        names = ("decoder_loss", "postnet_loss", "decoder_diff_spec_loss", "postnet_diff_spec_loss")
        return 0.25 * sum(losses[n] for n in (*names, "decoder_ssim_loss", "postnet_ssim_loss"))


@pytest.fixture(scope="module", params=[5.0, 0.0], ids=["ga_alpha 5", "ga_alpha 0"])
def one(request: pytest.FixtureRequest, corpus: Path, module_folder: Path) -> OneBatch:
    folder = module_folder / f"one{request.param}"
    return OneBatch(
        make_config(corpus, folder, ga_alpha=request.param, brain=quick(tversky_weight=0.5, guide_over="frames"))
    )


def close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(value, expected, rtol=1e-5, atol=1e-6)


def test_neutral_knobs_leave_the_very_loss(one: OneBatch) -> None:
    host = one.host()
    with one.knobs(learning_rate=1.0, mel_weight=1.0, gate_weight=1.0, grad_clip=100.0):
        ours = one.ours()
    assert_same(dict(ours), dict(host))
    assert torch.equal(one.trainer.brain._criterion.host_total, host["loss"])


def test_guided_weight_is_per_token(one: OneBatch) -> None:
    host, alpha = one.host(), one.trainer.config.ga_alpha
    with one.knobs(guided_weight=2.0):
        ours = one.ours()
    change = (2.0 * one.tokens - alpha) * one.guided(0.4)
    assert abs(change) > 0.1
    assert close(ours["loss"] - host["loss"], change)
    assert_same({n: v for n, v in ours.items() if n != "loss"}, {n: v for n, v in host.items() if n != "loss"})
    assert torch.equal(one.trainer.brain._criterion.host_total, host["loss"])


def test_sigma_is_the_width(one: OneBatch) -> None:
    with one.knobs(guided_weight=2.0, guided_sigma=0.2):
        ours = one.ours()
    assert not close(one.guided(0.2), one.guided(0.4))
    without = one.host()["loss"] - one.trainer.config.ga_alpha * one.guided(0.4)
    assert close(ours["loss"], without + 2.0 * one.tokens * one.guided(0.2))


def test_the_guide_is_drawn_over_speech(one: OneBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one.trainer.brain.session.config, "guide_over", OVER_SPEECH)
    frames, r = one.inputs["alignment_lens"], one.trainer.model.decoder.r
    mel = one.inputs["mel_input"], one.inputs["output_lens"]
    places = guided_places(OVER_SPEECH, *mel, r, frames, one.inputs["alignments"].shape[1])
    penalty = guided_loss(one.inputs["alignments"], frames, one.inputs["input_lens"], places, 0.3)
    assert not close(penalty, one.tokens * one.guided(0.3))
    with one.knobs(guided_weight=2.0, guided_sigma=0.3):
        ours = one.ours()["loss"]
    assert close(ours, one.host()["loss"] - one.trainer.config.ga_alpha * one.guided(0.4) + 2.0 * penalty)


def test_mel_weight(one: OneBatch) -> None:
    host = one.host()
    with one.knobs(mel_weight=1.5):
        ours = one.ours()
    assert close(ours["loss"], host["loss"] + 0.5 * one.mel(host))
    assert torch.equal(ours["decoder_loss"], host["decoder_loss"])


def test_gate_weight_and_tversky(one: OneBatch) -> None:
    host = one.host()
    with one.knobs(gate_weight=0.4):
        assert close(one.ours()["loss"], host["loss"] - 0.6 * host["stopnet_loss"])
    with one.knobs(tversky_weight=0.5, tversky_alpha=0.7, tversky_beta=0.2):
        assert close(one.ours()["loss"], host["loss"] + 0.5 * one.tversky(0.7, 0.2))
    with one.knobs(gate_weight=0.4, tversky_weight=0.5, tversky_alpha=0.7, tversky_beta=0.2):
        ours = one.ours()
    expected = host["loss"] - 0.6 * host["stopnet_loss"] + 0.4 * 0.5 * one.tversky(0.7, 0.2)
    assert close(ours["loss"], expected)
    assert torch.equal(ours["stopnet_loss"], host["stopnet_loss"])


def test_the_forward_sum_term(one: OneBatch) -> None:
    # At this r the texts are longer than their frames: tokens are taken together.
    frames, texts, attention = (one.inputs[name] for name in ("alignment_lens", "input_lens", "alignments"))
    assert (frames < texts).all()
    neutral = one.host()["loss"]
    with one.knobs(forward_sum_weight=0.2):
        ours = one.ours()["loss"]
    path = forward_sum(attention, frames, texts).mean()
    assert path.item() > 0.0
    assert close(ours, neutral + 0.2 * path)


def test_where_texts_are_mixed_up_our_terms_look_at_the_clips_that_may_be_right(one: OneBatch) -> None:
    frames, texts, attention = (one.inputs[name] for name in ("alignment_lens", "input_lens", "alignments"))
    rates = speaking_rates(one.inputs["mel_input"], one.inputs["output_lens"], texts)
    usual = 1.25 * math.sqrt(min(rates) * max(rates))  # the slowest is just too slow
    diagnosis = one.trainer.brain.session._diagnosis
    diagnosis._rates.add([], [usual] * 240 + [9.0 * usual] * 16)
    try:
        least, most = diagnosis.believable_rates
        kept = torch.tensor([least <= rate <= most for rate in rates])
        assert 0 < kept.sum() < len(kept), "else nothing is shown here"
        neutral = one.host()["loss"]
        with one.knobs(forward_sum_weight=0.2):
            ours = one.ours()["loss"]
    finally:
        diagnosis._rates = SpeakingRates()
    path = forward_sum(attention, frames, texts)
    assert close(ours, neutral + 0.2 * path[kept].mean())
    assert not close(ours, neutral + 0.2 * path.mean())


def test_all_knobs_and_their_gradient(one: OneBatch) -> None:
    knobs = {"guided_weight": 3.0, "guided_sigma": 0.3, "mel_weight": 0.5, "gate_weight": 2.0}
    for name in ("alignments", "stopnet_output", "decoder_output"):
        one.inputs[name] = one.inputs[name].detach().requires_grad_()
    watched = [one.inputs[name] for name in ("alignments", "stopnet_output", "decoder_output")]
    with one.knobs(**knobs, tversky_weight=0.5, tversky_alpha=0.6, tversky_beta=0.3):
        ours = torch.autograd.grad(one.ours()["loss"], watched)
    host = one.host()
    by_hand = (
        host["loss"]
        - one.trainer.config.ga_alpha * one.guided(0.4)
        + 3.0 * one.tokens * one.guided(0.3)
        - 0.5 * one.mel(host)
        + host["stopnet_loss"]
        + 2.0 * 0.5 * one.tversky(0.6, 0.3)
    )
    expected = list(torch.autograd.grad(by_hand, watched))
    # Ours counts shares of a row, so that to scale one gains nothing; the host's softmax takes the same part away.
    attention, theirs = one.inputs["alignments"].detach(), expected[0]
    there = sequence_mask(one.inputs["input_lens"], attention.shape[2]).unsqueeze(1)
    expected[0] = torch.where(there, theirs - (theirs * attention).sum(2, keepdim=True), 0.0)
    for mine, by_hand in zip(ours, expected, strict=True):
        assert torch.allclose(mine, by_hand, rtol=1e-3, atol=1e-7)


def test_what_the_host_reads_stays_its_own(one: OneBatch) -> None:
    criterion = one.trainer.criterion[0]
    with one.knobs(guided_weight=7.0, guided_sigma=0.1):
        one.ours()
        assert criterion.ga_alpha == one.trainer.config.ga_alpha
        assert getattr(criterion, "criterion_ga", GuidedAttentionLoss()).sigma == 0.4
        for off_the_graph in (torch.no_grad, torch.inference_mode):
            with off_the_graph():
                assert_same(dict(one.ours()), dict(one.host()))


def test_evaluation_is_untouched(corpus: Path, tmp_path: Path) -> None:
    losses = []
    for name, brain in (("host", False), ("ours", quick())):
        trainer = make_trainer(make_config(corpus, tmp_path / name, brain=brain, run_eval=True), steps=1)
        trainer.model.eval_log = lambda *_: None  # its pictures
        if brain:
            turn(trainer, guided_weight=20.0, guided_sigma=0.1, mel_weight=4.0, gate_weight=4.0, tversky_weight=2.0)
        torch.manual_seed(3)
        trainer.eval_epoch()
        losses.append({k: v for k, v in trainer.keep_avg_eval.avg_values.items() if "time" not in k})
    assert losses[0] == losses[1]
    assert losses[0]["avg_loss"] > 0


# Steps, and where they are written down.


def test_accumulated_batches_are_one_step(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path, model="tacotron", brain=quick("observe"))
    trainer = make_trainer(config, steps=5, args=TrainerArgs(grad_accum_steps=2))
    seen: list[dict[str, float]] = []
    step = trainer.train_step

    def watch(*args: Any) -> Any:
        outputs, losses = step(*args)
        seen.append(losses)
        return outputs, losses

    trainer.train_step = watch
    trainer._fit()
    assert trainer.total_steps_done == 5
    observed = records(trainer, "observation")
    assert [o["step"] for o in observed] == [1, 2, 3] and trainer.brain.session.step == 3
    for observation, batches in zip(observed, ([0, 1], [2, 3], [4]), strict=True):
        # The host logs a share of 1 / grad_accum_steps.
        total = sum(2 * seen[b]["loss"] for b in batches) / len(batches)
        gate = sum(seen[b]["stopnet_loss"] for b in batches) / len(batches)
        assert observation["losses"]["total"] == pytest.approx(total, rel=1e-5)
        assert observation["losses"]["gate"] == pytest.approx(gate, rel=1e-5)


def test_raw_losses_are_written_not_ours(corpus: Path, tmp_path: Path) -> None:
    """The first step of the same run, with and without strong knobs, shows the manager the same losses."""
    observed = []
    for name, mode in (("observe", "observe"), ("full", "full")):
        config = make_config(corpus, tmp_path / name, model="tacotron", brain=quick(mode))
        trainer = make_trainer(config, steps=1)
        turn(trainer, guided_weight=9.0, mel_weight=2.0, gate_weight=3.0, tversky_weight=2.0)
        trainer._fit()
        observed.append(records(trainer, "observation")[0]["losses"])
    assert observed[0] == pytest.approx(observed[1], rel=1e-5)
    assert set(observed[0]) == {"total", "mel", "gate", "guided"}
    assert 0.0 < observed[0]["guided"] < 1.0


@pytest.fixture(scope="module")
def finished(corpus: Path, module_folder: Path) -> Any:
    return run(make_config(corpus, module_folder / "finished", brain=quick()), steps=4)


def test_what_the_data_are_like_is_seen(corpus: Path, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(corpus, tmp_path, brain=quick("observe")), steps=2)
    session, seen = trainer.brain.session, []
    look = session.see_batch
    session.see_batch = lambda facts: (seen.append(facts), look(facts))
    trainer._fit()
    assert len(seen) == 2
    for facts in seen:
        assert facts.end_labelled_at == 1.0, "the host labels the last frame"
        assert 0.0 <= facts.alike_tail <= 1.0 and 0.0 <= facts.edge_silence <= 1.0
        assert len(facts.text_rates) == len(facts.names) == facts.clips
        assert all(0.05 < rate < 1.0 for rate in facts.text_rates), "phonemes a frame of 12 ms"


def test_decisions_reach_the_taps(finished: Any) -> None:
    last = records(finished, "decision")[-1]
    session = finished.brain.session
    assert last["step"] == 4 and last["applied"]
    assert session.manager.knobs == last["after"]
    assert session._taps[0].rate_multiplier == last["after"]["learning_rate"]


def test_dashboard_gets_scalars(finished: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    finished.dashboard_logger.flush()
    events = accumulator.EventAccumulator(str(finished.output_path)).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if "brain/" in tag}
    names = {tag.rpartition("/")[2] for tag in tags}
    assert {"knob_learning_rate", "knob_guided_weight", "phase", "certainty", "attention_diag"} <= names
    decisions = records(finished, "decision")
    (weight,) = (tag for tag in tags if tag.endswith("knob_guided_weight"))
    written = [event.value for event in events.Scalars(weight)]
    assert written == pytest.approx([d["after"]["guided_weight"] for d in decisions], rel=1e-6)


def test_journal_tells_the_run(finished: Any) -> None:
    kinds = [r["kind"] for r in records(finished)]
    assert kinds[0] == "start" and kinds[-1] == "end"
    start = records(finished, "start")[0]
    assert (start["host"], start["mode"], start["config"]["decide_every"]) == ("coqui", "full", 2)
    assert [r["step"] for r in records(finished, "observation")] == [1, 2, 3, 4]
    assert [r["step"] for r in records(finished, "decision")] == [2, 4]
    assert records(finished, "end")[0]["message"] == "finished"
    assert not records(finished, "event")
