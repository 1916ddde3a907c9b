"""What a node of a Dynamo graph stands for: a part of what another one computes.

``x[:, 3]``, ``x.select(1, 3)`` and the fourth of ``x.unbind(1)`` are the same part of x. Such nodes do no work of their
own: the same step may read its part before the loop or in it, or, where nothing takes it, not at all.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

# One part: ``int`` of a tuple, or the index of a tensor, whose slices are triples: a slice has no hash.
Slice = tuple[str, Any, Any, Any]
Part = int | tuple[Any, ...]


@dataclass(frozen=True)
class Value:
    """``parts[-1]`` of ... of ``parts[0]`` of what ``root`` computes."""

    root: Node
    parts: tuple[Part, ...] = ()

    def part(self, part: Part) -> Value:
        return Value(self.root, (*self.parts, part))


def value_of(node: Node) -> Value:
    """The value that ``node`` is a part of, as far down as that goes."""
    taken = _taken_from(node)
    if taken is None:
        return Value(node)
    parent, part = taken
    return value_of(parent).part(part)


def is_part(node: Node) -> bool:
    """Whether the node does nothing but take a part of another."""
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
    """A part of a tensor as Python writes an index."""
    return tuple(slice(*p[1:]) if isinstance(p, tuple) else p for p in part)


def _taken_from(node: Node) -> tuple[Node, Part] | None:
    if node.op == "call_function" and node.target is operator.getitem:
        parent, index = node.args
        if not isinstance(parent, Node):
            return None
        held = example(parent)
        if isinstance(held, (tuple, list)) and isinstance(index, int):
            return _of_a_split(parent, index) or (parent, index)
        return (parent, part) if isinstance(held, Tensor) and (part := part_of_index(index)) is not None else None
    called = _called(node)
    if called in ("select", "narrow"):
        given = _arguments(
            node, ("input", "dim", "index") if called == "select" else ("input", "dim", "start", "length")
        )
        if given is None or not all(isinstance(n, int) for n in given[1:]):
            return None
        parent, dim, start, *length = given
        held = example(parent)
        if isinstance(held, Tensor):
            return parent, _along(held, dim, start if called == "select" else ("slice", start, start + length[0], None))
    return None


def part_of_index(index: Any) -> tuple[Any, ...] | None:
    """The index as a part; None where it is more than a view by numbers."""
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
    """Name of a tensor's method or of torch's function of that name."""
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
    """Whether the node does nothing but take a tensor apart."""
    return _called(node) in _SPLITS


def _of_a_split(node: Node, index: int) -> tuple[Node, Part] | None:
    called = _called(node)
    if called not in _SPLITS or not isinstance(node.args[0], Node):
        return None
    parent, pieces = node.args[0], example(node)
    dims = node.args[1:2] if called == "unbind" else node.args[2:3]
    dim = node.kwargs.get("dim", dims[0] if dims else 0)
    held = example(parent)
    if not isinstance(held, Tensor) or not isinstance(dim, int):
        return None
    if called == "unbind":
        return parent, _along(held, dim, index % len(pieces))
    sizes = [piece.shape[dim] for piece in pieces]
    if not all(isinstance(size, int) for size in sizes):
        return None
    ends = list(accumulate(sizes))
    index %= len(pieces)
    return parent, _along(held, dim, ("slice", ends[index] - sizes[index], ends[index], None))


# -- what changes tensors in place --------------------------------------------------------------------------------


def changed_by(node: Node) -> Iterator[Node]:
    """The operands that the node changes in place."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    if in_place or node.target in _CHANGES_FIRST or node.kwargs.get("inplace") is True:
        yield from (argument for argument in node.args[:1] if isinstance(argument, Node))
    if node.op == "call_function" and "batch_norm" in name or "instance_norm" in name:
        yield from (argument for argument in node.args[1:3] if isinstance(argument, Node))
    yield from nodes_in(node.kwargs.get("out"))


_CHANGES_FIRST = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift,
    operator.irshift,
}  # fmt: skip


def memory_of(node: Node) -> set[int]:
    """Which memory a node's tensors lie in: Dynamo's examples share it where the tensors would."""
    held = example(node)
    tensors = held if isinstance(held, (tuple, list)) else [held]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor) and t.layout is torch.strided}
