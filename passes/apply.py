"""Apply a rewriting: replace uses, restore the topological order, and erase what nothing uses any more."""

from __future__ import annotations

import heapq
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from hwbp_compiler.reasons import Declined, Reason

from .rewrite import Rewriting


def discard(graph: Graph, created: list[Node]) -> None:
    """Erase emitted nodes, so that the graph is as it was before they were emitted."""
    for node in reversed(created):
        graph.erase_node(node)


def apply(graph: Graph, rewriting: Rewriting, removable: set[Node], superseded: set[Node]) -> None:
    """Replace uses, sort, and erase the nodes of ``removable`` (and the created nodes) that have no users left.

    Raises Declined, with the graph as it was before the emission, if the result would be cyclic, or if something still
    used one of the ``superseded`` nodes. That would mix two versions of a link, and the result would be the gradient
    for no k.
    """
    journal: list[tuple[Node, tuple[Any, ...], dict[str, Any]]] = []
    final = _final(rewriting.replacements)
    # User by user, not replacement by replacement: the output node uses thousands of them.
    for user in dict.fromkeys(user for old in final for user in old.users):
        journal.append((user, user.args, dict(user.kwargs)))
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: final.get(n, n))
    order = _topological_order(graph)
    refused = None
    if order is None:
        refused = Declined(Reason.RESULTS_COME_BACK)
    elif superseded & _alive(order):
        refused = Declined(Reason.VALUE_USED_ELSEWHERE)
    if order is None or refused is not None:
        for user, args, kwargs in reversed(journal):
            user.args, user.kwargs = args, kwargs
        discard(graph, rewriting.created)
        assert refused is not None
        raise refused
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    for node in order:
        if node is not output:
            output.prepend(node)
    created = set(rewriting.created)
    for node in reversed(order):
        if not node.users and (node in created or node in removable) and not node.is_impure():
            graph.erase_node(node)


def _final(replacements: dict[Node, Node]) -> dict[Node, Node]:
    """The final replacement of each node, where a replacement is itself replaced."""
    final = dict(replacements)
    for old in final:
        seen = {old}
        while final[old] in replacements and final[old] not in seen:
            seen.add(final[old])
            final[old] = replacements[final[old]]
    return final


def _alive(order: list[Node]) -> set[Node]:
    """Nodes that the output depends on."""
    alive = {node for node in order if node.op == "output"}
    for node in reversed(order):
        if node in alive:
            alive.update(node.all_input_nodes)
    return alive


def _topological_order(graph: Graph) -> list[Node] | None:
    """All nodes, each as early as its place in the graph and its operands allow. None if there is a cycle."""
    nodes = list(graph.nodes)
    position = {n: i for i, n in enumerate(nodes)}
    pending = [len(n.all_input_nodes) for n in nodes]
    ready = [i for i, count in enumerate(pending) if count == 0]
    heapq.heapify(ready)
    order: list[Node] = []
    while ready:
        node = nodes[heapq.heappop(ready)]
        order.append(node)
        for user in node.users:
            i = position[user]
            pending[i] -= 1
            if pending[i] == 0:
                heapq.heappush(ready, i)
    return order if len(order) == len(nodes) else None
