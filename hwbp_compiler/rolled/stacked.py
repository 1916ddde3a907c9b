"""Split a state that is a stack of several tensors into these tensors.

``nn.LSTM`` holds the states of its layers as one tensor. Its step selects each entry and stacks the new ones. Seen as a
whole, the stack has no elementwise path to the next stack; layer by layer it has one. So if a component's next value is
a stack, each entry becomes a component. The step may use only single entries of the state: between the state and the
selection, every operator must work on each entry separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.graph.rules import Kind, rule_of

from .trace import Step

aten = torch.ops.aten


def take_apart(step: Step, fake_mode: Any) -> tuple[Step, list[int | None]]:
    """The step over single entries, and for each component of its state the dimension along which it was stacked; None
    if it is unchanged. Stacks along different dimensions never meet: a value that depends on both would be selected
    along both.
    """
    dims = [_dim_of_stack(node) for node in step.next_state]
    for number, dim in enumerate(dims):
        if dim is not None and not _seen_by_entries(step, step.state[number], dim):
            dims[number] = None
    if all(dim is None for dim in dims):
        return step, dims
    return _rebuilt(step, dims, fake_mode), dims


def _dim_of_stack(node: Node) -> int | None:
    if node.target is not aten.stack.default:
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return dim % node.meta["val"].dim()  # type: ignore[operator,no-any-return]


def _seen_by_entries(step: Step, state: Node, dim: int) -> bool:
    """Whether a component of the state is used only through selections of its entries."""
    whole = {*step.next_state, *step.outputs}
    todo, seen = [state], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in whole:
            return False
        for user in node.users:
            if user.target is aten.select.int and user.args[1] % node.meta["val"].dim() == dim:  # type: ignore[operator]
                continue
            if user.op == "output" or not _works_on_entries(user, state):
                return False
            todo.append(user)
    return True


def _works_on_entries(node: Node, state: Node) -> bool:
    rule, value = rule_of(node), node.meta["val"]
    if rule is None or rule.kind is not Kind.ELEMENTWISE or value.shape != state.meta["val"].shape:
        return False
    return all(n.meta["val"].dim() <= value.dim() for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor))


def _rebuilt(step: Step, dims: Sequence[int | None], fake_mode: Any) -> Step:
    graph = Graph()
    known: dict[Node, Node] = {}
    entries: dict[Node, tuple[int, list[Node]]] = {}  # stacked values: the dimension, the entries
    state: list[Node] = []
    for node, after, dim in zip(step.state, step.next_state, dims, strict=True):
        if dim is None:
            known[node] = graph.node_copy(node)
            state.append(known[node])
            continue
        parts = []
        for i in range(len(after.args[0])):  # type: ignore[arg-type]
            part = graph.placeholder(f"{node.name}_{i}")
            with fake_mode:
                part.meta["val"] = torch.empty_like(
                    node.meta["val"].select(dim, i), memory_format=torch.contiguous_format
                )
            parts.append(part)
        entries[node] = dim, parts
        state += parts
    others = [*step.inputs, *step.shared]
    for node in others:
        known[node] = graph.node_copy(node)

    def call(target: Any, like: Node, *args: Any, **kwargs: Any) -> Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = dict(like.meta)
        values = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with fake_mode, torch.no_grad():
            made.meta["val"] = target(*values[0], **values[1])
        return made

    def entry(argument: Any, i: int, dim: int, rank: int) -> Any:
        """Entry i of an operand of an operator whose result has rank ``rank``."""
        if not isinstance(argument, Node):
            return argument
        if argument in entries:
            return entries[argument][1][i]
        held = argument.meta["val"]
        mine = known[argument]
        if not isinstance(held, Tensor) or held.dim() <= rank - 1 - dim:
            return mine
        at = dim - (rank - held.dim())
        return call(aten.select.int, argument, mine, at, 0 if held.shape[at] == 1 else i)

    for node in step.module.graph.nodes:
        if node.op != "call_function":
            continue
        stacked = next((entries[n] for n in node.all_input_nodes if n in entries), None)
        if stacked is None:
            known[node] = graph.node_copy(node, known.__getitem__)
        elif node.target is aten.select.int:
            count = len(stacked[1])
            known[node] = stacked[1][node.args[2] % count]  # type: ignore[operator]
        else:
            dim, rank = stacked[0], node.meta["val"].dim()
            parts = []
            for i in range(len(stacked[1])):
                args = [entry(a, i, dim, rank) for a in node.args]
                named = {key: entry(a, i, dim, rank) for key, a in node.kwargs.items()}
                parts.append(call(node.target, node, *args, **named))
            entries[node] = dim, parts
    next_state: list[Node] = []
    for after, dim in zip(step.next_state, dims, strict=True):
        next_state += [known[after]] if dim is None else [known[part] for part in after.args[0]]  # type: ignore[union-attr,index]
    outputs = [known[node] for node in step.outputs]
    graph.output([*next_state, *outputs])
    module = GraphModule({}, graph)
    module.graph.eliminate_dead_code()
    return Step(module, state, [known[n] for n in step.inputs], [known[n] for n in step.shared], next_state, outputs)
