"""The CPU implementation: ``linear_scan.cpp``. If it cannot be built, the scan in torch operators is used."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hwbp_compiler.engine.native import NativeKernel

from .fallback import linear_scan_torch
from .reference import spread


def _taken(library: Any) -> Callable[..., bool]:
    # PyDLL keeps the interpreter lock, which is needed to create a Python object.
    maker = ctypes.PyDLL(library._name, handle=library._handle).highway_linear_scan
    maker.restype = ctypes.py_object
    maker.argtypes = []
    kernel: Callable[..., bool] = maker()
    return kernel


native = NativeKernel(
    Path(__file__).with_name("linear_scan.cpp"),
    {
        torch.float16: "Half",
        torch.bfloat16: "BFloat16",
        torch.float32: "float",
        torch.float64: "double",
        torch.complex64: "Complex<float>",
        torch.complex128: "Complex<double>",
    },
    _taken,
    without="linear_scan: no CPU kernel, using torch operators instead",
)


def linear_scan_cpu(
    values: Tensor, multipliers: Tensor | None, reverse: bool = False, initial: Tensor | None = None
) -> Tensor:
    """``torch.ops.highway.linear_scan`` on CPU tensors. The output is new and contiguous."""
    out = values.new_empty((values.shape[0] + (initial is not None), *values.shape[1:]))
    _scan(values, multipliers, initial, out, reverse)
    return out


def linear_scan_out(values: Tensor, multipliers: Tensor | None, reverse: bool, *, out: Tensor) -> None:
    """The same, written into ``out``, which is contiguous and separate from the inputs. Compiled graphs call this by
    name.
    """
    _scan(values, multipliers, None, out, reverse)


def linear_scan_from_out(
    values: Tensor, initial: Tensor, multipliers: Tensor | None, reverse: bool, *, out: Tensor
) -> None:
    """The same from an initial state, which is a row of ``out``. Compiled graphs call this by name."""
    _scan(values, multipliers, initial, out, reverse)


def _scan(values: Tensor, multipliers: Tensor | None, initial: Tensor | None, out: Tensor, reverse: bool) -> None:
    if out.numel() == 0:
        return
    if values.shape[0] == 0:
        out.copy_(initial)  # the only row
        return
    kernel = native.load(values.dtype)
    if kernel is None:
        out.copy_(linear_scan_torch(values, multipliers, reverse, initial))
        return
    # A complex tensor may be a lazily conjugated view, which its pointer does not show.
    initial = None if initial is None else initial.resolve_conj().contiguous()
    if not _launch(kernel, values, multipliers, initial, out, reverse):
        # The kernel needs neighbouring elements in the last dimension, and few dimensions that do not merge.
        values = values.contiguous()
        if multipliers is not None:
            multipliers = spread(multipliers, values).expand_as(values).contiguous()
        taken = _launch(kernel, values, multipliers, initial, out, reverse)
        assert taken, "the kernel takes any contiguous tensors"


def _launch(
    kernel: Callable[..., bool],
    values: Tensor,
    multipliers: Tensor | None,
    initial: Tensor | None,
    out: Tensor,
    reverse: bool,
) -> bool:
    if multipliers is None:
        pointer, shape, stride = 0, None, None
    else:
        pointer, shape, stride = multipliers.data_ptr(), multipliers.shape, multipliers.stride()
    return kernel(
        values.data_ptr(),
        pointer,
        0 if initial is None else initial.data_ptr(),
        out.data_ptr(),
        values.shape,
        values.stride(),
        shape,
        stride,
        reverse,
        torch.get_num_threads(),
    )
