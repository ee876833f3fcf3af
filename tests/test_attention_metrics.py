"""The attention metrics: the table of failures in FACTS.md section 4, edges, and laws."""

from __future__ import annotations

from itertools import pairwise
from math import log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tts_brain.attention.metrics import METRICS, decoder_frames, measure, report

T, N = 500, 100
SHARES = ("diagonality", "focus", "coverage", "attention_diag", "entropy", "end_reached")
CLOCK = torch.arange(T) / T  # time of each frame as a share of the utterance


def bumps(centres: Tensor, width: float = 0.5, tokens: int = N) -> Tensor:
    """(T, N): on each frame a Gaussian around its token, ``width`` tokens wide."""
    return (-((torch.arange(tokens) - centres.unsqueeze(1)) ** 2) / (2 * width**2)).softmax(1)


def one_hot(path: list[int], tokens: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(path), tokens).float()


def numbers(matrix: Tensor) -> dict[str, float]:
    """Metrics of one unpadded (T, N) matrix, by name."""
    frames, tokens = matrix.shape
    values = measure(matrix.unsqueeze(0), torch.tensor([frames]), torch.tensor([tokens]))
    return dict(zip(METRICS, values[0].tolist(), strict=True))


def mass_in_band(diagonality: float) -> float:
    """The raw band mass at T x N, as in the table; not below chance, where the metric is clipped."""
    frame, token = torch.arange(T).unsqueeze(1), torch.arange(N).unsqueeze(0)
    chance = (((frame + 0.5) / T - (token + 0.5) / N).abs() <= 0.1).double().mean().item()
    return diagonality * (1 - chance) + chance


SHARP = bumps(CLOCK * N)
SHUFFLED = SHARP[torch.randperm(T, generator=torch.Generator().manual_seed(0))]
CASES = {
    "uniform": torch.full((T, N), 1 / N),
    "sharp diagonal": SHARP,
    "blurred": bumps(CLOCK * N, width=5.0),
    "reversed": SHARP.flip(0),
    "stuck on last token": bumps(torch.full((T,), N - 1.0)),
    "random permutation": SHUFFLED,
    "half diagonal, then stuck": bumps((CLOCK * N).clamp(max=N / 2)),
    "skip of 30 tokens": bumps(CLOCK * 70 + 30 * (CLOCK >= 0.5)),
    "loop back 20 tokens": bumps(CLOCK * 120 - 20 * (CLOCK >= 0.5)),
}
CHANCE = 0.192
# FACTS.md section 4: Coqui score (mean over tokens of the largest weight), F, DFR (here never below chance), H / ln N.
TABLE = {
    "uniform": (0.010, 0.010, CHANCE, 1.00),
    "sharp diagonal": (0.790, 0.688, 1.00, 0.156),
    "blurred": (0.086, 0.084, 0.961, 0.642),
    "reversed": (0.790, 0.688, CHANCE, 0.156),  # .101
    "stuck on last token": (0.010, 0.881, CHANCE, 0.080),  # .111
    "random permutation": (0.790, 0.688, CHANCE, 0.156),  # .186
    "half diagonal, then stuck": (0.403, 0.736, 0.602, 0.151),
    "skip of 30 tokens": (0.561, 0.686, 0.673, 0.155),
    "loop back 20 tokens": (0.782, 0.684, 0.984, 0.157),
}


@pytest.mark.parametrize("case", CASES)
def test_the_table_of_facts_comes_out(case: str) -> None:
    coverage, focus, mass, entropy = TABLE[case]
    got = numbers(CASES[case])
    assert got["coverage"] == pytest.approx(coverage, abs=0.002)
    assert got["focus"] == pytest.approx(focus, abs=0.0015)
    assert got["entropy"] == pytest.approx(entropy, abs=0.0015)
    # The table took corners, t/T and n/N, for the band; we take centres, which moves up to half a token in or out.
    assert mass_in_band(got["diagonality"]) == pytest.approx(mass, abs=0.006)


