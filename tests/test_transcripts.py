"""Exchanged transcripts are seen by how much text there is for the speech; a speaker's own ways are not."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.corpus import load_ljspeech
from tts_brain.feedback.diagnosis import BatchFacts, Diagnosis
from tts_brain.feedback.transcripts import SpeakingRates
from tts_brain.types import Observation, TrainingPhase

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def seen(rates: list[float], names: list[str] | None = None) -> SpeakingRates:
    names = names or [f"clip{n}" for n in range(len(rates))]
    found = SpeakingRates()
    for first in range(0, len(rates), 16):
        found.add(names[first : first + 16], rates[first : first + 16])
    return found


def drawn(clips: int, exchanged: float, seed: int = 0) -> tuple[list[float], set[str]]:
    """Tokens per frame of made-up clips of 1 to 10 s, of which a share has another one's text; names of those."""
    draw = np.random.default_rng(seed)
    frames = draw.uniform(80, 800, clips)
    tokens = frames * 0.16 * np.exp(0.12 * draw.normal(size=clips))
    wrong = draw.choice(clips, round(exchanged * clips), replace=False)
    tokens[wrong] = tokens[np.roll(wrong, 1)]
    return (tokens / frames).tolist(), {f"clip{n}" for n in wrong}


@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_exchanged_is_suspicious_and_none_is_not(seed: int) -> None:
    rates, wrong = drawn(1024, 0.1, seed)
    found = seen(rates)
    assert found.suspicious and found.share < 0.1
    assert len(set(found.farthest) & wrong) >= 0.9 * len(found.farthest) > 0
    assert not seen(drawn(1024, 0.0, seed)[0]).suspicious


def test_a_few_odd_clips_or_a_small_start_are_not_enough() -> None:
    rates, _ = drawn(1024, 0.0)
    assert not seen([*rates[:-4], *[9.0] * 4]).suspicious
    assert seen([9.0] * 255).share == 0.0, "nobody knows yet what is usual"


@pytest.mark.parametrize("seed", range(5))
def test_where_texts_are_mixed_up_few_right_ones_are_not_believed_and_many_wrong_ones(seed: int) -> None:
    assert seen(drawn(1024, 0.0, seed)[0]).believable is None, "nothing is amiss"
    rates, wrong = drawn(1024, 0.3, seed)
    least, most = seen(rates).believable or (0.0, 0.0)
    doubted = {f"clip{n}" for n, rate in enumerate(rates) if not least <= rate <= most}
    right = {f"clip{n}" for n in range(1024)} - wrong
    assert len(doubted & right) < 0.1 * len(right) and len(doubted & wrong) > 0.5 * len(wrong)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=600), st.integers(0, 600))
def test_any_numbers_and_a_resume_at_any_clip(rates: list[float], cut: int) -> None:
    whole, parts, resumed = seen(rates), seen(rates[:cut]), SpeakingRates()
    resumed.load_state_dict(json.loads(json.dumps(parts.state_dict())))
    resumed.add([f"clip{n}" for n in range(cut, len(rates))], rates[cut:])
    assert resumed.state_dict() == whole.state_dict()
    assert 0.0 <= whole.share <= 1.0 and len(whole.farthest) <= 32 and len(whole.state_dict()["page"]) < 256


def advice(rates: list[float]) -> list[Any]:
    diagnosis = Diagnosis()
    return [
        found
        for step, first in enumerate(range(0, len(rates), 16), start=1)
        for found in diagnosis.look(
            Observation(step, {"total": 1.0}),
            BatchFacts(
                16, tuple(f"clip{n}" for n in range(first, first + 16)), text_rates=tuple(rates[first : first + 16])
            ),
            TrainingPhase.PRE_ALIGNMENT,
        )
    ]


def test_the_clips_are_named_once() -> None:
    rates, wrong = drawn(2048, 0.2)
    (found,) = advice(rates)
    assert found.cause == "wrong transcripts" and "clip" in found.message
    named = found.message.split("Listen to ")[1].split(" and ")[0].split(", ")
    assert len(set(named) & wrong) >= 7
    assert advice(drawn(2048, 0.0)[0]) == []


@pytest.mark.parametrize("name", ["kathleen-en-us", "ljspeech-subset"])
def test_real_speech_is_not_suspicious_and_with_a_tenth_exchanged_it_is(name: str) -> None:
    soundfile = pytest.importorskip("soundfile")
    if not (SHARED / name).is_dir():
        pytest.skip(f"{name} is not beside the repository")
    items = load_ljspeech(SHARED / name)
    frames = np.array([soundfile.info(item["audio_file"]).duration * 80.0 for item in items])
    tokens = np.array([float(len(item["text"])) for item in items])
    wrong = np.random.default_rng(9).choice(len(items), len(items) // 10, replace=False)
    exchanged = tokens.copy()
    exchanged[wrong] = tokens[np.roll(wrong, 1)]
    names = [item["audio_file"] for item in items]
    passes = np.concatenate([np.random.default_rng(n).permutation(len(items)) for n in range(4)])  # of a training
    assert not seen((tokens / frames)[passes].tolist(), [names[n] for n in passes]).suspicious
    assert seen((exchanged / frames)[passes].tolist(), [names[n] for n in passes]).suspicious
