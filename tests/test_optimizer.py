"""The agents' game, and the way from their wishes to one joint move."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import context
from test_criteria import SWINGING, filtered
from test_equilibrium import gain_of_leaving

from tts_brain import MultiAgentOptimizer
from tts_brain.coordination.assessors import ASSESSORS, Opinion
from tts_brain.coordination.criteria import criteria
from tts_brain.coordination.dynamics import Course, Dynamics, Outlook
from tts_brain.coordination.equilibrium import equilibrium
from tts_brain.coordination.game import SHARES, calming, game, movement, stirring
from tts_brain.coordination.optimizer import AGENTS, Coordination, averaged
from tts_brain.coordination.risk import RiskAssessor, Weighed
from tts_brain.types import (
    FORWARD_SUM_WEIGHT,
    GRAD_CLIP,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    MEL_WEIGHT,
    Forecast,
    Proposal,
    TrainingContext,
    Trend,
)

OWNS = {
    "learning_rate": (LEARNING_RATE, GRAD_CLIP),
    "guided_attention": (GUIDED_WEIGHT, FORWARD_SUM_WEIGHT),
    "loss_balance": (MEL_WEIGHT,),
}
BOLD = {
    "learning_rate": {LEARNING_RATE: math.log(1.5)},
    "guided_attention": {GUIDED_WEIGHT: math.log(1.3), FORWARD_SUM_WEIGHT: -0.1},
    "loss_balance": {MEL_WEIGHT: 0.1},
}
CURE = {**BOLD, "learning_rate": {LEARNING_RATE: math.log(0.7), GRAD_CLIP: math.log(1 / 3)}}
JOINT = {knob: move for moves in BOLD.values() for knob, move in moves.items()}


def wishes_of(data: st.DataObject) -> dict[str, dict[str, float]]:
    return {
        agent: {
            knob: data.draw(st.sampled_from([0.0, 1.0]) | st.floats(-1, 1)) * math.log(KNOBS[knob].max_ratio)
            for knob in knobs
        }
        for agent, knobs in OWNS.items()
    }


def settle(
    seen: TrainingContext,
    wishes: Mapping[str, Mapping[str, float]] = BOLD,
    optimizer: MultiAgentOptimizer | None = None,
    course: Dynamics | None = None,
    proposals: tuple[Proposal, ...] = (),
    risk: RiskAssessor | None = None,
) -> Coordination:
    risk, knobs = risk or RiskAssessor(), dict.fromkeys(KNOBS, 1.0)
    return (optimizer or MultiAgentOptimizer()).coordinate(
        seen, proposals, knobs, wishes, lambda moves: risk.weigh(seen, moves, course)
    )


def shares(done: Coordination) -> dict[str, float]:
    return dict(done.record["equilibrium"]["shares"])


# the fixed call


def test_the_fixed_call_works_and_keeps_what_it_is_given() -> None:
    optimizer = MultiAgentOptimizer(n_agents=3, consensus_threshold=0.67, learning_rate=1e-4, experience_buffer=1000000)
    assert optimizer.learning_rate == 1e-4 and optimizer.experience_buffer == 1000000
    assert optimizer.agents == AGENTS and len(optimizer.electorate.voters) >= 4
    assert optimizer.electorate.blocked_by >= 2  # one arbitrary voter is survived


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"n_agents": 4}, "n_agents=4"),
        ({"consensus_threshold": 0.5}, "threshold=0.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"experience_buffer": 0}, "experience_buffer=0"),
        ({"experience_buffer": 1.5}, "experience_buffer=1.5"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MultiAgentOptimizer(**wrong)


# the game


def test_a_calm_run_is_steered_exactly_as_its_agents_wish() -> None:
    for z in (-5.0, 0.0, 2.0):
        done = settle(context(loss_z=z))
        assert done.moves == JOINT and done.cuts == ()
        assert done.record["equilibrium"]["kind"] == "pure"


@pytest.mark.parametrize(
    "trouble",
    [
        {"grad_spikes": 0.12},
        {"certainty": 0.0},
        {"scales": {"mel": SWINGING}, "certainty": 0.5},
        {"update_ratio": 0.05},
    ],
)
def test_what_gradients_bear_less_of_is_made_less_of(trouble: dict) -> None:
    done = settle(context(loss_z=-5.0, **trouble))
    assert movement(stirring(done.moves)) < movement(stirring(JOINT))
    assert "settle on part" in done.cuts[0]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.data())
def test_more_spikes_never_make_the_joint_move_stir_more(a: float, b: float, data: st.DataObject) -> None:
    wishes = wishes_of(data)
    stirs = []
    for spikes in (min(a, b), max(a, b)):
        seen = context(grad_spikes=spikes)
        one = game(seen, criteria(seen), wishes)
        play = equilibrium(one.payoffs, one.sizes).play
        parts = zip(one.shares, play, wishes.values(), strict=True)
        stirs.append(sum(each[at] * movement(stirring(moves)) for each, at, moves in parts))
    # One candidate's grain: which of two agents gives way first is a matter of rounding.
    grain = max(movement(stirring(moves)) for moves in wishes.values()) * SHARES[1]
    assert stirs[1] <= stirs[0] + grain + 1e-9


def test_two_raises_at_once_cost_more_than_the_sum_of_each() -> None:
    seen = context(grad_spikes=0.1)
    one = game(seen, criteria(seen), BOLD)
    strain = one.terms["strain"].sum(axis=0)
    alone = strain[-1, 0, 0] + strain[0, -1, 0]
    assert strain[-1, -1, 0] < alone < 0.0


def test_spikes_do_not_hold_back_the_guide_where_the_attention_needs_it() -> None:
    strains = []
    for diag in (0.03, 0.95):
        seen = context(grad_spikes=0.3, attention_diag=diag)
        strains.append(game(seen, criteria(seen), BOLD).terms["strain"])
    (early_rate, early_guide, _), (late_rate, late_guide, _) = strains
    assert early_rate[-1, 0, 0] == late_rate[-1, 0, 0] < -1.0, "the rate pays in full"
    assert late_guide[0, -1, 0] == pytest.approx(0.95 / 0.03 * early_guide[0, -1, 0])
    together = (early_guide - late_guide)[-1, -1, 0]
    assert together == pytest.approx((early_guide - late_guide)[0, -1, 0]), "beside a raised rate as much, too"


def test_what_one_raises_leaves_less_to_the_others() -> None:
    """The rate alone may be raised whole where, raised with the guided weight, it is not."""
    seen = context(grad_spikes=0.1)
    alone = settle(seen, {"learning_rate": BOLD["learning_rate"], "guided_attention": {}, "loss_balance": {}})
    assert shares(alone)["learning_rate"] > shares(settle(seen))["learning_rate"]


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.floats(-6, 6), st.data())
def test_the_joint_move_is_an_equilibrium(spikes: float, certainty: float, z: float, data: st.DataObject) -> None:
    """From the definition: no agent would gain by another of its own moves."""
    effects = {"loss": {LEARNING_RATE: (data.draw(st.floats(-1, 1)), 0.05), GUIDED_WEIGHT: (0.02, 0.01)}}
    seen = context(grad_spikes=spikes, certainty=certainty, effects=effects, filtered={"loss": filtered(z, 1.0)})
    one = game(seen, criteria(seen), wishes_of(data))
    settled = equilibrium(one.payoffs, one.sizes)
    assert gain_of_leaving(one.payoffs, settled.strategies) <= 1e-6  # of a mixed one too
    if settled.kind == "pure":
        for player, payoff in enumerate(one.payoffs):
            mine = list(settled.play)
            for other in range(payoff.shape[player]):
                mine[player] = other
                assert payoff[tuple(mine)] <= payoff[settled.play] + 1e-6 * (1.0 + np.abs(payoff).max())


def test_effects_that_are_large_sure_and_opposed_make_a_game_without_a_pure_equilibrium() -> None:
    """A decision's game can be mixed: what one would do for the loss, the other would undo for the attention."""
    effects = {
        "loss": {LEARNING_RATE: (0.708, 1e-4), GUIDED_WEIGHT: (-1.455, 1e-4)},
        "attention_diag": {LEARNING_RATE: (2.937, 1e-4), GUIDED_WEIGHT: (1.938, 1e-4)},
    }
    seen = context(attention_diag=0.443, effects=effects, filtered={"loss": filtered(3.811, 1.0)})
    wishes = {"learning_rate": {LEARNING_RATE: 0.00495}, "guided_attention": {GUIDED_WEIGHT: -0.16}, "loss_balance": {}}
    one = game(seen, criteria(seen), wishes)
    settled = equilibrium(one.payoffs, one.sizes)
    assert settled.kind == "mixed" and gain_of_leaving(one.payoffs, settled.strategies) <= 1e-9
    record = settle(seen, wishes).record["equilibrium"]
    assert (record["kind"], record["count"]) == ("mixed", 0)


