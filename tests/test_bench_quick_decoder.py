"""The quick pass of the decoder is the host's: outputs, attention, and the gradient of every parameter."""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("espnet2", reason="ESPnet is not installed: uv pip install 'tts-brain[espnet]'")

import torch
from espnet2.tts.tacotron2 import Tacotron2

from bench.quick_decoder import Unsupported, _zoneout, quicken

SIZES = {
    "embed_dim": 12,
    "eunits": 12,
    "econv_chans": 12,
    "adim": 10,
    "dunits": 14,
    "prenet_units": 8,
    "postnet_layers": 2,
    "postnet_chans": 8,
    "aconv_chans": 4,
    "aconv_filts": 3,
}


def _pair(reduction_factor: int, **more: float) -> tuple[Tacotron2, Tacotron2]:
    torch.manual_seed(0)
    host = Tacotron2(idim=9, odim=6, reduction_factor=reduction_factor, **SIZES, **more).double()
    with torch.no_grad():  # fresh weights give an almost uniform attention, whose gradients hide errors
        for parameter in host.dec.parameters():
            parameter.mul_(2.0)
    quick = copy.deepcopy(host)
    quicken(quick)
    return host, quick


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "text": torch.randint(1, 8, (3, 7), generator=generator),
        "text_lengths": torch.tensor([7, 5, 4]),
        "feats": torch.randn(3, 24, 6, generator=generator, dtype=torch.float64),
        "feats_lengths": torch.tensor([24, 17, 12]),
    }


def _run(model: Tacotron2) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    seen: list[torch.Tensor] = []
    handle = model.dec.register_forward_hook(lambda module, inputs, outputs: seen.extend(outputs))
    loss, _, _ = model(**_batch())
    handle.remove()
    # The attention enters the loss by more than the guide, so that every entry has a gradient of its own.
    weight = torch.linspace(-1, 1, seen[3].numel(), dtype=seen[3].dtype).view_as(seen[3])
    (loss + (seen[3] * weight).sum()).backward()
    return [loss, *seen], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("reduction_factor", [1, 2, 4])
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_the_hosts(reduction_factor: int, training: bool) -> None:
    """Without random draws in training; with dropout off and zoneout's mean in evaluation."""
    rate = 0.0 if training else 0.1
    host, quick = _pair(reduction_factor, dropout_rate=0.0, zoneout_rate=rate)
    for model in (host, quick):
        model.train(training)
    outputs, gradients = _run(host)
    quick_outputs, quick_gradients = _run(quick)
    for ours, theirs in zip(quick_outputs, outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3
    torch.testing.assert_close(quick_gradients, gradients, rtol=1e-7, atol=1e-10)


def test_zoneout_with_the_same_masks_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host draws its masks one by one, we draw all at once: given the same ones, the rest is the same."""
    host, quick = _pair(2, dropout_rate=0.0, zoneout_rate=0.4)
    masks = torch.rand(12, 4, 3, 14, generator=torch.Generator().manual_seed(3)).lt(0.4).double()
    in_order = iter(masks.flatten(0, 1))
    cell = type(host.dec.lstm[0])
    monkeypatch.setattr(
        cell,
        "_zoneout",
        lambda self, h, n, prob: tuple(torch.lerp(new, old, next(in_order)) for old, new in zip(h, n, strict=True)),
    )
    monkeypatch.setattr("bench.quick_decoder._zoneout", lambda *args: masks)
    outputs, gradients = _run(host)
    quick_outputs, quick_gradients = _run(quick)
    torch.testing.assert_close(quick_outputs, outputs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(quick_gradients, gradients, rtol=1e-7, atol=1e-10)


def test_zoneout_keeps_its_share() -> None:
    torch.manual_seed(0)
    drawn = _zoneout(0.1, (50, 4, 16, 32), training=True, like=torch.zeros(1))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.1, abs=0.005)
    assert _zoneout(0.1, (50, 4, 16, 32), training=False, like=torch.zeros(1)).unique().tolist() == pytest.approx([0.1])


def test_an_unknown_decoder_is_refused() -> None:
    model = Tacotron2(idim=9, odim=6, **SIZES, atype="forward_ta")
    with pytest.raises(Unsupported, match="location attention"):
        quicken(model)
