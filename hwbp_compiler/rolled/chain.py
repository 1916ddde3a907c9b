"""Run one stage over time. Affine stages run as a scan, the others as a loop whose backward pass is Highway-BP.

Rows are in the order of time. w_t is the gradient at the state after step t, c_t is the losses' contribution there, and
link t = K_t + J_t (PAPER: section 1):

    W^0     = scan(c, K)                    w_0, ..., w_T; the last row is c_T, which is exact
    W^{i+1} = scan(c + J W^i, K)

Every gate is computed again from the states, for all steps at once. ``exact`` runs the same program step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.fx import Node

from hwbp_compiler.engine.emitter import Value
from hwbp_compiler.engine.evaluate import Coefficient, Evaluator, Mode
from hwbp_compiler.engine.segments import Cut, solve_segments
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_tensors import TensorSeries, multiplier
from hwbp_compiler.graph.chain import Group
from hwbp_compiler.graph.program import Program
from hwbp_compiler.graph.settled import settled
from hwbp_compiler.options import Truncation

from .lanes import operator as loop_segments
from .link import Affine, Backward
from .live import AllSteps, LiveEmitter, Sizes, constant
from .loop import code_of
from .trace import depends_on, fractions_in, operands_outside

aten = torch.ops.aten
linear_scan = torch.ops.highway.linear_scan


@dataclass(frozen=True)
class How:
    """How a chain's gradient is computed. ``truncation`` None means ordinary backprop, step after step. A chain also
    gets ordinary backprop if it has fewer than ``shortest`` links, or any number of links other than ``only``.
    """

    truncation: Truncation | None
    shortest: int = 0
    only: int | None = None

    def at(self, length: Any) -> How:
        """The method for this length. If the length is symbolic, the comparison becomes a guard, and both outcomes are
        compiled separately.
        """
        right = length >= self.shortest if self.only is None else length == self.only
        return self if right else How(None)


# -- affine: both directions are scans ----------------------------------------------------------------------------


def run_affine(link: Affine, length: Any, start: Sequence[Tensor], per_step: Sequence[Tensor],
               shared: Sequence[Any]) -> list[Tensor]:  # fmt: skip
    """States after every step, ``[T, ...]`` per component. Autograd differentiates this function, and its gradient is
    exact.
    """
    width = len(start)
    nodes = link.arguments
    known = {n: constant(v, True) for n, v in zip(nodes[width:], per_step, strict=False)}
    known |= {n: constant(v, False) for n, v in zip(nodes[width + len(per_step) :], shared, strict=True)}
    emitter = LiveEmitter(length, Sizes({**known, **_unbatched(nodes, start)}))
    values = AllSteps(emitter, known)
    evaluator = _evaluator(emitter, link.program, values, [None] * width)
    done: dict[int, Tensor] = {}  # states 0..T
    for to in link.split.order:
        like = start[to]
        total = _full(emitter, evaluator.value(Mode.INJECT, link.program.outputs[to]), like, length)
        own: Tensor | float = 0.0
        for source in (s for t, s in sorted(link.split.support) if t == to):
            factor = _factor(emitter, evaluator.value(Coefficient(source), link.program.outputs[to]), like)
            if source == to:
                own = factor
                continue
            total = total + factor * done[source][:-1]
        if isinstance(own, float) and own == 0.0:
            done[to] = torch.cat([like.unsqueeze(0), total])
        else:
            done[to] = linear_scan(total, multiplier(own, like), False, like)
    return [done[i][1:] for i in range(width)]


# -- everything else ----------------------------------------------------------------------------------------------


class HighwayLoop(torch.autograd.Function):
    """A loop over time that saves only its states, and the backward pass that ``how`` asks for."""

    @staticmethod
    def forward(ctx: Any, link: LoopLink, how: How, length: Any, *arguments: Any) -> tuple[Tensor, ...]:
        ctx.link, ctx.how, ctx.length = link, how, length
        start, per_step, shared = link.parts(arguments)
        tensors, sizes = apart(shared)
        states = torch.ops.highway.loop(link.code, per_step, start, tensors, length, False, sizes)
        ctx.numbers = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in arguments), *states)
        ctx.set_materialize_grads(False)
        return tuple(states)

    @staticmethod
    @once_differentiable  # torch.compile refuses a second derivative of compiled code; this does so in eager mode
    def backward(ctx: Any, *contributions: Tensor | None) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        width = ctx.link.width
        states = saved[-width:]
        arguments = [n if t is None else t for t, n in zip(saved[:-width], ctx.numbers, strict=True)]
        with settled(ctx.link.name), torch.no_grad():
            gradients = _Backprop(ctx.link, ctx.length, arguments, states, contributions).run(ctx.how)
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *(g if w else None for g, w in zip(gradients, wanted, strict=True))


def apart(values: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Split into tensors and sizes."""
    return [v for v in values if isinstance(v, Tensor)], [v for v in values if not isinstance(v, Tensor)]


