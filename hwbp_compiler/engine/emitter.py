"""Writes operators into a graph, for all links of a group at once.

A ``Value`` is a graph node. It either has a leading dimension of ``count`` links (``batched``) or is the same for all
of them (shared). A size is a number or a bare node, and is the same for all links. A rule (``batching``) turns
"operator on one link" into "operator on the stack". Without a rule, ``torch.vmap`` of the operator is traced and
inlined.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

import hwbp_compiler.torch_private  # noqa: F401  (registers prims.fma)
from hwbp_compiler.engine.inline import inline
from hwbp_compiler.graph.rules import SYMBOLIC, shape_of, size_of
from hwbp_compiler.reasons import Declined, Reason

aten = torch.ops.aten
prims = torch.ops.prims


Args = tuple[Any, ...]
Keywords = dict[str, Any]
Result = Union["Value", list["Value"]]
Rule = Callable[["Emitter", Any, Args, Keywords], Result]
"""``(emitter, operator, args, kwargs)``."""


@functools.cache
def decompositions() -> dict[Any, Any]:
    from hwbp_compiler.torch_private import select_decomp_table

    return dict(select_decomp_table())


# For these, Inductor's decomposition handles only special cases (empty operands, batch 1, complex numbers, no dtype)
# and otherwise keeps the operator.
_KEPT = {
    aten.cat.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.convolution_backward.default,
    aten.add.Tensor,
    aten.full.default,
}


# These copy their first argument and write into the copy. If that argument is shared by all links, vmap expands it, and
# Inductor (seen in torch 2.13) copies an expanded constant with its strides, so all links would write into the same
# memory.
_WRITES = {
    aten.index_put.default,
    aten._unsafe_index_put.default,
    aten._unsafe_masked_index_put_accumulate.default,
    aten.index_add.default,
    aten.index_copy.default,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
    aten.put.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
}


RULES: dict[object, Rule] = {}
"""By operator, or by ``torch.Tag.pointwise`` for all pointwise ones; ``batching`` fills it."""

RULES_BY_NAME: dict[str, Rule] = {}
"""The same for operators of libraries that may not be loaded: ``"library::operator"``."""

TAKE_KEYWORDS: set[object] = set()
"""Operators whose rules can handle keyword arguments that differ from link to link."""


@dataclass(frozen=True)
class Value:
    node: Node
    batched: bool

    @property
    def tensor(self) -> torch.Tensor:
        found: torch.Tensor = self.node.meta["val"]
        return found

    @property
    def shape(self) -> tuple[Any, ...]:
        """Shape of one link's tensor; () for a number."""
        if not isinstance(self.tensor, torch.Tensor):
            return ()
        shape = tuple(self.tensor.shape)
        return shape[1:] if self.batched else shape

    @property
    def rank(self) -> int:
        return len(self.shape)


