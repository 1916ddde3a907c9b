"""Write out calls of nn.RNN, nn.GRU and nn.LSTM for a single time step as calls of their cells.

Reinforcement learning calls a module once per step, because masks reset the state in between. In a loop that is
rerolled, such a call is part of the step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.reasons import Declined, Reason
from hwbp_compiler.recurrence.module_call import ModuleCall

_CELLS: dict[Callable[..., Any], tuple[str, Any]] = {
    torch.rnn_tanh: ("rnn_tanh", torch.rnn_tanh_cell),
    torch.rnn_relu: ("rnn_relu", torch.rnn_relu_cell),
    torch.gru: ("gru", torch.gru_cell),
    torch.lstm: ("lstm", torch.lstm_cell),
}


def write_out_modules(module: GraphModule) -> None:
    """Rewrite a graph from Dynamo in place. Raises Declined for a call of more than one step, or one that cannot be
    written as cells.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_function" and node.target in _CELLS]
    for node in calls:
        kind, cell = _CELLS[node.target]
        call = ModuleCall.of(kind, node.args, node.kwargs)
        _check(call, kind)
        with module.graph.inserting_before(node):
            output, last = _Cells(module.graph, node, cell).run(call)
        results = [output, *last]
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    if calls:
        module.recompile()


def _check(call: ModuleCall, kind: str) -> None:
    seen = call.input.meta["example_value"]
    projected = len(call.cells[0]) != (4 if call.has_biases else 2)
    steps = seen.shape[1 if call.batch_first else 0]
    drops = call.train and call.layers > 1 and not (isinstance(call.dropout, float | int) and call.dropout == 0)
    if seen.dim() != 3 or steps != 1 or projected or call.batch_sizes is not None:
        raise Declined(Reason.CELL_CONTAINS_MODULE.of(module=kind.split("_")[0].upper()))
    if drops:
        raise Declined(Reason.CELL_DRAWS_RANDOM_NUMBERS.of(operator="dropout"))


class _Cells:
    def __init__(self, graph: Graph, origin: Node, cell: Any) -> None:
        self.graph, self.origin, self.cell = graph, origin, cell

    def run(self, call: ModuleCall) -> tuple[Node, list[Node]]:
        """The module's output, and its last states ``[layers * directions, B, H]``."""
        time = 1 if call.batch_first else 0
        series = self._emit(torch.select, call.input, time, 0)
        last: list[tuple[Node, ...]] = []
        for layer in range(call.layers):
            outputs = []
            for direction in range(call.directions):
                number = layer * call.directions + direction
                one = call.layers * call.directions == 1  # an operator on all elements, for K
                state = [
                    self._emit(torch.squeeze, s, 0) if one else self._emit(torch.select, s, 0, number)
                    for s in call.state
                ]
                made = self._emit(self.cell, series, state[0] if len(state) == 1 else tuple(state), *call.cells[number])
                found = (made,) if len(state) == 1 else tuple(self._emit(operator.getitem, made, i) for i in range(2))
                outputs.append(found[0])
                last.append(found)
            series = outputs[0] if len(outputs) == 1 else self._emit(torch.cat, outputs, -1)
        output = self._emit(torch.unsqueeze, series, time)
        if len(last) == 1:
            return output, [self._emit(torch.unsqueeze, part, 0) for part in last[0]]
        return output, [self._emit(torch.stack, list(parts), 0) for parts in zip(*last, strict=True)]

    def _emit(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        node.meta = {k: v for k, v in self.origin.meta.items() if k != "example_value"}
        held = [a.meta.get("example_value") if isinstance(a, Node) else a for a in args]
        if target is torch.select and isinstance(held[0], Tensor):
            with held[0].fake_mode:
                node.meta["example_value"] = torch.select(*held)
        return node
