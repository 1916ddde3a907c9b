"""How long the pass takes and how many nodes it leaves: ``python -m benchmarks run --suite compile``

The joint graphs of GRUCell loops and residual stacks of growing length are traced without Dynamo and rewritten, without
generating code. Reported: nodes before and after, the nodes that the backward needs, and seconds of the pass.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hwbp_compiler import passes
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.options import Options

from .harness import say
from .unrolled import loop, stack

CASES = {
    "GRUCell loop": (lambda size: loop(size, 4, 32), (64, 128, 256, 512, 900)),
    "residual stack": (lambda size: stack(size, 4, 16), (32, 64, 128, 256, 512)),
}


def joint_graph(model: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    from torch._functorch.aot_autograd import aot_export_joint_simple
    from torch._inductor.decomposition import select_decomp_table

    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().requires_grad_() for p in model.parameters()]

    def function(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.func.functional_call(model, dict(zip(names, values[:-1], strict=True)), (values[-1],)),)

    return aot_export_joint_simple(function, [*parameters, x], trace_joint=True, decompositions=select_decomp_table())


def backward_nodes(graph: torch.fx.Graph) -> int:
    """Operators that depend on a tangent. Taking one link's row from a stack is not counted."""
    carries: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or (node.op == "call_function" and any(n in carries for n in node.all_input_nodes)):
            carries.add(node)
    rows = (torch.ops.aten.select.int, operator.getitem)
    return sum(node.op == "call_function" and node.target not in rows for node in carries)


def run(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """Rows of all sizes, smallest first."""
    for name, (build, sizes) in CASES.items():
        for size in sizes[:2] if quick else sizes:
            joint = joint_graph(*build(size)())
            before, backward = len(joint.graph.nodes), backward_nodes(joint.graph)
            start = time.perf_counter()
            records = passes.run(joint.graph, Options(iterations=2, rewrite="always"))
            seconds = time.perf_counter() - start
            lengths = [r.length for r in records if r.decision == "rewritten"]
            row = {
                "case": name,
                "size": size,
                "nodes_before": before,
                "nodes_after": len(joint.graph.nodes),
                "backward_before": backward,
                "backward_after": backward_nodes(joint.graph),
                "links_rewritten": sum(lengths),
                "pass_s": seconds,
            }
            say(f"{name} of {size}: {before} nodes, {row['nodes_after']} after, {lengths} links, {seconds:.2f} s")
            yield row