class Emitter:
    """Appends nodes to ``graph`` before ``before``, each with its fake value in ``meta["val"]``."""

    def __init__(
        self, graph: Graph, before: Node, fake_mode: Any, count: int, sizes: dict[Any, Node] | None = None
    ) -> None:
        self.graph = graph
        self.before = before
        self.fake_mode = fake_mode
        self.count = count
        self.sizes = sizes_at_hand(graph.nodes) if sizes is None else sizes
        self.created: list[Node] = []
        self.puts: dict[Node, Put] = {}

    def for_count(self, count: int) -> Emitter:
        other = Emitter(self.graph, self.before, self.fake_mode, count, self.sizes)
        other.created, other.puts = self.created, self.puts
        return other

    # -- plain nodes --------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Emit one operator. It is decomposed here if Inductor decomposes it, because at this stage Inductor no longer
        does.
        """
        if target in decompositions() and target not in _KEPT:
            return self._decomposed(target, args, kwargs)
        return self._append(target, args, kwargs)

    def _append(self, target: Any, args: Args, kwargs: Keywords) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.created.append(node)
        node.meta["val"] = self._fake(target, args, kwargs)
        return node

    def _decomposed(self, target: Any, args: Args, kwargs: Keywords) -> Node:
        inputs: list[Node] = []
        torch.fx.map_arg((args, kwargs), inputs.append)

        def operator_alone(*tensors: Any) -> Any:
            replaced = iter(tensors)
            replacing = torch.fx.map_arg((args, kwargs), lambda _: next(replaced))
            return target(*replacing[0], **replacing[1])

        with self.fake_mode:
            traced = make_fx(operator_alone, decompositions())(*(n.meta["val"] for n in inputs))
        return self._inline(traced.graph, inputs)

    def _fake(self, target: Any, args: Args, kwargs: Keywords) -> Any:
        read = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            return target(*read[0], **read[1])

    def full(
        self, shape: Sequence[Any], fill: float | bool, like: torch.Tensor, dtype: torch.dtype | None = None
    ) -> Node:
        return self.call(
            aten.full.default,
            [self.size(s) for s in shape],
            fill,
            dtype=dtype or like.dtype,
            layout=torch.strided,
            device=like.device,
            pin_memory=False,
        )

    def size(self, value: Any) -> Any:
        """A size as an argument: an int, or a node that computes it."""
        if isinstance(value, (int, Node)):
            return value
        expression = value.node.expr if isinstance(value, torch.SymInt) else value
        if not expression.free_symbols:
            return int(expression)
        if expression not in self.sizes:
            self.sizes[expression] = self._computed_size(expression)
        return self.sizes[expression]

    def _computed_size(self, expression: Any) -> Node:
        from hwbp_compiler.torch_private import PythonReferenceAnalysis, sympy_interp

        symbols = sorted(expression.free_symbols, key=str)
        if not self.sizes.keys() >= set(symbols):
            raise Declined(Reason.SIZE_NOT_AT_HAND.of(size=expression))
        inputs = [self.sizes[symbol] for symbol in symbols]

        def compute(*values: Any) -> Any:
            return sympy_interp(PythonReferenceAnalysis, dict(zip(symbols, values, strict=True)), expression)

        return self._inline(make_fx(compute)(*(n.meta["val"] for n in inputs)).graph, inputs)

    def reshape(self, node: Node, shape: Sequence[Any]) -> Node:
        sizes = [self.size(s) for s in shape]
        if shape_of(node) == tuple(size_of(s) if isinstance(s, Node) else s for s in sizes):
            return node
        if not _can_view(node.meta["val"]):
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, node, sizes)

    def permute(self, node: Node, dims: Sequence[int]) -> Node:
        if list(dims) == list(range(len(dims))):
            return node
        return self.call(aten.permute.default, node, list(dims))

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        if value.tensor.dtype == dtype:
            return value
        return Value(self.call(prims.convert_element_type.default, value.node, dtype), value.batched)

    def batch(self, value: Value) -> Node:
        """The stacked form of a value. A shared value is repeated by an expanding view."""
        if value.batched:
            return value.node
        node = self.call(aten.unsqueeze.default, value.node, 0)
        return self.call(aten.expand.default, node, [self.count, *(self.size(s) for s in value.shape)])

    def aligned(self, value: Value, rank: int) -> Node:
        """``value`` with size-1 dimensions after the link dimension, so that it broadcasts as it would for one link."""
        if not value.batched or value.rank == rank:
            return value.node
        sizes = list(value.tensor.shape)
        return self.reshape(value.node, [sizes[0], *([1] * (rank - value.rank)), *sizes[1:]])

    # -- one operator -------------------------------------------------------------------------------------------

    def apply(self, target: Any, args: Args, kwargs: Keywords) -> Result:
        """``target`` for every link. ``args`` and ``kwargs`` hold Values, nested tuples and constants."""
        values = [v for v in flattened((*args, *kwargs.values())) if isinstance(v, Value)]
        if not any(v.batched for v in values):
            if target is aten.view.default and not _has_view(args[0].tensor, plain(args)[1]):
                # Its strides differ from those the program was traced with.
                args = (
                    Value(self.call(aten.clone.default, args[0].node, memory_format=torch.contiguous_format), False),
                    *args[1:],
                )
            node = self.call(target, *plain(args), **plain_keywords(kwargs))
            return self._wrap(node, batched=False)
        rule = RULES.get(target)
        if rule is None and isinstance(target, torch._ops.OpOverload):
            rule = RULES_BY_NAME.get(target._schema.name)
        if any(isinstance(v, Value) for v in kwargs.values()) and target not in TAKE_KEYWORDS:
            rule = None  # other rules pass keywords through unchanged
        if rule is None and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            rule = RULES[torch.Tag.pointwise]
        if rule is not None:
            return rule(self, target, args, kwargs)
        if target in _WRITES and isinstance(args[0], Value) and not args[0].batched:
            args = (Value(self.own(args[0]), True), *args[1:])
        return self.vmap(target, args, kwargs)

    def own(self, value: Value) -> Node:
        """The stacked form of a value in separate memory for every link, so that each link can write to its own."""
        if value.batched:
            return value.node
        return self.call(aten.clone.default, self.batch(value), memory_format=torch.contiguous_format)

    def _wrap(self, node: Node, batched: bool) -> Result:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [Value(self.call(operator.getitem, node, i), batched) for i in range(len(value))]
        return Value(node, batched)

    def vmap(self, target: Any, args: Args, kwargs: Keywords) -> Result:
        # Sizes must be inputs of the trace too, because a graph cannot hold a bare symbol.
        values = [v if isinstance(v, Value) else Value(v, False)
                  for v in flattened((*args, *kwargs.values())) if isinstance(v, (Value, Node))]  # fmt: skip

        def one_link(*inputs: Any) -> Any:
            replaced = iter(inputs)
            found = mapped((*args, *kwargs.values()), lambda _: next(replaced), (Value, Node))
            return target(*found[: len(args)], **dict(zip(kwargs, found[len(args) :], strict=True)))

        in_dims = tuple(0 if v.batched else None for v in values)
        try:
            with self.fake_mode:
                traced = make_fx(torch.vmap(one_link, in_dims=in_dims), decompositions())(*(v.tensor for v in values))
        except Exception as error:
            name = target._schema.name if isinstance(target, torch._ops.OpOverload) else target
            raise Declined(Reason.NOT_FOR_SEVERAL_BLOCKS.of(operator=name)) from error
        result = self._inline(traced.graph, [v.node for v in values])
        if isinstance(result, (tuple, list)):
            return [Value(r, True) for r in result]
        return Value(result, True)

    def _inline(self, graph: Graph, inputs: list[Node]) -> Any:
        """Copy a traced graph to this place. Return its result: a node or a list of nodes."""
        try:
            return inline(graph, inputs, lambda node, args, kwargs: self._append(node.target, args, kwargs))
        except NotImplementedError as error:
            raise Declined(Reason.CONSTANT_INSIDE) from error

    # -- sums over links ----------------------------------------------------------------------------------------

    def sum_links(self, value: Value) -> Node:
        """The sum over links of a batched value. For matrix products it becomes one long product. If the links add to
        zeros, all of them add into one tensor.
        """
        node = value.node
        if node in self.puts:
            return self._sum_puts(self.puts[node])
        if node.target in _TRANSPARENT and self._is_ours(node):
            pushed = _TRANSPARENT[node.target](self, node)
            if pushed is not None:
                return pushed
        if node.target is aten.bmm.default and self._is_ours(node):
            left, right = node.args
            count, rows, inner = left.meta["val"].shape
            columns = right.meta["val"].shape[2]
            tall_left = self.reshape(self.permute(left, [0, 2, 1]), [count * inner, rows])
            tall_right = self.reshape(right, [count * inner, columns])
            return self.call(aten.mm.default, self.permute(tall_left, [1, 0]), tall_right)
        if node.target is aten.sum.dim_IntList and self._is_ours(node) and len(node.args) >= 2:
            source, dims = node.args[0], list(node.args[1])
            keep = len(node.args) > 2 and bool(node.args[2])
            summed = self.call(aten.sum.dim_IntList, source, [0, *dims], keep, **node.kwargs)
            return self.call(aten.squeeze.dim, summed, 0) if keep else summed
        return self.call(aten.sum.dim_IntList, node, [0])

    def _sum_puts(self, put: Put) -> Node:
        """All links' additions, added into one base. The large tensor ``[links, *base]`` is never created."""
        base = self.apply(aten.mul.Tensor, (put.base, self.count), {})
        assert isinstance(base, Value)
        first, *others = put.indices
        places = [self.aligned(Value(self.batch(first), True), put.rank), *(self.aligned(i, put.rank) for i in others)]
        return self.call(put.target, base.node, *put.mask, places, put.source, *put.rest)

    def _is_ours(self, node: Node) -> bool:
        return node.meta.get("val") is not None


