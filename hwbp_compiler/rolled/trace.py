"""Trace one time step, and its backward, into flat graphs of operators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from hwbp_compiler.engine.emitter import decompositions
from hwbp_compiler.engine.inline import needed
from hwbp_compiler.errors import HighwayError
from hwbp_compiler.reasons import Declined, Reason
from hwbp_compiler.recurrence.operator import operator as recurrent_module
from hwbp_compiler.torch_private import (
    FunctionalTensor,
    FunctionalTensorMode,
    dispatch_functionalize,
    enable_python_dispatcher,
    has_data_mutation,
)


@dataclass
class Step:
    """A step as a graph ``(state, inputs, shared) -> (next state, outputs)``; ``shared`` is the same in every step."""

    module: GraphModule
    state: list[Node]
    inputs: list[Node]
    shared: list[Node]
    next_state: list[Node]
    outputs: list[Node]


@dataclass
class Body:
    """One step as Dynamo traced it.

    order     position of each of the module's arguments in ``(*state, *inputs, *shared)``
    results   which of its results are ``(*next state, *outputs)``
    """

    module: GraphModule
    order: list[int]
    results: list[int]

    def __call__(self, *values: Any) -> list[Tensor]:
        found = Interpreter(self.module).run(*(values[i] for i in self.order))
        return [found[i] for i in self.results]


# Autograd has no formula for their running statistics, but in a step these are ordinary arguments.
_NOT_IN_ALL_ARGUMENTS = [
    torch.ops.aten._native_batch_norm_legit_no_training.default,
    torch.ops.aten._native_batch_norm_legit.default,  # what the other one decomposes into
]


class MutatingCell(HighwayError):
    """The cell changes in place a tensor that it did not create."""


@contextlib.contextmanager
def without_autocast(device: str) -> Iterator[None]:
    """For running a traced step: it already contains autocast's casts as operators, so no more must be added."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device}:
            if is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def trace_step(cell: Body, state: list, inputs: list, shared: list, fake_mode: Any) -> Step:
    """``cell`` as ATen operators without mutation, under the current autocast. Raises Declined or MutatingCell if that
    is impossible.
    """
    _check_traceable(cell.module)
    names = [*(f"component {i} of its state" for i in range(len(state))), *(f"input {i}" for i in range(len(inputs)))]
    names += [f"the tensor {node.name}" for node in cell.module.graph.find_nodes(op="placeholder")][-len(shared) :]

    def run(*values: Any) -> list[Tensor]:
        found = cell(*values)
        for name, value in zip(names, values, strict=False):
            if isinstance(value, FunctionalTensor) and has_data_mutation(value.elem):
                raise MutatingCell(
                    f"recurrent: the cell changes {name} in place, but every step needs it unchanged. Write the change "
                    "as a new tensor (h * z instead of h.mul_(z)), and put what later steps need into the state"
                )
        return found

    examples = [*state, *inputs, *shared]
    with torch.no_grad():
        values = [e.detach() if isinstance(e, Tensor) else e for e in examples]
        module = _traced(run, values, fake_mode, {op: decompositions()[op] for op in _NOT_IN_ALL_ARGUMENTS})
    # Remove the loop's own views of arguments and copies of results: the copy of a state has to be that same state.
    # Keep those that change strides, because a later view may depend on the strides.
    for target in (torch.ops.aten.view.default, torch.ops.aten.clone.default):
        for node in module.graph.find_nodes(op="call_function", target=target):
            if _layout(node) == _layout(node.args[0]):
                node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    nodes = list(module.graph.find_nodes(op="placeholder"))
    results = list(module.graph.find_nodes(op="output")[0].args[0])
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise Declined(Reason.CELL_HOLDS_TENSOR)
        if node.target is recurrent_module:
            raise Declined(Reason.CELL_CONTAINS_MODULE.of(module=node.args[0].split("_")[0].upper()))
        if node.op == "call_function" and not node.users and node.is_impure():
            raise Declined(Reason.CELL_HAS_EFFECTS.of(operator=node.target))
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Declined(Reason.CELL_DRAWS_RANDOM_NUMBERS.of(operator=node.target))
    _read_from_states(module.graph, results[: len(state)])
    a, b = len(state), len(state) + len(inputs)
    results = list(module.graph.find_nodes(op="output")[0].args[0])
    return Step(module, nodes[:a], nodes[a:b], nodes[b:], results[:a], results[a:])


_SAME_ORDER = {
    torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim, torch.ops.aten.view.default,
    torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default,
}  # fmt: skip


