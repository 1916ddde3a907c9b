"""Is a recurrent layer's backward pass expected to be faster in Highway-BP form than in PyTorch's own kernel?

Weighed is what differs: on one side the kernel's backward pass and what recording adds to its forward pass, on the
other the operators that ``recurrence.gru`` and ``recurrence.lstm`` write down. A kernel pays for every step of time, in
calls and because the products of one step are too small to run at full speed; Highway-BP multiplies all steps at once,
but k times more often, and moves more memory. The figures are of the size seen on two cores of a server CPU
(``benchmarks/recurrent.py``); those of GPUs are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .decide import Estimate, cores

_GATES = {"gru": 3, "lstm": 4}

# Of [T, B, H], read or written: before the first iteration and after the last, and in every iteration.
_SERIES = {"gru": (33, 10), "lstm": (44, 16)}


@dataclass(frozen=True)
class _Figures:
    """flops per second of tall products, bytes per second, seconds of a compiled call, and of PyTorch's own kernel:
    seconds a step and seconds an element of the state and step, in both passes."""

    flops: float
    bytes: float
    launch: float
    step: float
    element: float


def _figures(kind: str, like: Tensor) -> _Figures:
    if like.device.type != "cpu":
        return _Figures(flops=15e12, bytes=1.0e12, launch=6e-6, step=15e-6, element=2e-11)
    flops, width = 150e9 * cores() * 4 / like.element_size(), like.element_size() / 4
    if kind == "lstm" and like.dtype is torch.float32 and torch.backends.mkldnn.is_available():
        return _Figures(flops, bytes=12e9, launch=6e-6, step=5e-6, element=15e-9)  # oneDNN's, one call a layer
    return _Figures(flops, bytes=12e9, launch=6e-6, step=60e-6, element=10e-9 * width)


def estimate_recurrent(kind: str, input: Tensor, output: Tensor, iterations: int) -> Estimate:
    """Seconds for input [T, B, I] and output [T, B, H]; symbolic sizes count as what they were seen to be."""
    steps, batch, width = (_hint(size) for size in input.shape)
    hidden = _hint(output.shape[2])
    figures = _figures(kind, output)
    gates = _GATES[kind] * hidden
    of_input, of_state = (2.0 * steps * batch * gates * columns / figures.flops for columns in (width, hidden))
    # At half speed, and twice: into the state before and into the weights.
    of_steps = 2 * 2 * of_state + steps * (figures.step + figures.element * batch * hidden)
    once, each = _SERIES[kind]
    moved = (once + iterations * each) * steps * batch * hidden * output.element_size() / figures.bytes
    calls = (12 + 4 * iterations) * figures.launch
    return Estimate(2 * of_input + of_steps, 3 * of_input + (2 + iterations) * of_state + moved + calls, 0)


def _hint(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint)
