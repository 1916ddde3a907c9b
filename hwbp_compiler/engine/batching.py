"""One rule per operator: how to apply it with a leading link dimension.

A rule receives Values (see ``emitter``), nested tuples and constants. Supporting an operator here takes one function
and one test; without a rule, vmap is tried.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from hwbp_compiler.reasons import Declined, Reason

from .emitter import (
    RULES,
    RULES_BY_NAME,
    TAKE_KEYWORDS,
    Args,
    Emitter,
    Keywords,
    Put,
    Result,
    Rule,
    Value,
    flattened,
    mapped,
    plain,
)

aten = torch.ops.aten
prims = torch.ops.prims


def _rule(*targets: object) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


@_rule(torch.Tag.pointwise, prims.convert_element_type.default, prims.fma.default)
@_rule(aten.where.self, aten.alias.default, aten.detach.default)
def _pointwise(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    values = [v for v in flattened(args) if isinstance(v, Value)]
    rank = max(v.rank for v in values)
    return Value(e.call(target, *mapped(args, lambda v: e.aligned(v, rank)), **kwargs), True)


@_rule(aten.clone.default, aten._to_copy.default)
def _copy(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    # With a link dimension, the memory format of a copy no longer matters.
    x: Value = args[0]
    if target is aten._to_copy.default and kwargs.get("dtype") is not None:
        return e.convert(x, kwargs["dtype"])
    return x


def _shifted(dim: int, rank: int) -> int:
    return dim + 1 if dim >= 0 else dim + rank + 1


@_rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def _view(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.reshape(args[0].node, [e.count, *args[1]]), True)


@_rule(aten.permute.default)
def _permute(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    rank = args[0].rank
    return Value(e.permute(args[0].node, [0, *(_shifted(d, rank) for d in args[1])]), True)


@_rule(aten.t.default)
def _t(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x: Value = args[0]
    return x if x.rank < 2 else Value(e.permute(x.node, [0, 2, 1]), True)


@_rule(aten.transpose.int)
def _transpose(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x, a, b = args
    return Value(e.call(target, x.node, _shifted(a, x.rank), _shifted(b, x.rank)), True)


@_rule(aten.unsqueeze.default)
def _unsqueeze(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x, dim = args
    return Value(e.call(target, x.node, dim + 1 if dim >= 0 else dim + x.rank + 2), True)


@_rule(aten.squeeze.dim)
def _squeeze(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank)), True)


@_rule(aten.squeeze.dims)
def _squeeze_dims(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, [_shifted(d, args[0].rank) for d in args[1]]), True)


@_rule(aten.squeeze.default)
def _squeeze_all(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.reshape(args[0].node, [e.count, *(s for s in args[0].shape if s != 1)]), True)


@_rule(aten.expand.default)
def _expand(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x, sizes = args
    return Value(e.call(target, e.aligned(x, len(sizes)), [e.count, *sizes]), True)


@_rule(aten.select.int)
def _select(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank), args[2]), True)


@_rule(aten.slice.Tensor)
def _slice(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x, dim, *rest = args if len(args) > 1 else (args[0], 0)
    return Value(e.call(target, x.node, _shifted(dim, x.rank), *plain(rest), **kwargs), True)


@_rule(aten.split.Tensor, aten.split_with_sizes.default)
def _split(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    x, sizes, dim = (*args, 0)[:3]
    sizes = list(sizes) if isinstance(sizes, (tuple, list)) else sizes
    node = e.call(target, x.node, sizes, _shifted(dim, x.rank))
    return e._wrap(node, True)


@_rule(aten.unbind.int)
def _unbind(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> list[Value]:
    x, dim = (*args, 0)[:2]
    dim = dim if dim >= 0 else dim + x.rank
    return [Value(e.call(aten.select.int, x.node, dim + 1, i), True) for i in range(int(x.shape[dim]))]


@_rule(aten.cat.default)
def _cat(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    values, dim = (*args, 0)[:2]
    return Value(e.call(target, [e.batch(v) for v in values], _shifted(dim, values[0].rank)), True)


@_rule(aten.stack.default)
def _stack(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    values, dim = (*args, 0)[:2]
    dim = dim + 1 if dim >= 0 else dim + values[0].rank + 2
    return Value(e.call(aten.cat.default, [e.call(aten.unsqueeze.default, e.batch(v), dim) for v in values], dim), True)


@_rule(aten.flip.default, prims.rev.default)
def _flip(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, [_shifted(d, args[0].rank) for d in args[1]]), True)


@_rule(aten.constant_pad_nd.default)
def _pad(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, *plain(args[1:]), **kwargs), True)


@_rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    base, source, dim, *rest = (*args, 0)[:3] if len(args) < 3 else args
    shifted = _shifted(dim, base.rank)
    return Value(e.call(target, e.batch(base), e.batch(source), shifted, *plain(rest), **kwargs), True)


@_rule(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
def _reduce(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x: Value
    x, dims, *rest = (*args, None)[:3] if len(args) < 2 else args
    if isinstance(dims, int):
        dims = [dims]
    shifted = [_shifted(d, x.rank) for d in dims] if dims else list(range(1, x.rank + 1))
    if not shifted:
        return x
    return Value(e.call(target, x.node, shifted, *rest, **kwargs), True)


@_rule(aten.sum.default)
def _sum_all(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    x: Value = args[0]
    if x.rank == 0:
        return x
    return Value(e.call(aten.sum.dim_IntList, x.node, list(range(1, x.rank + 1)), **kwargs), True)


@_rule(aten.cumsum.default)
def _cumsum(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    return Value(e.call(target, args[0].node, _shifted(args[1], args[0].rank), **kwargs), True)


@_rule(aten.gather.default)
def _gather(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    x, dim, index, *rest = args
    if not x.rank or not index.rank:
        return e.vmap(target, args, kwargs)
    return Value(e.call(target, e.batch(x), _shifted(dim, x.rank), e.batch(index), *rest, **kwargs), True)


@_rule(aten.scatter.src, aten.scatter_add.default)
def _scatter_src(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    base, dim, index, source = args
    if not base.rank or not index.rank:
        return e.vmap(target, (Value(e.own(base), True), *args[1:]), kwargs)
    return Value(e.call(target, e.own(base), _shifted(dim, base.rank), e.batch(index), e.batch(source), **kwargs), True)


_MASKED_PUT = aten._unsafe_masked_index_put_accumulate.default


@_rule(aten.index_put.default, aten._unsafe_index_put.default, _MASKED_PUT)
def _index_put(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    """Links become one more index, the first. The gradient of an embedding is ``index_put`` into zeros."""
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
def _mm(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    left, right = args
    if left.batched and not right.batched:  # shared weights: one tall product
        rows, inner = left.shape
        tall = e.reshape(left.node, [e.count * rows, inner])
        return Value(e.reshape(e.call(target, tall, right.node), [e.count, rows, right.shape[1]]), True)
    return Value(e.call(aten.bmm.default, e.batch(left), e.batch(right)), True)


@_rule(aten.addmm.default)
def _addmm(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    if kwargs:
        return e.vmap(target, args, kwargs)
    bias, left, right = args
    product = e.apply(aten.mm.default, (left, right), {})
    return e.apply(aten.add.Tensor, (product, bias), {})


@_rule(aten.bmm.default)
def _bmm(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
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
def _pooling_backward(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Value:
    """Pooling mixes neither the batch nor, in inputs without a batch, the channels: links join that dimension."""
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


TAKE_KEYWORDS.update(_ATTENTION_BACKWARD)


@_rule(*_ATTENTION_BACKWARD)
def _attention_backward(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> list[Any]:
    """Attention never mixes its batch dimension: links join it."""
    named = dict(zip((a.name for a in target._schema.arguments), args, strict=False))
    if named["dropout_p"] != 0:
        raise Declined(Reason.DROPOUT_IN_ATTENTION)
    if named.get("attn_bias") is not None:
        raise Declined(Reason.MASK_IN_ATTENTION.of(operator=target))

    def fold(argument: Any) -> Any:
        if not isinstance(argument, Value):
            return argument
        if argument.rank >= 2:
            return _fold(e, argument)
        # The state of the random numbers, which is not read without dropout.
        like = argument.tensor
        return e.call(aten.full.default, list(argument.shape), 0, dtype=like.dtype, device=like.device)

    named_rest = {key: fold(value) for key, value in kwargs.items()}
    mask = kwargs.get("attn_mask")
    if mask is not None:
        named_rest["attn_mask"] = _folded_mask(e, mask, args[0].shape[0])
    node = e.call(target, *map(fold, args), **named_rest)
    gradients = (e.call(operator.getitem, node, i) if v is not None else None for i, v in enumerate(node.meta["val"]))
    return [None if gradient is None else _unfold(e, gradient) for gradient in gradients]


def _folded_mask(e: Emitter, mask: Value, batch: Any) -> Node:
    """An additive mask that broadcasts to [batch, heads, queries, keys], expanded for [links * batch, ...]."""
    if not mask.batched and (mask.rank < 4 or mask.shape[0] == 1):
        return mask.node
    node, sizes = e.batch(mask), list(mask.shape)
    node = e.reshape(node, [e.count, *([1] * (4 - len(sizes))), *sizes])
    _, mine, *rest = node.meta["val"].shape
    if mine != batch:
        node = e.call(aten.expand.default, node, [e.count, e.size(batch), *(e.size(s) for s in rest)])
    return e.reshape(node, [e.count * batch, *rest])


def convolution_backward(e: Emitter, args: Args, which: int) -> Value:
    """Output ``which`` (0 input, 1 weight, 2 bias) of convolution_backward for all links.

    With shared weights, links join the batch. With separate weights, links become groups of one convolution.
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


# -- matrix products in groups (mixtures of experts) ---------------------------------------------------------------


def _all_groups(e: Emitter, offsets: Value, rows: Any) -> Node:
    """The end offsets of the groups of all links, one link's rows after the other's: [links * groups]."""
    ends = offsets.tensor
    first = e.call(aten.arange.default, e.count, dtype=ends.dtype, device=ends.device)
    before = e.call(aten.unsqueeze.default, e.call(aten.mul.Tensor, first, e.size(rows)), 1)
    all_ends = e.call(aten.add.Tensor, e.batch(offsets), before)
    return e.reshape(e.call(prims.convert_element_type.default, all_ends, ends.dtype), [e.count * ends.shape[-1]])


def _in_groups(e: Emitter, value: Value, offsets: Value, dim: int) -> Value:
    """``value`` with zeros after the last group, because the next link's rows would follow there."""
    size = value.shape[dim]
    number = e.call(aten.arange.default, e.size(size), dtype=offsets.tensor.dtype, device=offsets.tensor.device)
    last = e.call(aten.slice.Tensor, e.batch(offsets), 1, offsets.shape[0] - 1, offsets.shape[0])
    inside = e.call(aten.lt.Tensor, e.call(aten.unsqueeze.default, number, 0), last)
    inside = e.reshape(inside, [e.count, *(size if d == dim else 1 for d in range(value.rank))])
    zero = e.full((), 0.0, value.tensor)
    return Value(e.call(aten.where.self, inside, e.batch(value), zero), True)


if hasattr(aten, "_grouped_mm"):

    @_rule(aten._grouped_mm.default)
    def _grouped_mm(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
        """Links become more groups: of rows times their matrices, or of the inner dimension."""
        left, right, offsets, *rest = (*args, None)[: max(3, len(args))]
        if offsets is None or any(a is not None for a in rest[:1]) or left.rank != 2:
            return e.vmap(target, args, kwargs)
        if right.rank == 3:
            found = e.call(
                target, _fold(e, left), _fold(e, right), _all_groups(e, offsets, left.shape[0]), *rest, **kwargs
            )
            return _unfold(e, found)
        inner = left.shape[1]
        ends = _all_groups(e, offsets, inner)
        # Stored column by column, like a transposed matrix, because rows of any length may be unaligned.
        columns = e.permute(_in_groups(e, left, offsets, 1).node, [0, 2, 1])
        tall = e.permute(e.reshape(columns, [e.count * inner, left.shape[0]]), [1, 0])
        return _unfold(e, e.call(target, tall, _fold(e, _in_groups(e, right, offsets, 0)), ends, *rest, **kwargs))


def grouped_fallback(e: Emitter, target: Any, args: Args, kwargs: Keywords) -> Result:
    """transformers' own grouped products, for cases that PyTorch's operator does not support, and their backward."""
    input, weight, offsets, *gradient = args
    ends = _all_groups(e, offsets, input.shape[0])
    rows, *gradient = (_fold(e, _in_groups(e, a, offsets, 0)) for a in (input, *gradient))
    found = e._wrap(e.call(target, rows, _fold(e, weight), ends, *gradient, **kwargs), batched=False)
    return [_unfold(e, v.node) for v in found] if isinstance(found, list) else _unfold(e, found.node)


# Operators that exist only after another library has registered them.
RULES_BY_NAME.update({
    "transformers::grouped_mm_fallback": grouped_fallback,
    "transformers::grouped_mm_fallback_backward": grouped_fallback,
})  # fmt: skip
