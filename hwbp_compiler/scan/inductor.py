"""How Inductor compiles ``torch.ops.highway.linear_scan``: Triton code on a GPU, the C++ kernel on a CPU.

:func:`register` tells Inductor once per process; a graph without the operator is compiled as ever.

Note [The scan on a GPU]
Inductor has a scan of its own (it compiles ``cumsum`` with it): a loop node with a combine function, from which
it generates ``tl.associative_scan``. Ours scans pairs ``(product of multipliers, u)``, of which only u is stored:

    (p, u) then (q, v)  is  (p * q, q * u + v)

What computes the inputs is inlined into the loads, so a gate's sigmoid or an added gradient costs no kernel.
A reverse scan runs through the same loop with rows counted from the end, in its loads and in its store.

Note [Few columns on a GPU]
One program scans all links of its columns, so few columns occupy few multiprocessors. The links are then cut
into blocks: one kernel reduces each block to its pair, one scans the pairs, one scans the blocks from their true
carries. This reads the inputs twice and writes once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

# Private, checked on torch 2.13.0.
from torch._inductor import ir
from torch._inductor.codegen.common import BackendFeature
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.runtime.hints import DeviceProperties, ReductionHint
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import CeilDiv

from .checks import accumulator
from .operator import operator

Index = Sequence[sympy.Expr]
Loader = Callable[[Index], Any]

_LONG = 2048  # links; shorter scans are not worth three kernels
_COLUMNS_PER_MULTIPROCESSOR = 32  # fewer leave multiprocessors idle


@functools.cache
def register() -> None:
    """Teach Inductor the operator. Idempotent, and without effect on graphs that do not contain it."""
    register_lowering(operator, type_promotion_kind=None)(lower)


def lower(values: ir.TensorBox, multipliers: ir.TensorBox | None, reverse: bool = False) -> Any:
    device = values.get_device()
    if device.type == "cpu" and not V.graph.cpp_wrapper:
        return CpuScan.create(values, multipliers, reverse)
    if not {BackendFeature.SCAN, BackendFeature.TUPLE_REDUCTION} <= _features(device):
        return _as_operator(values, multipliers, reverse)
    scan = _Scan(values, multipliers, reverse)
    return scan.in_blocks() if scan.is_narrow() else scan.whole()


def _features(device: torch.device) -> set[BackendFeature]:
    return {feature for feature in BackendFeature if V.graph.has_feature(device, feature)}


def _as_operator(values: Any, multipliers: Any, reverse: bool) -> Any:
    """A call of the operator, as for any operator Inductor does not know."""
    return fallback_handler(operator, add_to_fallback_set=False)(values, multipliers, reverse)


class CpuScan(ir.ExternKernelOut):
    """A call of the C++ kernel in the generated Python, past the dispatcher and into a buffer of Inductor's."""

    @classmethod
    def create(cls, values: ir.TensorBox, multipliers: ir.TensorBox | None, reverse: bool) -> ir.TensorBox:
        from .cpu import load

        load(values.get_dtype())  # build it while compiling rather than in the first step
        inputs = [cls.realize_input(tensor) for tensor in (values, multipliers) if tensor is not None]
        return ir.TensorBox.create(
            cls(
                layout=ir.FixedLayout(values.get_device(), values.get_dtype(), values.get_size()),
                inputs=inputs,
                constant_args=(reverse,) if multipliers is not None else (None, reverse),
                python_kernel_name="linear_scan_out",
                op_overload=operator,
            )
        )

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once("from hwbp_compiler.scan.cpu import linear_scan_out")
        super().codegen(wrapper)


class _Scan:
    """One lowering of the operator: loaders by row and column, in the dtype to compute in."""

    def __init__(self, values: ir.TensorBox, multipliers: ir.TensorBox | None, reverse: bool) -> None:
        self.device = values.get_device()
        self.dtype = values.get_dtype()
        self.compute = accumulator(self.dtype)
        self.reverse = reverse
        self.size = list(values.get_size())
        self.length, self.columns = self.size[0], self.size[1:]
        self.value = self._loader(values, range(len(self.size)))
        self.multiplier = None
        if multipliers is not None:
            # Dimensions of size one stay at index zero; the missing ones of a 0-d or 1-d tensor are not there.
            spread = [
                d if not V.graph.sizevars.statically_known_equals(size, 1) else None
                for d, size in enumerate(multipliers.get_size())
            ]
            self.multiplier = self._loader(multipliers, spread)

    def _loader(self, tensor: ir.TensorBox, dims: Sequence[int | None]) -> Loader:
        load = tensor.make_loader()

        def at(index: Index) -> Any:
            return ops.to_dtype(load([index[d] if d is not None else sympy.S.Zero for d in dims]), self.compute)

        return at

    def row(self, step: sympy.Expr) -> sympy.Expr:
        """The row a step of the scan is about."""
        return self.length - 1 - step if self.reverse else step

    def whole(self) -> ir.TensorBox:
        """One kernel, in which a program walks down all links of its columns."""
        return self._scan(
            self.size,
            axis=0,
            value=self.value,
            multiplier=self.multiplier,
            place=lambda index: [self.row(index[0]), *index[1:]],
        )

    def _scan(
        self,
        size: Sequence[sympy.Expr],
        axis: int,
        value: Loader,
        multiplier: Loader | None,
        place: Callable[[Index], Index],
        dtype: torch.dtype | None = None,
    ) -> ir.TensorBox:
        """A buffer of ``size`` whose element ``place(index)`` is the scan along ``axis`` up to ``index``.

        The loaders are called with ``place(index)``.
        """

        def reindex(index: Index, step: Index) -> Index:
            return place([*index[:axis], *step, *index[axis:]])

        loaders = (value,) if multiplier is None else (value, multiplier)
        box = ir.TensorBox.create(
            ir.Scan(
                device=self.device,
                dtype=dtype or self.dtype,
                dtypes=(self.compute,) * len(loaders),
                inner_fn=value,
                inner_fns=loaders,
                size=list(size),
                ranges=[*size[:axis], *size[axis + 1 :]],
                scan_ranges=[size[axis]],
                combine_fn=_combine_sums if multiplier is None else _combine,
                reindex=reindex,
                reduction_hint=ReductionHint.DEFAULT,
                output_index=0,
            )
        )
        box.realize()
        return box

    def is_narrow(self) -> bool:
        hint = V.graph.sizevars.optimization_hint
        length, columns = hint(self.length), hint(math.prod(self.columns))
        multiprocessors = DeviceProperties.create(self.device).multi_processor_count
        return length >= _LONG and columns < _COLUMNS_PER_MULTIPROCESSOR * multiprocessors

    def in_blocks(self) -> ir.TensorBox:
        raise NotImplementedError


def _combine(before: tuple[Any, Any], after: tuple[Any, Any]) -> tuple[Any, Any]:
    (u, p), (v, q) = before, after
    # A product of multipliers can overflow where the state it multiplies is zero.
    carried = ops.where(ops.eq(u, ops.constant(0.0, torch.float32)), u, ops.mul(q, u))
    return ops.add(carried, v), ops.mul(p, q)


def _combine_sums(before: tuple[Any], after: tuple[Any]) -> tuple[Any]:
    return (ops.add(before[0], after[0]),)
