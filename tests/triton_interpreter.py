"""Run generated GPU code on CPU tensors: its kernels run in Triton's interpreter. For a process with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# What the interpreter lacks: functions of CUDA's mathematical library.
_WRITTEN_OUT = {
    r"libdevice\.tanh\((\w+)\)": r"(1 - 2 / (tl.exp(2 * \1) + 1))",
    r"libdevice\.(exp|log|sqrt|rsqrt|erf)\(": r"tl.\1(",
}
_ON_A_CPU = {
    "async_compile = AsyncCompile()": "",
    "async_compile.wait(globals())": "",
    "del async_compile": "",
    "empty_strided_cuda(": "empty_strided_cpu(",
    "device(type='cuda', index=0)": "device(type='cpu')",
    "torch.cuda._DeviceGuard(0)": "contextlib.nullcontext()",
    "torch.cuda.set_device(0)": "pass",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "",
}


class _Kernel:
    def __init__(self, name: str, source: str, blocks: Mapping[str, int]) -> None:
        # Without Inductor's launcher; the interpreter reads the source from a file.
        plain = re.sub(r"@triton_heuristics\.\w+\((?s:.*?)\n\)\n(?=@triton.jit)", "", source)
        plain = plain.replace("triton_helpers.set_driver_to_gpu()", "")
        for called, instead in _WRITTEN_OUT.items():
            plain = re.sub(called, instead, plain)
        path = Path(tempfile.mkdtemp()) / f"{name}.py"
        path.write_text(plain)
        scope: dict[str, Any] = {}
        exec(compile(plain, str(path), "exec"), scope)
        self.function = scope[name]
        self.names = self.function.arg_names
        self.blocks = {argument: blocks[argument] for argument in self.names if argument.endswith("BLOCK")}

    def run(self, *arguments: Any, stream: Any = None) -> None:
        def programs(axis: str) -> int:
            if f"{axis}numel" not in self.names:
                return 1
            return -(-arguments[self.names.index(f"{axis}numel")] // self.blocks[f"{axis.upper()}BLOCK"])

        self.function[(programs("x"), programs("y"), programs("z"))](*arguments, **self.blocks)


def load(source: str, **blocks: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """What an Inductor module's ``call`` computes. ``blocks``: sizes other than 16."""
    sizes = {**dict.fromkeys(("XBLOCK", "YBLOCK", "ZBLOCK", "R0_BLOCK", "R1_BLOCK"), 16), **blocks}

    class Compile:
        @staticmethod
        def triton(name: str, source: str, device_str: str) -> _Kernel:
            return _Kernel(name, source, sizes)

    source = source[: source.index("if __name__ ==")]
    for old, new in _ON_A_CPU.items():
        source = source.replace(old, new)
    scope: dict[str, Any] = {"async_compile": Compile, "contextlib": contextlib, "get_raw_stream": lambda device: None}
    exec(source, scope)
    return lambda inputs: list(scope["call"](list(inputs)))
