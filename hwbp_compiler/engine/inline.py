"""Copy a traced graph into another one, and find the nodes that a result depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def inline(traced: Graph, operands: Sequence[Any], emit: Callable[[Node, Any, Any], Any]) -> Any:
    """The results of ``traced`` on ``operands``. ``emit(node, args, kwargs)`` makes every call in it.

    Raises NotImplementedError if the graph holds a constant tensor.
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
    """The nodes that ``results`` depend on, including ``results`` and excluding ``inputs``."""
    found: set[Node] = set()
    known = set(inputs)
    todo = list(results)
    while todo:
        node = todo.pop()
        if node not in found and node not in known:
            found.add(node)
            todo += node.all_input_nodes
    return found