def test_a_cure_is_made_whole_however_bad_the_gradients() -> None:
    for spikes in (0.06, 0.2, 0.6):
        done = settle(context(grad_spikes=spikes, loss_z=4.0, certainty=0.3), CURE)
        assert done.moves[LEARNING_RATE] == CURE["learning_rate"][LEARNING_RATE]
        assert done.moves[GRAD_CLIP] == CURE["learning_rate"][GRAD_CLIP]


# what was learned


def taught(mean: float, std: float) -> TrainingContext:
    """A flat loss under which a raise of the rate was seen to change the slope by ``mean`` a step."""
    return context(filtered={"loss": filtered(0.0, 1.0)}, effects={"loss": {LEARNING_RATE: (mean, std)}}, certainty=0.4)


def worth(seen: TrainingContext) -> float:
    one = game(seen, criteria(seen), BOLD)
    return float(one.payoffs[0, -1, 0, 0] - one.payoffs[0, 0, 0, 0])


def test_an_effect_counts_by_its_sign_and_by_how_sure_it_is() -> None:
    none, good, bad, vague = (worth(taught(*effect)) for effect in ((0, 0.1), (-0.05, 0.01), (0.05, 0.01), (0.05, 1)))
    assert bad < none < good
    assert abs(vague - none) < 0.1 * abs(bad - none)


