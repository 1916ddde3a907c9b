"""Remove operators that use only the form of a gradient (its shape, dtype and device), not its numbers.

Autograd's backward of an in-place change of a slice fills ``new_empty_strided(gradient)`` with a copy and writes zeros
into that. Other backward passes make zeros with the form of a gradient. Neither result depends on the gradient's
numbers.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.rules import SYMBOLIC, size_of
from hwbp_compiler.reasons import Declined

aten = torch.ops.aten

# What the new tensor is filled with: a number, the value of the named argument, or nothing.
_NEW: dict[object, Any] = {
    aten.zeros_like.default: 0,
    aten.new_zeros.default: 0,
    aten.ones_like.default: 1,
    aten.new_ones.default: 1,
    aten.full_like.default: "fill_value",
    aten.new_full.default: "fill_value",
    aten.empty_like.default: None,
    aten.new_empty.default: None,
    aten.new_empty_strided.default: None,
}

_SCATTERS = {
    aten.slice_scatter.default,
    aten.select_scatter.default,
    aten.diagonal_scatter.default,
    aten.as_strided_scatter.default,
}


def ask_no_gradient_for_its_form(graph: Graph, settled: Set[Node]) -> bool:
    """Make new tensors from their sizes, and replace ``copy(to, of)`` by a copy of ``of``. Returns whether there were
    any.

    A node stays as it is if its strides would change and may matter, and so does a ``settled`` node.
    """
    targets = (*_NEW, aten.copy.default)
    if not any(graph.find_nodes(op="call_function", target=target) for target in targets):
        return False
    gradients: set[Node] = set()
    sizes: dict[Any, Node] = {}
    changed = False
    for node in list(graph.nodes):
        if not is_tangent(node) and gradients.isdisjoint(node.all_input_nodes):
            if isinstance(node.meta.get("val"), SYMBOLIC):
                sizes.setdefault(size_of(node), node)
            continue
        made = _made(graph, node, sizes) if node.target in targets and node not in settled else None
        if made is None:
            gradients.add(node)
            continue
        changed = True
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        if not gradients.isdisjoint(made.all_input_nodes):
            gradients.add(made)
    return changed


def _made(graph: Graph, node: Node, sizes: dict[Any, Node]) -> Node | None:
    """The replacement of ``node``, or None."""
    value, last = node.meta["val"], node.prev
    emitter = Emitter(graph, node, value.fake_mode, 1, dict(sizes))
    try:
        made = (_copied if node.target is aten.copy.default else _new)(emitter, node)
    except Declined:  # a size that only the gradient has
        made = None
    if made is None or not (made.meta["val"].stride() == value.stride() or _is_written_only(node)):
        while node.prev is not last:
            graph.erase_node(node.prev)
        return None
    return made


def _is_written_only(node: Node) -> bool:
    """Whether the numbers are only written into other tensors, so that their memory layout does not matter."""
    return all(user.target in _SCATTERS and user.args[0] is not node for user in node.users)


def _new(emitter: Emitter, node: Node) -> Node:
    value, fill = node.meta["val"], _NEW[node.target]
    if fill == "fill_value":
        position = 2 if node.target is aten.new_full.default else 1
        fill = node.args[position] if len(node.args) > position else node.kwargs["fill_value"]
    sizes, strides = ([emitter.size(s) for s in numbers] for numbers in (value.shape, value.stride()))
    how = {"dtype": value.dtype, "layout": torch.strided, "device": value.device, "pin_memory": False}
    if fill is None:
        return emitter.call(aten.empty_strided.default, sizes, strides, **how)
    return emitter.call(aten.full.default, sizes, fill, **how)


def _copied(emitter: Emitter, node: Node) -> Node | None:
    value, of = node.meta["val"], node.args[1]
    if not isinstance(of, Node) or of.meta["val"].device != value.device:
        return None
    if of.meta["val"].dtype != value.dtype:
        of = emitter.call(torch.ops.prims.convert_element_type.default, of, value.dtype)
    if of.meta["val"].dim() < value.dim() or of.meta["val"].shape != value.shape:
        of = emitter.call(aten.expand.default, of, [emitter.size(s) for s in value.shape])
    layout = torch.contiguous_format if value.is_contiguous() else torch.preserve_format
    return emitter.call(aten.clone.default, of, memory_format=layout)
