"""The backward pass of a tanh or ReLU RNN layer. K = 0: no highway, exact backprop (``through_time``) only."""

from __future__ import annotations

import torch
from torch import Tensor

from .layer import Gradients, Layer, column_sums, contributions, rows, states_before
from .through_time import operator as through_time


def gradients(kind: str, layer: Layer, grad_output: Tensor | None, grad_h_n: Tensor | None) -> Gradients:
    """h' = tanh(a) or max(a, 0) with a = W_ih x + b_ih + W_hh h + b_hh. Their derivatives are known from h'."""
    after = layer.output
    # NaN passes through max(a, 0), and so does its gradient.
    into = 1 - after * after if kind == "rnn_tanh" else torch.where(after <= 0, torch.zeros_like(after), 1)
    w = through_time(contributions(layer, grad_output, grad_h_n), None, into.unsqueeze(2), layer.w_hh)
    of_sums = into * w
    flat = rows(of_sums)
    sums = column_sums(flat)
    return Gradients(
        input=torch.mm(flat, layer.w_ih).view(layer.input.shape),
        state=(torch.mm(of_sums[0], layer.w_hh).unsqueeze(0),),
        w_ih=torch.mm(flat.t(), rows(layer.input)),
        w_hh=torch.mm(flat.t(), rows(states_before(layer))),
        b_ih=sums,
        b_hh=sums,
    )
