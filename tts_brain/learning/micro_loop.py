"""The recurrent part of the micro-Tacotron, with a backward pass of its own.

On one core autograd's bookkeeping, not arithmetic, is where a tiny decoder's time goes: it also adds every weight's
gradient up once per decoder step. Here each weight's gradient is one product over all steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SHARPENING = 2.0  # ESPnet's scale of the energies
_tanh_backward = torch.ops.aten.tanh_backward.default
_softmax_backward = torch.ops.aten._softmax_backward_data.default


class AttentionLoop(torch.autograd.Function):
    """Location-sensitive attention (arXiv:1506.07503, section 2.1) on the LSTM's old state, then the LSTM.

    Shapes: R runs, T decoder steps, B utterances, N tokens, E encoder units, A attention units, K taps (odd),
    H LSTM units. Each run has weights of its own.

    ``apply(memory (R, B, N, E), keys (R, B, N, A), from_prenet (R, T, B, 4H), kernel (R, K, A), query (R, H, A),
    energy (R, A), recurrent (R, E + H, 4H), inside (R, B, N))`` gives contexts beside the states made of them
    (R, T, B, E + H), and attention (R, T, B, N). ``inside`` is 1 on tokens, 0 on padding, and has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        memory: Tensor,
        keys: Tensor,
        from_prenet: Tensor,
        kernel: Tensor,
        query: Tensor,
        energy: Tensor,
        recurrent: Tensor,
        inside: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden, weights, seen, inputs, cells, gates = _run(
            memory, keys, from_prenet, kernel, query, energy, recurrent, inside
        )
        ctx.save_for_backward(memory, kernel, query, energy, recurrent, hidden, weights, seen, inputs, cells, gates)
        width = memory.shape[3]
        return torch.cat([inputs[:, :-1, :, :width], inputs[:, 1:, :, width:]], dim=3), weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_back(*grads, *ctx.saved_tensors), None)


