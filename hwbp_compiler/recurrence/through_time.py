"""``highway::through_time``: exact backprop along the states alone, one step of time after the other.

On a CPU, PyTorch has no backward kernel for a GRU or an RNN: autograd replays every small operator of every step, with
products for the weights among them. Of all this only the gradient of the state has to wait for the next step's. Here
the rest is done for all steps at once, as in Highway-BP, and what remains is

    w_i = c_i + m_{i+1} w_{i+1} + (p_{i+1} w_{i+1}) W
"""

from __future__ import annotations

import torch
from torch import Tensor

from hwbp_compiler.torch_private import below_autograd

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "through_time(Tensor values, Tensor? multipliers, Tensor into, Tensor weight) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operator = torch.ops.highway.through_time.default


def _through_time(values: Tensor, multipliers: Tensor | None, into: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """values [T, B, H]: c. multipliers [T, B, H]: m, None for zeros. into [T, B, G, H]: p, what a gradient of the
    state is multiplied with on its way to each gate. weight [G H, H]: W. Row i of m and p leads to the state before
    row i's. Returns w [T, B, H], and the gradient of the state before the first step [B, H]."""
    w = values.clone(memory_format=torch.contiguous_format)
    steps, batch, size = w.shape
    first = w.new_zeros(batch, size)
    of_gates = into.new_empty(batch, into.shape[2], size)
    flat = of_gates.flatten(1)
    with below_autograd():
        states, by_gate, gates = w.unbind(0), w.unsqueeze(2).unbind(0), into.unbind(0)
        kept = None if multipliers is None else multipliers.unbind(0)
        for i in range(steps - 1, -1, -1):
            torch.mul(gates[i], by_gate[i], out=of_gates)
            before = states[i - 1] if i else first
            if kept is not None:
                before.addcmul_(kept[i], states[i])
            before.addmm_(flat, weight)
    return w, first


def _fake(values: Tensor, multipliers: Tensor | None, into: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(values.shape[1:])


library.impl("through_time", _through_time, "CompositeExplicitAutograd")
torch.library.register_fake("highway::through_time", _fake, lib=library)
