"""``torch.ops.highway.loop_segments``: one compiled step, called for all segments of a series at once.

The step is that of :mod:`.loop`, as text, for one link. Here it is applied to a batch of links: the batching rules turn
it into a step over lanes, whose number is a symbol. So a new length of the series needs no compilation. A single lane
needs its own compiled step, and so does a number of lanes that the compilation compared with another size.
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
from hwbp_compiler.engine.emitter import decompositions
from hwbp_compiler.engine.segments import Cut
from hwbp_compiler.errors import first_line
from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.torch_private import AnyNumber, compile_step

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


Compiled = Callable[[list[Tensor]], Any]


@functools.lru_cache(maxsize=1024)
def _compiled(
    code: str, slots: int, batched: int, description: tuple[Any, Any], sizes: tuple[int, ...], lanes: int | None
) -> tuple[Compiled, Callable[[int], bool]]:
    """Compile the step over lanes. The result takes [*results to write, *state, *inputs, *shared]. All but ``shared``
    have the given number of lanes, or any number from two on. Also return a function that says for which numbers it is
    right.
    """
    step = _over_lanes(code, batched, sizes)

    def write(*given: Tensor) -> list[Tensor]:
        results = step(*given[slots:])
        return [row.copy_(result) for row, result in zip(given[:slots], results, strict=True)]

    def operator_by_operator(arguments: list[Tensor]) -> None:
        write(*arguments)

    try:
        given = AnyNumber(description, lanes)
        with given.mode, torch.no_grad():
            traced = make_fx(write, decompositions())(*given.examples)
            return compile_step(traced, given.examples, keeping_pieces({})), given.allows
    except Exception as error:
        count("failures")
        log.debug("where it failed", exc_info=error)
        warn_once(first_line(error))
    return operator_by_operator, lambda number: True


def _loop_segments(
    code: str,
    inputs: list[Tensor],
    ends: list[Tensor],
    shared: list[Tensor],
    segment: int,
    whole: bool,
    sizes: Sequence[int] = (),
) -> list[Tensor]:
    """The step through link t reads row t of ``inputs`` [T, ...]. ``ends`` are e_s [C, ...] per component if ``whole``,
    otherwise those of segments 2..C (SEGMENTS: engine/segments.py).

    Returns, per component, the states 0..T [T + 1, ...] if ``whole``, otherwise those before segments 2..C [C - 1,
    ...].
    """
    links = inputs[0].shape[0]
    run = _Step(code, shared, tuple(sizes))
    if not whole:
        first = links - ends[0].shape[0] * segment
        states, spare = [e.contiguous() for e in ends], [e.new_empty(e.shape) for e in ends]
        for step in range(segment):
            run(spare, states, [x[first + segment - 1 - step :: segment] for x in inputs])
            # The tensors passed in may belong to the caller, so they are not reused.
            states, spare = spare, [e.new_empty(e.shape) for e in ends] if step == 0 else states
        return states
    found = [e.new_empty((links + 1, *e.shape[1:])) for e in ends]
    cut = Cut.of(links, segment)
    for series, end in zip(found, ends, strict=True):
        series[cut.first :: segment] = end
    for rows, _, with_rest in cut.last_run():
        # Link t leads from state t + 1 to state t.
        after = slice(rows.start + 1, None if with_rest else rows.start + 2, segment)
        before = slice(rows.start, -1 if with_rest else rows.start + 1, segment)
        run([s[before] for s in found], [s[after] for s in found], [x[rows] for x in inputs])
    return found


class _Step:
    """The compiled step. Strides are the same at every step of a run, so the compiled code is looked up once per number
    of lanes.
    """

    def __init__(self, code: str, shared: list[Tensor], sizes: tuple[int, ...]) -> None:
        self.code, self.shared, self.sizes = code, list(shared), sizes
        self.for_lanes: dict[int, Compiled] = {}

    def __call__(self, into: list[Tensor], states: list[Tensor], inputs: list[Tensor]) -> None:
        lanes = states[0].shape[0]
        with_lanes = [*into, *states, *inputs]
        if lanes not in self.for_lanes:
            batch = tuple((tuple(t.shape[1:]), t.stride(), t.dtype, t.device) for t in with_lanes)
            same = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in self.shared)
            key = self.code, len(into), len(states) + len(inputs), (batch, same), self.sizes
            compiled, allows = _compiled(*key, 1 if lanes == 1 else None)
            self.for_lanes[lanes] = compiled if allows(lanes) else _compiled(*key, lanes)[0]
        self.for_lanes[lanes]([*with_lanes, *self.shared])


def _fake(code: Any, inputs: Any, ends: Any, shared: Any, segment: Any, whole: bool, sizes: Any = ()) -> list[Tensor]:
    if not whole:
        return [e.new_empty(e.shape) for e in ends]
    return [e.new_empty((inputs[0].shape[0] + 1, *e.shape[1:])) for e in ends]


library.impl("loop_segments", _loop_segments, "CompositeExplicitAutograd")
torch.library.register_fake("highway::loop_segments", _fake, lib=library)