@given(st.floats(-1, 1), st.floats(0.001, 1), st.data())
def test_a_cure_is_made_whole_whatever_its_effect_was_learned_to_be(
    mean: float, std: float, data: st.DataObject
) -> None:
    """A loss that rises for another reason teaches that a lower rate did not help; the others may wish what they do."""
    seen = replace(taught(mean, std), filtered={"loss": filtered(5.0, 1.0)})
    done = settle(seen, {**wishes_of(data), **CURE})
    assert done.moves[LEARNING_RATE] == pytest.approx(CURE["learning_rate"][LEARNING_RATE])


def test_an_effect_on_a_criterion_that_needs_nothing_counts_nothing() -> None:
    seen = replace(taught(0.05, 0.01), filtered={"loss": filtered(-1.0, 0.1)})
    assert worth(seen) == pytest.approx(worth(replace(seen, effects={})), abs=1e-6)


def test_the_unit_and_the_zero_of_the_loss_change_no_payoff() -> None:
    seen = taught(0.05, 0.01)
    other = replace(
        seen,
        filtered={"loss": replace(filtered(0.0, 64.0), level=99.0, noise=6.4)},
        effects={"loss": {LEARNING_RATE: (0.05 * 64, 0.01 * 64)}},
    )
    assert (game(other, criteria(other), BOLD).payoffs == game(seen, criteria(seen), BOLD).payoffs).all()


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, allow_infinity=False))
def test_no_effect_however_strange_makes_a_payoff_that_is_not_finite(mean: float, std: float) -> None:
    seen = taught(mean, std)
    assert np.isfinite(game(seen, criteria(seen), BOLD).payoffs).all()


# risk and vote

HEALTHY = Dynamics(Course(0.0, slope=-0.05, slope_std=0.01, noise=1.0, drift=1e-5, prior_std=0.05), 8.0)
DEADLY = Dynamics(
    Course(0.0, slope=-0.05, noise=1.0, drift=1e-5, effects={LEARNING_RATE: (2.0, 0.5)}, prior_std=0.2), 8.0
)


def test_a_move_that_the_simulation_sees_diverge_is_held_and_said_so() -> None:
    assert settle(context(), course=HEALTHY).moves == JOINT
    done = settle(context(), course=DEADLY)
    assert done.moves == {} or movement(stirring(done.moves)) == 0.0
    assert done.record["risk"]["size"] == 0.0 and "plays go wrong by it" in " ".join(done.cuts)


def test_a_cure_is_not_held_by_what_the_simulation_fears() -> None:
    done = settle(context(grad_spikes=0.2), CURE, course=DEADLY)
    assert done.moves[LEARNING_RATE] == CURE["learning_rate"][LEARNING_RATE]


def rising(z: float) -> Trend:
    return Trend(1.0, 0.1, 0.1, z, 20)


