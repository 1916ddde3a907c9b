"""The joint graph as a linear system: which nodes carry gradients, and how they reach one another."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Graph, Node

from .rules import Kind, is_elementwise_edge, rule_of


class GraphInfo:
    """Index of a joint graph, built each time the graph is examined and never updated.

    nodes       all nodes in graph order; a node is mostly handled as its index in here
    index       node -> index
    carries     whether the node depends on a tangent
    users       indices of the gradient-carrying users of a gradient-carrying node, ascending
    sources     indices of its gradient-carrying operands

    ``settled`` nodes were emitted by an earlier rewriting: no highway is looked for in them. ``tangents`` are the
    placeholders whose linear functions are examined; by default those that AOTAutograd names tangents.
    """

    def __init__(self, graph: Graph, settled: Set[Node] = frozenset(), tangents: Set[Node] | None = None) -> None:
        self.graph = graph
        self.settled = settled
        self.nodes: list[Node] = list(graph.nodes)
        self.index: dict[Node, int] = {node: i for i, node in enumerate(self.nodes)}
        count = len(self.nodes)
        self.carries = [False] * count
        self.users: list[list[int]] = [[] for _ in range(count)]
        self.sources: list[list[int]] = [[] for _ in range(count)]
        for i, node in enumerate(self.nodes):
            if node.op == "placeholder":
                self.carries[i] = is_tangent(node) if tangents is None else node in tangents
            elif node.op not in ("output", "get_attr"):
                sources = sorted({self.index[n] for n in node.all_input_nodes if self.carries[self.index[n]]})
                if sources:
                    self.carries[i] = True
                    self.sources[i] = sources
                    for source in sources:
                        self.users[source].append(i)
        self._kinds: dict[int, Kind | None] = {}
        self._elementwise: dict[tuple[int, int], bool] = {}

    @property
    def has_tangents(self) -> bool:
        return any(self.carries)

    def kind(self, i: int) -> Kind | None:
        if i not in self._kinds:
            rule = rule_of(self.nodes[i])
            self._kinds[i] = None if rule is None else rule.kind
        return self._kinds[i]

    def elementwise(self, source: int, i: int) -> bool:
        key = (source, i)
        if key not in self._elementwise:
            self._elementwise[key] = self.nodes[i] not in self.settled and is_elementwise_edge(
                self.nodes[source], self.nodes[i]
            )
        return self._elementwise[key]

    def descendants(self, starts: set[int], last: int | None = None) -> set[int]:
        """Everything that a gradient at ``starts`` reaches, including the starts, up to graph position ``last``."""
        reached = set(starts)
        todo = list(starts)
        while todo:
            for user in self.users[todo.pop()]:
                if user not in reached and (last is None or user <= last):
                    reached.add(user)
                    todo.append(user)
        return reached

    def between(self, starts: set[int], ends: set[int]) -> set[int]:
        """Nodes on the gradient paths from ``starts`` to ``ends``, both included."""
        forward = self.descendants(starts, max(ends))
        kept = set(ends) & forward
        todo = list(kept - starts)
        while todo:
            for source in self.sources[todo.pop()]:
                if source in forward and source not in kept:
                    kept.add(source)
                    if source not in starts:
                        todo.append(source)
        return kept

    def is_sum(self, i: int) -> bool:
        """Whether the operator joins gradients: both operands are added, elementwise."""
        return self.nodes[i].target in SUMS


def is_tangent(node: Node) -> bool:
    return node.op == "placeholder" and "tangents" in str(node.target)


def _sums():
    import torch

    return {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor, torch.ops.prims.fma.default}


SUMS = _sums()
