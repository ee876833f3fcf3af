"""The card of the temporal model's weights: how they were made, how they score on runs not trained on, their limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from tts_brain.context.temporal import HORIZONS, Net
from tts_brain.learning.temporal_scores import Answers, coverage, last_value, ours, score
from tts_brain.learning.temporal_targets import Samples


def judged(net: Net, validation: Samples, some: Samples) -> list[str]:
    """Rows of a table: the model on windows that it was not trained on, beside "all stays as it is"."""
    both = _joined(validation, some)
    tuned = np.arange(len(both)) < len(validation)
    mine = score(answers := ours(net, some), some)
    still = {name: value[~tuned] for name, value in vars(last_value(tuned, both)).items()}
    theirs = score(Answers(**still), some)
    inside = coverage(answers, some)
    rows = []
    for name, what in _FIGURES.items():
        pairs = [f"{a:.3f} / {b:.3f}" for a, b in zip(mine[name], theirs[name], strict=True)]
        rows.append(f"| {what} | " + " | ".join(pairs) + " |")
    for name, shares in inside.items():
        rows.append(f"| share of the {name} within its outer quantiles (0.8 is right) | " + _cells(shares) + " |")
    for name in ("diverged", "lost"):
        truth = getattr(some, name)
        counts = [f"{int(np.nansum(column))} of {int(np.isfinite(column).sum())}" for column in truth.T]
        rows.append(f"| windows with `{name}` | " + " | ".join(counts) + " |")
    return rows


_FIGURES = {
    "loss": "pinball loss of the loss, noise widths",
    "attention": "pinball loss of `attention_diag`",
    "diverged": "AUROC of divergence",
    "lost": "AUROC of a lost alignment",
}


def _cells(values: Sequence[float]) -> str:
    return " | ".join(f"{value:.2f}" for value in values)


def _joined(one: Samples, two: Samples) -> Samples:
    return Samples(**{name: np.concatenate([value, getattr(two, name)]) for name, value in vars(one).items()})


def card(said: Mapping[str, object], tables: Mapping[str, Sequence[str]], command: str) -> str:
    """The card that lies beside the weights. What a command cannot know stands in ``_CARD``."""
    head = "| | " + " | ".join(f"{horizon} steps" for horizon in HORIZONS) + " |\n|---|" + "---|" * len(HORIZONS)
    parts = [f"### {name}\n\n{head}\n" + "\n".join(rows) for name, rows in tables.items()]
    return _CARD.format(command=command, said=json.dumps(said, indent=2), tables="\n\n".join(parts))


_CARD = """# Weights of the temporal model

`temporal.safetensors` is read by `tts_brain/context/temporal.py`, which says what is forecast and how each event is
defined. This card is written by the command that makes the weights.

**Made by**

    {command}

```json
{said}
```

**Trained on** runs of the micro-Tacotron (`tts_brain/learning/temporal_traces.py`), which the command makes itself,
and on recorded runs of a small ESPnet Tacotron 2, most of them spoilt on purpose (`benchmarks/bench/bad_starts.py`,
recorded by `benchmarks/run.py rescue --traces FOLDER`). A trace holds losses, norms, attention metrics and knobs of
each step, nothing of the speech or the texts. The corpora are named above.

**Licence** Apache-2.0, as the code. The speech of `kathleen-en-us` is CC0 1.0, that of LJSpeech in the public domain.

## Scores on runs not trained on

Each cell: this model / all stays as it is, with the quantiles of that rule's errors on the validation runs.
Losses are in widths of the window's noise and count within 20 of them. `benchmarks/bench/component_temporal.py`
compares with Theil-Sen and Kalman extrapolation too, and measures how early the events are announced.

{tables}

## Limits

- What nobody could see coming (a NaN batch, an attention drawn anew) is not forecast; what follows it is.
- Windows are of 100 steps. Runs of the sizes above are 400 and 500 steps long: later stages of long trainings have not
  been seen.
- Windows with an event come from few runs: where their count is small the AUROC says little. Where the second figure of
  a cell is the better one, so is the simple rule. Probabilities of events rank better than they are calibrated.
- A run that has diverged already is no case: the loop finds that by itself.
- The sizes and the recipe were chosen in about a dozen tries on these corpora, with the scores on all their runs in
  sight. Only a corpus marked "another corpus" above is quite unseen; where there is none, take the scores as too good.
"""
