"""One decision's coordination as plain values, short enough to be written at every decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tts_brain.coordination.calibration import probabilities
from tts_brain.coordination.criteria import Criteria
from tts_brain.coordination.equilibrium import Equilibrium
from tts_brain.coordination.game import Game
from tts_brain.coordination.risk import Weighed
from tts_brain.coordination.vote import Ballot, Outcome

_DIGITS = 4


def record_of(
    scores: Criteria,
    one: Game,
    settled: Equilibrium,
    gains: Mapping[str, Mapping[str, float]],
    weighed: Weighed,
    ballots: Sequence[Ballot],
    outcome: Outcome,
    refused: Sequence[Ballot] = (),
) -> dict[str, Any]:
    """What ``tts-brain explain`` shows; numbers to four decimals, terms of 0 left out. Where nothing was to be moved,
    the scores alone. ``refused`` are the ballots on the whole move, where only what calms was voted on in the end."""
    record: dict[str, Any] = {
        "criteria": {name: {"score": _short(c.score), "reason": c.reason} for name, c in scores.by_name.items()}
    }
    if any(len(each) > 1 for each in one.shares):
        record["equilibrium"] = {
            "kind": settled.kind,
            "count": settled.pure_count,
            "candidates": max(len(each) for each in one.shares),
            "shares": {
                agent: each[at]
                for agent, each, at in zip(one.agents, one.shares, settled.play, strict=True)
                if len(each) > 1
            },
            "gains": {
                agent: {name: _short(gain) for name, gain in each.items() if _short(gain)}
                for agent, each in gains.items()
            },
        }
        record["risk"] = {"size": weighed.size, "budget": _short(weighed.budget)}
        if weighed.left_out:
            record["risk"]["left_out"] = dict(weighed.left_out)
        if weighed.outlook is not None:
            plays = asdict(weighed.outlook)
            record["risk"] |= {name: v if isinstance(v, bool) else _short(v) for name, v in plays.items()}
            said = probabilities(weighed.outlook)
            record["risk"]["probability"] = {name: _short(value) for name, value in said.items()}
        record["vote"] = _vote(ballots, outcome, weighed.moves)
        if refused:
            record["vote"]["refused"] = {b.voter: b.reason for b in refused if b.approve is False}
    if outcome.notes:
        record["notes"] = list(outcome.notes)
    return record


def _vote(ballots: Sequence[Ballot], outcome: Outcome, joint: Mapping[str, float]) -> dict[str, Any]:
    """Who said what. Only where it differs from a yes to the whole joint move: ``reasons`` by voter, the share of it
    ``wanted`` by voter, and the share ``settled`` on by knob."""
    said = {name: [b.voter for b in ballots if b.approve is answer] for name, answer in _ANSWERS.items()}
    vote: dict[str, Any] = {name: voters for name, voters in said.items() if voters}
    if outcome.muted:
        vote["muted"] = list(outcome.muted)
    shares = {b.voter: min(_shares(joint, b.moves).values(), default=1.0) for b in ballots}
    reasons = {b.voter: b.reason for b in ballots if b.reason and (b.approve is False or shares[b.voter] < 1.0)}
    wanted = {voter: _short(share) for voter, share in shares.items() if share < 1.0}
    settled = _shares(joint, {**dict.fromkeys(joint, 0.0), **outcome.moves}) if outcome.approved else {}
    parts = {
        "reasons": reasons,
        "wanted": wanted,
        "settled": {knob: _short(share) for knob, share in settled.items() if _short(share) != 1.0},
    }
    vote |= {name: part for name, part in parts.items() if part}
    return vote | {"needed": outcome.needed, "approved": outcome.approved}


def _shares(joint: Mapping[str, float], moves: Mapping[str, float]) -> dict[str, float]:
    """By knob, how much of its joint move is in ``moves``; knobs that are not in both, or stay, are left out."""
    return {knob: moves[knob] / move for knob, move in joint.items() if move and knob in moves}


_ANSWERS = {"yes": True, "no": False, "abstained": None}


def _short(value: float) -> float:
    return round(value, _DIGITS)
