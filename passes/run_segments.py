"""The runs of a chain in segments: substitution inside all segments at once, in S successive steps.

A lane is a segment. Step j of a run takes the j-th link of every segment, counted from the loss. If these links belong
to several groups (attention and MLP, with an odd S), each group takes its own lanes. What the links need is stacked
already, and a step works on slices of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from hwbp_compiler.engine.emitter import Emitter, Value
from hwbp_compiler.engine.evaluate import Evaluator, Mode
from hwbp_compiler.engine.segments import Cut
from hwbp_compiler.engine.stacking import Stacker
from hwbp_compiler.graph.chain import Group

from .lanes import Part, assemble, rows_at

aten = torch.ops.aten

Injected = Callable[[Group, Stacker, int], Value | None]
Section = Callable[[str], None]


@dataclass
class SegmentRuns:
    """:class:`~hwbp_compiler.engine.segments.Runs` as nodes. ``injected`` stacks what is added to a group's sums;
    ``section`` names what comes next.
    """

    e: Emitter
    groups: Sequence[Group]
    stackers: Sequence[Stacker]
    like: Sequence[torch.Tensor]
    cut: Cut
    iterations: int
    injected: Injected
    section: Section
    _picked: dict[tuple[Node, tuple[int, ...]], Node] = field(default_factory=dict)

    def across(self, iteration: int, ends: list[Node]) -> list[Node]:
        self._name(iteration, self.cut.count - 1)
        for step in range(self.cut.size):
            ends = self._step(ends, step, range(self.cut.count - 2, -1, -1))
        return ends

    def through(self, ends: list[Node]) -> list[Node]:
        size, count, first = self.cut.size, self.cut.count, self.cut.first
        self._name(self.iterations + 1, count)
        of_first = [[self._lanes(e, 0, 1) for e in ends]]  # the segment next to the input: ``first`` steps
        of_rest = [[self._lanes(e, 1, count) for e in ends]]  # the result of a last step is known: ``ends``
        for step in range(max(first, size - 1) if count > 1 else first):
            with_first, with_rest = step < first, step < size - 1 and count > 1
            lanes = list(range(count - (not with_first) - 1, -1, -1)) if with_rest else [count - 1]
            if with_first and with_rest:
                ends = self._step(ends, step, lanes)
                of_first.append([self._lanes(e, 0, 1) for e in ends])
                of_rest.append([self._lanes(e, 1, count) for e in ends])
                continue
            mine = of_first if with_first else of_rest
            mine.append(self._step(mine[-1], step, lanes))
        return [self._rows([s[c] for s in of_first], [s[c] for s in of_rest]) for c in range(len(ends))]

    def _name(self, run: int, segments: int) -> None:
        self.section(f"run {run} of {self.iterations + 1}: {segments} segments at once, {self.cut.size} steps")

    def _step(self, states: list[Node], step: int, segments: Sequence[int]) -> list[Node]:
        """The states before link ``step`` of these segments, counted from the loss: [segments, ...] per component."""
        positions = [segment * self.cut.size + step for segment in segments]
        found: list[tuple[Group, Evaluator, list[int]]] = []
        for group, stacker in zip(self.groups, self.stackers, strict=True):
            mine = [i for i, p in enumerate(positions) if p in group.lanes]
            if mine:
                chosen = [group.lanes.index(positions[i]) for i in mine]
                given = [Value(rows_at(self.e, s, mine), True) for s in states]
                found.append((group, self._evaluator(group, stacker, chosen, given), mine))
        emitters, own = [ev.e for _, ev, _ in found], [mine for _, _, mine in found]
        results = []
        for component, like in enumerate(self.like):
            parts: list[Part] = [ev.value(Mode.FULL, g.template.outputs[component]) for g, ev, _ in found]
            results.append(assemble(self.e, emitters, parts, own, len(positions), like, full=True))
        return results

    def _evaluator(self, group: Group, stacker: Stacker, chosen: list[int], states: list[Value]) -> Evaluator:
        def pick(value: Value) -> Value:
            if not value.batched:
                return value
            key = value.node, tuple(chosen)
            if key not in self._picked:
                self._picked[key] = rows_at(self.e, value.node, chosen)
            return Value(self._picked[key], True)

        def stack(slot: int) -> Value:
            return pick(stacker(group.external(slot)))

        def inject(statement: int) -> Value | None:
            value = self.injected(group, stacker, statement)
            return None if value is None else pick(value)

        return Evaluator(self.e.for_count(len(chosen)), group, states, stack, inject)

    def _rows(self, of_first: list[Node], of_rest: list[Node]) -> Node:
        """Rows 0..L, from the results of the steps, the ends first."""
        pieces = list(reversed(of_first))
        others = self.cut.count - 1
        if others:
            columns = [self.e.call(aten.unsqueeze.default, s, 1) for s in reversed(of_rest)]
            joined = self.e.call(aten.cat.default, columns, 1)
            pieces.append(self.e.reshape(joined, [others * self.cut.size, *joined.meta["val"].shape[2:]]))
        return self.e.call(aten.cat.default, pieces)

    def _lanes(self, states: Node, start: int, end: int) -> Node:
        if (start, end) == (0, int(states.meta["val"].shape[0])):
            return states
        return self.e.call(aten.slice.Tensor, states, 0, start, end)
