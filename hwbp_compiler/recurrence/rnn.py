"""The backward pass of a tanh or ReLU RNN layer. K = 0: no highway, so only exact backprop (``runs.exact``)."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Gradients, Layer, at_the_last_state, column_sums, contributions, rows
from .runs import Links, exact


def gradients(kind: str, layer: Layer, grad_output: Tensor | None, grad_h_n: Tensor | None) -> Gradients:
    """h' = tanh(a) or max(a, 0) with a = W_ih x + b_ih + W_hh h + b_hh. The derivatives follow from h'."""
    after = layer.output
    # NaN passes through max(a, 0), and so does its gradient.
    into = 1 - after * after if kind == "rnn_tanh" else torch.where(after <= 0, torch.zeros_like(after), 1)
    c = contributions(layer, grad_output)
    w, of_first = exact(Links(c, None, None, into.unsqueeze(2), layer.w_hh), at_the_last_state(c, grad_h_n))
    flat = rows(into * w)
    sums = column_sums(flat)
    first, later = layer.state[0][0].to(after.dtype), after[:-1]  # the states before each step
    batch = first.shape[0]
    return Gradients(
        input=torch.mm(flat, layer.w_ih).view(layer.input.shape),
        state=(of_first.unsqueeze(0),),
        w_ih=torch.mm(flat.t(), rows(layer.input)),
        w_hh=torch.addmm(torch.mm(flat[:batch].t(), first), flat[batch:].t(), rows(later)),
        b_ih=sums,
        b_hh=sums.clone(),  # a separate copy: callers add to both and clip both in place
    )
