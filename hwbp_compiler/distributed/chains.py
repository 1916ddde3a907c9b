"""Which stages make a chain of segments, and which wait for one another: the plan that all ranks agree on.

Stages are numbered 0 .. R - 1 from the input, as torch numbers them. The last one holds the loss: what it hands back,
its exact input gradient, is the head of the first chain. A chain runs from stage ``last`` down to stage ``first``, the
nearest one below that has no highway, or stage 0. In the terms of docs/design.md, section 4.6: stage s of the chain is
a segment, e_last is the chain's head, and P_s is needed of every segment but the one next to the input. That one takes
part in the last run only, so it need not have a highway. What its last run hands back is exact for what it was given,
and is the head of the next chain: a strided shortcut stays exact, and the stages before it wait for it as they would in
backprop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """What all ranks know of a stage.

    rank     in the pipeline's group
    number   P_s, damping included, where it is a number; ``diagonal`` where it is a tensor of the state's shape
    takes    forms (shape, dtype) of what comes from the stage before in one micro-batch and wants a gradient
    """

    rank: int
    links: int = 0
    number: float | None = None
    diagonal: bool = False
    text: str = "0"
    reason: str = ""
    takes: tuple[tuple[tuple[int, ...], Any], ...] = ()
    module: str = ""

    @property
    def has_highway(self) -> bool:
        return self.number is not None or self.diagonal


@dataclass(frozen=True)
class Chain:
    """Stages ``first`` .. ``last``, each a segment."""

    first: int
    last: int

    @property
    def segments(self) -> int:
        """C, the number of segments."""
        return self.last - self.first + 1

    @property
    def inner(self) -> range:
        """The segments whose P and v are needed: all but the one next to the input."""
        return range(self.first + 1, self.last + 1)

    def __contains__(self, stage: int) -> bool:
        return self.first <= stage <= self.last

    def rounds(self, iterations: int | None) -> int:
        """k, or fewer: C - 1 are ordinary backprop. None asks for that."""
        most = self.segments - 1
        return most if iterations is None else min(iterations, most)


@dataclass(frozen=True)
class Plan:
    """The stages, and the chains they make, that nearest the loss first."""

    stages: tuple[StagePlan, ...]
    iterations: int | None
    chains: tuple[Chain, ...] = field(init=False)

    def __post_init__(self) -> None:
        chains = chains_of([s.has_highway for s in self.stages], self.iterations)
        object.__setattr__(self, "chains", tuple(chains))

    def is_exact_at(self, stage: int) -> bool:
        """Whether P of ``stage`` goes into nothing."""
        return not any(stage in chain.inner for chain in self.chains)


def chains_of(has_highway: Sequence[bool], iterations: int | None) -> list[Chain]:
    """A chain that ``iterations`` make ordinary backprop is one of each of its stages: they wait for each other in the
    rounds as well, and a product of K that overflows would spoil what needs none.

    >>> chains_of([False, True, True, False], 1)
    [Chain(first=0, last=2)]
    >>> chains_of([False, True, True, False], 2)
    [Chain(first=2, last=2), Chain(first=1, last=1), Chain(first=0, last=0)]
    >>> chains_of([False, True, False, True, False], 0)
    [Chain(first=2, last=3), Chain(first=0, last=1)]
    """
    found: list[Chain] = []
    last = len(has_highway) - 2
    while last >= 0:
        first = last
        while first > 0 and has_highway[first]:
            first -= 1
        chain = Chain(first, last)
        whole = chain.rounds(iterations) < chain.segments - 1
        found += [chain] if whole else [Chain(s, s) for s in range(last, first - 1, -1)]
        last = first - 1
    return found
