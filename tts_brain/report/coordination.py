"""How the agents settled on a decision, in words: the scores, what was played, simulated and voted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tts_brain.report.story import clean, number, number_text

Part = Mapping[str, Any]


def coordination_lines(record: Any) -> list[tuple[str, list[str]]]:
    """(title, lines) of each part of ``Decision.coordination`` as the journal has it; nothing for a decision without,
    as all were before there was coordination. What is no such record is left out."""
    parts = [
        ("Criteria", _criteria(_part(record, "criteria"))),
        ("Equilibrium", _equilibrium(_part(record, "equilibrium"))),
        ("Risk", _risk(_part(record, "risk"))),
        ("Vote", _vote(_part(record, "vote"))),
        ("Notes", _words(record.get("notes") if isinstance(record, Mapping) else None)),
    ]
    return [(title, lines) for title, lines in parts if lines]


def _part(record: Any, name: str) -> Part:
    found = record.get(name) if isinstance(record, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _words(value: Any) -> list[str]:
    return [clean(item) for item in value] if isinstance(value, list | tuple) else []


def _criteria(scores: Part) -> list[str]:
    return [
        f"{_name(name)} {number(_part(scores, name).get('score')):.2f}: {clean(_part(scores, name).get('reason', ''))}"
        for name in scores
    ]


def _equilibrium(one: Part) -> list[str]:
    shares, gains = _part(one, "shares"), _part(one, "gains")
    lines = []
    for agent, share in shares.items():
        terms = ", ".join(f"{_name(k)} {number_text(v)}" for k, v in _part(gains, agent).items())
        lines.append(
            f"{clean(agent)} plays {number(share):.0%} of its proposal" + (f"; worth: {terms}" if terms else "")
        )
    if one.get("kind"):
        sizes = f"; up to {number_text(one['candidates'])} candidates per agent" if "candidates" in one else ""
        lines.append(f"{clean(one['kind'])} equilibrium, {number_text(one.get('count'))} pure in all{sizes}")
    return lines


def _risk(risk: Part) -> list[str]:
    lines = [f"left out {clean(knob)}: {clean(why)}" for knob, why in _part(risk, "left_out").items()]
    if "draws" in risk:
        said = _part(risk, "probability")
        for name, what in (("divergence", "diverge"), ("alignment_loss", "lose the alignment")):
            if name == "alignment_loss" and risk.get("alignment") is False:
                continue  # there is none to lose
            moved, held = number(risk.get(name)), number(risk.get(f"{name}_held"))
            runs = f"; of runs, some {number(said[name]):.1%}" if name in said else ""
            lines.append(f"{moved:.1%} of {number_text(risk['draws'])} plays {what}, {held:.1%} if all is held{runs}")
        gain, worst = number(risk.get("gain")), number(risk.get("cvar"))
        lines.append(
            f"the loss falls by {gain:+.2f} noise widths more than if held, {worst:+.2f} in the worst twentieth"
        )
    if "size" in risk:
        size = number(risk["size"])
        verdict = "let through" if size == 1.0 else "held" if size == 0.0 else f"cut to {size:.0%}"
        lines.append(f"{verdict}: {number(risk.get('budget')):.1%} of the plays may go wrong by it")
    return lines


def _vote(vote: Part) -> list[str]:
    if not vote:
        return []
    voters = {name: _words(vote.get(name)) for name in ("yes", "no", "abstained", "muted")}
    lines = [f"{name}: {', '.join(who)}" for name, who in voters.items() if who]
    reasons, wanted = _part(vote, "reasons"), _part(vote, "wanted")
    for voter in dict.fromkeys([*reasons, *wanted]):
        less = f" wants {number(wanted[voter]):.0%} of what stirs" if voter in wanted else ""
        lines.append(clean(voter) + less + (f": {clean(reasons[voter])}" if voter in reasons else ""))
    refused = [clean(voter) + (f" ({clean(why)})" if why else "") for voter, why in _part(vote, "refused").items()]
    if refused:
        lines.append(f"said no to the whole move: {', '.join(refused)}")
    if "refused" in vote:
        lines.append("what calms was then voted on alone")
    settled = {clean(knob): number(share) for knob, share in _part(vote, "settled").items()}
    for share in dict.fromkeys(settled.values()):
        lines.append(f"settled on {share:.0%} of {', '.join(knob for knob in settled if settled[knob] == share)}")
    return [
        *lines,
        f"{'passed' if vote.get('approved') is True else 'no quorum'}, {number_text(vote.get('needed'))} yes needed",
    ]


def _name(word: Any) -> str:
    return clean(word).replace("_", " ")