def foreseen(divergence: float, alignment_loss: float) -> Forecast:
    return Forecast((10, 50), ((0, 1, 2),) * 2, ((0, 0, 0),) * 2, (0.0, divergence), (0.0, alignment_loss), ())


def says(approve: bool | None, size: float = 1.0) -> Any:
    return lambda seen, moves, weighed: Opinion(approve, size)


@pytest.mark.parametrize("liar", ["simulation", "window", "forecast"])
@pytest.mark.parametrize("lie", [says(False, 0.0), says(True, 100.0), says(True, math.nan), says(True, -3.0)])
def test_one_arbitrary_voter_changes_nothing(liar: str, lie: Any) -> None:
    honest = dict.fromkeys(ASSESSORS, says(True))
    optimizer = MultiAgentOptimizer(assessors={**honest, liar: lie})
    assert settle(context(), optimizer=optimizer).moves == pytest.approx(JOINT)


def test_two_that_object_hold_everything_and_are_named() -> None:
    optimizer = MultiAgentOptimizer(assessors={**ASSESSORS, "window": says(False), "simulation": says(False)})
    done = settle(context(), optimizer=optimizer)
    assert done.moves == {}
    assert done.record["vote"]["no"] == ["simulation", "window"] and not done.record["vote"]["approved"]
    assert "no quorum: 3 of 5 say yes, 4 are needed" in done.cuts


def test_a_window_in_trouble_and_a_dark_forecast_stop_a_raise_but_no_cure() -> None:
    """No voter is replaced here: a veto happens. The cure is put to the vote without what the others wanted."""
    seen = context(trends={"mel": rising(5.0)}, forecast=foreseen(0.9, 0.0))
    done = settle(seen)
    assert done.moves == {} and set(done.record["vote"]["no"]) == {"window", "forecast"}
    assert settle(replace(seen, forecast=None)).moves  # one alone does not
    reasons = {"window": "the loss surely rises (z +5.0)", "forecast": "divergence 90% likely in 50 steps"}
    assert done.record["vote"]["reasons"] == reasons
    assert done.record["vote"]["wanted"] == {"window": 0.0, "forecast": 0.0}
    assert "settled" not in done.record["vote"], "nothing was"
    cured = settle(seen, CURE)
    assert cured.moves == CURE["learning_rate"]
    assert "no quorum: 4 of 6 say yes, 5 are needed" in cured.cuts
    vote = cured.record["vote"]
    assert vote["refused"] == reasons and not {"no", "reasons", "wanted", "settled"} & set(vote)


HARM = {"attention_diag": {LEARNING_RATE: (-0.02, 0.002)}}
ONLY_RATE = {"learning_rate": BOLD["learning_rate"], "guided_attention": {}, "loss_balance": {}}


def test_an_agent_objects_to_what_others_do_to_its_criterion_and_says_what_it_loses() -> None:
    vote = settle(context(effects=HARM), ONLY_RATE).record["vote"]
    assert vote["no"] == ["guided_attention"] and vote["approved"]
    assert vote["reasons"] == {"guided_attention": "the joint move is worth 0.15 less to it than holding"}
    assert "wanted" not in vote and "settled" not in vote


# what one agent can do


def so_much(size: float) -> Any:
    """An assessor that wants so much of what stirs, by the rule of all of them."""
    return lambda seen, moves, weighed: Opinion(size > 0.0 or calming(moves), size)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(AGENTS),
    st.sampled_from([BOLD, CURE]),
    st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=3, max_size=3),
    st.floats(0, 0.4),
    st.data(),
)
def test_one_arbitrary_agent_moves_its_own_knobs_no_farther_than_two_assessors_would(
    liar: str, others: dict, sizes: list[float], spikes: float, data: st.DataObject
) -> None:
    wishes = {**others, liar: wishes_of(data)[liar]}
    optimizer = MultiAgentOptimizer(assessors={n: so_much(z) for n, z in zip(ASSESSORS, sizes, strict=True)})
    done = settle(context(grad_spikes=spikes), wishes, optimizer)
    wished = {knob: move for moves in wishes.values() for knob, move in moves.items() if move}
    assert set(done.moves) <= set(wished)
    for knob, move in done.moves.items():
        most = sum(sorted(sizes)[1:]) / 2.0 if stirring({knob: wished[knob]}) else 1.0
        assert move * wished[knob] >= 0.0, "never the other way, for anyone's knobs"
        assert abs(move) <= most * abs(wished[knob]) + 1e-9
    if sizes.count(0.0) >= 2 and stirring(wished) == wished:
        assert done.moves == {}


