"""Laws that hold for every agent, then each agent's own."""

import json
import math
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_run import context, falling, report

from tts_brain.agents import Agent, GuidedAttentionAgent, LearningRateAgent, LossBalanceAgent, build_agents
from tts_brain.agents.learning_rate import RAISE, SEARCH, RecentLowest
from tts_brain.attention.supervisor import DynamicAttentionSupervisor
from tts_brain.config import BrainConfig
from tts_brain.feedback.kalman import MetricFilter
from tts_brain.losses.controller import AdaptiveLossController
from tts_brain.types import (
    GATE_WEIGHT,
    GRAD_CLIP,
    GRAD_CLIP_OFF,
    GUIDED_SIGMA,
    GUIDED_WEIGHT,
    KNOBS,
    LEARNING_RATE,
    MEL_WEIGHT,
    TVERSKY_OFF,
    TVERSKY_WEIGHT,
    FilterReport,
    Forecast,
    Scales,
    TrainingPhase,
)

MAX_RATE = 2e-3
NAMES = ("learning_rate", "guided_attention", "loss_balance")


def make(name: str) -> Agent:
    return {a.name: a for a in build_agents(BrainConfig(), AdaptiveLossController())}[name]


def start_knobs(**changes: float) -> dict[str, float]:
    known = {GUIDED_WEIGHT: 4.5, GUIDED_SIGMA: 0.4, "tversky_alpha": 0.5, "tversky_beta": 0.5}
    return {n: known.get(n, k.neutral) for n, k in KNOBS.items()} | changes


