"""The text length's effect on the loss alone: how well it is known, what it takes out, and what that spares a run.

Made-up runs whose loss falls, owes so much to the logarithm of the text length, and is noisy; and recorded runs, of
which nobody knows the truth: there the noise from step to step says what was taken out. The rival is the loss as it is.

    python -m bench.component_lengths
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tts_brain.config import BrainConfig
from tts_brain.context.lengths import LengthEffect
from tts_brain.learning.micro_setting import CAPABILITIES
from tts_brain.learning.traces import Trace, load
from tts_brain.manager import ContextAwareTrainingManager
from tts_brain.types import GUIDED_SIGMA, KNOBS, AttentionReport, Capabilities, Observation, Verdict

PART = "lengths"
RAW = "the loss as it is"
_SEED = 7_000
_EPOCH, _STEPS, _FALLS, _NOISE = 50, 400, 0.0005, 0.02
_LENGTHS = np.geomspace(20.0, 120.0, _EPOCH)
# An epoch in order cannot tell length from time; then some 60 changes and a jump back are needed.
_AFTER = 2 * _EPOCH
_SETTLED = 60
_ALIGNED = AttentionReport(0.7, 0.7, 0.7, 0.7, 0.5, 1.0, 1.0, 5.0, 1.0)
_HOST = Capabilities("made-up", ("total", "mel"), tuple(KNOBS), "attention", True)

Row = dict[str, Any]


def rows(quick: bool, traces: Path | None = None) -> list[Row]:
    """The table: part, against, figure, ours, theirs, note. ``quick`` takes a tenth of the runs."""
    runs = 4 if quick else 40
    found = [*_known(runs), *_unfounded(runs), *_taken_for_harm(max(1, runs // 4))]
    return found if traces is None else [*found, *_recorded(traces)]


def run_of(effect: float, ordered: bool, seed: int) -> Iterator[Observation]:
    """400 steps in epochs of 50 batches, in the order of their length or shuffled anew in each."""
    rng = np.random.default_rng([_SEED, seed])
    order = np.arange(_EPOCH)
    for step in range(_STEPS):
        if step % _EPOCH == 0 and not ordered:
            order = rng.permutation(_EPOCH)
        length = float(_LENGTHS[order[step % _EPOCH]])
        mel = 2.0 - _FALLS * step + effect * float(np.log(length / 50.0)) + _NOISE * float(rng.normal())
        yield Observation(step + 1, {"total": mel, "mel": mel}, 1.0, 1e-3, text_length=length)


def noise_of(losses: np.ndarray) -> float:
    """Deviation of the changes from step to step, by their median absolute deviation; NaNs are left out."""
    changes = np.diff(losses)
    changes = changes[np.isfinite(changes)]
    return 1.4826 * float(np.median(np.abs(changes - np.median(changes))))


def _known(runs: int) -> Iterator[Row]:
    for effect in (0.3, 0.05):
        for ordered in (True, False):
            found = []
            for seed in range(runs):
                by = LengthEffect()
                for shown in run_of(effect, ordered, seed):
                    by.adjusted(shown)
                found.append(100.0 * (by.effect() / effect - 1.0))
            figure = f"error of the effect, %, {effect:g} an e-fold, {_way(ordered)}: median, worst in note"
            note = f"worst {max(found, key=abs):+.1f}; {runs} runs of {_STEPS} steps, noise {_NOISE:g}"
            yield _row(figure, round(float(np.median(found)), 2), -100.0, note)


def _unfounded(runs: int) -> Iterator[Row]:
    for ordered in (True, False):
        moved = []
        for seed in range(runs):
            by = LengthEffect()
            shown = list(run_of(0.0, ordered, seed))
            moved += [abs(by.adjusted(one).losses["mel"] - one.losses["mel"]) > 0.2 * _NOISE for one in shown]
        figure = f"steps changed by over a fifth of the noise, %, no effect, {_way(ordered)}"
        yield _row(figure, round(100.0 * float(np.mean(moved)), 2), 0.0, f"{runs} runs of {_STEPS} steps")


def _taken_for_harm(runs: int) -> Iterator[Row]:
    for effect in (0.3, 0.05):
        ours, theirs = (
            np.mean([alarms(effect, seed, known) for seed in range(runs)], axis=0) for known in (True, False)
        )
        for at, when, count in ((0, "first", _AFTER // 10), (1, "later", (_STEPS - _AFTER) // 10)):
            figure = f"decisions that see the loss rise, of the {count} {when} ones, {effect:g} an e-fold, in order"
            note = f"{runs} runs whose loss falls; the first are of two epochs"
            yield _row(figure, round(float(ours[at]), 2), round(float(theirs[at]), 2), note)


def alarms(effect: float, seed: int, known: bool) -> tuple[int, int]:
    """In clips in order, so many decisions see the loss rise, or the run break: in the first two epochs, and later."""
    manager = ContextAwareTrainingManager(BrainConfig(), _HOST, {GUIDED_SIGMA: 0.4})
    count = [0, 0]
    for shown in run_of(effect, True, seed):
        attention = _ALIGNED if shown.step % 5 == 0 else None
        length = shown.text_length if known else None
        manager.observe(replace(shown, text_length=length, attention=attention))
        if manager.due(shown.step):
            decision = manager.decide()
            count[shown.step > _AFTER] += decision.verdict is Verdict.ROLL_BACK or "the loss rises" in decision.reason
    return count[0], count[1]


def _recorded(folder: Path) -> Iterator[Row]:
    paths = sorted(folder.rglob("*.safetensors"))
    for corpus in dict.fromkeys(path.parent.name for path in paths):
        some = [t for p in paths if p.parent.name == corpus for t in load(p) if t.host != CAPABILITIES.host]
        for silent in (False, True):
            pairs = [noises(t) for t in some if ("edge silence" in t.faults) is silent]
            if not pairs:
                continue
            kept = [after / before for after, before in pairs]
            what = "with silent ends" if silent else "without"
            note = f"{len(pairs)} runs; of the noise there remain {min(kept):.2f} to {max(kept):.2f}"
            before, after = (float(np.median([pair[at] for pair in pairs])) for at in (1, 0))
            yield _row(f"noise of the loss, {corpus}, {what}", round(after, 4), round(before, 4), note)


def noises(trace: Trace) -> tuple[float, float]:
    """Of the loss of a recorded run without what it owes to length, and as it is; from step 60 on."""
    by = LengthEffect()
    after = np.array([by.adjusted(one).losses["mel"] for one in trace.observations()])
    return noise_of(after[_SETTLED:]), noise_of(trace.column("mel").astype(float)[_SETTLED:])


def _way(ordered: bool) -> str:
    return "in order" if ordered else "shuffled"


def _row(figure: str, ours: float, theirs: float, note: str) -> Row:
    return {"part": PART, "against": RAW, "figure": figure, "ours": ours, "theirs": theirs, "note": note}


def main() -> None:
    for row in rows(quick=False):
        print(" | ".join(str(row[key]) for key in ("figure", "ours", "theirs", "note")))


if __name__ == "__main__":
    main()
