"""Run a flat graph with Inductor's code, fast enough to do it for many graphs.

Only the generated code shows what Inductor decides: what it fuses, which memory a buffer uses, and which buffer is
overwritten by another. ``torch.compile`` builds each kernel separately, which takes seconds. Here the kernels of
several graphs are built together as one file, without optimisation and without vector instructions. Most of the
compiler's time goes into what every file includes.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import AFTER_FUSION, AsyncCompile, CppCodeCache, compile_step, inductor_config

# Options under which memory is never reused, so that results do not depend on where buffers lie.
APART: Mapping[str, Any] = {"inplace_buffers": False, "allow_buffer_reuse": False}

_INCLUDE = "#include <torch/csrc/inductor/cpp_prefix.h>"


def run_generated(root: fx.GraphModule, graph: fx.Graph, inputs: list[Any]) -> Any:
    """Compile ``graph`` as our backend compiles it, run the code, and return its results.

    Raises AssertionError if the results change when memory is never reused, because then the code has overwritten
    something that was still needed. Rounding may differ, because matrix products depend on the alignment of memory.
    """
    options = {"fx_graph_cache": False, "cpp.threads": 1, "cpp.simdlen": 1}
    with Twin() as twin:
        with kernels_together() as kernels:
            choices = keeping_pieces({**options, AFTER_FUSION: twin.fork})
            compiled = compile_step(_copy(root, graph), list(inputs), choices)
        twin.build(kernels)
        results = compiled(list(inputs))
        apart = twin.results(results)
    assert_same(results, apart)
    return results


class Twin:
    """A second process that finishes the same compilation with memory that is never reused.

    Inductor decides about memory only after it has lowered and fused the graph, and that takes most of the time. So
    the process is forked there. It leaves the context with the results, or with its exception.
    """

    def __init__(self) -> None:
        self.pid: int | None = None

    def __enter__(self) -> Twin:
        return self

    def fork(self, nodes: list[Any]) -> list[Any]:
        """Called with Inductor's kernels when they are fused. Those of nested graphs come later."""
        if self.pid is None:
            self.other, mine = multiprocessing.Pipe()
            self.pid = os.fork()
            if self.pid == 0:
                self.other.close()
                self.other = mine
                inductor_config.patch(APART).__enter__()
            else:
                mine.close()
        return nodes

    def build(self, kernels: Kernels) -> None:
        """Build the kernels of both processes as one library."""
        assert self.pid is not None, "Inductor has fused no kernels"
        if self.pid == 0:
            self.other.send(kernels.sources)
            kernels.load(self.other.recv())
        else:
            library = builder.get()({**kernels.sources, **self._received()})
            self.other.send(library)
            kernels.load(library)

    def results(self, results: Any) -> Any:
        """Return the results of the second process. In that process, send ``results`` and end."""
        if self.pid == 0:
            self._send(results)
        return self._received()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.pid == 0:
            self._send("".join(traceback.format_exception(error)))
        if self.pid is not None:
            self.other.close()
            os.waitpid(self.pid, 0)

    def _received(self) -> Any:
        received = self.other.recv()
        if isinstance(received, str):
            raise RuntimeError(f"the same graph with memory that is never reused: {received}")
        return received

    def _send(self, outcome: Any) -> None:
        try:
            self.other.send_bytes(pickle.dumps(outcome))
        finally:
            os._exit(0)


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


def build_library(sources: Mapping[str, str]) -> str:
    """Compile kernels, given by name, as one file, without optimisation. Returns the path of the library."""
    # The setting is not given as a compiler flag: the headers that Inductor compiles once need it as the kernels do.
    with inductor_config.patch({"aot_inductor.debug_compile": True}):
        # Passed as optimized_code: only for this part does Inductor use its precompiled headers.
        return CppCodeCache.load("", optimized_code="\n".join([_INCLUDE, *sources.values()]))._name


# Builds kernels. Another function can have those of several graphs built together.
builder: ContextVar[Callable[[Mapping[str, str]], str]] = ContextVar("builder", default=build_library)


@contextlib.contextmanager
def built_alone() -> Iterator[None]:
    """A context in which kernels are built at once, whatever ``builder`` is outside."""
    outside = builder.set(build_library)
    try:
        yield
    finally:
        builder.reset(outside)


@contextlib.contextmanager
def kernels_together() -> Iterator[Kernels]:
    """A context in which generated code is loaded. Its kernels are built later, all together."""
    together = Kernels()
    with mock.patch.object(AsyncCompile, "cpp_pybinding", lambda _, types, source: together.add(types, source)):
        yield together


class Kernels:
    """The kernels of generated code. Those that are not built yet are built when one of them is called.

    Attributes:
        sources: the C++ code of kernels that are not built yet, by name.
    """

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self._built: dict[str, Any] = {}

    def add(self, types: list[str], source: str) -> Callable[..., None]:
        """Return the kernel as a function of tensors and sizes."""
        name = f"kernel_{hashlib.sha256(source.encode()).hexdigest()[:24]}"
        if name not in self._built:
            body = source.replace(_INCLUDE, "")
            self.sources[name] = re.sub(r"\bvoid\s+kernel\(", f"void {name}(", body, count=1)
        converters = [_address if kind.rstrip().endswith("*") else ctypes.c_int64 for kind in types]

        def run(*arguments: Any) -> None:
            if name not in self._built:
                self.load(builder.get()(self.sources))
            self._built[name](*(convert(argument) for convert, argument in zip(converters, arguments, strict=True)))

        return run

    def load(self, library: str) -> None:
        """Take all kernels of ``sources`` from the library with this path."""
        loaded = ctypes.CDLL(library)
        self._built.update((name, loaded[name]) for name in self.sources)
        self.sources.clear()


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
