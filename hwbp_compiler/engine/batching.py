"""One operator for all links of a group at once: batching rules over a leading link dimension.

A ``Value`` is a graph node that either has a leading dimension of ``count`` links (``batched``) or is the same for
all of them (shared). A size is a number or a bare node, and the same for all. A rule turns "operator on one link" into
"operator on the stack". Where no rule is written, ``torch.vmap`` of the operator is traced and inlined.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

import hwbp_compiler.torch_private  # noqa: F401  (registers prims.fma)
from hwbp_compiler.engine.inline import inline
from hwbp_compiler.graph.rules import SYMBOLIC, shape_of, size_of
from hwbp_compiler.reasons import Declined, Reason

aten = torch.ops.aten
prims = torch.ops.prims


@functools.cache
def decompositions() -> dict:
    from hwbp_compiler.torch_private import select_decomp_table

    return dict(select_decomp_table())


# Inductor's decomposition of these only treats special cases (empty operands, batch 1, complex numbers, no dtype) and
# else keeps the operator.
_KEPT = {
    aten.cat.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.convolution_backward.default,
    aten.add.Tensor,
    aten.full.default,
}


# They copy their first argument and write into the copy. Where it is one for all links, vmap expands it, and Inductor
# (seen in torch 2.13) copies an expanded constant as it lies: all links then write into the same memory.
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


@dataclass(frozen=True)
class Value:
    node: Node
    batched: bool

    @property
    def tensor(self) -> torch.Tensor:
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple:
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

    def __init__(self, graph: Graph, before: Node, fake_mode, count: int, sizes: dict[Any, Node] | None = None) -> None:
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

    def call(self, target, *args, **kwargs) -> Node:
        """One operator, decomposed if Inductor decomposes it: at this stage Inductor no longer does."""
        if target in decompositions() and target not in _KEPT:
            return self._decomposed(target, args, kwargs)
        return self._append(target, args, kwargs)

    def _append(self, target, args, kwargs) -> Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, args, kwargs)
        self.created.append(node)
        node.meta["val"] = self._fake(target, args, kwargs)
        return node

    def _decomposed(self, target, args, kwargs) -> Node:
        inputs: list[Node] = []
        torch.fx.map_arg((args, kwargs), inputs.append)

        def operator_alone(*tensors):
            replaced = iter(tensors)
            mapped = torch.fx.map_arg((args, kwargs), lambda _: next(replaced))
            return target(*mapped[0], **mapped[1])

        with self.fake_mode:
            traced = make_fx(operator_alone, decompositions())(*(n.meta["val"] for n in inputs))
        return self._inline(traced.graph, inputs)

    def _fake(self, target, args, kwargs):
        read = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.fake_mode:
            return target(*read[0], **read[1])

    def full(self, shape: Sequence, fill: float, like: torch.Tensor, dtype: torch.dtype | None = None) -> Node:
        return self.call(
            aten.full.default,
            [self.size(s) for s in shape],
            fill,
            dtype=dtype or like.dtype,
            layout=torch.strided,
            device=like.device,
            pin_memory=False,
        )

    def size(self, value):
        """A size as an argument: an int, or a node that computes it."""
        if isinstance(value, (int, Node)):
            return value
        expression = value.node.expr if isinstance(value, torch.SymInt) else value
        if not expression.free_symbols:
            return int(expression)
        if expression not in self.sizes:
            self.sizes[expression] = self._computed_size(expression)
        return self.sizes[expression]

    def _computed_size(self, expression) -> Node:
        from hwbp_compiler.torch_private import PythonReferenceAnalysis, sympy_interp

        symbols = sorted(expression.free_symbols, key=str)
        if not self.sizes.keys() >= set(symbols):
            raise Declined(Reason.SIZE_NOT_AT_HAND.of(size=expression))
        inputs = [self.sizes[symbol] for symbol in symbols]

        def compute(*values):
            return sympy_interp(PythonReferenceAnalysis, dict(zip(symbols, values, strict=True)), expression)

        return self._inline(make_fx(compute)(*(n.meta["val"] for n in inputs)).graph, inputs)

    def reshape(self, node: Node, shape: Sequence) -> Node:
        sizes = [self.size(s) for s in shape]
        if shape_of(node) == tuple(size_of(s) if isinstance(s, Node) else s for s in sizes):
            return node
        if not _can_view(node.meta["val"]):
            node = self.call(aten.clone.default, node, memory_format=torch.contiguous_format)
        return self.call(aten.view.default, node, sizes)

    def contiguous_view(self, node: Node, *shape) -> Node:
        return self.reshape(node, shape)

    def permute(self, node: Node, dims: Sequence[int]) -> Node:
        if list(dims) == list(range(len(dims))):
            return node
        return self.call(aten.permute.default, node, list(dims))

    def convert(self, value: Value, dtype: torch.dtype) -> Value:
        if value.tensor.dtype == dtype:
            return value
        return Value(self.call(prims.convert_element_type.default, value.node, dtype), value.batched)

    def batch(self, value: Value) -> Node:
        """The stacked form of a value: a shared one is repeated by an expanding view."""
        if value.batched:
            return value.node
        node = self.call(aten.unsqueeze.default, value.node, 0)
        return self.call(aten.expand.default, node, [self.count, *(self.size(s) for s in value.shape)])

    def aligned(self, value: Value, rank: int) -> Node:
        """``value`` with size-1 dimensions after the link dimension, so that it broadcasts as one link would."""
        if not value.batched or value.rank == rank:
            return value.node
        sizes = list(value.tensor.shape)
        return self.reshape(value.node, [sizes[0], *([1] * (rank - value.rank)), *sizes[1:]])

    # -- one operator -------------------------------------------------------------------------------------------

    def apply(self, target, args: tuple, kwargs: dict) -> Value | list[Value]:
        """``target`` for every link. ``args`` and ``kwargs`` hold Value, nested tuples and constants."""
        values = [v for v in _flatten((*args, *kwargs.values())) if isinstance(v, Value)]
        if not any(v.batched for v in values):
            if target is aten.view.default and not _has_view(args[0].tensor, _plain(args)[1]):
                # Its strides are not those the program was written for.
                args = (
                    Value(self.call(aten.clone.default, args[0].node, memory_format=torch.contiguous_format), False),
                    *args[1:],
                )
            node = self.call(target, *_plain(args), **_plain_keywords(kwargs))
            return self._wrap(node, batched=False)
        rule = _RULES.get(target)
        if any(isinstance(v, Value) for v in kwargs.values()) and target not in _ATTENTION_BACKWARD:
            rule = None  # the other rules pass keywords on as they are
        if rule is not None:
            return rule(self, args, kwargs)
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return _pointwise(self, target, args, kwargs)
        if target in _WRITES and isinstance(args[0], Value) and not args[0].batched:
            args = (Value(self.own(args[0]), True), *args[1:])
        return self.vmap(target, args, kwargs)

    def own(self, value: Value) -> Node:
        """The stacked form of a value, for every link to write into its own."""
        if value.batched:
            return value.node
        return self.call(aten.clone.default, self.batch(value), memory_format=torch.contiguous_format)

    def _wrap(self, node: Node, batched: bool) -> Value | list[Value]:
        value = node.meta["val"]
        if isinstance(value, (tuple, list)):
            return [Value(self.call(operator.getitem, node, i), batched) for i in range(len(value))]
        return Value(node, batched)

    def vmap(self, target, args: tuple, kwargs: dict) -> Value | list[Value]:
        # Sizes are inputs of what is traced too: a symbol may not stand in a graph as it is.
        values = [v if isinstance(v, Value) else Value(v, False)
                  for v in _flatten((*args, *kwargs.values())) if isinstance(v, (Value, Node))]  # fmt: skip

        def one_link(*inputs):
            replaced = iter(inputs)
            mapped = _map((*args, *kwargs.values()), lambda _: next(replaced), (Value, Node))
            return target(*mapped[: len(args)], **dict(zip(kwargs, mapped[len(args) :], strict=True)))

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

    def _inline(self, graph: Graph, inputs: list[Node]):
        """Copy a traced graph to here; its result: a node, or a list of nodes."""
        try:
            return inline(graph, inputs, lambda node, args, kwargs: self._append(node.target, args, kwargs))
        except NotImplementedError as error:
            raise Declined(Reason.CONSTANT_INSIDE) from error

    # -- sums over links ----------------------------------------------------------------------------------------

    def sum_links(self, value: Value) -> Node:
        """The sum over links of a batched value; of matrix products, it is one long product, and of what links add to
        zeros, all of them add to the same."""
        node = value.node
        if node in self.puts:
            return self._sum_puts(self.puts[node])
        if node.target in _TRANSPARENT and self._is_ours(node):
            pushed = _TRANSPARENT[node.target](self, node)
            if pushed is not None:
                return pushed
        if node.target is aten.bmm.default and self._is_ours(node):
            left, right = node.args
            count, rows, inner = left.meta["val"].shape  # type: ignore[union-attr]
            columns = right.meta["val"].shape[2]  # type: ignore[union-attr]
            tall_left = self.reshape(self.permute(left, [0, 2, 1]), [count * inner, rows])  # type: ignore[arg-type]
            tall_right = self.reshape(right, [count * inner, columns])  # type: ignore[arg-type]
            return self.call(aten.mm.default, self.permute(tall_left, [1, 0]), tall_right)
        if node.target is aten.sum.dim_IntList and self._is_ours(node) and len(node.args) >= 2:
            source, dims = node.args[0], list(node.args[1])  # type: ignore[arg-type]
            keep = len(node.args) > 2 and bool(node.args[2])
            summed = self.call(aten.sum.dim_IntList, source, [0, *dims], keep, **node.kwargs)
            return self.call(aten.squeeze.dim, summed, 0) if keep else summed
        return self.call(aten.sum.dim_IntList, node, [0])

    def _sum_puts(self, put: Put) -> Node:
        """What all links add, added to one: ``[links, *base]`` is never made."""
        base = self.apply(aten.mul.Tensor, (put.base, self.count), {})
        first, *others = put.indices
        places = [self.aligned(Value(self.batch(first), True), put.rank), *(self.aligned(i, put.rank) for i in others)]
        return self.call(put.target, base.node, *put.mask, places, put.source, *put.rest)  # type: ignore[union-attr]

    def _is_ours(self, node: Node) -> bool:
        return node.meta.get("val") is not None


def _has_view(tensor: torch.Tensor, sizes: Sequence) -> bool:
    """Whether ``tensor.view(sizes)`` needs no copy. Symbolic sizes: known of contiguous tensors only."""
    if tensor.is_contiguous():
        return True
    try:
        tensor.view([s.meta["val"] if isinstance(s, Node) else s for s in sizes])
    except (RuntimeError, ValueError):
        return False
    return True


def _can_view(tensor: torch.Tensor) -> bool:
    """True for contiguous tensors whose strides leave no doubt: convolutions take a size of 1 with an odd stride for
    another memory format."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if not isinstance(size, int) or not isinstance(stride, int):
            return bool(tensor.is_contiguous())
        if stride != expected:
            return False
        expected *= size
    return True


