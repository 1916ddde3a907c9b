"""How Inductor compiles ``torch.ops.highway.linear_scan``: Triton code on a GPU, the C++ kernel on a CPU.

:func:`register` registers the operator with Inductor once per process. Graphs without the operator compile as before.

Note [The scan on a GPU]
~~~~~~~~~~~~~~~~~~~~~~~~
Inductor has a scan of its own, which it uses to compile ``cumsum``: a loop node with a combine function, from which it
generates ``tl.associative_scan``. Ours scans pairs ``(product of multipliers, u)`` and stores only u:

    (p, u) then (q, v)  is  (p * q, q * u + v)

The computation of the inputs is inlined into the loads, so a gate's sigmoid or an added gradient costs no kernel. Every
element is loaded once. So two things that Inductor would normally write to memory first are inlined too, if only the
scan reads them: expensive computations, and concatenations (of the links' rows with that of the chain's head). A
reverse scan uses the same loop, with rows counted from the end in its loads and in its store.

Note [Few columns on a GPU]
~~~~~~~~~~~~~~~~~~~~~~~~~~~
One program scans all links of its columns, so with few columns most multiprocessors are idle. The links are then cut
into blocks: one kernel reduces each block to its pair, one scans the pairs, and one scans the blocks from their true
carries. This reads the inputs twice and writes once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from hwbp_compiler.stack import cat
from hwbp_compiler.torch_private import (
    BackendFeature,
    CeilDiv,
    DeviceProperties,
    ReductionHint,
    V,
    fallback_handler,
    ir,
    lowerings,
    ops,
    pointwise_cat,
    register_lowering,
)

from .checks import accumulator
from .operator import operator

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default)

Index = Sequence[sympy.Expr]
Loader = Callable[[Index], Any]

_NEEDED = (BackendFeature.SCAN, BackendFeature.TUPLE_REDUCTION)
_LONG = 2048  # links; shorter scans are not worth three kernels
_COLUMNS_PER_MULTIPROCESSOR = 32  # fewer leave multiprocessors idle


@functools.cache
def register() -> None:
    """Register the operator with Inductor. Safe to call repeatedly; has no effect on graphs that do not contain it."""
    register_lowering(operator, type_promotion_kind=None)(lower)
    lowerings[aten.cat.default] = _concatenations_in_loads(lowerings[aten.cat.default])
    register_lowering(cat, type_promotion_kind=None)(_lower_cat)


def lower(
    values: ir.TensorBox,
    multipliers: ir.TensorBox | None,
    reverse: bool = False,
    initial: ir.TensorBox | None = None,
) -> Any:
    device = values.get_device()
    # Inductor generates no complex arithmetic. Also, a complex tensor may be a lazily conjugated view, which only the
    # dispatcher resolves.
    if values.get_dtype().is_complex:
        return _as_operator(values, multipliers, reverse, initial)
    if device.type == "cpu" and not V.graph.cpp_wrapper:
        return CpuScan.create(values, multipliers, reverse, initial)
    if not all(V.graph.has_feature(device, feature) for feature in _NEEDED):
        return _as_operator(values, multipliers, reverse, initial)
    scan = _Scan(values, multipliers, reverse, initial)
    return scan.in_blocks() if scan.is_narrow() else scan.whole()


def _lower_cat(tensors: Sequence[ir.TensorBox], dim: int = 0) -> Any:
    """See Note [A concatenation with memory of its own]."""
    device = tensors[0].get_device()
    if device.type == "cpu" or any(t.get_dtype() != tensors[0].get_dtype() for t in tensors):
        return fallback_handler(cat, add_to_fallback_set=False)(tensors, dim)
    return pointwise_cat(tensors, dim % len(tensors[0].get_size()))


def _as_operator(values: Any, multipliers: Any, reverse: bool, initial: Any) -> Any:
    """A plain call of the operator, as for any operator that Inductor does not know."""
    return fallback_handler(operator, add_to_fallback_set=False)(values, multipliers, reverse, initial)


class CpuScan(ir.ExternKernelOut):
    """A call of the C++ kernel in the generated Python. It bypasses the dispatcher and writes into a buffer of
    Inductor's.
    """

    @classmethod
    def create(
        cls,
        values: ir.TensorBox,
        multipliers: ir.TensorBox | None,
        reverse: bool,
        initial: ir.TensorBox | None,
    ) -> ir.TensorBox:
        from .cpu import native

        native.load(values.get_dtype())  # build it while compiling, not in the first step
        inputs = [cls.realize_input(tensor) for tensor in (values, initial, multipliers) if tensor is not None]
        return ir.TensorBox.create(
            cls(
                layout=ir.FixedLayout(values.get_device(), values.get_dtype(), _size(values, initial)),
                inputs=inputs,
                constant_args=(reverse,) if multipliers is not None else (None, reverse),
                python_kernel_name="linear_scan_out" if initial is None else "linear_scan_from_out",
                op_overload=operator,
            )
        )

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once(f"from hwbp_compiler.scan.cpu import {self.python_kernel_name}")
        super().codegen(wrapper)


def _size(values: ir.TensorBox, initial: ir.TensorBox | None) -> list[sympy.Expr]:
    length, *columns = values.get_size()
    return [length if initial is None else length + 1, *columns]


class _Scan:
    """One lowering of the operator. Loaders take row and column, and return a value in the compute dtype."""

    def __init__(
        self,
        values: ir.TensorBox,
        multipliers: ir.TensorBox | None,
        reverse: bool,
        initial: ir.TensorBox | None,
    ) -> None:
        self.device = values.get_device()
        self.dtype = values.get_dtype()
        self.compute = accumulator(self.dtype)
        self.reverse = reverse
        self.size = _size(values, initial)
        if not self.is_narrow():
            node = V.current_node
            named = dict(zip(("values", "multipliers", "reverse", "initial"), node.args, strict=False)) | node.kwargs
            values = _computed_in_loads(named["values"], values)
            multipliers = None if multipliers is None else _computed_in_loads(named["multipliers"], multipliers)
        self.value = self._loader(values)
        self.multiplier = None if multipliers is None else self._loader(multipliers)
        if initial is not None:
            self._start_from(initial)

    def _loader(self, tensor: ir.TensorBox) -> Loader:
        load = tensor.make_loader()
        # A multiplier is broadcast over dimensions that it lacks, or in which it has size one.
        spread = [V.graph.sizevars.statically_known_equals(size, 1) for size in tensor.get_size()]

        def at(index: Index) -> Any:
            own = [sympy.S.Zero if one else i for i, one in zip(index, spread, strict=False)]
            return ops.to_dtype(load(own), self.compute)

        return at

    def _start_from(self, initial: ir.TensorBox) -> None:
        """Row 0 (or the last in reverse) is ``initial``; its multiplier has nothing to multiply."""
        load, value, multiplier = initial.make_loader(), self.value, self.multiplier
        start = self.size[0] - 1 if self.reverse else sympy.S.Zero

        def link(index: Index) -> Index:
            return index if self.reverse else [index[0] - 1, *index[1:]]

        def with_start(index: Index) -> Any:
            first = _where(index[0], "==", start, lambda: ops.to_dtype(load(index[1:]), self.compute))
            return ops.where(
                _compared(index[0], "==", start), first, _where(index[0], "!=", start, lambda: value(link(index)))
            )

        self.value = with_start
        if multiplier is not None:
            self.multiplier = lambda index: _where(index[0], "!=", start, lambda: multiplier(link(index)))

    def whole(self) -> ir.TensorBox:
        """One kernel, in which each program walks through all links of its columns."""
        return self._scan(self.size, 0, self.value, self.multiplier, self.dtype, self.reverse)

    def is_narrow(self) -> bool:
        hint = V.graph.sizevars.optimization_hint
        length, columns = hint(self.size[0]), hint(math.prod(self.size[1:]))
        multiprocessors = DeviceProperties.create(self.device).multi_processor_count
        return length >= _LONG and columns < _COLUMNS_PER_MULTIPROCESSOR * multiprocessors

    def in_blocks(self) -> ir.TensorBox:
        """Three kernels that share the work along the length. See Note [Few columns on a GPU]."""
        length, *columns = self.size
        block = sympy.Integer(1 << V.graph.sizevars.optimization_hint(length).bit_length() // 2)
        blocks = CeilDiv(length, block)
        size = [blocks, block, *columns]
        whole_blocks = V.graph.sizevars.statically_known_equals(blocks * block, length)
        first = block - 1 if self.reverse else sympy.S.Zero

        def within(load: Loader, index: Index) -> Any:
            """An element by block, row in the block, and column; zero beyond the last row."""
            row = index[0] * block + index[1]
            at = [row, *index[2:]]
            return load(at) if whole_blocks else _where(row, "<", length, lambda: load(at))

        def value(index: Index) -> Any:
            return within(self.value, index)

        def multiplier(index: Index) -> Any:
            assert self.multiplier is not None
            return within(self.multiplier, index)

        factor = None if self.multiplier is None else multiplier
        ends = self._block_ends(size, value, factor)
        carries = self._scan([blocks, *columns], 0, *ends, self.compute, self.reverse).make_loader()

        def value_and_carry(index: Index) -> Any:
            b, row, *column = index
            before = b + 1 if self.reverse else b - 1

            def carry() -> Any:
                state = carries([before, *column])
                return state if factor is None else _times(factor(index), state)

            def carry_unless_first_block() -> Any:
                return _where(before, "<", blocks, carry) if self.reverse else _where(before, ">=", 0, carry)

            return ops.add(value(index), _where(row, "==", first, carry_unless_first_block))

        padded = self._scan(size, 1, value_and_carry, factor, self.dtype, self.reverse)
        rows = ir.View.create(padded.data, [blocks * block, *columns])
        return ir.TensorBox(ir.SliceView.create(rows, 0, 0, length))

    def _block_ends(
        self, size: list[sympy.Expr], value: Loader, multiplier: Loader | None
    ) -> tuple[Loader, Loader | None]:
        """Loaders for each block's last state, scanned from zero, and for the product of its multipliers."""
        blocks, block, *columns = size

        def sum_rows(term: Loader) -> Loader:
            box = ir.Reduction.create(
                device=self.device,
                dst_dtype=self.compute,
                src_dtype=self.compute,
                inner_fn=lambda index, row: term([index[0], *row, *index[1:]]),
                ranges=[blocks, *columns],
                reduction_ranges=[block],
                reduction_type="sum",
            )
            box.realize()
            return box.make_loader()

        if multiplier is None:
            return sum_rows(value), None

        # Selecting the last step by a sum fuses it into the scan kernel, which then need not store its steps. This
        # works only if both count in the same direction, so steps are not converted back into rows here.
        def in_steps(load: Loader) -> Loader:
            if not self.reverse:
                return load
            return lambda index: load([index[0], block - 1 - index[1], *index[2:]])

        def end_of(output: int) -> Loader:
            scan = self._scan(
                size, 1, in_steps(value), in_steps(multiplier), self.compute, reverse=False, output=output
            )
            steps = scan.make_loader()
            return sum_rows(lambda index: _where(index[1], "==", block - 1, lambda: steps(index), mask=False))

        return end_of(0), end_of(1)

    def _scan(
        self,
        size: Sequence[sympy.Expr],
        axis: int,
        value: Loader,
        multiplier: Loader | None,
        dtype: torch.dtype,
        reverse: bool,
        output: int = 0,
    ) -> ir.TensorBox:
        """A buffer of ``size`` with the scan along ``axis`` (``output=1``: the running product of multipliers).

        The kernel's own index counts steps; loads and the store convert it to rows.
        """

        def reindex(index: Index, step: Index) -> Index:
            row = size[axis] - 1 - step[0] if reverse else step[0]
            return [*index[:axis], row, *index[axis:]]

        loaders = (value,) if multiplier is None else (value, multiplier)
        box = ir.TensorBox.create(
            ir.Scan(
                device=self.device,
                dtype=dtype,
                dtypes=(self.compute,) * len(loaders),
                inner_fn=loaders[output],
                inner_fns=loaders,
                size=list(size),
                ranges=[*size[:axis], *size[axis + 1 :]],
                scan_ranges=[size[axis]],
                combine_fn=_combine_sums if multiplier is None else _combine,
                reindex=reindex,
                reduction_hint=ReductionHint.DEFAULT,
                output_index=output,
            )
        )
        box.realize()
        return box