def test_against_one_objection_an_agent_goes_on_and_against_two_not() -> None:
    for *sizes, made in ((0.0, 1.0, 1.0, 1.0), (0.0, 0.5, 0.5, 0.5), (0.0, 0.5, None, 0.5), (0.0, 0.0, 1.0, None)):
        said = [says(None) if size is None else so_much(size) for size in sizes]
        optimizer = MultiAgentOptimizer(assessors=dict(zip(ASSESSORS, said, strict=True)))
        done = settle(context(), ONLY_RATE, optimizer)
        assert done.moves == ({} if made is None else {LEARNING_RATE: pytest.approx(made * math.log(1.5))})


def test_an_agent_that_calms_is_not_held_and_one_that_is_wild_holds_what_others_stir() -> None:
    optimizer = MultiAgentOptimizer(assessors=dict.fromkeys(ASSESSORS, so_much(0.0)))
    down = {knob: -math.log(KNOBS[knob].max_ratio) for knob in OWNS["learning_rate"]}
    assert settle(context(), {**ONLY_RATE, "learning_rate": down}, optimizer).moves == down
    quiet = {**BOLD, "learning_rate": {}}
    assert settle(context(), quiet, course=DEADLY).moves == {k: v for k, v in JOINT.items() if k != LEARNING_RATE}
    assert settle(context(), BOLD, course=DEADLY).moves == {}


# three agents alone


def alone() -> MultiAgentOptimizer:
    return MultiAgentOptimizer(assessors={})


def test_three_agents_alone_steer_a_calm_run_and_share_what_gradients_bear() -> None:
    assert alone().electorate.blocked_by == 1
    assert settle(context(), optimizer=alone()).moves == JOINT
    done = settle(context(grad_spikes=0.1), optimizer=alone())
    assert 0.0 < movement(done.moves) < movement(JOINT)
    assert settle(context(grad_spikes=0.2), CURE, alone()).moves.items() >= CURE["learning_rate"].items()


def test_three_alone_are_blocked_by_one_no_and_survive_what_is_no_value_without_muting_it() -> None:
    done = settle(context(effects=HARM), ONLY_RATE, alone())
    assert done.moves == {} and "no quorum: 2 of 3 say yes, 3 are needed" in done.cuts
    optimizer, mad = alone(), Proposal("learning_rate", {LEARNING_RATE: math.nan}, "mad")
    for _ in range(9):
        done = settle(context(), {**BOLD, "learning_rate": {}}, optimizer, proposals=(mad,))
        assert done.moves == {k: v for k, v in JOINT.items() if k != LEARNING_RATE}
    assert "muted" not in done.record["vote"]


@pytest.mark.parametrize("names", [("simulation",), ("simulation", "window"), ("window", "forecast")])
def test_with_an_assessor_or_two_they_steer_a_calm_run_too(names: tuple[str, ...]) -> None:
    few = {name: ASSESSORS[name] for name in names}  # without a forecast that one abstains
    assert settle(context(), optimizer=MultiAgentOptimizer(assessors=few)).moves == JOINT


def test_a_voter_that_is_not_heard_from_without_a_forecast_abstains() -> None:
    assert settle(context()).record["vote"]["abstained"] == ["forecast"]


def test_an_agent_that_wants_what_is_no_value_is_muted_in_time_and_heard_again() -> None:
    optimizer, lines = MultiAgentOptimizer(), []
    mad = Proposal("learning_rate", {LEARNING_RATE: math.nan}, "mad")
    sane = Proposal("learning_rate", {LEARNING_RATE: 1.5}, "sane")
    quiet = {**BOLD, "learning_rate": {}}
    for _ in range(4):
        done = settle(context(), quiet, optimizer, proposals=(mad,))
        lines += done.cuts
        assert done.moves == {k: v for k, v in JOINT.items() if k != LEARNING_RATE}  # the others go on
    assert any("learning_rate was out of range again and again: muted" in line for line in lines)
    done = settle(context(), BOLD, optimizer, proposals=(sane,))
    assert LEARNING_RATE not in done.moves and done.record["vote"]["muted"] == ["learning_rate"]
    for _ in range(12):
        done = settle(context(), BOLD, optimizer, proposals=(sane,))
    assert done.moves == JOINT


