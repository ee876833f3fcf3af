"""Causes that only the user can mend: named when there is little else it could be, and not otherwise."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.feedback.diagnosis import BatchFacts, Diagnosis
from tts_brain.pytorch.audio import alike_tail, believable, edge_silence, end_labelled_at, look_at_some, speaking_rates
from tts_brain.types import AttentionReport, Observation, TrainingPhase

GOOD = BatchFacts(16, ("a", "b"), (), 0.05)
PRE, LATER = TrainingPhase.PRE_ALIGNMENT, TrainingPhase.REFINEMENT


def causes(
    steps: int = 60, *, at: dict[int, Any] | None = None, phase: TrainingPhase = PRE, **usual: Any
) -> list[tuple[int, str]]:
    """(step, cause) of a run of ``steps`` steps; ``at`` changes single steps."""
    diagnosis, found = Diagnosis(), []
    for step in range(1, steps + 1):
        now = {
            "grad_norm": 1.0 + 0.1 * (step % 3),
            "update_ratio": 0.003,
            "facts": GOOD,
            **usual,
            **(at or {}).get(step, {}),
        }
        facts, loss, kept_in = now.pop("facts"), now.pop("loss", 1.0), now.pop("kept_in", None)
        observation = Observation(step, {"total": loss}, **now)
        found += [(step, advice.cause) for advice in diagnosis.look(observation, facts, phase, 0.0, kept_in)]
    return found


def test_a_healthy_run_is_told_nothing() -> None:
    assert causes(600) == []
    assert causes(100, facts=None, grad_norm=None, update_ratio=None) == []


def report(attention_diag: float) -> AttentionReport:
    return AttentionReport(*[attention_diag] * 4, 0.5, 0.0, 0.0, 3.0, 1.0)


def lost(*measured: float, best: float = 0.64) -> list[int]:
    """Steps at which a lost alignment is said; measured at every fifth."""
    diagnosis, said = Diagnosis(), []
    for step in range(1, 5 * len(measured) + 1):
        seen = report(measured[step // 5 - 1]) if step % 5 == 0 else None
        found = diagnosis.look(Observation(step, {"total": 1.0}, attention=seen), None, LATER, best)
        said += [step for advice in found if advice.cause == "alignment lost"]
    return said


def test_an_alignment_that_is_lost_is_said_once() -> None:
    assert lost(0.6, 0.2, 0.05, 0.04, 0.03) == [20]
    assert lost(0.2, 0.4, 0.05, 0.35, 0.3, 0.2) == [], "noise, or soon found again"
    assert lost(*[0.01] * 9, best=0.45) == [], "there was none to lose"


def test_clips_that_are_not_finite_are_named() -> None:
    diagnosis = Diagnosis()
    facts = BatchFacts(16, (), tuple(f"clip{n}" for n in range(6)))
    (advice,) = diagnosis.look(Observation(3, {"total": float("nan")}), facts, PRE)
    assert advice.cause == "non-finite data"
    assert "clip0, clip1, clip2, clip3 and 2 more" in advice.message
    assert diagnosis.look(Observation(4, {"total": float("nan")}), facts, PRE) == []
    assert [a.cause for a in diagnosis.look(Observation(503, {"total": 0.0}), facts, PRE)] == ["non-finite data"]


def test_gradients_that_overflow_again_and_again_are_half_precision() -> None:
    left_out = {"skipped": True, "grad_norm": float("nan")}
    assert causes(at=dict.fromkeys(range(20, 60, 3), left_out)) == [(35, "half precision")]
    assert causes(at=dict.fromkeys(range(20, 60, 5), left_out)) == [], "four in twenty steps may be anything"


def test_weights_in_half_precision_are_told_once_they_have_stayed_there() -> None:
    def at(*kinds: str | None) -> list[tuple[int, str]]:
        return causes(at={n: {"kept_in": kind} for n, kind in enumerate(kinds, start=20)})

    assert at("float16", None, "float16", None, "float16") == [(24, "half precision")]
    assert at("bfloat16", "bfloat16", "bfloat16") == [(22, "half precision")]
    assert at("float16", "float16", "float32") == [], "loaded from half precision, and gone on in float32"


def test_one_batch_that_explodes_is_named_and_growth_is_not() -> None:
    bad = {"grad_norm": 500.0, "loss": 40.0}
    assert causes(at={40: bad}) == [(40, "exploding batch")]
    assert causes(at={5: bad}) == [], "nobody knows yet what is usual"
    growing = {step: {"grad_norm": 1.3**step, "loss": 1.3**step} for step in range(1, 61)}
    assert causes(at=growing) == [], "a run that diverges is no batch"


def test_a_gradient_that_spikes_under_an_ordinary_loss_is_no_batch_until_it_is_beyond_all_others() -> None:
    assert causes(at={40: {"grad_norm": 500.0}}) == []
    assert causes(at={40: {"grad_norm": 1e6}}) == [(40, "exploding batch")]
    assert causes(at={40: {"grad_norm": 500.0, "loss": float("nan")}}) == []


def test_small_batches_silence_and_rates_need_to_last() -> None:
    assert causes(facts=BatchFacts(4)) == [(20, "batch too small")]
    assert causes(at={s: {"facts": BatchFacts(4)} for s in range(30, 35)}) == []
    assert causes(facts=BatchFacts(16, (), (), 0.4)) == [(20, "edge silence")]
    assert causes(update_ratio=0.2) == [(5, "rate too high")]
    assert causes(update_ratio=1e-4) == [(5, "rate too low")]
    assert causes(update_ratio=1e-4, phase=LATER) == [], "a rate may be low once attention has formed"
    assert causes(at={s: {"update_ratio": 0.2} for s in range(1, 60, 2)}) == []


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"end_labelled_at": 1.0}, None),
        ({"end_labelled_at": 0.95}, None),  # a clip of 20 decoder steps with two labels
        ({"end_labelled_at": 0.7}, "too early: they say that a clip ends after 70% of it"),
        ({"end_labelled_at": 0.01}, "inverted"),
        ({"end_labelled_at": 1.0, "alike_tail": 0.2}, "too late: the last 20% of the frames"),
        ({"end_labelled_at": None, "alike_tail": 0.0}, None),
    ],
)
def test_stop_labels_in_the_wrong_place_are_told(facts: dict[str, Any], said: str | None) -> None:
    diagnosis = Diagnosis()
    found = [
        advice
        for step in range(1, 60)
        for advice in diagnosis.look(Observation(step, {"total": 1.0}), BatchFacts(16, **facts), PRE)
    ]
    assert [advice.cause for advice in found] == (["stop token"] if said else [])
    assert said is None or said in found[0].message


def test_two_batches_of_a_step_are_put_together() -> None:
    both = BatchFacts(8, ("a",), (), 0.1, None, 0.3).and_then(BatchFacts(4, ("b",), ("b",), None, 0.9))
    assert both == BatchFacts(12, ("a", "b"), ("b",), 0.1, 0.9, 0.3)


@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True) | st.none(),
            st.floats(allow_nan=True) | st.none(),
            st.integers(1, 64),
            st.floats(0, 1) | st.none(),
        ),
        max_size=40,
    ),
    st.integers(0, 40),
)
def test_any_numbers_and_a_resume_at_any_step(values: list[Any], cut: int) -> None:
    def steps(diagnosis: Diagnosis, some: list[Any], first: int) -> list[Any]:
        return [
            diagnosis.look(
                Observation(
                    first + n, {"total": 1.0}, norm, update_ratio=ratio, attention=None if s is None else report(s)
                ),
                BatchFacts(c, (), (), s),
                PRE,
                0.8,
            )
            for n, (norm, ratio, c, s) in enumerate(some)
        ]

    whole, parts, resumed = Diagnosis(), Diagnosis(), Diagnosis()
    expected = steps(whole, values, 1)
    before = steps(parts, values[:cut], 1)
    resumed.load_state_dict(json.loads(json.dumps(parts.state_dict())))
    assert before + steps(resumed, values[cut:], 1 + cut) == expected
    assert len(whole.state_dict()["norms"]) <= 20


def clip(silent: int, spoken: int, tail: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    generator = np.random.default_rng(silent + spoken + tail)
    level = np.concatenate([np.full(silent, -4.0), generator.uniform(0.0, 2.0, spoken), np.full(tail, -4.0)])
    mel = level[:, None] + 0.1 * generator.normal(size=(len(level), 20))
    return torch.tensor(scale * mel + shift)


@pytest.mark.parametrize(("silent", "tail"), [(0, 0), (20, 0), (0, 30), (25, 25)])
def test_edge_silence_is_the_share_at_both_ends_whatever_the_scale(silent: int, tail: int) -> None:
    for scale, shift in ((1.0, 0.0), (0.3, -7.0), (5.0, 100.0)):
        mel = clip(silent, 60, tail, scale, shift)
        padded = torch.nn.functional.pad(mel, (0, 0, 0, 40), value=shift)[None]
        share = edge_silence(padded, torch.tensor([len(mel)]))
        assert share == pytest.approx((silent + tail) / len(mel), abs=0.02)


def test_a_pause_in_the_middle_is_no_edge_and_a_flat_clip_no_silence() -> None:
    paused = torch.cat([clip(0, 40, 0), torch.full((30, 20), -4.0, dtype=torch.float64), clip(0, 40, 0)])
    assert edge_silence(paused[None], torch.tensor([110])) < 0.02
    assert edge_silence(torch.zeros(1, 50, 20), torch.tensor([50])) == 0.0
    assert edge_silence(torch.zeros(0, 50, 20), torch.zeros(0)) == 0.0


def test_where_the_labels_say_the_end_and_how_much_of_the_tail_is_one_frame() -> None:
    labels, lengths = torch.zeros(3, 50), torch.tensor([50, 40, 20])
    assert end_labelled_at(labels, lengths) is None
    for clip, length in enumerate(lengths.tolist()):
        labels[clip, length - 1 :] = 1.0
    assert end_labelled_at(labels, lengths) == 1.0
    labels[0, 9] = 1.0
    assert end_labelled_at(labels[:1], lengths[:1]) == pytest.approx(0.2)
    assert end_labelled_at(1.0 - torch.eye(50)[-1:], lengths[:1]) == pytest.approx(0.02)

    mel = torch.randn(2, 50, 20, generator=torch.Generator().manual_seed(0))
    assert alike_tail(mel, torch.tensor([50, 40])) == 0.0
    mel[1, 40:] = 0.0
    assert alike_tail(mel, torch.tensor([50, 50])) == pytest.approx(0.5 * 9 / 50)
    assert alike_tail(torch.zeros(1, 50, 20), torch.tensor([50])) == pytest.approx(49 / 50)
    assert alike_tail(mel, torch.tensor([1, 0])) == 0.0


@given(st.integers(1, 9), st.integers(1, 30))
def test_a_few_clips_are_looked_at_whatever_the_batch(clips: int, frames: int) -> None:
    mel, lengths = torch.randn(clips, frames, 5), torch.full((clips,), frames)
    labels = torch.zeros(clips, frames)
    labels[:, -1] = 1.0
    seen = BatchFacts(clips, **look_at_some(mel, lengths, labels, lengths))
    assert seen.end_labelled_at == 1.0 and seen.alike_tail == 0.0 and 0.0 <= seen.edge_silence <= 1.0
    assert look_at_some(mel, lengths, None, None)["end_labelled_at"] is None


@given(st.integers(20, 60), st.integers(0, 80), st.integers(0, 80), st.integers(0, 30), st.integers(0, 10**6))
def test_silence_at_the_ends_does_not_change_how_fast_a_clip_is_spoken(
    spoken: int, before: int, after: int, padding: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    loud, quiet = torch.randn(1, spoken, 8, generator=draw) * 0.2, torch.randn(1, before + after, 8, generator=draw)
    silence = quiet * 0.05 - 6.0
    mel = torch.cat([silence[:, :before], loud, silence[:, before:], torch.full((1, padding, 8), 3.0)], 1)
    (rate,) = speaking_rates(mel, torch.tensor([spoken + before + after]), torch.tensor([12]))
    # A word may begin softly: the edges are a frame or two.
    assert abs(12.0 / rate - spoken) <= max(4.0, 0.15 * spoken)
    scaled = speaking_rates(7.0 - 0.5 * -mel, torch.tensor([spoken + before + after]), torch.tensor([12]))
    assert scaled == pytest.approx((rate,))


def test_a_clip_without_frames_has_no_rate() -> None:
    assert speaking_rates(torch.zeros(1, 5, 8), torch.tensor([0]), torch.tensor([3])) == (math.inf,)


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ((10, 12, 8), (True, True, True)),
        ((10, 13, 8), (True, False, True)),
        ((7, 10, 10), (False, True, True)),
        ((10, 20, 30, 10), (True, False, False, True)),
        ((10, 20, 30), (True, True, True)),
    ],
)
def test_clips_whose_text_can_be_right_and_all_where_most_would_be_wrong(
    tokens: tuple[int, ...], kept: tuple[bool, ...]
) -> None:
    mel = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0)).expand(len(tokens), -1, -1)
    lengths, texts = torch.full((len(tokens),), 100), torch.tensor(tokens)
    (rate, *_) = speaking_rates(mel, lengths, torch.full_like(texts, 10))
    assert believable(mel, lengths, texts, None) is None
    found = believable(mel, lengths, texts, (rate / 1.25, rate * 1.25))
    assert found is not None and tuple(found.tolist()) == kept
