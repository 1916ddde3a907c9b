"""Leave a model, its inputs and the random number generators as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwbp_compiler.recurrence.tracing import traced_whole
from hwbp_compiler.torch_private import ISOLATES, SERVES, compilations_forgotten


@contextlib.contextmanager
def left_as_it_was(model: Any) -> Iterator[Callable[[Any], None]]:
    """On leaving, undo what running ``model`` does to buffers, to tensors passed to the yielded function, and to random
    number generators. Compilations in between do not count against the user's own.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    buffers = [(m, dict(m._buffers)) for m in modules]
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(values: Any) -> None:
        for value in pytree.tree_leaves(values):
            # A parameter is changed by an optimizer, not by a forward pass, and may be large. A meta tensor is empty.
            if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.is_meta:
                continue
            if id(value) not in kept:
                kept[id(value)] = (value, value.detach().clone())

    keep([b for _, found in buffers for b in found.values() if b is not None])
    with contextlib.ExitStack() as stack:
        stack.enter_context(compilations_forgotten())
        for kind in ("cuda", "xpu"):
            devices = list(range(getattr(torch, kind).device_count()))
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        # module.compile() replaces the module's call; here the module's own code must be traced.
        for m in modules[:1]:
            if m.__dict__.get("_compiled_call_impl") is not None:
                stack.callback(setattr, m, "_compiled_call_impl", m._compiled_call_impl)
                m._compiled_call_impl = None
        try:
            yield keep
        finally:
            with torch.no_grad():
                for tensor, value in kept.values():
                    if not torch.equal(tensor, value):  # BatchNorm changes its statistics without a new version
                        tensor.copy_(value)
            kept.clear()  # Dynamo keeps the compiled code, which refers to ``keep``
            for m, found in buffers:
                if any(m._buffers.get(name) is not b for name, b in found.items()) or len(m._buffers) != len(found):
                    m._buffers.clear()
                    m._buffers.update(found)


def isolated() -> dict[str, Any]:
    """Options of torch.compile that leave the user's own compilations of the same code alone. If torch cannot keep them
    apart, ``left_as_it_was`` drops ours afterwards.
    """
    return {"isolate_recompiles": True} if ISOLATES else {}


def compiled_apart(model: Any, backend: Callable[..., Any]) -> Callable[..., Any]:
    """``model`` compiled by ``backend``, which stands for ours, without an effect on later compilations."""
    setattr(backend, SERVES, True)
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, **isolated())  # type: ignore[call-overload]

    def run(*args: Any, **kwargs: Any) -> Any:
        # Shapes seen here must not make later compilations of the same code dynamic.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False), traced_whole():
            return compiled(*args, **kwargs)

    return run
