"""The data model: a chain of links, and groups of equal links.

Order is that of the gradient: state 0 is the head (nearest the loss), link i leads from state i to state i + 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from torch.fx import Node

from .program import Program, State


@dataclass
class Chain:
    """``len(links)`` links; ``states[i]`` are the nodes of state i, one per component.

    ``tail`` is true if one more link follows the last state and the input of that link needs no gradient (the first
    step of a recurrence that starts from zeros). It counts as a link but sends its gradient to no state.
    """

    states: list[State]
    links: list[Program]
    tail: bool = False

    def __post_init__(self) -> None:
        if len(self.states) != len(self.links) + 1:
            raise AssertionError(f"{len(self.states)} states do not bound {len(self.links)} links")

    @property
    def length(self) -> int:
        return len(self.links) + int(self.tail)

    @property
    def width(self) -> int:
        return len(self.states[-1])

    @property
    def last_known(self) -> State:
        """Per component, the last state that is a node. The very last state may lack a node, or be part of a larger
        sum.
        """
        return tuple(next((s[c] for s in reversed(self.states) if s[c] is not None), None) for c in range(self.width))


@dataclass
class Group:
    """Links whose programs are equal: evaluated once per iteration, as lanes of one batched program.

    lanes       positions of the links in the chain, in forward order (descending); a tail that joined comes first and
                has position ``len(links)``
    programs    per lane, statement by statement the same
    """

    lanes: list[int]
    programs: list[Program]
    exports: list[int] = field(default_factory=list)

    @functools.cached_property
    def template(self) -> Program:
        """A lane with a node for every statement (the first and the last link of a chain may lack some)."""
        whole = (p for p in self.programs if p.outputs and all(n is not None for n in p.raw))
        return next(whole, self.programs[-1])

    def raw(self, statement: int) -> list[Node | None]:
        """The nodes for that statement, one per lane."""
        return [p.raw[statement] for p in self.programs]

    def external(self, slot: int) -> list[Node]:
        return [p.externals[slot] for p in self.programs]

    @property
    def external_tuples(self) -> list[tuple[Node, ...]]:
        """The externals of the links: per slot, one node for each lane."""
        return [tuple(self.external(slot)) for slot in range(len(self.template.externals))]
