"""Write out recurrent cells on a GPU in operators that the passes can take apart.

``torch.gru_cell`` and ``torch.lstm_cell`` (which nn.GRUCell and nn.LSTMCell call) consist of elementary operators on a
CPU. On a GPU they are two products and one fused kernel, whose backward is one opaque operator, so no highway could be
found. Here they become the same operators as on a CPU, before autograd sees them. Inductor fuses the gates again.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node


def write_out_cells(module: GraphModule, everywhere: bool = False) -> int:
    """Replace cells in place, in a graph from Dynamo and in its regions (a checkpoint, a step of ``recurrent``), if
    they are fused (or ``everywhere``). Returns how many were replaced.
    """
    parts = [part for part in module.modules() if isinstance(part, GraphModule)]
    return sum(_write_out_in(part, everywhere) for part in parts)


def _write_out_in(module: GraphModule, everywhere: bool) -> int:
    replaced = 0
    for node in list(module.graph.nodes):
        written = _WRITTEN_OUT.get(node.target) if node.op == "call_function" else None
        if written is None or not (everywhere or _is_fused(node)) or node.kwargs:
            continue
        with module.graph.inserting_before(node):
            result = written(module.graph, *node.args)
        if isinstance(result, Node):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):  # Dynamo unpacks a tuple with getitem
                assert user.target is operator.getitem
                user.replace_all_uses_with(result[user.args[1]])
                module.graph.erase_node(user)
        module.graph.erase_node(node)
        replaced += 1
    if replaced:
        module.recompile()
    return replaced


def _is_fused(node: Node) -> bool:
    """Decided by the weights: nothing is known yet about the values of a cell written out below."""
    values = [argument.meta.get("example_value") for argument in node.all_input_nodes]
    return any(isinstance(value, torch.Tensor) and value.device.type not in ("cpu", "meta") for value in values)


# The order of operands is ATen's, so the numbers are equal too. Only functions of torch itself are used, because
# AOTAutograd does not cache a graph with other functions.


def _gru_cell(
    graph: Graph, x: Node, h: Node, w_ih: Node, w_hh: Node, b_ih: Node | None = None, b_hh: Node | None = None
) -> Node:
    call = graph.call_function
    input_gates, hidden_gates = call(F.linear, (x, w_ih, b_ih)), call(F.linear, (h, w_hh, b_hh))
    r_i, z_i, n_i = _parts(graph, input_gates, 3)
    r_h, z_h, n_h = _parts(graph, hidden_gates, 3)
    r, z = (call(torch.sigmoid, (call(torch.add, pair),)) for pair in ((r_h, r_i), (z_h, z_i)))
    n = call(torch.tanh, (call(torch.add, (n_i, call(torch.mul, (n_h, r)))),))
    return call(torch.add, (call(torch.mul, (call(torch.sub, (h, n)), z)), n))


def _lstm_cell(
    graph: Graph,
    x: Node,
    state: Sequence[Node],
    w_ih: Node,
    w_hh: Node,
    b_ih: Node | None = None,
    b_hh: Node | None = None,
) -> tuple[Node, Node]:
    call = graph.call_function
    h, c = state
    gates = call(torch.add, (call(F.linear, (h, w_hh, b_hh)), call(F.linear, (x, w_ih, b_ih))))
    i, f, g, o = _parts(graph, gates, 4)
    i, f, o = (call(torch.sigmoid, (gate,)) for gate in (i, f, o))
    kept, added = call(torch.mul, (f, c)), call(torch.mul, (i, call(torch.tanh, (g,))))
    c = call(torch.add, (kept, added))
    return call(torch.mul, (o, call(torch.tanh, (c,)))), c


def _parts(graph: Graph, gates: Node, count: int) -> list[Node]:
    chunks = graph.call_function(torch.chunk, (gates, count, -1))
    return [graph.call_function(operator.getitem, (chunks, i)) for i in range(count)]


_WRITTEN_OUT = {torch.gru_cell: _gru_cell, torch.lstm_cell: _lstm_cell}
