"""Generate Inductor's Triton kernels without a GPU: as text, as PTX and as cubin.

Inductor asks the machine about its GPU before it generates code, and Triton asks which target to compile for. Here a
small table answers both. So a laptop with CPU-only torch and the ``triton`` package can show the kernels that an H100
would run, and a test can assert that a fusion still happens.

Nothing runs and nothing is allocated: inputs are fake tensors. This module starts from a graph; :mod:`.generate` gets
the graph from a model.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib.util
import re
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from .errors import HighwayError, OptionError
from .torch_private import cuda_device_guard

# Streaming multiprocessors of a common device of each compute capability: A100, A10, L40, H100, B200, ... Inductor uses
# the number to decide how far to split reductions.
_MULTIPROCESSORS = {
    (7, 0): 80,
    (7, 5): 40,
    (8, 0): 108,
    (8, 6): 72,
    (8, 9): 142,
    (9, 0): 132,
    (10, 0): 148,
    (12, 0): 170,
}


@dataclass(frozen=True)
class Target:
    """A CUDA device to generate code for. :meth:`parse` accepts ``str(target)``."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Target:
        """Turn ``"cuda:sm_90"`` into ``Target(9, 0)``. Raises OptionError (a ValueError) for anything else."""
        match = re.fullmatch(r"cuda:sm_(\d+)(\d)", text) if isinstance(text, str) else None
        target = cls(int(match[1]), int(match[2])) if match else None
        if target is None or (target.major, target.minor) not in _MULTIPROCESSORS:
            allowed = ", ".join(f"cuda:sm_{major}{minor}" for major, minor in _MULTIPROCESSORS)
            raise OptionError(f"target is {text!r}; allowed are {allowed} (generate_code also takes 'cpu')")
        return target

    def __str__(self) -> str:
        return f"cuda:sm_{self.capability}"

    @property
    def capability(self) -> int:
        return 10 * self.major + self.minor

    @property
    def properties(self) -> SimpleNamespace:
        """The fields of ``torch.cuda.get_device_properties`` that Inductor reads."""
        threads = {(7, 5): 1024, (8, 6): 1536, (8, 9): 1536, (12, 0): 1536}
        return SimpleNamespace(
            name=str(self),
            gcnArchName=str(self),  # read by Inductor where torch was built without CUDA
            major=self.major,
            minor=self.minor,
            multi_processor_count=_MULTIPROCESSORS[self.major, self.minor],
            regs_per_multiprocessor=65536,
            max_threads_per_multi_processor=threads.get((self.major, self.minor), 2048),
            max_threads_per_block=1024,
            warp_size=32,
            total_memory=40 << 30,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=(227 if self.major == 9 else 99) << 10,
            L2_cache_size=40 << 20,
        )


@dataclass(frozen=True)
class Kernel:
    """One generated kernel.

    name     its name in the code that calls it
    source   the Python module that defines it; for a CPU, its C++ code
    target   the device it is for; None means the CPU of this machine
    """

    name: str
    source: str
    target: Target | None = None

    @property
    def ptx(self) -> str:
        """The kernel's assembly, compiled by Triton."""
        return compile_kernel(self).ptx

    @property
    def cubin(self) -> bytes:
        """The kernel's machine code, an ELF file compiled by Triton."""
        return compile_kernel(self).cubin


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its assembly and its machine code."""

    ptx: str
    cubin: bytes


@dataclass(frozen=True)
class CodeText:
    """The code generated for one graph.

    Attributes:
        target: the device it is for; None means the CPU of this machine.
        source: the whole wrapper module.
        kernels: the kernels within it.
    """

    target: Target | None
    source: str
    kernels: tuple[Kernel, ...]

    @property
    def launches(self) -> tuple[str, ...]:
        """The names of everything that the code calls, in order: kernels, and library functions such as
        ``extern_kernels.mm``."""
        return tuple(_launches_of(self.source, {kernel.name for kernel in self.kernels}))

    def __str__(self) -> str:
        return self.source


@contextlib.contextmanager
def described_device(target: Target) -> Iterator[None]:
    """A context in which Inductor and Triton take device 0 for a ``target``.

    It changes the whole process, so no other thread may compile at the same time.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    from .torch_private import (
        CacheBase,
        CudaInterface,
        DeviceProperties,
        inductor_utils,
        select_algorithm,
        triton_helpers,
        triton_utils,
    )

    cached = (
        CacheBase.get_system,
        DeviceProperties.create,
        triton_utils.has_triton,
        triton_utils.triton_backend,
        triton_utils.triton_hash_with_backend,
        inductor_utils.get_gpu_type,
        inductor_utils.get_max_num_sms,
        inductor_utils.is_big_gpu,
    )
    properties = target.properties
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", target.capability, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
    }
    interface = {
        **answers,
        "get_compute_capability": lambda device=None: target.capability,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=False: target.major >= 8,
    }
    # torch.cuda.is_available is not patched: torch also uses it to guard calls into the driver.
    module = {
        "get_device_properties": answers["get_device_properties"],
        "current_device": answers["current_device"],
        "get_device_capability": lambda device=None: (target.major, target.minor),
    }
    active = triton.runtime.driver._active
    with contextlib.ExitStack() as stack:
        stack.enter_context(cuda_device_guard())
        for owner, patches in (
            (CudaInterface, {name: staticmethod(answer) for name, answer in interface.items()}),
            (
                CudaInterface.Worker,
                {name: staticmethod(answers[name]) for name in ("current_device", "get_device_properties")},
            ),
            (torch.cuda, module),
            # This cache remembers the machine's properties. None makes Inductor build a new one when it needs it.
            (select_algorithm, {"_ALGORITHM_SELECTOR_CACHE": None}),
            # The generated modules would look for a real driver.
            (triton_helpers, {"set_driver_to_gpu": lambda: None}),
        ):
            stack.enter_context(unittest.mock.patch.multiple(owner, **patches))
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        triton.runtime.driver.set_active(driver)
        stack.callback(triton.runtime.driver.set_active, active)
        yield


