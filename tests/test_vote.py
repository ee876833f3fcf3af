import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tts_brain.coordination.trimmed import trimmed_mean
from tts_brain.coordination.vote import Ballot, Electorate, Outcome
from tts_brain.types import KNOBS, LEARNING_RATE, MEL_WEIGHT

FOUR = ("rate", "attention", "balance", "assessor")
WHOLE = math.log(KNOBS[LEARNING_RATE].max_ratio)
small = st.floats(-0.5 * WHOLE, 0.5 * WHOLE)
numbers = st.one_of(st.floats(), st.floats(-20.0, 20.0), small, st.just(10**400))
knobs = st.sampled_from([LEARNING_RATE, MEL_WEIGHT, "no_such_knob"])
lies = st.tuples(
    st.one_of(st.integers(55, 65), st.just(60), st.just(math.nan)),
    st.sampled_from([True, False, None, "yes", 7]),
    st.one_of(st.dictionaries(knobs, numbers), st.none()),
)


def ballot(voter: str, value: float = 0.1, *, approve: bool | None = True, step: int = 60) -> Ballot:
    return Ballot(voter, step, approve, {LEARNING_RATE: value})


def one_voice(electorate: Electorate, step: int = 60, **other: Ballot) -> Outcome:
    """All say 0.1 and yes but those in ``other``."""
    return electorate.count(step, [other.get(v, ballot(v, step=step)) for v in electorate.voters])


@st.composite
def elections(draw: Any, fewest: Callable[[int], int]) -> tuple[Electorate, list[str], list[str]]:
    """An electorate with liars up to the bound: itself, the honest and the liars."""
    faulty = draw(st.integers(0, 3))
    count = draw(st.integers(fewest(faulty), fewest(faulty) + 3))
    voters = [f"v{k}" for k in range(count)]
    liars = draw(st.lists(st.sampled_from(voters), max_size=faulty, unique=True)) if faulty else []
    electorate = Electorate(voters, draw(st.sampled_from([0.51, 0.67])), faulty)
    return electorate, [v for v in voters if v not in liars], liars


def lie(data: st.DataObject, voter: str) -> list[Ballot]:
    """None, one or two ballots of any content."""
    return [Ballot(voter, *draw) for draw in data.draw(st.lists(lies, max_size=2))]  # type: ignore[arg-type]


# -- what liars cannot do ----------------------------------------------------------------------------------------------


@given(elections(lambda f: 2 * f + 1), st.data())
def test_values_stay_within_the_range_of_the_honest(case: tuple, data: st.DataObject) -> None:
    electorate, honest, liars = case
    for _ in range(data.draw(st.integers(1, 12))):  # they differ so much that honest ones may be muted
        said = {v: data.draw(st.floats(-3.0, 3.0)) for v in honest}
        all_heard = not set(honest) & set(electorate.state_dict()["muted"])
        ballots = [ballot(v, value) for v, value in said.items()]
        ballots += [one for v in liars for one in lie(data, v)]
        outcome = electorate.count(60, data.draw(st.permutations(ballots)))
        if LEARNING_RATE in outcome.moves or (all_heard and len(electorate.voters) > 3 * electorate.faulty):
            assert min(said.values()) <= outcome.moves[LEARNING_RATE] <= max(said.values())
        assert MEL_WEIGHT not in outcome.moves  # no honest voter has a say on it


@given(elections(lambda f: 2 * f + 1), st.data())
def test_nothing_is_pushed_through_that_no_majority_of_the_honest_wants(case: tuple, data: st.DataObject) -> None:
    electorate, honest, liars = case
    votes = {v: data.draw(st.sampled_from([True, False, None])) for v in honest}
    ballots = [ballot(v, approve=vote) for v, vote in votes.items()]
    ballots += [one for v in liars for one in lie(data, v)]
    cast = [vote for vote in votes.values() if vote is not None]
    if electorate.count(60, ballots).approved:
        assert 2 * sum(cast) > len(cast)


@given(elections(lambda f: 3 * f + 1), st.data())
def test_nothing_is_blocked_that_all_the_honest_want(case: tuple, data: st.DataObject) -> None:
    electorate, honest, liars = case
    for _ in range(data.draw(st.integers(1, 12))):
        ballots = [ballot(v, data.draw(small)) for v in honest] + [one for v in liars for one in lie(data, v)]
        assert electorate.count(60, ballots).approved


