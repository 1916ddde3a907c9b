"""How recurrent modules reach our backend whole, and no other backend.

Note [Recurrent modules in Dynamo]
Dynamo breaks the graph at ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` unless its ``allow_rnn`` is on; then it puts one call
of ``torch.gru`` (or its like) into the graph. To learn the shape of the result it runs that call on fake tensors, where
PyTorch takes it apart step by step: as slow as it is long, and the length becomes a constant. :func:`traced_whole`
turns ``allow_rnn`` on and answers with our operator's shapes instead, in this thread while it lasts: while callables
compiled with our backend run.
"""

from __future__ import annotations

import functools
import threading
import types
from types import TracebackType
from typing import Any

import torch

from hwbp_compiler.skipped import Compiled, lifted
from hwbp_compiler.torch_private import (
    UnsupportedOperatorException,
    allow_rnn,
    config_is_per_thread,
    functorch_levels,
    guard_composite,
    override_python_kernels,
    tracing_for_another_backend,
)

from .module_call import KINDS, ModuleCall
from .operator import operator

_here = threading.local()

# Where the setting holds for all threads, the last of them to leave puts back what the first found.
_setting: Any = threading.local() if config_is_per_thread() else types.SimpleNamespace()
_lock = threading.Lock()


class traced_whole:
    """A context for ``compiled``, in which Dynamo traces recurrent modules as one call each, and frames that other
    backends had it give up (see Note [Skipped frames])."""

    def __init__(self, compiled: Compiled | None = None) -> None:
        self.lifted = lifted(compiled or Compiled(warned=True))

    def __enter__(self) -> None:
        self.lifted.__enter__()
        self.before = getattr(_here, "active", False)
        _here.active = True
        with _lock:
            found = allow_rnn(True)
            inside = getattr(_setting, "inside", 0)
            if not inside:
                _setting.found = found
            _setting.inside = inside + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.active = self.before
        with _lock:
            _setting.inside -= 1
            if not _setting.inside:
                allow_rnn(_setting.found)
        self.lifted.__exit__(kind, error, trace)


def shapes_of(call: ModuleCall) -> tuple[Any, ...]:
    """(output, h_n) or (output, h_n, c_n) of ``call``, of tensors, as the functions of torch return them."""
    input = call.input.transpose(0, 1) if call.batch_first else call.input
    output, h_n, c_n, _ = operator(
        call.kind, input, call.batch_sizes, list(call.state), list(call.weights), call.has_biases, call.layers,
        call.dropout, call.train, call.bidirectional, None, [],
    )  # fmt: skip
    output = output.transpose(0, 1) if call.batch_first else output
    return (output, h_n, c_n) if call.kind == "lstm" else (output, h_n)


def _whole(kind: str, original: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not getattr(_here, "active", False):
            return original(*args, **kwargs)
        if tracing_for_another_backend() or functorch_levels.peek_interpreter_stack() is not None:
            # Of a function with another backend, called from one of ours; inside torch.func.grad and the like: eager
            # mode, as under any other backend.
            raise UnsupportedOperatorException(getattr(torch.ops.aten, kind))
        return shapes_of(ModuleCall.of(kind, args, kwargs))

    return kernel


for _kind in KINDS:
    for _overload in ("input", "data"):
        _operator = getattr(getattr(torch.ops.aten, _kind), _overload)
        override_python_kernels(_operator, functools.partial(_whole, _kind))


def _break_at_padding() -> None:
    """With ``allow_rnn`` on, Dynamo 2.11 traces ``pad_packed_sequence``, whose operator reads the memory that its fake
    tensors do not have, and fails. Later ones skip the function."""
    if getattr(_here, "active", False):
        raise UnsupportedOperatorException(torch.ops.aten._pad_packed_sequence.default)


guard_composite(torch.ops.aten._pad_packed_sequence.default, _break_at_padding)
