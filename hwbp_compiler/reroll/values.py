"""A node of a Dynamo graph as a part of another node's result.

``x[:, 3]``, ``x.select(1, 3)`` and the fourth of ``x.unbind(1)`` are the same part of x. Such nodes compute nothing. A
step may read its part before the loop or inside it, or not at all if nothing uses it.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hwbp_compiler.torch_private import set_grad_enabled

# One part: an ``int`` for a tuple, or an index for a tensor. Slices in an index are triples, because a slice has no
# hash.
Slice = tuple[str, Any, Any, Any]
Part = int | tuple[Any, ...]


@dataclass(frozen=True)
class Value:
    """``parts[-1]`` of ... of ``parts[0]`` of the result of ``root``."""

    root: Node
    parts: tuple[Part, ...] = ()

    def part(self, part: Part) -> Value:
        return Value(self.root, (*self.parts, part))


# A longer chain of parts (x, x[1:], x[1:][1:], ...) is not followed.
_DEEPEST = 32


def value_of(node: Node) -> Value:
    """The value of which ``node`` is a part, followed down as far as possible."""
    parts: list[Part] = []
    while len(parts) < _DEEPEST and (taken := _taken_from(node)) is not None:
        node, part = taken
        parts.append(part)
    return Value(node, tuple(reversed(parts)))


def is_part(node: Node) -> bool:
    """Whether the node only takes a part of another."""
    return _taken_from(node) is not None


def example(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def example_of(value: Value) -> Any:
    held = example(value.root)
    for part in value.parts:
        held = held[part] if isinstance(part, int) else held[index_of(part)]
    return held


def operands(node: Node) -> list[Node]:
    """The nodes among its arguments, one by one, each as often as it occurs."""
    return nodes_in((node.args, node.kwargs))


def nodes_in(argument: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(argument, lambda n: found.append(n))
    return found


def index_of(part: tuple[Any, ...]) -> tuple[Any, ...]:
    """A part of a tensor in the form of a Python index."""
    return tuple(slice(*p[1:]) if isinstance(p, tuple) else p for p in part)


_CUT = "highway_read_without_gradient"


def mark_cuts(graph: Graph) -> None:
    """Mark parts that are read while no gradients are recorded and used while they are. They are not treated as parts
    of their source, because reading them again would give them a gradient. (Dynamo's examples are not always right
    about that.)
    """
    records, recording = {}, torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is set_grad_enabled:
            recording = bool(node.args[0])
        records[node] = recording or node.op == "output"
    if all(records.values()) or not any(on for node, on in records.items() if node.op != "output"):
        return
    escapes: set[Node] = set()
    for node in reversed(graph.nodes):
        if records[node] or (_read(node) is None and not only_splits(node)):
            continue
        if any(records[user] or user in escapes for user in node.users):
            escapes.add(node)
            node.meta[_CUT] = True


def _taken_from(node: Node) -> tuple[Node, Part] | None:
    return None if node.meta.get(_CUT) else _read(node)


def _read(node: Node) -> tuple[Node, Part] | None:
    if node.op == "call_function" and node.target is operator.getitem:
        parent, index = node.args
        if not isinstance(parent, Node):
            return None
        held = example(parent)
        if isinstance(held, (tuple, list)) and type(index) is int:
            return _of_a_split(parent, index) or (parent, index)
        return (parent, part) if isinstance(held, Tensor) and (part := part_of_index(index)) is not None else None
    called = _called(node)
    if called in ("select", "narrow"):
        given = _arguments(
            node, ("input", "dim", "index") if called == "select" else ("input", "dim", "start", "length")
        )
        if given is None or not all(type(n) is int for n in given[1:]):
            return None
        parent, dim, start, *length = given
        held = example(parent)
        if not isinstance(held, Tensor) or not isinstance(parent, Node):
            return None
        if called == "select":
            return parent, _along(held, dim, start)
        if start < 0 and not isinstance(held.shape[dim], int):
            return None
        start += held.shape[dim] if start < 0 else 0
        return parent, _along(held, dim, ("slice", start, start + length[0], None))
    return None


def part_of_index(index: Any) -> tuple[Any, ...] | None:
    """The index as a part; None if it is more than a view by numbers."""
    found: list[Any] = []
    for item in index if isinstance(index, tuple) else (index,):
        if isinstance(item, slice):
            ends = (item.start, item.stop, item.step)
            if not all(end is None or type(end) is int for end in ends):
                return None
            found.append(("slice", *ends))
        elif item is None or item is Ellipsis or type(item) is int:
            found.append(item)
        else:
            return None
    return tuple(found)


def _along(held: Tensor, dim: int, item: Any) -> tuple[Any, ...]:
    return (*[("slice", None, None, None)] * (dim % held.dim()), item)


def _called(node: Node) -> str | None:
    """The name of a tensor's method, or of the torch function of that name."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function" and getattr(torch, getattr(node.target, "__name__", ""), None) is node.target:
        return str(node.target.__name__)  # type: ignore[union-attr]
    return None


