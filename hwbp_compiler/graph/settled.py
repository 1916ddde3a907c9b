"""Mark the nodes that a recurrence's backward pass adds to a joint graph, so that no highway is looked for in them.

The mark is the name of the recurrence. A report uses it to find these nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch.fx import Graph, Node

MARK = "highway_settled"


@contextlib.contextmanager
def settled(name: str) -> Iterator[None]:
    """Mark every node that is traced inside with ``name``."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    graph: Graph | None = None if mode is None else mode.tracer.graph
    before = set() if graph is None else set(graph.nodes)
    yield
    if graph is not None:
        for node in graph.nodes:
            if node not in before:
                node.meta[MARK] = name


def is_settled(node: Node) -> bool:
    return bool(node.meta.get(MARK))
