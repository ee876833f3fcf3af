"""The records that travel round the loop. Each is frozen: a decision once taken stays as it was.

Units used everywhere: a *step* is one optimizer step; a *frame* is one decoder step (``reduction_factor``
mel frames); losses are the host's raw values, before any weight of ours, NaN kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import exp, inf, log
from types import MappingProxyType
from typing import Any

_EMPTY: Mapping[str, float] = MappingProxyType({})


class TrainingPhase(Enum):
    """How far the alignment has come, by ``attention_diag``. The value is the name in files."""

    PRE_ALIGNMENT = "pre_alignment"
    ALIGNMENT_LEARNING = "alignment_learning"
    REFINEMENT = "refinement"
    CONVERGENCE = "convergence"

    @property
    def index(self) -> int:
        """0 for PRE_ALIGNMENT … 3 for CONVERGENCE."""
        return list(TrainingPhase).index(self)

    @classmethod
    def from_attention_diag(cls, attention_diag: float) -> TrainingPhase:
        """The bare threshold rule (0.1, 0.5, 0.7) that the classifier is anchored to."""
        return list(cls)[sum(attention_diag >= limit for limit in PHASE_LIMITS)]


PHASE_LIMITS = (0.1, 0.5, 0.7)
OSCILLATION_ALARM = 3.0


class Mode(Enum):
    """What the brain may touch. The value is what the user writes."""

    OFF = "off"
    OBSERVE = "observe"
    ASSIST = "assist"
    FULL = "full"


class Verdict(Enum):
    """What came of a decision; the value is the sentence shown to people."""

    ACCEPT = "moved the knobs"
    HOLD = "held everything where it was"
    UNDO = "took back the last move"
    ROLL_BACK = "went back to a snapshot"
    STOP = "stopped rolling back: only you can fix this"


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """Alignment quality of a few utterances, each field the mean over them (DESIGN.md, metrics).

    All fields lie in [0, 1] except ``skips``, ``repeats`` (counts per utterance) and ``longest_dwell`` (frames).
    """

    diagonality: float
    focus: float
    coverage: float
    attention_diag: float
    entropy: float
    skips: float
    repeats: float
    longest_dwell: float
    end_reached: float


@dataclass(frozen=True, slots=True)
class StopTokenCounts:
    """Soft confusion counts of the stop token as shares of their sum, hits and errors, each in [0, 1].

    Frames that are rightly said to go on count nowhere, as they outnumber all else a hundredfold.
    """

    true_positive: float
    false_positive: float
    false_negative: float


@dataclass(frozen=True, slots=True)
class Observation:
    """What one optimizer step showed.

    Args:
        step: optimizer steps done so far in this run, the first is 1.
        losses: raw host losses by name; ``total`` is required, ``mel``, ``gate``, ``guided`` where the host has them.
            ``guided`` is in normalised units: mean penalty per decoder frame, in [0, 1].
        grad_norm: global L2 norm before clipping; None when the host does not say.
        learning_rate: the host's own rate at this step, before our multiplier.
        update_ratio: ``|Δw| / |w|`` of the step, median over the watched tensors; None when not measured.
        attention: None on steps where it was not measured.
        stop: None when the host has no stop token or it was not measured.
        text_length: mean tokens per utterance in the batch.
        skipped: True when a non-finite gradient was kept from the weights at this step.
    """

    step: int
    losses: Mapping[str, float]
    grad_norm: float | None = None
    learning_rate: float | None = None
    update_ratio: float | None = None
    attention: AttentionReport | None = None
    stop: StopTokenCounts | None = None
    text_length: float | None = None
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Knob:
    """One thing the brain may turn, with its limits.

    Args:
        name: the name in decisions and files.
        unit: what a value of 1 means, in words.
        neutral: the value at which the host runs exactly as without the brain; None when only the host knows it.
        low, high: hard bounds, both positive and finite.
        max_ratio: most that one decision may multiply or divide ``value + scale`` by; above 1.
        scale: a value far below it is as good as off, so that from there on only differences count; 0 or more. A weight
            that starts at next to nothing would else take as many steps for nothing as for something.
    """

    name: str
    unit: str
    neutral: float | None
    low: float
    high: float
    max_ratio: float
    scale: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 < self.low < self.high < inf) or not self.max_ratio > 1.0 or not 0.0 <= self.scale < inf:
            raise ValueError(
                f"knob {self.name!r}: low={self.low}, high={self.high}, max_ratio={self.max_ratio}, "
                f"scale={self.scale}; write 0 < low < high, max_ratio > 1 and scale >= 0"
            )

    def move(self, old: float, new: float) -> float:
        """Size and direction of a move: log of the ratio of ``value + scale``. Moves in a row add up."""
        return log((new + self.scale) / (old + self.scale))

    def moved(self, old: float, move: float) -> float:
        """Inverse of ``move``: the value after it, not yet limited."""
        return (old + self.scale) * exp(move) - self.scale

    def approach(self, current: float, target: float, share: float) -> float:
        """The value after a ``share`` in (0, 1] of the move from ``current`` to ``target``, not yet limited."""
        return self.moved(current, share * self.move(current, target))

    def limit(self, current: float, wanted: float) -> float:
        """``wanted``, brought within the bounds and within one whole move, ``log(max_ratio)``, of ``current``.

        A value that is not finite changes nothing: the current value (bounded) comes back. A current value that is not
        a number counts as the neutral one, or as ``low`` where only the host knows that.
        """
        if current != current:
            current = self.low if self.neutral is None else self.neutral
        current = min(max(current, self.low), self.high)
        if not -inf < wanted < inf:
            return current
        here, there = current + self.scale, wanted + self.scale
        nearest = min(max(there, here / self.max_ratio), here * self.max_ratio) - self.scale
        # What lies within reach comes back as it was said, not as it rounds on the way.
        nearest = wanted if here / self.max_ratio <= there <= here * self.max_ratio else nearest
        return min(max(nearest, self.low), self.high)


LEARNING_RATE = "learning_rate"
GUIDED_WEIGHT = "guided_weight"
GUIDED_SIGMA = "guided_sigma"
FORWARD_SUM_WEIGHT = "forward_sum_weight"
MEL_WEIGHT = "mel_weight"
GATE_WEIGHT = "gate_weight"
TVERSKY_WEIGHT = "tversky_weight"
TVERSKY_ALPHA = "tversky_alpha"
TVERSKY_BETA = "tversky_beta"
GRAD_CLIP = "grad_clip"

# What the guide's diagonal is drawn over.
OVER_FRAMES, OVER_SPEECH = "frames", "speech"

GRAD_CLIP_OFF = 100.0
FORWARD_SUM_OFF = 1e-3
TVERSKY_OFF = 1e-3

KNOBS: Mapping[str, Knob] = MappingProxyType(
    {
        knob.name: knob
        for knob in (
            Knob(LEARNING_RATE, "multiplier of the host's rate", 1.0, 1 / 64, 64.0, 2.0),
            # Normalised: loss per unit of mean penalty per frame. Host weight = value * tokens per utterance.
            Knob(GUIDED_WEIGHT, "host weight / mean text length", None, 0.005, 20.0, 1.16, 4.5),
            Knob(GUIDED_SIGMA, "width of the guide, relative to the text", None, 0.1, 0.6, 1.15),
            # At FORWARD_SUM_OFF the term is not made at all.
            Knob(
                FORWARD_SUM_WEIGHT, "loss per nat of a token's path", FORWARD_SUM_OFF, FORWARD_SUM_OFF, 1.0, 1.16, 0.05
            ),
            Knob(MEL_WEIGHT, "multiplier of the spectrogram losses", 1.0, 0.25, 4.0, 1.25),
            Knob(GATE_WEIGHT, "multiplier of the stop-token loss", 1.0, 0.1, 4.0, 1.25),
            # At TVERSKY_OFF the term is not made at all; the stop token's own loss has weight 1.
            Knob(TVERSKY_WEIGHT, "Tversky loss beside the stop token's own", TVERSKY_OFF, TVERSKY_OFF, 2.0, 1.25, 1.0),
            Knob(TVERSKY_ALPHA, "cost of a false stop", None, 0.05, 0.95, 1.25),
            Knob(TVERSKY_BETA, "cost of a missed stop", None, 0.05, 0.95, 1.25),
            # Above GRAD_CLIP_OFF * median nothing is ever clipped by us.
            Knob(GRAD_CLIP, "clip at this many median gradient norms", GRAD_CLIP_OFF, 1.5, GRAD_CLIP_OFF, 3.0),
        )
    }
)


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an adapter can show and turn. A host without attention (FastSpeech) or with a second optimizer (VITS)
    says so here; the core never asks for the host's name.

    Args:
        host: name for people and files.
        losses: names that ``Observation.losses`` may hold.
        knobs: names from ``KNOBS`` that the adapter can turn.
        alignment: ``attention``, ``durations``, ``monotonic_search`` or ``none``.
        stop_token: the model decides by itself when to stop.
        optimizers: how many step per update (a GAN has 2).
        grad_clip: L2 norm that the host cuts gradients down to by itself, above 0; None where it does not.
    """

    host: str
    losses: tuple[str, ...] = ("total",)
    knobs: tuple[str, ...] = ()
    alignment: str = "none"
    stop_token: bool = False
    optimizers: int = 1
    grad_clip: float | None = None

    def __post_init__(self) -> None:
        allowed = ("attention", "durations", "monotonic_search", "none")
        if self.alignment not in allowed:
            raise ValueError(f"alignment={self.alignment!r} is unknown; write one of {', '.join(allowed)}")
        unknown = sorted(set(self.knobs) - set(KNOBS))
        if unknown:
            raise ValueError(f"unknown knobs {unknown}; known are {', '.join(KNOBS)}")
        if self.grad_clip is not None and not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip={self.grad_clip}; write a positive norm, or None for a host without one")
        if "total" not in self.losses:
            raise ValueError(f"losses={self.losses} lacks 'total', the one loss every host has")


