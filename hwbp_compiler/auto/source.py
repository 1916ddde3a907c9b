"""A graph of Dynamo's, kept as it came: further forms of it can be compiled when Dynamo is gone.

Torch does the same with a backward graph, which it compiles when it is first run. As there, a form that is compiled
late can add no guard any more; what its compilation learnt about symbolic sizes is asked at every call instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.graph.origin import names_of_inputs
from hwbp_compiler.torch_private import LateCompilation


@dataclass
class Source:
    """``module`` as Dynamo made it, with fake inputs and the user's names of them ("" where there is none)."""

    module: GraphModule
    inputs: Sequence[Any]
    late: LateCompilation
    names: tuple[str, ...] = ()
    known: int = 0  # conditions on sizes that Dynamo knows of, and asks before it calls

    @classmethod
    def of(cls, module: GraphModule, inputs: Sequence[Any]) -> Source:
        """While ``module`` is compiled, and before anything changes it."""
        given = [node.meta.get("example_value", value) for node, value in zip(_inputs(module), inputs, strict=True)]
        return cls(copy_of(module), given, LateCompilation(given), tuple(names_of_inputs(module.graph)))

    @property
    def first_parameter(self) -> int | None:
        """Its place among the inputs; None where no input is a parameter."""
        return next((i for i, value in enumerate(self.inputs) if isinstance(value, nn.Parameter)), None)

    def handed_over(self) -> None:
        """Dynamo's own compilation is done: what is learnt of sizes from now on, Dynamo does not ask."""
        self.known = self.late.guards()

    def compiled(self, how: Callable[[GraphModule, list[Any]], Callable[..., Any]]) -> Callable[..., Any]:
        """``how(module, inputs)`` of a copy, after Dynamo is gone."""
        with self.late.here():
            return how(copy_of(self.module), list(self.inputs))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Guards]:
        """What is learnt of symbolic sizes while this lasts, or was by forms before: nobody learns it again, but it is
        taken for known."""
        guards = Guards(self)
        yield guards
        guards.learn()


class Guards:
    """Whether a form that was compiled late holds for the sizes of a call."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.symbols = [i for i, value in enumerate(source.inputs) if isinstance(value, torch.SymInt)]
        self.expression: str | None = None

    def learn(self) -> None:
        late = self.source.late
        if late.guards() > self.source.known:
            self.expression = late.expression([self.source.inputs[i] for i in self.symbols])

    def hold(self, values: Sequence[Any]) -> bool:
        return self.expression is None or self.source.late.holds(self.expression, [values[i] for i in self.symbols])


def copy_of(module: GraphModule) -> GraphModule:
    """A graph module of its own over the same tensors, the regions in it copied too."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in module.graph.nodes:
        copies[node] = made = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            made._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copied = GraphModule(module, graph)
    for name, region in module.named_children():
        if isinstance(region, GraphModule):
            setattr(copied, name, copy_of(region))
    copied.meta = dict(module.meta)
    if hasattr(module, "_param_name_to_source"):
        copied._param_name_to_source = module._param_name_to_source
    return copied


def _inputs(module: GraphModule) -> list[Node]:
    return list(module.graph.find_nodes(op="placeholder"))
