"""A stack whose state is several tensors that feed each other, as a module and as chains of the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .reference import Hold, Link, RunChain, Tensors, keep
from .residual import Residual
from .specs import Stack, Streams

Cut = tuple[int, ...]
"""Where a chain is cut into links: state i is the one that i updates have led to. The rest is in no chain."""


class StreamLinks(nn.Module):
    """A :class:`.specs.Streams`; ``forward(x, context) -> (the state after every update, taps)``."""

    def __init__(self, spec: Streams, batch: int, length: int, context: int) -> None:
        super().__init__()
        self.spec = spec
        one = Stack(depth=1, width=spec.width, update=spec.update, pre=spec.pre, after=spec.after)
        self.starts = nn.ModuleList(nn.Linear(spec.width, spec.width) for _ in range(spec.count))
        self.links = nn.ModuleList(
            Residual(one, spec.blocks[i % len(spec.blocks)], batch, length, context)
            for i in range(spec.depth * spec.count)
        )

    def start(self, x: Tensor) -> Tensors:
        return tuple(torch.tanh(start(x)) for start in self.starts)

    def update(self, number: int, state: Tensors, context: Tensor, hold: Hold = keep) -> Tensors:
        """State ``number`` to the next one, by the link of one component or, if all change at once, of each."""
        if self.spec.in_turns:
            component = number % self.spec.count
            new = self._component(number, component, state, context, hold)
            return (*state[:component], new, *state[component + 1 :])
        first = number * self.spec.count
        return tuple(self._component(first + i, i, state, context, hold) for i in range(self.spec.count))

    def _component(self, number: int, component: int, state: Tensors, context: Tensor, hold: Hold) -> Tensor:
        link = self.links[number]
        weights = self.spec.weights(component)
        first, *others = (value if w == 1.0 else w * value for w, value in zip(weights, state, strict=True) if w)
        u = link.pre(sum(others, first), keep)
        z, _ = link.block(u, context)
        return link.joined(state[component], u, z, hold)

    def forward(self, x: Tensor, context: Tensor) -> tuple[list[Tensors], list[Tensor]]:
        states = [self.start(x)]
        for number in range(self.spec.updates):
            states.append(self.update(number, states[-1], context))
        return states, self.taps(states)

    def taps(self, states: list[Tensors], late: bool = False) -> list[Tensor]:
        """All components of the states that the model returns. If ``late``, each comes from the state before its next
        update. The values are the same, but a gradient enters the chain there.
        """
        each, last = self.spec.updates // self.spec.depth, self.spec.updates
        return [
            states[min(i * each + c, last) if late and self.spec.in_turns else i * each][c]
            for i in self.spec.taps
            for c in range(self.spec.count)
        ]

    def last(self, states: list[Tensors]) -> Tensor:
        """What comes after the stack reads this."""
        first, *others = states[-1]
        return first if self.spec.ends == "first" else sum((0.5 * other for other in others), first)


def cuts(spec: Streams) -> Iterator[Cut]:
    """The sound choices of links. If all components change at once, a step is a link; the last one may be exact if it
    leaves the only gradient that it gets as it is. Otherwise one or more successive updates are a link, and it may
    begin with any of them; what is left at the ends is a shorter link, or in none.
    """
    count = spec.updates_used
    yield tuple(range(count + 1))
    if not spec.in_turns:
        if spec.others and spec.ends == "first" and spec.depth not in spec.taps:
            yield tuple(range(count))
        return
    for size in range(2, spec.count + 1):
        for first in range(size):
            whole = tuple(range(first, count + 1, size))
            befores = ((), (0,)) if first else ((),)
            afters = ((), (count,)) if whole[-1] < count else ((),)
            for before, after in itertools.product(befores, afters):
                yield (*before, *whole, *after)


def retold(stage: StreamLinks, cut: Cut, run: RunChain, x: Tensor, context: Tensor) -> list[Tensors]:
    """All states, with one chain that is cut into links at ``cut``."""
    states = [stage.start(x)]
    for number in range(cut[0]):
        states.append(stage.update(number, states[-1], context))
    links = [_link(stage, a, b, context) for a, b in itertools.pairwise(cut)]
    chain = run(links, states[-1])
    for (a, b), state, sideways in zip(itertools.pairwise(cut), chain.states[1:], chain.outputs, strict=True):
        inside = iter(sideways)
        states += [tuple(next(inside) for _ in state) for _ in range(a + 1, b)]
        states.append(state)
    for number in range(cut[-1], stage.spec.updates):
        states.append(stage.update(number, states[-1], context))
    return states


def _link(stage: StreamLinks, start: int, end: int, context: Tensor) -> Link:
    """State ``start`` to state ``end``; the states between them are side outputs."""

    def step(state: Tensors, side: Tensors, hold: Hold) -> tuple[Tensors, Tensors]:
        inside: list[Tensor] = []
        for number in range(start, end):
            state = stage.update(number, state, side[0], hold)
            inside += state if number + 1 < end else ()
        return state, tuple(inside)

    return Link(step, (context,))
