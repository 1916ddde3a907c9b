"""A script for bug reports. It contains the joint graph, draws inputs of its shapes, runs the passes and compares
gradients.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch
from torch import Tensor, fx
from torch.fx.graph import CodeGen

from hwbp_compiler.graph.sizes import hint
from hwbp_compiler.options import Options

from .data import ExplainedGraph, copied

_LARGEST_CONSTANT = 4096
_LOOPS = (
    "The loops of hwbp_compiler.recurrent in this graph were rewritten before it was traced, so they are the same in "
    "all gradients compared here. For a report about them, send the cell."
)

_SCRIPT = '''"""Rebuilds a joint graph, runs hwbp_compiler's passes on it and compares the gradients.

Made by report.save_repro. torch {version}, options {options}
"""

import sys

import torch
from torch import device, inf, nan, tensor  # noqa: F401
from torch.fx.experimental.proxy_tensor import make_fx

import hwbp_compiler.rolled.loop  # noqa: F401
import hwbp_compiler.scan  # noqa: F401
from hwbp_compiler import Options, passes


class JointGraph(torch.nn.Module):
    def __init__(self):
        super().__init__()
{constants}

{forward}


def tensor_like(shape, stride, dtype, place):
    """Small values of either sign; norm weights, biases and variances (one dimension) near 1."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if all(shape) else 0
    if dtype.is_floating_point or dtype.is_complex:
        flat = torch.rand(size, dtype=torch.float32) + 0.5
        if len(shape) > 1:
            flat = (flat - 1) * 2 / shape[-1] ** 0.5
    else:
        flat = torch.randint(0, 2, (size,))
    return flat.to(dtype).to(place).as_strided(shape, stride)


torch.manual_seed(0)
INPUTS = {{
{inputs}
}}
OPTIONS = {option_values}
NOTE = {note!r}


def joint_graph():
    module = make_fx(JointGraph(), tracing_mode="fake")(*INPUTS.values())
    for node, name in zip(module.graph.find_nodes(op="placeholder"), INPUTS):
        node.target = name
    module.recompile()
    return module


def gradients(module):
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = module(*(v.clone() if isinstance(v, torch.Tensor) else v for v in INPUTS.values()))
    primals = sum("tangents" not in name for name in INPUTS)
    return [g for g in outputs[-primals:] if isinstance(g, torch.Tensor)]


def main():
    if NOTE:
        print(NOTE)
    exact = gradients(joint_graph())
    joined = torch.cat([g.double().flatten() for g in exact])
    print(f"{{len(INPUTS)}} inputs, {{len(exact)}} gradients of norm {{joined.norm():.6g}}")
    failed = False
    for k in {iterations}:
        module = joint_graph()
        records = passes.run(module.graph, Options(**{{**OPTIONS, "iterations": k}}))
        module.recompile()
        found = torch.cat([g.double().flatten() for g in gradients(module)])
        done = ", ".join(f"{{r.length}} links {{r.decision}}" for r in records) or "no chain"
        print(f"k = {{k}}: relative error {{(found - joined).norm() / joined.norm():.3e}} ({{done}})")
        for record in records:
            if record.decision == "declined":
                print(f"    {{record.length}} links declined: {{record.reason}}")
            failed = failed or record.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
'''


def write(found: ExplainedGraph | None, options: Options, path: str | os.PathLike[str]) -> None:
    """See :meth:`Report.save_repro`."""
    if found is None:
        raise ValueError("save_repro: the report has no joint graph; print(report) says why")
    graph = copied(found.before.graph)
    graph.set_codegen(CodeGen())  # plain arguments, one per input
    longest = max((c.length for c in found.chains if c.members), default=1)
    options = options.in_numbers()
    given = options.iterations if isinstance(options.iterations, int) else 1
    wanted = sorted({0, min(given, max(longest - 1, 0)), max(longest - 1, 0)})
    chosen = {**dataclasses.asdict(options), "rewrite": "always", "strict": True}
    del chosen["iterations"]
    Path(path).write_text(
        _SCRIPT.format(
            version=torch.__version__,
            options=dataclasses.asdict(options),
            constants=_constants(found.before, graph),
            forward=_indented(graph.python_code("self").src),
            inputs="\n".join(f"    {n.target!r}: {_input(n)}," for n in graph.find_nodes(op="placeholder")),
            option_values=chosen,
            iterations=tuple(wanted),
            note=_LOOPS if any(c.decision == "rewritten" for c in found.chains[: found.loops]) else "",
        ),
        encoding="utf-8",
    )


def _indented(source: str) -> str:
    return "\n".join("    " + line if line.strip() else line for line in source.strip("\n").splitlines())


def _constants(module: fx.GraphModule, graph: fx.Graph) -> str:
    lines = []
    for name in sorted({str(node.target) for node in graph.find_nodes(op="get_attr")}):
        value = getattr(module, name, None)
        if not isinstance(value, Tensor) or value.numel() > _LARGEST_CONSTANT:
            raise ValueError(
                f"save_repro: the graph holds {name!r} ({type(value).__name__}), which a script cannot contain"
            )
        lines.append(f"        self.register_buffer({name!r}, {_spelt(value)})")
    return "\n".join(lines)


def _spelt(value: Tensor) -> str:
    return f"tensor({value.detach().cpu().tolist()!r}, dtype={value.dtype}, device={str(value.device)!r})"


def _input(node: fx.Node) -> str:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        shape, stride = (tuple(map(hint, sizes)) for sizes in (value.shape, value.stride()))
        return f"tensor_like({shape}, {stride}, {value.dtype}, {str(value.device)!r})"
    return repr(hint(value))
