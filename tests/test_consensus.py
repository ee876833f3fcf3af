"""What ranks saw becomes one observation that no minority of them can bend."""

import json
import math
import subprocess
import sys
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.coordination.consensus import digest, median_of_ranks, most_faulty, pack, row_width, unpack
from tts_brain.types import AttentionReport, Observation, StopTokenCounts

LOSSES = ("total", "mel", "gate")
NAN, INF, ABSENT = math.nan, math.inf, -math.inf

finite = st.floats(allow_nan=False, allow_infinity=False)
# What may stand in a packed row: minus infinity is None.
anything = st.floats()
lies = st.sampled_from([NAN, INF, ABSENT, 1e308, -1e308, 0.0]) | anything
above_absent = anything.filter(lambda v: v != ABSENT)


def records(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(kind, *[above_absent] * len(fields(kind)))


observations = st.builds(
    Observation,
    step=st.integers(0, 2**53),
    losses=st.dictionaries(st.sampled_from(LOSSES), anything),
    grad_norm=st.none() | anything,
    learning_rate=st.none() | anything,
    update_ratio=st.none() | anything,
    attention=st.none() | records(AttentionReport),
    stop=st.none() | records(StopTokenCounts),
    text_length=st.none() | anything,
    skipped=st.booleans(),
)


def plain(observation: Observation) -> str:
    """Comparable, NaN included; minus infinity, which means None on the way, as the infinity it travels as."""
    lost = {n: INF if v == ABSENT else v for n, v in sorted(observation.losses.items())}
    return repr([[INF if v == ABSENT else v for v in astuple(observation) if not isinstance(v, dict)], lost])


@given(st.lists(observations, max_size=4))
def test_observations_come_back_as_they_were(seen: list[Observation]) -> None:
    rows = pack(seen, LOSSES)
    assert rows.shape == (len(seen), row_width(LOSSES)) and rows.dtype == np.float64
    back = unpack(rows, LOSSES)
    assert [plain(o) for o in back] == [plain(o) for o in seen]
    assert all(isinstance(o.step, int) and isinstance(o.skipped, bool) for o in back)


@pytest.mark.parametrize("value", [NAN, INF, -INF, 0.0])
def test_a_broken_loss_is_never_taken_for_a_missing_one(value: float) -> None:
    (back,) = unpack(pack([Observation(step=1, losses={"mel": value}, grad_norm=value)], LOSSES), LOSSES)
    assert set(back.losses) == {"mel"} and math.isfinite(back.losses["mel"]) == math.isfinite(value)
    assert back.grad_norm is not None and back.learning_rate is None
    assert back.attention is None and back.stop is None and back.text_length is None


def merged(*ranks: float) -> float:
    """One coordinate through the median; a warning of numpy's, such as an overflow, is an error here."""
    rows = np.zeros((len(ranks), 1, row_width(LOSSES)))
    rows[:, 0, -1] = ranks
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        return float(median_of_ranks(rows)[0, -1])


@pytest.mark.filterwarnings("error")
@given(st.data(), st.integers(0, 3), st.integers(0, 3))
def test_f_liars_of_3f_plus_1_never_leave_the_range_of_the_honest(data: st.DataObject, liars: int, more: int) -> None:
    honest = data.draw(st.lists(finite, min_size=2 * liars + 1, max_size=2 * liars + 1 + more))
    told = data.draw(st.lists(lies, min_size=liars, max_size=liars))
    ranks = data.draw(st.permutations(honest + told))
    assert min(honest) <= merged(*ranks) <= max(honest)


@given(st.data(), st.integers(0, 3), st.integers(0, 3))
def test_liars_cannot_make_up_what_no_honest_rank_has(data: st.DataObject, liars: int, more: int) -> None:
    """Also where honest ranks have no number: a few that have one do not speak for all."""
    honest = data.draw(st.lists(lies, min_size=2 * liars + 1, max_size=2 * liars + 1 + more))
    told = data.draw(st.lists(lies, min_size=liars, max_size=liars))
    outcome = merged(*data.draw(st.permutations(honest + told)))
    numbers = [v for v in honest if math.isfinite(v)]
    if math.isfinite(outcome):
        assert min(numbers) <= outcome <= max(numbers)
    else:
        assert len(numbers) < len(honest) and (outcome != ABSENT or ABSENT in honest)


@given(st.data(), st.integers(0, 3))
def test_while_all_are_finite_any_majority_of_honest_ranks_is_enough(data: st.DataObject, liars: int) -> None:
    honest = data.draw(st.lists(finite, min_size=liars + 1, max_size=liars + 3))
    told = data.draw(st.lists(finite, min_size=liars, max_size=liars))
    assert min(honest) <= merged(*data.draw(st.permutations(honest + told))) <= max(honest)


@pytest.mark.parametrize(("ranks", "most"), [(1, 0), (2, 0), (3, 0), (4, 1), (6, 1), (7, 2), (8, 2), (1024, 341)])
def test_the_bound_is_enforced(ranks: int, most: int) -> None:
    assert most_faulty(ranks) == most
    rows = np.zeros((ranks, 1, row_width(LOSSES)))
    median_of_ranks(rows, most)
    for wrong in (most + 1, -1):
        with pytest.raises(ValueError, match=f"faulty={wrong} of {ranks} ranks; write 0 to {most}"):
            median_of_ranks(rows, wrong)


def test_one_of_four_cannot_say_that_a_step_was_skipped() -> None:
    rows = np.stack([pack([Observation(1, {"total": 1.0}, skipped=s)], LOSSES) for s in (True, False, False, False)])
    assert [o.skipped for o in unpack(median_of_ranks(rows), LOSSES)] == [False]
    assert [o.skipped for o in unpack(median_of_ranks(rows[[0, 0, 1, 2]]), LOSSES)] == [True]


@given(st.lists(observations.filter(lambda o: o.step), min_size=2, max_size=5), st.randoms())
def test_a_stale_rank_is_outvoted_and_the_order_of_ranks_says_nothing(seen: list[Observation], rng: Any) -> None:
    rows = np.stack([pack([o], LOSSES) for o in seen])
    shuffled = rows.copy()[rng.sample(range(len(seen)), len(seen))]
    np.testing.assert_array_equal(median_of_ranks(rows), median_of_ranks(shuffled))
    now, stale = pack([Observation(7, {"total": 2.0})], LOSSES), pack([Observation(3, {"total": 9.0})], LOSSES)
    (outcome,) = unpack(median_of_ranks(np.stack([stale, now, now])), LOSSES)
    assert outcome == Observation(7, {"total": 2.0})


@given(observations)
def test_one_rank_is_believed_as_it_is(seen: Observation) -> None:
    rows = pack([seen], LOSSES)
    expected = np.where(rows == INF, NAN, rows)  # nothing finite
    np.testing.assert_array_equal(median_of_ranks(rows[None]), expected)


@given(observations, st.integers(1, 5))
def test_ranks_that_saw_the_same_agree_on_exactly_that(seen: Observation, ranks: int) -> None:
    rows = pack([seen], LOSSES)
    np.testing.assert_array_equal(median_of_ranks(np.stack([rows] * ranks)), median_of_ranks(rows[None]))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((2.0, 4.0), 3.0),
        ((1.7e308, 1.7e308), 1.7e308),
        ((1.6e308, 1.7e308), 1.65e308),
        ((NAN, 4.0), 4.0),
        ((INF, 4.0), 4.0),
        ((ABSENT, 4.0), 4.0),
        ((NAN, 1.0, 5.0), 3.0),
        ((NAN, NAN, 5.0), 5.0),
        ((1.0, 5.0, 1e308), 5.0),
        ((1.0, 2.0, 8.0, 1e9), 5.0),
        ((NAN, NAN), NAN),
        ((NAN, INF), NAN),
        ((NAN, ABSENT), NAN),
        ((ABSENT, INF, ABSENT), NAN),
        ((ABSENT, ABSENT), ABSENT),
    ],
)
def test_the_median_by_hand(ranks: tuple[float, ...], expected: float) -> None:
    assert merged(*ranks) == pytest.approx(expected, rel=1e-15, nan_ok=True)


