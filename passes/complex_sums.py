"""Restore sums of complex gradients.

Inductor's decomposition adds complex tensors as pairs of real ones: view as real, add, view as complex. An element of a
pair is not a complex number, so neither the sum nor an elementwise path through it would be found.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import ADD

aten = torch.ops.aten


def add_complex_numbers(graph: Graph, settled: Set[Node]) -> bool:
    """Replace every such sum that is not ``settled`` by one addition. Returns whether there was any."""
    found = False
    gradients: set[Node] | None = None
    for node in graph.find_nodes(op="call_function", target=aten.view.dtype):
        terms = None if node in settled else _terms(node)
        if terms is None:
            continue
        if gradients is None:
            info = GraphInfo(graph)
            gradients = {n for n, carries in zip(info.nodes, info.carries, strict=True) if carries}
        if node not in gradients:
            continue
        made = Emitter(graph, node, node.meta["val"].fake_mode, 1, {}).call(ADD, *terms)
        gradients.add(made)
        node.replace_all_uses_with(made)
        _erase_unused(graph, node)
        found = True
    return found


def _terms(node: Node) -> tuple[Node, Node] | None:
    """The two complex numbers whose sum ``node`` is."""
    total = _seen_through_views(node.args[0])
    if not node.meta["val"].is_complex() or total is None or total.target is not ADD or total.kwargs:
        return None
    first, second = (_complex_behind(a) for a in total.args)
    if first is None or second is None:
        return None
    value = node.meta["val"]
    same = all(n.meta["val"].dtype == value.dtype and n.meta["val"].shape == value.shape for n in (first, second))
    return (first, second) if same else None


def _complex_behind(real: object) -> Node | None:
    """The complex tensor that ``real`` is a view of."""
    seen = _seen_through_views(real)
    if seen is None or seen.target is not aten.view.dtype or not isinstance(seen.args[0], Node):
        return None
    source = seen.args[0]
    if source.target is ADD and source.args[1] == 0 and not source.kwargs:  # it resolves conjugates
        source = source.args[0]
    return source if source.meta["val"].is_complex() else None


def _seen_through_views(node: object) -> Node | None:
    while isinstance(node, Node) and node.target in (aten.view.default, aten._unsafe_view.default):
        node = node.args[0]
    return node if isinstance(node, Node) else None


def _erase_unused(graph: Graph, node: Node) -> None:
    """Erase ``node`` and everything that only it used."""
    todo = [node]
    while todo:
        unused = todo.pop()
        if not unused.users and unused.op == "call_function" and not unused.is_impure():
            todo += unused.all_input_nodes
            graph.erase_node(unused)
