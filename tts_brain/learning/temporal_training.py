"""Makes the weights of the temporal model, and their card.

    python -m tts_brain.learning.temporal_training --micro FOLDER --real FOLDER [--real …] --held-out FOLDER

1. Runs of the micro-Tacotron are made into ``--micro`` (``temporal_traces``); those that are there are kept.
2. ``--real`` are folders of recorded runs of real models. They are split by what was wrong with them: a run and its
   twin under another arm never part. A quarter says when to stop, a quarter is for the test.
3. ``--held-out`` are folders of another corpus, for the test only.

Trained on quantiles (pinball loss, Koenker and Bassett 1978) and on the events' likelihood. One thread and one seed:
the same weights each time on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tts_brain.context.temporal import HORIZONS, KIND, OUTPUTS, QUANTILES, WEIGHTS, Net
from tts_brain.context.temporal_window import BLOCK, FEATURES, METRICS, SUMMARY
from tts_brain.learning.temporal_card import card, judged
from tts_brain.learning.temporal_targets import Samples, samples
from tts_brain.learning.temporal_traces import SUDDEN, generate, load_folder
from tts_brain.learning.traces import Trace, load

PARTS = ("train", "validation", "test")
_MICRO_SEED = 4
# Chosen before anything was trained, so that each part has rates too high, an explosion, and a hurt attention.
_SPLIT = 14
_ATTENTION = slice(7, 7 + len(METRICS) + 2)  # among a block's features
_SUMMARY_ATTENTION = [0, 1, 2, 6, 7]
_NORMS = slice(5, 7)
# Of the four parts of the loss. attention_diag lies in [0, 1], so that its errors are a tenth of the losses'. With more
# weight the few events are learnt by heart.
_WEIGHTS = {"loss": 1.0, "attention": 6.0, "diverged": 0.1, "lost": 0.1}


@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Args:
        seed: of the weights, the batches and what is left out in them.
        states, keys, hidden: sizes of the net.
        rate: AdamW's at the start; it falls along a cosine.
        decay: AdamW's.
        batch: windows.
        real_weight: how much oftener a window of a real run is drawn than one of a made-up run; up to half of a batch.
        epochs: passes of ``batches``, of which the best on the validation runs is kept.
        batches: of an epoch.
        memory: of the running mean of the weights, per batch.
        dropout: before the last layer.
        blind: share of the windows shown without attention, and as many without gradient norms: hosts differ.
    """

    seed: int = 0
    states: int = 64
    keys: int = 32
    hidden: int = 64
    rate: float = 2e-3
    decay: float = 1e-2
    batch: int = 256
    real_weight: float = 4.0
    epochs: int = 10
    batches: int = 100
    memory: float = 0.99
    dropout: float = 0.5
    blind: float = 0.05


