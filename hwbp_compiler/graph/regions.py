"""Regions of a graph from Dynamo: a checkpoint has a graph of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def regions_of(module: GraphModule, node: Node) -> list[tuple[GraphModule, list[tuple[Node, Any]]]]:
    """The graphs that ``node`` of ``module`` runs, each with its inputs and what ``node`` passes for them."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    found: list[tuple[GraphModule, list[tuple[Node, Any]]]] = []
    for argument in node.args:
        if not isinstance(argument, Node) or argument.op != "get_attr":
            continue
        body = getattr(module, str(argument.target), None)
        if isinstance(body, GraphModule):
            inputs = list(body.graph.find_nodes(op="placeholder"))
            passed = list(node.args[len(node.args) - len(inputs) :]) if inputs else []
            found.append((body, list(zip(inputs, passed, strict=False))))
    return found