def _flatten(args):
    for a in args:
        if isinstance(a, (tuple, list)):
            yield from _flatten(a)
        else:
            yield a


def _map(args, function: Callable, what=Value):
    def one(a):
        if isinstance(a, (tuple, list)):
            return [one(x) for x in a]
        return function(a) if isinstance(a, what) else a

    return tuple(one(a) for a in args)


def _plain(args):
    return _map(args, lambda v: v.node)


def _plain_keywords(kwargs):
    return {k: v.node if isinstance(v, Value) else v for k, v in kwargs.items()}


# -- the rules --------------------------------------------------------------------------------------------------

_RULES: dict[object, Callable] = {}


def _rule(*targets):
    def register(function):
        for target in targets:
            _RULES[target] = lambda e, args, kwargs, t=target: function(e, t, args, kwargs)
        return function

    return register


@_rule(prims.convert_element_type.default, prims.fma.default, aten.where.self, aten.alias.default, aten.detach.default)
def _pointwise(e: Emitter, target, args, kwargs):
    values = [v for v in _flatten(args) if isinstance(v, Value)]
    rank = max(v.rank for v in values)
    return Value(e.call(target, *_map(args, lambda v: e.aligned(v, rank)), **kwargs), True)


@_rule(aten.clone.default, aten._to_copy.default)
def _copy(e: Emitter, target, args, kwargs):
    # A copy into another memory format says nothing once there is a link dimension.
    if target is aten._to_copy.default and kwargs.get("dtype") is not None:
        return e.convert(args[0], kwargs["dtype"])
    return args[0]


