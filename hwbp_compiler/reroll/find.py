"""Find where a graph repeats itself: stretches of nodes that occur again and again, one directly after the other.

Near-linear in the number of nodes: a period is tried only if a node occurs again at that distance.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from hwbp_compiler.graph.sizes import hint

from .values import example, is_part, only_splits, value_of

# The fewest steps of a loop: two equal ones may be chance.
LEAST = 3

# The number of periods to try, the most frequent distances first.
_PERIODS = 64


@dataclass(frozen=True)
class Run:
    """``nodes[start : start + length]`` look alike at a distance of ``period``."""

    start: int
    period: int
    length: int

    @property
    def saved(self) -> int:
        """The number of nodes that a loop would save."""
        return (self.length // self.period - 1) * self.period


def working(graph: Graph) -> list[Node]:
    """The nodes that compute something, in order. Nodes that only take a part of another are left out."""
    kinds = ("call_function", "call_method", "call_module")
    return [node for node in graph.nodes if node.op in kinds and not is_part(node) and not only_splits(node)]


def runs(looks: Sequence[Any], least: int) -> list[Run]:
    """All runs of at least ``least`` periods, those that save most first. ``looks`` describe the nodes."""
    numbers: dict[Any, int] = {}
    seen = [numbers.setdefault(look, len(numbers)) for look in looks]
    last: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for place, number in enumerate(seen):
        if number in last:
            distances[place - last[number]] += 1
        last[number] = place
    found: list[Run] = []
    row = torch.tensor(seen)
    for period, _ in distances.most_common(_PERIODS):
        for start, length in _stretches(row[:-period] == row[period:]):
            run = Run(start, period, length + period)
            if run.length >= least * period:
                found.append(run)
    return sorted(found, key=lambda run: (-run.saved, run.period, run.start))


def _stretches(same: Tensor) -> Iterator[tuple[int, int]]:
    """Start and length of each stretch of true values."""
    values, counts = torch.unique_consecutive(same, return_counts=True)
    start = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value:
            yield start, count
        start += count


# -- descriptions of nodes -----------------------------------------------------------------------------------------


def closely(node: Node) -> Any:
    """A description that corresponding nodes of two steps share. It leaves out which tensors they take (but parameters
    must be the same) and the numbers that :mod:`.steps` can take from a series.
    """
    return _look(node, _constant, _shapes)


def loosely(node: Node) -> Any:
    """A description shared by steps that are meant to be alike, whether or not they can become a loop."""
    return _look(node, lambda node, place, value: type(value).__name__, lambda value: type(value).__name__)


def _look(node: Node, constant: Callable[[Node, Any, Any], Any], shapes: Callable[[Any], Any]) -> Any:
    def of(argument: Any, place: Any) -> Any:
        if isinstance(argument, Node):
            root = value_of(argument).root
            mine = root.name if isinstance(example(root), nn.Parameter) else root.op == "get_attr"
            return "node", mine, shapes(example(argument))
        if isinstance(argument, (tuple, list)):
            return tuple(of(item, place) for item in argument)
        if isinstance(argument, dict):
            return tuple((key, of(item, place)) for key, item in argument.items())
        return constant(node, place, argument)

    arguments = tuple(of(argument, place) for place, argument in enumerate(node.args))
    named = tuple((key, of(argument, key)) for key, argument in node.kwargs.items())
    return node.op, node.target, arguments, named, shapes(example(node))


def _constant(node: Node, place: Any, value: Any) -> Any:
    if is_number_of_step(node, place, value):
        return "number"
    return type(value).__name__, repr(value)


COMPARISONS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
COMPARISONS |= {torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne}
_METHODS = {"lt", "le", "gt", "ge", "eq", "ne"}


def is_number_of_step(node: Node, place: Any, value: Any) -> bool:
    """Whether the constant may differ from step to step: a number that a tensor is compared with, or a place to write
    to.
    """
    if node.target is operator.setitem:
        return place == 1
    compares = node.target in COMPARISONS if node.op == "call_function" else node.target in _METHODS
    return compares and type(value) is int and place in (0, 1)


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        # Symbols count by their value, because the same size may be written in two ways.
        return tuple(hint(size) for size in value.shape), value.dtype, str(value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    return type(value).__name__