def _read_from_states(graph: Graph, next_state: list[Node]) -> None:
    """Let outputs read from the next state if they hold the same values in another shape. The states of all steps are
    available, so the values that lead to them need not be computed twice.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    needed_by_states = set(next_state)
    for node in reversed(graph.nodes):
        if any(user in needed_by_states for user in node.users):
            needed_by_states.add(node)
    for state in dict.fromkeys(next_state):
        node = state
        while node.target in _SAME_ORDER and isinstance(node.args[0], Node):
            node = node.args[0]
        if node is state or node.op == "placeholder":
            continue
        held, example = node.meta["val"], state.meta["val"]
        if not (held.is_contiguous() and example.is_contiguous() and all(isinstance(n, int) for n in held.shape)):
            continue
        elsewhere = [user for user in node.users if user not in needed_by_states and order[user] > order[state]]
        if elsewhere:
            with graph.inserting_after(state):
                seen = graph.call_function(torch.ops.aten.view.default, (state, list(held.shape)))
            seen.meta = {**node.meta}
            for user in elsewhere:
                user.replace_input_with(node, seen)


def _layout(node: Node) -> list[Any]:
    """Sizes and strides, in a form whose comparison adds no guard."""
    value = node.meta["val"]
    return [s if isinstance(s, int) else s.node.expr for s in (*value.shape, *value.stride())]


def _check_traceable(cell: GraphModule) -> None:
    """Decline constructs that change how autograd treats an operator: they disappear when the step becomes a graph of
    operators.
    """
    for module in cell.modules():
        if not isinstance(module, GraphModule):
            raise Declined(Reason.CELL_RUNS_LOOP)
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", str(node.target))
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise Declined(Reason.CELL_CONTAINS_HIGHER_ORDER.of(operator=name))
            if node.op == "call_function" and ("grad_enabled" in name or "inference_mode" in name):
                raise Declined(Reason.CELL_SWITCHES_GRADIENTS)


def subgraph(inputs: Sequence[Node], results: Sequence[Node]) -> GraphModule:
    """The graph ``inputs -> results`` cut out of a larger one, with its nodes' example values."""
    graph = Graph()
    environment: dict[Node, Node] = {}
    for i, node in enumerate(inputs):
        environment[node] = graph.placeholder(f"arg{i}")
        environment[node].meta = dict(node.meta)
    wanted = needed(inputs, results)
    for node in results[0].graph.nodes:
        if node in wanted:
            environment[node] = graph.node_copy(node, environment.__getitem__)
    graph.output(tuple(environment[n] for n in results))
    return GraphModule({}, graph)


def trace_decomposed(module: GraphModule, fake_mode: Any) -> GraphModule:
    """The same function, written in operators that the passes know."""
    with torch.no_grad():
        return _traced(Interpreter(module).run, _examples(module), fake_mode, _known_operators())


def _known_operators() -> dict:
    """The decompositions, except that of ``add``: it splits complex numbers, which the passes need not see."""
    return {target: found for target, found in decompositions().items() if target is not torch.ops.aten.add.Tensor}


def _traced(function: Any, examples: list[Any], fake_mode: Any, decomposed: dict | None = None) -> GraphModule:
    functional = dispatch_functionalize(function, FunctionalTensorMode())
    with fake_mode, preserve_node_meta(), enable_python_dispatcher():
        # An empty table instead of None: without a table, newer releases trace ``detach`` as an alias.
        traced = make_fx(functional, decomposed or {})(*examples)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise Declined(Reason.CELL_WRITES_IN_PLACE.of(operator=node.target))
    return traced


@dataclass
class Vjp:
    """``(arguments, tangents) -> gradients`` of a function; None if an argument gets no gradient."""

    module: GraphModule
    arguments: list[Node]
    tangents: list[Node]
    gradients: list[Node | None]


def trace_vjp(module: GraphModule, fake_mode: Any) -> Vjp:
    """The vector-Jacobian product of ``module`` in all its floating-point arguments, including the forward pass."""

    def joint(*values: Any) -> list[Tensor | None]:
        arguments, tangents = values[:count], values[count:]
        with torch.enable_grad():
            arguments = tuple(_leaf(a) if isinstance(a, Tensor) else a for a in arguments)
            results = Interpreter(module).run(*arguments)
            wanted = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]
            pairs = [(r, t) for r, t in zip(results, tangents, strict=True) if r.requires_grad]
            if not pairs or not wanted:
                return [None] * count
            found = torch.autograd.grad([r for r, _ in pairs], wanted, [t for _, t in pairs], allow_unused=True)
        gradients = iter(found)
        return [next(gradients) if isinstance(a, Tensor) and a.requires_grad else None for a in arguments]

    examples = _examples(module)
    count = len(examples)
    results = module.graph.find_nodes(op="output")[0].args[0]
    with fake_mode:
        tangents = [torch.empty_like(r.meta["val"]) for r in results]
    traced = _traced(joint, [*examples, *tangents], fake_mode, _known_operators())
    nodes = list(traced.graph.find_nodes(op="placeholder"))
    gradients = list(traced.graph.find_nodes(op="output")[0].args[0])
    return Vjp(traced, nodes[:count], nodes[count:], gradients)


def _leaf(example: Tensor) -> Tensor:
    differentiable = example.is_floating_point() or example.is_complex()
    return example.detach().requires_grad_(differentiable)


def _examples(module: GraphModule) -> list[Any]:
    return [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]


def depends_on(nodes: Sequence[Node], graph: Graph) -> set[Node]:
    """``nodes`` and everything computed from them."""
    found = set(nodes)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def operands_outside(results: Sequence[Node], inside: set[Node]) -> list[Node]:
    """The operands that come from outside ``inside``, for those nodes of ``inside`` that ``results`` need; in graph
    order.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    todo = list(results)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in inside:
            todo += node.all_input_nodes
        else:
            found.add(node)
    return [node for node in results[0].graph.nodes if node in found] if found else []


def fractions_in(graph: Graph) -> set[Node]:
    """Numbers computed from symbolic sizes, such as 1 / (n * m). An operator can take only sizes as arguments, so these
    numbers are computed where they are used.
    """
    made = (node for node in graph.nodes if node.op == "call_function")
    return {node for node in made if isinstance(node.meta.get("val"), (float, torch.SymFloat))}