def _has_view(tensor: torch.Tensor, sizes: Sequence[Any]) -> bool:
    """Whether ``tensor.view(sizes)`` needs no copy. With symbolic sizes this is known only for contiguous tensors."""
    if tensor.is_contiguous():
        return True
    try:
        tensor.view([s.meta["val"] if isinstance(s, Node) else s for s in sizes])
    except (RuntimeError, ValueError):
        return False
    return True


def _can_view(tensor: torch.Tensor) -> bool:
    """Whether the tensor is contiguous with regular strides. Convolutions take a size of 1 with an irregular stride for
    another memory format.
    """
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not isinstance(size, int) or not isinstance(stride, int):
            return bool(tensor.is_contiguous())
        if stride != expected:
            return False
        expected *= size
    return True


def flattened(args: Iterable[Any]) -> Iterator[Any]:
    for a in args:
        if isinstance(a, (tuple, list)):
            yield from flattened(a)
        else:
            yield a


def mapped(args: Iterable[Any], function: Callable[[Any], Any], what: Any = Value) -> Args:
    def one(a: Any) -> Any:
        if isinstance(a, (tuple, list)):
            return [one(x) for x in a]
        return function(a) if isinstance(a, what) else a

    return tuple(one(a) for a in args)


def plain(args: Iterable[Any]) -> Args:
    return mapped(args, lambda v: v.node)