def _computed_in_loads(node: torch.fx.Node, tensor: ir.TensorBox) -> ir.TensorBox:
    """``tensor``, the value of ``node``, computed on load instead of from its buffer, if only the current node reads
    it.
    """
    below = node
    while below.target in _VIEWS and len(below.users) == 1:
        below = below.args[0]
    storage = tensor.data.data if below is not node and isinstance(tensor.data, ir.BaseView) else tensor.data
    if len(below.users) > 1 or not isinstance(storage, ir.StorageBox):
        return tensor
    buffer = storage.data
    if not (isinstance(buffer, ir.ComputedBuffer) and isinstance(buffer.data, ir.Pointwise)):
        return tensor
    # The buffer may share memory with another tensor, or its inputs may have changed since it was computed.
    owned = type(buffer.layout) in (ir.FlexibleLayout, ir.FixedLayout)
    if not owned or any(name in V.graph.mutated_buffers for name in buffer.get_read_names()):
        return tensor
    computed = ir.TensorBox.create(buffer.data)  # the unused buffer is dropped
    return computed if below is node else ir.TensorBox(ir.View.create(computed.data, tensor.get_size()))


def _concatenations_in_loads(lower_cat: Callable[..., Any]) -> Callable[..., Any]:
    """The lowering of ``aten.cat``, except that concatenations read only by scans on a GPU are computed on load."""

    @functools.wraps(lower_cat)
    def lower(tensors: Sequence[ir.TensorBox], dim: int = 0) -> Any:
        node = V.current_node
        if (
            not _only_scans_read(node)
            or any(tensor.get_dtype() != tensors[0].get_dtype() for tensor in tensors)
            or not all(V.graph.has_feature(tensors[0].get_device(), feature) for feature in _NEEDED)
        ):
            return lower_cat(tensors, dim)
        pieces = [_computed_in_loads(piece, tensor) for piece, tensor in zip(node.args[0], tensors, strict=True)]
        return pointwise_cat(pieces, dim % len(tensors[0].get_size()))

    return lower