@dataclass
class LoopLink:
    """A link that runs as a loop: its step as text, and its backward. ``name`` marks the nodes of its backward."""

    name: str
    code: str
    width: int
    per_step: int
    backward: Backward

    def parts(self, arguments: Sequence[Any]) -> tuple[list, list, list]:
        a, b = self.width, self.width + self.per_step
        return list(arguments[:a]), list(arguments[a:b]), list(arguments[b:])


class _Backprop:
    def __init__(self, link: LoopLink, length: Any, arguments: list, states: list, contributions: Sequence) -> None:
        self.link, self.length, self.program = link, length, link.backward.program
        self.split = link.backward.split
        start, per_step, shared = link.parts(arguments)
        self.start = start
        before = [torch.cat([s.unsqueeze(0), z[:-1]]) for s, z in zip(start, states, strict=True)]
        nodes = link.backward.arguments
        values = [constant(v, True) for v in (*before, *per_step)] + [constant(v, False) for v in shared]
        known = dict(zip(nodes, values, strict=True))
        self.emitter = LiveEmitter(length, Sizes(known))
        self.values = AllSteps(self.emitter, known)
        self.shared = {n for n, v in known.items() if not v.batched}
        self.direct = [c if c is not None else torch.zeros_like(z) for c, z in zip(contributions, states, strict=True)]

    def run(self, how: How) -> list[Tensor | None]:
        rows = self._step_by_step() if how.truncation is None else self._highway(how.truncation)
        gradients: list[Tensor | None] = [r[0] for r in rows]
        for tangent, row in zip(self.link.backward.tangents, rows, strict=True):
            self.values.known[tangent] = constant(row[1:], True)
        for position in range(self.link.width, len(self.link.backward.arguments)):
            node = self.link.backward.gradients[position]
            value = None if node is None else self.values[node]
            if value is None:
                gradients.append(None)
            elif position < self.link.width + self.link.per_step:
                gradients.append(self.emitter.batch(value).meta["val"])
            elif value.batched:
                gradients.append(self.emitter.sum_links(value).meta["val"])
            else:
                gradients.append(value.tensor * self.length)
        return gradients

    def _evaluator(self, states: list) -> Evaluator:
        assert self.program is not None
        return _evaluator(self.emitter, self.program, self.values, states)

    # -- all steps at once --------------------------------------------------------------------------------------

    def _highway(self, how: Truncation) -> list[Tensor]:
        assert self.split is not None and self.program is not None
        evaluator = self._evaluator([None] * self.link.width)
        outputs = self.program.outputs
        factors = {
            (to, source): _factor(self.emitter, evaluator.value(Coefficient(source), outputs[to]), self.start[to])
            for to, source in self.split.support
        }
        series = TensorSeries(self.length, self.start)
        highway = Highway(self.split.order, factors, [d[-1] for d in self.direct], self._before())
        if how.segment > 1 and (how.damping or self.link.backward.has_block):
            cut = Cut.of(self.length, how.segment)
            runs = _Runs(self._step(), cut)
            return solve_segments(series, highway, cut, runs, how.iterations, how.damping, watched=how.watched)
        return solve(
            series, highway, lambda _, rows: self._blocks(rows), how.iterations, how.damping, watched=how.watched
        )

    def _before(self) -> list[Tensor]:
        """The losses' contribution at the state before each link; zero at the first."""
        return [torch.cat([torch.zeros_like(d[:1]), d[:-1]]) for d in self.direct]

    def _blocks(self, rows: list[Tensor]) -> list[Tensor | None]:
        """Apply J to all links at once."""
        assert self.program is not None
        evaluator = self._evaluator([constant(r[1:], True) for r in rows])
        blocks = [evaluator.value(Mode.REST, i) for i in self.program.outputs]
        return [None if b is None else self.emitter.batch(b).meta["val"] for b in blocks]

    # -- step by step -------------------------------------------------------------------------------------------

    def _step_by_step(self) -> list[Tensor]:
        """The same rows by substitution."""
        step, head = self._step(), [d[-1] for d in self.direct]
        found = torch.ops.highway.loop(step.code, step.inputs, head, step.shared, self.length, True, step.sizes)
        return [torch.cat([f, h.unsqueeze(0)]) for f, h in zip(found, head, strict=True)]

    def _step(self) -> _Step:
        """One link of the substitution. Everything that does not depend on the gradient is computed for all steps
        beforehand.
        """
        backward = self.link.backward
        graph = backward.module.graph
        moving = depends_on(backward.tangents, graph) | fractions_in(graph)
        results = backward.gradients[: self.link.width]
        per_step: list[tuple[Node, Tensor]] = []
        shared: list[tuple[Node, Any]] = []
        for node in operands_outside([r for r in results if r is not None], moving):
            value = self.values[node]
            if isinstance(value, Value):
                (per_step if value.batched else shared).append((node, value.tensor))
        code = code_of(graph, backward.tangents, [n for n, _ in per_step], [n for n, _ in shared], results, True)
        return _Step(code, [*self._before(), *(v for _, v in per_step)], *apart([v for _, v in shared]))