@given(elections(lambda f: 2 * f + 1), st.data())
def test_no_honest_voter_is_ever_muted(case: tuple, data: st.DataObject) -> None:
    electorate, honest, liars = case
    for _ in range(data.draw(st.integers(1, 15))):
        ballots = [ballot(v, data.draw(small)) for v in honest] + [one for v in liars for one in lie(data, v)]
        outcome = electorate.count(60, ballots)
        assert not set(outcome.muted) & set(honest)
        assert not any(note.startswith(tuple(f"{v}:" for v in honest)) for note in outcome.notes)


@given(st.lists(lies, min_size=4, max_size=4), st.permutations(range(4)))
def test_the_order_of_the_ballots_does_not_matter(said: list, order: list[int]) -> None:
    ballots = [Ballot(v, *one) for v, one in zip(FOUR, said, strict=True)]
    assert Electorate(FOUR).count(60, ballots) == Electorate(FOUR).count(60, [ballots[k] for k in order])


@pytest.mark.parametrize(
    "liar",
    [
        ballot("assessor", math.nan),
        ballot("assessor", math.inf),
        ballot("assessor", 1e300),
        ballot("assessor", -19.0),
        ballot("assessor", 5.0, step=40),
        Ballot("assessor", 60, True, {"no_such_knob": 0.1}),
        Ballot("assessor", 60, "yes", {LEARNING_RATE: 5.0}),  # type: ignore[arg-type]
        Ballot("assessor", 60, True, None),  # type: ignore[arg-type]
        Ballot(["assessor"], 60, True, {LEARNING_RATE: 5.0}),  # type: ignore[arg-type]
    ],
)
def test_four_voters_survive_any_one_and_say_what_it_did(liar: Ballot) -> None:
    outcome = one_voice(Electorate(FOUR), assessor=liar)
    assert outcome.approved and outcome.moves == {LEARNING_RATE: pytest.approx(0.1)}
    assert len(outcome.notes) == 1 and "assessor" in outcome.notes[0]


def test_three_can_be_blocked_by_one_and_not_bent() -> None:
    three = Electorate(FOUR[:3])
    assert (three.faulty, three.blocked_by) == (1, 1)
    outcome = one_voice(three, balance=ballot("balance", 20.0, approve=False))
    assert not outcome.approved and outcome.moves[LEARNING_RATE] == pytest.approx(0.1)
    for _ in range(20):  # and nobody is muted
        assert one_voice(three, balance=ballot("balance", math.nan)).muted == ()


@pytest.mark.parametrize("threshold", [0.51, 0.67])
def test_two_honest_and_one_liar_pass_only_what_both_want(threshold: float) -> None:
    no = ballot("attention", approve=False)
    assert not one_voice(Electorate(FOUR[:3], threshold), attention=no).approved


def test_four_are_blocked_by_two() -> None:
    four = Electorate(FOUR)
    assert four.blocked_by == 2
    assert one_voice(four, rate=ballot("rate", approve=False)).approved
    no = {v: ballot(v, approve=False) for v in FOUR[:2]}
    outcome = one_voice(four, **no)
    assert (outcome.yes, outcome.no, outcome.needed, outcome.approved) == (2, 2, 3, False)


@pytest.mark.parametrize("n, threshold, needed", [(3, 0.67, 3), (4, 0.67, 3), (7, 0.67, 5), (100, 0.67, 67), (4, 1, 4)])
def test_the_quorum(n: int, threshold: float, needed: int) -> None:
    voters = [str(k) for k in range(n)]
    assert one_voice(Electorate(voters, threshold, 0 if n == 100 else None)).needed == needed


def test_who_abstains_does_not_count_but_too_few_decide_nothing() -> None:
    silent = {v: ballot(v, approve=None) for v in FOUR}
    outcome = one_voice(Electorate(FOUR), rate=silent["rate"])
    assert outcome.approved and (outcome.yes, outcome.no, outcome.needed) == (3, 0, 3)
    outcome = one_voice(Electorate(FOUR), **{v: silent[v] for v in FOUR[:2]})
    assert not outcome.approved and "too few" in outcome.notes[0]
    assert not Electorate(FOUR).count(60, []).approved