def _shifted(dim: int, rank: int) -> int:
    return dim + 1 if dim >= 0 else dim + rank + 1


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(e: Emitter, target, args, kwargs):
    return Value(e.reshape(args[0].node, [e.count, *args[1]]), True)


@_rule(aten.permute.default)
def _permute(e: Emitter, target, args, kwargs):
    rank = args[0].rank
    return Value(e.permute(args[0].node, [0, *(_shifted(d, rank) for d in args[1])]), True)


@_rule(aten.t.default)
def _t(e: Emitter, target, args, kwargs):
    if args[0].rank < 2:
        return args[0]
    return Value(e.permute(args[0].node, [0, 2, 1]), True)


@_rule(aten.transpose.int)
def _transpose(e: Emitter, target, args, kwargs):
    x, a, b = args
    return Value(e.call(target, x.node, _shifted(a, x.rank), _shifted(b, x.rank)), True)


@_rule(aten.unsqueeze.default)
def _unsqueeze(e: Emitter, target, args, kwargs):
    x, dim = args
    return Value(e.call(target, x.node, dim + 1 if dim >= 0 else dim + x.rank + 2), True)


@_rule(aten.squeeze.dim)
def _squeeze(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank)), True)


@_rule(aten.squeeze.dims)
def _squeeze_dims(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, [_shifted(d, args[0].rank) for d in args[1]]), True)


