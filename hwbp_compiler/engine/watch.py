"""How much the last iteration changed w. ``auto`` watches it between two checks of the gradient.

The solver marks w^k (with segments: e^k) together with what it was one iteration before. :func:`last_change` replaces
all marks of a joint graph by two sums over the marked rows: |w^k - w^{k-1}|^2 and |w^k|^2.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from .emitter import Emitter

aten, prims = torch.ops.aten, torch.ops.prims

library = torch.library.Library("highway", "FRAGMENT")
library.define("mark(Tensor rows, Tensor before) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
mark = torch.ops.highway.mark.default
# Marks are replaced before anything is compiled. This runs only if a graph is executed as it was traced.
library.impl("mark", lambda rows, before: rows.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("highway::mark", lambda rows, before: torch.empty_like(rows), lib=library)


def last_change(graph: Graph) -> tuple[Node, Node] | None:
    """Replace all marks in ``graph`` by what they mark. Returns two numbers, float32: |w^k - w^{k-1}|^2 and |w^k|^2,
    each summed over all marked rows. None if nothing is marked. Rows that lie on another device than the first ones are
    not counted.
    """
    total: tuple[Node, Node] | None = None
    for node in graph.find_nodes(op="call_function", target=mark):
        rows, before = node.args
        value = rows.meta["val"]
        e = Emitter(graph, node, value.fake_mode, count=0, sizes={})
        if total is None or total[0].meta["val"].device == value.device:
            both = _squared(e, e.call(aten.sub.Tensor, rows, before)), _squared(e, rows)
            total = both if total is None else (_added(e, total[0], both[0]), _added(e, total[1], both[1]))
        node.replace_all_uses_with(rows)
        graph.erase_node(node)
    return total


def _squared(e: Emitter, value: Node) -> Node:
    if value.meta["val"].is_complex():
        value = e.call(aten.abs.default, value)
    value = e.call(prims.convert_element_type.default, value, torch.float32)
    return e.call(aten.sum.default, e.call(aten.mul.Tensor, value, value))


def _added(e: Emitter, a: Node, b: Node) -> Node:
    return e.call(aten.add.Tensor, a, b)
