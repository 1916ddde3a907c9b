"""What each operator means for the highway: one table.

A gradient node is a linear function of the tangents, so every operator that a gradient flows through must be linear in
some of its arguments. For each operator the table states

- its kind: ``ELEMENTWISE`` (output element i depends on element i of the gradient operand), ``LAYOUT`` (the same
  elements in another shape), ``MIXING`` (elements are combined, moved or dropped, cheaply: reductions, slices,
  concatenation), ``HEAVY`` (the operators that make a block: matrix products, convolutions, attention, and others that
  carry information across elements);
- the sets of arguments it is *jointly* linear in: ``add`` in {0, 1} together, ``mul`` in {0} or in {1}, never both.

Supporting an operator takes one entry here and one test. An operator that is absent is opaque: a link that contains it
is declined, never guessed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

import hwbp_compiler.torch_private  # noqa: F401  (registers prims.fma, which Inductor's decompositions emit)

from .sizes import hint

aten = torch.ops.aten
prims = torch.ops.prims


class Kind(enum.Enum):
    ELEMENTWISE = "elementwise"
    LAYOUT = "layout"
    MIXING = "mixing"
    HEAVY = "heavy"


@dataclass(frozen=True)
class Rule:
    """The kind of an operator, and the argument sets it is jointly linear in (positions in ``node.args``)."""

    kind: Kind
    linear: tuple[frozenset[int], ...]


_RULES: dict[object, Rule] = {}


def _register(kind: Kind, linear: list[set[int]], *names: str, namespace=aten) -> None:
    rule = Rule(kind, tuple(frozenset(s) for s in linear))
    for name in names:
        packet_name, _, overload = name.partition(".")
        packet = getattr(namespace, packet_name, None)
        target = getattr(packet, overload or "default", None)
        if target is not None:  # an operator that this torch lacks needs no rule
            _RULES[target] = rule


E, L, M, H = Kind.ELEMENTWISE, Kind.LAYOUT, Kind.MIXING, Kind.HEAVY

# -- elementwise ------------------------------------------------------------------------------------------------
_register(E, [{0, 1}], "add.Tensor", "sub.Tensor")
_register(E, [{0}, {1}], "mul.Tensor")
_register(E, [{0}], "mul.Scalar", "div.Tensor", "div.Scalar", "neg", "clone", "alias", "_to_copy", "detach")
_register(E, [{0}], "lift_fresh_copy", "positive")
_register(E, [{1, 2}], "where.self")
_register(E, [{0}], "convert_element_type", namespace=prims)
_register(E, [{0, 2}, {1, 2}], "fma", namespace=prims)
_register(E, [{0, 1}, {0, 2}], "addcmul")
_register(E, [{0}], "threshold_backward", "sigmoid_backward", "tanh_backward", "gelu_backward", "silu_backward")
_register(E, [{0}], "hardtanh_backward", "leaky_relu_backward", "elu_backward", "softplus_backward")
_register(E, [{0}], "hardswish_backward", "hardsigmoid_backward", "mish_backward", "native_dropout_backward")

# -- layout -----------------------------------------------------------------------------------------------------
_register(L, [{0}], "view", "_unsafe_view", "reshape", "permute", "transpose.int", "t", "unsqueeze")
_register(L, [{0}], "squeeze", "squeeze.dim", "squeeze.dims", "expand")

# -- mixing: cheap, not elementwise -----------------------------------------------------------------------------
_register(M, [{0}], "sum", "sum.dim_IntList", "mean", "mean.dim", "slice.Tensor", "select.int", "split.Tensor")
_register(M, [{0}], "split_with_sizes", "unbind.int", "cat", "stack", "constant_pad_nd", "as_strided", "diagonal")
_register(M, [{0}], "select_backward", "slice_backward", "diagonal_backward", "repeat", "view_as_real")
# A conjugate is additive but not a multiple of its argument, so it cannot be part of K.
_register(
    M, [{0}], "view_as_complex", "_conj", "conj", "_conj_physical", "conj_physical", "resolve_conj", "real", "imag"
)
_register(M, [{0, 1}], "complex")
_register(M, [{0, 1}], "slice_scatter", "select_scatter", "diagonal_scatter")

# -- heavy ------------------------------------------------------------------------------------------------------
_register(H, [{0}, {1}], "mm", "bmm", "matmul", "dot", "mv")
_register(H, [{0, 1}, {0, 2}], "addmm", "baddbmm", "addmv")
_register(H, [{0}], "convolution_backward", "avg_pool2d_backward", "_adaptive_avg_pool2d_backward")
_register(H, [{0}], "max_pool2d_with_indices_backward", "cumsum", "flip", "roll", "index_select", "gather")
_register(H, [{0}], "native_layer_norm_backward", "native_group_norm_backward", "native_batch_norm_backward")
_register(H, [{0}], "upsample_nearest2d_backward", "upsample_bilinear2d_backward", "_fft_r2c", "_fft_c2c", "_fft_c2r")
_register(H, [{0}], "_scaled_dot_product_flash_attention_for_cpu_backward")
_register(H, [{0}], "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward")
_register(H, [{0}], "_scaled_dot_product_cudnn_attention_backward")
_register(H, [{0}], "embedding_dense_backward", "index.Tensor", "_softmax_backward_data", "_log_softmax_backward_data")
_register(H, [{0}], "rev", namespace=prims)
_register(H, [{0, 2}], "index_put", "_unsafe_index_put")
_register(H, [{0, 3}], "scatter.src", "scatter_add", "_unsafe_masked_index_put_accumulate")
_register(H, [{0}], "_unsafe_index.Tensor")

_register(H, [{0}], "grid_sampler_2d_backward", "_cdist_backward")
_register(H, [{0}], *(f"replication_pad{d}d_backward" for d in (1, 2, 3)), "avg_pool3d_backward")
_register(H, [{0}], "adaptive_max_pool2d_backward", "max_pool3d_with_indices_backward")
_register(H, [{2}], "linalg_lu_solve")
_register(H, [{0}, {1}], "_grouped_mm")

_BY_NAME: dict[str, Rule] = {
    # A scan comes from rewriting a block's own recurrence.
    "highway::linear_scan": Rule(H, (frozenset({0, 3}),)),
    "transformers::grouped_mm_fallback": Rule(H, (frozenset({0}), frozenset({1}))),
    "transformers::grouped_mm_fallback_backward": Rule(H, (frozenset({3}),)),
}
"""Operators of libraries that may not be loaded."""

# -- not linear in any argument: used only to give the reason; the decision is the same without a rule ---------------
_NEVER_LINEAR = {
    "abs", "sign", "sgn", "heaviside", "relu", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "fmax", "fmin",
    "floor", "ceil", "round", "trunc", "frac", "remainder", "fmod", "nan_to_num", "pow", "sqrt", "rsqrt", "reciprocal",
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "tanh", "sin", "cos", "tan", "asin", "acos",
    "atan", "atan2", "sinh", "cosh", "erf", "gelu", "silu", "softplus", "hypot", "copysign", "amax", "amin", "max",
    "min", "norm", "linalg_vector_norm", "std", "var", "prod", "cumprod", "logsumexp", "_softmax", "_log_softmax",
    "sort", "topk", "kthvalue", "median",
}  # fmt: skip


def is_never_linear(node: Node) -> bool:
    """Whether the result of ``node`` is known not to be linear in any argument: a comparison, a clamp, a square root.
    Every boolean or integer result is of this kind.
    """
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not (value.dtype.is_floating_point or value.dtype.is_complex):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _NEVER_LINEAR


def is_complex(node: Node) -> bool:
    """Whether ``node`` returns or takes complex numbers."""
    values = (n.meta.get("val") for n in (node, *node.all_input_nodes))
    return any(isinstance(v, torch.Tensor) and v.dtype.is_complex for v in values)


def rule_of(node: Node) -> Rule | None:
    """The rule of ``node``'s operator; None if there is none (opaque)."""
    import operator

    if node.target is operator.getitem:
        source = node.args[0]
        base = rule_of(source) if isinstance(source, Node) else None
        return None if base is None else Rule(M, (frozenset({0}),))
    found = _RULES.get(node.target)
    if found is None and isinstance(node.target, torch._ops.OpOverload):
        found = _BY_NAME.get(node.target._schema.name)
    return found


SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def size_of(node: Node):
    """The number that ``node`` computes (a size, or a value computed from sizes) as an int, float or sympy expression;
    None if it computes anything else.
    """
    value = node.meta.get("val")
    if isinstance(value, SYMBOLIC):
        return value.node.expr
    return value if isinstance(value, (int, float)) else None


def operator_name(node: Node) -> str:
    """The operator as users write it: ``aten::mm``, ``mylib::fancy``; higher-order operators by their name only."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    return str(getattr(target, "__name__", target))


def operands(node: Node) -> list[tuple[int, Node]]:
    """``(argument position, node)`` for every node among the arguments, lists flattened; keyword arguments get -1."""
    found: list[tuple[int, Node]] = []

    def walk(position: int, value: object) -> None:
        if isinstance(value, Node):
            found.append((position, value))
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(position, item)

    for position, value in enumerate(node.args):
        walk(position, value)
    for value in node.kwargs.values():
        walk(-1, value)
    return found


def linear_arguments(node: Node, positions: set[int]) -> frozenset[int] | None:
    """The argument set that covers ``positions`` and in which ``node`` is jointly linear; None if it is not linear.

    If the set is larger than ``positions``, the remaining arguments are additive: values there that do not depend on
    the state are added, not multiplied.
    """
    rule = rule_of(node)
    if rule is None:
        return None
    fitting = [s for s in rule.linear if positions <= s]
    return min(fitting, key=len) if fitting else None


def shape_of(node: Node) -> tuple | None:
    """Sizes as ints or sympy expressions: hashable, and comparing them adds no guard. None if not a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(map(as_written, value.shape))