def test_attention_diag_is_high_for_the_sharp_diagonal_alone() -> None:
    diag = {case: numbers(matrix)["attention_diag"] for case, matrix in CASES.items()}
    assert max(diag, key=lambda case: diag[case]) == "sharp diagonal"
    assert diag["sharp diagonal"] > 0.65
    for case in ("uniform", "reversed", "stuck on last token", "random permutation", "blurred"):
        assert diag[case] < 0.1, case
    assert diag["half diagonal, then stuck"] < 0.5


def test_the_path_tells_what_is_wrong() -> None:
    names = ("skips", "repeats", "longest_dwell", "end_reached")

    def path(case: str) -> tuple[float, ...]:
        got = numbers(CASES[case])
        return tuple(got[name] for name in names)

    # Five frames a token, each nearest to its own centre; the last token takes what is past 98.5, seven.
    assert path("sharp diagonal") == (0, 0, 7, 1)
    assert path("uniform") == (0, 0, T, 0)
    assert path("stuck on last token") == (0, 0, T, 1)
    assert path("reversed") == (0, N - 1, 7, 1)
    skips, repeats, dwell, end = path("half diagonal, then stuck")
    assert (skips, repeats, end) == (0, 0, 0) and dwell > T / 2
    assert path("skip of 30 tokens")[:2] == (1, 0)
    assert path("loop back 20 tokens")[:2] == (0, 1)
    assert min(path("random permutation")[:2]) > T / 3


def test_a_true_staircase_with_uneven_durations_is_an_alignment() -> None:
    durations = [3, 7, 2, 9, 4, 1, 6, 8, 2, 5, 7, 3, 4, 6, 5, 2, 8, 3, 6, 4]
    got = numbers(one_hot([token for token, frames in enumerate(durations) for _ in range(frames)], len(durations)))
    assert got["attention_diag"] > 0.9
    assert got["focus"] == got["coverage"] == got["end_reached"] == 1.0
    assert got["entropy"] == got["skips"] == got["repeats"] == 0.0
    assert got["longest_dwell"] == 9.0


@pytest.mark.parametrize(("frames", "tokens"), [(25, 100), (33, 100), (99, 100), (10, 10), (3, 5), (2, 7)])
def test_fewer_frames_than_tokens_costs_nothing_that_r_forbids(frames: int, tokens: int) -> None:
    path = [round(t * (tokens - 1) / (frames - 1)) for t in range(frames)]
    got = numbers(one_hot(path, tokens))
    assert got["coverage"] == 1.0
    assert got["attention_diag"] == pytest.approx(1.0)
    assert got["skips"] == 0.0