class Model(nn.Module):
    """``temporal.Net`` in torch, for batches."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.lstm = nn.LSTM(FEATURES, recipe.states, batch_first=True)
        self.query = nn.Linear(recipe.states, recipe.keys, bias=False)
        self.key = nn.Linear(recipe.states, recipe.keys, bias=False)
        self.hidden = nn.Linear(2 * recipe.states + SUMMARY, recipe.hidden)
        self.dropout = nn.Dropout(recipe.dropout)
        self.output = nn.Linear(recipe.hidden, len(HORIZONS) * OUTPUTS)
        self.direct = nn.Linear(SUMMARY, len(HORIZONS) * OUTPUTS, bias=False)
        with torch.no_grad():
            self.direct.weight.zero_()
            self.output.weight.mul_(0.1)  # it begins as "all stays, nothing happens"
            self.output.bias.copy_(torch.tensor([0.0, 1.0, 1.0, 0.0, -3.0, -3.0, -4.0, -4.0]).repeat(len(HORIZONS)))

    def forward(self, blocks: Tensor, filled: Tensor, summary: Tensor) -> Tensor:
        """(N, horizons, OUTPUTS)."""
        states, _ = self.lstm(blocks)
        scores = (self.key(states) @ self.query(states[:, -1]).unsqueeze(2)).squeeze(2)
        scores = (scores / math.sqrt(self.key.out_features)).masked_fill(~filled, -math.inf)
        shares = torch.softmax(scores, dim=1)
        found = torch.cat([states[:, -1], (shares.unsqueeze(1) @ states).squeeze(1), summary], dim=1)
        answers: Tensor = self.output(self.dropout(torch.tanh(self.hidden(found)))) + self.direct(summary)
        return answers.view(-1, len(HORIZONS), OUTPUTS)

    def net(self) -> Net:
        """The same for inference, rounded as it is stored."""
        raw = {name: value.numpy().astype(np.float64) for name, value in self.state_dict().items()}
        return Net(
            inputs=raw["lstm.weight_ih_l0"].T,
            recurrent=raw["lstm.weight_hh_l0"].T,
            bias=(raw["lstm.bias_ih_l0"] + raw["lstm.bias_hh_l0"]).astype(np.float32).astype(np.float64),
            query=raw["query.weight"].T,
            key=raw["key.weight"].T,
            hidden=raw["hidden.weight"].T,
            hidden_bias=raw["hidden.bias"],
            output=raw["output.weight"].T,
            direct=raw["direct.weight"].T,
            output_bias=raw["output.bias"],
        )


def part_of(trace: Trace) -> str:
    """Which part a real run belongs to; the same whichever others there are.

    Runs with the same faults go together, and those without by their name after the arm's (as benchmarks write it).
    """
    group = "+".join(trace.faults) or trace.name.partition(", ")[2] or trace.name
    place = int(hashlib.sha256(f"{_SPLIT} {group}".encode()).hexdigest()[:8], 16) / 2**32
    return PARTS[int(place >= 0.5) + int(place >= 0.75)]


def train(recipe: Recipe, micro: Samples, real: Samples | None, validation: Samples) -> tuple[Model, list[float]]:
    """The model that did best on the validation windows, and how it did after each epoch."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    model = Model(recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * recipe.batches)
    # What is kept is a running mean of the weights (Polyak and Juditsky 1992): the newest ones swing too much.
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.memory))  # type: ignore[no-untyped-call]
    best, kept, course = math.inf, model.state_dict(), []
    for _ in range(recipe.epochs):
        model.train()
        for _ in range(recipe.batches):
            batch = _batch(recipe, rng, micro, real)
            optimizer.zero_grad()
            _weighted(objective(model, batch)).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean.update_parameters(model)
        course.append(evaluate(mean.module, validation))
        if course[-1] < best:
            best, kept = course[-1], {name: value.clone() for name, value in mean.module.state_dict().items()}
        print(f"epoch {len(course)}: {course[-1]:.4f} on the validation runs", file=sys.stderr, flush=True)
    model.load_state_dict(kept)
    return model.eval(), course


