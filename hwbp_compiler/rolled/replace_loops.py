"""Find the loops that ``hwbp_compiler.recurrent`` left in a Dynamo graph, and replace each by a :class:`Recurrence`.

Dynamo traces ``recurrent`` into four kinds of nodes::

    s0 = highway.enter(state)                   each component of the state, as the step takes it
    x0 = highway.first(input)                   each input's first row
    s1, y0 = wrap(step, s0, x0, ...)            one step as a graph; values from outside become arguments
    last, y = highway.rolled([s1], [y0], [state], [input], options)

These nodes are placeholders and cannot run: ``rolled`` only knows the sizes of its results, and all are replaced before
anything is compiled. Dynamo handles all guards and reuses its compilations as usual.
"""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hwbp_compiler.graph.origin import source_line
from hwbp_compiler.graph.regions import regions_of
from hwbp_compiler.options import Options
from hwbp_compiler.torch_private import enter_autocast, exit_autocast, without_saved_tensor_hooks

library = torch.library.Library("highway", "FRAGMENT")
tags = (torch.Tag.pt2_compliant_tag,)
library.define("enter(Tensor state) -> Tensor", tags=tags)
library.define("first(Tensor input) -> Tensor", tags=tags)
library.define(
    "rolled(Tensor[] next_state, Tensor[] outputs, Tensor[] state, Tensor[] inputs, str options) -> Tensor[]", tags=tags
)
enter, first, rolled = (getattr(torch.ops.highway, name) for name in ("enter", "first", "rolled"))


def _enter(state: Tensor) -> Tensor:
    return torch.empty_like(state)


def _first(input: Tensor) -> Tensor:
    return torch.empty_like(input[0])


def _rolled(
    next_state: Sequence[Tensor], outputs: Sequence[Tensor], state: Sequence[Tensor], inputs: Sequence[Tensor], _: str
) -> list[Tensor]:
    length = inputs[0].shape[0]
    return [*map(torch.empty_like, state), *(y.new_empty((length, *y.shape)) for y in outputs)]


def _no_gradient(ctx: Any, *gradients: Any) -> Any:
    raise AssertionError("a placeholder for a loop, which must be replaced before anything is differentiated")


for _name, _shapes in (("enter", _enter), ("first", _first), ("rolled", _rolled)):
    torch.library.register_fake(f"highway::{_name}", _shapes, lib=library)
    torch.library.register_autograd(f"highway::{_name}", _no_gradient, lib=library)

# The file that holds the loop around the user's step. Source lines in it are ours.
_HERE = str(Path(__file__).with_name("function.py"))


@torch.compiler.assume_constant_result
def encode(options: Mapping[str, Any] | None) -> str:
    return "" if options is None else json.dumps(dict(options))


def replace_loops(gm: GraphModule, options: Options, parse: Callable[[Any], Options]) -> list[Any]:
    """Replace the loops in place, in the graph and in its regions (a checkpoint, the cell of another loop). Return the
    recurrences in graph order. ``parse(mapping)`` gives a loop's own options.
    """
    found: list[Any] = []
    _replace_in(gm, (), lambda own: options if own is None else parse(own), found)
    return found


def _replace_in(
    gm: GraphModule, around: tuple[Sequence[Any], ...], options: Callable[[Any], Options], found: list[Any]
) -> None:
    """``around`` holds the arguments of the autocast regions that contain ``gm``."""
    before, autocasts = len(found), {}
    for node in list(gm.graph.nodes):
        if node.target is enter_autocast:
            autocasts[node] = node.args
        elif node.target is exit_autocast:
            autocasts.pop(node.args[0])
        elif _is_step(node):
            for region, _ in regions_of(gm, node):
                _replace_in(region, (*around, *autocasts.values()), options, found)
        elif node.target is rolled:
            with as_around((*around, *autocasts.values())):
                found.append(_replace(gm, node, f"highway_recurrence_{len(found)}", options))
    if len(found) > before:
        gm.graph.lint()
        gm.recompile()


@contextlib.contextmanager
def as_around(autocasts: Sequence[Any]) -> Iterator[None]:
    """Trace as a loop inside autocast regions with these arguments would run."""
    with contextlib.ExitStack() as stack:
        for device, dtype, enabled, cached in autocasts:
            stack.enter_context(torch.autocast(device, dtype, enabled, cached))
        # A checkpoint in eager mode around the model counts what autograd saves. It must not count what is traced here.
        stack.enter_context(without_saved_tensor_hooks())
        yield


def _replace(gm: GraphModule, node: Node, name: str, options: Callable[[Any], Options]) -> Any:
    """Replace one loop, whose results are those of ``node``. Its step is traced here, before the graph runs."""
    from hwbp_compiler.passes.write_out_cells import write_out_cells

    from .recurrence import build
    from .trace import Body

    next_state, outputs, state, inputs, own = node.args
    step = next_state[0].args[0]
    body: GraphModule = getattr(gm, step.args[0].target)
    write_out_cells(body)
    taken: dict[Node, int] = {}  # argument of the step -> position in (state, inputs, shared)
    shared: list[Node] = []
    for argument in step.args[1:]:
        if argument.target is enter:
            taken[argument] = state.index(argument.args[0])
        elif argument.target is first:
            taken[argument] = len(state) + inputs.index(argument.args[0])
        else:
            taken[argument] = len(state) + len(inputs) + len(shared)
            shared.append(argument)
    order = [taken[argument] for argument in step.args[1:]]
    results = [result.args[1] for result in (*next_state, *outputs)]
    cell = Body(body, order, results)
    starts, rows, same = ([_example(n) for n in part] for part in (state, inputs, shared))
    source = _source(body, results[0]) or source_line(node)
    mine = options(json.loads(own) if own else None)
    recurrence = build(name, cell, starts, rows, same, starts[0].fake_mode, mine, source)
    gm.add_submodule(name, recurrence)
    with gm.graph.inserting_before(node):
        call = gm.graph.call_module(name, (*state, *inputs, *shared))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    _erase([node, *next_state, *outputs, step, *step.args[1:]])
    return recurrence


def _erase(nodes: Sequence[Node]) -> None:
    for node in dict.fromkeys(nodes):
        if not node.users and (node.target in (enter, first, rolled, operator.getitem) or _is_step(node)):
            node.graph.erase_node(node)


def _is_step(node: Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def _example(node: Any) -> Any:
    return node.meta["example_value"] if isinstance(node, Node) else node


def is_ours(line: str) -> bool:
    """Whether this source line belongs to our loop around the user's step."""
    return _HERE in line


def _source(body: GraphModule, result: int) -> str:
    """The user's line that computes the next state. Our own copy comes after it and is skipped."""
    node = body.graph.find_nodes(op="output")[0].args[0][result]
    while is_ours(source_line(node)) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return source_line(node)
