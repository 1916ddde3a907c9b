"""Run a flat graph with Inductor's code, fast enough to do it for many graphs.

Only the generated code shows what Inductor decides: what it fuses, which memory a buffer uses, and which buffer is
overwritten by another. ``torch.compile`` builds each kernel separately, which takes seconds. Here the kernels of
several graphs are built together as one file, without optimisation and without vector instructions.
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
    """Compile ``graph`` as our backend compiles it, run the code, and return its results.

    Raises AssertionError if the results change when memory is never reused, because then the code has overwritten
    something that was still needed. Rounding may differ, because matrix products depend on the alignment of memory.
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
    """Assert that ``results``, computed with reused memory, equal those computed ``apart``, except for rounding."""
    for have, want in zip(results, apart, strict=True):
        if isinstance(have, Tensor):
            allowed = 1e3 * torch.finfo(want.dtype).eps if want.is_floating_point() else 0.0
            off = largest_difference(have, want)
            assert off <= allowed, f"off by {off:.1e} of the largest number when memory is reused"


def _copy(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    return fx.GraphModule(root, copied)


@contextlib.contextmanager
def kernels_together() -> Iterator[None]:
    """A context for loading generated code. All its kernels are built together at the first call, not optimised."""
    together = _Kernels()
    build = mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: together.add(types, source))
    # Not given as a compiler flag: the headers that Inductor compiles once need the same settings as the kernels.
    with build, inductor_config.patch({"aot_inductor.debug_compile": True}):
        yield


class _Kernels:
    """All kernels added since the last call are built as one library when the next of them is called."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # source without the name -> name
        self.built: dict[str, Any] = {}

    def add(self, types: list[str], source: str) -> Callable[..., None]:
        """Return the kernel as a function of tensors and sizes."""
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
            # Passed as optimized_code: only for this part does Inductor use its precompiled headers.
        library = CppCodeCache.load("", optimized_code="\n".join(parts))
        self.built.update((name, library[name]) for name in new.values())


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number. Infinite where only one of the two is finite."""
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite):
        return float("inf")
    difference = (one.double() - other.double())[finite].abs()
    scale = other.double()[finite].abs()
    return float(difference.max() / scale.max()) if bool(difference.any()) else 0.0