shares = st.floats(0, 1)
contexts = st.builds(
    lambda z, diag, spikes, rate, ratio, phase, odds: context(
        loss_z=z,
        attention_diag=diag,
        grad_spikes=spikes,
        learning_rate=rate,
        update_ratio=ratio,
        phase=phase,
        phase_posterior=tuple(o / sum(odds) for o in odds),
    ),
    st.floats(-100, 100),
    shares,
    shares,
    st.floats(0, 1) | st.just(math.nan),
    shares | st.just(math.nan),
    st.sampled_from(TrainingPhase),
    st.tuples(*[st.floats(0.01, 1)] * 4),
)
knob_values = st.fixed_dictionaries({n: st.floats(k.low, k.high) for n, k in KNOBS.items()})


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(seen=contexts, knobs=knob_values)
def test_every_proposal_has_a_reason_and_positive_finite_moves_of_its_own(name: str, seen, knobs) -> None:
    agent = make(name)
    proposal = agent.propose(seen, knobs)
    assert proposal.agent == name and proposal.reason.strip()
    assert set(proposal.moves) <= set(agent.owns)
    assert all(math.isfinite(v) and v > 0 for v in proposal.moves.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_knob_the_host_lacks_is_never_proposed(name: str) -> None:
    seen = context(loss_z=-5.0, attention_diag=0.3)
    for missing in KNOBS:
        knobs = {n: v for n, v in start_knobs().items() if n != missing}
        assert missing not in make(name).propose(seen, knobs).moves


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(seen=st.lists(contexts, min_size=2, max_size=20), cut=st.integers(0, 20))
def test_a_saved_agent_goes_on_alike(name: str, seen, cut: int) -> None:
    whole, first, second = make(name), make(name), make(name)

    def take(agent: Agent, part) -> list:
        moves = []
        for item in part:
            moves.append(agent.propose(item, start_knobs()).moves)
            agent.learn({LEARNING_RATE: (1.0, 1.5)}, item, kept=item.grad_spikes < 0.8)
        return moves

    expected = take(whole, seen)
    take(first, seen[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, seen[cut:]) == expected[cut:]
    assert second.state_dict() == whole.state_dict()


def test_no_two_agents_own_the_same_knob() -> None:
    agents = [make(name) for name in NAMES]
    assert all(not set(a.owns) & set(b.owns) for a, b in combinations(agents, 2))
    assert {k for a in agents for k in a.owns} == set(KNOBS)


# learning rate


def rate_wish(agent: LearningRateAgent, multiplier: float = 1.0, **seen) -> float:
    """Multiplier wanted in this context; the old one when nothing is."""
    proposal = agent.propose(context(**seen), {LEARNING_RATE: multiplier})
    return proposal.moves.get(LEARNING_RATE, multiplier)


def test_the_rate_rises_while_the_loss_falls_and_gradients_are_calm() -> None:
    assert rate_wish(LearningRateAgent(), loss_z=-5.0) > 1.0


@pytest.mark.parametrize(
    "worry",
    [
        {"grad_spikes": 0.1, "loss_z": -1.0},
        {"grad_spikes": 0.2},
        {"update_ratio": 0.5},
        {"learning_rate": math.nan},
        {"learning_rate": 0.0},
    ],
)
def test_the_rate_does_not_rise_under_a_worry(worry: dict) -> None:
    assert rate_wish(LearningRateAgent(), **{"loss_z": -5.0} | worry) <= 1.0


def test_a_few_spikes_are_no_worry_while_the_loss_surely_falls() -> None:
    proposal = LearningRateAgent().propose(context(loss_z=-3.0, grad_spikes=0.1), {LEARNING_RATE: 1.0})
    assert proposal.moves[LEARNING_RATE] > 1.0 and "gradients calm" not in proposal.reason


def test_beyond_the_usual_rate_a_steep_fall_is_worth_twice_the_rate_and_a_sure_one_half_as_much_again() -> None:
    usual = {"learning_rate": MAX_RATE / 2}
    wishes = [rate_wish(LearningRateAgent(MAX_RATE), loss_z=z, **usual) for z in (-5.0, -3.0, -1.0)]
    assert wishes == pytest.approx([SEARCH, RAISE, 1.0])


def test_up_to_the_usual_rate_the_search_doubles_it() -> None:
    assert rate_wish(LearningRateAgent(MAX_RATE), loss_z=0.0, learning_rate=MAX_RATE / 8) == pytest.approx(SEARCH)


def test_beyond_the_usual_rate_it_goes_on_only_while_the_loss_surely_falls() -> None:
    usual = MAX_RATE / 2
    for z in (-1.0, -3.0):
        agent, multiplier = LearningRateAgent(MAX_RATE), 1.0
        for _ in range(20):
            multiplier = rate_wish(agent, multiplier, learning_rate=0.3 * usual, loss_z=z)
        assert 0.3 * multiplier == pytest.approx(2.0 if z < -2.0 else 1.0, rel=0.1)


def test_a_host_whose_loss_falls_so_fast_that_more_than_usual_pays_is_not_told_that_its_rate_is_too_low() -> None:
    usual = MAX_RATE / 2
    seen = context(learning_rate=0.2 * usual, loss_z=-3.0)
    proposal = LearningRateAgent(MAX_RATE).propose(seen, {LEARNING_RATE: 8.5})
    assert proposal.moves[LEARNING_RATE] > 8.5 and "too low" not in proposal.reason


def test_once_there_is_an_alignment_a_rate_above_the_usual_comes_back_to_it_and_no_further() -> None:
    usual = MAX_RATE / 2
    seen = {"phase": TrainingPhase.REFINEMENT, "learning_rate": usual, "update_ratio": 1e-2, "attention_diag": 0.6}
    falling = LearningRateAgent(MAX_RATE)
    assert rate_wish(falling, 1.9, loss_z=-5.0, **seen) == 1.9, "while it surely falls it stays"
    agent, path = LearningRateAgent(MAX_RATE), [1.9]
    while len(path) < 12:
        path.append(rate_wish(agent, path[-1], loss_z=-1.5, **seen))
    assert path[1] == pytest.approx(0.85 * 1.9) and path[-1] == pytest.approx(1.0, rel=0.05)
    assert path == sorted(path, reverse=True)


@pytest.mark.parametrize("trouble", [{"loss_z": 5.0}, {"grad_spikes": 0.3}, {"grad_spikes": 0.3, "loss_z": -5.0}])
def test_the_rate_falls_on_a_rising_loss_or_spikes(trouble: dict) -> None:
    assert rate_wish(LearningRateAgent(), **trouble) < 1.0


def test_a_flat_loss_raises_the_rate_before_alignment_and_eases_it_after() -> None:
    late = LearningRateAgent()
    assert rate_wish(LearningRateAgent()) > 1.0
    late_wishes = [rate_wish(late, phase=TrainingPhase.CONVERGENCE) for _ in range(6)]
    assert late_wishes[:5] == [1.0] * 5 and late_wishes[5] < 1.0


def test_a_rate_of_the_hosts_above_the_highest_is_eased_while_nothing_moves_and_the_highest_is_kept() -> None:
    above, at_it = LearningRateAgent(MAX_RATE), LearningRateAgent(MAX_RATE)
    assert min(rate_wish(above, learning_rate=10 * MAX_RATE, update_ratio=1e-2) for _ in range(6)) < 1.0
    assert {rate_wish(at_it, learning_rate=MAX_RATE) for _ in range(20)} == {1.0}


def test_the_hosts_rate_is_called_too_high_or_too_low_where_the_loss_shows_it() -> None:
    agent = LearningRateAgent(5e-3)
    high = context(learning_rate=1e-2, update_ratio=1e-2)
    said = [agent.propose(high, {LEARNING_RATE: 1.0}).reason for _ in range(9)]
    assert "the rate 1.0e-02 is too high" in said[5] and not any("too high" in reason for reason in said[:5])
    for host, multiplier, too_low in ((1e-4, 10.0, True), (1e-3, 3.0, False)):
        seen = context(learning_rate=host, loss_z=-5.0)
        reason = LearningRateAgent(5e-3).propose(seen, {LEARNING_RATE: multiplier}).reason
        assert "try a higher rate" in reason and ("too low" in reason) is too_low


def test_at_the_top_of_the_search_a_flat_loss_eases_the_rate_once_attention_forms_and_not_below_the_hosts() -> None:
    learning = {"phase": TrainingPhase.ALIGNMENT_LEARNING, "attention_diag": 0.3, "learning_rate": 1e-3}
    early = LearningRateAgent(2e-3)
    before = [rate_wish(early, 2.0, phase=TrainingPhase.PRE_ALIGNMENT, learning_rate=1e-3) for _ in range(20)]
    assert set(before) == {2.0}, "attention has not formed: the highest rate stays"
    agent, multiplier, seen = LearningRateAgent(2e-3), 2.0, []
    for _ in range(14):
        multiplier = rate_wish(agent, multiplier, **learning)
        seen.append(multiplier)
    assert seen[4] == 2.0 and seen[5] == 1.4, "and is not raised again at once"
    assert seen[6:11] == [1.4] * 5 and seen[11:] == [1.0] * 3


def levels(agent: LearningRateAgent, *heights: float, z: float = 1.5) -> list[float]:
    """Factors of a rate in refinement, a decision each, at these levels of the loss in noise widths."""
    factors = []
    for number, height in enumerate(heights):
        loss = estimate(0.01 * z, level=1.0 + 0.1 * height, count=30 + 10 * number)
        factors.append(rate_wish(agent, filtered={"loss": loss}, phase=TrainingPhase.REFINEMENT, attention_diag=0.6))
    return factors


def test_a_loss_that_jumps_up_and_stays_lowers_the_rate_once() -> None:
    agent = LearningRateAgent()
    assert levels(agent, 0.0, 3.0, 0.5, 3.0, 3.0) == [1.0, 1.0, 1.0, 1.0, 0.7], "one decision may be chance"
    assert levels(agent, *[3.0] * 4) == [1.0] * 4, "it is on its way down"
    assert min(levels(LearningRateAgent(), 0.0, 3.0, 3.0, z=-3.0)) >= 1.0, "it surely falls"
    assert levels(LearningRateAgent(), 0.0, 1.9, 1.9) == [1.0] * 3


@pytest.mark.parametrize(("fall", "eased"), [(0.0, True), (0.004, True), (0.05, False)])
def test_before_an_alignment_a_loss_that_still_falls_slowly_is_no_plateau(fall: float, eased: bool) -> None:
    agent, wishes = LearningRateAgent(5e-3), []
    seen = {"phase": TrainingPhase.ALIGNMENT_LEARNING, "learning_rate": 1e-3, "attention_diag": 0.3}
    for decision in range(12):
        report = estimate(-1e-6, 0.01, 50 + decision, 1.0 - fall * decision)
        wishes.append(rate_wish(agent, 5.0, filtered={"loss": report}, **seen))
    assert (min(wishes) < 5.0) is eased
    assert RecentLowest().fell(None, 6) == 0.0


@pytest.mark.parametrize("count", [5, 30, 60])
def test_a_loss_that_means_something_else_now_is_not_held_against_the_old_one(count: int) -> None:
    """A filter that has begun anew: few values, as many as at the decision before, or none more."""
    lowest = RecentLowest()
    for before in (40, 50, 60):
        lowest.above(estimate(0.0, level=1.0, count=before))
    anew = estimate(0.0, level=4.0, count=count)
    assert lowest.above(anew) == 0.0 == lowest.fell(anew, 6)
    assert lowest.above(replace(anew, count=count + 30)) == 0.0


@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_noise_alone_hardly_ever_stands_high(tails: str) -> None:
    rng, filtered, lowest = np.random.default_rng(0), MetricFilter("log"), RecentLowest()
    noise = rng.standard_normal(8000) if tails == "normal" else rng.standard_t(3, 8000) / math.sqrt(3.0)
    seen = [filtered.update(step, max(1.0 + 0.03 * float(value), 1e-3)) for step, value in enumerate(noise, start=1)]
    above = [lowest.above(one) for one in seen[9::10]]
    twice = [min(pair) > 2.0 for pair in pairwise(above)]
    assert sum(twice) <= 1


def test_how_far_it_stands_above_is_a_number_whatever_the_noise() -> None:
    lowest = RecentLowest()
    assert lowest.above(None) == 0.0
    assert lowest.above(replace(estimate(0.0), noise=5e-324)) == 0.0
    assert lowest.above(replace(estimate(0.0, level=1e30, count=60), noise=5e-324)) == 1e6
    assert lowest.above(estimate(0.0, level=5.0, count=30)) == 0.0, "the filter began anew"


def test_a_rate_under_which_the_loss_jumped_is_a_ceiling() -> None:
    agent = LearningRateAgent(max_learning_rate=1.0)
    levels(agent, 0.0, 3.0, 3.0)
    assert rate_wish(agent, 0.7, loss_z=-5.0, phase=TrainingPhase.REFINEMENT) == 0.7


def test_a_high_rate_of_an_optimizer_with_rates_of_another_size_is_left_alone() -> None:
    """Adadelta's ordinary rate is 1; Adam at 1e-2 changes the weights by per cents a step."""
    for ratio, eased in ((1e-3, False), (2e-2, True), (math.nan, True)):
        agent = LearningRateAgent(5e-3)
        seen = {"phase": TrainingPhase.PRE_ALIGNMENT, "learning_rate": 1.0, "update_ratio": ratio}
        wishes = [rate_wish(agent, 1.0, loss_z=0.1, **seen) for _ in range(20)]
        assert (min(wishes) < 1.0) is eased, ratio
        assert max(wishes) == 1.0


def test_a_rate_far_too_low_is_doubled() -> None:
    """Weights that hardly change: the search would else take all of a short run."""
    late = {"phase": TrainingPhase.REFINEMENT, "loss_z": -3.0}
    assert rate_wish(LearningRateAgent(), update_ratio=1e-4, **late) == pytest.approx(SEARCH)
    assert rate_wish(LearningRateAgent(), update_ratio=1e-3, **late) == pytest.approx(RAISE)


def test_in_doubt_between_two_phases_the_move_is_a_quarter_smaller() -> None:
    doubt = rate_wish(LearningRateAgent(), phase_posterior=(0.5, 0.5, 0.0, 0.0), certainty=0.5)
    assert 1.0 < doubt == pytest.approx(SEARCH**0.75)


def estimate(slope: float, slope_std: float = 0.01, count: int = 50, level: float = 1.0) -> FilterReport:
    return FilterReport(100, level, 0.1, slope, slope_std, 0.1, 0.0, 0.0, False, count)


def test_the_filters_slope_is_believed_before_the_windows() -> None:
    up, down = {"loss": estimate(0.05)}, {"loss": estimate(-0.05)}
    assert rate_wish(LearningRateAgent(), loss_z=-5.0, filtered=up) < 1.0
    assert rate_wish(LearningRateAgent(), loss_z=5.0, filtered=down) > 1.0
    assert rate_wish(LearningRateAgent(), loss_z=5.0, filtered={"loss": estimate(-0.05, count=3)}) < 1.0


def swings(period: float, oscillation: float) -> Scales:
    return Scales(100, 1.0, 0.0, 10.0, 0.1, (1.0, 1.0, 1.0, 1.0), period, oscillation)


def test_a_loss_that_swings_fast_lowers_the_rate_unless_it_falls_all_the_same() -> None:
    fast = {"mel": swings(3.0, 4.0)}
    assert rate_wish(LearningRateAgent(), scales=fast) < 1.0
    assert rate_wish(LearningRateAgent(), scales=fast, loss_z=-5.0) > 1.0
    assert rate_wish(LearningRateAgent(), scales={"mel": swings(3.0, 2.0)}) > 1.0  # noise may well look so
    assert rate_wish(LearningRateAgent(), scales={"mel": swings(30.0, 5.0)}) > 1.0  # an epoch's rhythm, perhaps


@settings(max_examples=200)
@given(
    contexts,
    st.floats(1 / 64, 64),
    st.lists(st.floats(1e-6, 1e-2), max_size=3),
)
def test_the_rate_is_never_raised_above_the_highest(seen, multiplier: float, hurt: list) -> None:
    agent = LearningRateAgent(MAX_RATE)
    for rate in hurt:
        agent.learn({LEARNING_RATE: (rate / 1.5, rate)}, context(learning_rate=1.0, phase=seen.phase), kept=False)
    wanted = agent.propose(seen, {LEARNING_RATE: multiplier}).moves.get(LEARNING_RATE, multiplier)
    if wanted > multiplier:
        assert wanted * seen.learning_rate <= min([MAX_RATE, *hurt]) * (1 + 1e-9)
    assert wanted <= multiplier * SEARCH * (1 + 1e-9)


def test_a_schedule_that_carries_the_raised_rate_too_high_is_answered_but_the_hosts_own_rate_is_not() -> None:
    agent = LearningRateAgent(MAX_RATE)
    assert rate_wish(agent, 8.0, loss_z=-5.0, learning_rate=1e-3) == pytest.approx(2.0)
    assert rate_wish(agent, 8.0, loss_z=-5.0, learning_rate=1e-1) == pytest.approx(1.0)
    assert rate_wish(agent, 1.0, loss_z=-5.0, learning_rate=1e-1) == 1.0


def test_after_an_undone_raise_the_rate_stays_below_it_until_a_later_phase() -> None:
    agent = LearningRateAgent(max_learning_rate=1.0)
    learning = TrainingPhase.ALIGNMENT_LEARNING
    agent.learn({LEARNING_RATE: (2.0, 3.0)}, context(phase=learning), kept=False)
    multiplier = 1.0
    for _ in range(12):
        multiplier = rate_wish(agent, multiplier, loss_z=-5.0, phase=learning)
        assert multiplier < 3.0
    assert rate_wish(agent, multiplier, loss_z=-5.0, phase=TrainingPhase.PRE_ALIGNMENT) == multiplier
    assert rate_wish(agent, multiplier, loss_z=-5.0, phase=TrainingPhase.REFINEMENT) > multiplier


def test_a_rate_whose_product_rounds_to_nothing_is_left_alone() -> None:
    assert rate_wish(LearningRateAgent(), 0.5, learning_rate=5e-324) == 0.5


def test_the_ceiling_is_tried_again_some_day() -> None:
    agent = LearningRateAgent(max_learning_rate=1.0)
    agent.learn({LEARNING_RATE: (2.0, 3.0)}, context(), kept=False)
    wishes = [rate_wish(agent, 2.2) for _ in range(20)]
    assert wishes[:10] == [2.2] * 10 and max(wishes) > 3.0


def forecast(loss: float = 0.5, divergence: float = 0.0, alignment_loss: float = 0.0) -> Forecast:
    return Forecast(
        horizons=(25, 50, 100),
        loss=((loss - 0.1, loss, loss + 0.1),) * 3,
        attention_diag=((0.4, 0.5, 0.6),) * 3,
        divergence=(divergence,) * 3,
        alignment_loss=(alignment_loss,) * 3,
        looked_at=((100, 0.5),),
    )


def test_the_rate_is_not_raised_into_a_loss_that_is_not_expected_to_fall_or_into_a_divergence() -> None:
    falls = {"loss": estimate(-0.05)}  # from a level of 1
    assert rate_wish(LearningRateAgent(), filtered=falls, forecast=forecast(0.9)) > 1.0
    assert rate_wish(LearningRateAgent(), filtered=falls, forecast=forecast(1.1)) == 1.0
    assert rate_wish(LearningRateAgent(), filtered=falls, forecast=forecast(0.9, divergence=0.3)) == 1.0


def test_a_proposal_that_hangs_on_a_forecast_says_on_which_step_the_model_looked() -> None:
    looked = {"looked_at_step": 100.0, "looked_at_share": 0.5}
    rate = LearningRateAgent().propose(context(filtered={"loss": estimate(-0.05)}, forecast=forecast()), start_knobs())
    assert looked.items() <= rate.evidence.items()
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor())
    feared = agent.propose(context(attention_diag=0.6, forecast=forecast(alignment_loss=0.4)), start_knobs())
    assert looked.items() <= feared.evidence.items() and "a chance of 40%" in feared.reason
    calm = agent.propose(context(attention_diag=0.6, forecast=forecast()), start_knobs())
    assert not looked.keys() & calm.evidence.keys()


def test_only_an_undone_raise_of_the_rate_makes_a_ceiling() -> None:
    agent = LearningRateAgent()
    agent.learn({LEARNING_RATE: (1.0, 1.5)}, context(), kept=True)
    agent.learn({LEARNING_RATE: (1.0, 0.7)}, context(), kept=False)
    agent.learn({GRAD_CLIP: (100.0, 3.0)}, context(), kept=False)
    assert agent.state_dict() == LearningRateAgent().state_dict()


def test_once_aligned_spikes_are_left_to_the_clip_unless_the_loss_tends_up() -> None:
    knobs = {LEARNING_RATE: 1.0, GRAD_CLIP: GRAD_CLIP_OFF}
    late = {"grad_spikes": 0.3, "phase": TrainingPhase.REFINEMENT, "attention_diag": 0.6}
    for z, lowered in ((0.0, False), (1.5, True)):
        moves = LearningRateAgent().propose(context(loss_z=z, **late), knobs).moves
        assert (moves.get(LEARNING_RATE, 1.0) < 1.0) is lowered
        assert moves[GRAD_CLIP] < GRAD_CLIP_OFF
    without = LearningRateAgent().propose(context(loss_z=0.0, **late), {LEARNING_RATE: 1.0}).moves
    assert without[LEARNING_RATE] < 1.0, "where no clip can be turned"


def test_the_clip_tightens_under_spikes_and_is_released_after_them() -> None:
    agent = LearningRateAgent()
    spiky, quiet = context(grad_spikes=0.3), context()
    knobs = {LEARNING_RATE: 1.0, GRAD_CLIP: GRAD_CLIP_OFF}
    assert agent.propose(spiky, knobs).moves[GRAD_CLIP] < GRAD_CLIP_OFF
    assert GRAD_CLIP not in agent.propose(quiet, knobs).moves
    assert agent.propose(quiet, {**knobs, GRAD_CLIP: 3.0}).moves[GRAD_CLIP] > 3.0


def test_a_clip_that_is_on_is_let_go_where_the_host_clips_lower() -> None:
    agent, knobs = LearningRateAgent(), {LEARNING_RATE: 1.0, GRAD_CLIP: 3.0}
    spiky = context(grad_spikes=0.3, grad_norm_median=1.0)
    assert GRAD_CLIP not in agent.propose(spiky, knobs).moves
    assert agent.propose(replace(spiky, host_clip=3.0), knobs).moves[GRAD_CLIP] == 9.0
    assert agent.propose(replace(spiky, host_clip=3.1), knobs).moves.get(GRAD_CLIP) is None


def test_with_too_little_seen_nothing_is_proposed() -> None:
    for trends in ({}, {"total": falling(count=3)}):
        assert LearningRateAgent().propose(context(trends=trends), start_knobs()).moves == {}


@pytest.mark.parametrize("z", [-9.0, -3.0, 0.0])
@pytest.mark.parametrize("host", [1e-6, 1e-4])
@pytest.mark.parametrize("phase", TrainingPhase)
def test_a_model_found_trained_is_not_trained_at_more_than_the_hosts_rate(
    phase: TrainingPhase, host: float, z: float
) -> None:
    found = {"found_trained": True, "learning_rate": host, "update_ratio": 1e-5, "attention_diag": 0.7, "phase": phase}
    agent = LearningRateAgent()
    assert rate_wish(agent, loss_z=z, **found) <= 1.0
    assert rate_wish(agent, loss_z=-9.0, **found, multiplier=0.25) == pytest.approx(0.5), "what was cut comes back"
    proposal = agent.propose(context(loss_z=-9.0, **found), {LEARNING_RATE: 1.0})
    assert "the host's own rate, for a model trained before, allows" in proposal.reason
    assert rate_wish(LearningRateAgent(), loss_z=z, **found | {"found_trained": False}) > 1.0 or z == 0.0


def test_a_model_found_trained_keeps_under_the_usual_rate_too() -> None:
    hot = {"found_trained": True, "learning_rate": MAX_RATE, "phase": TrainingPhase.REFINEMENT}
    assert rate_wish(LearningRateAgent(MAX_RATE), loss_z=-9.0, multiplier=0.4, **hot) == pytest.approx(0.5)


def noam(step: int, peak: float = 1e-2, warm_up: int = 1000) -> float:
    return peak * min(step / warm_up, (warm_up / step) ** 0.5)


def follow(agent: LearningRateAgent, rates: list[float], multiplier: float, **seen: float) -> list[float]:
    """The rates used, one a decision, under a host whose rate is ``rates``."""
    used = []
    for rate in rates:
        multiplier = rate_wish(agent, multiplier, learning_rate=rate, **seen)
        used.append(rate * multiplier)
    return used


@pytest.mark.parametrize("phase", TrainingPhase)
def test_a_warm_up_does_not_carry_the_rate_past_what_is_usual(phase: TrainingPhase) -> None:
    agent = LearningRateAgent(MAX_RATE)
    used = follow(agent, [noam(step, MAX_RATE) for step in range(10, 3000, 10)], 8.0, loss_z=-1.5, phase=phase)
    climbing = [rate for step, rate in zip(range(10, 3000, 10), used, strict=True) if step < 500]
    assert max(climbing) <= 1.06 * MAX_RATE / 2
    # Beyond that it is the host's own rate.
    assert max(used) <= 1.06 * MAX_RATE


def test_a_warm_up_does_not_carry_the_rate_back_to_one_that_hurt() -> None:
    agent = LearningRateAgent(1e-2)
    agent.learn({LEARNING_RATE: (2.0, 4.0)}, context(learning_rate=1e-3), kept=False)
    used = follow(agent, [1e-3 * 1.03**n for n in range(12)], 2.5, loss_z=-1.5)
    assert max(used) <= 1.06 * 0.75 * 4e-3


def test_what_the_search_itself_has_come_to_is_not_taken_for_the_schedules_doing() -> None:
    agent = LearningRateAgent(MAX_RATE)
    assert follow(agent, [MAX_RATE / 8] * 5, 7.5, loss_z=-1.5) == [MAX_RATE / 8 * 7.5] * 5


def test_where_the_hosts_schedule_eases_the_rate_the_multiplier_stays() -> None:
    flat = {"phase": TrainingPhase.CONVERGENCE, "loss_z": 0.0}
    rates = [noam(step, 1e-3) for step in range(1000, 400_000, 10)]
    used = follow(LearningRateAgent(), rates, 4.0, **flat)
    # At first its decay is slower than ours would be; from then on it is the only one.
    assert used[-1] / used[1000] == pytest.approx(rates[-1] / rates[1000])
    assert used[-1] > rates[-1] / 4


def test_on_an_endless_plateau_the_rate_falls_about_as_the_inverse_square_root_of_the_decisions() -> None:
    agent, knobs = LearningRateAgent(), start_knobs()
    flat = context(phase=TrainingPhase.CONVERGENCE, loss_z=0.0)
    at = {}
    for decision in range(1, 10_001):
        knobs |= agent.propose(flat, knobs).moves
        at[decision] = knobs[LEARNING_RATE]
    assert at[50] < 0.5  # soon at first
    for early, late in ((100, 1_000), (1_000, 10_000)):
        assert 0.4 < math.log(at[early] / at[late]) / math.log(late / early) < 0.65


# guided attention


@settings(max_examples=60)
@given(shares, st.floats(0.005, 20), shares)
def test_the_guided_weight_moves_toward_its_target_and_not_past(diag: float, weight: float, certainty: float) -> None:
    supervisor = DynamicAttentionSupervisor(4.5)
    agent = GuidedAttentionAgent(supervisor)
    seen = context(attention_diag=diag, certainty=certainty)
    moved = agent.propose(seen, {GUIDED_WEIGHT: weight, GUIDED_SIGMA: 0.4}).moves[GUIDED_WEIGHT]
    target = supervisor.weight(diag)
    assert min(weight, target) * (1 - 1e-9) <= moved <= max(weight, target) * (1 + 1e-9)
    knob = KNOBS[GUIDED_WEIGHT]
    assert abs(knob.move(weight, moved)) <= 0.1 * abs(knob.move(weight, target)) + 1e-9


@settings(max_examples=30)
@given(shares, st.floats(0.005, 20))
def test_from_any_start_four_fifths_of_the_way_take_twenty_decisions(diag: float, start: float) -> None:
    agent, seen, weight = GuidedAttentionAgent(DynamicAttentionSupervisor()), context(attention_diag=diag), start
    for _ in range(20):
        weight = agent.propose(seen, {GUIDED_WEIGHT: weight}).moves[GUIDED_WEIGHT]
    target = DynamicAttentionSupervisor().weight(diag)
    assert abs(weight - target) <= 0.2 * abs(start - target) + 1e-9


def test_doubt_shortens_the_step() -> None:
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor(4.5))
    knobs = {GUIDED_WEIGHT: 4.5, GUIDED_SIGMA: 0.4}
    sure, unsure = (agent.propose(context(certainty=c), knobs).moves[GUIDED_WEIGHT] for c in (1.0, 0.2))
    assert 4.5 < unsure < sure