@_rule(aten.squeeze.default)
def _squeeze_all(e: Emitter, target, args, kwargs):
    return Value(e.reshape(args[0].node, [e.count, *(s for s in args[0].shape if s != 1)]), True)


@_rule(aten.expand.default)
def _expand(e: Emitter, target, args, kwargs):
    x, sizes = args
    return Value(e.call(target, e.aligned(x, len(sizes)), [e.count, *sizes]), True)


@_rule(aten.select.int)
def _select(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank), args[2]), True)


@_rule(aten.slice.Tensor)
def _slice(e: Emitter, target, args, kwargs):
    x, dim, *rest = args if len(args) > 1 else (args[0], 0)
    return Value(e.call(target, x.node, _shifted(dim, x.rank), *_plain(rest), **kwargs), True)


@_rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(e: Emitter, target, args, kwargs):
    x, sizes, dim = (*args, 0)[:3]
    sizes = list(sizes) if isinstance(sizes, (tuple, list)) else sizes
    node = e.call(target, x.node, sizes, _shifted(dim, x.rank))
    return e._wrap(node, True)


@_rule(aten.unbind.int)
def _unbind(e: Emitter, target, args, kwargs):
    x, dim = (*args, 0)[:2]
    dim = dim if dim >= 0 else dim + x.rank
    return [Value(e.call(aten.select.int, x.node, dim + 1, i), True) for i in range(int(x.shape[dim]))]


