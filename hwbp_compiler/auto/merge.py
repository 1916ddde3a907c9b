"""Add one joint graph to another; what both compute is computed once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import Graph, Node

from hwbp_compiler.recurrence.operator import operator as recurrent_module


class Merging:
    """Adds graphs to ``graph`` that start from the same inputs and have the same forward pass.

    Calls of the same operator on the same operands become one node. Calls that draw random numbers are matched by how
    many came before: all graphs draw the same numbers in the same order.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[Any, Node] = {}
        drawn: Counter[Any] = Counter()
        first: dict[Node, Node] = {}  # the graph itself may compute something twice
        for node in graph.nodes:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), first.__getitem__)
            first[node] = self.known.setdefault(_key(graph, node, args, kwargs, drawn), node)

    def add(self, other: Graph) -> list[Any]:
        """The results of ``other`` as nodes of ``graph``. New nodes are inserted before its output."""
        place: dict[Node, Node] = {}
        drawn: Counter[Any] = Counter()
        positions = iter(self.graph.find_nodes(op="placeholder"))
        output = self.graph.output_node()
        for node in other.nodes:
            if node.op == "placeholder":
                place[node] = next(positions)
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), place.__getitem__)
            if node.op == "output":
                return list(args[0])
            key = _key(other, node, args, kwargs, drawn)
            if key not in self.known and changes_its_argument(node):
                place[node] = args[0]  # the first graph already does this, and once is enough
                continue
            if key not in self.known:
                with self.graph.inserting_before(output):
                    self.known[key] = self._made(other, node, args, kwargs)
            place[node] = self.known[key]
        raise AssertionError("a graph has an output")

    def _made(self, other: Graph, node: Node, args: Any, kwargs: Any) -> Node:
        target = node.target
        if node.op == "get_attr" and other.owning_module is not self.graph.owning_module:
            mine = self.graph.owning_module
            assert mine is not None
            target = f"_merged_constant{len(self.known)}"
            mine.register_buffer(target, _attribute(other, node), persistent=False)
        made = self.graph.create_node(node.op, target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        return made


def changes_its_argument(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(schema is not None and schema.is_mutable)


def _key(graph: Graph, node: Node, args: Any, kwargs: Any, drawn: Counter[Any]) -> Any:
    if node.target is recurrent_module:
        args = args[:-1]  # only the first graph's backward pass uses what the forward records
    if node.op == "placeholder":
        return node.name
    if node.op == "get_attr":
        return node.op, id(_attribute(graph, node))
    key = (node.op, node.target, repr(args), repr(kwargs))
    if node.op == "call_function" and _draws(node.target):
        drawn[key] += 1
        return (*key, drawn[key])
    return key


def _attribute(graph: Graph, node: Node) -> Any:
    found: Any = graph.owning_module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found


def _draws(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())
