"""Highway-BP written with ``torch.autograd``: the oracle that the compiler is compared with.

It follows docs/design.md, sections 1 and 4.6, link by link, and shares no code with the passes. It is deliberately slow
and simple, and meant for float64.

A model is written as a :class:`Program`: an ordinary forward function that passes each of its chains to ``run_chain``.
Autograd differentiates everything outside the chains as usual. A chain is one autograd node. Autograd gives this node
the loss contributions ``c_i`` of the chain's states (losses at every step, later chains, heads) and the gradients of
its links' side outputs. The node returns the truncated gradient of the chain's parameters, side inputs and first state.
Several chains need no special rule: autograd runs the chain nearest the loss first.
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
    """One link: a function ``(state, side, hold) -> (next_state, outputs)`` over tuples of tensors.

    Every value that mixes elements (a block's output, a gate, a LayerNorm's mean) passes through ``hold`` where it
    meets the state. With ``hold`` the identity this is the whole link ``f``. If ``hold`` cuts gradients, the Jacobian
    of the next state with respect to the state is ``K``, the highway. ``outputs`` are the link's side outputs (an
    activity penalty, for example); ``side`` are its inputs besides the state and the parameters.
    """

    def __call__(self, state: Tensors, side: Tensors, hold: Hold, /) -> tuple[Tensors, Tensors]: ...


@dataclass(frozen=True)
class Link:
    """A step and its side inputs.

    Attributes:
        step: the function of the link, a :class:`Step`.
        side: its side inputs. Every tensor that ``step`` uses and that is not a leaf of autograd must be among them.
    """

    step: Step
    side: Tensors = ()


@dataclass(frozen=True)
class ChainRun:
    """The result of running a chain of L links.

    Attributes:
        states: states 0..L; state 0 is the first state of the chain.
        outputs: the side outputs of links 1..L.
    """

    states: list[Tensors]
    outputs: list[Tensors]


RunChain = Callable[[Sequence[Link], Tensors], ChainRun]


@dataclass(frozen=True)
class Program:
    """A model and its chains, described for the oracle.

    Attributes:
        parameters: the model's own parameters, by name. :func:`reference_gradients` gives the gradients of these.
        forward: ``forward(run_chain, *args)`` returns what the model returns. For each chain it calls
            ``run_chain(links, state)`` with a list of :class:`Link` and a tuple of tensors, and gets a
            :class:`ChainRun`.
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
    segment: int = 1,
    solver: Solver | None = None,
    exact: Collection[int] = (),
) -> tuple[Any, dict[str | int, Tensor]]:
    """Compute the output of ``program(*args)`` and the Highway-BP gradients of ``loss(output) -> scalar``.

    Args:
        program: the model and its chains. Use float64 if it is to serve as an oracle.
        args: the arguments of the model.
        loss: ``loss(output) -> scalar``.
        iterations: k. Only gradient paths that cross at most k blocks of a chain count; ``"exact"`` or k >= L is
            backprop.
        damping: gamma: ``K -> (1 - gamma) K``, ``J -> J + gamma K``.
        segment: S, links per segment: exact inside a segment, highway across; 1 is the paper. For S > 1 a path counts
            if it leaves the highway in at most k segments, and k >= ceil(L / S) - 1 is backprop.
        solver: the function that computes a chain's w; :func:`highway_bp` if None.
        exact: numbers of the chains to leave to backprop, in the order in which ``program`` runs the chains.

    Returns:
        The output, and the gradients: by name for parameters, and by position for those of ``args`` that require a
        gradient. A gradient is zero if the loss does not depend on the tensor. Nothing is added to ``.grad``.

    Raises:
        ValueError: ``segment`` is below 1.
    """
    if segment < 1:
        raise ValueError(f"segment is {segment}; it must be at least 1")
    leaves: dict[str | int, Tensor] = {name: p for name, p in program.parameters.items() if p.requires_grad}
    for position, value in enumerate(args):
        if isinstance(value, Tensor) and value.requires_grad:
            leaves[position] = value
    weights = tuple(p for p in program.parameters.values() if p.requires_grad)

    numbers = itertools.count()

    def run_chain(links: Sequence[Link], state: Tensors) -> ChainRun:
        rounds = "exact" if next(numbers) in exact else iterations
        chain = _Chain(tuple(links), weights, rounds, damping, segment, solver or highway_bp)
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

        def run(hold: Hold) -> tuple[Tensors, Tensors]:
            with torch.enable_grad(), torch.random.fork_rng(devices=[]):
                torch.set_rng_state(rng_state)  # the dropout masks of the forward run
                return link.step(self._state, self._side, hold)

        self._whole, self._outputs = run(keep)
        self._highway, _ = run(torch.Tensor.detach)

    def whole(self, w: Tensors) -> Tensors:
        return _vjp(self._whole, self._state, w)

    def highway(self, w: Tensors) -> Tensors:
        return _vjp(self._highway, self._state, w)

    def sideways(self, outputs: Tensors) -> Tensors:
        """What the link's outputs contribute at the state before it, exactly, through the link's interior."""
        return _vjp(self._outputs, self._state, outputs)

    def others(self, w: Tensors, outputs: Tensors) -> tuple[Tensors, Tensors]:
        """Gradients of the side inputs and the parameters, given w after the link and its outputs' gradients."""
        found = _vjp((*self._whole, *self._outputs), (*self._side, *self._weights), (*w, *outputs))
        return found[: len(self._side)], found[len(self._side) :]