def objective(model: nn.Module, some: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The four parts of the loss, each a mean over what is known."""
    answers = model(some["blocks"], some["filled"], some["summary"])
    events = {"diverged": answers[:, :, 6], "lost": answers[:, :, 7]}
    return {
        "loss": _pinball(answers[:, :, 0:3], some["loss"]),
        "attention": _pinball(answers[:, :, 3:6], some["attention"] - some["attention_now"].unsqueeze(1)),
        **{name: _unlikelihood(hazards, some[name]) for name, hazards in events.items()},
    }


def evaluate(model: nn.Module, some: Samples) -> float:
    """The loss on all windows, at rest."""
    model.eval()
    with torch.no_grad():
        return float(_weighted(objective(model, _tensors(some))))


def store(path: Path, net: Net, said: Mapping[str, object]) -> None:
    """Write weights that ``temporal.load_net`` reads, atomically; ``said`` is for people.

    The same weights are the same bytes: safetensors writes several entries of metadata in any order, so there is one.
    """
    model = {"kind": KIND, "features": FEATURES, "summary": SUMMARY, "block": BLOCK, "horizons": list(HORIZONS)}
    tensors = {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in vars(net).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(save(tensors, metadata={"model": json.dumps({**model, "made": said})}))
    temporary.replace(path)


def _batch(recipe: Recipe, rng: np.random.Generator, micro: Samples, real: Samples | None) -> dict[str, Tensor]:
    """Windows drawn with replacement, some of them made half blind."""
    weight = 0.0 if real is None else recipe.real_weight * len(real)
    count = round(recipe.batch * min(0.5, weight / (weight + len(micro))))
    parts = [micro.of(rng.integers(len(micro), size=recipe.batch - count))]
    if real is not None:
        parts.append(real.of(rng.integers(len(real), size=count)))
    tensors = [_tensors(part) for part in parts]
    joined = {name: torch.cat([one[name] for one in tensors]) for name in tensors[0]}
    unseen = torch.from_numpy(rng.random(recipe.batch) < recipe.blind)
    joined["blocks"][unseen, :, _ATTENTION] = 0.0
    for at in _SUMMARY_ATTENTION:
        joined["summary"][unseen, at] = 0.0
    for name in ("attention", "lost"):
        joined[name][unseen] = math.nan
    joined["blocks"][torch.from_numpy(rng.random(recipe.batch) < recipe.blind), :, _NORMS] = 0.0
    return joined


def _tensors(some: Samples) -> dict[str, Tensor]:
    names = ("blocks", "filled", "summary", "loss", "attention_now", "attention", "diverged", "lost")
    arrays = {name: getattr(some, name) for name in names}
    return {n: torch.from_numpy(a if a.dtype == bool else a.astype(np.float32)) for n, a in arrays.items()}


def _weighted(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([_WEIGHTS[name] * value for name, value in parts.items()]).sum()


def _pinball(answers: Tensor, truth: Tensor) -> Tensor:
    """Mean over the quantiles and all that is known; ``answers`` (N, K, 3) as ``temporal.quantiles`` reads them."""
    middle, below, above = answers.unbind(2)
    gap = nn.functional.softplus
    forecast = torch.stack([middle - gap(below), middle, middle + gap(above)], dim=2)
    known = torch.isfinite(truth)
    error = truth.nan_to_num().unsqueeze(2) - forecast
    level = torch.tensor(QUANTILES)
    losses = torch.maximum(level * error, (level - 1.0) * error).mean(2)
    return (losses * known).sum() / known.sum().clamp(min=1)


def _unlikelihood(hazards: Tensor, truth: Tensor) -> Tensor:
    """Mean negative log likelihood of the events by each horizon, as ``temporal.by_then`` reads them."""
    total = torch.cumsum(nn.functional.softplus(hazards), dim=1)
    known = torch.isfinite(truth)
    happened = truth.nan_to_num()
    losses = (1.0 - happened) * total - happened * torch.log(-torch.expm1(-total) + 1e-9)
    return (losses * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class Runs:
    """Windows to learn from, to stop by and to be judged on; ``tests`` by the name of the corpus."""

    micro: Samples
    real: Samples | None
    validation: Samples
    tests: Mapping[str, Samples]
    said: Mapping[str, object]


def gather(micro: Sequence[Trace], real: Sequence[Trace], held_out: Sequence[Trace]) -> Runs:
    """Split the runs. Each tenth of the made-up ones is for the test; without real ones, as many say when to stop."""
    parts = {part: [trace for trace in real if part_of(trace) == part] for part in PARTS}
    made_up = [list(micro[at::10]) for at in range(10)]
    tests = {f"{trace.corpus}, runs not trained on": parts["test"] for trace in parts["test"]}
    tests |= {f"{trace.corpus}, another corpus": list(held_out) for trace in held_out}
    foreseen = [trace for trace in made_up[0] if not set(trace.faults) & SUDDEN]
    tests |= {"micro-Tacotron, runs not trained on": made_up[0]}
    tests |= {"micro-Tacotron, those of them without redrawn attention or NaN batches": foreseen} if foreseen else {}
    stop_by = parts["validation"] or made_up[1]
    learn_from = [trace for some in made_up[1 if parts["validation"] else 2 :] for trace in some]
    counts = {
        "micro_runs": len(learn_from),
        "real_runs": len(parts["train"]),
        "validation_runs": len(stop_by),
        "test_runs": {name: len(some) for name, some in tests.items()},
        "corpora": sorted({trace.corpus for trace in (*micro, *real)}),
    }
    return Runs(
        micro=samples(learn_from),
        real=samples(parts["train"]) if parts["train"] else None,
        validation=samples(stop_by),
        tests={name: samples(some) for name, some in tests.items()},
        said=counts,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--micro", type=Path, required=True, help="folder of micro-Tacotron traces, filled up to --runs"
    )
    parser.add_argument("--runs", type=int, default=640, help="micro-Tacotron runs")
    parser.add_argument("--steps", type=int, default=400, help="steps of each")
    parser.add_argument("--real", type=Path, action="append", default=[], help="folder of real traces, to be split")
    parser.add_argument("--held-out", type=Path, action="append", default=[], help="folder of another corpus")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--batches", type=int, default=Recipe.batches, help="of an epoch")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the weights; the card gets the same name, .md")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    paths = generate(args.micro, runs=args.runs, steps=args.steps, seed=_MICRO_SEED)
    real, held_out = ([t for folder in folders for t in load_folder(folder)] for folders in (args.real, args.held_out))
    runs = gather([trace for path in paths for trace in load(path)], real, held_out)
    recipe = Recipe(seed=args.seed, epochs=args.epochs, batches=args.batches)
    model, course = train(recipe, runs.micro, runs.real, runs.validation)
    said = {**asdict(recipe), **runs.said, "best_epoch": int(np.argmin(course)) + 1, "micro_seed": _MICRO_SEED}
    store(args.out, model.net(), said)
    tables = {name: judged(model.net(), runs.validation, some) for name, some in runs.tests.items()}
    folders = "".join(f" --real TRACES/{folder.name}" for folder in args.real)
    folders += "".join(f" --held-out TRACES/{folder.name}" for folder in args.held_out)
    command = f"python -m tts_brain.learning.temporal_training --micro TRACES/micro --runs {args.runs}{folders} \\\n"
    command += f"        --steps {args.steps} --seed {args.seed} --epochs {args.epochs} --batches {args.batches}"
    text = card(said, tables, command)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
