"""One cell in a process of its own: reads a job, trains, prints progress and the result as JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.bad_starts import BAD_STARTS
from bench.data import load
from bench.figures import figures
from bench.host import Measured, Training
from bench.plans import ARMS
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

    seed, arm = int(job["seed"]), ARMS[job["arm"]]()
    start = BAD_STARTS[job["start"]] if job.get("start") else None
    if start is not None:
        setting, corpus = start.setting(setting), start.corpus(corpus, seed)
    with tempfile.TemporaryDirectory() as folder:
        training = Training(corpus, setting, seed, Path(folder))
        if start is not None:
            start.begin(training)
        training.run(arm if start is None else start.arm(arm), progress)
        result = {**figures(training), "clips": len(corpus.train), "versions": versions()}
        if any(Path(folder).rglob(JOURNAL_NAME)):
            result["named"] = sorted(named(Path(folder)))
            result["told"] = start is not None and start.told(Path(folder))
        say({"result": result})


def say(message: Mapping[str, Any]) -> None:
    """One line for the parent process."""
    print(json.dumps(message), flush=True, file=sys.stdout)
