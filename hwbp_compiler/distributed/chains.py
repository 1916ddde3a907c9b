"""Which stages form a chain of segments, and which wait for one another: the plan that all ranks agree on.

Stages are numbered 0 .. R - 1 from the input, as in torch. The last one holds the loss. Its exact input gradient is the
head of the first chain. A chain runs from stage ``last`` down to stage ``first``, which is the nearest stage below
without a highway, or stage 0.

In the terms of docs/design.md, section 4.6, "Segments": stage s of the chain is a segment, e_last is the chain's head,
and P_s is needed for every segment except the one next to the input. That one takes part only in the last run, so it
need not have a highway. Its result is exact for the gradient that it receives, and is the head of the next chain. So a
strided shortcut stays exact, and the stages before it wait for it as they would in backprop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StagePlan:
    """What all ranks know about a stage.

    rank     its rank in the pipeline's group
    number   P_s with damping, if it is a number; ``diagonal`` is true if P_s is a tensor of the state's shape
    takes    shape and dtype of each input from the stage before that requires a gradient, for one micro-batch
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
        """The segments whose P and v are needed: all except the one next to the input."""
        return range(self.first + 1, self.last + 1)

    def __contains__(self, stage: int) -> bool:
        return self.first <= stage <= self.last

    def rounds(self, iterations: int | None) -> int:
        """The number of rounds: k, or C - 1 if that is less, which is ordinary backprop. None requests that."""
        most = self.segments - 1
        return most if iterations is None else min(iterations, most)


@dataclass(frozen=True)
class Plan:
    """The stages, and the chains they form, those nearest the loss first."""

    stages: tuple[StagePlan, ...]
    iterations: int | None
    chains: tuple[Chain, ...] = field(init=False)

    def __post_init__(self) -> None:
        chains = chains_of([s.has_highway for s in self.stages], self.iterations)
        object.__setattr__(self, "chains", tuple(chains))

    def is_exact_at(self, stage: int) -> bool:
        """Whether P of ``stage`` is not used."""
        return not any(stage in chain.inner for chain in self.chains)


def chains_of(has_highway: Sequence[bool], iterations: int | None) -> list[Chain]:
    """The chains that the stages form. If ``iterations`` is enough for ordinary backprop, each stage of a chain becomes
    a separate chain. The rounds would make the stages wait for one another anyway, and a product of K that overflows
    would spoil a result that does not need it.

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
