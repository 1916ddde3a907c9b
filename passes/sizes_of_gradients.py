"""Read the sizes of gradients elsewhere: a size is not a gradient, and what depends only on it does not carry one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.rules import SYMBOLIC, size_of
from hwbp_compiler.reasons import Declined

aten = torch.ops.aten

_LOOKS_AT_SIZES = {
    aten.sym_size.int,
    aten.sym_stride.int,
    aten.sym_numel.default,
    aten.sym_storage_offset.default,
}


def read_sizes_elsewhere(graph: Graph) -> None:
    """Take each size that the graph reads from a gradient from an earlier node, or compute it from earlier sizes.

    A size that depends on the gradient's numbers (such as how many are not zero) has no other source and stays.
    """
    if not any(graph.find_nodes(op="call_function", target=target) for target in _LOOKS_AT_SIZES):
        return
    gradients: set[Node] = set()
    sizes: dict[Any, Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if is_tangent(node) or not gradients.isdisjoint(node.all_input_nodes):
            if node.target not in _LOOKS_AT_SIZES or not _replaced(graph, node, sizes):
                gradients.add(node)
        elif isinstance(value, SYMBOLIC):
            sizes.setdefault(size_of(node), node)


def _replaced(graph: Graph, node: Node, sizes: dict[Any, Node]) -> bool:
    read = node.args[0]
    assert isinstance(read, Node)
    try:
        size = Emitter(graph, node, read.meta["val"].fake_mode, 1, sizes).size(node.meta["val"])
    except Declined:
        return False
    for user in list(node.users):
        user.args, user.kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda n: size if n is node else n)
    graph.erase_node(node)
    return True
