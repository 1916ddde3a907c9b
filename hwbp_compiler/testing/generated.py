"""Run a flat graph through Inductor's code, quickly and repeatedly.

Inductor's decisions (fusion, which memory a buffer uses, what is overwritten) show in its code and not in the graph.
``torch.compile`` builds every kernel separately, which takes seconds each. Here all kernels of several graphs are one
file, built once, without optimisation.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import AsyncCompile, CppCodeCache, compile_step

# Options under which memory is never reused, so that results do not depend on where buffers lie.
APART: Mapping[str, Any] = {"inplace_buffers": False, "allow_buffer_reuse": False}

_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>"


def run_generated(root: fx.GraphModule, graph: fx.Graph, inputs: list[Any]) -> Any:
    """The results of ``graph``'s code, compiled as our backend compiles it.

    Raises AssertionError if the same code gives other results when memory is never reused: something was overwritten
    that was still needed. Only rounding may differ, because products depend on the alignment of memory.
    """
    with _kernels_together():
        options = {"fx_graph_cache": False, "cpp.threads": 1}
        as_ever, apart = (
            compile_step(_copy(root, graph), list(inputs), keeping_pieces({**options, **more})) for more in ({}, APART)
        )
    results, others = as_ever(list(inputs)), apart(list(inputs))
    for have, want in zip(results, others, strict=True):
        if isinstance(have, Tensor):
            allowed = 1e3 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
            off = largest_difference(have, want)
            assert off <= allowed, f"off by {off:.1e} of the largest number where memory is used again"
    return results


def _copy(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return fx.GraphModule(root, copied)


@contextlib.contextmanager
def _kernels_together() -> Iterator[None]:
    """Kernels of generated code that is loaded inside are built when the first of them is called."""
    together = _Kernels()
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: together.add(types, source)):
        yield


class _Kernels:
    def __init__(self) -> None:
        self.sources: dict[str, str] = {}  # source without the name -> name
        self.library: Any = None

    def add(self, types: list[str], source: str) -> Callable[..., None]:
        """The kernel as a function of tensors and sizes."""
        name = self.sources.setdefault(source, f"kernel_{len(self.sources)}")
        converters = [_address if kind.rstrip().endswith("*") else ctypes.c_int64 for kind in types]

        def run(*arguments: Any) -> None:
            function = self.built()[name]
            function(*(convert(argument) for convert, argument in zip(converters, arguments, strict=True)))

        return run

    def built(self) -> Any:
        if self.library is None:
            parts = [_INCLUDE]
            for source, name in self.sources.items():
                body = source.replace(_INCLUDE, "")
                parts.append(re.sub(r"\bvoid\s+kernel\(", f"void {name}(", body, count=1))
            # Passed as the part to optimise, because Inductor precompiles its headers for that.
            self.library = CppCodeCache.load("", optimized_code="\n".join(parts), extra_flags=("-O0",))
        return self.library


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The difference relative to the largest number; infinite if only one of the two is finite somewhere."""
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite):
        return float("inf")
    difference = (one.double() - other.double())[finite].abs()
    scale = other.double()[finite].abs()
    return float(difference.max() / scale.max()) if bool(difference.any()) else 0.0
