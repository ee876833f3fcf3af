"""Population-based training (Jaderberg et al., arXiv:1711.09846) with Ray Tune, around the benchmark's own Training."""

from __future__ import annotations

import logging
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.data import Corpus
from bench.host import Measured
from bench.population_member import Member, split
from bench.setting import Setting

MEMBERS = 4
GUIDED = (1.0, 500.0)
RATE = (3e-4, 2e-2)
_METRIC = "validation_l1"


@dataclass
class Population:
    """What the population brought: the member with the lowest validation loss at the end, and what all cost.

    Args:
        trace, measured: of that member and those that its weights were copied from, as ``Training`` has them.
        seconds: training of all members together.
        cost_steps: optimizer steps of all members together.
        configs: the settings that each member ended with.
        copies: how often one member took over another's weights.
    """

    trace: list[dict[str, float]]
    measured: list[Measured]
    seconds: float
    cost_steps: int
    configs: list[dict[str, float]]
    copies: int


def pbt(
    corpus: Corpus,
    setting: Setting,
    seed: int,
    folder: Path,
    *,
    full: bool,
    members: int = MEMBERS,
    model_conf: Mapping[str, Any] | None = None,
) -> Population:
    """Run a population with Ray Tune's PopulationBasedTraining on one core.

    Guided weight 1 to 500 and rate 3e-4 to 2e-2, both drawn on a logarithmic scale; every 50 steps the worst quarter
    takes over the best one's weights, with settings times 0.8 or 1.2 or drawn afresh (1 in 4): Ray's values. Members
    are run in turn and wait for each other, so the outcome hangs on the seed alone.

    Ray starts processes of its own (half a minute per run), keeps its logs in ``/tmp/ray`` and a key for its local
    cluster in ``~/.ray``.

    Args:
        folder: for Ray's results; must be its own for each run.
        full: every member gets all the steps, at ``members`` times the cost; else its share of them, at equal cost.

    Raises:
        ImportError: Ray is not installed.
        RuntimeError: a member failed.
    """
    try:
        import ray
        from ray import tune
        from ray.tune.schedulers import PopulationBasedTraining
        from ray.tune.search.basic_variant import BasicVariantGenerator
    except ImportError as error:
        raise ImportError("population-based training needs Ray: uv pip install 'ray[tune]'") from error

    setting = setting if full else replace(setting, steps=setting.steps // members)
    space = {"guided": tune.loguniform(*GUIDED), "rate": tune.loguniform(*RATE)}
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        perturbation_interval=1,
        hyperparam_mutations=dict(space),
        custom_explore_fn=within,
        synch=True,
    )
    spending = _spending()
    before = random.getstate(), np.random.get_state()
    with _environment():
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    try:
        # The scheduler draws from the global generators.
        random.seed(seed)
        np.random.seed(seed)
        trainable = tune.with_parameters(_trainable(), given=(*split(corpus), setting, seed), model_conf=model_conf)
        results = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            param_space={**space, "number": tune.grid_search(list(range(members)))},
            tune_config=tune.TuneConfig(
                metric=_METRIC,
                mode="min",
                scheduler=scheduler,
                reuse_actors=True,
                search_alg=BasicVariantGenerator(random_state=seed),
            ),
            run_config=tune.RunConfig(
                name="pbt",
                storage_path=str(folder.resolve()),
                verbose=0,
                callbacks=[spending],
                checkpoint_config=tune.CheckpointConfig(num_to_keep=3, checkpoint_at_end=True),
            ),
        ).fit()
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        ray.shutdown()
    if results.errors:
        raise RuntimeError(f"{len(results.errors)} members failed; the first: {results.errors[0]}")
    best = results.get_best_result(_METRIC, "min")
    with best.checkpoint.as_directory() as place:
        state = torch.load(Path(place) / "member.pt", weights_only=False)
    shutil.rmtree(folder / "pbt")  # some 20 MB per checkpoint
    return Population(
        trace=state["trace"],
        measured=[Measured(**row) for row in state["measured"]],
        seconds=spending.seconds,
        cost_steps=spending.steps,
        configs=[dict(result.config) for result in results],
        copies=scheduler._num_perturbations,
    )


@contextmanager
def _environment() -> Iterator[None]:
    """What Ray's worker processes inherit: where this package is, and that nothing is reported to Ray's makers."""
    before = dict(os.environ)
    paths = [str(Path(__file__).resolve().parents[1]), before.get("PYTHONPATH", "")]
    os.environ.update(PYTHONPATH=os.pathsep.join(filter(None, paths)), RAY_USAGE_STATS_ENABLED="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def within(config: dict[str, Any]) -> dict[str, Any]:
    """Settings back into the space: Ray's factors know no bounds."""
    return {
        **config,
        "guided": float(np.clip(config["guided"], *GUIDED)),
        "rate": float(np.clip(config["rate"], *RATE)),
    }


def _trainable() -> type:
    """A Member as Ray wants it. Made here, so that the module can be imported without Ray."""
    from ray import tune

    class RayMember(tune.Trainable):
        def setup(self, config: dict[str, Any], given: tuple[Any, ...], model_conf: Mapping[str, Any] | None) -> None:
            torch.set_num_threads(1)
            self._given, self._model_conf = given, model_conf
            self.reset_config(config)

        def reset_config(self, config: dict[str, Any]) -> bool:
            self.member = Member(*self._given, config["number"], Path(self.logdir), self._model_conf)
            return True

        def step(self) -> dict[str, Any]:
            training = self.member.training
            seconds, steps = training.seconds, len(training.trace)
            loss = self.member.advance(self.config["guided"], self.config["rate"])
            spent = {"spent_s": training.seconds - seconds, "spent_steps": len(training.trace) - steps}
            return {_METRIC: loss, **spent, "done": self.member.finished}

        def save_checkpoint(self, checkpoint_dir: str) -> None:
            torch.save(self.member.state(), Path(checkpoint_dir) / "member.pt")

        def load_checkpoint(self, checkpoint: str) -> None:
            self.member.load(torch.load(Path(checkpoint) / "member.pt", weights_only=False))

    return RayMember


def _spending() -> Any:
    """Adds up what all members cost, also where one's weights were overwritten by another's."""
    from ray import tune

    class Spending(tune.Callback):
        seconds, steps = 0.0, 0

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
            self.seconds += result["spent_s"]
            self.steps += result["spent_steps"]

    return Spending()
