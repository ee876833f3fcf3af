"""The teacher-forced pass of ESPnet's Tacotron2 decoder, the same mathematics in far fewer operations.

ESPnet's decoder calls some seventy operations per decoder step, and autograd adds every weight's gradient up once per
step: on one core that, not arithmetic, is where a small model's time goes. Here the prenet and the output layers see
all steps at once, and the loop that is left (attention and LSTM layers) has a backward pass of its own that makes each
weight's gradient in one product at the end. Parameters, loss, reports, free-running synthesis and all else are the
host's. ``tests/test_bench_quick_decoder.py`` compares outputs and gradients with the host's decoder.
"""

from __future__ import annotations

from typing import Any

import torch
from espnet2.tts.tacotron2 import Tacotron2
from torch import Tensor


class Unsupported(TypeError):
    """A decoder that the quick pass does not know."""


def quicken(tts: Tacotron2) -> None:
    """Let ``tts.dec`` take the quick pass; hooks on it see what they always saw.

    Raises:
        Unsupported: not location-sensitive attention with two LSTM layers, a prenet, and accumulated weights.
    """
    decoder = tts.dec
    known = (
        type(decoder.att).__name__ == "AttLoc"
        and len(decoder.lstm) == 2
        and decoder.prenet is not None
        and decoder.cumulate_att_w
        and decoder.use_concate
        and decoder.output_activation_fn is None
    )
    if not known:
        raise Unsupported(
            "the quick pass knows location attention, two LSTM layers and a prenet; use the host's decoder"
        )
    decoder.forward = lambda hs, hlens, ys: _forward(decoder, hs, hlens, ys)


