"""Run a flat graph through Inductor's code, quickly and repeatedly.

What Inductor decides (fusion, in which memory a buffer lies, what is written in place of what) shows in its code and
not in the graph. ``torch.compile`` builds every kernel apart, which takes seconds each; here all kernels of several
graphs are one file, built once, without optimisation and without vector instructions.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import AsyncCompile, CppCodeCache, compile_step, inductor_config

# Options under which memory is never reused, so that results do not depend on where buffers lie.
APART: Mapping[str, Any] = {"inplace_buffers": False, "allow_buffer_reuse": False}

_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>"


def run_generated(root: fx.GraphModule, graph: fx.Graph, inputs: list[Any]) -> Any:
    """The results of ``graph``'s code, compiled as our backend compiles it.

    Raises AssertionError if the same code gives other results when memory is never reused: something was overwritten
    that was still needed. Only rounding may differ, because products depend on the alignment of memory.
    """
    with kernels_together():
        options = {"fx_graph_cache": False, "cpp.threads": 1, "cpp.simdlen": 1}
        as_ever, apart = (
            compile_step(_copy(root, graph), list(inputs), keeping_pieces({**options, **more})) for more in ({}, APART)
        )
        results, others = as_ever(list(inputs)), apart(list(inputs))
    assert_same(results, others)
    return results


def assert_same(results: Iterable[Any], apart: Iterable[Any]) -> None:
    """Results where memory is used again and where it is not, up to rounding."""
    for have, want in zip(results, apart, strict=True):
        if isinstance(have, Tensor):
            allowed = 1e3 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
            off = largest_difference(have, want)
            assert off <= allowed, f"off by {off:.1e} of the largest number where memory is used again"


def _copy(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return fx.GraphModule(root, copied)


@contextlib.contextmanager
def kernels_together() -> Iterator[None]:
    """Kernels of generated code that is loaded inside are built when the first of them is called, not optimised."""
    together = _Kernels()
    build = mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: together.add(types, source))
    # Not a flag among others: the headers that Inductor compiles once must be compiled as their users are.
    with build, inductor_config.patch({"aot_inductor.debug_compile": True}):
        yield


class _Kernels:
    """All kernels added since the last call are built as one library when the next of them is called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # source without the name -> name
        self.built: dict[str, Any] = {}

    def add(self, types: list[str], source: str) -> Callable[..., None]:
        """The kernel as a function of tensors and sizes."""
        name = self.names.setdefault(source, f"kernel_{len(self.names)}")
        converters = [_address if kind.rstrip().endswith("*") else ctypes.c_int64 for kind in types]

        def run(*arguments: Any) -> None:
            if name not in self.built:
                self._build()
            self.built[name](*(convert(argument) for convert, argument in zip(converters, arguments, strict=True)))

        return run

    def _build(self) -> None:
        new = {source: name for source, name in self.names.items() if name not in self.built}
        parts = [_INCLUDE]
        for source, name in new.items():
            body = source.replace(_INCLUDE, "")
            parts.append(re.sub(r"\bvoid\s+kernel\(", f"void {name}(", body, count=1))
            # Passed as the part to optimise, because Inductor precompiles its headers for that.
        library = CppCodeCache.load("", optimized_code="\n".join(parts))
        self.built.update((name, library[name]) for name in new.values())


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
