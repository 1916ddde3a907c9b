"""Is a recurrent layer's backward pass expected to be faster in Highway-BP form than exact?

Weighed is what differs: on one side the operators that ``recurrence.gru`` and ``recurrence.lstm`` write down, on the
other the exact backward pass. That is PyTorch's own kernel, which pays for every step of time in calls and because the
products of one step are too small to run at full speed, and what recording adds to its forward pass; for a GRU on a CPU
it is ``recurrence.through_time``, which pays so for the step from state to state alone. The figures are of the size
seen on two cores of a server CPU (``benchmarks/recurrent.py``); those of GPUs are guesses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hwbp_compiler.graph.sizes import hint

from .decide import Estimate, cores

_GATES = {"gru": 3, "lstm": 4}

# Of [T, B, H], read or written: before the first iteration and after the last, and in every iteration.
_SERIES = {"gru": (33, 10), "lstm": (44, 16)}


@dataclass(frozen=True)
class _Figures:
    """flops per second of tall products, bytes per second, seconds of a compiled call, and of the exact backward pass
    (with PyTorch's own kernel: of both passes) seconds a step and seconds an element of the state and step."""

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
    if kind == "gru":
        return _Figures(flops, bytes=20e9, launch=6e-6, step=10e-6, element=8e-9 * width)
    return _Figures(flops, bytes=12e9, launch=6e-6, step=60e-6, element=10e-9 * width)


def estimate_recurrent(kind: str, input: Tensor, output: Tensor, iterations: int) -> Estimate:
    """Seconds for input [T, B, I] and output [T, B, H]; symbolic sizes count as what they were seen to be."""
    steps, batch, width = (hint(size) for size in input.shape)
    hidden = hint(output.shape[2])
    figures = _figures(kind, output)
    gates = _GATES[kind] * hidden
    of_input, of_state = (2.0 * steps * batch * gates * columns / figures.flops for columns in (width, hidden))
    once, each = (series * steps * batch * hidden * output.element_size() / figures.bytes for series in _SERIES[kind])
    before_and_after = 3 * of_input + 2 * of_state + once + 12 * figures.launch
    rewritten = before_and_after + iterations * (of_state + each + 4 * figures.launch)
    by_step = steps * (figures.step + figures.element * batch * hidden)
    # The products of one step run at half speed.
    if kind == "gru" and output.device.type == "cpu":
        exact = before_and_after + 2 * of_state + by_step
    else:  # two of them: into the state before and into the weights
        exact = 2 * of_input + 2 * 2 * of_state + by_step
    return Estimate(exact, rewritten, 0)
