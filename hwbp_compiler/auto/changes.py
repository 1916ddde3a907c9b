"""Measure, in the code of a form, how much its last iteration changes w.

The backward graph gets two more outputs, the sums of :mod:`hwbp_compiler.engine.watch`. They are taken off again before
autograd sees the gradients. On a GPU they are copied to the host beside the steps that follow, and are read so many
steps later that nobody waits for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from hwbp_compiler.engine.watch import last_change
from hwbp_compiler.joint_pass import HighwayPass
from hwbp_compiler.options import Options
from hwbp_compiler.prepare import Prepared
from hwbp_compiler.torch_private import compile_fx_inner

from .measured import relative
from .observe import copied, is_observed, observe_with

# On a GPU, a change is read this many steps later. A fixed number, so that a seed reproduces a training.
_LATER = 8


@dataclass(frozen=True)
class _WatchedPass(HighwayPass):
    """The rewrite; a gradient then waits for the last change, so that the partitioner keeps it."""

    def __call__(self, graph: Graph) -> None:
        super().__call__(graph)
        change = last_change(graph)
        if change is not None:
            observe_with(graph, change)
            graph.lint()


@dataclass
class Changes:
    """The compilation of a form that is watched, and afterwards what its backward passes have measured."""

    arrived: deque[Callable[[], float]] = field(default_factory=deque)
    later: int = 0
    _pass: HighwayPass | None = None

    def of(self, options: Options, prepared: Prepared) -> Changes:
        """Called when the graph has been prepared."""
        self._pass = _WatchedPass(options, prepared.records)
        return self

    @property
    def highway(self) -> HighwayPass:
        """The pass, once the graph has been prepared."""
        assert self._pass is not None
        return self._pass

    def give_up(self) -> None:
        """The compilation failed. What is compiled instead measures nothing."""

    def inner_compile(self, otherwise: Callable[..., Any] | None) -> Callable[..., Any]:
        """Replaces Inductor's compiler of forward and backward graphs."""

        def compile(module: GraphModule, example_inputs: Any, **how: Any) -> Callable[..., Any]:
            inner = otherwise or compile_fx_inner()
            telling = _telling(module)
            if telling is None:
                return inner(module, example_inputs, **how)  # type: ignore[no-any-return]
            compiled = inner(telling, example_inputs, **how)

            def run(values: list[Any]) -> Any:
                *results, change, size = compiled(values)
                self._keep(change, size)
                return results

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        return compile

    def take(self) -> list[float]:
        """What has become known since the last call: |w^k - w^{k-1}| / |w^k| of each backward pass, oldest first."""
        found = []
        while len(self.arrived) > self.later:
            found.append(self.arrived.popleft()())
        return found

    def forget(self) -> None:
        """Drop what has not been read yet."""
        self.arrived.clear()

    def _keep(self, change: Tensor, size: Tensor) -> None:
        if change.device.type == "cpu":
            self.arrived.append(lambda: relative(change.item(), size.item()))
            return
        self.later = _LATER
        host = torch.empty(2, pin_memory=True)
        host.copy_(torch.stack([change, size]), non_blocking=True)
        event = torch.get_device_module(change.device).Event()
        event.record()

        def read() -> float:
            event.synchronize()
            return relative(*host.tolist())

        self.arrived.append(read)


def _telling(module: GraphModule) -> GraphModule | None:
    """A copy whose last outputs are what a gradient waits for; None if no gradient of it waits."""
    if not any(map(is_observed, module.graph.nodes)):
        return None
    copy = GraphModule(module, copied(module.graph))
    (node,) = filter(is_observed, copy.graph.nodes)
    gradient, values = node.args
    output = copy.graph.output_node()
    node.replace_all_uses_with(gradient)
    copy.graph.erase_node(node)
    results: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    output.args = ((*results, *values),)
    copy.recompile()
    return copy
