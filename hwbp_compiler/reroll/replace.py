"""Search for Python loops in a graph from Dynamo, and replace those that can be rolled up."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hwbp_compiler.errors import HighwayError, first_line
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.regions import CHECKPOINT, regions_of
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined, Reason
from hwbp_compiler.rolled.recurrence import Recurrence
from hwbp_compiler.torch_private import CONTROL_FLOW, FakeTensor

from .around import Around
from .find import LEAST, Run, closely, runs, working
from .loop import Loop, NoRecurrence, PutBack, autocasts_at
from .refuse import is_worth_it, refusal, told_apart
from .steps import name_of, steps_of, width_of
from .values import RESHAPE, example, mark_cuts
from .zeros import put_back, zeros_for_numbers

log = logging.getLogger(__name__)


@dataclass
class Rerolled:
    """``loops`` are in the graph now; ``records`` describe those that stay unrolled."""

    loops: list[Recurrence] = field(default_factory=list)
    records: list[ChainRecord] = field(default_factory=list)


def reroll_loops(gm: GraphModule, options: Options, around: Sequence[Any] = ()) -> Rerolled:
    """Replace Python loops over time in a graph from Dynamo and in its checkpoints, in place.

    ``around`` holds the arguments of the autocast regions that contain ``gm``.
    """
    if options.reroll == "never":
        return Rerolled()
    made = Rerolled()
    for node in gm.graph.find_nodes(op="call_function", target=CHECKPOINT):
        for body, _ in regions_of(gm, node):
            inner = reroll_loops(body, options, (*around, *autocasts_at(node)))
            made.loops += inner.loops
            made.records += inner.records
    own = _reroll(gm, options, around)
    return Rerolled(made.loops + own.loops, made.records + own.records)


def _reroll(gm: GraphModule, options: Options, around: Sequence[Any]) -> Rerolled:
    made = Rerolled()
    if not _is_plain(gm.graph):
        return made
    mark_cuts(gm.graph)
    numbers = zeros_for_numbers(gm.graph)
    refused: dict[tuple[Node, int, int], tuple[set[Node], ChainRecord | None]] = {}
    try:
        while (loop := _next_loop(gm, options, around, refused)) is not None:
            made.loops.append(loop)
    except PutBack as failed:
        if options.strict:
            raise
        log.warning("a Python loop over time stays unrolled: rolling it up failed (%s)", first_line(failed))
        gm.recompile()
        return made
    put_back(gm.graph, numbers)
    left = set(gm.graph.nodes)
    covered: set[Node] = set()
    for among, record in refused.values():
        if record is not None and among <= left and not among & covered:
            covered |= among
            made.records.append(record)
    seen = set().union(*(among for among, _ in refused.values()))
    made.records += [record for among, record in told_apart(gm, options) if not among & seen]
    if made.loops:
        gm.graph.lint()
        gm.recompile()
        _advise(made.loops)
    return made


def _is_plain(graph: Graph) -> bool:
    """Whether all tensors are Dynamo's own examples: no other kind (DTensor), none inside a transform."""
    for node in graph.nodes:
        held = example(node)
        if isinstance(held, Tensor) and not isinstance(held, FakeTensor):
            return False
        if "increment_nesting" in str(node.target):
            return False
    return True


def _next_loop(gm: GraphModule, options: Options, around: Sequence[Any], refused: dict[Any, Any]) -> Recurrence | None:
    """Roll up the eligible loop that saves most. A refused one is not tried again."""
    nodes = working(gm.graph)
    for run in runs([closely(node) for node in nodes], LEAST):
        key = nodes[run.start], run.period, run.length
        if key in refused or not is_worth_it(nodes, run, options):
            continue
        among = set(nodes[run.start : run.start + run.length])
        try:
            return _roll(gm, nodes, run, options, around)
        except NoRecurrence:
            refused[key] = set(), None
        except Declined as declined:
            refused[key] = among, refusal(nodes, run, declined)
        except (HighwayError, PutBack, *CONTROL_FLOW):
            raise
        except Exception as error:
            if options.strict:
                raise
            log.debug("rolling up a Python loop failed", exc_info=error)
            record = refusal(nodes, run, Declined(Reason.DEFECT_IN_LOOP.of(error=first_line(error))))
            record.failed = True
            refused[key] = among, record
    return None


def _advise(loops: Sequence[Recurrence]) -> None:
    longest = max(record.length for loop in loops for record in loop.records)
    if longest >= _LONG:
        log.info(
            "A Python loop of %d steps was rerolled. Dynamo traced every step of it first, which takes most of the "
            "compile time; hwbp_compiler.recurrent(cell, inputs, state) instead of the loop avoids that too.",
            longest,
        )


_LONG = 256


# -- how -------------------------------------------------------------------------------------------------------------


def _roll(gm: GraphModule, nodes: Sequence[Node], run: Run, options: Options, around: Sequence[Any]) -> Recurrence:
    """Roll up one run. Where a step begins is not known; the best guess is where the least data passes from one step to
    the next. The first steps and the last may differ from those in between.
    """
    for node in nodes[run.start : run.start + run.period]:
        _check_operator(node)
    first: Declined | None = None
    for before in range(3):
        start, length = run.start + before * run.period, run.length - before * run.period
        count = length // run.period
        if count < LEAST:
            break
        tried: list[tuple[Any, int]] = []
        for offset in range(length % run.period + 1):
            try:
                steps = steps_of(nodes, start + offset, run.period, min(count, 4))
                tried.append(((width_of(steps), len(steps.states), offset), offset))
            except Declined as declined:
                first = first or declined
        understood = False
        for _, offset in sorted(tried)[:_PHASES]:
            try:
                steps = steps_of(nodes, start + offset, run.period, count)
                understood = True
                return Loop(gm, Around.of(steps), options, around).put_in_place()
            except Declined as declined:
                first = first or declined
                if declined.why.code.name.startswith("CELL_"):
                    raise  # true of the step, wherever it begins
        if understood:
            break  # fewer steps would be a loop too, but not the user's
    assert first is not None
    raise first


# How many beginnings of a step to try, those with the least data between steps first.
_PHASES = 3


def _check_operator(node: Node) -> None:
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise Declined(Reason.CELL_CONTAINS_HIGHER_ORDER.of(operator=node.target.name()))
    if node.op == "call_module":
        raise Declined(Reason.CELL_RUNS_LOOP)
    name = name_of(node)
    if "hook" in name:
        raise Declined(Reason.CELL_CONTAINS_HIGHER_ORDER.of(operator=name))
    if "_assert" in name:
        raise Declined(Reason.CELL_HAS_EFFECTS.of(operator=name))
    if name in RESHAPE:
        raise Declined(Reason.STEP_CHANGES_IN_PLACE)
