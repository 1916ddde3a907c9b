"""Concatenate what something else uses too in memory of its own.

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
    """Make ``highway::cat`` of each concatenation among ``created`` nodes that is not the only user of its pieces."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        if node in created and shared_pieces(node):
            node.target = cat


def shared_pieces(concatenation: Node) -> list[Node]:
    """Pieces that Inductor would compute where they will lie although something else uses them too."""
    pieces: list[Node] = concatenation.args[0]
    return [p for p in pieces if (len(p.users) > 1 or pieces.count(p) > 1) and not _is_copied(p)]


def _is_copied(piece: Node) -> bool:
    """What is given to the graph is copied, and what shows part of a tensor or shows it under another shape; a constant
    is made anew wherever it is used."""
    while piece.all_input_nodes:
        rule = rule_of(piece)
        if piece.target not in _PARTS and (rule is None or rule.kind is not Kind.LAYOUT):
            return False
        source = piece.all_input_nodes[0]
        if shape_of(piece) != shape_of(source):
            return True
        piece = source
    return True
