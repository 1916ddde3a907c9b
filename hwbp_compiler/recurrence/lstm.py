"""The backward pass of an LSTM layer in Highway-BP form. K leads from c to c (the forget gate) and from c to h."""

from __future__ import annotations

import torch
from torch import Tensor

from hwbp_compiler.engine.segments import solve_segments
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_tensors import TensorSeries
from hwbp_compiler.options import Truncation

from .layer import (
    Gradients,
    Layer,
    at_the_last_state,
    column_sums,
    contributions,
    rows,
    states_before,
)
from .runs import LayerRuns, Links

MULTIPLIER = "c->c: sigmoid(...); c->h: sigmoid(...)*sigmoid(...)*(1 - tanh(...)**2)"


def gradients(
    layer: Layer,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    truncation: Truncation,
) -> Gradients:
    """The gates i, f, o and the candidate g of every step are computed at once:

        c' = f c + i g        h' = o tanh(c')

    The cell states are not saved. The gates follow from h, and the cell states are the scan of i g with multipliers f.
    There are two gradients. w_h, that of h', is reached only through the weights. w_e, that of c' including what comes
    through h', is scanned: w_e = o (1 - tanh(c')^2) w_h + f' w_e'. So the injections and the block of w_e are those of
    w_h times o (1 - tanh(c')^2).
    """
    before = states_before(layer)
    both = torch.cat([layer.input, before], -1)
    weight = torch.cat([layer.w_ih, layer.w_hh], 1)
    shape = (*before.shape[:-1], 4, before.shape[-1])
    gates = torch.mm(rows(both), weight.t()).view(shape)
    if layer.bias is not None:
        gates = gates + layer.bias.view(4, -1)
    i, f, o = (torch.sigmoid(gates.select(2, number)) for number in (0, 1, 3))
    g = torch.tanh(gates.select(2, 2))
    c = torch.ops.highway.linear_scan(i * g, f, False, layer.state[1][0].to(i.dtype))
    tanh_c = torch.tanh(c[1:])
    # The factors that multiply the gradients of c' (three times) and h' before the product with the weights.
    into = torch.stack([g * i * (1 - i), c[:-1] * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=2)
    through_h = o * (1 - tanh_c * tanh_c)

    c_h = contributions(layer, grad_output)
    c_e = through_h * c_h
    last = at_the_last_state(c_h, grad_h_n)
    last_e = through_h[-1] * last
    heads = [last, last_e if grad_c_n is None else last_e + grad_c_n[0]]
    highway = Highway(order=(0, 1), k={(1, 1): f[1:]}, heads=heads, injected=[c_h[:-1], c_e[:-1]])
    links = Links(c_h, f, through_h, into, layer.w_hh)
    w_h, w_e, first_h, first_c = _truncated(links, highway, truncation)

    into_gates = _into_gates(into, w_h, w_e)
    flat = rows(into_gates)
    weights = torch.mm(flat.t(), rows(both))
    sums = column_sums(flat)
    inputs = layer.input.shape[-1]
    return Gradients(
        input=torch.mm(flat, layer.w_ih).view(layer.input.shape),
        state=(first_h.unsqueeze(0), first_c.unsqueeze(0)),
        w_ih=weights[:, :inputs],
        w_hh=weights[:, inputs:],
        b_ih=sums,
        b_hh=sums.clone(),  # a separate copy: callers add to both and clip both in place
    )


def _truncated(links: Links, highway: Highway[Tensor], how: Truncation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w_h and w_e [T, B, H], and the resulting gradients at h_0 and c_0 [B, H]."""
    f, q, into, damping = links.multipliers, links.through, links.into, how.damping
    assert f is not None and q is not None
    series = TensorSeries(f.shape[0] - 1, highway.heads)
    if how.segment > 1:
        runs = LayerRuns(links, how.segment)
        w_h, w_e = solve_segments(series, highway, runs.cut, runs, how.iterations, damping, watched=how.watched)
        return w_h, w_e, *runs.of_first  # type: ignore[return-value]
    h_before_last, e_before_last = (torch.zeros_like(head) for head in highway.heads)  # w^{k-1}, at the first step

    def blocks(_: int, rows_of: list[Tensor]) -> list[Tensor]:
        nonlocal h_before_last, e_before_last
        w_h, w_e = rows_of
        h_before_last, e_before_last = w_h[0], w_e[0]
        moved = torch.mm(rows(_into_gates(into[1:], w_h[1:], w_e[1:])), links.weight).view(w_h[1:].shape)
        return [moved, q[:-1] * moved]

    w_h, w_e = solve(series, highway, blocks, how.iterations, damping, watched=how.watched)
    first_h = torch.mm(_into_gates(into[:1], h_before_last[None], e_before_last[None])[0].flatten(1), links.weight)
    first_c = f[0] * w_e[0]
    if damping:
        first_c = (1 - damping) * first_c + damping * f[0] * e_before_last
    return w_h, w_e, first_h, first_c


def _into_gates(into: Tensor, of_h: Tensor, of_c: Tensor) -> Tensor:
    return torch.cat([into[:, :, :3] * of_c.unsqueeze(2), into[:, :, 3:] * of_h.unsqueeze(2)], dim=2)