@_rule(aten.cat.default)
def _cat(e: Emitter, target, args, kwargs):
    values, dim = (*args, 0)[:2]
    return Value(e.call(target, [e.batch(v) for v in values], _shifted(dim, values[0].rank)), True)


@_rule(aten.stack.default)
def _stack(e: Emitter, target, args, kwargs):
    values, dim = (*args, 0)[:2]
    dim = dim + 1 if dim >= 0 else dim + values[0].rank + 2
    return Value(e.call(aten.cat.default, [e.call(aten.unsqueeze.default, e.batch(v), dim) for v in values], dim), True)


@_rule(aten.flip.default, prims.rev.default)
def _flip(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, [_shifted(d, args[0].rank) for d in args[1]]), True)


@_rule(aten.constant_pad_nd.default)
def _pad(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, *_plain(args[1:]), **kwargs), True)


@_rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(e: Emitter, target, args, kwargs):
    base, source, dim, *rest = (*args, 0)[:3] if len(args) < 3 else args
    shifted = _shifted(dim, base.rank)
    return Value(e.call(target, e.batch(base), e.batch(source), shifted, *_plain(rest), **kwargs), True)


@_rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def _reduce(e: Emitter, target, args, kwargs):
    x, dims, *rest = (*args, None)[:3] if len(args) < 2 else args
    if isinstance(dims, int):
        dims = [dims]
    shifted = [_shifted(d, x.rank) for d in dims] if dims else list(range(1, x.rank + 1))
    if not shifted:
        return x
    return Value(e.call(target, x.node, shifted, *rest, **kwargs), True)


@_rule(aten.sum.default)
def _sum_all(e: Emitter, target, args, kwargs):
    x = args[0]
    if x.rank == 0:
        return x
    return Value(e.call(aten.sum.dim_IntList, x.node, list(range(1, x.rank + 1)), **kwargs), True)


@_rule(aten.cumsum.default)
def _cumsum(e: Emitter, target, args, kwargs):
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank), **kwargs), True)


@_rule(aten.gather.default)
def _gather(e: Emitter, target, args, kwargs):
    x, dim, index, *rest = args
    if not x.rank or not index.rank:
        return e.vmap(target, args, kwargs)
    return Value(e.call(target, e.batch(x), _shifted(dim, x.rank), e.batch(index), *rest, **kwargs), True)


@_rule(aten.scatter.src, aten.scatter_add.default)
def _scatter_src(e: Emitter, target, args, kwargs):
    base, dim, index, source = args
    if not base.rank or not index.rank:
        return e.vmap(target, (Value(e.own(base), True), *args[1:]), kwargs)
    return Value(e.call(target, e.own(base), _shifted(dim, base.rank), e.batch(index), e.batch(source), **kwargs), True)


@dataclass(frozen=True)
class Put:
    """All links' additions to ``base``, which is the same for all; of ``rank`` are the places where."""

    target: object
    base: Value
    mask: list[Node]
    indices: list[Value]
    rank: int
    source: Node
    rest: list


_MASKED_PUT = aten._unsafe_masked_index_put_accumulate.default


@_rule(aten.index_put.default, aten._unsafe_index_put.default, _MASKED_PUT)
def _index_put(e: Emitter, target, args, kwargs):
    """Links are one more index, the first. The gradient of an embedding is ``index_put`` into zeros."""
    base, *mask, indices, values = args[: 4 if target is _MASKED_PUT else 3]
    rest = list(args[3:]) if target is not _MASKED_PUT else []
    if kwargs or not all(isinstance(i, Value) and i.tensor.dtype in (torch.int32, torch.int64) for i in indices):
        return e.vmap(target, (Value(e.own(base), True), *args[1:]), kwargs)
    rank = max(i.rank for i in indices)
    written = rank + base.rank - len(indices)
    put = Put(
        target, base, [e.aligned(m, written) for m in mask], list(indices), rank, e.aligned(values, written), rest
    )
    link = e.call(aten.arange.default, e.count, dtype=torch.int64, device=base.tensor.device)
    places = [e.reshape(link, [e.count, *([1] * rank)]), *(e.aligned(i, rank) for i in indices)]
    node = e.call(target, e.own(base), *put.mask, places, put.source, *rest)
    if not base.batched and (mask or rest == [True]):
        e.puts[node] = put
    return Value(node, True)


