"""The backward pass of a GRU layer in Highway-BP form (paper section 2: K is the update gate z)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Gradients, Layer, column_sums, contributions, rows, scan, states_before, with_row_of_zeros
from .through_time import operator as through_time

MULTIPLIER = "sigmoid(...)"


def gradients(
    layer: Layer,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    iterations: int | None,
    damping: float,
) -> Gradients:
    """With the gates r and z and the candidate n of every step at once,

        h' = (1 - z) n + z h        n = tanh(W_in x + b_in + r (W_hn h + b_hn))

    Iterations None: exact backprop, one step after the other (``through_time``).
    """
    before = states_before(layer)
    shape = (*before.shape[:-1], 3, before.shape[-1])
    of_x = torch.mm(rows(layer.input), layer.w_ih.t()).view(shape)
    of_h = torch.mm(rows(before), layer.w_hh.t()).view(shape)
    if layer.b_ih is not None and layer.b_hh is not None:
        of_x = of_x + layer.b_ih.view(3, -1)
        of_h = of_h + layer.b_hh.view(3, -1)
    r = torch.sigmoid(of_x.select(2, 0) + of_h.select(2, 0))
    z = torch.sigmoid(of_x.select(2, 1) + of_h.select(2, 1))
    candidate_of_h = of_h.select(2, 2)
    n = torch.tanh(of_x.select(2, 2) + r * candidate_of_h)
    into_n = (1 - z) * (1 - n * n)
    # What a gradient of h' is multiplied with on its way into a product with the weights: n on the side of x, then
    # r, z and n on the side of h. The first three lead through W_ih, the last three through W_hh.
    into = torch.stack([into_n, into_n * candidate_of_h * r * (1 - r), (before - n) * z * (1 - z), into_n * r], dim=2)
    c = contributions(layer, grad_output, grad_h_n)
    if iterations is None:
        w = through_time(c, z, into[:, :, 1:], layer.w_hh)
        before_last = w[0]
    else:
        w, before_last = _truncated(c, z, into, layer.w_hh, iterations, damping)

    into_gates = into * w.unsqueeze(2)
    size = w.shape[-1]
    flat = rows(into_gates)
    of_ih, of_hh = flat[:, : 3 * size], flat[:, size:]
    sums = column_sums(flat)
    w_ih = torch.mm(of_ih.t(), rows(layer.input))
    crossed = torch.mm((into[0, :, 1:] * before_last.unsqueeze(1)).flatten(1), layer.w_hh)
    first = crossed + z[0] * ((1 - damping) * w[0] + damping * before_last)
    return Gradients(
        input=torch.mm(of_ih, _from_front(layer.w_ih, size)).view(layer.input.shape),
        state=(first.unsqueeze(0),),
        w_ih=_from_back(w_ih, size),
        w_hh=torch.mm(of_hh.t(), rows(before)),
        b_ih=_from_back(sums[: 3 * size], size),
        b_hh=sums[size:],
    )


def _truncated(
    c: Tensor, z: Tensor, into: Tensor, w_hh: Tensor, iterations: int, damping: float
) -> tuple[Tensor, Tensor]:
    """w^k, and of w^{k-1} the first row."""
    keep = with_row_of_zeros(z)[1:]
    change = scan(c, keep, damping)
    w = change
    before_last = torch.zeros_like(w[0])
    for _ in range(iterations):
        change = change[1:]
        moved = torch.mm(rows(into[1:, :, 1:] * change.unsqueeze(2)), w_hh).view(change.shape)
        if damping:
            moved = moved + damping * keep[:-1] * change
        change = scan(with_row_of_zeros(moved), keep, damping)
        before_last, w = w[0], w + change
    return w, before_last


def _from_front(weight: Tensor, size: int) -> Tensor:
    """(r, z, n) as (n, r, z)."""
    return torch.cat([weight[2 * size :], weight[: 2 * size]])


def _from_back(weight: Tensor, size: int) -> Tensor:
    """(n, r, z) as (r, z, n)."""
    return torch.cat([weight[size:], weight[:size]])