@dataclass
class _Step:
    """One link of the substitution as text, with its arguments: ``inputs`` have a row for each link, ``shared`` and
    ``sizes`` are the same for all.
    """

    code: str
    inputs: list[Tensor]
    shared: list[Tensor]
    sizes: list[Any]


@dataclass
class _Runs:
    step: _Step
    cut: Cut

    def across(self, iteration: int, ends: list[Tensor]) -> list[Tensor]:
        return self._run(ends, False)

    def through(self, ends: list[Tensor]) -> list[Tensor]:
        return self._run(ends, True)

    def _run(self, ends: list[Tensor], whole: bool) -> list[Tensor]:
        s = self.step
        return loop_segments(s.code, s.inputs, ends, s.shared, self.cut.size, whole, s.sizes)  # type: ignore[no-any-return]


# -- shared -------------------------------------------------------------------------------------------------------


def _evaluator(emitter: LiveEmitter, program: Program, values: AllSteps, states: list) -> Evaluator:
    def inject(statement: int) -> Value | None:
        total: Value | None = None
        for node in program.injections.get(statement, ()):
            value = values[node]
            total = value if total is None else emitter.apply(aten.add.Tensor, (total, value), {})  # type: ignore
        return total

    return Evaluator(emitter, Group([0], [program]), states, lambda slot: values[program.externals[slot]], inject)


def _factor(emitter: LiveEmitter, value: Any, like: Tensor) -> Tensor | float:
    """A coefficient as a number or as ``[T or 1, ...]`` that broadcasts against the state."""
    if value is None or isinstance(value, float):
        return value or 0.0
    node = emitter.aligned(value, like.dim()) if value.batched else value.node
    tensor = node.meta["val"]
    while tensor.dim() < like.dim() + (1 if value.batched else 0):
        tensor = tensor.unsqueeze(0)
    return (tensor if value.batched else tensor.unsqueeze(0)).to(like.dtype)


def _full(emitter: LiveEmitter, value: Any, like: Tensor, length: Any) -> Tensor:
    shape = (length, *like.shape)
    if value is None or isinstance(value, float):
        return like.new_full(shape, value or 0.0)
    return _factor(emitter, value, like).expand(shape)  # type: ignore[union-attr]


def _unbatched(nodes: list[Node], tensors: Sequence[Tensor]) -> dict[Node, Value]:
    return {n: constant(t, False) for n, t in zip(nodes, tensors, strict=False)}
