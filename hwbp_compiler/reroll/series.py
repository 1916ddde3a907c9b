"""What steps take and return, as one tensor ``[T, ...]`` each, written into a Dynamo graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .rows import Rows
from .values import Part, Value, example, example_of, index_of


class Writer:
    """Adds nodes to a Dynamo graph at its insertion point, each with its example value."""

    def __init__(self, graph: Graph, fake_mode: Any, like: Node) -> None:
        self.graph, self.fake_mode, self.like = graph, fake_mode, like
        self.made: list[Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Call a function, or a tensor's method by its name."""
        known, named = map_arg((args, kwargs), example)
        with self.fake_mode, torch.no_grad():
            found = (
                getattr(known[0], target)(*known[1:], **named) if isinstance(target, str) else target(*known, **named)
            )
        node = self._node(target, args, kwargs)
        node.meta["example_value"] = found
        return node

    def _node(self, target: Any, args: Any, kwargs: Any) -> Node:
        kind = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        node = kind(target, args, kwargs)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.like.meta:
                node.meta[key] = self.like.meta[key]
        self.made.append(node)
        return node

    def change(self, target: Any, *args: Any) -> Node:
        """Call a function that changes its first argument in place."""
        return self._node(target, args, {})

    def part(self, node: Node, part: Part) -> Node:
        return self.call(operator.getitem, node, part if isinstance(part, int) else index_of(part))

    def value(self, value: Value) -> Node:
        node = value.root
        for part in value.parts:
            node = self.part(node, part)
        return node


# -- rows that steps take ----------------------------------------------------------------------------------------------


def stacked(values: Sequence[Value], write: Writer) -> tuple[Node, tuple[Part, ...]]:
    """A tensor whose row t is ``values[t]``, or contains it. The second result is the part of the row to take."""
    rest = _common_end(values)
    found = _as_rows([Value(v.root, v.parts[: len(v.parts) - len(rest)]) for v in values], write)
    if found is not None:
        return found, rest
    # The first values may come from before the loop, or from its first step.
    for before in (1, 2):
        if len(values) > before + 1 and (behind := _as_rows(values[before:], write)) is not None:
            first = [write.call("unsqueeze", write.value(value), 0) for value in values[:before]]
            return write.call(torch.cat, [*first, behind], 0), ()
    return write.call(torch.stack, [write.value(value) for value in values], 0), ()


def _common_end(values: Sequence[Value]) -> tuple[Part, ...]:
    """The last parts, after the one in which the values differ; all values share them."""
    first = values[0].parts
    if any(v.root is not values[0].root or len(v.parts) != len(first) for v in values):
        return ()
    varying = [i for i in range(len(first)) if any(v.parts[i] != first[i] for v in values)]
    return first[varying[0] + 1 :] if len(varying) == 1 else ()


def _as_rows(values: Sequence[Value], write: Writer) -> Node | None:
    """A view of the tensor of which the values are rows. None if they are not evenly spaced rows of one tensor."""
    first = values[0]
    if not first.parts or any(v.root is not first.root or v.parts[:-1] != first.parts[:-1] for v in values):
        return None
    whole = Value(first.root, first.parts[:-1])
    held = example_of(whole)
    indices = [v.parts[-1] for v in values]
    if not isinstance(held, Tensor) or any(isinstance(index, int) for index in indices):
        return None
    rows = Rows.of(indices, held.shape)  # type: ignore[arg-type]
    if rows is None:
        return None
    node = write.part(write.value(whole), rows.index)
    if rows.width is not None:
        node = write.call("unfold", node, rows.dim, rows.width, abs(rows.stride))
        node = write.call(torch.movedim, node, (rows.dim, -1), (0, rows.dim + 1))
    elif rows.dim:
        node = write.call(torch.movedim, node, rows.dim, 0)
    return write.call(torch.flip, node, [0]) if rows.stride < 0 else node


# -- rows that steps return --------------------------------------------------------------------------------------------


def joined(consumer: Node, order: dict[Node, int], series: Node, count: int, write: Writer) -> Node | None:
    """Replace ``torch.stack`` or ``torch.cat`` of all rows of a series, in order or in reverse, possibly among other
    tensors. The result uses the series as a whole. None if the consumer is anything else. ``order`` maps nodes to their
    row t.
    """
    if consumer.target not in _JOINS or not consumer.args or not isinstance(consumer.args[0], (list, tuple)):
        return None
    tensors, stacks = list(consumer.args[0]), consumer.target is torch.stack
    dims = [*consumer.args[1:2], *(consumer.kwargs[k] for k in ("dim", "axis") if k in consumer.kwargs)]
    dim = dims[0] if dims else 0
    if len(consumer.args) > 2 or consumer.kwargs.keys() - {"dim", "axis"} or type(dim) is not int:
        return None
    rows = [order.get(tensor, -1) for tensor in tensors]
    start = next((i for i, row in enumerate(rows) if row >= 0), None)
    if start is None or sum(row >= 0 for row in rows) != count:
        return None
    here = rows[start : start + count]
    if here not in (list(range(count)), list(range(count - 1, -1, -1))):
        return None
    if here[0] > here[-1]:
        series = write.call(torch.flip, series, [0])
    rank = example(series).dim() - 1
    dim %= rank + 1 if stacks else rank
    node = write.call(torch.movedim, series, 0, dim) if dim else series
    if not stacks:
        node = write.call(torch.flatten, node, dim, dim + 1)
    others = [tensors[:start], tensors[start + count :]]
    if stacks:
        others = [[write.call(torch.stack, tensors, dim)] if tensors else [] for tensors in others]
    if any(others):
        return write.call(torch.cat, [*others[0], node, *others[1]], dim)
    # A joined tensor has its own memory, with one row after the other.
    return write.call(torch.clone, node, memory_format=torch.contiguous_format)


_JOINS = {torch.stack, torch.cat, torch.concat, torch.concatenate}


def may_be_written(rows: Rows | None, target: Any, row: Any) -> bool:
    """Whether rows of that shape can be written into the target at once."""
    if rows is None or rows.width not in (None, abs(rows.stride)) or None in rows.index:
        return False
    kept = sum(type(item) is not int for item in rows.index) - (rows.width is None)
    if rows.width is None:
        return row.dim() <= kept
    return row.dim() == kept and row.shape[rows.dim] == rows.width


def write_rows(rows: Rows, target: Node, series: Node, write: Writer) -> None:
    """Write row t of ``series`` into the target's row t, as ``target[:, t] = ...`` does."""
    kept = sum(type(item) is not int for item in rows.index) - (rows.width is None)
    for _ in range(kept - (example(series).dim() - 1)):  # a smaller row is broadcast
        series = write.call("unsqueeze", series, 1)
    if rows.stride < 0:
        series = write.call(torch.flip, series, [0])
    if rows.dim:
        series = write.call(torch.movedim, series, 0, rows.dim)
    if rows.width is not None:
        series = write.call(torch.flatten, series, rows.dim, rows.dim + 1)
    write.change(operator.setitem, target, index_of(rows.index), series)