@dataclass(frozen=True, slots=True)
class Trend:
    """Level and direction of one series over the last ``count`` values.

    Args:
        level: mean of the newest quarter of the window, in the series' units.
        slope: robust change per step (Theil-Sen).
        noise: standard deviation of the step-to-step noise, from the finest wavelet detail.
        z: change over the window in units of its standard error; below -2 it surely falls, above 2 it surely rises.
        count: finite values the trend rests on; 0 means that all else is NaN or 0.
    """

    level: float
    slope: float
    noise: float
    z: float
    count: int


@dataclass(frozen=True, slots=True)
class Scales:
    """One series at several scales. Every field is finite, whatever the series.

    Args:
        count: finite values it rests on, at most 100; with 0 all else is 0.
        level: slow part, in the series' units, as it was ``lag`` steps ago: the coarsest smooth, which on a straight
            line is exact.
        slope: change of the slow part per step, in the series' units.
        lag: steps that ``level`` lies back; 0 when there are too few values to smooth, about 10 at 100 values.
        noise: standard deviation of the step-to-step noise, in the series' units.
        energy: mean square of the details of periods 2-4, 4-8, 8-16 and 16-32 values (those that the count allows),
            over what white noise of ``noise`` would give: 1 is plain noise. In [0, 1e6].
        period: of the strongest oscillation, significant or not, in steps (at least 2 values); 0 below 30 values.
        oscillation: -log10 of the chance that noise alone (white, or correlated up to 0.5 between neighbours, round a
            decay or a jump) seems to oscillate as much; in [0, 6], above 3 extrapolated. 0 below
            30 values. Shifting or scaling the series does not change it.
    """

    count: int
    level: float
    slope: float
    lag: float
    noise: float
    energy: tuple[float, ...]
    period: float
    oscillation: float

    @property
    def oscillates(self) -> bool:
        """Noise alone would say so in at most about one decision in a thousand."""
        return self.oscillation >= OSCILLATION_ALARM