def test_a_knob_that_too_few_know_of_is_not_moved() -> None:
    ballots = [ballot(v) for v in FOUR[:2]] + [Ballot(v, 60, True, {}) for v in FOUR[2:]]
    assert Electorate(FOUR).count(60, ballots).moves == {}
    assert Electorate(FOUR, faulty=0).count(60, ballots).moves == {LEARNING_RATE: 0.1}


def test_a_stranger_and_a_second_vote_are_refused() -> None:
    again = [ballot("rate", 3.0), ballot("rate"), ballot("nobody")]
    outcome = Electorate(FOUR).count(60, [*again, *(ballot(v) for v in FOUR[1:])])
    assert outcome.approved and outcome.yes == 3 and outcome.moves[LEARNING_RATE] == pytest.approx(0.1)
    assert [note.split()[0] for note in outcome.notes] == ["rate:", "'nobody'"]


# -- liars in league ---------------------------------------------------------------------------------------------------


def as_one(value: float, **more: Any) -> Any:
    return lambda liars, count, said: [ballot(v, value, **more) for v in liars]


def at_the_edge(liars: list[str], count: int, said: list[float]) -> list[Ballot]:
    """They know what the honest say, and stay just within one whole move of it."""
    return [ballot(v, max(said) + 0.99 * WHOLE) for v in liars]


def flip_flop(liars: list[str], count: int, said: list[float]) -> list[Ballot]:
    return [ballot(v, 20.0 * (-1) ** count, approve=count % 2 == 0) for v in liars]


def nothing_or_all(liars: list[str], count: int, said: list[float]) -> list[Ballot]:
    return [ballot(v, math.nan if k % 2 else -20.0, approve=False) for k, v in enumerate(liars)]


@pytest.mark.parametrize("faulty", [1, 2, 3])
@pytest.mark.parametrize(
    ("together", "are_muted"),
    [
        (as_one(20.0), True),
        (as_one(-20.0, approve=False), True),
        (at_the_edge, False),
        (flip_flop, True),
        (as_one(20.0, step=59), True),
        (nothing_or_all, True),
        (as_one(0.0, approve=False), False),
        (lambda *_: [], False),
    ],
    ids=["high", "low", "edge", "flip-flop", "stale", "nan-or-low", "no", "away"],
)
def test_liars_in_league_bend_block_and_mute_nothing(faulty: int, together: Any, are_muted: bool) -> None:
    generator = random.Random(faulty)
    for _ in range(5):
        voters = [f"v{k}" for k in range(3 * faulty + 1)]
        liars = generator.sample(voters, faulty)
        electorate = Electorate(voters)
        for count in range(20):
            said = {v: generator.uniform(-0.5, 0.5) * WHOLE for v in voters if v not in liars}
            ballots = [ballot(v, value) for v, value in said.items()] + together(liars, count, list(said.values()))
            outcome = electorate.count(60, ballots)
            assert outcome.approved
            assert min(said.values()) <= outcome.moves[LEARNING_RATE] <= max(said.values())
            assert set(outcome.muted) <= set(liars)
        assert set(outcome.muted) == (set(liars) if are_muted else set())


# -- muting ------------------------------------------------------------------------------------------------------------


def test_three_times_out_of_range_is_muted_and_comes_back() -> None:
    four, far = Electorate(FOUR), ballot("assessor", -5.0)
    outcomes = [one_voice(four, assessor=far) for _ in range(3)]
    assert [o.muted for o in outcomes] == [(), (), ("assessor",)]
    assert "assessor was out of range again and again: muted" in outcomes[-1].notes[-1]
    assert (one_voice(four, assessor=ballot("assessor", approve=False)).no) == 0  # not listened to
    back = [one_voice(four) for _ in range(5)]
    assert [bool(o.muted) for o in back] == [True] * 4 + [False]
    assert "heard again" in back[-1].notes[-1]
    assert one_voice(four).yes == 4


def test_a_flip_flop_is_muted_and_an_odd_slip_is_not() -> None:
    flip_flop, slips = Electorate(FOUR), Electorate(FOUR)
    for k in range(30):
        last = one_voice(flip_flop, assessor=ballot("assessor", 5.0 * (-1) ** k if k % 2 else 0.1))
        assert one_voice(slips, assessor=ballot("assessor", 5.0 if k % 3 == 0 else 0.1)).muted == ()
    assert last.muted == ("assessor",)


def test_to_be_muted_long_ago_is_no_sentence_for_life() -> None:
    four = Electorate(FOUR)
    for _ in range(1000):
        one_voice(four, assessor=ballot("assessor", math.nan))
    assert [bool(one_voice(four).muted) for _ in range(12)][-1] is False


