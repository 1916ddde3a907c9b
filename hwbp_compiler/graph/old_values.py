"""Prevent recomputation from a buffer that the forward pass has changed in the meantime.

torch's partitioner (2.11 to 2.14) may save such a buffer for the backward pass. The buffer then has its new value, but
the partitioner recomputes from it what the forward pass computed from the old value. Plain Inductor gives wrong
gradients for a block with ``self.count += 1; return x + f(x) * self.count``. This module marks nodes so that they are
saved; nothing else changes.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from .info import is_tangent


def keep_old_values(graph: Graph) -> None:
    """Mark every user, in the forward pass, of a placeholder that the graph writes to."""
    writes = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    written = {write.args[0] for write in writes}
    if not written:
        return
    backward: set[Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)
        elif node.op == "call_function" and node not in writes and not written.isdisjoint(node.all_input_nodes):
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def must_be_kept(node: Node) -> bool:
    """Whether ``node`` must not be computed a second time."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE
