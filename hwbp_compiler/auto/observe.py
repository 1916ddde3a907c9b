"""``highway::observe``: make one gradient wait for other values, because the partitioner would otherwise drop them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from hwbp_compiler.graph.info import is_tangent

library = torch.library.Library("highway", "FRAGMENT")
library.define("observe(Tensor gradient, Tensor[] values) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
observe = torch.ops.highway.observe.default
# Normally ``halves`` and ``changes`` take this operator out of the backward graph. It runs only if something else
# executes the graph (compiled autograd).
library.impl("observe", lambda gradient, _: gradient.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("highway::observe", lambda gradient, _: torch.empty_like(gradient), lib=library)


def is_observed(node: Node) -> bool:
    return node.op == "call_function" and node.target is observe


def first_gradient(graph: Graph) -> int:
    """The position of the first gradient among the results of a joint graph; there is one per input."""
    inputs = [node for node in graph.find_nodes(op="placeholder") if not is_tangent(node)]
    return len(graph.output_node().args[0]) - len(inputs)  # type: ignore[arg-type]


def observe_with(graph: Graph, values: Sequence[Node]) -> None:
    """Make the first gradient of the joint ``graph`` wait for ``values``."""
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    place = next((i for i in range(first_gradient(graph), len(results)) if isinstance(results[i], Node)), None)
    if place is not None:
        gradient = results[place]
        with graph.inserting_before(output):
            results[place] = graph.call_function(observe, (gradient, list(values)))
        results[place].meta["val"] = gradient.meta["val"]
        output.args = (tuple(results),)


def copied(graph: Graph) -> Graph:
    """A copy that belongs to the same module."""
    made = Graph(graph.owning_module)
    made.output(made.graph_copy(graph, {})).meta.update(graph.output_node().meta)
    return made
