"""A vote on the joint move, by voters of which some may be wrong in any way: NaN, extremes, stale votes, in league.

The voters are the agents and independent assessors. All vote in one process, on one count that is trusted; ranks of a
data-parallel run are merged before that, in ``consensus``. Of n voters, f of them arbitrary ("liars"):

| what f liars cannot do | holds from | why |
|---|---|---|
| bring a value out of the range of the honest ones | n >= 2f + 1 | f are cut off at each end (Dolev et al. 1986) |
| push a move through that no majority of the honest wants | n >= 2f + 1 | yes must exceed (votes + f) / 2 |
| block one that all the honest want | n >= 3f + 1, threshold <= 1 - f/n | the honest alone fill the quorum |
| keep a value from being settled, by having no say | n >= 3f + 1 | 2f + 1 honest ones are left |
| make processes come to different results | n >= 3f + 1 | Lamport, Shostak and Pease 1982 |

So with the default threshold, 0.67, four voters survive one liar in all of this. Three survive one in the first two
lines only: what comes out is a move between those of two honest voters, and only if both want it. But one no, or one
that has no say, blocks it, and a liar is never muted, as the two left could not tell a second. Two survive none.

Cutting off f at each end lost nothing against the median and is steadier: with two camps of voters the median jumps
from one to the other with a single vote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tts_brain.coordination.trimmed import trimmed_mean
from tts_brain.types import KNOBS

# Beyond this there are no moves (``Knob.move``) of any knob; the bound of feedback.kalman.
_LARGEST_MOVE = 20.0
# A voter out of range more often than once in three gets there, and three in a row are enough.
_STRIKE, _CLEAN, _MUTE_AT, _MOST_STRIKES = 2, 1, 6, 12


@dataclass(frozen=True, slots=True)
class Ballot:
    """What one voter says.

    Args:
        voter: its name.
        step: the optimizer step that it looked at; one of another step than the count's is stale.
        approve: of the joint move as a whole, True or False; None abstains.
        moves: by knob, the move (``Knob.move``) that it would make: 0 holds. Knobs that it has no say on are left out.
        reason: why it says no or wants less, for people; the count does not read it.
    """

    voter: str
    step: int
    approve: bool | None
    moves: Mapping[str, float]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a vote came to.

    Args:
        approved: the joint move has its quorum.
        moves: by knob, the move that the voters settle on, whether approved or not. A knob that too few had a
            say on is left out: nothing can be said about it that liars could not have said alone.
        yes, no, needed: votes counted, and how many yes it takes.
        muted: voters that are not listened to after this count, in their order.
        notes: lines for the journal: what was refused or out of range, who was muted and who is heard again.
    """

    approved: bool
    moves: Mapping[str, float]
    yes: int
    no: int
    needed: int
    muted: tuple[str, ...]
    notes: tuple[str, ...]


