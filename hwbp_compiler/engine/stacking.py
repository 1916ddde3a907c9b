"""Stack the values that links take from outside: one node for all links, made as cheaply as the graph allows.

Note [Hoisting the stack]
~~~~~~~~~~~~~~~~~~~~~~~~~
A tuple of nodes, one per link, does not always need a copy of each:

- if all are the same node (an RNN's weights) or size, it is shared and needs no stack;
- ``x[0], x[1], ...`` of one tensor is a slice of that tensor;
- the same cheap function of other nodes (a transpose, a cast, ``1 - z``) is that function of their stack, unless this
  stacks more bytes than it saves. The gates of a recurrent cell are stacked once, and everything elementwise is
  recomputed from them in one fused loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

import hwbp_compiler.stack  # noqa: F401  (defines torch.ops.highway.stack)
from hwbp_compiler.graph.match import same_value
from hwbp_compiler.graph.old_values import must_be_kept
from hwbp_compiler.graph.program import _constant
from hwbp_compiler.graph.rules import form_of
from hwbp_compiler.graph.sizes import bytes_of

from .emitter import Emitter, Value

aten = torch.ops.aten
prims = torch.ops.prims

_VIEWS = {
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
    aten.expand.default,
    prims.convert_element_type.default,
}
_CHEAP = _VIEWS | {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.neg.default,
    aten.le.Scalar,
    aten.gt.Scalar,
    aten.ge.Scalar,
    aten.lt.Scalar,
    aten.logical_not.default,
    aten.reciprocal.default,
    aten.relu.default,
}


class StackPlan:
    """Decides how each tuple is stacked, but creates nothing.

    ``announced`` are all tuples that will be requested. Computing one of them from another copies nothing.
    """

    def __init__(self, announced: Sequence[tuple[Node, ...]] = ()) -> None:
        self._announced = dict.fromkeys(announced)
        self._costs: dict[tuple[Node, ...], int] = {}

    def copies(self) -> list[tuple[Node, ...]]:
        """The tuples that are copied when everything announced is made."""
        found: list[tuple[Node, ...]] = []
        seen: set[tuple[Node, ...]] = set()
        todo = list(self._announced)
        while todo:
            nodes = todo.pop()
            if nodes in seen:
                continue
            seen.add(nodes)
            if is_shared(nodes) or rows_of_one(nodes) is not None:
                continue
            columns = self.operands(nodes)
            if columns is None:
                found.append(nodes)
            else:
                todo += [column for _, column in columns]
        return found

    def operands(self, nodes: tuple[Node, ...]) -> list[tuple[int, tuple[Node, ...]]] | None:
        """The operands from which to compute ``nodes``, if stacking them copies no more than stacking the results."""
        columns = _columns(nodes)
        return None if columns is None or self._cost_of_operands(columns) > bytes_of(nodes[0].meta["val"]) else columns

    def _cost_of_operands(self, columns: list[tuple[int, tuple[Node, ...]]]) -> int:
        return sum(self._cost(c) for c in dict.fromkeys(column for _, column in columns))

    def _cost(self, nodes: tuple[Node, ...]) -> int:
        """Bytes per link that must be copied for ``nodes`` beyond what is requested anyway."""
        if nodes in self._announced or is_shared(nodes):
            return 0
        if nodes not in self._costs:
            copied = bytes_of(nodes[0].meta["val"])
            self._costs[nodes] = copied  # a bound while we look deeper, and the value if it is not cheap
            columns = _columns(nodes)
            if columns is not None:
                self._costs[nodes] = min(copied, self._cost_of_operands(columns))
        return self._costs[nodes]


class Stacker:
    """Stacked values of tuples of nodes, each made once, as ``plan`` decides."""

    def __init__(self, emitter: Emitter, plan: StackPlan | None = None) -> None:
        self.e = emitter
        self.plan = plan or StackPlan()
        self._made: dict[tuple[Node, ...], Value] = {}
        self.copied_bytes = 0

    def __call__(self, nodes: Sequence[Node]) -> Value:
        key = tuple(nodes)
        if key not in self._made:
            self._made[key] = self._make(key)
        return self._made[key]

    def _make(self, nodes: tuple[Node, ...]) -> Value:
        if is_shared(nodes):
            return Value(nodes[0], False)
        rows = rows_of_one(nodes)
        if rows is not None:
            return self._sliced(*rows)
        columns = self.plan.operands(nodes)
        return self._recomputed(nodes, columns) if columns is not None else self._copied(nodes)

    def _sliced(self, base: Node, dim: int, rows: range) -> Value:
        """``base[rows]`` along ``dim``, with that dimension first."""
        node = base
        low, high, step = min(rows), max(rows) + 1, abs(rows.step)
        if (low, high, step) != (0, base.meta["val"].shape[dim], 1):
            node = self.e.call(aten.slice.Tensor, node, dim, low, high, step)
        rank = node.meta["val"].dim()
        if dim % rank != 0:
            node = self.e.permute(node, [dim % rank, *(d for d in range(rank) if d != dim % rank)])
        if rows.step < 0:
            node = self.e.call(aten.flip.default, node, [0])
        return Value(node, True)

    def _recomputed(self, nodes: tuple[Node, ...], columns: list[tuple[int, tuple[Node, ...]]]) -> Value:
        first = nodes[0]
        stacked = {position: self(column) for position, column in columns}
        args = tuple(stacked.get(i, list(a) if isinstance(a, (list, tuple)) else a) for i, a in enumerate(first.args))
        result = self.e.apply(first.target, args, dict(first.kwargs))
        assert isinstance(result, Value)
        return result

    def _copied(self, nodes: tuple[Node, ...]) -> Value:
        if any(form_of(n) != form_of(nodes[0]) for n in nodes):
            raise AssertionError("only equal shapes are stacked")
        self.copied_bytes += len(nodes) * bytes_of(nodes[0].meta["val"])
        return Value(stack(self.e, nodes), True)


def _columns(nodes: tuple[Node, ...]) -> list[tuple[int, tuple[Node, ...]]] | None:
    """The operands, by argument position, if ``nodes`` are one cheap function of them; otherwise None."""
    first = nodes[0]
    if first.op != "call_function" or first.target not in _CHEAP:
        return None
    if any(
        n.target is not first.target
        or must_be_kept(n)
        or len(n.args) != len(first.args)
        or n.kwargs.keys() != first.kwargs.keys()
        or any(_constant(n.kwargs[k]) != _constant(first.kwargs[k]) for k in first.kwargs)
        or form_of(n) != form_of(first)
        for n in nodes
    ):
        return None
    columns: list[tuple[int, tuple[Node, ...]]] = []
    for position, argument in enumerate(first.args):
        members = tuple(n.args[position] for n in nodes)
        if isinstance(argument, Node):
            if not all(isinstance(m, Node) and form_of(m) == form_of(argument) for m in members):
                return None
            columns.append((position, members))
        elif not all(same_value(m, argument) for m in members):
            return None
    return columns or None


def stack(e: Emitter, nodes: Sequence[Node]) -> Node:
    """[links, ...] from one node per link."""
    return e.call(torch.ops.highway.stack.default, list(nodes))


def is_shared(nodes: tuple[Node, ...]) -> bool:
    """Whether all links share it: one node, or the same function of the same nodes (every layer may compute its own
    mask).
    """
    return all(same_value(n, nodes[0]) for n in nodes[1:])


def rows_of_one(nodes: tuple[Node, ...]) -> tuple[Node, int, range] | None:
    """``base[i0], base[i0 + 1], ...`` along one dimension, also in descending order: base, dimension, rows."""
    first = nodes[0]
    if len(nodes) < 2 or any(n.target is not aten.select.int or n.args[:2] != first.args[:2] for n in nodes):
        return None
    if must_be_kept(first):
        return None
    base, dim = first.args[0], first.args[1]
    assert isinstance(base, Node) and isinstance(dim, int)
    size = base.meta["val"].shape[dim]
    if not isinstance(size, int):
        return None
    rows = [n.args[2] % size for n in nodes]
    step = rows[1] - rows[0]
    if step == 0 or any(b - a != step for a, b in zip(rows, rows[1:], strict=False)):
        return None
    return base, dim, range(rows[0], rows[-1] + (1 if step > 0 else -1), step)
