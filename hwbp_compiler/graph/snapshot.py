"""A copy of a graph that can be restored."""

from __future__ import annotations

from torch.fx import Graph, Node, map_arg


class Snapshot:
    """A copy of ``graph``, taken at construction."""

    def __init__(self, graph: Graph) -> None:
        self._graph, self._copy = graph, Graph()
        self._copies: dict[Node, Node] = {}
        self._output = self._copy.graph_copy(graph, self._copies)

    def restore(self) -> dict[Node, Node]:
        """Replace the current content of ``graph`` by the copy. Return the new node for every node that was there."""
        graph = self._graph
        metadata = dict(next(n for n in reversed(graph.nodes) if n.op == "output").meta)
        for node in reversed(list(graph.nodes)):
            graph.erase_node(node)
        moved: dict[Node, Node] = {}
        graph.graph_copy(self._copy, moved)
        graph.output(map_arg(self._output, moved.__getitem__)).meta.update(metadata)
        return {old: moved[copy] for old, copy in self._copies.items()}
