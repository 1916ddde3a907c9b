"""Highway-BP written out with ``torch.autograd``: the oracle the compiler is measured against.

Follows PAPER.md, section 1, link by link, and shares no code with the passes. Slow and plain on purpose; meant
for float64.

A model is retold as a :class:`Program`: an ordinary forward function that hands each of its chains to
``run_chain``. Everything outside the chains is differentiated by autograd as it stands. A chain is one
autograd node: what autograd delivers to it are the loss contributions ``c_i`` of its states (losses at every
step, later chains, heads) and the gradients of what left its links sideways; what it returns is the truncated
gradient of its parameters, side inputs and first state. So several chains need no rule of their own: autograd
serves the one nearest the loss first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Hold = Callable[[Tensor], Tensor]


class Step(Protocol):
    """One link: ``(state, side, hold) -> (next_state, outputs)``, all three tuples of tensors.

    Every value that mixes elements (a block's output, a gate, a LayerNorm's mean) passes through ``hold`` where
    it meets the state. With ``hold`` the identity this is the whole link ``f``; with ``hold`` cutting gradients
    the Jacobian of the next state in the state is ``K``, the highway. ``outputs`` are what leaves the link
    sideways (an activity penalty, say), ``side`` what enters it besides the state and the parameters.
    """

    def __call__(self, state: Tensors, side: Tensors, hold: Hold, /) -> tuple[Tensors, Tensors]: ...


@dataclass(frozen=True)
class Link:
    """A step and its side inputs. A non-leaf tensor used in ``step`` must come in through ``side``."""

    step: Step
    side: Tensors = ()


@dataclass(frozen=True)
class ChainRun:
    """What running a chain of L links gives: ``states`` 0..L (0 is where it began), ``outputs`` of links 1..L."""

    states: list[Tensors]
    outputs: list[Tensors]


RunChain = Callable[[Sequence[Link], Tensors], ChainRun]


@dataclass(frozen=True)
class Program:
    """A model retold for the oracle.

    parameters  the model's own parameters, by name; :func:`reference_gradients` differentiates in these tensors
    forward     ``forward(run_chain, *args)`` returns what the model returns
    """

    parameters: Mapping[str, Tensor]
    forward: Callable[..., Any]


def reference_gradients(
    program: Program,
    args: Sequence[Any],
    loss: Callable[[Any], Tensor],
    iterations: int | Literal["exact"],
    damping: float = 0.0,
    *,
    solver: Solver | None = None,
    exact: Collection[int] = (),
) -> tuple[Any, dict[str | int, Tensor]]:
    """The output of ``program(*args)`` and the Highway-BP gradients of ``loss(output) -> scalar``.

    iterations  k: gradient paths that cross at most k blocks of a chain; ``"exact"`` or k >= L is backprop
    damping     gamma: ``K -> (1 - gamma) K``, ``J -> J + gamma K``
    solver      how a chain's w is found: :func:`highway_bp` unless told otherwise
    exact       chains, numbered in the order in which ``program`` runs them, that are left to backprop

    The gradients are keyed by parameter name, and by position for those of ``args`` that require a gradient;
    zeros where the loss does not depend on one. Nothing is accumulated into ``.grad``.
    """
    leaves: dict[str | int, Tensor] = {name: p for name, p in program.parameters.items() if p.requires_grad}
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.requires_grad:
            leaves[position] = value
    weights = tuple(p for p in program.parameters.values() if p.requires_grad)

    numbers = itertools.count()

    def run_chain(links: Sequence[Link], state: Tensors) -> ChainRun:
        rounds = "exact" if next(numbers) in exact else iterations
        chain = _Chain(tuple(links), weights, rounds, damping, solver or highway_bp)
        return chain.run(tuple(state))

    output = program.forward(run_chain, *args)
    found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(leaf) if gradient is None else gradient
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return output, gradients


# ---------------------------------------------------------------------------------------------------------
# The two halves of a link, and three ways to find w.


class LinkAt:
    """A link at its saved state. Row vectors: ``whole(w) = w (K + J)`` and ``highway(w) = w K``."""

    def __init__(self, link: Link, state: Tensors, weights: Tensors, rng_state: Tensor) -> None:
        self._weights = weights
        self._state = _leaves(state)
        self._side = _leaves(link.side)

        def again(hold: Hold) -> tuple[Tensors, Tensors]:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.set_rng_state(rng_state)  # the dropout masks of the forward run
                return link.step(self._state, self._side, hold)

        self._whole, self._outputs = again(keep)
        self._highway, _ = again(torch.Tensor.detach)

    def whole(self, w: Tensors) -> Tensors:
        return _vjp(self._whole, self._state, w)

    def highway(self, w: Tensors) -> Tensors:
        return _vjp(self._highway, self._state, w)

    def sideways(self, outputs: Tensors) -> Tensors:
        """What the link's outputs contribute at the state before it, exact through the link's interior."""
        return _vjp(self._outputs, self._state, outputs)

    def others(self, w: Tensors, outputs: Tensors) -> tuple[Tensors, Tensors]:
        """Gradients of the side inputs and of the parameters, given w after the link and its outputs' own."""
        found = _vjp((*self._whole, *self._outputs), (*self._side, *self._weights), (*w, *outputs))
        return found[: len(self._side)], found[len(self._side) :]


