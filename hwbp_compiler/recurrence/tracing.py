"""How recurrent modules reach our backend whole, and no other backend.

Note [Recurrent modules in Dynamo]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Dynamo breaks the graph at ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` unless ``allow_rnn`` is on. With it, Dynamo puts one
call of ``torch.gru`` (or similar) into the graph. To learn the shape of the result it runs that call on fake tensors,
and PyTorch then computes it step by step. That takes time proportional to the length, and makes the length a constant.
:func:`traced_whole` turns ``allow_rnn`` on and answers with our operator's shapes instead. This holds only in this
thread, and only while a callable compiled with our backend runs.
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

# If the setting is shared by all threads, the last thread to leave restores what the first one found.
_setting: Any = threading.local() if config_is_per_thread() else types.SimpleNamespace()
_lock = threading.Lock()


class traced_whole:
    """A context for ``compiled``. In it, Dynamo traces each recurrent module as one call, and looks again at frames
    that it gave up for other backends (see Note [Skipped frames]).
    """

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
    """The fake results (output, h_n) or (output, h_n, c_n) of a call, as torch's functions return them."""
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
            # A function with another backend that one of ours calls, or code inside torch.func.grad and similar: run in
            # eager mode, as under any other backend.
            raise UnsupportedOperatorException(getattr(torch.ops.aten, kind))
        return shapes_of(ModuleCall.of(kind, args, kwargs))

    return kernel


for _kind in KINDS:
    for _overload in ("input", "data"):
        _operator = getattr(getattr(torch.ops.aten, _kind), _overload)
        override_python_kernels(_operator, functools.partial(_whole, _kind))


def _break_at_padding() -> None:
    """With ``allow_rnn`` on, Dynamo 2.11 traces ``pad_packed_sequence``. Its operator reads memory, which fake tensors
    do not have, and fails. Later releases skip the function.
    """
    if getattr(_here, "active", False):
        raise UnsupportedOperatorException(torch.ops.aten._pad_packed_sequence.default)


guard_composite(torch.ops.aten._pad_packed_sequence.default, _break_at_padding)
