"""What each knob does to the loss of ESPnet's real Tacotron2, and what the host goes on reporting."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

from espnet.nets.pytorch_backend.e2e_tts_tacotron2 import GuidedAttentionLoss
from espnet2.tts.tacotron2 import Tacotron2
from espnet_run import SMALL, quick

from tts_brain.attention.forward_sum import forward_sum
from tts_brain.attention.guide import guided_loss, guided_places, tokens_at_once
from tts_brain.attention.metrics import measure, report
from tts_brain.config import BrainConfig
from tts_brain.losses.tversky import soft_counts, tversky_loss
from tts_brain.pytorch.audio import speaking_rates
from tts_brain.pytorch.session import BrainSession
from tts_brain.types import KNOBS, OVER_FRAMES, OVER_SPEECH, Capabilities
from tts_brain_espnet.losses import LossTap

LENGTHS = (torch.tensor([9, 6, 4]), torch.tensor([31, 20, 13]))
NEUTRAL = {name: knob.neutral for name, knob in KNOBS.items() if knob.neutral is not None}
# A weight this small adds nothing that float32 can show; the knob has no zero.
NEUTRAL |= {"guided_weight": KNOBS["guided_weight"].low, "guided_sigma": 0.4}
Result = tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]


class Bench:
    """One model, one batch, and the session that a run would have."""

    def __init__(self, folder: Path, mode: str = "full", guide_over: str = OVER_SPEECH, **tts_conf: Any) -> None:
        torch.manual_seed(0)
        self.tts = Tacotron2(idim=20, odim=8, **{**SMALL, **tts_conf})
        self.session = BrainSession(
            BrainConfig.from_dict({**quick(mode), "guide_over": guide_over}),
            Capabilities("espnet", ("total", "mel", "guided", "gate"), tuple(KNOBS), "attention", True),
            folder,
            optimizers=[torch.optim.SGD(self.tts.parameters(), lr=0.1)],
            model=self.tts,
            parts={},
            host_values={"guided_sigma": 0.4},
        )
        tokens, frames = LENGTHS
        self.batch = {
            "text": torch.randint(1, 18, (3, int(tokens.max()))),
            "text_lengths": tokens,
            "feats": torch.randn(3, int(frames.max()), 8),
            "feats_lengths": frames,
        }
        self.tap = LossTap(self.tts, self.session)

    def knobs(self, **knobs: float) -> None:
        """Set knobs as a decision would; all others are neutral and the Tversky loss is off."""
        self.session.manager.knobs = {**NEUTRAL, **knobs}

    def forward(self, tts: Any = None) -> Result:
        """One training forward; dropout and zoneout are the same each time."""
        torch.manual_seed(1)
        result: Result = (tts or self.tts)(**self.batch)
        return result

    def host(self) -> Result:
        """The host's own forward of the same model and batch."""
        return self.forward(self.tap._host_forward)

    def attention(self) -> torch.Tensor:
        """Of the host's own forward."""
        seen = []
        handle = self.tts.dec.register_forward_hook(lambda *_: seen.append(_[2][3].detach()))
        self.host()
        handle.remove()
        return seen[0]

    def lengths(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens with the end of the sentence, and decoder frames."""
        return LENGTHS[0] + 1, LENGTHS[1] // self.tts.reduction_factor

    def cells(self, sigma: float = 0.4) -> tuple[float, float]:
        """Mean guided penalty over cells by the host, and frame-weighted tokens per utterance."""
        tokens, frames = self.lengths()
        mean = GuidedAttentionLoss(sigma=sigma, alpha=1.0)(self.attention(), tokens, frames)
        return float(mean), float((tokens * frames).sum() / frames.sum())


@pytest.fixture(params=["location", "forward", "forward_ta"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Bench:
    return Bench(tmp_path, atype=request.param)


def test_observing_returns_the_very_tensors_of_the_host(tmp_path: Path) -> None:
    bench = Bench(tmp_path, mode="observe")
    (ours, stats, weight), (host, host_stats, host_weight) = bench.forward(), bench.host()
    assert torch.equal(ours, host) and torch.equal(weight, host_weight)
    assert stats == host_stats


@pytest.mark.parametrize("atype", ["location", "forward", "forward_ta"])
def test_guided_weight_and_width_are_live_and_the_host_reports_its_own(atype: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, guide_over=OVER_FRAMES, atype=atype)
    host, host_stats, _ = bench.host()
    for weight, sigma in ((2.0, 0.4), (10.0, 0.4), (10.0, 0.2)):
        bench.knobs(guided_weight=weight, guided_sigma=sigma)
        loss, stats, _ = bench.forward()
        plain_mean, tokens = bench.cells()
        mean, _ = bench.cells(sigma)
        assert loss.item() == pytest.approx(host.item() - plain_mean + weight * tokens * mean, rel=1e-5)
        assert stats == host_stats
        assert bench.tap.raw["guided"] == pytest.approx(plain_mean * tokens, rel=1e-5)
    assert (bench.tts.attn_loss.alpha, bench.tts.attn_loss.sigma) == (1.0, 0.4)


def test_the_guide_is_drawn_over_speech(bench: Bench) -> None:
    bench.batch["feats"][:, :9] -= 20.0  # the clips begin with silence
    tokens, frames = bench.lengths()
    r, attention = bench.tts.reduction_factor, bench.attention()
    places = guided_places(OVER_SPEECH, bench.batch["feats"], LENGTHS[1], r, frames, attention.shape[1])
    assert places[:, 1].max() < 0.05
    (host, _, _), (plain_mean, _) = bench.host(), bench.cells()
    bench.knobs(guided_weight=3.0, guided_sigma=0.3)
    loss, _, _ = bench.forward()
    ours = guided_loss(attention, frames, tokens, places, 0.3).item()
    assert loss.item() == pytest.approx(host.item() - plain_mean + 3.0 * ours, rel=1e-5)


def test_a_width_without_a_weight_keeps_the_hosts_weight(tmp_path: Path) -> None:
    bench = Bench(tmp_path, guide_over=OVER_FRAMES, guided_attn_loss_lambda=7.0)
    bench.session.manager.knobs = {"guided_sigma": 0.2}
    host, plain, mean = bench.host()[0].item(), bench.cells()[0], bench.cells(0.2)[0]
    assert bench.forward()[0].item() == pytest.approx(host + 7.0 * (mean - plain), rel=1e-5)
    bench.session.config.guide_over = OVER_SPEECH
    for neutral in ({"mel_weight": 1.0}, {"guided_sigma": 0.4}):
        bench.session.manager.knobs = neutral
        assert bench.forward()[0].item() == host


def test_the_forward_sum_term_is_added_and_the_host_reports_none_of_it(bench: Bench) -> None:
    attention = []
    handle = bench.tts.dec.register_forward_hook(lambda *seen: attention.append(seen[2][3].detach()))
    bench.knobs()
    neutral, host_stats, _ = bench.forward()
    bench.knobs(forward_sum_weight=0.2)
    loss, stats, _ = bench.forward()
    handle.remove()
    frames = LENGTHS[1] // bench.tts.reduction_factor
    tokens, r = LENGTHS[0] + 1, bench.tts.reduction_factor
    places = guided_places(OVER_SPEECH, bench.batch["feats"], LENGTHS[1], r, frames, attention[0].shape[1])
    path = forward_sum(attention[0], frames, tokens, tokens_at_once(places, frames, tokens)).mean()
    assert path.item() > 0.0
    assert loss.item() == pytest.approx(neutral.item() + 0.2 * path.item(), rel=1e-5)
    assert stats == host_stats


def test_where_texts_are_mixed_up_our_terms_look_at_the_clips_that_may_be_right(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.batch["feats"][0, :15] -= 20.0  # the first clip is silent for half of its time
    rates = speaking_rates(bench.batch["feats"], LENGTHS[1], LENGTHS[0])
    assert bench.session.believable_rates is None
    bench.session._diagnosis._rates.add([], [rates[1]] * 240 + [9.0 * rates[1]] * 16)
    least, most = bench.session.believable_rates
    assert [least <= rate <= most for rate in rates] == [False, True, True]
    neutral, attention = bench.host()[0], bench.attention()
    bench.knobs(forward_sum_weight=0.2)
    tokens, frames = bench.lengths()
    r = bench.tts.reduction_factor
    places = guided_places(OVER_SPEECH, bench.batch["feats"], LENGTHS[1], r, frames, attention.shape[1])
    path = forward_sum(attention, frames, tokens, tokens_at_once(places, frames, tokens))
    without_guide = neutral.item() - bench.cells()[0]
    assert bench.forward()[0].item() == pytest.approx(without_guide + 0.2 * path[1:].mean().item(), rel=1e-5)
    assert path[0] != pytest.approx(path[1:].mean().item(), rel=0.01)


@pytest.mark.parametrize("loss_type", ["L1", "L2", "L1+L2"])
def test_mel_and_gate_weight(loss_type: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, loss_type=loss_type)
    bench.knobs()
    neutral, stats, _ = bench.forward()
    bench.knobs(mel_weight=1.5, gate_weight=0.5)
    loss, _, _ = bench.forward()
    mel = sum(stats[name].item() for name, kind in (("l1_loss", "L1"), ("mse_loss", "L2")) if kind in loss_type)
    assert loss.item() == pytest.approx(neutral.item() + 0.5 * mel - 0.5 * stats["bce_loss"].item(), rel=1e-5)
    assert bench.tap.raw["mel"] == pytest.approx(mel, rel=1e-5)
    assert bench.tap.raw["gate"] == pytest.approx(stats["bce_loss"].item(), rel=1e-5)


def test_tversky_is_priced_over_the_valid_frames(bench: Bench) -> None:
    bench.knobs()
    neutral, _, _ = bench.forward()
    seen: list[Any] = []
    handle = bench.tts.taco2_loss.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    bench.host()
    handle.remove()
    _, _, logits, _, labels, lengths = seen[0]
    valid = torch.arange(logits.shape[1]) < lengths[:, None]
    expected = tversky_loss(*soft_counts(logits, labels, valid), 0.3, 0.7).item()
    bench.knobs(tversky_weight=0.5, tversky_alpha=0.3, tversky_beta=0.7, gate_weight=1.0)
    assert bench.forward()[0].item() == pytest.approx(neutral.item() + 0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("conf", [{"use_guided_attn_loss": False}, {"guided_attn_loss_lambda": 0.0}], ids=str)
def test_a_host_without_guidance_gets_ours(conf: dict[str, Any], tmp_path: Path) -> None:
    bench = Bench(tmp_path, guide_over=OVER_FRAMES, **conf)
    host, host_stats, _ = bench.host()
    bench.knobs(guided_weight=3.0)
    loss, stats, _ = bench.forward()
    mean, tokens = bench.cells()
    assert loss.item() == pytest.approx(host.item() + 3.0 * tokens * mean, rel=1e-5)
    assert stats["loss"].item() == pytest.approx(host.item(), rel=1e-5)
    assert stats.keys() == host_stats.keys()
    loss.backward()
    attention = [p.grad for name, p in bench.tts.named_parameters() if "dec.att." in name and p.grad is not None]
    assert attention and all(g.abs().sum() > 0 for g in attention)


def test_masks_of_either_kind(tmp_path: Path) -> None:
    bench = Bench(tmp_path, use_masking=False, use_weighted_masking=True)
    bench.knobs()
    neutral, stats, _ = bench.forward()
    bench.knobs(mel_weight=2.0)
    mel = stats["l1_loss"].item() + stats["mse_loss"].item()
    assert bench.forward()[0].item() == pytest.approx(neutral.item() + mel, rel=1e-5)


def test_attention_is_measured_on_the_frames_and_tokens_there_are(bench: Bench) -> None:
    """Lengths as the host cuts them: decoder frames rounded down, the end-of-sentence among the tokens."""
    attention: list[torch.Tensor] = []
    bench.tts.dec.register_forward_hook(lambda module, inputs, outputs: attention.append(outputs[3].detach()))
    bench.knobs()
    bench.forward()
    expected = report(measure(attention[0][[0, 2]], LENGTHS[1][[0, 2]] // 3, LENGTHS[0][[0, 2]] + 1))
    seen = bench.session._under_way.attention
    assert seen is not None and report(seen) == expected
    assert bench.tap.text_length == pytest.approx(float((LENGTHS[0] + 1).double().mean()))


def test_evaluation_is_the_hosts(bench: Bench) -> None:
    bench.knobs(guided_weight=9.0, mel_weight=3.0)
    bench.tts.eval()
    with torch.no_grad():
        assert torch.equal(bench.forward()[0], bench.host()[0])


def test_detach_gives_everything_back(bench: Bench) -> None:
    bench.knobs(guided_weight=9.0)
    bench.tap.detach()
    assert "forward" not in vars(bench.tts)
    assert not bench.tts.dec._forward_hooks and not bench.tts.taco2_loss._forward_hooks
    torch.manual_seed(1)
    assert torch.equal(bench.tts(**bench.batch)[0], bench.host()[0])


def test_a_nan_batch_is_kept_as_nan(bench: Bench) -> None:
    seen: list[Any] = []
    bench.session.see_batch = seen.append
    bench.batch["feats"][0, 3] = float("nan")
    bench.forward()
    assert bench.tap.raw["mel"] != bench.tap.raw["mel"]
    (facts,) = seen
    assert len(facts.not_finite) == 1 and facts.text_rates == ()  # nothing is told of the others' speech


@pytest.mark.parametrize("inverted", [False, True])
def test_what_the_data_are_like_is_seen(inverted: bool, tmp_path: Path) -> None:
    bench, seen = Bench(tmp_path, mode="observe"), []
    bench.session.see_batch = seen.append
    bench.tap.names = ("a", "b", "c")
    if inverted:
        bench.tts.taco2_loss.register_forward_pre_hook(lambda _, given: (*given[:4], 1.0 - given[4], given[5]))
    bench.forward()
    (facts,) = seen
    assert (facts.clips, facts.names, facts.alike_tail) == (3, ("a", "b", "c"), 0.0)
    assert facts.end_labelled_at < 0.2 if inverted else facts.end_labelled_at == 1.0
    # Noise all along: the first and last frame that count as sound lie a little inside.
    assert facts.text_rates == pytest.approx((LENGTHS[0] / LENGTHS[1]).tolist(), rel=0.1)