def _forward(decoder: Any, hs: Tensor, hlens: Tensor, ys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``Decoder.forward``: (B, L, 80) after and before the postnet, stop logits (B, L), attention (B, L / r, N)."""
    r, att = decoder.reduction_factor, decoder.att
    batch, tokens = hs.shape[:2]
    ys = ys[:, r - 1 :: r] if r > 1 else ys
    before_first = hs.new_zeros(1, batch, decoder.odim)
    previous = torch.cat([before_first, ys.transpose(0, 1)[:-1]])  # (T, B, odim), teacher forcing
    cells = [getattr(layer, "cell", layer) for layer in decoder.lstm]
    first, second = cells
    width = hs.shape[2]
    bias = first.bias_ih + first.bias_hh
    from_prenet = decoder.prenet(previous) @ first.weight_ih[:, width:].T + bias
    pad = torch.arange(tokens, device=hs.device) >= torch.as_tensor(hlens, device=hs.device).unsqueeze(1)
    kernel = att.mlp_att.weight @ att.loc_conv.weight.flatten(1)  # no bias in either: one convolution
    zoneout = getattr(decoder.lstm[0], "zoneout_rate", 0.0)
    shape = (len(previous), 4, batch, first.hidden_size)
    keep = _zoneout(zoneout, shape, decoder.training, hs)
    z, context, weights = _Loop.apply(
        hs,
        att.mlp_enc(hs),
        from_prenet,
        kernel,
        att.mlp_dec.weight,
        att.gvec.weight.flatten(),
        torch.cat([first.weight_ih[:, :width], first.weight_hh], dim=1),
        torch.cat([second.weight_ih, second.weight_hh], dim=1),
        second.bias_ih + second.bias_hh,
        att.gvec.bias,
        pad,
        keep,
    )
    both = torch.cat([z, context], dim=2).transpose(0, 1)  # (B, T, H + E)
    logits = decoder.prob_out(both).flatten(1)
    # feat_out's columns are (odim, r): frames of one band lie together.
    before = decoder.feat_out(both).view(batch, len(previous), decoder.odim, r)
    before = before.permute(0, 2, 1, 3).reshape(batch, decoder.odim, -1)
    after = before if decoder.postnet is None else before + decoder.postnet(before)
    return after.transpose(1, 2), before.transpose(1, 2), logits, weights.transpose(0, 1)


def _zoneout(rate: float, shape: tuple[int, ...], training: bool, like: Tensor) -> Tensor:
    """(T, 4, B, H) share of the old state that is kept: z and c of the first layer, then of the second."""
    if training and rate > 0.0:
        return like.new_empty(shape).bernoulli_(rate)
    return like.new_full(shape, rate)


class _Loop(torch.autograd.Function):
    """The recurrent part: attention on the first layer's old state, then both LSTM layers with zoneout.

    Shapes: T decoder steps, B utterances, N tokens, E encoder units, A attention units, K taps, H LSTM units.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hs: Tensor,  # (B, N, E)
        encoded: Tensor,  # (B, N, A)
        from_prenet: Tensor,  # (T, B, 4H)
        kernel: Tensor,  # (A, K)
        query: Tensor,  # (A, H)
        energy: Tensor,  # (A,)
        w1: Tensor,  # (4H, E + H)
        w2: Tensor,  # (4H, H + H)
        b2: Tensor,  # (4H,)
        energy_bias: Tensor,  # (1,), no more than a shift of what the softmax sees
        pad: Tensor,  # (B, N)
        keep: Tensor,  # (T, 4, B, H)
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weights, context, seen, state, gates, cells = _run(
            hs, encoded, from_prenet, kernel, query, energy, w1, w2, b2, pad, keep
        )
        ctx.save_for_backward(
            hs, hidden, weights, context, seen, state, gates, cells, keep, kernel, query, energy, w1, w2
        )
        return state[1:, 2].clone(), context, weights

    @staticmethod
    def backward(ctx: Any, dz: Tensor, dcontext: Tensor, dweights: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        dhs, dencoded, dfrom, dkernel, dquery, denergy, dw1, dw2, db2 = _back(dz, dcontext, dweights, *saved)
        return dhs, dencoded, dfrom, dkernel, dquery, denergy, dw1, dw2, db2, torch.zeros_like(denergy[:1]), None, None


def _cell(
    gates: Tensor, z: Tensor, c: Tensor, keep_z: Tensor, keep_c: Tensor, new_z: Tensor, new_c: Tensor, inner: Tensor
):
    """LSTM cell and zoneout. ``gates`` (B, 4H) holds input, forget, cell, output and becomes their activations;
    ``inner`` becomes tanh of the cell before zoneout."""
    i, f, g, o = gates.chunk(4, 1)
    gates.narrow(1, 0, 2 * z.size(1)).sigmoid_()
    g.tanh_()
    o.sigmoid_()
    made = torch.addcmul(f * c, i, g)
    torch.tanh(made, out=inner)
    torch.lerp(made, c, keep_c, out=new_c)
    torch.lerp(o * inner, z, keep_z, out=new_z)


def _uncell(
    gates: Tensor, inner: Tensor, c: Tensor, keep_z: Tensor, keep_c: Tensor, dz: Tensor, dc: Tensor, dgates: Tensor
):
    """Backward of ``_cell``: fills ``dgates`` (before the activations), returns what zoneout and the forget gate pass
    on to the old z and c."""
    i, f, g, o = gates.chunk(4, 1)
    di, df, dg, do = dgates.chunk(4, 1)
    dold_z, dold_c = dz * keep_z, dc * keep_c
    dmade_z = dz - dold_z
    dmade_c = (dc - dold_c).add_(torch.ops.aten.tanh_backward(dmade_z * o, inner))
    do.copy_(torch.ops.aten.sigmoid_backward(dmade_z.mul_(inner), o))
    di.copy_(torch.ops.aten.sigmoid_backward(dmade_c * g, i))
    df.copy_(torch.ops.aten.sigmoid_backward(dmade_c * c, f))
    dg.copy_(torch.ops.aten.tanh_backward(dmade_c * i, g))
    return dold_z, dold_c.addcmul_(dmade_c, f)


def _run(
    hs: Tensor,
    encoded: Tensor,
    from_prenet: Tensor,
    kernel: Tensor,
    query: Tensor,
    energy: Tensor,
    w1: Tensor,
    w2: Tensor,
    b2: Tensor,
    pad: Tensor,
    keep: Tensor,
):
    """What ``_Loop`` saves: tanh of the attention's inner sum (T, B, N, A), weights (T, B, N), context (T, B, E),
    padded accumulated weights before each step, states z1, c1, z2, c2 (T + 1, 4, B, H), gates, cells before zoneout."""
    steps, batch, units = from_prenet.size(0), from_prenet.size(1), w1.size(0) // 4
    tokens, width, inner = hs.size(1), hs.size(2), encoded.size(2)
    taps = kernel.size(1)
    hidden = hs.new_empty([steps, batch * tokens, inner])
    weights, context = hs.new_empty([steps, batch, tokens]), hs.new_empty([steps, batch, width])
    seen = hs.new_zeros([steps + 1, batch, tokens + taps - 1])
    state = hs.new_zeros([steps + 1, 4, batch, units])
    gates, cells = hs.new_empty([steps, 2, batch, 4 * units]), hs.new_empty([steps, 2, batch, units])
    middle = seen.narrow(2, taps // 2, tokens)
    inside = (~pad).to(hs.dtype)
    middle[0].copy_(inside / inside.sum(1, keepdim=True))
    kernel_t, query_t, w1_t, w2_t = kernel.t(), query.t(), w1.t().contiguous(), w2.t().contiguous()
    masked = torch.zeros_like(inside).masked_fill_(pad, float("-inf"))
    flat = encoded.reshape(-1, inner)
    for t in range(steps):
        z1, c1, z2, c2 = state[t].unbind(0)
        new_z1, new_c1, new_z2, new_c2 = state[t + 1].unbind(0)
        keep_z1, keep_c1, keep_z2, keep_c2 = keep[t].unbind(0)
        around = seen[t].unfold(1, taps, 1).reshape(-1, taps)
        at = torch.mm(around, kernel_t, out=hidden[t]).add_(flat)
        at.view(batch, tokens, inner).add_(torch.mm(z1, query_t).unsqueeze(1))
        at.tanh_()
        a = torch.mv(at, energy).view(batch, tokens).mul_(2.0).add_(masked).softmax(1)
        weights[t].copy_(a)
        attended = torch.bmm(a.unsqueeze(1), hs).squeeze(1)
        context[t].copy_(attended)
        if t > 0:
            torch.add(middle[t], a, out=middle[t + 1])
        else:
            middle[t + 1].copy_(a)
        first = torch.addmm(from_prenet[t], torch.cat([attended, z1], 1), w1_t, out=gates[t, 0])
        _cell(first, z1, c1, keep_z1, keep_c1, new_z1, new_c1, cells[t, 0])
        second = torch.addmm(b2, torch.cat([new_z1, z2], 1), w2_t, out=gates[t, 1])
        _cell(second, z2, c2, keep_z2, keep_c2, new_z2, new_c2, cells[t, 1])
    return hidden, weights, context, seen, state, gates, cells


def _back(
    dz: Tensor,
    dcontext: Tensor,
    dweights: Tensor,
    hs: Tensor,
    hidden: Tensor,
    weights: Tensor,
    context: Tensor,
    seen: Tensor,
    state: Tensor,
    gates: Tensor,
    cells: Tensor,
    keep: Tensor,
    kernel: Tensor,
    query: Tensor,
    energy: Tensor,
    w1: Tensor,
    w2: Tensor,
):
    """Gradients of the loop's inputs, in their order; each weight's in one product over all steps."""
    steps, batch, tokens = weights.size(0), weights.size(1), weights.size(2)
    width, taps, inner, units = hs.size(2), kernel.size(1), kernel.size(0), w1.size(0) // 4
    dgates = torch.empty_like(gates)
    dinner, dtokens = torch.empty_like(hidden), hidden.new_empty([steps, batch, inner])
    dattended, denergies = torch.empty_like(context), hidden.new_empty([steps, batch * tokens])
    dz1, dc1 = torch.zeros_like(state[0, 0]), torch.zeros_like(state[0, 0])
    dz2, dc2 = torch.zeros_like(dz1), torch.zeros_like(dz1)
    dseen = torch.zeros_like(seen[0])  # of the weights accumulated up to after the step under way
    middle = dseen.narrow(1, taps // 2, tokens)
    hs_t = hs.transpose(1, 2).contiguous()
    for step in range(steps):
        t = steps - 1 - step
        _, c1, _, c2 = state[t].unbind(0)
        keep_z1, keep_c1, keep_z2, keep_c2 = keep[t].unbind(0)
        pass_z2, dc2 = _uncell(gates[t, 1], cells[t, 1], c2, keep_z2, keep_c2, dz2.add_(dz[t]), dc2, dgates[t, 1])
        into2 = torch.mm(dgates[t, 1], w2)
        dz1 = dz1 + into2.narrow(1, 0, units)
        dz2 = pass_z2 + into2.narrow(1, units, units)
        pass_z1, dc1 = _uncell(gates[t, 0], cells[t, 0], c1, keep_z1, keep_c1, dz1, dc1, dgates[t, 0])
        into1 = torch.mm(dgates[t, 0], w1)
        dctx = torch.add(into1.narrow(1, 0, width), dcontext[t], out=dattended[t])
        # The weights act on the context, on the outside, and on the places that all later steps look at.
        da = torch.bmm(dctx.unsqueeze(1), hs_t).squeeze(1).add_(dweights[t]).add_(middle)
        de = torch.ops.aten._softmax_backward_data(da, weights[t], 1, da.dtype).mul_(2.0).view(-1)
        denergies[t].copy_(de)
        ds = torch.ops.aten.tanh_backward(torch.outer(de, energy), hidden[t])
        dinner[t].copy_(ds)
        per_utterance = torch.sum(ds.view(batch, tokens, inner), 1)
        dtokens[t].copy_(per_utterance)
        dz1 = torch.addmm(pass_z1 + into1.narrow(1, width, units), per_utterance, query)
        if t > 0:  # the uniform start is not among what is accumulated
            around = torch.mm(ds, kernel).view(batch, tokens, taps).transpose(1, 2)
            dseen.add_(
                torch.ops.aten.col2im(around, [1, dseen.size(1)], [1, taps], [1, 1], [0, 0], [1, 1]).view_as(dseen)
            )
    around = seen[:steps].reshape(steps * batch, -1).unfold(1, taps, 1).reshape(-1, taps)
    in1 = torch.cat([context, state[:steps, 0]], 2).flatten(0, 1)
    in2 = torch.cat([state[1:, 0], state[:steps, 2]], 2).flatten(0, 1)
    d1, d2 = dgates[:, 0].flatten(0, 1), dgates[:, 1].flatten(0, 1)
    return (
        torch.einsum("tbn,tbe->bne", weights, dattended),
        dinner.sum(0).view(batch, tokens, inner),
        dgates[:, 0],
        torch.mm(dinner.flatten(0, 1).t(), around),
        torch.mm(dtokens.flatten(0, 1).t(), state[:steps, 0].flatten(0, 1)),
        torch.mv(hidden.flatten(0, 1).t(), denergies.flatten()),
        torch.mm(d1.t(), in1),
        torch.mm(d2.t(), in2),
        d2.sum(0),
    )
