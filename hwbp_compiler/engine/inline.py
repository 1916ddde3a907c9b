"""Move a traced graph into another one, and find what a part of a graph is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def inline(traced: Graph, operands: Sequence[Any], emit: Callable[[Node, Any, Any], Any]) -> Any:
    """The results of ``traced`` on ``operands``; every call in it is made by ``emit(node, args, kwargs)``.

    Raises NotImplementedError where the graph holds a constant tensor of its own.
    """
    environment: dict[Node, Any] = {}
    remaining = iter(operands)
    for node in traced.nodes:
        if node.op == "placeholder":
            environment[node] = next(remaining)
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), environment.__getitem__)
            environment[node] = emit(node, args, kwargs)
        elif node.op == "output":
            return torch.fx.map_arg(node.args[0], environment.__getitem__)
        else:
            raise NotImplementedError(f"a traced constant ({node.target}) cannot be inlined")
    raise AssertionError("a graph has an output")


def needed(inputs: Iterable[Node], results: Iterable[Node]) -> set[Node]:
    """The nodes that ``results`` are computed from, themselves included, down to ``inputs``, which are not."""
    found: set[Node] = set()
    known = set(inputs)
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in found and node not in known:
            found.add(node)
            todo += node.all_input_nodes
    return found
