"""The CPU implementation: ``linear_scan.cpp``, built for a dtype on first use as Inductor builds its own kernels.

Nothing needs to be installed beyond what ``torch.compile`` needs on a CPU, and the library is kept in Inductor's
cache directory. Where it cannot be built, the scan in torch operators takes over, with one logged warning.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .fallback import linear_scan_torch
from .reference import spread

log = logging.getLogger("hwbp_compiler")

_SOURCE = Path(__file__).with_name("linear_scan.cpp")

# What the source calls each dtype. One dtype is built at a time: a second or two instead of ten.
_TYPES = {
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "float",
    torch.float64: "double",
    torch.complex64: "Complex<float>",
    torch.complex128: "Complex<double>",
}


def linear_scan_cpu(
    values: Tensor, multipliers: Tensor | None, reverse: bool = False, initial: Tensor | None = None
) -> Tensor:
    """``torch.ops.highway.linear_scan`` on CPU tensors; the output is contiguous and new."""
    out = values.new_empty((values.shape[0] + (initial is not None), *values.shape[1:]))
    _scan(values, multipliers, initial, out, reverse)
    return out


def linear_scan_out(values: Tensor, multipliers: Tensor | None, reverse: bool, *, out: Tensor) -> None:
    """The same into ``out``, contiguous and apart from the inputs. Compiled graphs call this by name."""
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
        out.copy_(initial)  # the only row there is
        return
    kernel = load(values.dtype)
    if kernel is None:
        out.copy_(linear_scan_torch(values, multipliers, reverse, initial))
        return
    # A complex tensor may be a view that only says "conjugate", which a pointer does not.
    initial = None if initial is None else initial.resolve_conj().contiguous()
    if not _launch(kernel, values, multipliers, initial, out, reverse):
        # The kernel wants neighbours in the last dimension, and few dimensions that do not merge.
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


@functools.cache
def load(dtype: torch.dtype) -> Callable[..., bool] | None:
    """The compiled kernel for ``dtype``, or None (logged once) where it cannot be built."""
    try:
        return _build(dtype)
    except Exception as error:  # whatever a missing or broken compiler raises
        _warn_once(_first_line(error))
        log.debug("linear_scan: building the CPU kernel failed", exc_info=True)
        return None


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("linear_scan: no CPU kernel, using torch operators instead: %s", reason)


def _build(dtype: torch.dtype) -> Callable[..., bool]:
    # CppCodeCache compiles with the compiler and flags of Inductor's CPU
    # kernels, under a lock, into Inductor's cache directory, and returns a ctypes library.
    from hwbp_compiler.torch_private import CppCodeCache

    # Inductor switches fused multiply-add off to match eager mode; a scan has nothing to match. The loops are
    # written out in vectors, and -O3 finds nothing more in them for half as much compile time again.
    flags = () if sys.platform == "win32" else ("-O2", "-ffp-contract=fast")
    source = f"#define HIGHWAY_TYPE {_TYPES[dtype]}\n{_SOURCE.read_text()}"
    library = CppCodeCache.load(source, extra_flags=flags)
    # PyDLL keeps the interpreter lock, which making a Python object needs.
    maker = ctypes.PyDLL(library._name, handle=library._handle).highway_linear_scan
    maker.restype = ctypes.py_object
    maker.argtypes = []
    kernel: Callable[..., bool] = maker()
    return kernel


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
