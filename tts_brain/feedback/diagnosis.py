"""What only the user can mend, said in plain words with what it rests on; each cause once in a while.

A cause is named only where what is seen leaves little else: a symptom alone ("the loss rises") names none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from tts_brain.feedback.rate_jump import RateJumps
from tts_brain.feedback.transcripts import SpeakingRates
from tts_brain.types import Observation, TrainingPhase

# Healthy training changes the weights by about a thousandth per step (Karpathy's rule of thumb for |Δw| / |w|).
_RATIO_HIGH, _RATIO_LOW = 0.03, 5e-4
# Times the usual gradient norm: with a loss of twice the usual that is the batch. Under an ordinary loss norms of good
# data come to 490 times the usual while attention settles (22 runs), so that it takes far more.
_EXPLODING, _LOSS_TOO, _FAR_BEYOND = 30.0, 2.0, 3000.0
_NORMS_NEEDED, _NORMS_KEPT = 10, 20
_FEWEST_CLIPS = 8.0
_SILENCE_SHARE = 0.2
# Labels say the end before so much of a clip: too early, or inverted. So much of it is one frame repeated: too late.
_EARLY, _INVERTED, _ALIKE = 0.9, 0.1, 0.05
_SURE_AFTER = 20  # measurements
_SURE_RATIOS = 5  # of how far a step changes the weights, which is measured once per decision
_SURE_HALF = 3  # measurements, once per decision too
_FEW_RATES = 512  # clips: twice what the first verdict on them takes
_MEMORY = 0.9
_AGAIN_AFTER = 500
# Steps left out under finite losses, of the newest so many: what half precision that overflows looks like. Those that a
# gradient scaler leaves out while it looks for its scale are no steps, and are not seen here.
_LEFT_OUT, _OF_STEPS = 6, 20
# An alignment that was as good as the first is lost when so many measurements in a row are under half of its best.
_ALIGNED, _LOST_AFTER = 0.5, 3


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """What an adapter can say of the data of one step.

    Args:
        clips: utterances, all batches of the step together.
        names: their ids, where the host gives them.
        not_finite: ids (or places in the batch) of those whose features hold a NaN or infinity; looked for only when
            the loss was not finite.
        edge_silence: share of the frames that are silence at the two ends, mean over a few clips; None when not
            measured, as the two below.
        end_labelled_at: where the stop token's labels say that a clip ends; 1 is its last frame.
        alike_tail: share of the frames, at the end, that are one and the same.
        text_rates: tokens per mel frame of each clip, from its first to its last sound; empty when not measured.
    """

    clips: int
    names: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    edge_silence: float | None = None
    end_labelled_at: float | None = None
    alike_tail: float | None = None
    text_rates: tuple[float, ...] = ()

    def and_then(self, later: BatchFacts) -> BatchFacts:
        """Both batches of one step; what was measured on both counts as it is in the later one."""
        return BatchFacts(
            self.clips + later.clips,
            self.names + later.names,
            self.not_finite + later.not_finite,
            _newer(self.edge_silence, later.edge_silence),
            _newer(self.end_labelled_at, later.end_labelled_at),
            _newer(self.alike_tail, later.alike_tail),
            self.text_rates + later.text_rates,
        )


@dataclass(frozen=True, slots=True)
class Advice:
    """One cause, by its short name, and a sentence for people."""

    cause: str
    message: str


class Diagnosis:
    """Looks at each step; its memory is a few numbers."""

    def __init__(self) -> None:
        self._said: dict[str, int] = {}
        self._seen: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._left_out: list[int] = []
        self._rates = SpeakingRates()
        self._jumps = RateJumps()

    def look(
        self,
        observation: Observation,
        facts: BatchFacts | None,
        phase: TrainingPhase,
        best_attention_diag: float = 0.0,
        weights_kept_in: str | None = None,
    ) -> list[Advice]:
        """Causes that this step shows and that were not named in the last 500 steps.

        Args:
            weights_kept_in: the coarsest of "bfloat16", "float16" and "float32" that holds the weights as they are;
                None where it was not looked for.
        """
        found = [] if facts is None else self._data(facts)
        for advice in (
            self._exploding(observation, facts),
            self._jump(observation),
            self._rate(observation.update_ratio, phase),
            self._overflow(observation),
            self._lost(observation, best_attention_diag),
            self._weights(weights_kept_in),
        ):
            if advice is not None:
                found.append(advice)
        return [advice for advice in found if self._may_say(advice.cause, observation.step)]

    @property
    def few_rates(self) -> bool:
        """Are the clips whose speaking rate is known so few that every step's are worth a look?"""
        return self._rates.clips < _FEW_RATES

    @property
    def believable_rates(self) -> tuple[float, float] | None:
        """Least and most tokens per frame of speech of a clip whose text may be right; None while all may be."""
        return self._rates.believable

    def _data(self, facts: BatchFacts) -> list[Advice]:
        found = []
        if facts.not_finite:
            found.append(
                Advice(
                    "non-finite data",
                    f"the data of this batch are not finite: {_list(facts.not_finite)}. "
                    "Look at their audio and features, and leave them out",
                )
            )
        clips = self._mean("clips", facts.clips)
        if clips is not None and clips < _FEWEST_CLIPS:
            found.append(
                Advice(
                    "batch too small",
                    f"the batch of {clips:.0f} clips a step is too small for attention to form reliably. "
                    "Use 16 or more, or accumulate gradients",
                )
            )
        silence = None if facts.edge_silence is None else self._mean("silence", facts.edge_silence)
        if silence is not None and silence > _SILENCE_SHARE:
            found.append(
                Advice(
                    "edge silence",
                    f"edge silence: {silence:.0%} of the frames lie before the first or after the last sound, where "
                    "attention has nothing to follow. Trim the clips",
                )
            )
        return found + self._stop_labels(facts) + self._transcripts(facts)

    def _weights(self, kept_in: str | None) -> Advice | None:
        # Weights that were loaded from half precision lie on its grid only until they move.
        if kept_in is None or self._in_a_row("half", kept_in != "float32") < _SURE_HALF:
            return None
        return Advice(
            "half precision",
            "the weights looked at are kept in half precision, which is too coarse for them: all are values of "
            f"{kept_in}, and small updates are lost unless the optimizer has a copy of its own. Keep them in float32, "
            "and leave half precision to autocast",
        )

    def _transcripts(self, facts: BatchFacts) -> list[Advice]:
        self._rates.add(facts.names, facts.text_rates)
        if not self._rates.suspicious:
            return []
        return [
            Advice(
                "wrong transcripts",
                f"{self._rates.share:.1%} of the clips have far more or less text than is spoken in their time: these "
                f"transcripts look wrong. Listen to {_list(self._rates.farthest, 8)}",
            )
        ]

    def _stop_labels(self, facts: BatchFacts) -> list[Advice]:
        labelled = None if facts.end_labelled_at is None else self._mean("end labelled", facts.end_labelled_at)
        alike = None if facts.alike_tail is None else self._mean("alike tail", facts.alike_tail)
        wrong = None
        if labelled is not None and labelled < _INVERTED:
            wrong = "inverted: the first frames are labelled as the end"
        elif labelled is not None and labelled < _EARLY:
            wrong = f"too early: they say that a clip ends after {labelled:.0%} of it"
        elif alike is not None and alike > _ALIKE:
            wrong = (
                f"too late: the last {alike:.0%} of the frames are one and the same, padding or digital silence, and "
                "count as speech"
            )
        if wrong is None:
            return []
        return [Advice("stop token", f"the stop labels are {wrong}. Look at how targets and lengths are made")]

    def _exploding(self, observation: Observation, facts: BatchFacts | None) -> Advice | None:
        norm, loss = observation.grad_norm, observation.losses.get("total", math.nan)
        if norm is None or not math.isfinite(norm):
            return None
        known = len(self._norms) >= _NORMS_NEEDED
        usual, usual_loss = (median(self._norms), median(self._losses)) if known else (norm, loss)
        self._norms = [*self._norms, norm][-_NORMS_KEPT:]
        self._losses = [*self._losses, loss if math.isfinite(loss) else 0.0][-_NORMS_KEPT:]
        if not known or norm <= _EXPLODING * usual:
            return None
        which = f" ({_list(facts.names)})" if facts is not None and facts.names else ""
        times = norm / max(usual, 1e-12)
        if 0.0 < _LOSS_TOO * usual_loss < loss:
            return Advice(
                "exploding batch",
                f"this batch explodes: its loss is {loss / usual_loss:.3g} times, its gradient norm {times:.3g} times "
                f"the usual{which}. Look for clipped, very loud or mislabelled clips in it",
            )
        if norm > _FAR_BEYOND * usual:
            return Advice(
                "exploding batch",
                f"the gradient explodes: its norm {norm:.3g} is {times:.3g} times the usual under an ordinary "
                f"loss{which}. Look at these clips, and for a root or a logarithm of 0 in a loss of your own",
            )
        return None

    def _overflow(self, observation: Observation) -> Advice | None:
        if not observation.skipped or not all(math.isfinite(loss) for loss in observation.losses.values()):
            return None
        self._left_out = [s for s in self._left_out if s > observation.step - _OF_STEPS] + [observation.step]
        if len(self._left_out) < _LEFT_OUT:
            return None
        return Advice(
            "half precision",
            f"gradients were not finite at {len(self._left_out)} of the last {_OF_STEPS} steps though the losses were: "
            "half precision overflows like that. Use bf16 or fp32; if it is fp32 already, look for the root or the "
            "logarithm of 0 in a loss of your own",
        )

    def _lost(self, observation: Observation, best: float) -> Advice | None:
        if observation.attention is None:
            return None
        now = observation.attention.attention_diag
        if self._in_a_row("lost", best >= _ALIGNED and now < best / 2.0) < _LOST_AFTER:
            return None
        return Advice(
            "alignment lost",
            f"the alignment is lost: attention_diag was {best:.2f} and is {now:.2f}, under half of that for "
            f"{_LOST_AFTER} measurements or more. It is guided back; if data, texts or code have changed about here, "
            "look there",
        )

    def _jump(self, observation: Observation) -> Advice | None:
        loss = observation.losses.get("total", math.nan)
        jump = self._jumps.look(observation.step, observation.learning_rate, loss)
        if jump is None:
            return None
        return Advice(
            "rate too high",
            f"since step {jump.step} the host's own rate is too high: it jumped from {jump.before:.1e} to "
            f"{jump.now:.1e} within one step, and the loss with it. Look at the schedule, and at what else writes it",
        )

    def _rate(self, ratio: float | None, phase: TrainingPhase) -> Advice | None:
        if ratio is None or not math.isfinite(ratio):
            return None
        high = self._in_a_row("high", ratio > _RATIO_HIGH)
        low = self._in_a_row("low", ratio < _RATIO_LOW and phase is TrainingPhase.PRE_ALIGNMENT)
        if high >= _SURE_RATIOS:
            return Advice("rate too high", f"the rate is too high: each step changes the weights by {ratio:.1%}")
        if low >= _SURE_RATIOS:
            return Advice(
                "rate too low",
                f"the rate is too low: each step changes the weights by {ratio:.2%}, before attention has formed",
            )
        return None

    def _mean(self, name: str, value: float) -> float | None:
        """Running mean; None until it rests on enough."""
        before = self._seen.get(name, value)
        self._seen[name] = _MEMORY * before + (1.0 - _MEMORY) * value
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._seen[name] if self._counts[name] >= _SURE_AFTER else None

    def _in_a_row(self, name: str, holds: bool) -> int:
        self._counts[name] = self._counts.get(name, 0) + 1 if holds else 0
        return self._counts[name]

    def _may_say(self, cause: str, step: int) -> bool:
        last = self._said.get(cause)
        if last is not None and step - last < _AGAIN_AFTER:
            return False
        self._said[cause] = step
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "said": dict(self._said),
            "seen": dict(self._seen),
            "counts": dict(self._counts),
            "norms": list(self._norms),
            "losses": list(self._losses),
            "left_out": list(self._left_out),
            "rates": self._rates.state_dict(),
            "jumps": self._jumps.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        said = {str(name): int(step) for name, step in state["said"].items()}
        seen = {str(name): float(value) for name, value in state["seen"].items()}
        counts = {str(name): int(value) for name, value in state["counts"].items()}
        norms = [float(value) for value in state["norms"]]
        losses = [float(value) for value in state.get("losses", norms)]
        left_out = [int(step) for step in state.get("left_out", ())]
        if "rates" in state:
            self._rates.load_state_dict(state["rates"])
        if "jumps" in state:
            self._jumps.load_state_dict(state["jumps"])
        self._said, self._seen, self._counts, self._norms, self._left_out = said, seen, counts, norms, left_out
        self._losses = losses


def _newer(before: float | None, later: float | None) -> float | None:
    return before if later is None else later


def _list(names: tuple[str, ...], most: int = 4) -> str:
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown
