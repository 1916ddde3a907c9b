"""Measurements on the given inputs: the time of a training step, and the error of w^k against k and S."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hwbp_compiler import passes
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.options import Options

from .data import ErrorAt, StepTimes, copy_of

_REPEATS, _WARM_UP = 5, 2
# Iterations to try if none are given: dense where the error falls, few in all. With segments, only a few iterations and
# segment sizes are tried, besides the size in force.
_LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_FEW = (0, 1, 2)
_SIZES = (4, 16)


# -- the error of w^k -------------------------------------------------------------------------------------------


@dataclass
class Run:
    """The inputs of one joint graph when the model ran: its primal inputs, the gradients of its outputs, and which of
    the inputs are parameters. Of a graph that ran several times, the last run; it is the first to go back.
    """

    primals: list[Any] = field(default_factory=list)
    tangents: list[Any] = field(default_factory=list)
    parameters: list[bool] = field(default_factory=list)

    def forward(self, values: Sequence[Any]) -> None:
        self.parameters = [isinstance(v, nn.Parameter) for v in values]
        self.primals = [v.detach().clone() if isinstance(v, Tensor) else v for v in values]
        self.tangents = []

    def backward(self, values: Sequence[Any], tangents: int) -> None:
        if not self.tangents:
            self.tangents = [v.detach().clone() if isinstance(v, Tensor) else v for v in values[-tangents:]]


def errors(
    joint: Callable[[Options], fx.GraphModule],
    run: Run,
    options: Options,
    wanted: Iterable[int | tuple[int, int]] | bool,
    length: int,
) -> list[ErrorAt]:
    """Compare the parameter gradient of w^k with the exact one, for every k or (k, S) in ``wanted``.

    A k alone takes S from ``options``. True means a few of both that are below ordinary backprop of ``length`` links.
    Each runs the joint graph once in eager mode, with all chains rewritten even if it does not pay, and with the same
    seed. ``joint(options)`` returns that graph before the passes; loops in it are already rewritten with the k and S
    (or ``"exact"``) of ``options``.
    """
    exact = _gradient(joint(dataclasses.replace(options, iterations="exact")), run)
    found: list[ErrorAt] = []
    for k, size in _ladder(options, length) if wanted is True else _named(options, wanted or ()):
        chosen = dataclasses.replace(options, iterations=k, segment=size, rewrite="always", strict=False)
        rewritten = copy_of(joint(chosen).graph)
        passes.run(rewritten.graph, chosen)
        rewritten.recompile()
        approximate = _gradient(rewritten, run)
        norm = exact.norm()
        cosine = torch.dot(approximate, exact) / (approximate.norm() * norm)
        cosine = cosine.clamp(-1, 1)  # rounding may lead out of it
        found.append(ErrorAt(k, float(cosine), float((approximate - exact).norm() / norm), size))
    return found


def _ladder(options: Options, length: int) -> list[tuple[int, int]]:
    sizes = sorted({1, options.numbers.segment, *(s for s in _SIZES if 2 * s < length)})
    found = [(k, s) for s in sizes for k in (_LADDER if s == 1 else _FEW)]
    if isinstance(options.iterations, int):
        found.append((options.iterations, options.numbers.segment))
    short = {(s, k) for k, s in found if k < dataclasses.replace(options, segment=s).needed(length)}
    return [(k, s) for s, k in sorted(short)]


def _named(options: Options, wanted: Iterable[int | tuple[int, int]]) -> list[tuple[int, int]]:
    pairs = {(int(w[1]), int(w[0])) if isinstance(w, tuple) else (options.numbers.segment, int(w)) for w in wanted}
    return [(k, s) for s, k in sorted(pairs)]


def _gradient(joint: fx.GraphModule, run: Run) -> Tensor:
    """All parameter gradients as one float64 vector; the gradients of all inputs if none is a parameter."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = [v.clone() if isinstance(v, Tensor) else v for v in (*run.primals, *run.tangents)]
        outputs = fx.Interpreter(joint).run(*inputs, enable_io_processing=False)
    gradients = list(outputs)[-len(run.primals) :]
    chosen = [g for g, is_parameter in zip(gradients, run.parameters, strict=True) if is_parameter and g is not None]
    chosen = chosen or [g for g in gradients if g is not None]
    return torch.cat([g.double().flatten() for g in chosen if isinstance(g, Tensor)])


def tangent_count(graph: fx.Graph) -> int:
    return sum(is_tangent(node) for node in graph.nodes)


# -- step times -------------------------------------------------------------------------------------------------


def step_times(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    inductor_options: Mapping[str, Any],
    loss: Callable[[Any], Any],
    isolated: Mapping[str, Any],
) -> StepTimes:
    """Compile ``model`` with both backends and time a step. The two take turns, so that noise affects both."""
    steps = []
    for backend, chosen in (("inductor", dict(inductor_options)), ("highway", dict(options or {}))):
        compiled = torch.compile(model, backend=backend, options=chosen or None, **isolated)  # type: ignore[call-overload]
        steps.append(_step(compiled, args, kwargs, loss))
    times: list[list[float]] = [[], []]
    for turn in range(_WARM_UP + _REPEATS):
        for step, mine in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if turn >= _WARM_UP:
                mine.append(time.perf_counter() - start)
    return StepTimes(statistics.median(times[0]), statistics.median(times[1]))


def _step(compiled: Any, args: Any, kwargs: Any, loss: Callable[[Any], Any]) -> Callable[[], None]:
    def step() -> None:
        backward(loss(compiled(*args, **kwargs)))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    return step


def backward(total: Tensor) -> None:
    """Run the backward pass of ``total`` and keep no gradient: no ``.grad`` changes."""
    leaves, seen, todo = [], set(), [total.grad_fn]
    while todo:
        function = todo.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        if hasattr(function, "variable"):
            leaves.append(function.variable)
        todo.extend(f for f, _ in function.next_functions)
    if leaves:
        torch.autograd.grad(total, leaves, allow_unused=True)
