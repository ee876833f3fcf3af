"""The forty bad starts: each changes what it says, spares the held-out clips, and does the same twice."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_run import context

pytest.importorskip("espnet2")

from bench import bad_starts
from bench.arms import Brain, Plain
from bench.bad_starts import BAD_STARTS, BadStart
from bench.data import HOP_S, N_MELS, Clip, Corpus, collate
from bench.figures import rescued
from bench.host import Training
from bench.setting import Setting
from bench.told import CAUSES, named, told
from tts_brain.agents import GuidedAttentionAgent, LearningRateAgent
from tts_brain.attention.supervisor import DynamicAttentionSupervisor
from tts_brain.feedback.diagnosis import BatchFacts, Diagnosis
from tts_brain.types import GUIDED_WEIGHT, LEARNING_RATE, Observation, TrainingPhase

SETTING = Setting(steps=4, batch_size=6, held_out=2, evaluate_every=4, speak_every=100, speak_clips=1)
TOKENS = ["<blank>", "<unk>", *"abcdefgh", "<sos/eos>"]


def corpus(clips: int = 12, seed: int = 5) -> Corpus:
    draw = np.random.default_rng(seed)

    def clip(name: str) -> Clip:
        text = draw.integers(2, len(TOKENS) - 1, draw.integers(5, 9))
        return Clip(name, text, draw.normal(size=(draw.integers(20, 40), N_MELS)).astype(np.float32))

    train, held_out = ([clip(f"{part}{n}") for n in range(count)] for part, count in (("t", clips), ("h", 2)))
    return Corpus("made-up", train, held_out, TOKENS, np.full(N_MELS, -3.0), np.full(N_MELS, 0.8))


def spoilt(start: BadStart, seed: int = 0) -> Corpus:
    return start.corpus(corpus(), seed)


def same(one: list[Clip], other: list[Clip]) -> bool:
    return len(one) == len(other) and all(
        a.name == b.name and np.array_equal(a.text, b.text) and np.array_equal(a.mel, b.mel, equal_nan=True)
        for a, b in zip(one, other, strict=True)
    )


def training(start: BadStart | None, folder: Path, steps: int = 4) -> Training:
    """Not yet run; without a start, a clean one."""
    setting, clips = replace(SETTING, steps=steps, evaluate_every=steps), corpus()
    if start is None:
        return Training(clips, setting, 0, folder)
    run = Training(start.corpus(clips, 0), start.setting(setting), 0, folder)
    start.begin(run)
    return run


def run(start: BadStart | None, folder: Path, steps: int = 4, arm: Plain | None = None) -> Training:
    made = training(start, folder, steps)
    made._speak = lambda clips: (0.0, 0.0, 0.0)  # synthesis before alignment takes long
    made.run(arm or Plain(), lambda step, measured: None)
    return made


def norms(made: Training) -> list[float]:
    return [row["grad_norm"] for row in made.trace]


def finite_weights(made: Training) -> bool:
    return all(bool(p.isfinite().all()) for p in made.model.parameters())


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger().setLevel(logging.ERROR)


def test_forty_with_known_causes_and_a_true_table() -> None:
    assert len(BAD_STARTS) == 40
    assert len({start.what for start in BAD_STARTS.values()}) == len({s.changes for s in BAD_STARTS.values()}) == 40
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in bad_starts.__doc__.splitlines() if "|" in line
    ]
    table = {name: cause for names, _, cause in lines[2:] for name in names.split(", ")}
    assert table == {name: ", ".join(start.causes) for name, start in BAD_STARTS.items()}
    assert {cause for start in BAD_STARTS.values() for cause in start.causes} == set(CAUSES)


@pytest.mark.parametrize("start", BAD_STARTS.values(), ids=lambda s: s.name)
def test_applies_twice_alike_and_spares_the_held_out(start: BadStart, tmp_path: Path) -> None:
    changed, again, clean = spoilt(start), spoilt(start), corpus()
    assert same(changed.train, again.train) and same(changed.held_out, clean.held_out)
    assert [clip.name for clip in changed.train] == [clip.name for clip in clean.train]
    assert changed.tokens == clean.tokens and np.array_equal(changed.mean, clean.mean)
    batch = collate(clean.train[:4])
    out = []
    for folder in ("a", "b"):
        state = torch.random.get_rng_state()
        made = training(start, tmp_path / folder, steps=60)
        hooks = [] if made.spoil is None else [made.spoil(step, (batch[0], dict(batch[1]))) for step in range(60)]
        out.append([b[1][name] for b in hooks for name in sorted(batch[1])] + list(made.model.parameters()))
        torch.random.set_rng_state(state)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(*out, strict=True))
    assert all(torch.equal(batch[1][name], collate(clean.train[:4])[1][name]) for name in batch[1])
    differs = not same(changed.train, clean.train) or start.setting(SETTING) != SETTING
    hooked = (
        made.spoil is not None or made.tts.taco2_loss._forward_pre_hooks or made.optimizer._optimizer_step_post_hooks
    )
    hooked = hooked or any(p._post_accumulate_grad_hooks for p in made.model.parameters())
    assert differs or hooked or "guided" in start.name


def test_seeds_draw_differently() -> None:
    for name in ("silence-ragged", "transcripts-30", "nan-clip"):
        assert not all(same(spoilt(BAD_STARTS[name]).train, spoilt(BAD_STARTS[name], s).train) for s in range(1, 6))


def test_rate_and_guidance_reach_arms_with_their_own() -> None:
    start = BAD_STARTS["rate-x10+guided-0"]
    assert start.arm(Plain(guided=300.0, rate=2e-3)) == Plain(guided=0.0, rate=2e-2)
    assert start.arm(Plain()).rate is None and start.setting(SETTING).rate == pytest.approx(10 * SETTING.rate)
    assert start.arm(Brain(rate=1e-3)).rate == pytest.approx(1e-2)
    assert BAD_STARTS["nan-once"].arm(Plain(rate=1.0)) == Plain(rate=1.0)


@pytest.mark.parametrize(
    ("name", "least_s", "most_s"),
    [("silence-0.5s", 1, 1), ("silence-1s", 2, 2), ("silence-ragged", 0, 3), ("silence-tail", 1, 1)],
)
def test_silence_is_long_and_quiet(name: str, least_s: float, most_s: float) -> None:
    for clip, clean in zip(spoilt(BAD_STARTS[name]).train, corpus().train, strict=True):
        more = (len(clip.mel) - len(clean.mel)) * HOP_S
        assert least_s - 2 * HOP_S <= more <= most_s + 2 * HOP_S
        start = next(n for n in range(len(clip.mel)) if np.array_equal(clip.mel[n], clean.mel[0]))
        assert np.array_equal(clip.mel[start : start + len(clean.mel)], clean.mel)
        assert name != "silence-tail" or start == 0
        assert clip.mel[start + len(clean.mel) :].mean() < clean.mel.mean() - 1.0 or name == "silence-ragged"


@pytest.mark.parametrize(("name", "count"), [("transcripts-10", 2), ("transcripts-30", 4), ("transcripts-slipped", 6)])
def test_texts_are_permuted(name: str, count: int) -> None:
    changed, clean = spoilt(BAD_STARTS[name]).train, corpus().train
    assert sum(not np.array_equal(a.text, b.text) for a, b in zip(changed, clean, strict=True)) == count
    assert sorted(c.text.tobytes() for c in changed) == sorted(c.text.tobytes() for c in clean)
    assert all(np.array_equal(a.mel, b.mel) for a, b in zip(changed, clean, strict=True))


def test_wrong_stop_labels() -> None:
    labels = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]])
    early = bad_starts._stop_early(labels, torch.tensor([10, 5]))
    assert early.tolist() == [[0] * 7 + [1] * 3, [0] * 3 + [1] * 7]


def test_the_host_skips_nan_batches_and_its_weights_stay_finite(tmp_path: Path) -> None:
    made = run(BAD_STARTS["nan-once"], tmp_path)
    assert [bool(np.isfinite(norm)) for norm in norms(made)] == [True, False, True, True]
    assert finite_weights(made)
    burst = run(BAD_STARTS["nan-burst"], tmp_path)
    assert [bool(np.isfinite(norm)) for norm in norms(burst)] == [True, True, False, False]


def test_explosions(tmp_path: Path) -> None:
    clean, batch, gradient = (
        run(start, tmp_path) for start in (None, BAD_STARTS["exploding-once"], BAD_STARTS["exploding-gradient"])
    )
    assert batch.trace[1]["l1_loss"] > 100 * clean.trace[1]["l1_loss"] and finite_weights(batch)
    assert norms(gradient)[1] > 1e4 * max(norms(clean))
    # Adam's second moment remembers: hardly anything moves any more.
    moments = [max(float(s["exp_avg_sq"].max()) for s in r.optimizer.state.values()) for r in (gradient, clean)]
    assert moments[0] > 1e6 * moments[1] and finite_weights(gradient)


@pytest.mark.parametrize(("name", "steps"), [("nan-once", [15]), ("nan-every-50", [49]), ("nan-burst", range(30, 50))])
def test_when_batches_are_not_finite(name: str, steps: list[int], tmp_path: Path) -> None:
    made, (names, tensors) = training(BAD_STARTS[name], tmp_path, steps=60), collate(corpus().train[:4])
    batches = [made.spoil(step, (names, dict(tensors)))[1] for step in range(60)]
    assert [step for step, batch in enumerate(batches) if not batch["speech"].isfinite().all()] == list(steps)


def test_half_precision(tmp_path: Path) -> None:
    made = run(BAD_STARTS["fp16-overflow"], tmp_path, steps=8)
    finite = np.isfinite(norms(made))
    # The scale climbs or falls to where float16 ends, and from then on every other step overflows.
    assert list(finite[-4:]) in ([True, False, True, False], [False, True, False, True]) and finite_weights(made)
    pure = run(BAD_STARTS["fp16-pure"], tmp_path, steps=2)
    assert all(torch.equal(p.nan_to_num(), p.half().float().nan_to_num()) for p in pure.model.parameters())


def test_alignment_is_hurt_in_mid_run_only(tmp_path: Path) -> None:
    clean = run(None, tmp_path)
    for name in ("attention-reset", "attention-flat", "query-shuffled", "texts-shuffled"):
        hurt = run(BAD_STARTS[name], tmp_path)
        losses = [[row["loss"] for row in made.trace] for made in (clean, hurt)]
        assert losses[0][:2] == losses[1][:2] and losses[0][2] != losses[1][2], name
        assert finite_weights(hurt)


def test_the_rate_spikes_and_comes_back(tmp_path: Path) -> None:
    seen: list[float] = []

    def watch(made: Training) -> Training:
        made.optimizer.register_step_pre_hook(lambda o, a, k: seen.append(o.param_groups[0]["lr"]))
        made._speak = lambda clips: (0.0, 0.0, 0.0)
        return made

    for arm in (Plain(rate=2e-3), Plain(schedule=lambda made, step: made.set_rate(2e-3))):
        watch(training(BAD_STARTS["rate-spike"], tmp_path)).run(arm, lambda step, measured: None)
    assert seen == pytest.approx([2e-3, 2e-3, 6e-2, 2e-3] * 2)


def test_stop_labels_reach_the_loss(tmp_path: Path) -> None:
    clean = run(None, tmp_path, steps=1)
    for name in ("stop-inverted", "stop-early", "stop-padding"):
        wrong = run(BAD_STARTS[name], tmp_path, steps=1)
        assert wrong.trace[0]["bce_loss"] != clean.trace[0]["bce_loss"], name
        assert (wrong.trace[0]["l1_loss"] == clean.trace[0]["l1_loss"]) == (name != "stop-padding")


def test_success_is_aligned_to_the_end_and_near_the_clean_loss() -> None:
    def row(l1: float, *diags: float) -> dict:
        return {"l1": l1, "l1_postnet": l1, "curve": [[n, l1, d] for n, d in enumerate(diags)]}

    clean = row(1.0, 0.6)
    assert rescued(row(1.15, 0.1, 0.5, 0.6, 0.7), clean)
    assert not rescued(row(1.16, 0.6, 0.6, 0.6), clean)
    assert not rescued(row(float("nan"), 0.6, 0.6, 0.6), clean)
    assert not rescued(row(0.9, 0.6, 0.6, 0.6, 0.4), clean)
    assert not rescued(row(0.9, 0.6, 0.6, 0.4, 0.6), clean)
    assert not rescued(row(0.9, 0.6, 0.6), clean)
    # Poisoned running statistics show behind the postnet only.
    assert not rescued({**row(0.9, 0.6, 0.6, 0.6), "l1_postnet": float("nan")}, clean)


def reason(text: str) -> list[dict]:
    return [{"kind": "start", "step": 0}, {"kind": "decision", "step": 20, "verdict": "accept", "reason": text}]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("the learning rate 3.0e-02 is too high for this model", "rate too high"),
        ("the rate seems too low: nothing moves", "rate too low"),
        ("there is no guidance at all", "guidance off"),
        ("the guided weight is too weak", "guidance too weak"),
        ("guidance is too strong", "guidance too strong"),
        ("a batch size of 4 is too small", "batch too small"),
        ("about 1.0 s of trailing silence in most clips; trim them", "edge silence"),
        ("these clips' texts do not match what is said", "wrong transcripts"),
        ("clip t3 has features that are not finite", "non-finite data"),
        ("the batch at step 200 is an outlier, 1000 times louder", "exploding batch"),
        ("the stop labels are wrong: they come in mid-clip", "stop token"),
        ("a reduction factor of 1 is too small", "reduction factor"),
        ("fp16 overflows: use bf16", "half precision"),
        ("the alignment was 0.62 and has been under half of that for 50 steps", "alignment lost"),
    ],
)
def test_what_names_a_cause(text: str, cause: str) -> None:
    assert named(reason(text)) == {cause}
    assert told(reason(text), cause)
    event = {"kind": "event", "step": 3, "event": "hint", "message": text}
    assert named([event]) == {cause}


@pytest.mark.parametrize(
    "text",
    [
        "the loss rises (z +4.1): lower the rate",
        "30% of the gradient norms spike: lower the rate; clip at 3 median norms",
        "nothing moves and nothing is aligned, gradients calm: try a higher rate",
        "the host's schedule carried the rate to 3.0e-02",
        "a non-finite gradient was kept from the weights; running statistics put back: enc.bn.running_mean",
        "5 steps in a row were not finite, 3 rollbacks in a row did not help. Look at the data around this step "
        "(silent, mislabelled or very long clips), the precision (fp16: use fp32 or bf16), and the rate",
        "attention_diag 0.02 (weakest side: coverage): guided weight toward 0.50, width toward 0.40",
        "pre_alignment: mel toward 1.00, gate toward 0.50; of the stops 0.10% are false and 99.00% missed",
        "the loss stands 40 noise widths above its best",
        "the rate is not too high",
        "the rate is too high or the batch is too small",
    ],
)
def test_what_does_not(text: str) -> None:
    assert named(reason(text)) == frozenset()


@pytest.mark.parametrize(
    "bad",
    [
        {"grad_norm": 900.0, "losses": {"total": 90.0}},
        {"grad_norm": 1e6},
        {"grad_norm": math.nan, "skipped": True},
        {"losses": {"total": math.nan}},
        {"update_ratio": 0.1},
        {"update_ratio": 1e-5},
        {"clips": 2},
        {"silence": 0.5},
        {"end": 0.7},
        {"end": 0.01},
        {"tail": 0.3},
        {"kept_in": "float16"},
    ],
    ids=str,
)
def test_what_the_brain_says_of_data_and_rate_names_its_cause(bad: dict[str, Any]) -> None:
    diagnosis, names = Diagnosis(), tuple(f"a_long_name_of_a_clip_{n:04}" for n in range(16))
    for step in range(1, 80):
        now = {"losses": {"total": 1.0}, "grad_norm": 1.0, "update_ratio": 2e-3, **(bad if step > 30 else {})}
        clips, silence = now.pop("clips", 16), now.pop("silence", 0.0)
        not_finite = () if math.isfinite(now["losses"]["total"]) else names
        facts = BatchFacts(clips, names, not_finite, silence, now.pop("end", 1.0), now.pop("tail", 0.0))
        kept_in = now.pop("kept_in", None)
        found = diagnosis.look(Observation(step, **now), facts, TrainingPhase.PRE_ALIGNMENT, weights_kept_in=kept_in)
        if found:
            break
    (advice,) = found
    assert named(reason(advice.message)) == {advice.cause}


@pytest.mark.parametrize(
    ("weight", "cause"),
    [(0.0, "guidance off"), (0.03, "guidance too weak"), (20.0, "guidance too strong"), (3.0, None)],
)
def test_what_the_guided_agent_says_of_a_weight_far_off_names_its_cause(weight: float, cause: str | None) -> None:
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor())
    said = agent.propose(context(attention_diag=0.03), {GUIDED_WEIGHT: weight}).reason
    assert named(reason(said)) == ({cause} if cause else frozenset())


@pytest.mark.parametrize(
    ("host", "multiplier", "loss_z", "cause"),
    [
        (1e-4, 10.0, -5.0, "rate too low"),
        (1e-3, 3.0, -5.0, None),
        (2e-2, 1.0, 0.0, "rate too high"),
        (5e-3, 1.0, 0.0, None),
    ],
)
def test_what_the_rate_agent_says_of_the_hosts_rate_names_its_cause(
    host: float, multiplier: float, loss_z: float, cause: str | None
) -> None:
    agent, seen = LearningRateAgent(), context(learning_rate=host, loss_z=loss_z, update_ratio=host)
    said = [agent.propose(seen, {LEARNING_RATE: multiplier}).reason for _ in range(6)][-1]
    assert named(reason(said)) == ({cause} if cause else frozenset())


def test_a_combination_is_told_when_both_causes_are(tmp_path: Path) -> None:
    start = BAD_STARTS["rate-x10+guided-0"]
    assert not start.told(reason("the rate is too high"))
    assert start.told(reason("the rate is too high; the guidance is off"))
    lines = "".join(json.dumps(r) + "\n" for r in reason("the rate is too high"))
    (tmp_path / "journal.jsonl").write_text(lines)
    assert told(tmp_path, "rate too high") and not told(tmp_path, "batch too small")
    with pytest.raises(ValueError, match="known are"):
        told(tmp_path, "bad luck")