def _only_scans_read(node: torch.fx.Node) -> bool:
    def scans(user: torch.fx.Node) -> bool:
        return user.target is operator or (user.target in (aten.cat.default, cat, *_VIEWS) and _only_scans_read(user))

    return bool(node.users) and all(map(scans, node.users))


def _combine(before: tuple[Any, Any], after: tuple[Any, Any]) -> tuple[Any, Any]:
    (u, p), (v, q) = before, after
    return ops.add(_times(q, u), v), ops.mul(p, q)


def _combine_sums(before: tuple[Any], after: tuple[Any]) -> tuple[Any]:
    return (ops.add(before[0], after[0]),)


def _times(product: Any, state: Any) -> Any:
    """``product * state``, or zero if the state is zero. A product of many multipliers can overflow, and infinity times
    zero would not be a number, while the scan link by link stays finite.
    """
    return ops.where(ops.eq(state, ops.constant(0.0, torch.float32)), state, ops.mul(product, state))


def _where(left: Any, relation: str, right: Any, then: Callable[[], Any], mask: bool = True) -> Any:
    """``then()`` if the index expressions compare as given, else zero. With ``mask``, nothing is loaded elsewhere."""
    condition = _compared(left, relation, right)
    if mask:
        return ops.masked(condition, then, 0.0)
    return ops.where(condition, then(), ops.constant(0.0, torch.float32))


def _compared(left: Any, relation: str, right: Any) -> Any:
    compare = {"<": ops.lt, ">=": ops.ge, "==": ops.eq, "!=": ops.ne}[relation]
    left, right = (ops.index_expr(sympy.sympify(side), torch.int64) for side in (left, right))
    return compare(left, right)