# record and state


@pytest.mark.parametrize(
    ("seen", "gain", "voter", "size", "said"),
    [
        (context(grad_spikes=0.21), 0.0, "window", 0.0, "21% of the gradients spike"),
        (context(grad_spikes=0.1), 0.0, "window", 0.5, "10% of the gradients spike"),
        (context(trends={"grad_norm": rising(4.1)}), 0.0, "window", 0.5, "the gradient norm surely rises (z +4.1)"),
        (
            context(trends={"total": rising(7.0)}, grad_spikes=0.2),
            0.0,
            "window",
            0.0,
            "20% of the gradients spike, the loss surely rises (z +7.0)",
        ),
        (context(forecast=foreseen(0.3, 0.1)), 0.0, "forecast", 0.5, "divergence 30% likely in 50 steps"),
        (context(forecast=foreseen(0.3, 0.62)), 0.0, "forecast", 0.0, "a lost alignment 62% likely in 50 steps"),
        (context(), -1.44, "simulation", 0.0, "the plays lose 1.4 noise widths on average"),
    ],
)
def test_an_assessor_says_why_with_the_figure(
    seen: TrainingContext, gain: float, voter: str, size: float, said: str
) -> None:
    weighed = Weighed(JOINT, 1.0, 0.3, Outlook(0.0, 0.0, gain, gain, 0.0, 0.0, 256), {})
    opinions = {name: assess(seen, JOINT, weighed) for name, assess in ASSESSORS.items()}
    assert opinions.pop(voter) == Opinion(size > 0.0, size, said)
    assert all(other.reason == "" for other in opinions.values())


def test_what_was_settled_on_stands_where_it_is_not_the_joint_move() -> None:
    optimizer = MultiAgentOptimizer(
        assessors={"a": so_much(0.5), "b": says(True), "c": lambda *_: Opinion(True, 0.5, "doubt")}
    )
    vote = settle(context(), optimizer=optimizer).record["vote"]
    assert vote["wanted"] == {"a": 0.5, "c": 0.5} and vote["reasons"] == {"c": "doubt"}
    assert vote["settled"] == dict.fromkeys(JOINT, 0.75)
    calm = settle(context()).record["vote"]
    assert not {"reasons", "wanted", "settled", "refused"} & set(calm)


def test_the_record_holds_it_all_is_json_and_short() -> None:
    record = settle(context(grad_spikes=0.1), course=HEALTHY).record
    assert set(record) >= {"criteria", "equilibrium", "risk", "vote"}
    assert set(record["criteria"]) == {"convergence", "gradient_health", "attention_quality"}
    assert set(record["equilibrium"]["gains"]) == set(AGENTS)
    assert {"divergence", "divergence_held", "gain", "cvar", "draws"} <= set(record["risk"])
    assert len(json.dumps(record, allow_nan=False)) < 1600


def test_where_nobody_wishes_anything_the_scores_stand_alone() -> None:
    done = settle(context(), {agent: {} for agent in AGENTS})
    assert done.moves == {} and done.cuts == () and set(done.record) == {"criteria"}


def test_its_memory_comes_back_and_a_damaged_one_is_refused() -> None:
    optimizer, other = MultiAgentOptimizer(), MultiAgentOptimizer()
    mad = Proposal("learning_rate", {LEARNING_RATE: math.inf}, "mad")
    settle(context(), {}, optimizer, proposals=(mad,))
    state = json.loads(json.dumps(optimizer.state_dict()))
    assert state != other.state_dict()
    other.load_state_dict(state)
    assert other.state_dict() == optimizer.state_dict()
    with pytest.raises(ValueError):
        other.load_state_dict({"vote": {"strikes": {"window": -1}, "muted": []}})
    assert other.state_dict() == optimizer.state_dict()


# the simple rival


def test_the_average_shrinks_what_is_larger_than_the_mean_and_leaves_the_rest() -> None:
    made = averaged(BOLD)
    mean = sum(movement(moves) for moves in BOLD.values()) / 3
    for moves in BOLD.values():
        size = movement({knob: made[knob] for knob in moves})
        assert size == pytest.approx(min(movement(moves), mean))
    assert averaged({}) == {} and averaged({"a": {}, "b": {}}) == {}


def test_weighed_is_said_only_where_something_was_cut() -> None:
    assert Weighed({LEARNING_RATE: 0.1}, 1.0, 0.3, None, {}).notes == ()
