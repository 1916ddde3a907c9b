"""Whether a recurrent layer's backward pass is expected to be faster in Highway-BP form than exact.

Only what differs is compared. On one side are the operators that ``recurrence.gru`` and ``recurrence.lstm`` emit, on
the other the exact backward pass. The latter is PyTorch's own kernel. It pays for calls in every time step, its
products of one step are too small for full speed, and recording makes its forward pass slower. For a GRU on a CPU, the
exact pass is ``recurrence.runs.exact``, one run over a single segment. The figures have the magnitude seen on two cores
of a server CPU and on an H100 (``benchmarks/recurrent.py``); other GPUs are treated as an H100.
"""

from __future__ import annotations

from torch import Tensor

from hwbp_compiler.graph.sizes import hint
from hwbp_compiler.options import Truncation

from .devices import Kernels, kernel_figures
from .estimate import Estimate

_GATES = {"gru": 3, "lstm": 4}

# Number of [T, B, H] tensors read or written: before the first iteration and after the last, and in every iteration.
_SERIES = {"gru": (33, 10), "lstm": (44, 16)}

# Kernels per step of a run on a GPU: a product, and the elementwise operators before the next one.
_LAUNCHES = 2


def estimate_recurrent(
    kind: str, input: Tensor, output: Tensor, how: Truncation, layers: int = 1, directions: int = 1
) -> Estimate:
    """Seconds for input [T, B, I] and output [T, B, H] ([T, B, 2 H] for both directions); symbolic sizes count as their
    hints.
    """
    steps, batch, width = (hint(size) for size in input.shape)
    hidden = hint(output.shape[2]) // directions
    figures = kernel_figures(kind, output)
    exact = rewritten = 0.0
    for layer in range(layers):
        for direction in range(directions):
            columns = hidden * directions if layer else width
            one = _of_a_layer(kind, figures, (steps, batch, columns, hidden), output, how)
            exact += one.substitution * (figures.more if layer or direction else 1.0)
            rewritten += one.rewritten
    return Estimate(exact, rewritten, 0)


def _of_a_layer(
    kind: str, figures: Kernels, sizes: tuple[int, int, int, int], like: Tensor, how: Truncation
) -> Estimate:
    steps, batch, width, hidden = sizes
    of_input, of_state = _products(kind, figures, sizes)
    once, each = (series * steps * batch * hidden * like.element_size() / figures.bytes for series in _SERIES[kind])
    on_a_cpu = like.device.type == "cpu"
    before_and_after = 3 * of_input + 2 * of_state + once + (12 if on_a_cpu else 40) * figures.launch
    if how.segment > 1:
        if on_a_cpu:
            of_one = _of_a_run(kind, figures, sizes, how.segments(steps))
        else:
            of_one = of_state + each + min(how.segment, steps) * _LAUNCHES * figures.launch
        rewritten = before_and_after + (how.iterations + 1) * of_one + how.iterations * 4 * figures.launch
    else:
        rewritten = before_and_after + how.iterations * (of_state + each + 4 * figures.launch)
    if kind == "gru" and on_a_cpu:
        exact = before_and_after + _of_a_run(kind, figures, sizes, 1)
    else:  # two products per step, at half speed: for the state before and for the weights
        by_step = steps * (figures.step + figures.element * batch * hidden)
        slower = figures.flops / (figures.kernel_flops or figures.flops)
        exact = (2 * of_input + 2 * 2 * of_state) * slower + by_step
    return Estimate(exact, rewritten, 0)


def _of_a_run(kind: str, figures: Kernels, sizes: tuple[int, int, int, int], lanes: int) -> float:
    """Seconds of ``recurrence/runs.cpp`` for all steps, over ``lanes`` segments at once. With few rows, the weights
    must come from the cache; and rows fewer than the cores are shared out only if a step is long.
    """
    steps, batch, _, hidden = sizes
    rows = lanes * batch
    flops = 2.0 * steps * batch * _GATES[kind] * hidden * hidden
    shared = min(figures.cores, rows) if rows > 1 else 1
    return steps / lanes * figures.run_step + flops / (figures.run_flops * shared * min(1.0, (rows / shared + 4) / 10))


def _products(kind: str, figures: Kernels, sizes: tuple[int, int, int, int]) -> tuple[float, float]:
    """Seconds of one product of all steps with the weights of the input, and with those of the state."""
    steps, batch, width, hidden = sizes

    def product(inner: int) -> float:
        return 2.0 * steps * batch * _GATES[kind] * hidden * inner / figures.flops

    return product(width), product(hidden)
