"""Replace equal steps by one loop with the same meaning, forward and backward."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from hwbp_compiler.graph.origin import source_line
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.snapshot import Snapshot
from hwbp_compiler.options import Options
from hwbp_compiler.passes.write_out_cells import write_out_cells
from hwbp_compiler.passes.write_out_modules import write_out_modules
from hwbp_compiler.reasons import Declined, Reason, Why
from hwbp_compiler.rolled.recurrence import Recurrence, build
from hwbp_compiler.rolled.replace_loops import as_around
from hwbp_compiler.rolled.trace import Body, MutatingCell
from hwbp_compiler.torch_private import enter_autocast, exit_autocast

from .around import Around, Write
from .find import is_number_of_step
from .hand_over import HandOver
from .rows import Rows
from .series import Writer, may_be_written, stacked, write_rows
from .steps import Carried, Counter, Inner, Row, Same, Source
from .totals import OUT_OF_PLACE, is_running_total
from .values import Value, example, example_of, is_part, only_splits, operands

log = logging.getLogger(__name__)


class PutBack(Exception):
    """The loop could not be inserted. The graph is as it was before, but its nodes are new."""


class NoRecurrence(Exception):
    """The steps are equal, but none uses the one before it; or they are layers, each with its own weights."""


# The most tensors that a time step may take besides rows of a series: a token, a mask, a target. A layer takes more.
_OWN = 4


class Loop:
    """``around`` as a loop of ``gm``, not inserted yet. ``autocasts`` are the arguments of the autocast regions around
    ``gm``. Raises Declined and NoRecurrence.
    """

    def __init__(self, gm: GraphModule, around: Around, options: Options, autocasts: Sequence[Any] = ()) -> None:
        self.autocasts = autocasts
        self.gm, self.around, self.steps, self.options = gm, around, around.steps, options
        own = sum(len({value.root for value in row.values}) == self.steps.count for row in self.steps.of(Row))
        if not self.steps.states or (options.reroll == "auto" and own > _OWN):
            raise NoRecurrence
        self._check()
        self.fake_mode = example_of(self.steps.states[0].starts[0]).fake_mode
        self.carried = {Inner(c.place, c.parts): c for c in self.steps.of(Carried) if c.lag == 1}
        self.rows_written = [self._rows(write) for write in around.writes]
        self.outputs = self._outputs()

    def _rows(self, write: Write) -> Rows:
        held, row = example(write.target), self._example(write.source)
        rows = Rows.of(write.indices, held.shape)
        if not may_be_written(rows, held, row):
            raise Declined(Reason.STEP_WRITES_OUTSIDE)
        assert rows is not None
        return rows

    def _example(self, inner: Inner) -> Any:
        return example_of(Value(self.steps.blocks[0][inner.place], inner.parts))

    def _outputs(self) -> list[Inner]:
        """Values needed from more than the last step, or from the last step alone if they are not part of the state."""
        last = self.steps.count - 1
        taken = [i for i, at in self.around.taken.items() if i not in self.carried or at.keys() != {last}]
        found = list(dict.fromkeys([*taken, *(write.source for write in self.around.writes)]))
        if any(not isinstance(self._example(inner), Tensor) for inner in found):
            raise Declined(Reason.NO_TENSOR_FROM_STEP)
        return found

    def _check(self) -> None:
        for carried in self.steps.states:
            if not isinstance(example_of(carried.starts[0]), Tensor):
                raise Declined(Reason.NO_TENSOR_FROM_STEP)
        for same in self.steps.of(Same):
            if not isinstance(example(same.node), (Tensor, int, torch.SymInt)):
                raise Declined(Reason.STEPS_TAKE_OTHER_THINGS.of(operator=same.node.name))

    # -- the step ------------------------------------------------------------------------------------------------------

    def put_in_place(self) -> Recurrence:
        graph = self.gm.graph
        with graph.inserting_after(self.steps.last[-1]):
            # Marks the end of the steps, because nodes after the steps may be erased. It is erased last.
            behind = graph.call_function(len, ((),))
        with graph.inserting_before(behind):
            write = Writer(graph, self.fake_mode, self.steps.blocks[0][0])
            try:
                loop, arguments = self._built(write)
            except Exception:
                for node in (behind, *reversed(write.made)):
                    graph.erase_node(node)
                raise
            before = Snapshot(graph)
            try:
                self._rewire(loop, arguments, write, behind)
                graph.lint()
            except Exception as error:
                graph.erase_node(before.restore()[behind])
                raise PutBack(error) from error
        graph.erase_node(behind)
        return loop

    def _built(self, write: Writer) -> tuple[Recurrence, list[Node]]:
        steps = self.steps
        shared = [same for same in steps.of(Same) if not self._is_target(same)]
        taken: dict[Source, tuple[Node, tuple[Any, ...]]] = {}
        starts = [self._start(carried, write) for carried in steps.states]
        for source in steps.of(Row):
            taken[source] = stacked(source.values, write)
        for source in steps.of(Counter):
            stop = source.first + steps.count * source.stride
            taken[source] = write.call(torch.arange, source.first, stop, source.stride, device=source.device), ()
        inputs = list(dict.fromkeys(node for node, _ in taken.values()))
        if not inputs:  # the inputs' length gives the number of steps
            inputs = [write.call(torch.arange, steps.count, device=example(starts[0]).device)]
        body = self._body(inputs, taken, shared)
        write_out_modules(body)
        write_out_cells(body)
        arguments = [*starts, *inputs, *(same.node for same in shared)]
        results = len(steps.states) + len(self.outputs)
        cell = Body(body, list(range(len(arguments))), list(range(results)))
        name = next(name for i in itertools.count() if not hasattr(self.gm, name := f"highway_recurrence_{i}"))
        source = self._source()
        first, rows, same = ([example(n) for n in part] for part in (starts, inputs, [s.node for s in shared]))
        try:
            with as_around((*self.autocasts, *autocasts_at(self.steps.blocks[0][0]))):
                loop = build(name, cell, first, rows, same, self.fake_mode, self.options, source)
        except MutatingCell:
            raise Declined(Reason.STEP_CHANGES_IN_PLACE) from None
        if loop.plans is None:
            record = loop.records[0]
            if record.failed:
                log.debug("rolling up a Python loop failed: %s", record.reason)
            raise Declined(_as_it_is(record))
        self.gm.add_submodule(name, loop)
        self.name = name
        return loop, arguments

    def _is_target(self, same: Same) -> bool:
        """Whether the steps only write into it."""
        writing = {write.place for write in self.around.writes}
        read = [s for j, sources in enumerate(self.steps.sources) for s in sources if j not in writing]
        return same not in read

    def _start(self, carried: Carried, write: Writer) -> Node:
        node = write.value(carried.starts[0])
        return node if example(node).is_contiguous() else write.call("contiguous", node)

    def _source(self) -> str:
        """The user's line that computes the state."""
        carried = self.steps.states[0]
        return source_line(self.steps.blocks[0][carried.place])

    def _body(
        self, inputs: list[Node], taken: dict[Source, tuple[Node, tuple[Any, ...]]], shared: list[Same]
    ) -> GraphModule:
        steps, graph = self.steps, Graph()
        known: dict[Any, Node] = {}

        def argument(name: str, value: Any) -> Node:
            node = graph.placeholder(name)
            node.meta["example_value"] = value
            return node

        with self.fake_mode:
            for number, carried in enumerate(steps.states):
                known[carried] = argument(f"state{number}", example_of(carried.starts[0]).contiguous())
            for number, node in enumerate(inputs):
                known[node] = argument(f"input{number}", example(node)[0])
            for number, same in enumerate(shared):
                known[same] = argument(f"shared{number}", example(same.node))
        writing = {write.place for write in self.around.writes}
        here: dict[int, Node] = {}
        write = Writer(graph, self.fake_mode, steps.blocks[0][0])

        def found(source: Source) -> Node:
            if isinstance(source, Inner):
                node, parts = here[source.place], source.parts
            elif source in taken:
                row, parts = taken[source]
                node = known[row]
            else:
                node, parts = known[source], ()
            for part in parts:
                node = write.part(node, part)
            return node

        for place, node in enumerate(steps.blocks[0]):
            if place not in writing:
                write.like = node
                here[place] = self._copy(graph, node, list(map(found, steps.sources[place])))
        following = [
            known[carried.after(1)] if carried.lag > 1 else found(Inner(carried.place, carried.parts))
            for carried in steps.states
        ]
        # Copies, so that each is a result of the step. They are removed later.
        results = [write.call("contiguous", node) for node in following]
        results = [write.call(torch.clone, node) for node in (*results, *map(found, self.outputs))]
        graph.output(tuple(results))
        return GraphModule({}, graph)

    def _copy(self, graph: Graph, node: Node, sources: list[Node]) -> Node:
        """Copy the node with other operands: first those in its arguments, then the numbers that count steps."""
        count = len(operands(node))
        nodes, numbers = iter(sources[:count]), iter(sources[count:])
        steps = [block[self.steps.where[node][1]] for block in self.steps.blocks[:2]]
        args = list(node.args)
        if len(sources) > count:
            for place, value in enumerate(args):
                if is_number_of_step(node, place, value) and steps[0].args[place] != steps[1].args[place]:
                    args[place] = next(numbers)
        taken = set(sources[count:])
        target = node.target
        if target in OUT_OF_PLACE and is_running_total(self.steps, self.steps.where[node][1]):
            target = OUT_OF_PLACE[target]
        args, kwargs = map_aggregate(  # type: ignore[misc]
            (tuple(args), node.kwargs), lambda a: next(nodes) if isinstance(a, Node) and a not in taken else a
        )
        copied = graph.create_node(node.op, target, args, dict(kwargs), type_expr=node.type)
        copied.meta = dict(node.meta)
        return copied

    # -- the graph around it -------------------------------------------------------------------------------------------

    def _rewire(self, loop: Recurrence, arguments: list[Node], write: Writer, behind: Node) -> None:
        graph, steps, before = self.gm.graph, self.steps, len(write.made)
        call = graph.call_module(self.name, tuple(arguments))
        call.meta = {key: value for key, value in write.like.meta.items() if key != "example_value"}
        with self.fake_mode:
            states = [torch.empty_like(example_of(c.starts[0]).contiguous()) for c in steps.states]
            outputs = [self._example(inner) for inner in self.outputs]
            series = [torch.empty((steps.count, *e.shape), dtype=e.dtype, device=e.device) for e in outputs]
        call.meta["example_value"] = (*states, *series)
        results = [write.call(operator.getitem, call, i) for i in range(len(states) + len(series))]
        state = {Inner(c.place, c.parts): results[i] for i, c in enumerate(steps.states) if c.lag == 1}
        rows = dict(zip(self.outputs, results[len(states) :], strict=True))
        for written, lying in zip(self.around.writes, self.rows_written, strict=True):
            write_rows(lying, written.target, rows[written.source], write)
        gone = {node for node in steps.where if node not in self.around.kept}
        for inner, at in self.around.taken.items():
            HandOver(write, gone, at, rows.get(inner), state.get(inner), steps.count).run()
        # Nodes that stood among the steps and use their results now come after the loop.
        late, node = {call, *write.made[before:]}, steps.blocks[0][0]
        while node is not call:
            node, here = node.next, node
            if any(operand in late for operand in operands(here)):
                late.add(here)
                behind.prepend(here)
        for node in reversed(list(graph.nodes)):
            if not node.users and (node in gone or is_part(node) or only_splits(node)):
                graph.erase_node(node)
        assert not gone & set(graph.nodes), "a step is still in use"


def autocasts_at(node: Node) -> list[Any]:
    """The arguments of the autocast regions that contain a node of Dynamo's graph."""
    entered: dict[Node, Any] = {}
    for before in node.graph.nodes:
        if before is node:
            break
        if before.target is enter_autocast:
            entered[before] = before.args
        elif before.target is exit_autocast:
            entered.pop(before.args[0], None)
    return list(entered.values())


def _as_it_is(record: ChainRecord) -> Why:
    assert record.reason_code is not None
    text = record.reason.removeprefix("the cell runs step by step, which unrolls the loop: ")
    return Why(record.reason_code, text, record.advice)
