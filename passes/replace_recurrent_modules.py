"""Before the joint graph: calls such as ``torch.gru`` become ``highway::recurrent_module``, layer by layer.

A part gets a call of its own if it can become a chain (one direction of a GRU or LSTM layer), or if it can go back
through time without PyTorch's recording. Then its backward pass stands alone in the joint graph, where
``rewrite_recurrent_modules`` decides on it. Everything else stays one call.
"""

from __future__ import annotations

import operator as python
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.cost.modules import estimate_recurrent
from hwbp_compiler.graph.sizes import hint
from hwbp_compiler.options import Options
from hwbp_compiler.recurrence import dropout
from hwbp_compiler.recurrence.module_call import KINDS, ModuleCall
from hwbp_compiler.recurrence.operator import operator

from .rewrite_recurrent_modules import THROUGH_TIME

_KIND = {getattr(torch, kind): kind for kind in KINDS}


def replace_recurrent_modules(module: GraphModule, options: Options) -> None:
    """Rewrite in place the graph that Dynamo gives to a backend, and the graphs of its regions (a checkpoint)."""
    for part in module.modules():
        if isinstance(part, GraphModule):
            _replace_in(part, options)


def _replace_in(module: GraphModule, options: Options) -> None:
    graph = module.graph
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in _KIND]
    for node in calls:
        if any(user.target is not python.getitem for user in node.users):
            continue  # Dynamo unpacks tuples; any other use is left to be unrolled
        call = ModuleCall.of(_KIND[node.target], node.args, node.kwargs)
        with graph.inserting_before(node):
            outputs = _Replacement(graph, node, call).outputs(options)
        for user in list(node.users):
            outputs[user.args[1]].meta.setdefault("example_value", user.meta.get("example_value"))
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
    if calls:
        module.recompile()


class _Replacement:
    """One call. The new nodes take its place and its source line."""

    def __init__(self, graph: Graph, origin: Node, call: ModuleCall) -> None:
        self.graph, self.origin, self.call = graph, origin, call
        dropout = call.dropout
        self.dropout = float(dropout.meta["example_value"]) if isinstance(dropout, Node) else float(dropout)
        self.differentiable = torch.is_grad_enabled() and any(map(_may_need_gradient, call.tensors))

    def outputs(self, options: Options) -> list[Node]:
        """[output, h_n] or [output, h_n, c_n], which replace what the call returned."""
        call = self.call
        if call.batch_first:
            call = replace(call, input=self._emit(torch.transpose, call.input, 0, 1), batch_first=False)
        if self._takes_layers_apart(options):
            output, *last = self._by_layers(call)
        else:
            output, *last = self._recurrent(call, self.dropout)
        if self.call.batch_first:
            output = self._emit(torch.transpose, output, 0, 1)
        return [output, *last]

    def _takes_layers_apart(self, options: Options) -> bool:
        call = self.call
        projected = len(call.cells[0]) != (4 if call.has_biases else 2)
        if not self.differentiable or options.rewrite == "never" or call.batch_sizes is not None or projected:
            return False
        approximates = options.iterations != "exact" and call.kind in ("gru", "lstm")
        if _on_a_cpu(call):
            wanted = approximates and (not options.auto or self._is_worth_taking_apart(options))
            return wanted or call.kind in THROUGH_TIME
        return approximates and self._is_worth_taking_apart(options)

    def _is_worth_taking_apart(self, options: Options) -> bool:
        """Whether it pays although cuDNN's parallel layers and directions are lost."""
        call, seen = self.call, self.call.input.meta.get("example_value")
        alone = call.layers * call.directions == 1 and not options.auto
        if options.rewrite == "always" or alone or seen is None or seen.dim() != 3:
            return True
        output = self.origin.meta["example_value"][0]
        if call.batch_first:
            seen, output = seen.transpose(0, 1), output.transpose(0, 1)
        tried = options.tried(hint(seen.shape[0])) if options.auto else [options.numbers]
        return any(estimate_recurrent(call.kind, seen, output, how, call.layers, call.directions).pays for how in tried)

    def _by_layers(self, call: ModuleCall) -> list[Node]:
        """The same with one call for each layer and direction, and separate dropout between the layers."""
        series, last = call.input, []
        for layer in range(call.layers):
            if layer and call.train and self.dropout:
                series = self._emit(torch.mul, series, self._emit(dropout.operator, series, self.dropout))
            outputs = []
            for direction in range(call.directions):
                number = layer * call.directions + direction
                state = tuple(self._emit(python.getitem, s, slice(number, number + 1)) for s in call.state)
                cell = replace(call, weights=call.cells[number], state=state, layers=1, bidirectional=False)
                forward = direction == 0
                input = series if forward else self._emit(torch.flip, series, [0])
                output, *ends = self._recurrent(replace(cell, input=input), 0.0, self._place(layer, direction))
                outputs.append(output if forward else self._emit(torch.flip, output, [0]))
                last.append(ends)
            series = outputs[0] if len(outputs) == 1 else self._emit(torch.cat, outputs, -1)
        if len(last) == 1:
            return [series, *last[0]]
        return [series, *(self._emit(torch.cat, list(parts), 0) for parts in zip(*last, strict=True))]

    def _place(self, layer: int, direction: int) -> str:
        """A name for this part of the module; "" if it is the whole module."""
        call = self.call
        whole = call.layers * call.directions == 1
        return "" if whole else f"layer {layer} reverse" if direction else f"layer {layer}"

    def _recurrent(self, call: ModuleCall, dropout: float, place: str = "") -> list[Node]:
        record = [_may_need_gradient(t) for t in call.tensors] if self.differentiable else []
        node = self._emit(
            operator, call.kind, call.input, call.batch_sizes, list(call.state), list(call.weights), call.has_biases,
            call.layers, dropout, call.train, call.bidirectional, None, record,
        )  # fmt: skip
        stack = node.meta.get("nn_module_stack")
        if place and stack:  # as if each were a module inside it
            name, kind = list(stack.values())[-1]
            node.meta["nn_module_stack"] = {**stack, place: (f"{name} {place}", kind)}
        output, *last = (self._emit(python.getitem, node, number) for number in range(1 + len(call.state)))
        # The backward pass reads the output, and later code may change the output in place (see ``_join_copies``).
        return [self._emit(torch.clone, output) if any(record) else output, *last]

    def _emit(self, target: Any, *args: Any) -> Node:
        node = self.graph.call_function(target, args)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.origin.meta:
                node.meta[key] = self.origin.meta[key]
        return node


def _on_a_cpu(call: ModuleCall) -> bool:
    """Decided by the weights: nothing is known yet about an input that is emitted here."""
    return bool(call.weights[0].meta["example_value"].device.type == "cpu")


def _may_need_gradient(tensor: Node) -> bool:
    """True also for tensors that are emitted here, about which nothing is known yet."""
    value = tensor.meta.get("example_value")
    return value is None or bool(value.requires_grad)
