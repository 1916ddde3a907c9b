"""Give a concatenation its own memory if something else uses its pieces too.

See Note [A concatenation with memory of its own] in ``hwbp_compiler/stack.py``.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Graph, Node

from hwbp_compiler.graph.rules import Kind, rule_of, shape_of
from hwbp_compiler.stack import cat

aten = torch.ops.aten

_PARTS = {aten.slice.Tensor, aten.select.int}


def keep_pieces(graph: Graph, created: Set[Node]) -> None:
    """Use ``highway::cat`` for concatenations among the ``created`` nodes whose pieces have other users too."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        if node in created and shared_pieces(node):
            node.target = cat


def shared_pieces(concatenation: Node) -> list[Node]:
    """Pieces that Inductor would compute inside the concatenation's memory although something else uses them too."""
    pieces: list[Node] = concatenation.args[0]
    return [p for p in pieces if _is_shared(p, pieces.count(p) > 1)]


def _is_shared(piece: Node, used: bool) -> bool:
    """Whether something else uses the memory of ``piece``. ``used``: the concatenation holds it twice.

    Inductor copies inputs of the graph, and views of a part or with another shape, and it computes constants again at
    every use: these have memory of their own. A view of the same shape has the memory of its source.
    """
    while piece.all_input_nodes:
        used |= len(piece.users) > 1
        rule = rule_of(piece)
        if piece.target not in _PARTS and (rule is None or rule.kind is not Kind.LAYOUT):
            return used
        source = piece.all_input_nodes[0]
        if shape_of(piece) != shape_of(source):
            return False
        piece = source
    return False