def test_no_more_than_f_are_muted_and_the_worst_first() -> None:
    seven = Electorate([str(k) for k in range(7)], faulty=1)
    one_voice(seven, **{"6": ballot("6", math.nan)})
    for _ in range(5):
        outcome = one_voice(seven, **{k: ballot(k, math.nan) for k in "156"})
    assert outcome.muted == ("6",)
    seven = Electorate(seven.voters, faulty=1)
    for out in ("0", "0", "0", "6", "6", "6", "56", "56", "56"):
        outcome = one_voice(seven, **{k: ballot(k, math.nan) for k in out})
    assert outcome.muted == ("6",)  # 0 came back, and 6 had been waiting for longer than 5


# -- limits and state --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, faulty, between, ok",
    [
        (1, 0, False, True),
        (2, 1, False, False),
        (3, 1, False, True),
        (3, 1, True, False),
        (3, -1, False, False),
        (4, 1, True, True),
        (4, 2, False, False),
        (5, 2, False, True),
        (6, 2, True, False),
    ],
)
def test_the_bounds_are_enforced(n: int, faulty: int, between: bool, ok: bool) -> None:
    voters = [str(k) for k in range(n)]
    if ok:
        assert Electorate(voters, faulty=faulty, between_processes=between).faulty == faulty
    else:
        with pytest.raises(ValueError, match="faulty"):
            Electorate(voters, faulty=faulty, between_processes=between)


@pytest.mark.parametrize("n, faulty", [(1, 0), (2, 0), (3, 1), (4, 1), (6, 1), (7, 2), (10, 3)])
def test_how_many_are_survived_by_default(n: int, faulty: int) -> None:
    assert Electorate([str(k) for k in range(n)]).faulty == faulty


@pytest.mark.parametrize("settings", [{"threshold": 0.5}, {"threshold": 1.1}, {"threshold": math.nan}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="threshold"):
        Electorate(FOUR, **settings)
    with pytest.raises(ValueError, match="once"):
        Electorate(("a", "a", "b"))


@given(st.lists(st.lists(lies, min_size=4, max_size=4), max_size=10), st.lists(lies, min_size=4, max_size=4))
def test_a_resume_changes_no_count(past: list, now: list) -> None:
    one, other = Electorate(FOUR), Electorate(FOUR)
    for said in past:
        one.count(60, [Ballot(v, *s) for v, s in zip(FOUR, said, strict=True)])
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    ballots = [Ballot(v, *s) for v, s in zip(FOUR, now, strict=True)]
    assert one.count(60, ballots) == other.count(60, ballots)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"strikes": {}},
        {"strikes": {"rate": -1}, "muted": []},
        {"strikes": {"rate": 99}, "muted": []},
        {"strikes": {"rate": True}, "muted": []},
        {"strikes": {"rate": 1.5}, "muted": []},
        {"strikes": {"rate": 6}, "muted": ["nobody"]},
        {"strikes": {"rate": 6, "balance": 6}, "muted": ["rate", "balance"]},
        {"strikes": 3, "muted": []},
        {"strikes": {}, "muted": 3},
    ],
)
def test_a_damaged_state_changes_nothing(state: dict[str, Any]) -> None:
    four = Electorate(FOUR)
    one_voice(four, rate=ballot("rate", math.nan))
    before = four.state_dict()
    with pytest.raises(ValueError, match="state of the vote"):
        four.load_state_dict(state)
    assert four.state_dict() == before


def test_an_assessor_can_be_switched_off_at_a_resume() -> None:
    five, four = Electorate((*FOUR, "graph")), Electorate(FOUR)
    for _ in range(3):
        one_voice(five, graph=ballot("graph", math.nan))
    four.load_state_dict(five.state_dict())
    assert four.state_dict() == {"strikes": dict.fromkeys(FOUR, 0), "muted": []}


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=9), st.integers(0, 4))
def test_the_trimmed_mean_is_within_what_was_kept(values: list[float], trim: int) -> None:
    if len(values) < 2 * trim + 1:
        with pytest.raises(ValueError, match="values"):
            trimmed_mean(values, trim)
        return
    mean, low, high = trimmed_mean(values, trim)
    assert low <= mean <= high
    assert sum(v < low for v in values) <= trim >= sum(v > high for v in values)