def as_written(size: int | torch.SymInt) -> Any:
    """An int or a sympy expression: comparing a symbolic size directly would restrict the trace to it."""
    return size if isinstance(size, int) else size.node.expr


def dtype_of(node: Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def form_of(node: Node) -> tuple:
    """What two values must share so that one can replace the other in a program: shape and dtype; for a size, the
    number itself.
    """
    size = size_of(node)
    return (shape_of(node), dtype_of(node)) if size is None else ("size", size)


def is_heavy_operator(node: Node) -> bool:
    """Whether ``node`` is an operator that makes a block: a matrix product, a convolution, attention."""
    rule = rule_of(node)
    return rule is not None and rule.kind is Kind.HEAVY


def is_elementwise_edge(source: Node, node: Node, shapes: tuple[tuple | None, tuple | None] | None = None) -> bool:
    """Whether element i of ``node`` depends only on element i of ``source`` (up to a fixed change of shape).

    ``shapes`` are the shapes of the two at tracing time. They are given if the answer must not change later: torch may
    find out at any time that two symbolic sizes are equal.
    """
    rule = rule_of(node)
    if rule is None or rule.kind not in (E, L):
        return False
    before, after = shapes or (shape_of(source), shape_of(node))
    if before is None or after is None:
        return False
    if source.meta["val"].is_complex() != node.meta["val"].is_complex():
        return False  # a real number is not a multiple of a complex one
    if rule.kind is L and node.target is not aten.expand.default:
        return True
    added = len(after) - len(before)
    if added < 0 or any(size != 1 for size in after[:added]) or (added and rule.kind is E):
        return False
    hints = zip(_hints(source), _hints(node)[added:], strict=True)
    return all(a == b or _one_size(*pair) for a, b, pair in zip(before, after[added:], hints, strict=True))


def _one_size(before: int, after: int) -> bool:
    """Whether a symbolic size equals its counterpart in the result, written differently. A broadcast dimension has size
    1 before; for any other, torch has made sure that the size is that of the result.
    """
    return before == after != 1


def _hints(node: Node) -> list[int]:
    return [hint(size) for size in node.meta["val"].shape]


_ZERO_FILLS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_FILLS = {aten.full.default: 1, aten.scalar_tensor.default: 0, aten.full_like.default: 1, aten.new_full.default: 2}


def is_zero(value: object) -> bool:
    """Whether it is a literal 0 or a node that creates zeros."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value == 0
    if isinstance(value, Node) and value.op == "call_function":
        if value.target in _ZERO_FILLS:
            return True
        if value.target in _FILLS:
            fill = value.args[_FILLS[value.target]]
            return isinstance(fill, (int, float)) and fill == 0
        if value.target in (aten.expand.default, aten.view.default, aten.clone.default, aten.alias.default):
            return is_zero(value.args[0])
    return False
