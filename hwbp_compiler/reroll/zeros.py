"""Replace the number that a sum starts from by a tensor.

With ``total = 0.0`` before a loop and ``total = total + loss`` in it, the first addition differs from the others: it
adds a number and a tensor. With a tensor of zeros instead of the number it is like the others. If no loop results, the
number is put back.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from hwbp_compiler.torch_private import FakeTensor

from .values import example

_ADDITIONS = {operator.add, operator.iadd, torch.add}


def zeros_for_numbers(graph: Graph) -> list[Node]:
    """Insert tensors of zeros into additions of 0 and a tensor. Return these new operands."""
    made: list[Node] = []
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _ADDITIONS or len(node.args) != 2 or node.kwargs:
            continue
        held = example(node)
        place = next((p for p, a in enumerate(node.args) if type(a) in (int, float) and a == 0), None)
        if place is None or not isinstance(held, FakeTensor) or not all(isinstance(size, int) for size in held.shape):
            continue
        other = example(node.args[1 - place])
        if not isinstance(other, Tensor) or (other.dtype, other.shape) != (held.dtype, held.shape):
            continue
        assert first is not None
        with graph.inserting_before(first), held.fake_mode:  # type: ignore[attr-defined]
            made.append(graph.call_function(torch.zeros, (tuple(held.shape),), _as(held)))
            made[-1].meta["example_value"] = torch.zeros(tuple(held.shape), **_as(held))
        made[-1].meta["number"] = node.args[place], node.target
        node.update_arg(place, made[-1])
        # ``total += loss`` is in place from the second step on.
        if place == 0 and any(user.target is operator.iadd and user.args[0] is node for user in node.users):
            node.target = operator.iadd
    return made


def _as(held: Tensor) -> dict[str, object]:
    return {"dtype": held.dtype, "device": held.device}


def put_back(graph: Graph, made: list[Node]) -> None:
    """Put the numbers back, except those that a loop starts from."""
    for node in made:
        number, addition = node.meta["number"]
        for user in list(node.users):
            if user.target in _ADDITIONS:
                user.args = tuple(number if argument is node else argument for argument in user.args)
                user.target = addition
        if not node.users:
            graph.erase_node(node)