class Solver(Protocol):
    """``(links 1..L, contributions c_0..c_L, iterations, damping, segment) -> w_0..w_L``."""

    def __call__(
        self,
        links: Sequence[LinkAt],
        contributions: Sequence[Tensors],
        iterations: int,
        damping: float,
        segment: int,
        /,
    ) -> list[Tensors]: ...


def highway_bp(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float, segment: int = 1
) -> list[Tensors]:
    """Highway-BP: ``w^0 = CumSumProd(c, K)``, then ``w = w^0 + CumSumProd(w J, K)`` k times (Fagnou et al., ICLR 2025).

    For segments of S > 1 links: docs/design.md, section 4.6, "Segments".

    Args:
        links: links 1..L at their saved states.
        contributions: c_0..c_L, what the losses contribute at each state: tuples of tensors with the state's shapes.
        iterations: k.
        damping: gamma.
        segment: S, links per segment.

    Returns:
        w_0..w_L, as tuples of tensors with the state's shapes.
    """
    if segment != 1:
        return _segmented(links, contributions, iterations, damping, segment)
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


def _segmented(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float, segment: int
) -> list[Tensors]:
    """For S > 1: k times a run in every segment and a scan over segments, then the last run.

    ``e_s`` estimates the gradient at ``h_{b_s}``, the last state of segment s = 1..C, which ends at ``b_s`` and begins
    after ``a_s = b_{s-1}``:

        run_s(e)  w_{b_s} = e,  w_{i-1} = c_{i-1} + w_i (K_i + J_i);  out_s = w_{a_s}     undamped
        e^0       e_{s-1} = (c_{a_s}, c_{a_s+1}, .. c_{b_s-1} along the highway) + P_s e_s
        v_s       out_s(e^t_s) - P_s e^t_s
        e^{t+1}   e_{s-1} = v_s + P_s e_s
        w         run_s(e^k_s)
    """
    length = len(links)
    b = [0, *range((length - 1) % segment + 1, length + 1, segment)]  # b[s]; b[0] is where segment 1 begins
    segments = range(1, len(b))

    def along_highway(s: int, e: Tensors) -> Tensors:  # P_s e
        for i in reversed(range(b[s - 1], b[s])):
            e = _scale(1.0 - damping, links[i].highway(e))  # links[i] is link i + 1
        return e

    def gathered(s: int) -> Tensors:  # the segment's c's along the highway; that of its last state is in e_s
        row = _scale(0.0, contributions[length])
        for i in reversed(range(b[s - 1], b[s])):
            row = _add(contributions[i], _scale(1.0 - damping, links[i].highway(row)))
        return row

    def run(s: int, e: Tensors) -> list[Tensors]:  # w_{a_s} .. w_{b_s}
        w = [e]
        for i in reversed(range(b[s - 1], b[s])):
            w.insert(0, _add(contributions[i], links[i].whole(w[0])))
        return w

    def scan(values: Mapping[int, Tensors]) -> dict[int, Tensors]:  # e_0 .. e_C, of which e_0 is not used
        e = {segments[-1]: contributions[length]}
        for s in reversed(segments):
            e[s - 1] = _add(values[s], along_highway(s, e[s]))
        return e

    e = scan({s: gathered(s) for s in segments})
    for _ in range(iterations):
        e = scan({s: _subtract(run(s, e[s])[0], along_highway(s, e[s])) for s in segments})
    w = [run(1, e[1])[0]]
    for s in segments:
        w += run(s, e[s])[1:]
    return w


