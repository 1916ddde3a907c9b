"""``torch.ops.highway.loop``: one compiled step, called for every time step.

The step is given as text: the Python code of a flat graph of operators. So a graph that contains the loop is plain
data. It can be printed, and another process can find it in torch.compile's caches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compiler.counting import count
from hwbp_compiler.engine.emitter import decompositions
from hwbp_compiler.engine.inline import needed
from hwbp_compiler.errors import first_line
from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import compile_step

from .native_loop import NativeLoop

log = logging.getLogger(__name__)

# The names that generated code may use: torch, and what numbers and devices print as. torch.fx always adds the others.
_NAMES: dict[str, Any] = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan}
_UNUSED = {"NoneType", "fx_pytree", "pytree"}

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "loop(str code, Tensor[] inputs, Tensor[] state, Tensor[] shared, SymInt length, bool reverse=False, "
    "SymInt[] sizes=[]) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operator = torch.ops.highway.loop.default


def code_of(
    graph: Graph,
    state: Sequence[Node],
    inputs: Sequence[Node],
    shared: Sequence[Node],
    results: Sequence[Node | None],
    add: bool = False,
) -> str:
    """The step ``(state, inputs, shared) -> results`` as text. The sizes in ``shared`` come last. All nodes in between
    must be operator calls. With ``add``, one input per result comes first and is added to that result; a result of None
    then counts as zero.
    """
    copied = Graph()
    environment = {node: copied.placeholder(f"state{i}") for i, node in enumerate(state)}
    added = [copied.placeholder(f"added{i}") for i in range(len(results) if add else 0)]
    environment |= {
        node: copied.placeholder(f"input{i}") for i, node in enumerate([*inputs, *sorted(shared, key=is_size)])
    }
    wanted = needed(environment, [node for node in results if node is not None])
    for node in graph.nodes:
        if node in wanted:
            environment[node] = copied.node_copy(node, environment.__getitem__)
    found = [None if node is None else environment[node] for node in results]
    for i, addend in enumerate(added):
        term = found[i]
        found[i] = addend if term is None else copied.call_function(torch.ops.aten.add.Tensor, (term, addend))
    copied.output(tuple(found))
    code = copied.python_code("self")
    unknown = set(code.globals) - _NAMES.keys() - _UNUSED
    if unknown:
        raise NotImplementedError(f"the step uses {', '.join(sorted(unknown))}")
    return _in_one_line(code.src)


def is_size(node: Node) -> bool:
    return not isinstance(node.meta["val"], Tensor)


def _in_one_line(source: str) -> str:
    """Put a function without branches on one line. Inductor quotes a node's arguments in comments that hold one line
    each.
    """
    head, *statements = [line.strip() for line in source.splitlines() if line.strip()]
    return f"{head} {'; '.join(statements)}"


@functools.lru_cache(maxsize=1024)
def step_of(code: str) -> GraphModule:
    names = {**_NAMES, "forward_": _function_of(code)}
    count = names["forward_"].__code__.co_argcount - 1
    arguments = ", ".join(f"arg{i}" for i in range(count))
    exec(f"def step({arguments}): return forward_(None, {arguments})", names)
    return symbolic_trace(names["step"])


def _function_of(code: str) -> Callable[..., Sequence[Tensor]]:
    names = dict(_NAMES)
    exec(code, names)  # safe: code_of generated the text
    return names["forward"]  # type: ignore[no-any-return]


@dataclass
class _CompiledStep:
    """A step for Python to call, with [*results to write, *state, *inputs, *shared], and the loop in C++ around the
    same step; None if the step could not be compiled.
    """

    call: Callable[[list[Tensor]], Any]
    native: NativeLoop | None = None


@functools.lru_cache(maxsize=1024)
def _compiled(code: str, slots: int, description: tuple, sizes: tuple[int, ...]) -> _CompiledStep:
    """The compiled step; the sizes become part of its code."""

    def make() -> tuple[GraphModule, list[Tensor]]:
        examples = [
            torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
            for shape, stride, dtype, device in description
        ]
        return _writing(code, slots, examples, sizes), examples

    try:
        devices = {device for *_, device in description}
        return _CompiledStep(compile_step(*make(), keeping_pieces({})), NativeLoop(make, devices))
    except Exception as error:  # no compiler, for example; then the graph around the loop runs in eager mode too
        count("failures")
        log.debug("where it failed", exc_info=error)
        warn_once(first_line(error))
    step = _function_of(code)

    def one_by_one(arguments: list[Tensor]) -> None:
        for row, result in zip(arguments[:slots], step(None, *arguments[slots:], *sizes), strict=True):
            row.copy_(result)

    return _CompiledStep(one_by_one)


@functools.cache
def warn_once(reason: str) -> None:
    log.warning("the step of a loop over time could not be compiled (%s); it runs operator by operator", reason)


def _writing(code: str, slots: int, examples: list[Tensor], sizes: tuple[int, ...]) -> GraphModule:
    """The step as a flat graph that also copies its results into rows."""
    with torch.no_grad():
        # Inductor needs decomposed operators. Fake, because the examples hold no valid indices or pivots to compute
        # with.
        tracing = make_fx(lambda *given: step_of(code)(*given, *sizes), decompositions(), tracing_mode="fake")
        step = tracing(*examples[slots:])
    step.graph.eliminate_dead_code()
    output = step.graph.find_nodes(op="output")[0]
    with step.graph.inserting_before(next(iter(step.graph.nodes))):
        rows = [step.graph.placeholder(f"row{i}") for i in range(slots)]
    with step.graph.inserting_before(output):
        pairs = zip(rows, output.args[0], strict=True)
        written = tuple(step.graph.call_function(torch.ops.aten.copy_.default, pair) for pair in pairs)
    output.args = (written,)
    step.recompile()
    return step  # type: ignore[no-any-return]


def _loop(
    code: str,
    inputs: list[Tensor],
    state: list[Tensor],
    shared: list[Tensor],
    length: int,
    reverse: bool = False,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """Row t of each result is the state after time step t. In reverse, the last row comes first, and the step that
    reads row t of the inputs writes row t. ``sizes`` are the step's last arguments, the same in every step.
    """
    stacked = [s.new_empty((length, *s.shape)) for s in state]
    state = [s.contiguous() for s in state]
    shared = list(shared)
    description = tuple(
        (tuple(t.shape), t.stride(), t.dtype, t.device)
        for t in (*(s[0] for s in stacked), *state, *(x[0] for x in inputs), *shared)
    )
    step = _compiled(code, len(stacked), description, tuple(sizes))
    if step.native and step.native.pays(length) and step.native.run(stacked, state, inputs, shared, reverse):
        return stacked
    rows = list(zip(*(s.unbind(0) for s in stacked), strict=True))
    read = list(zip(*(x.unbind(0) for x in inputs), strict=True)) if inputs else [()] * length
    order = range(length - 1, -1, -1) if reverse else range(length)
    current: Sequence[Tensor] = state
    for t in order:
        step.call([*rows[t], *current, *read[t], *shared])
        current = rows[t]
    return stacked


def _fake(code, inputs, state, shared, length, reverse=False, sizes=()):
    return [s.new_empty((length, *s.shape)) for s in state]


library.impl("loop", _loop, "CompositeExplicitAutograd")
torch.library.register_fake("highway::loop", _fake, lib=library)

# Inductor treats two copies of one tensor as the same. Then two returned values would share memory.
library.define("copy(Tensor tensor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
copy = torch.ops.highway.copy.default
library.impl("copy", lambda tensor: tensor.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("highway::copy", lambda tensor: tensor.new_empty(tensor.shape), lib=library)
torch.library.register_autograd("highway::copy", lambda ctx, gradient: gradient, lib=library)