@dataclass(frozen=True, slots=True)
class FilterReport:
    """What the Kalman filter of one metric knows after one update. Every field is finite.

    Args:
        step: optimizer step of the update.
        level, level_std: in the metric's units, without the noise of one value.
        slope, slope_std: change per step now, in the metric's units. Falling is negative, whichever is better.
        noise: standard deviation of one value about the level, in the metric's units.
        surprise: innovation over its predicted standard deviation, above 0 for a value higher than expected; 0 when
            nothing was seen at this step, and within ±1e6.
        shift: cumulative sum of the innovations on one side, signed, within ±7: how sure a lasting change is.
        changed: the sum reached its limit at this step: a spike does not stay, this did.
        count: usable values so far.
    """

    step: int
    level: float
    level_std: float
    slope: float
    slope_std: float
    noise: float
    surprise: float
    shift: float
    changed: bool
    count: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """What the temporal model expects, from the newest observations.

    Args:
        horizons: steps ahead, rising; all fields below have one entry for each.
        loss: quantiles (0.1, 0.5, 0.9) of the loss that moves are judged by (the median of the five values up to then),
            in its units.
        attention_diag: the same of the smoothed ``attention_diag``, in [0, 1]; (0, 0.5, 1) while none was measured.
        divergence: probability that a run that has not diverged yet will have by then.
        alignment_loss: probability that an alignment that is there (best at least 0.3, now not under half of it) is
            lost by then; 0 without one.
        looked_at: (step, share) of the observations that the model's attention rested on most, the largest first.
    """

    horizons: tuple[int, ...]
    loss: tuple[tuple[float, float, float], ...]
    attention_diag: tuple[tuple[float, float, float], ...]
    divergence: tuple[float, ...]
    alignment_loss: tuple[float, ...]
    looked_at: tuple[tuple[int, float], ...]

    @property
    def evidence(self) -> dict[str, float]:
        """The step that the model's attention rested on most and its share, for a decision that hangs on a forecast.

        Rounded, as the last digits hang on the loss's unit, and no record of a decision may.
        """
        step, share = self.looked_at[0] if self.looked_at else (0, 0.0)
        return {"looked_at_step": float(step), "looked_at_share": round(share, 3)}