@_rule(aten.mm.default)
def _mm(e: Emitter, target, args, kwargs):
    left, right = args
    if left.batched and not right.batched:  # shared weights: one tall product
        rows, inner = left.shape
        tall = e.reshape(left.node, [e.count * rows, inner])
        return Value(e.reshape(e.call(target, tall, right.node), [e.count, rows, right.shape[1]]), True)
    return Value(e.call(aten.bmm.default, e.batch(left), e.batch(right)), True)


@_rule(aten.addmm.default)
def _addmm(e: Emitter, target, args, kwargs):
    if kwargs:
        return e.vmap(target, args, kwargs)
    bias, left, right = args
    product = e.apply(aten.mm.default, (left, right), {})
    return e.apply(aten.add.Tensor, (product, bias), {})


@_rule(aten.bmm.default)
def _bmm(e: Emitter, target, args, kwargs):
    left, right = (e.batch(a) for a in args)
    (count, batch, rows, inner), columns = left.meta["val"].shape, right.meta["val"].shape[3]
    product = e.call(
        target,
        e.reshape(left, [count * batch, rows, inner]),
        e.reshape(right, [count * batch, inner, columns]),
    )
    return Value(e.reshape(product, [count, batch, rows, columns]), True)


def _fold(e: Emitter, value: Value) -> Node:
    """[links, batch, ...] -> [links * batch, ...]"""
    node = e.batch(value)
    sizes = list(node.meta["val"].shape)
    return e.reshape(node, [sizes[0] * sizes[1], *sizes[2:]])


