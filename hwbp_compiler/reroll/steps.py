"""What a step takes from outside and from earlier steps.

Only steps that are fully understood become a loop. Everything else raises :class:`Declined` with a reason.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.reasons import Declined, Reason

from .find import is_number_of_step
from .values import Part, Value, example, example_of, operands, value_of


@dataclass(frozen=True)
class Inner:
    """A result of the same step: ``parts`` of its node number ``place``."""

    place: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Carried:
    """A result of the step ``lag`` steps earlier; for the first ``lag`` steps, ``starts``."""

    place: int
    parts: tuple[Part, ...]
    starts: tuple[Value, ...]

    @property
    def lag(self) -> int:
        return len(self.starts)

    def after(self, steps: int) -> Carried:
        """The same value, so many steps later than it is taken."""
        return Carried(self.place, self.parts, self.starts[steps:])


@dataclass(frozen=True)
class Row:
    """A value from outside that differs in every step."""

    values: tuple[Value, ...]


@dataclass(frozen=True)
class Same:
    """A node outside that is the same in every step."""

    node: Node


@dataclass(frozen=True)
class Counter:
    """A number that grows by ``stride`` from step to step and is compared with tensors on ``device``."""

    first: int
    stride: int
    device: Any


Source = Inner | Carried | Row | Same | Counter


@dataclass
class Steps:
    """Equal steps, one after the other.

    blocks    blocks[t][j] is node j of step t
    sources   sources[j] are the operands of node j, in order, followed by Counters for numbers that count steps
    """

    blocks: list[list[Node]]
    sources: list[list[Source]]

    def __post_init__(self) -> None:
        self.where = {node: (t, j) for t, block in enumerate(self.blocks) for j, node in enumerate(block)}

    @property
    def count(self) -> int:
        return len(self.blocks)

    @property
    def last(self) -> list[Node]:
        return self.blocks[-1]

    def inner(self, node: Node) -> Inner | None:
        """The node of a step, or its part, that this is; None if it is outside the steps."""
        value = value_of(node)
        return Inner(self.where[value.root][1], value.parts) if value.root in self.where else None

    def of(self, kind: type) -> list[Any]:
        """The sources of that kind, each once, in order of first occurrence."""
        found = [s for sources in self.sources for s in sources if isinstance(s, kind)]
        return list(dict.fromkeys(found))

    @property
    def states(self) -> list[Carried]:
        """Every component of the state. A value used ``lag`` steps later passes through ``lag`` components."""
        return list(dict.fromkeys(c.after(n) for c in self.of(Carried) for n in range(c.lag)))


# -- from a run to its steps -------------------------------------------------------------------------------------------


def steps_of(nodes: Sequence[Node], start: int, period: int, count: int) -> Steps:
    """The steps that begin at ``nodes[start]``. Raises Declined."""
    blocks = [list(nodes[start + t * period :][:period]) for t in range(count)]
    where = {node: (t, j) for t, block in enumerate(blocks) for j, node in enumerate(block)}
    sources: list[list[Source]] = []
    for j in range(period):
        column = [block[j] for block in blocks]
        found = [_source(list(slot), where, column) for slot in zip(*map(operands, column), strict=True)]
        sources.append(found + _numbers(column))
    return Steps(blocks, sources)


def width_of(steps: Steps) -> int:
    """Bytes that pass from each step to the next."""
    return sum(bytes_of(example_of(carried.starts[0])) for carried in steps.states)


def _source(slot: list[Node], where: dict[Node, tuple[int, int]], column: list[Node]) -> Source:
    values = [value_of(node) for node in slot]
    places = [where.get(value.root) for value in values]
    lag = next((t for t, place in enumerate(places) if place is not None), None)
    if lag is None:
        if any(value != values[0] for value in values):
            if not all(isinstance(example(node), Tensor) for node in slot):
                raise Declined(Reason.STEPS_TAKE_OTHER_THINGS.of(operator=name_of(column[0])))
            return Row(tuple(values))
        return Same(slot[0])
    place, parts = places[lag][1], values[lag].parts  # type: ignore[index]
    first = places[lag][0]  # type: ignore[index]
    for t in range(lag, len(slot)):
        if places[t] != (t - lag + first, place) or values[t].parts != parts:
            raise Declined(Reason.STEP_LOOKS_FURTHER.of(operator=name_of(column[0])))
    if lag == 0 and first == 0:
        return Inner(place, parts)
    if first != 0:
        raise Declined(Reason.STEP_LOOKS_FURTHER.of(operator=name_of(column[0])))
    return Carried(place, parts, tuple(values[:lag]))


def _numbers(column: list[Node]) -> list[Source]:
    """One source for each number in a comparison that differs between steps."""
    found: list[Source] = []
    first = column[0]
    for place, value in enumerate(first.args):
        if first.target is operator.setitem or not is_number_of_step(first, place, value):
            continue
        numbers = [node.args[place] for node in column]
        if all(number == value for number in numbers):
            continue
        stride = numbers[1] - value  # type: ignore[operator]
        if any(number != value + t * stride for t, number in enumerate(numbers)):  # type: ignore[operator]
            raise Declined(_constant_changes(first, value, numbers[1]))
        compared = example(operands(first)[0])
        found.append(Counter(value, stride, compared.device))  # type: ignore[arg-type]
    return found


def _constant_changes(node: Node, before: Any, after: Any) -> Any:
    return Reason.CONSTANT_DEPENDS_ON_STEP.of(operator=name_of(node), before=before, after=after)


def name_of(node: Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


# -- two steps that only look alike -------------------------------------------------------------------------------


def same_constants(blocks: list[list[Node]]) -> None:
    """Raise Declined for the first constant or shape in which the first two steps differ."""
    for before, after in zip(blocks[0], blocks[1], strict=True):
        constants = [_constants_of(node) for node in (before, after)]
        for a, b in zip(*constants, strict=False):
            if repr(a) != repr(b):
                raise Declined(_constant_changes(before, a, b))
    for before, after in zip(blocks[0], blocks[1], strict=True):
        held = [example(node) for node in (before, after)]
        shapes = [tuple(h.shape) if isinstance(h, Tensor) else None for h in held]
        if shapes[0] != shapes[1]:
            raise Declined(Reason.SHAPES_DEPEND_ON_STEP.of(before=shapes[0], after=shapes[1], operator=name_of(before)))


def _constants_of(node: Node) -> list[Any]:
    found: list[Any] = []
    if node.target is not operator.setitem:
        map_aggregate((node.args, node.kwargs), lambda a: found.append(a) if not isinstance(a, Node) else None)
    return found