def need_triton(target: Target) -> None:
    """Raise HighwayError if the ``triton`` package is missing."""
    if importlib.util.find_spec("triton") is None:
        raise HighwayError(
            f"code for {str(target)!r} is generated by the triton package, which is not installed here: "
            "pip install triton (it needs no GPU), or ask for target='cpu'"
        )


def generate_kernels(
    gm: GraphModule,
    fake_inputs: Sequence[Any],
    target: str | Target | None = "cuda:sm_90",
    *,
    is_backward: bool = False,
    is_inference: bool = False,
) -> CodeText:
    """The code that Inductor generates for an ATen graph on ``target``.

    Args:
        gm: a graph as Inductor's inner compiler gets it: functional, decomposed ATen operators, forward or
            backward. It is not changed.
        fake_inputs: its inputs, in order: fake tensors of one fake mode on device ``"cuda"``, and SymInts where
            the graph takes them.
        target: ``"cuda:sm_80"``, ``"cuda:sm_90"``, ... Needs the ``triton`` package but no GPU. None means the CPU of
            this machine.
        is_backward, is_inference: whether this is a model's backward graph, or a graph without a backward pass.

    Raises:
        OptionError: the target is not known.
        HighwayError: the ``triton`` package is missing.
    """
    from .scan import inductor as scan_lowering
    from .torch_private import (  # the steps of Inductor's inner compiler, up to the generated text
        DebugContext,
        GraphLowering,
        V,
        fake_tensor_prop,
        inductor_config,
        post_grad_passes,
        record_output_strides,
        view_to_reshape,
    )

    target = Target.parse(target) if isinstance(target, str) else target
    if target is not None:
        need_triton(target)
    scan_lowering.register()
    gm = copy.deepcopy(gm)
    inputs = list(fake_inputs)
    device = contextlib.nullcontext() if target is None else described_device(target)
    # No compile workers: they would query the real machine.
    with device, inductor_config.patch(compile_threads=1, fx_graph_cache=False), torch.no_grad():
        view_to_reshape(gm)
        mode = fake_tensor_prop(gm, inputs)
        record_output_strides(gm)
        with V.set_fake_mode(mode), DebugContext():
            post_grad_passes(gm, is_inference=is_inference)
            graph = GraphLowering(
                gm,
                example_inputs=inputs,
                shape_env=mode.shape_env,
                is_backward=is_backward,
                is_inference=is_inference,
            )
            with V.set_graph_handler(graph), V.set_extern_kernel_nodes([]):
                graph.run(*inputs)
                wrapper, _ = graph.codegen()
    return CodeText(target, wrapper.value, tuple(_kernels_of(wrapper.value, target)))


def _kernels_of(source: str, target: Target | None) -> Iterator[Kernel]:
    """The kernels that a wrapper module defines: ``name = async_compile.triton('name', '''source''', ...)`` for a GPU,
    ``name = async_compile.cpp_pybinding([types], '''source''')`` for a CPU.
    """
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        if ast.unparse(node.value.func).startswith("async_compile."):
            yield Kernel(ast.unparse(node.targets[0]), ast.literal_eval(node.value.args[1]), target)


def _launches_of(source: str, kernels: set[str]) -> Iterator[str]:
    (call,) = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "call"
    )
    found = []
    for node in ast.walk(call):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).removesuffix(".run")
            if name in kernels or name.startswith(("linear_scan_", "extern_kernels.", "torch.ops.")):
                found.append((node.lineno, node.col_offset, name))
    return (name for *_, name in sorted(found))


@functools.cache
def compile_kernel(kernel: Kernel) -> Binary:
    """Compile a generated kernel with Triton, in the first of the configurations that Inductor would try.

    Needs the ``triton`` package, which brings its own assembler, but no GPU.

    Raises:
        HighwayError: the kernel is C++ code for a CPU.
    """
    from .torch_private import inductor_config

    if kernel.target is None:
        raise HighwayError(f"{kernel.name} is C++ for the CPU: only kernels of CUDA targets compile to PTX and cubin")
    # Triton's static launcher keeps the binary and drops the PTX text.
    with (
        described_device(kernel.target),
        inductor_config.patch(use_static_cuda_launcher=False),
        tempfile.TemporaryDirectory() as folder,
    ):
        # Triton reads a kernel's source from its file.
        path = Path(folder) / f"{kernel.name}.py"
        path.write_text(kernel.source)
        scope: dict[str, Any] = {"__name__": kernel.name, "__file__": str(path)}
        exec(compile(kernel.source, str(path), "exec"), scope)
        autotuner = scope[kernel.name]
        result = autotuner._precompile_config(autotuner.configs[0])
        return Binary(result.kernel.asm["ptx"], result.kernel.asm["cubin"])
