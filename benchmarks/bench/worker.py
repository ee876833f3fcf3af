"""Cells in processes of their own: reads jobs, trains, prints progress and results as JSON lines."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import tts_brain
import tts_brain_espnet
from bench.arms import Brain, recorded
from bench.bad_starts import BAD_STARTS
from bench.data import Corpus, load
from bench.figures import figures
from bench.host import Measured, Training
from bench.plans import POPULATIONS, make_arm
from bench.population import pbt
from bench.setting import Setting
from bench.told import named
from tts_brain.journal import JOURNAL_NAME, versions
from tts_brain.learning.traces import from_journal, save


def serve(jobs: Iterable[str]) -> None:
    """Train cell after cell, each in a child of its own: the hosts take longer to import than a cell's share of a
    benchmark allows, and a fresh process would import them again.

    Args:
        jobs: JSON lines as ``run`` takes them. Each is answered by ``{"done": bool}`` after the child's own lines.
    """
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for line in jobs:
        job = json.loads(line)
        sys.stdout.flush()
        if job["device"] != "cpu":  # the host asks at import what the GPU can do, and that cannot be forked
            if _guarded(job) != 0:
                return  # a fault may have spoilt the GPU for this process: without an answer, another one is started
            say({"done": True})
            continue
        child = os.fork()
        if child == 0:
            os._exit(_guarded(job))
        _, status = os.waitpid(child, 0)
        say({"done": status == 0})


def _guarded(job: Mapping[str, Any]) -> int:
    """Nothing of the parent's may run in the child when it ends, whatever happens."""
    try:
        run(job)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run(job: Mapping[str, Any]) -> None:
    """Train one cell.

    Args:
        job: ``arm``, ``seed``, ``folder`` of the corpus, ``setting``, ``start``, a bad start or empty, and
            ``device``; with ``traces``, a folder, the trace of the run goes there under the cell's ``key``.
    """
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
    about = {"device": job["device"], "clips": len(corpus.train), "versions": versions() | {"code": code()}}
    say({"result": {**result, **about}})


def code() -> str:
    """Short digest of the brain's and the adapter's files: rows of another brain can be told from its own."""
    digest = hashlib.sha256()
    for package in (tts_brain, tts_brain_espnet):
        folder = Path(str(package.__file__)).parent
        for path in sorted(path for suffix in ("*.py", "*.safetensors") for path in folder.rglob(suffix)):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _one(
    job: Mapping[str, Any],
    corpus: Corpus,
    setting: Setting,
    seed: int,
    folder: Path,
    progress: Callable[[int, Measured | None], None],
) -> dict[str, Any]:
    arm = make_arm(job["arm"])
    start = BAD_STARTS[job["start"]] if job.get("start") else None
    if start is not None:
        setting, corpus, arm = start.setting(setting), start.corpus(corpus, seed), start.arm(arm)
    traces = job.get("traces")
    arm = recorded(arm) if traces else arm
    training = Training(corpus, setting, seed, folder, device=job["device"])
    if start is not None:
        start.begin(training)
    training.run(arm, progress)
    result = figures(training)
    journal = any(folder.rglob(JOURNAL_NAME))
    if journal and isinstance(arm, Brain):
        result["named"] = sorted(named(folder))
        result["told"] = start is not None and start.told(folder)
    if journal and traces:
        faults = (start.name, *start.causes) if start is not None else ()
        name = f"{job['arm']}, {job.get('start') or 'clean'}, seed {seed}"
        save(
            Path(traces) / f"{job['key']}.safetensors",
            [from_journal(folder, name=name, corpus=corpus.name, faults=faults)],
        )
    return result


def _population(arm: str, corpus: Corpus, setting: Setting, seed: int, folder: Path) -> dict[str, Any]:
    population = pbt(corpus, setting, seed, folder, full=POPULATIONS[arm])
    return {**figures(population), "cost_steps": population.cost_steps, "copies": population.copies}


def say(message: Mapping[str, Any]) -> None:
    """One line for the parent process."""
    print(json.dumps(message), flush=True, file=sys.stdout)