def _unfold(e: Emitter, node: Node) -> Value:
    sizes = list(node.meta["val"].shape)
    return Value(e.reshape(node, [e.count, sizes[0] // e.count, *sizes[1:]]), True)


@_rule(
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
    aten.max_pool2d_with_indices_backward.default,
)
def _pooling_backward(e: Emitter, target, args, kwargs):
    """Pooling mixes neither the batch nor, where there is none, the channels: links go there."""
    return _unfold(e, e.call(target, *(_fold(e, a) if isinstance(a, Value) else a for a in args), **kwargs))


_ATTENTION_BACKWARD = [
    getattr(aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_flash_attention_backward",
        "_scaled_dot_product_efficient_attention_backward",
    )
    if hasattr(aten, name)
]


@_rule(*_ATTENTION_BACKWARD)
def _attention_backward(e: Emitter, target, args, kwargs):
    """Attention never mixes its batch dimension: links go there."""
    named = dict(zip((a.name for a in target._schema.arguments), args, strict=False))
    if named["dropout_p"] != 0:
        raise Declined(Reason.DROPOUT_IN_ATTENTION)
    if named.get("attn_bias") is not None:
        raise Declined(Reason.MASK_IN_ATTENTION.of(operator=target))

    def fold(argument):
        if not isinstance(argument, Value):
            return argument
        if argument.rank >= 2:
            return _fold(e, argument)
        # The state of the random numbers, which nothing reads without dropout.
        like = argument.tensor
        return e.call(aten.full.default, list(argument.shape), 0, dtype=like.dtype, device=like.device)

    named_rest = {key: fold(value) for key, value in kwargs.items()}
    mask = kwargs.get("attn_mask")
    if mask is not None:
        named_rest["attn_mask"] = _folded_mask(e, mask, args[0].shape[0])
    node = e.call(target, *map(fold, args), **named_rest)
    gradients = (e.call(operator.getitem, node, i) if v is not None else None for i, v in enumerate(node.meta["val"]))
    return [None if gradient is None else _unfold(e, gradient) for gradient in gradients]


def _folded_mask(e: Emitter, mask: Value, batch) -> Node:
    """An additive mask that broadcasts to [batch, heads, queries, keys], for [links * batch, ...]."""
    if not mask.batched and (mask.rank < 4 or mask.shape[0] == 1):
        return mask.node
    node, sizes = e.batch(mask), list(mask.shape)
    node = e.reshape(node, [e.count, *([1] * (4 - len(sizes))), *sizes])
    _, mine, *rest = node.meta["val"].shape
    if mine != batch:
        node = e.call(aten.expand.default, node, [e.count, e.size(batch), *(e.size(s) for s in rest)])
    return e.reshape(node, [e.count * batch, *rest])


def convolution_backward(e: Emitter, args: tuple, which: int) -> Value:
    """Output ``which`` (0 input, 1 weight, 2 bias) of convolution_backward for all links.

    Shared weights: links join the batch. Own weights: links become groups of one convolution.
    """
    gradient, inputs, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, _ = args
    mask = [which == i for i in range(3)]
    target = aten.convolution_backward.default
    if which == 2:
        dims = [1, *range(3, gradient.rank + 1)]
        return Value(e.call(aten.sum.dim_IntList, e.batch(gradient), dims), True)
    if not weight.batched and which == 0:
        node = e.call(
            target, _fold(e, gradient), _fold(e, inputs), weight.node, None,
            list(stride), list(padding), list(dilation), transposed, list(output_padding), groups, mask,
        )  # fmt: skip
        return _unfold(e, e.call(operator.getitem, node, 0))
    if transposed and groups != 1:
        raise Declined(Reason.NOT_FOR_SEVERAL_BLOCKS.of(operator="a grouped transposed convolution"))
    count = e.count

    def to_channels(value: Value) -> Node:
        node = e.permute(e.batch(value), [1, 0, *range(2, value.rank + 1)])
        batch, _, channels, *space = node.meta["val"].shape
        return e.reshape(node, [batch, count * channels, *space])

    weight_node = e.batch(weight)
    sizes = list(weight_node.meta["val"].shape)
    node = e.call(
        target, to_channels(gradient), to_channels(inputs),
        e.reshape(weight_node, [count * sizes[1], *sizes[2:]]), None,
        list(stride), list(padding), list(dilation), transposed, list(output_padding), count * groups, mask,
    )  # fmt: skip
    result = e.call(operator.getitem, node, which)
    if which == 1:
        return Value(e.reshape(result, sizes), True)
    batch, channels, *space = result.meta["val"].shape
    split = e.reshape(result, [batch, count, channels // count, *space])
    return Value(e.permute(split, [1, 0, *range(2, inputs.rank + 1)]), True)


# -- pushing a sum over links through views ---------------------------------------------------------------------


def _through_permute(e: Emitter, node: Node):
    source, dims = node.args
    if dims[0] != 0:
        return None
    return e.permute(e.sum_links(Value(source, True)), [d - 1 for d in dims[1:]])


def _through_view(e: Emitter, node: Node):
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if not before or before[0] != after[0]:
        return None
    return e.reshape(e.sum_links(Value(source, True)), list(after[1:]))


_TRANSPARENT: dict[object, Callable] = {aten.permute.default: _through_permute, aten.view.default: _through_view}


# -- sizes ------------------------------------------------------------------------------------------------------


def sizes_at_hand(nodes: Iterable[Node]) -> dict[Any, Node]:
    """The first node that computes it, for every size that is known only at run time."""
    found: dict[Any, Node] = {}
    for node in nodes:
        if isinstance(node.meta.get("val"), SYMBOLIC):
            found.setdefault(size_of(node), node)
    return found