class Solver(Protocol):
    """``(links 1..L, contributions c_0..c_L, iterations, damping) -> w_0..w_L``."""

    def __call__(
        self, links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float, /
    ) -> list[Tensors]: ...


def highway_bp(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float
) -> list[Tensors]:
    """PAPER.md, section 1: ``w^0 = CumSumProd(c, K)``, then ``w = w^0 + CumSumProd(w J, K)`` k times."""
    length = len(links)

    def damped_highway(link: LinkAt, w: Tensors) -> Tensors:
        return _scale(1.0 - damping, link.highway(w))

    def damped_block(link: LinkAt, w: Tensors) -> Tensors:  # J + gamma K = (J + K) - (1 - gamma) K
        return _subtract(link.whole(w), damped_highway(link, w))

    def cum_sum_prod(values: Sequence[Tensors]) -> list[Tensors]:
        sums = list(values)
        for i in reversed(range(length)):
            sums[i] = _add(values[i], damped_highway(links[i], sums[i + 1]))  # links[i] is link i + 1
        return sums

    highway_only = cum_sum_prod(contributions)
    w = highway_only
    nothing = _scale(0.0, contributions[length])
    for _ in range(iterations):
        crossed = [damped_block(links[i], w[i + 1]) for i in range(length)]
        w = [_add(a, b) for a, b in zip(highway_only, cum_sum_prod([*crossed, nothing]), strict=True)]
    return w


def sum_over_paths(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float
) -> list[Tensors]:
    """The meaning of w (Theorems 1 and 2), by brute force.

    For every pair of states i <= j and every way to cross each link between them by its highway or its block,
    with at most k blocks: push c_j along that path. Exponential in L, with dense Jacobians.
    """
    length = len(links)
    highways = [(1.0 - damping) * _matrix(link.highway, contributions[0]) for link in links]
    blocks = [_matrix(link.whole, contributions[0]) - k for link, k in zip(links, highways, strict=True)]
    rows = [_flatten(c) for c in contributions]
    w = []
    for i in range(length + 1):
        total = rows[i].clone()
        for j in range(i + 1, length + 1):
            for path in itertools.product((False, True), repeat=j - i):
                if sum(path) > iterations:
                    continue
                row = rows[j]
                for position, crosses_block in zip(reversed(range(i, j)), path, strict=True):
                    row = row @ (blocks if crosses_block else highways)[position]
                total = total + row
        w.append(_unflatten(total, contributions[0]))
    return w


def fixed_point(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float
) -> list[Tensors]:
    """Fixed-point iteration: ``w_i <- c_i + w_{i+1} (J + K)`` k times from ``w = c``. Has no damping."""
    w = list(contributions)
    for _ in range(iterations):
        moved = [link.whole(w[i + 1]) for i, link in enumerate(links)]
        w = [*map(_add, contributions, moved), contributions[-1]]
    return w


# ---------------------------------------------------------------------------------------------------------
# A chain as one node of the autograd graph.


