"""A graph from Dynamo, kept unchanged so that more forms of it can be compiled after Dynamo has finished.

Torch does the same with a backward graph, which it compiles when it is first run. As there, a form compiled late cannot
add guards. Instead, what its compilation learned about symbolic sizes is checked at every call.
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
    """``module`` as Dynamo made it, with fake inputs and the user's names for them ("" if there is none)."""

    module: GraphModule
    inputs: Sequence[Any]
    late: LateCompilation
    names: tuple[str, ...] = ()
    known: int = 0  # number of conditions on sizes that Dynamo knows and checks before each call

    @classmethod
    def of(cls, module: GraphModule, inputs: Sequence[Any]) -> Source:
        """Called while ``module`` is compiled, before anything changes it."""
        given = [node.meta.get("example_value", value) for node, value in zip(_inputs(module), inputs, strict=True)]
        return cls(copy_of(module), given, LateCompilation(given), tuple(names_of_inputs(module.graph)))

    @property
    def first_parameter(self) -> int | None:
        """The position of the first parameter among the inputs; None if no input is a parameter."""
        return next((i for i, value in enumerate(self.inputs) if isinstance(value, nn.Parameter)), None)

    def handed_over(self) -> None:
        """Dynamo's own compilation is done. Dynamo does not check what is learned about sizes from now on."""
        self.known = self.late.guards()

    def compiled(self, how: Callable[[GraphModule, list[Any]], Callable[..., Any]]) -> Callable[..., Any]:
        """Run ``how(module, inputs)`` on a copy, after Dynamo has finished."""
        with self.late.here():
            return how(copy_of(self.module), list(self.inputs))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[Guards]:
        """Guards for what is learned about symbolic sizes while this lasts, or was learned by earlier forms. The
        earlier ones count too: a later compilation takes them as known and does not report them again.
        """
        guards = Guards(self)
        yield guards
        guards.learn()


class Guards:
    """Checks whether a form that was compiled late is valid for the sizes of a call."""

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
    """A separate graph module over the same tensors, with its regions copied too."""
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