def test_the_weakest_side_is_named() -> None:
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor(4.5))
    seen = context(attention=report(0.2, diagonality=0.9, focus=0.8, coverage=0.2))
    assert "weakest side: coverage" in agent.propose(seen, start_knobs()).reason


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (0.0, "is off"),
        (KNOBS[GUIDED_WEIGHT].low, "is off"),
        (0.025, "too weak"),
        (0.25, "too weak"),
        (1.0, ""),
        (4.5, ""),
        (20.0, "too strong"),
    ],
)
def test_a_guided_weight_far_outside_the_law_is_called_so(weight: float, said: str) -> None:
    reason = GuidedAttentionAgent(DynamicAttentionSupervisor()).propose(context(), {GUIDED_WEIGHT: weight}).reason
    assert [word for word in ("is off", "too weak", "too strong") if word in reason] == ([said] if said else [])


def test_without_a_measurement_the_guide_stays() -> None:
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor(4.5))
    assert agent.propose(context(attention=None), start_knobs()).moves == {}


def test_the_guide_is_drawn_in_as_the_chance_of_losing_the_alignment_grows() -> None:
    agent = GuidedAttentionAgent(DynamicAttentionSupervisor(4.5))
    wishes = [
        agent.propose(context(attention_diag=0.6, forecast=forecast(alignment_loss=chance)), start_knobs())
        for chance in (0.0, 0.2, 0.8)
    ]
    weights = [wish.moves[GUIDED_WEIGHT] for wish in wishes]
    assert weights[0] < weights[1] < weights[2]
    assert "lost" not in wishes[0].reason and "80%" in wishes[2].reason


