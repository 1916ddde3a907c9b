"""``torch.ops.highway.loop_segments``: one compiled step, called for all segments of a series at once.

The step is that of :mod:`.loop`, as text, for one link. Here every link of a batch takes it: the batching rules make of
it a step over lanes, whose number is a symbol. So another length of the series compiles nothing.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from hwbp_compiler.counting import count
from hwbp_compiler.engine.batching import decompositions
from hwbp_compiler.engine.segments import Cut, LastRun
from hwbp_compiler.errors import first_line
from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import compile_step, examples_of_any_number

from .live import AllSteps, LiveEmitter, Sizes, constant
from .loop import step_of, warn_once

log = logging.getLogger(__name__)

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "loop_segments(str code, Tensor[] inputs, Tensor[] ends, Tensor[] shared, SymInt segment, bool whole, "
    "SymInt[] sizes=[]) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
operator = torch.ops.highway.loop_segments.default


def _over_lanes(code: str, batched: int, sizes: Sequence[int]) -> Callable[..., list[Tensor]]:
    """The step with a leading dimension for its first ``batched`` arguments and all its results."""
    graph = step_of(code).graph
    arguments, results = graph.find_nodes(op="placeholder"), graph.find_nodes(op="output")[0].args[0]

    def run(*given: Tensor) -> list[Tensor]:
        values = [constant(value, i < batched) for i, value in enumerate((*given, *sizes))]
        known = dict(zip(arguments, values, strict=True))
        emitter = LiveEmitter(given[0].shape[0], Sizes({}))
        steps = AllSteps(emitter, known)
        return [emitter.batch(steps[node]).meta["val"] for node in results]  # type: ignore[union-attr]

    return run


@functools.lru_cache(maxsize=1024)
def _compiled(
    code: str, slots: int, batched: int, description: tuple[Any, ...], sizes: tuple[int, ...], alone: bool
) -> Callable[[list[Tensor]], Any]:
    """Takes [*results to write, *state, *inputs, *shared]; the first ``slots + batched`` have lanes, any number of them
    or, if ``alone``, one."""
    step = _over_lanes(code, batched, sizes)

    def write(*given: Tensor) -> list[Tensor]:
        results = step(*given[slots:])
        return [row.copy_(result) for row, result in zip(given[:slots], results, strict=True)]

    try:
        with examples_of_any_number(description, 0 if alone else slots + batched) as examples, torch.no_grad():
            traced = make_fx(write, decompositions())(*examples)
        return compile_step(traced, examples, keeping_pieces({}))
    except Exception as error:
        count("failures")
        log.debug("where it failed", exc_info=error)
        warn_once(first_line(error))
    return lambda arguments: write(*arguments)


def _loop_segments(
    code: str,
    inputs: list[Tensor],
    ends: list[Tensor],
    shared: list[Tensor],
    segment: int,
    whole: bool,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """Row t of ``inputs`` [T, ...] is read by the step through link t; ``ends`` are e_s [C, ...] per component if
    ``whole``, else of segments 2..C (SEGMENTS: engine/segments.py).

    Returns, per component, the states 0..T [T + 1, ...] if ``whole``, else those before segments 2..C [C - 1, ...].
    """
    links = inputs[0].shape[0]
    if not whole:
        cut = Cut(segment, ends[0].shape[0] + 1, links - ends[0].shape[0] * segment)
        states, spare = [e.contiguous() for e in ends], [torch.empty_like(e) for e in ends]
        for step in range(segment):
            rows = slice(cut.first + segment - 1 - step, None, segment)
            _call(code, spare, states, [x[rows] for x in inputs], shared, sizes)
            # What was given may be somebody else's.
            states, spare = spare, [torch.empty_like(e) for e in ends] if step == 0 else states
        return states
    found = [e.new_empty((links + 1, *e.shape[1:])) for e in ends]
    last = LastRun(links, segment)
    for series, end in zip(found, ends, strict=True):
        series[last.first :: segment] = end
    for rows, _, with_rest in last:
        # Link t leads from state t + 1 to state t.
        after = slice(rows.start + 1, None if with_rest else rows.start + 2, segment)
        before = slice(rows.start, -1 if with_rest else rows.start + 1, segment)
        _call(code, [s[before] for s in found], [s[after] for s in found], [x[rows] for x in inputs], shared, sizes)
    return found


def _call(
    code: str,
    into: list[Tensor],
    states: list[Tensor],
    inputs: list[Tensor],
    shared: list[Tensor],
    sizes: Sequence[int],
) -> None:
    lanes = states[0].shape[0]
    with_lanes = [*into, *states, *inputs]
    of_any = tuple((tuple(t.shape[1:]), t.stride(), t.dtype, t.device) for t in with_lanes)
    of_all = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in shared)
    step = _compiled(code, len(into), len(states) + len(inputs), (of_any, of_all), tuple(sizes), lanes == 1)
    step([*with_lanes, *shared])


def _fake(code: Any, inputs: Any, ends: Any, shared: Any, segment: Any, whole: bool, sizes: Any = ()) -> list[Tensor]:
    if not whole:
        return [e.new_empty(e.shape) for e in ends]
    return [e.new_empty((inputs[0].shape[0] + 1, *e.shape[1:])) for e in ends]


library.impl("loop_segments", _loop_segments, "CompositeExplicitAutograd")
torch.library.register_fake("highway::loop_segments", _fake, lib=library)
