"""The ways of training that are compared: constants, schedules, and the brain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from bench.blindfold import blindfold
from bench.host import Training
from bench.terms import Terms
from tts_brain.config import BrainConfig
from tts_brain.types import GUIDED_WEIGHT, KNOBS, LEARNING_RATE
from tts_brain_espnet.adapter import EspnetAdapter


@dataclass
class Plain:
    """The host, with constants or a schedule in place of its own.

    Args:
        guided: weight of the guided loss in the host's units; None leaves 1.0.
        sigma: width of the guide; None leaves 0.4.
        rate: Adam's; None leaves the setting's.
        forward_sum: weight of a forward-sum term beside the guide; 0 is none.
        over_speech: draw the guide over the clips' speech, as the brain does, in place of the host's.
        schedule: (run, step) called before each step; may turn anything.
    """

    guided: float | None = None
    sigma: float | None = None
    rate: float | None = None
    forward_sum: float = 0.0
    over_speech: bool = False
    schedule: Callable[[Training, int], None] | None = None

    def attach(self, run: Training) -> None:
        guide = run.tts.attn_loss
        guide.alpha = guide.alpha if self.guided is None else self.guided
        guide.sigma = guide.sigma if self.sigma is None else self.sigma
        if self.rate is not None:
            run.set_rate(self.rate)
        if self.over_speech:
            Terms(run.tts, self.forward_sum, guide.alpha)
            run.guided_weight, guide.alpha = guide.alpha, 0.0
        elif self.forward_sum > 0.0:
            Terms(run.tts, self.forward_sum)

    def step(self, run: Training, step: int) -> None:
        if self.schedule is not None:
            self.schedule(run, step)

    @contextmanager
    def epoch(self, run: Training, reporter: Any) -> Iterator[None]:
        yield

    def detach(self, run: Training) -> None:
        pass


@dataclass
class _WithBrain:
    """What holds an adapter on the run, the one that users have."""

    adapter: EspnetAdapter | None = field(default=None, kw_only=True)

    def put_on(self, run: Training, config: BrainConfig) -> None:
        self.adapter = EspnetAdapter(config, run.model, [run.optimizer], run.options)
        self.adapter._save_sidecar = lambda epoch: None  # nothing is resumed here

    @contextmanager
    def epoch(self, run: Training, reporter: Any) -> Iterator[None]:
        assert self.adapter is not None
        with self.adapter.epoch(reporter, None, None):
            yield

    def detach(self, run: Training) -> None:
        if self.adapter is not None:
            self.adapter.close("finished")


@dataclass
class Brain(_WithBrain):
    """The brain on the host, through the same adapter that users have.

    Args:
        settings: of the brain; none are its defaults.
        guided: where its guided weight starts, in the host's units; None leaves the brain's own start.
        rate: the host's; None leaves the setting's.
        forward_sum: a constant forward-sum term of the host's, which the brain knows nothing of.
        blind: in this eye of ``bench.blindfold``; empty in none.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    guided: float | None = None
    rate: float | None = None
    forward_sum: float = 0.0
    blind: str = ""

    def attach(self, run: Training) -> None:
        settings = dict(self.settings)
        if self.rate is not None:
            run.set_rate(self.rate)
        if self.guided is not None:
            tokens = sum(len(clip.text) + 1 for clip in run.corpus.train) / len(run.corpus.train)
            knob = KNOBS[GUIDED_WEIGHT]
            settings["initial_guided_weight"] = min(max(self.guided / tokens, knob.low), knob.high)
        if self.forward_sum > 0.0:
            Terms(run.tts, self.forward_sum)
        self.put_on(run, BrainConfig.from_dict(settings))
        if self.blind:
            assert self.adapter is not None
            blindfold(self.adapter.session.manager, self.blind)

    def step(self, run: Training, step: int) -> None:
        assert self.adapter is not None
        knobs = self.adapter.session.knobs
        run.rate_multiplier = knobs.get(LEARNING_RATE, 1.0)
        run.guided_weight = knobs.get(GUIDED_WEIGHT)


@dataclass
class Watched(_WithBrain):
    """Another arm under the eyes of a brain that touches nothing (``observe``), for the trace of the run."""

    arm: Plain

    def attach(self, run: Training) -> None:
        self.arm.attach(run)
        self.put_on(run, BrainConfig(mode="observe", journal_every=1))

    def step(self, run: Training, step: int) -> None:
        self.arm.step(run, step)


def recorded(arm: Any) -> Any:
    """The arm with every step in a journal; one that is neither constants nor the brain is left as it is."""
    if isinstance(arm, Brain):
        return replace(arm, settings={**arm.settings, "journal_every": 1})
    return Watched(arm) if isinstance(arm, Plain) else arm
