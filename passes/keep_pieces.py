"""Concatenate what something else uses too in memory of its own.

See Note [A concatenation with memory of its own] in ``hwbp_compiler/stack.py``.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Graph, Node

from hwbp_compiler.stack import cat

aten = torch.ops.aten


def keep_pieces(graph: Graph, created: Set[Node]) -> None:
    """Make ``highway::cat`` of each concatenation among ``created`` nodes that is not the only user of its pieces."""
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        pieces = node.args[0]
        if node in created and (any(len(piece.users) > 1 for piece in pieces) or len({*pieces}) < len(pieces)):
            node.target = cat