def _arguments(node: Node, names: tuple[str, ...]) -> list[Any] | None:
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return [given[name] for name in names] if given.keys() == set(names) else None


_SPLITS = {"unbind", "split", "chunk", "tensor_split"}


def only_splits(node: Node) -> bool:
    """Whether the node only splits a tensor, so that its results are parts of the tensor."""
    return _called(node) in _SPLITS and isinstance(example(node), (tuple, list)) and _of_a_split(node, 0) is not None


def _of_a_split(node: Node, index: int) -> tuple[Node, Part] | None:
    called = _called(node)
    if called not in _SPLITS or node.meta.get(_CUT) or not node.args or not isinstance(node.args[0], Node):
        return None
    parent, pieces = node.args[0], example(node)
    dims = node.args[1:2] if called == "unbind" else node.args[2:3]
    dim = node.kwargs.get("dim", dims[0] if dims else 0)
    held = example(parent)
    if not isinstance(held, Tensor) or type(dim) is not int or not pieces:
        return None
    if called == "unbind":
        return parent, _along(held, dim, index % len(pieces))
    sizes = [piece.shape[dim] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes) or sum(sizes) != held.shape[dim]:
        return None
    ends = list(accumulate(sizes))
    index %= len(pieces)
    return parent, _along(held, dim, ("slice", ends[index] - sizes[index], ends[index], None))


# -- what changes tensors in place --------------------------------------------------------------------------------


def changed_by(node: Node) -> Iterator[Node]:
    """The operands that the node changes in place."""
    if node.op not in ("call_function", "call_method"):
        return
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        if any(map(_changes_arguments, _bodies(node))):
            yield from operands(node)
        return
    yield from nodes_in(node.kwargs.get("out"))
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        for argument, value in zip(schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from nodes_in(value)
        return
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    if in_place or node.target in _CHANGES_FIRST or _is_told_to(node):
        yield from nodes_in(node.args[:1] or [node.kwargs.get(key) for key in ("input", "self")])
    if "batch_norm" in name or "instance_norm" in name:
        yield from nodes_in(node.args[1:3])


def _bodies(node: Node) -> Iterator[Any]:
    owner = node.graph.owning_module
    for argument in operands(node):
        body = getattr(owner, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield body


def _changes_arguments(body: GraphModule) -> bool:
    given: set[int] = set().union(*(memory_of(node) for node in body.graph.find_nodes(op="placeholder")))
    return any(memory_of(changed) & given for node in body.graph.nodes for changed in changed_by(node))


def _is_told_to(node: Node) -> bool:
    """Whether ``inplace`` is true among its arguments, by name or by position."""
    if node.kwargs.get("inplace") is True:
        return True
    if getattr(node.target, "__module__", None) != torch.nn.functional.__name__ or True not in node.args:
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return True
    return bound.arguments.get("inplace") is True


# In-place changes to a view's shape or to its gradient. No memory changes.
RESHAPE = {"squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "as_strided_", "set_", "detach_"}


_CHANGES_FIRST = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift,
    operator.irshift,
}  # fmt: skip


def memory_of(node: Node) -> set[int]:
    """The memory that holds a node's tensors. Dynamo's examples share memory wherever the tensors would."""
    held = example(node)
    tensors = held if isinstance(held, (tuple, list)) else [held]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor) and t.layout is torch.strided}
