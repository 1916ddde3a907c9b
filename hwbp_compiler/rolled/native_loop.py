"""The compiled step and the loop around it in one C++ call, for long loops on a CPU.

Where a step is small, the time to call it from Python shows. Inductor's C++ wrapper turns the same kernels into a C++
function, and ``native_loop.cpp`` calls it for every time step. The results are equal bit for bit. But the wrapper takes
seconds to build, so only steps that are called often get one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from hwbp_compiler.cost.devices import NATIVE_FROM
from hwbp_compiler.engine.native import build
from hwbp_compiler.errors import first_line
from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import StepInCpp, tensor_functions, tensor_handle

log = logging.getLogger(__name__)

# Shorter loops get a native step once Python has called theirs so often: a few seconds of Python, what building takes.
CALLS = 200_000
_ROOM = 1000  # bytes for an error message


class NativeLoop:
    """Runs one step over time without Python per step. ``make`` returns the graph of the step, which writes its
    results into its first arguments, and examples of its arguments. The arguments are on ``devices``.
    """

    def __init__(self, make: Callable[[], tuple[GraphModule, list[Tensor]]], devices: set[torch.device]) -> None:
        self.make = make
        self.calls = 0
        self.possible = {device.type for device in devices} == {"cpu"}
        self.step: StepInCpp | None = None

    def pays(self, length: int) -> bool:
        """Whether a call of ``length`` steps is worth a native step. Counts the steps."""
        self.calls += length
        return self.possible and (length >= NATIVE_FROM or self.calls >= CALLS)

    def run(
        self,
        results: Sequence[Tensor],
        state: Sequence[Tensor],
        inputs: Sequence[Tensor],
        shared: Sequence[Tensor],
        reverse: bool,
    ) -> bool:
        """Write every state to its row of ``results``, ``[T, ...]`` each. False: this step cannot be called from C++,
        and nothing was written.
        """
        self.possible = _loop() is not None and self._built()
        if not self.possible:
            return False
        assert self.step is not None
        message = ctypes.create_string_buffer(_ROOM)
        with _Handles() as handles:
            failed = _loop()(  # type: ignore[misc]
                *(self.step.address, *map(_address, tensor_functions())),
                *(results[0].shape[0], reverse),
                *(len(results), handles.rows(results), handles.whole(state)),
                *(len(inputs), handles.rows(inputs), len(shared), handles.whole(shared)),
                *(message, _ROOM),
            )
        if failed:
            raise RuntimeError(f"a loop over time failed: {message.value.decode(errors='replace')}")
        return True

    def _built(self) -> bool:
        if self.step is None:
            try:
                self.step = StepInCpp(*self.make(), keeping_pieces({}))
            except Exception as error:  # an operator without a C++ form, for example
                log.debug("a loop over time stays in Python: %s", first_line(error), exc_info=error)
        return self.step is not None


@functools.cache
def _loop() -> Callable[..., int] | None:
    """``highway_native_loop``; None where it cannot be built."""
    try:
        library = build(Path(__file__).with_suffix(".cpp").read_text())
        tensor_functions()
        # PyDLL keeps Python's lock during the call, which Inductor's C++ wrapper expects.
        found = ctypes.PyDLL(library._name).highway_native_loop
    except Exception as error:  # no compiler, or a torch without these functions
        log.info("loops over time stay in Python: %s", first_line(error))
        log.debug("building native_loop.cpp failed", exc_info=error)
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    found.argtypes = [*[address] * 4, number, ctypes.c_int32, number, address, address, number, address, number,
                      address, address, number]  # fmt: skip
    return found  # type: ignore[no-any-return]


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


class _Rows(ctypes.Structure):
    _fields_ = (
        ("whole", ctypes.c_void_p),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("stride", ctypes.c_int64),
    )


class _Handles:
    """The tensors of one call as C arrays. Leaving the context frees their handles."""

    def __enter__(self) -> _Handles:
        self.held: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        free = tensor_functions()[2]
        for handle in self.held:
            free(handle)

    def whole(self, tensors: Sequence[Tensor]) -> Any:
        return (ctypes.c_void_p * len(tensors))(*map(self._handle, tensors))

    def rows(self, tensors: Sequence[Tensor]) -> Any:
        return (_Rows * len(tensors))(*map(self._row, tensors))

    def _row(self, tensor: Tensor) -> _Rows:
        numbers = ctypes.c_int64 * (tensor.dim() - 1)
        sizes, strides = numbers(*tensor.shape[1:]), numbers(*tensor.stride()[1:])
        return _Rows(self._handle(tensor), tensor.dim() - 1, sizes, strides, tensor.stride(0))

    def _handle(self, tensor: Tensor) -> int:
        self.held.append(tensor_handle(tensor))
        return self.held[-1]