def test_a_step_is_skipped_as_soon_as_one_rank_says_so_and_steps_do_not_mix() -> None:
    says = np.stack(
        [pack([Observation(s, {"total": 1.0}, skipped=s in at) for s in (1, 2, 3)], LOSSES) for at in SKIPS]
    )
    back = unpack(median_of_ranks(says), LOSSES)
    assert [(o.step, o.skipped) for o in back] == [(1, False), (2, True), (3, True)]


SKIPS = ((2,), (), (3,))


def test_attention_that_some_ranks_measured_is_theirs() -> None:
    fine = AttentionReport(*np.linspace(0.1, 0.9, 9).tolist())
    with_it, without = Observation(1, {"total": 1.0}, attention=fine), Observation(1, {"total": 1.0})
    rows = np.stack([pack([o], LOSSES) for o in (without, with_it, without)])
    (back,) = unpack(median_of_ranks(rows), LOSSES)
    assert back.attention == fine and back.stop is None


leaves = st.none() | st.booleans() | st.integers() | anything | st.text()
states = st.dictionaries(
    st.text(), st.recursive(leaves, lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=6)
)


@given(states, states)
def test_two_states_have_one_digest_only_when_they_are_the_same(one: dict, other: dict) -> None:
    assert (digest(one) == digest(other)) == (json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True))
    assert digest(dict(reversed(list(one.items())))) == digest(one)  # how the mapping came about says nothing


@given(states)
def test_a_digest_is_a_whole_number_that_float64_holds(state: dict) -> None:
    value = digest(state)
    assert value == int(value) and 0 <= value < 2**48 and float(np.float64(value)) == value


@given(finite)
def test_the_last_bit_of_a_value_counts(value: float) -> None:
    assert digest({"a": [value]}) != digest({"a": [math.nextafter(value, INF)]})


STATE = {"knobs": {"learning_rate": 1.5, "mel_weight": 0.1 + 0.2}, "series": [[1, NAN], [2, INF]], "none": None}


def test_another_process_finds_the_same_digest() -> None:
    code = "import sys, json; from tts_brain.coordination.consensus import digest; print(digest(json.load(sys.stdin)))"
    found = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(STATE),
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        found.add(float(done.stdout))
    assert found == {digest(STATE)}