@dataclass(frozen=True)
class _Chain:
    links: tuple[Link, ...]
    weights: Tensors
    iterations: int | Literal["exact"]
    damping: float
    solver: Solver

    def run(self, start: Tensors) -> ChainRun:
        steps = self._steps(start)
        sides = tuple(side for link in self.links for side in link.side)
        flat = iter(_HighwayChain.apply(self, steps, *start, *sides, *self.weights))
        states, outputs = [start], []
        for step in steps:
            states.append(tuple(itertools.islice(flat, len(step.state))))
            outputs.append(tuple(itertools.islice(flat, len(step.outputs))))
        return ChainRun(states, outputs)

    @torch.no_grad()
    def _steps(self, state: Tensors) -> list[_Taken]:
        steps = []
        for link in self.links:
            rng_state = torch.get_rng_state()
            state, outputs = link.step(state, link.side, keep)
            steps.append(_Taken(state, outputs, rng_state))
        return steps


@dataclass(frozen=True)
class _Taken:
    """A step taken in the forward run: where it led, and the random state it started from."""

    state: Tensors
    outputs: Tensors
    rng_state: Tensor


class _HighwayChain(torch.autograd.Function):
    """From (first state, side inputs, parameters) to every later state and everything that leaves sideways."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, steps: list[_Taken], *tensors: Tensor) -> Tensors:
        ctx.chain, ctx.steps, ctx.start = chain, steps, tensors[: len(steps[0].state)]
        # Fresh tensors: what a link hands on unchanged must not share memory with an input.
        return tuple(t.clone() for step in steps for t in (*step.state, *step.outputs))

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        chain: _Chain = ctx.chain
        before = [ctx.start, *(step.state for step in ctx.steps[:-1])]
        links = [
            LinkAt(link, state, chain.weights, step.rng_state)
            for link, state, step in zip(chain.links, before, ctx.steps, strict=True)
        ]
        flat = iter(incoming)
        contributions = [tuple(torch.zeros_like(t) for t in ctx.start)]
        sideways = []
        for step in ctx.steps:
            contributions.append(tuple(itertools.islice(flat, len(step.state))))
            sideways.append(tuple(itertools.islice(flat, len(step.outputs))))
        for i, link in enumerate(links):
            contributions[i] = _add(contributions[i], link.sideways(sideways[i]))

        length = len(links)
        iterations = length if chain.iterations == "exact" else min(chain.iterations, length)
        w = chain.solver(links, contributions, iterations, chain.damping)

        side_gradients: list[Tensor] = []
        weight_gradients = tuple(torch.zeros_like(p) for p in chain.weights)
        for i, link in enumerate(links):
            of_side, of_weights = link.others(w[i + 1], sideways[i])
            side_gradients.extend(of_side)
            weight_gradients = _add(weight_gradients, of_weights)
        return (None, None, *w[0], *side_gradients, *weight_gradients)


# ---------------------------------------------------------------------------------------------------------
# Tuples of tensors as vectors.


def keep(t: Tensor) -> Tensor:
    return t


def _leaves(tensors: Tensors) -> Tensors:
    return tuple(t.detach().requires_grad_(t.is_floating_point()) for t in tensors)


def _vjp(values: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """``cotangents (d values / d inputs)``; zeros where nothing depends on anything."""
    pairs = [(v, c) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    wanted = [t for t in inputs if t.requires_grad]
    if not pairs or not wanted:
        return tuple(torch.zeros_like(t) for t in inputs)
    found = iter(
        torch.autograd.grad([v for v, _ in pairs], wanted, [c for _, c in pairs], retain_graph=True, allow_unused=True)
    )
    gradients = [next(found) if t.requires_grad else None for t in inputs]
    return tuple(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, gradients, strict=True))


def _add(a: Tensors, b: Tensors) -> Tensors:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _subtract(a: Tensors, b: Tensors) -> Tensors:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _scale(factor: float, a: Tensors) -> Tensors:
    return tuple(factor * x for x in a)


def _flatten(a: Tensors) -> Tensor:
    return torch.cat([x.reshape(-1) for x in a])


def _unflatten(row: Tensor, like: Tensors) -> Tensors:
    return tuple(part.reshape(x.shape) for part, x in zip(row.split([x.numel() for x in like]), like, strict=True))


def _matrix(transposed: Callable[[Tensors], Tensors], like: Tensors) -> Tensor:
    """The Jacobian whose vector-Jacobian product is ``transposed``, row by row."""
    size = sum(x.numel() for x in like)
    unit = torch.eye(size, dtype=like[0].dtype)
    return torch.stack([_flatten(transposed(_unflatten(unit[r], like))) for r in range(size)])