class Electorate:
    """Counts votes and remembers who was out of range.

    Out of range is a ballot that cannot be counted (stale, twice, not finite, no knob of ours), or a value farther from
    those that were kept than one whole move, ``log(max_ratio)`` of the knob. Honest voters within one whole move of
    each other never are, whatever liars say. A voter that is out of range more than once in three counts is muted; its
    ballots are still looked at, and once they have been in range for a while it is heard again. At most f are muted at
    a time, and never so many that the bound above fails for those left.

    Args:
        voters: their names, each once.
        threshold: share of the votes that must be yes, in (0.5, 1].
        faulty: f above; by default 1 for three voters, else the most that n >= 3f + 1 allows.
        between_processes: the count is made in several processes that must agree: n >= 3f + 1 is asked for.

    Raises:
        ValueError: on a name twice, a threshold out of range, or too few voters for ``faulty``.
    """

    def __init__(
        self,
        voters: Sequence[str],
        threshold: float = 0.67,
        faulty: int | None = None,
        *,
        between_processes: bool = False,
    ) -> None:
        self.voters = tuple(voters)
        n = len(self.voters)
        if len(set(self.voters)) != n:
            raise ValueError(f"voters={self.voters} names one twice; write each once")
        if not 0.5 < threshold <= 1.0:
            raise ValueError(f"threshold={threshold} is out of range; write a share above 0.5, up to 1")
        self.threshold = threshold
        self.faulty = (n - 1) // 3 if faulty is None else faulty
        if faulty is None and n == 3 and not between_processes:
            self.faulty = 1
        fewest = (3 if between_processes else 2) * self.faulty + 1
        if self.faulty < 0 or n < fewest:
            raise ValueError(f"faulty={self.faulty} of {n} voters; write 0 or more, and have {fewest} voters or more")
        self._most_muted = min(self.faulty, n - fewest)
        self._strikes = dict.fromkeys(self.voters, 0)
        self._muted: set[str] = set()

    @property
    def muted(self) -> frozenset[str]:
        """Voters that are not listened to now."""
        return frozenset(self._muted)

    @property
    def blocked_by(self) -> int:
        """How many voters it takes to block a move that all others want."""
        return len(self.voters) - self._needed(len(self.voters), self.faulty) + 1

    def count(self, step: int, ballots: Iterable[Ballot]) -> Outcome:
        """Count the votes of one decision. The order of the ballots does not matter.

        Args:
            step: optimizer step of the decision.
            ballots: at most one of each voter; voters may stay away.
        """
        notes: list[str] = []
        sound, refused = self._sort(step, list(ballots), notes)
        heard = {voter: ballot for voter, ballot in sound.items() if voter not in self._muted}
        # Who sends what cannot be counted is one of the f, so fewer are left among the others.
        liars = max(self.faulty - len(refused - self._muted), 0)
        moves, kept = _settle([b.moves for b in heard.values()], liars)
        wide = {voter: _out_of_range(ballot.moves, kept) for voter, ballot in sound.items()}
        notes += [f"{voter}: {wide[voter]}" for voter in self.voters if wide.get(voter)]
        self._remember({voter: voter in refused or bool(wide[voter]) for voter in refused | set(sound)}, notes)
        votes = [ballot.approve for ballot in heard.values() if ballot.approve is not None]
        needed, yes = self._needed(len(votes), liars), sum(votes)
        enough = 2 * len(votes) > len(self.voters) - len(self._muted)
        if not enough:
            notes.append(f"{len(votes)} of {len(self.voters)} voted: too few to approve")
        muted = tuple(voter for voter in self.voters if voter in self._muted)
        return Outcome(enough and yes >= needed, moves, yes, len(votes) - yes, needed, muted, tuple(notes))

    def _needed(self, votes: int, liars: int) -> int:
        # 0.67 · 100 is a little more than 67 in floating point.
        return max(math.ceil(self.threshold * votes - 1e-9), (votes + liars) // 2 + 1)

    def _sort(self, step: int, ballots: list[Ballot], notes: list[str]) -> tuple[dict[str, Ballot], set[str]]:
        """The ballots that can be counted, by voter in the voters' order, and the voters whose cannot."""
        times = Counter(str(ballot.voter) for ballot in ballots)  # a liar's name may be anything
        sound: dict[str, Ballot] = {}
        faults: dict[str, str] = {}
        for ballot in ballots:
            voter = str(ballot.voter)
            fault = "votes twice" if times[voter] > 1 else _fault(ballot, step)
            if fault:
                faults[voter] = fault
            else:
                sound[voter] = ballot
        known = [voter for voter in self.voters if voter in faults]
        notes += [f"{voter}: {faults[voter]}; its vote is refused" for voter in known]
        notes += [f"{stranger!r} is no voter here" for stranger in sorted(set(times) - set(self.voters))]
        return {voter: sound[voter] for voter in self.voters if voter in sound}, set(known)

    def _remember(self, struck: Mapping[str, bool], notes: list[str]) -> None:
        """Fold one count into the strikes, and mute or hear again."""
        for voter, out in struck.items():
            strikes = self._strikes[voter] + (_STRIKE if out else -_CLEAN)
            self._strikes[voter] = min(max(strikes, 0), _MOST_STRIKES)
        for voter in self.voters:
            if voter in self._muted and self._strikes[voter] == 0:
                self._muted.remove(voter)
                notes.append(f"{voter} has been in range for a while: it is heard again")
        # The worst first, as there may be room for fewer than deserve it; sorted() keeps the voters' order.
        for voter in sorted(self.voters, key=lambda name: -self._strikes[name]):
            room = len(self._muted) < self._most_muted
            if voter not in self._muted and self._strikes[voter] >= _MUTE_AT and room:
                self._muted.add(voter)
                notes.append(f"{voter} was out of range again and again: muted until it is in range for a while")

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"strikes": dict(self._strikes), "muted": [voter for voter in self.voters if voter in self._muted]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``, all or nothing. Voters that are not here are left out, new ones begin afresh, so
        that an assessor can be switched on or off at a resume.

        Raises:
            ValueError: a part is missing, or is no state of a vote.
        """
        try:
            strikes, muted = dict(state["strikes"]), set(state["muted"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state of the vote is damaged ({type(error).__name__}: {error})") from error
        wrong = {k: v for k, v in strikes.items() if type(v) is not int or not 0 <= v <= _MOST_STRIKES}
        if wrong or not muted <= set(strikes):
            raise ValueError(f"state of the vote has strikes {strikes}, muted {muted}; write 0 to {_MOST_STRIKES}")
        muted &= set(self.voters)
        if len(muted) > self._most_muted:
            raise ValueError(f"state of the vote mutes {sorted(muted)}; at most {self._most_muted} can be muted here")
        self._strikes = {voter: strikes.get(voter, 0) for voter in self.voters}
        self._muted = muted


def _settle(
    wanted: Sequence[Mapping[str, float]], liars: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """By knob the value settled on, and the lowest and highest that were kept; knobs that too few have a say on not."""
    moves, kept = {}, {}
    for knob in KNOBS:
        values = [float(moves_of_one[knob]) for moves_of_one in wanted if knob in moves_of_one]
        if len(values) >= 2 * liars + 1:
            moves[knob], *ends = trimmed_mean(values, liars)
            kept[knob] = (ends[0], ends[1])
    return moves, kept


def _out_of_range(moves: Mapping[str, float], kept: Mapping[str, tuple[float, float]]) -> str:
    """A sentence on the first knob whose value is more than one whole move from those kept; else nothing."""
    for knob, (low, high) in kept.items():
        value, whole, scale = moves.get(knob, low), math.log(KNOBS[knob].max_ratio), KNOBS[knob].scale
        if not low - whole <= value <= high + whole:
            wants, least, most = (f"x{math.exp(move):.3g}" for move in (value, low, high))
            what = f"({knob} + {scale:g})" if scale else knob
            return f"wants {what} {wants}, where {least} to {most} were kept"
    return ""


def _fault(ballot: Ballot, step: int) -> str:
    """Why the ballot cannot be counted; else nothing. A ballot comes from anyone, so its types are looked at too."""
    if not isinstance(ballot.step, Integral) or ballot.step != step:
        return f"votes on step {ballot.step}, this is step {step}"
    if ballot.approve is not None and not isinstance(ballot.approve, bool):
        return f"says neither yes nor no but {ballot.approve!r}"
    if not isinstance(ballot.moves, Mapping):
        return f"has no moves but {ballot.moves!r}"
    for knob, value in ballot.moves.items():
        if knob not in KNOBS:
            return f"votes on {knob!r}, which is no knob"
        if not isinstance(value, Real) or not abs(value) <= _LARGEST_MOVE:
            return f"wants {knob} moved by {value!r}, within ±{_LARGEST_MOVE:g} are moves"
    return ""