# loss balance


@pytest.mark.parametrize(("phase", "mel", "gate"), [(0, 1.0, 0.5), (1, 1.0, 1.0), (2, 1.2, 1.0), (3, 1.5, 1.0)])
def test_the_weights_settle_where_the_phase_wants_them(phase: int, mel: float, gate: float) -> None:
    agent = LossBalanceAgent(AdaptiveLossController())
    seen = context(phase_posterior=tuple(float(i == phase) for i in range(4)))
    knobs = start_knobs()
    for _ in range(100):
        knobs |= agent.propose(seen, knobs).moves
    assert knobs[MEL_WEIGHT] == pytest.approx(mel, rel=1e-3) and knobs[GATE_WEIGHT] == pytest.approx(gate, rel=1e-3)


@pytest.mark.parametrize("wanted", [0.01, 0.05, 0.5, 2.0])
def test_the_tversky_weight_comes_to_its_setting_once_aligned_and_goes_when_the_alignment_is_lost(
    wanted: float,
) -> None:
    config = BrainConfig(tversky_weight=wanted)
    losses = AdaptiveLossController(tversky_weight=wanted)
    agent = next(a for a in build_agents(config, losses) if a.name == "loss_balance")
    knobs = start_knobs()
    for posterior, end in (((0.0, 0.0, 1.0, 0.0), wanted), ((1.0, 0.0, 0.0, 0.0), TVERSKY_OFF)):
        seen, sizes = context(phase_posterior=posterior), []
        for _ in range(100):
            new = agent.propose(seen, knobs).moves[TVERSKY_WEIGHT]
            sizes.append(abs(KNOBS[TVERSKY_WEIGHT].move(knobs[TVERSKY_WEIGHT], new)))
            knobs[TVERSKY_WEIGHT] = KNOBS[TVERSKY_WEIGHT].limit(knobs[TVERSKY_WEIGHT], new)
        assert knobs[TVERSKY_WEIGHT] == pytest.approx(end)
        assert max(sizes) < 0.12 and sizes[-1] == 0.0
