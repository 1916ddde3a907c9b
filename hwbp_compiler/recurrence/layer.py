"""One recurrent layer in one direction, as its backward pass receives it; and what GRU and LSTM have in common.

Note [Rows and the last state]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Row i of a series belongs to time step i + 1. The block of a step leads to the state before it, one row further up. The
losses' contribution at h_T is the whole gradient there. So every scan starts from it, as the initial state, and runs
over the links 2..T. No scan needs a concatenation or padding for that row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """input [T, B, I], output [T, B, H] (h_1 ... h_T), state (h_0,) or (h_0, c_0) of shape [1, B, H] each. The weights
    are laid out as in ``nn.GRU`` and ``nn.LSTM``; there are both biases or none.
    """

    input: Tensor
    output: Tensor
    state: tuple[Tensor, ...]
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        return None if self.b_ih is None or self.b_hh is None else self.b_ih + self.b_hh


@dataclass(frozen=True)
class Gradients:
    """The gradients for a :class:`Layer`, in its order."""

    input: Tensor
    state: tuple[Tensor, ...]
    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor

    def flat(self, has_biases: bool) -> list[Tensor]:
        return [self.input, *self.state, self.w_ih, self.w_hh, *((self.b_ih, self.b_hh) if has_biases else ())]


def rows(series: Tensor) -> Tensor:
    """[T, B, ...] as a matrix [T B, ...]."""
    return series.flatten(0, 1).flatten(1)


def states_before(layer: Layer) -> Tensor:
    """h_0 ... h_{T-1}."""
    return torch.cat([layer.state[0].to(layer.output.dtype), layer.output[:-1]])


def column_sums(matrix: Tensor) -> Tensor:
    """Sums over rows as a product: a compiled reduction would walk down one narrow column after another."""
    return torch.mm(matrix.new_ones(1, matrix.shape[0]), matrix).squeeze(0)


def at_the_last_state(c: Tensor, grad_h_n: Tensor | None) -> Tensor:
    """[B, H]: the losses' contribution at h_T, from c [T, B, H] and from the returned last state."""
    return c[-1] if grad_h_n is None else c[-1] + grad_h_n[0]


def contributions(layer: Layer, grad_output: Tensor | None) -> Tensor:
    """The losses' contribution at h_1 ... h_T through the output; ``at_the_last_state`` adds the rest."""
    return torch.zeros_like(layer.output) if grad_output is None else grad_output