@dataclass(frozen=True, slots=True)
class TrainingContext:
    """All that agents may look at.

    Args:
        step: optimizer step of the newest observation.
        phase: most probable phase.
        phase_posterior: probabilities of the four phases, in order; they sum to 1.
        certainty: 1 minus the normalised entropy of the posterior, in [0, 1].
        trends: by loss name, plus ``grad_norm`` (its logarithm) and ``attention_diag``; of what has no finite value in
            the window there is none. The judged loss, here and below, is without what it owes to the length of the
            texts (``context.lengths``).
        attention: smoothed report; None until first measured.
        stable: the noise of the judged loss, over the height that it has come down from since attention was first
            measured, is under ``stability_threshold``. For people: no decision rests on it.
        grad_spikes: share of the window's gradient norms above three medians, in [0, 1].
        grad_norm_median: over the window, of those that are finite; NaN before the first.
        nonfinite_run: how many observations in a row were not finite, up to now: loss, gradient, or a step left out.
        nonfinite_losses: of them, how many in a row up to now had a loss that was not finite.
        learning_rate: the host's newest rate; NaN when unknown.
        update_ratio: newest ``|Δw| / |w|``; NaN when unknown.
        best_attention_diag: best smoothed value so far, 0 before the first.
        text_length: running mean of tokens per utterance; NaN when unknown.
        stop_errors: smoothed (false positive, false negative) shares of the stop token (``StopTokenCounts``); None when
            unknown.
        left_out: share of the window's steps without a finite gradient, in [0, 1].
        found_trained: ``attention_diag`` was 0.5 or more at the first measurements already, and the alignment has not
            been lost since: the model was trained before, and this run goes on with it.
        scales: by name, the judged loss (``mel``, or ``total`` where there is none) at several scales.
        filtered: by metric, what its Kalman filter knows: ``loss`` (the one that moves are judged by), ``grad_norm``
            (its natural logarithm) and ``attention_diag``; those seen so far.
        effects: by metric, then by knob: (mean, standard deviation) of the change in the metric's slope per step that a
            move of the knob by a factor of e makes, in the filter's latent units (logit for ``attention_diag``). Knobs
            never turned are left out.
        forecast: None while too little has been seen.
        host_clip: norm that the host cuts gradients down to by itself, in the unit of ``grad_norm_median``; None where
            it does not.
    """

    step: int
    phase: TrainingPhase
    phase_posterior: tuple[float, float, float, float]
    certainty: float
    trends: Mapping[str, Trend]
    attention: AttentionReport | None
    stable: bool
    grad_spikes: float
    grad_norm_median: float
    nonfinite_run: int
    nonfinite_losses: int
    learning_rate: float
    update_ratio: float
    best_attention_diag: float
    text_length: float
    stop_errors: tuple[float, float] | None = None
    scales: Mapping[str, Scales] = field(default_factory=dict)
    filtered: Mapping[str, FilterReport] = field(default_factory=dict)
    effects: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    forecast: Forecast | None = None
    left_out: float = 0.0
    found_trained: bool = False
    host_clip: float | None = None


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one agent would like, and why. ``moves`` maps knob names to the values wanted, before limits."""

    agent: str
    moves: Mapping[str, float]
    reason: str
    evidence: Mapping[str, float] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(f"proposal of {self.agent!r} has no reason; say in one sentence why")


@dataclass(frozen=True, slots=True)
class Decision:
    """One turn of the loop, also when nothing moved.

    Args:
        step: optimizer step at which it was taken.
        verdict: what came of it.
        phase: the phase at that time.
        before, after: values of all knobs; in ``observe`` mode ``after`` equals ``before``.
        reason: one sentence for people.
        proposals: what the agents wanted.
        evidence: the numbers behind the verdict.
        applied: False in ``observe`` mode: written down, not done.
        coordination: how the agents settled on the move: scores, shares, simulation and votes, as plain values
            (``coordination.record``); empty where nothing was coordinated.
    """

    step: int
    verdict: Verdict
    phase: TrainingPhase
    before: Mapping[str, float]
    after: Mapping[str, float]
    reason: str
    proposals: tuple[Proposal, ...] = ()
    evidence: Mapping[str, float] = field(default_factory=lambda: _EMPTY)
    applied: bool = True
    coordination: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError(f"decision at step {self.step} has no reason")

    @property
    def moves(self) -> dict[str, tuple[float, float]]:
        """Knobs that changed, each as (from, to)."""
        return {k: (self.before[k], v) for k, v in self.after.items() if self.before.get(k) != v and k in self.before}