def _run(
    memory: Tensor,
    keys: Tensor,
    from_prenet: Tensor,
    kernel: Tensor,
    query: Tensor,
    energy: Tensor,
    recurrent: Tensor,
    inside: Tensor,
) -> tuple[Tensor, ...]:
    """tanh of the attention's inner sum (T, R, B N, A), attention (R, T, B, N), padded accumulated attention before
    each step (T + 1, R, B, N + K - 1), context beside old state (R, T + 1, B, E + H), cells (T + 1, R, B, H), gates
    after their activations (T, R, B, 4H)."""
    runs, steps, batch = from_prenet.shape[:3]
    tokens, width, inner, taps = memory.shape[2], memory.shape[3], keys.shape[3], kernel.shape[1]
    units = query.shape[1]
    hidden = memory.new_empty(steps, runs, batch * tokens, inner)
    weights = memory.new_empty(runs, steps, batch, tokens)
    seen = memory.new_zeros(steps + 1, runs, batch, tokens + taps - 1)
    inputs = memory.new_zeros(runs, steps + 1, batch, width + units)
    cells = memory.new_zeros(steps + 1, runs, batch, units)
    gates = memory.new_empty(steps, runs, batch, 4 * units)
    middle = seen.narrow(3, taps // 2, tokens)
    middle[0].copy_(inside / inside.sum(2, keepdim=True))  # nothing seen: looking everywhere, as ESPnet starts
    outside = torch.zeros_like(inside).masked_fill_(inside == 0, float("-inf"))
    flat_keys, flat_memory = keys.reshape(runs, -1, inner), memory.flatten(0, 1)
    column = energy.unsqueeze(2) * _SHARPENING
    # One view of all steps each, cut up once: indexing step by step costs as much as the arithmetic.
    windows, places, states = seen.unfold(3, taps, 1).unbind(0), middle.unbind(0), inputs.unbind(1)
    contexts, zs = inputs.narrow(3, 0, width).unbind(1), inputs.narrow(3, width, units).unbind(1)
    given, attended = from_prenet.unbind(1), weights.unbind(1)
    for t, (at, gate_out, cell) in enumerate(zip(hidden.unbind(0), gates.unbind(0), cells[1:].unbind(0), strict=True)):
        around = windows[t].reshape(runs, -1, taps)
        torch.baddbmm(flat_keys, around, kernel, out=at)
        at.view(runs, batch, tokens, inner).add_(torch.bmm(zs[t], query).unsqueeze(2))
        at.tanh_()
        a = torch.bmm(at, column).view(runs, batch, tokens).add_(outside).softmax(2)
        attended[t].copy_(a)
        torch.add(places[t], a, out=places[t + 1]) if t > 0 else places[1].copy_(a)
        contexts[t].copy_(torch.bmm(a.view(-1, 1, tokens), flat_memory).view(runs, batch, width))
        gate = torch.baddbmm(given[t], states[t], recurrent, out=gate_out)
        i, f, g, o = gate.chunk(4, 2)
        gate.narrow(2, 0, 2 * units).sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.addcmul(f * cells[t], i, g, out=cell)
        torch.mul(o, cell.tanh(), out=zs[t + 1])
    return hidden, weights, seen, inputs, cells, gates


def _back(
    dboth: Tensor,
    dweights: Tensor,
    memory: Tensor,
    kernel: Tensor,
    query: Tensor,
    energy: Tensor,
    recurrent: Tensor,
    hidden: Tensor,
    weights: Tensor,
    seen: Tensor,
    inputs: Tensor,
    cells: Tensor,
    gates: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of what ``_run`` took, in its order, ``inside`` left out."""
    runs, steps, batch, tokens = weights.shape
    width, inner, taps, units = memory.shape[3], hidden.shape[3], kernel.shape[1], cells.shape[3]
    dgates = gates.new_empty(runs, steps, batch, 4 * units)
    dattended = memory.new_empty(runs, steps, batch, width)
    dquery = hidden.new_empty(runs, steps, batch, inner)
    # Summed up step by step: kept for one product at the end, these would be the largest tensors of all.
    dkeys, dkernel = torch.zeros_like(hidden[0]), torch.zeros_like(kernel)
    dcolumn = torch.zeros_like(energy).unsqueeze(2)
    dz, dc = torch.zeros_like(cells[0]), torch.zeros_like(cells[0])
    dseen = torch.zeros_like(seen[0])  # of the attention accumulated up to after the step under way
    middle = dseen.narrow(2, taps // 2, tokens)
    by_gate, by_state, forgotten = _slopes(cells, gates)
    flat_memory = memory.flatten(0, 1).transpose(1, 2)
    recurrent_t, kernel_t, query_t = (w.transpose(1, 2).contiguous() for w in (recurrent, kernel, query))
    row = energy.unsqueeze(1) * _SHARPENING
    # As in ``_run``: cut up once.
    parts, windows = dgates.view(runs, steps, batch, 4, units), seen.unfold(3, taps, 1).unbind(0)
    to_cell, to_state = parts.narrow(3, 0, 3).unbind(1), parts.select(3, 3).unbind(1)
    cell_slopes, state_slopes = by_gate.narrow(3, 0, 3).unbind(0), by_gate.select(3, 3).unbind(0)
    from_context, from_state = dboth[..., :width].unbind(1), dboth[..., width:].unbind(1)
    through_cell, kept, hiddens = by_state.unbind(0), forgotten.unbind(0), hidden.unbind(0)
    dgate_of, dattended_of, dquery_of = dgates.unbind(1), dattended.unbind(1), dquery.unbind(1)
    attended, dattention = weights.unbind(1), dweights.unbind(1)
    for t in range(steps - 1, -1, -1):
        dgate, at = dgate_of[t], hiddens[t]
        dz = dz + from_state[t]
        dc = torch.addcmul(dc, dz, through_cell[t])
        torch.mul(dc.unsqueeze(2), cell_slopes[t], out=to_cell[t])
        torch.mul(dz, state_slopes[t], out=to_state[t])
        dc = dc * kept[t]
        into = torch.bmm(dgate, recurrent_t)
        dcontext = torch.add(into.narrow(2, 0, width), from_context[t], out=dattended_of[t])
        # The attention acts on the context, on the losses, and on the places that all later steps look at.
        da = torch.bmm(dcontext.reshape(-1, 1, width), flat_memory).view(runs, batch, tokens)
        da = da.add_(dattention[t]).add_(middle)
        de = _softmax_backward(da, attended[t], 2, da.dtype).view(runs, -1, 1)
        dcolumn.baddbmm_(at.transpose(1, 2), de)
        ds = _tanh_backward(de * row, at)
        dkeys += ds
        dkernel.baddbmm_(windows[t].reshape(runs, -1, taps).transpose(1, 2), ds)
        dq = ds.view(runs, batch, tokens, inner).sum(2)
        dquery_of[t].copy_(dq)
        dz = torch.baddbmm(into.narrow(2, width, units), dq, query_t)
        if t > 0:  # the even start is not among what is accumulated
            _fold(dseen, torch.bmm(ds, kernel_t).view(runs, batch, tokens, taps))
    before = inputs[:, :steps]
    return (
        torch.einsum("rtbn,rtbe->rbne", weights, dattended),
        dkeys.view(runs, batch, tokens, inner),
        dgates,
        dkernel,
        torch.bmm(before[..., width:].flatten(1, 2).transpose(1, 2), dquery.flatten(1, 2)),
        dcolumn.squeeze(2) * _SHARPENING,
        torch.bmm(before.flatten(1, 2).transpose(1, 2), dgates.flatten(1, 2)),
    )


def _slopes(cells: Tensor, gates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the LSTM's backward multiplies with, for all steps at once: for input, forget, cell gate (from the cell's
    gradient) and output gate (from the state's) (T, R, B, 4, H); from state to cell, and from cell to old cell."""
    i, f, g, o = gates.chunk(4, 3)
    old, inner = cells[:-1], cells[1:].tanh()
    slopes = torch.stack([g * i * (1.0 - i), old * f * (1.0 - f), i * (1.0 - g * g), inner * o * (1.0 - o)], dim=3)
    return slopes, o * (1.0 - inner * inner), f


def _fold(into: Tensor, windows: Tensor) -> None:
    """Add (R, B, N, K) windows to the places (R, B, N + K - 1) they were taken from."""
    tokens, width = windows.shape[2], into.shape[2]
    # Read in rows one shorter than they were written, each window comes to lie one further to the right.
    skewed = torch.nn.functional.pad(windows, (0, tokens)).flatten(2).narrow(2, 0, tokens * width)
    into.add_(skewed.view(*into.shape[:2], tokens, width).sum(2))
