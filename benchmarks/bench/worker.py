"""One cell in a process of its own: reads a job, trains, prints progress and the result as JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.bad_starts import BAD_STARTS
from bench.data import Corpus, load
from bench.figures import figures
from bench.host import Measured, Training
from bench.plans import ARMS, POPULATIONS
from bench.population import pbt
from bench.setting import Setting
from bench.told import named
from tts_brain.journal import JOURNAL_NAME, versions


def run(job: Mapping[str, Any]) -> None:
    """Train one cell.

    Args:
        job: ``arm``, ``seed``, ``folder`` of the corpus, ``setting``, and ``start``, a bad start or empty.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    setting = Setting(**job["setting"])
    corpus = load(Path(job["folder"]), min_s=setting.min_s, max_s=setting.max_s, held_out=setting.held_out)

    def progress(step: int, m: Measured) -> None:
        note = f"L1 {m.l1:.3f}, attention_diag {m.values['attention_diag']:.2f}"
        say({"step": step, "note": note})

    seed = int(job["seed"])
    with tempfile.TemporaryDirectory() as folder:
        if job["arm"] in POPULATIONS:
            result = _population(job["arm"], corpus, setting, seed, Path(folder))
        else:
            result = _one(job, corpus, setting, seed, Path(folder), progress)
    say({"result": {**result, "clips": len(corpus.train), "versions": versions()}})


def _one(
    job: Mapping[str, Any],
    corpus: Corpus,
    setting: Setting,
    seed: int,
    folder: Path,
    progress: Callable[[int, Measured | None], None],
) -> dict[str, Any]:
    arm = ARMS[job["arm"]]()
    start = BAD_STARTS[job["start"]] if job.get("start") else None
    if start is not None:
        setting, corpus, arm = start.setting(setting), start.corpus(corpus, seed), start.arm(arm)
    training = Training(corpus, setting, seed, folder)
    if start is not None:
        start.begin(training)
    training.run(arm, progress)
    result = figures(training)
    if any(folder.rglob(JOURNAL_NAME)):
        result["named"] = sorted(named(folder))
        result["told"] = start is not None and start.told(folder)
    return result


def _population(arm: str, corpus: Corpus, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    population = pbt(corpus, setting, seed, folder, full=POPULATIONS[arm])
    return {**figures(population), "cost_steps": population.cost_steps, "copies": population.copies}


def say(message: Mapping[str, Any]) -> None:
    """One line for the parent process."""
    print(json.dumps(message), flush=True, file=sys.stdout)