def sum_over_paths(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float, segment: int = 1
) -> list[Tensors]:
    """Compute w from its definition, as a sum over paths (Fagnou et al., ICLR 2025, Theorems 1 and 2; for segments
    docs/design.md, section 4.6). Arguments and result are those of :func:`highway_bp`.

    Take every pair of states i <= j and every path between them. A path crosses each link either by its highway
    ``(1 - gamma) K`` or by its block ``J + gamma K``. The sum contains c_j sent along each path that crosses blocks in
    at most k segments; blocks in the segment of state i do not count. State i belongs to the segment of link i, which
    no path to i crosses. So for S = 1 the number of blocks is counted. For S > 1 the first state belongs to the segment
    of link 1.

    All paths through a segment except the one along the highway sum to ``(whole segment) - P_s``. The same holds for
    a c_j inside a segment and the part of the segment that its paths cross. The cost is exponential in L, and the
    Jacobians are dense.
    """
    length = len(links)

    def segment_of(state: int) -> int | None:  # and of the link before it, counted from the loss
        return None if state == 0 and segment == 1 else (length - max(state, 1)) // segment

    highways = [(1.0 - damping) * _matrix(link.highway, contributions[0]) for link in links]
    blocks = [_matrix(link.whole, contributions[0]) - k for link, k in zip(links, highways, strict=True)]
    rows = [_flatten(c) for c in contributions]
    w = []
    for i in range(length + 1):
        total = rows[i].clone()
        for j in range(i + 1, length + 1):
            for path in itertools.product((False, True), repeat=j - i):
                crossed = zip(reversed(range(i + 1, j + 1)), path, strict=True)
                left = {segment_of(link) for link, crosses_block in crossed if crosses_block}
                if len(left - {segment_of(i)}) > iterations:
                    continue
                row = rows[j]
                for position, crosses_block in zip(reversed(range(i, j)), path, strict=True):
                    row = row @ (blocks if crosses_block else highways)[position]
                total = total + row
        w.append(_unflatten(total, contributions[0]))
    return w


def fixed_point(
    links: Sequence[LinkAt], contributions: Sequence[Tensors], iterations: int, damping: float, segment: int = 1
) -> list[Tensors]:
    """Fixed-point iteration: start from ``w = c`` and apply ``w_i <- c_i + w_{i+1} (J + K)`` k times. No damping.

    Arguments and result are those of :func:`highway_bp`.

    Raises:
        ValueError: ``segment`` is not 1; fixed-point iteration has no segments.
    """
    if segment != 1:
        raise ValueError(f"fixed-point iteration has no segments; segment is {segment}, it must be 1")
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
    segment: int
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
    """A step of the forward run: its result, and the random state it started from."""

    state: Tensors
    outputs: Tensors
    rng_state: Tensor


class _HighwayChain(torch.autograd.Function):
    """From (first state, side inputs, parameters) to every later state and all side outputs."""

    @staticmethod
    def forward(ctx: Any, chain: _Chain, steps: list[_Taken], *tensors: Tensor) -> Tensors:
        ctx.chain, ctx.steps, ctx.start = chain, steps, tensors[: len(steps[0].state)]
        # Fresh tensors: an unchanged state must not share memory with an input.
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
        enough = length if chain.segment == 1 else -(-length // chain.segment) - 1
        iterations = enough if chain.iterations == "exact" else min(chain.iterations, enough)
        w = chain.solver(links, contributions, iterations, chain.damping, chain.segment)

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
    return tuple(t.detach().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors)


def _vjp(values: Tensors, inputs: Tensors, cotangents: Tensors) -> Tensors:
    """``cotangents (d values / d inputs)``; zeros if there is no dependence."""
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