def test_one_token_in_six_covered_is_no_alignment() -> None:
    """FACTS: strong guidance alone gives high diagonality and focus with most tokens never read."""
    got = numbers(one_hot([min(99, 6 * (t // 30) + 3) for t in range(500)], 100))
    assert got["diagonality"] > 0.9 and got["focus"] == 1.0
    assert got["attention_diag"] == got["coverage"] == pytest.approx(0.17)
    assert got["skips"] == 16.0


@pytest.mark.parametrize("tokens", [2, 3, 4, 7])
def test_a_short_text_can_be_aligned_too(tokens: int) -> None:
    """Below five tokens the diagonal's own cells are wider than a ±10 % band."""
    assert numbers(one_hot([t * tokens // 40 for t in range(40)], tokens))["attention_diag"] == pytest.approx(1.0)
    assert numbers(torch.ones(40, tokens))["diagonality"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types_agree(dtype: torch.dtype) -> None:
    for case, matrix in CASES.items():
        exact, coarse = numbers(matrix), numbers(matrix.to(dtype))
        for name in ("diagonality", "focus", "coverage", "attention_diag", "entropy"):
            assert coarse[name] == pytest.approx(exact[name], abs=0.01), (case, name)


@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (1, 5), (5, 1), (2, 2)])
def test_the_smallest_utterances(frames: int, tokens: int) -> None:
    for matrix in (torch.ones(frames, tokens), torch.eye(max(frames, tokens))[:frames, :tokens]):
        got = numbers(matrix)
        assert all(0.0 <= got[name] <= 1.0 for name in SHARES)
        assert got["longest_dwell"] >= 1.0
    if 1 in (frames, tokens):
        assert numbers(torch.ones(frames, tokens))["attention_diag"] == 0.0, "nothing to be told from chance"


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), -1.0])
def test_a_row_that_says_nothing_counts_as_uniform(bad: float) -> None:
    broken, flat = SHARP.clone(), SHARP.clone()
    broken[100:200] = bad
    flat[100:200] = 1 / N
    assert numbers(broken) == numbers(flat)
    one_nan = SHARP.clone()
    one_nan[100:200, 7] = float("nan")
    assert numbers(one_nan) == numbers(flat)


def test_lengths_are_clamped_and_nothing_gives_zeros() -> None:
    batch = SHARP.expand(4, T, N)
    values = measure(batch, torch.tensor([T + 9, 0, T, -3]), torch.tensor([N + 9, N, 0, N]))
    assert torch.equal(values[0], measure(batch[:1], torch.tensor([T]), torch.tensor([N]))[0])
    assert not values[1:].any()
    assert measure(torch.empty(2, 0, 5), torch.zeros(2).long(), torch.ones(2).long()).tolist() == [[0.0] * 9] * 2


class NoReading(TorchFunctionMode):
    """Raises when a tensor's value, or a shape that hangs on one, is asked for: a GPU would be waited for.

    A meta tensor would show the same, but its first use imports for 8 s.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reading = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "equal"}
        if func.__name__ in reading or (func.__name__ == "__getitem__" and isinstance(args[1], Tensor)):
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    with NoReading():
        values = measure(SHARP[None], torch.tensor([T]), torch.tensor([N]))
        with pytest.raises(AssertionError, match="waits"):
            values[0, 0].item()
    assert (values.shape, values.dtype, values.device.type) == ((1, len(METRICS)), torch.float32, "cpu")


def test_off_the_graph() -> None:
    assert not measure(SHARP.clone().requires_grad_()[None], torch.tensor([T]), torch.tensor([N])).requires_grad


def test_report_is_the_mean_over_utterances() -> None:
    values = measure(torch.stack([SHARP, CASES["uniform"]]), torch.tensor([T, T]), torch.tensor([N, N]))
    got = report(values)
    assert [getattr(got, name) for name in METRICS] == pytest.approx(values.double().mean(0).tolist())
    assert isinstance(got.focus, float)


def test_decoder_frames_round_up() -> None:
    assert decoder_frames(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]), 3).tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert decoder_frames(torch.tensor([7]), 1).tolist() == [7]
    with pytest.raises(ValueError, match="reduction_factor=0"):
        decoder_frames(torch.tensor([7]), 0)


def test_errors_name_the_shapes() -> None:
    one, two = torch.tensor([4]), torch.tensor([4, 4])
    with pytest.raises(ValueError, match=r"\(4, 5\); pass \(B, T, N\)"):
        measure(torch.ones(4, 5), one, one)
    with pytest.raises(ValueError, match=r"frame_lengths has shape \(1,\); pass \(2,\)"):
        measure(torch.ones(2, 4, 5), one, two)
    with pytest.raises(ValueError, match=r"token_lengths has shape \(2, 1\); pass \(2,\)"):
        measure(torch.ones(2, 4, 5), two, two[:, None])
    with pytest.raises(ValueError, match=r"band=1\.5"):
        measure(torch.ones(1, 4, 5), one, one, band=1.5)
    for wrong in (torch.ones(9), torch.ones(2, 8), torch.ones(0, 9)):
        with pytest.raises(ValueError, match=r"pass \(B, 9\)"):
            report(wrong)


@st.composite
def utterances(draw: st.DrawFn) -> Tensor:
    """(T, N) of positive weights, from nearly uniform to nearly one-hot; rows do not sum to 1."""
    frames, tokens = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.randn(frames, tokens, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))).exp()


def padded(matrices: list[Tensor], extra: int, filler: float) -> tuple[Tensor, Tensor, Tensor]:
    frames, tokens = (torch.tensor([m.shape[d] for m in matrices]) for d in (0, 1))
    batch = torch.full((len(matrices), int(frames.max()) + extra, int(tokens.max()) + extra), filler)
    for row, matrix in zip(batch, matrices, strict=True):
        row[: matrix.shape[0], : matrix.shape[1]] = matrix
    return batch, frames, tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(utterances(), min_size=1, max_size=4), st.integers(0, 5), st.sampled_from([0.0, 9.0, -1e9, float("nan")])
)
def test_neither_padding_nor_company_changes_an_utterance(batch: list[Tensor], extra: int, filler: float) -> None:
    together = measure(*padded(batch, extra, filler))
    alone = torch.cat([measure(*padded([matrix], 0, 0.0)) for matrix in batch])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5), (together - alone).abs().max()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=12))
def test_any_float_gives_finite_values_in_range(rows: list[list[float]]) -> None:
    got = numbers(torch.tensor(rows))
    assert all(0.0 <= got[name] <= 1.0 for name in SHARES), got
    assert got["attention_diag"] == min(got["diagonality"], got["focus"], got["coverage"])
    assert got["skips"] + got["repeats"] <= len(rows) - 1
    assert 1 <= got["longest_dwell"] <= len(rows)


@settings(max_examples=60, deadline=None)
@given(utterances(), st.integers(0, 2**31))
def test_only_the_proportions_within_a_row_count(matrix: Tensor, seed: int) -> None:
    # Powers of two scale exactly: rounding cannot move the arg-max.
    power = torch.randint(-20, 21, (matrix.shape[0], 1), generator=torch.Generator().manual_seed(seed))
    scaled, plain = (measure(*padded([rows], 0, 0.0)) for rows in (matrix * 2.0**power, matrix))
    assert torch.allclose(scaled, plain, rtol=0, atol=1e-5), (scaled - plain).abs().max()


@settings(max_examples=40, deadline=None)
@given(st.integers(50, 200), st.integers(12, 40), st.integers(0, 2**31))
def test_shuffled_frames_are_less_diagonal(frames: int, tokens: int, seed: int) -> None:
    sharp = bumps(torch.arange(frames) / frames * tokens, tokens=tokens)
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(seed))
    straight, shuffled = numbers(sharp), numbers(sharp[order])
    assert shuffled["diagonality"] < straight["diagonality"] - 0.2
    for name in ("focus", "coverage", "entropy"):
        assert shuffled[name] == pytest.approx(straight[name], abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(utterances())
def test_against_the_definitions_written_out(matrix: Tensor) -> None:
    """Loops over plain numbers, straight from DESIGN.md."""
    frames, tokens = matrix.shape
    rows = [[weight / sum(row) for weight in row] for row in matrix.double().tolist()]
    path = [row.index(max(row)) for row in rows]
    jumps = [after - before for before, after in pairwise(path)]
    dwells = [1]
    for jump in jumps:
        dwells.append(dwells[-1] + 1 if jump == 0 else 1)
    got = numbers(matrix)
    assert got["focus"] == pytest.approx(sum(map(max, rows)) / frames, abs=1e-5)
    peaks = sum(max(column) for column in zip(*rows, strict=True))
    assert got["coverage"] == pytest.approx(min(1.0, peaks / tokens / min(1.0, frames / tokens)), abs=1e-5)
    nats = -sum(w * log(w) for row in rows for w in row if w > 0) / frames
    assert got["entropy"] == pytest.approx(nats / log(tokens) if tokens > 1 else 0.0, abs=1e-5)
    assert got["repeats"] == sum(jump < 0 for jump in jumps)
    if frames >= tokens:
        assert got["skips"] == sum(jump > 1 for jump in jumps)
    assert got["longest_dwell"] == max(dwells)
    assert got["end_reached"] == (max(path) == tokens - 1)