def plain_keywords(kwargs: Keywords) -> Keywords:
    return {k: v.node if isinstance(v, Value) else v for k, v in kwargs.items()}


@dataclass(frozen=True)
class Put:
    """All links' additions to ``base``, which they share. The indices have rank ``rank``."""

    target: object
    base: Value
    mask: list[Node]
    indices: list[Value]
    rank: int
    source: Node
    rest: list[Any]


# -- pushing a sum over links through views ---------------------------------------------------------------------


def _through_permute(e: Emitter, node: Node) -> Node | None:
    source, dims = node.args
    if dims[0] != 0:
        return None
    return e.permute(e.sum_links(Value(source, True)), [d - 1 for d in dims[1:]])


def _through_view(e: Emitter, node: Node) -> Node | None:
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if not before or before[0] != after[0]:
        return None
    return e.reshape(e.sum_links(Value(source, True)), list(after[1:]))


_TRANSPARENT: dict[object, Callable[[Emitter, Node], Node | None]] = {
    aten.permute.default: _through_permute,
    aten.view.default: _through_view,
}


# -- sizes ------------------------------------------------------------------------------------------------------


def sizes_at_hand(nodes: Iterable[Node]) -> dict[Any, Node]:
    """For every size known only at run time, the first node that computes it."""
    found: dict[Any, Node] = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), SYMBOLIC):
            found.setdefault(size_of(node), node)
    return found
