"""The C++ kernels of recurrent modules on a CPU: how ``gru.cpp`` and ``runs.cpp`` are built and called."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hwbp_compiler.engine.native import NativeKernel

HERE = Path(__file__).parent
ADDRESS, NUMBER, FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


def native_kernel(source: str, function: str, arguments: Sequence[Any], without: str) -> NativeKernel:
    """``function`` of ``source`` as a kernel. It takes ``arguments``, returns nothing, and includes ``product.h``."""

    def taken(library: Any) -> Callable[..., Any]:
        found: Any = getattr(library, function)
        found.argtypes, found.restype = list(arguments), None
        return found  # type: ignore[no-any-return]

    types = {torch.float32: "float", torch.float64: "double"}
    before = [HERE / "product.h"]
    return NativeKernel(HERE / source, types, taken, without, level=logging.INFO, before=before)
