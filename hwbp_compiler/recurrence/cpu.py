"""The forward pass of a GRU on a CPU: ``gru.cpp``.

On CPUs PyTorch has one kernel for all steps of an LSTM (oneDNN), but calls a dozen operators in every step of a GRU. If
this kernel cannot be built, or does not support a call, PyTorch's own runs as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels import ADDRESS, FLAG, NUMBER, native_kernel
from .operator_call import OperatorCall

native = native_kernel(
    "gru.cpp",
    "highway_gru",
    [ADDRESS] * 5 + [NUMBER] * 3 + [FLAG] * 2,
    without="nn.GRU: no kernel of our own for this CPU, PyTorch's runs instead",
)


def gru(call: OperatorCall) -> tuple[Tensor, Tensor] | None:
    """Outputs [T, B, H directions] and last states [layers directions, B, H]; None if PyTorch's kernel must run."""
    tensors = (call.input, *call.state, *call.weights)
    served = call.kind == "gru" and call.autocast is None and call.batch_sizes is None and not call.random
    if not served or call.input.device.type != "cpu" or call.input.dim() != 3 or call.input.numel() == 0:
        return None
    if len({t.dtype for t in tensors}) != 1:
        return None
    kernel = native.load(call.input.dtype)
    if kernel is None:
        return None
    directions, of_one = 1 + call.bidirectional, 4 if call.has_biases else 2
    series, last = call.input, []
    for layer in range(call.layers):
        outputs = []
        for direction in range(directions):
            which = layer * directions + direction
            weights = call.weights[which * of_one : (which + 1) * of_one]
            outputs.append(_layer(kernel, series, call.state[0][which], weights, direction == 1))
            last.append(outputs[-1][0 if direction else -1])
        series = outputs[0] if directions == 1 else torch.cat(outputs, dim=2)
    return series, torch.stack(last)


def _layer(
    kernel: Callable[..., Any], input: Tensor, first: Tensor, weights: Sequence[Tensor], reverse: bool
) -> Tensor:
    """[T, B, H]; ``weights`` are W_ih, W_hh, followed by b_ih, b_hh if there are biases."""
    w_ih, w_hh, *biases = weights
    (steps, batch, _), hidden = input.shape, first.shape[-1]
    rows = input.reshape(steps * batch, -1)
    if biases:
        b_ih, b_hh = biases
        of_both = b_ih + torch.cat([b_hh[: 2 * hidden], torch.zeros_like(first[0])])
        gates, of_candidate = torch.addmm(of_both, rows, w_ih.t()), b_hh[2 * hidden :].contiguous()
    else:
        gates, of_candidate = torch.mm(rows, w_ih.t()), None
    w_hh, first = w_hh.contiguous(), first.contiguous()
    out = input.new_empty(steps, batch, hidden)
    kernel(
        gates.data_ptr(),
        w_hh.data_ptr(),
        None if of_candidate is None else of_candidate.data_ptr(),
        first.data_ptr(),
        out.data_ptr(),
        steps,
        batch,
        hidden,
        reverse,
        torch.get_num_threads(),
    )
    return out
