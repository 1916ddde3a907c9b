"""Run a checked step's graph operator by operator: first the step's own results, then the gradients to compare."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from hwbp_compiler.errors import first_line
from hwbp_compiler.torch_private import random_as_compiled, without_autocast

from .check import CheckedPass
from .measured import Check
from .merge import changes_its_argument
from .observe import observe

log = logging.getLogger(__name__)


class CheckedHalves:
    """Replaces Inductor's compiler of forward and backward graphs, and runs them uncompiled.

    ``seen(found)`` is called in the backward pass. ``found`` is a function that waits for the device and returns the
    check; it is None if the other gradients could not be computed.
    """

    def __init__(self, checked: CheckedPass, seen: Callable[[Callable[[], Check] | None], None]) -> None:
        self.checked, self.seen = checked, seen
        self.parameters: list[bool] = []
        self.upstream: list[bool] = []

    def compile(self, module: GraphModule, example_inputs: Any, **how: Any) -> Callable[..., Any]:
        half = _Half(module)

        def run(values: list[Any]) -> Any:
            given = list(values)
            values.clear()
            if not how.get("is_backward"):
                self.parameters = [isinstance(value, nn.Parameter) for value in given]
                self.upstream = [isinstance(value, Tensor) and not value.is_leaf for value in given]
            # Autocast was already applied when the graph was traced.
            with torch.no_grad(), without_autocast():
                results, found = half.run(given)
            if how.get("is_backward"):
                flags = self.parameters, self.upstream
                self.seen(None if found is None else lambda: self.checked.measured(found, *flags))
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


class _Half:
    """A graph, run operator by operator: its results first, then the gradients to compare with them."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        nodes = list(module.graph.nodes)
        self.results = module.graph.output_node().args[0]
        self.observed = next((n for n in nodes if n.target is observe), None)
        needed = _ancestors([self.results, [n for n in nodes if _changes_something(n)]], self.observed)
        self.first = [n for n in nodes if n in needed and n is not self.observed]
        self.then = [n for n in nodes if n not in needed and n.op not in ("output", "placeholder")]
        self.then = [n for n in self.then if n is not self.observed]
        self.inputs = module.graph.find_nodes(op="placeholder")
        self.last = self._last_uses()

    def _last_uses(self) -> dict[Node, list[Node]]:
        """Which values can be dropped after each node."""
        kept: set[Node] = set()
        torch.fx.map_arg(self.results, kept.add)
        if self.observed is not None:
            kept.update(self.observed.all_input_nodes)
        dropped: dict[Node, list[Node]] = {}
        seen = set(kept)
        for node in reversed([*self.first, *self.then]):
            for used in (node, *node.all_input_nodes):
                if used not in seen:
                    seen.add(used)
                    dropped.setdefault(node, []).append(used)
        return dropped

    def run(self, values: list[Any]) -> tuple[Any, list[Tensor] | None]:
        """The results, and the moments (None if there are none or they failed). Empties ``values``."""
        running = _Running(self.module)
        running.env = dict(zip(self.inputs, values, strict=True))
        values.clear()
        self._run(running, self.first)
        found: list[Tensor] | None = None
        if self.observed is not None:
            gradient, parts = self.observed.args
            try:
                self._run(running, self.then)
                found = [running.env[part] for part in parts]  # type: ignore[union-attr, index]
            except Exception as error:  # no memory, for example; the exact gradient is available anyway
                log.warning("a check could not be computed (%s); the step has its exact gradient", first_line(error))
            running.env[self.observed] = running.env[gradient]  # type: ignore[index]
        return torch.fx.map_arg(self.results, running.env.__getitem__), found

    def _run(self, running: _Running, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if node not in running.env:
                running.env[node] = running.run_node(node)
            for used in self.last.get(node, ()):
                running.env.pop(used, None)


class _Running(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        drawn = random_as_compiled(target, args, kwargs)
        return super().call_function(target, args, kwargs) if drawn is None else drawn


def _changes_something(node: Node) -> bool:
    """Whether it writes a buffer back, or is a call with a side effect."""
    return node.op == "call_function" and (node.is_impure() or changes_its_argument(node))


def _ancestors(results: Any, observed: Node | None) -> set[Node]:
    found: set[Node] = set()
    todo: list[Node] = []
    torch.fx.map_arg(results, todo.append)
    while todo:
        node = todo.pop()
        if node in found:
            continue
        found.add(node)
        todo += [node.args[0]] if node is observed else node.all_input_nodes  # type: ignore[list-item, union-attr]
    return found
