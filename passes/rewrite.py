"""Rewrite a chain's backward into Highway-BP form.

Row i of W is w_i, the gradient at h_i, for i = 0..L. Rows are in forward order, so that what a model stacks over time
can be used as it is. The last row is the chain's head, which is known exactly. With CumSumProd, the reverse linear
scan,

    W^0     = scan([b, w_L], K)              b: what is injected at each link
    W^{t+1} = scan([b + J W^t, w_L], K)      all links at once, then one scan

Since w^0 + CumSumProd(v) = CumSumProd(c + v), an iteration needs one scan and no stored w^0. Damping moves a part of
the highway into the block: K -> (1 - gamma) K, J -> J + gamma K. Every other output of the links is evaluated once,
from the last W.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.emitter import Emitter, Value
from hwbp_compiler.engine.evaluate import Coefficient, Evaluator, Mode
from hwbp_compiler.engine.segments import Cut, solve_segments
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_graph import GraphSeries
from hwbp_compiler.engine.stacking import Stacker, StackPlan
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.program import INPUT, External, Program, has_block, inputs_of, references, root_of, sum_terms
from hwbp_compiler.options import Truncation

from .group_links import inner_sums
from .lanes import assemble, rows_at
from .run_segments import SegmentRuns
from .split_links import Split

aten = torch.ops.aten


_STACKED = "what the links need, stacked"


@dataclass
class Rewriting:
    """New nodes for old ones. Nothing in the graph uses the new nodes before ``passes.apply`` replaces the old.

    ``sections`` says what the nodes are for, in order: (title, group or None, position of its first node).
    """

    replacements: dict[Node, Node] = field(default_factory=dict)
    created: list[Node] = field(default_factory=list)
    copied_bytes: int = 0
    sections: list[tuple[str, int | None, int]] = field(default_factory=list)


def rewrite_chain(graph: Graph, chain: Chain, groups: list[Group], split: Split, truncation: Truncation) -> Rewriting:
    """Emit what ``truncation`` requests. The old nodes stay until the replacements are applied."""
    return _ChainRewriter(graph, chain, groups, split, truncation).run()


class _ChainRewriter:
    def __init__(self, graph: Graph, chain: Chain, groups: list[Group], split: Split, truncation: Truncation) -> None:
        self.graph, self.chain, self.groups, self.split = graph, chain, groups, split
        self.truncation = truncation
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        like = next(n for n in chain.states[0] if n is not None)
        self.e = Emitter(graph, output, like.meta["val"].fake_mode, len(chain.links))
        self.stackers: list[Stacker] = []
        self.sections: list[tuple[str, int | None, int]] = []
        self.stacked: dict[tuple[int, int], Value | None] = {}
        self._left: dict[Node, list[Node]] = {}
        self._sums: dict[Node, list[Node]] = {}
        self.like: list[torch.Tensor] = [n.meta["val"] for n in chain.last_known if n is not None]

    def run(self) -> Rewriting:
        e = self.e
        for group in self.groups:
            self.stackers.append(Stacker(e.for_count(len(group.lanes)), StackPlan(group.external_tuples)))
        heads = [self._head(c) for c in range(self.chain.width)]
        self._section("K of all links")
        diagonals = self._diagonals()
        injected = self._assemble_all(Mode.INJECT, None)
        rows = self._solve(Highway(self.split.order, diagonals, heads, injected))
        replaced = Rewriting(created=e.created, sections=self.sections)
        self._section("the states that something else uses")
        self._replace_states(rows, replaced)
        for number, (group, stacker) in enumerate(zip(self.groups, self.stackers, strict=True)):
            self._section("parameter and side gradients, once", number)
            self._replace_sides(group, stacker, rows, replaced)
        replaced.copied_bytes = sum(s.copied_bytes for s in self.stackers)
        return replaced

    def _solve(self, highway: Highway[Node]) -> list[Node]:
        series, how = GraphSeries(self.e, self.links, self.like), self.truncation
        if how.segment == 1 or not (how.damping or any(has_block(group.template) for group in self.groups)):
            return solve(
                series,
                highway,
                blocks=lambda t, rows: self._assemble_all(Mode.REST, rows, f"iteration {t}"),
                iterations=how.iterations,
                damping=how.damping,
                before_scan=lambda t: self._section(f"w^{t}: one scan along the highway"),
                watched=how.watched,
            )
        # The tail counts as a link of its segment, although no row of W is before it.
        cut = Cut.of(self.chain.length, how.segment, outside=self.chain.length - self.links)
        runs = SegmentRuns(
            self.e, self.groups, self.stackers, self.like, cut, how.iterations, self._injected,
            self._section,
        )  # fmt: skip
        return solve_segments(
            series, highway, cut, runs, how.iterations, how.damping,
            before_scan=lambda t: self._section(f"e^{t}: one scan along the highway{' across segments' if t else ''}"),
            watched=how.watched,
        )  # fmt: skip

    def _section(self, title: str, group: int | None = None) -> None:
        self.sections.append((title, group, len(self.e.created)))

    @property
    def links(self) -> int:
        return len(self.chain.links)

    def _row(self, state: int) -> int:
        """The row of a state; the head is the last row."""
        return self.links - state

    # -- pieces -------------------------------------------------------------------------------------------------

    def _head(self, component: int) -> Node:
        node = self.chain.states[0][component]
        like = self.like[component]
        if node is None:
            return self.e.full(tuple(like.shape), 0.0, like)
        return node

    def _evaluator(self, g: int, rows: list[Node] | None) -> Evaluator:
        """Group ``g`` with its lanes' rows of W as states; without rows, for K and b."""
        group, stacker = self.groups[g], self.stackers[g]
        states: list[Value | None] = [None] * self.chain.width
        if rows is not None:
            states = [Value(rows_at(self.e, row, [self._row(p) for p in group.lanes]), True) for row in rows]
        return Evaluator(
            stacker.e,
            group,
            states,
            stack=lambda slot: stacker(group.external(slot)),
            inject=lambda statement: self._injected(group, stacker, statement),
        )

    def _injected(self, group: Group, stacker: Stacker, statement: int) -> Value | None:
        """Injections into one sum, stacked. Lanes without any get zeros."""
        key = id(group), statement
        if key not in self.stacked:
            self.stacked[key] = self._stack_injections(group, stacker, statement)
        return self.stacked[key]

    def _stack_injections(self, group: Group, stacker: Stacker, statement: int) -> Value | None:
        per_lane = [p.injections.get(statement, []) for p in group.programs]
        if not any(per_lane):
            return None
        like = next(terms[0] for terms in per_lane if terms).meta["val"]
        total: Value | None = None
        for i in range(max(map(len, per_lane))):
            zero = None
            column: list[Node] = []
            for terms in per_lane:
                if i < len(terms):
                    column.append(terms[i])
                else:
                    if zero is None:
                        zero = self.e.full(tuple(like.shape), 0.0, like)
                    column.append(zero)
            value = stacker(column)
            added = value if total is None else stacker.e.apply(aten.add.Tensor, (total, value), {})
            assert isinstance(added, Value)
            total = added
        return total

    def _direct_injections(self, component: int) -> Node | None:
        """b if there is one group whose only injections go into its outputs, one term each. The terms (mostly rows of
        one tensor) are stacked as they are, without the tail, which would break the pattern.
        """
        if len(self.groups) != 1:
            return None
        group = self.groups[0]
        programs = [p for p, lane in zip(group.programs, group.lanes, strict=True) if lane < self.links]
        output = group.template.outputs[component]
        if any(set(p.injections) - set(p.outputs) or len(p.injections.get(output, ())) != 1 for p in programs):
            return None
        if any(_has_additive(s.args) for s in group.template.statements):
            return None
        value = Stacker(self.e)([p.injections[output][0] for p in programs])
        return self.e.batch(value)

    def _diagonals(self) -> dict[tuple[int, int], Node | float]:
        """K per (to, from): a number, or [links, ...] broadcastable against the state."""
        found: dict[tuple[int, int], Node | float] = {}
        for to, source in sorted(self.split.support):
            parts: list[Value | float | None] = []
            for g, group in enumerate(self.groups):
                outputs = group.template.outputs
                parts.append(self._evaluator(g, None).value(Coefficient(source), outputs[to]))
            if all(isinstance(p, float) and p == parts[0] for p in parts):
                found[to, source] = parts[0]
            else:
                found[to, source] = self._assemble(parts, self.like[to])
        return found

    def _assemble_all(self, mode: Mode, rows: list[Node] | None, title: str = _STACKED) -> list[Node | None]:
        evaluators = [self._evaluator(g, rows) for g in range(len(self.groups))]
        assembled: list[Node | None] = []
        for component in range(self.chain.width):
            direct = self._direct_injections(component) if mode is Mode.INJECT else None
            if direct is not None:
                assembled.append(direct)
                continue
            parts = []
            for number, ev in enumerate(evaluators):
                self._section(title, number)
                parts.append(ev.value(mode, ev.program.outputs[component]))
            self._section(title)
            if all(p is None for p in parts):
                assembled.append(None)
            else:
                assembled.append(self._assemble(parts, self.like[component], full=True))
        return assembled

    def _assemble(self, parts: list[Any], like: torch.Tensor, full: bool = False) -> Node:
        """One part per group -> [links, ...] in chain order."""
        emitters = [stacker.e for stacker in self.stackers]
        lanes = [[self._row(p) - 1 for p in g.lanes if p < self.links] for g in self.groups]
        return assemble(self.e, emitters, parts, lanes, self.links, like, full)

    # -- what the rest of the graph takes from the chain --------------------------------------------------------

    def _replace_states(self, rows: list[Node], done: Rewriting) -> None:
        inside = self._inside()
        for i, state in enumerate(self.chain.states[1:], start=1):
            for component, node in enumerate(state):
                if node is not None and any(user not in inside for user in node.users):
                    done.replacements[node] = self.e.call(aten.select.int, rows[component], 0, self._row(i))

        last = self.chain.links[-1]
        for component, i in enumerate(last.outputs):
            if i in last.remainders:
                own = [last.raw[ref.id] for ref in references(last.statements[i].args)]
                value = self.e.call(aten.select.int, rows[component], 0, 0)
                self._add_to(root_of(last.remainders[i][0]), value, own, done)

    def _inside(self) -> set[Node]:
        inside: set[Node] = set()
        for group in self.groups:
            for program in group.programs:
                inside |= {n for n in program.raw if n is not None} | inner_sums(program)
        return inside

    def _replace_sides(self, group: Group, stacker: Stacker, rows: list[Node], done: Rewriting) -> None:
        if not group.exports:
            return
        evaluator = self._evaluator(self.groups.index(group), rows)
        for i in group.exports:
            if group.template.statements[i].target is INPUT:
                continue
            nodes = group.raw(i)
            value = evaluator.value(Mode.FULL, i)
            if isinstance(value, list):
                continue  # its items are statements of their own
            # A tail has no outputs, and lacks what leaves the other links on the way to theirs. A head lacks what
            # depends only on a component that gets no gradient.
            lacking = [p for p, n in zip(group.programs, nodes, strict=True) if n is None and _has_value(p, i)]
            if value is None or lacking:
                raise AssertionError(f"side output {nodes[0]} has no value")
            computed = [n for n in nodes if n is not None]
            root = _accumulation(computed) if len(computed) == len(nodes) else None
            # A term that a state has taken already does not belong to this sum.
            if root is not None and Counter(computed) <= Counter(self._left.get(root, sum_terms(root))):
                self._add_to(root, stacker.e.sum_links(value), computed, done)
                continue
            for lane, node in enumerate(nodes):
                if node is not None:
                    done.replacements[node] = (
                        self.e.call(aten.select.int, value.node, 0, lane) if value.batched else value.node
                    )

    def _add_to(self, root: Node, total: Node, nodes: list[Node], done: Rewriting) -> None:
        """Replace the accumulation ``root`` of all links' ``nodes`` by one sum over links, plus its other terms."""
        left = list(self._left.get(root, sum_terms(root, nodes)))
        for node in nodes:
            left.remove(node)  # once: a link may give the same node to its state and to a side output
        self._left[root] = left
        self._sums[root] = [*self._sums.get(root, []), total]
        acc = self._sums[root][0]
        for term in [*self._sums[root][1:], *left]:
            acc = self.e.call(aten.add.Tensor, acc, term)
        done.replacements[root] = acc


def _has_value(program: Program, i: int) -> bool:
    """Whether statement ``i`` of a link that is no tail depends on a component that gets a gradient."""
    return bool(program.outputs) and any(program.raw[c] is not None for c in inputs_of(program, i))


def _accumulation(nodes: list[Node]) -> Node | None:
    """The root of the single addition tree in which all ``nodes`` are single-use terms."""
    if len(nodes) < 2:
        return None
    root = root_of(nodes[0])
    if root is nodes[0]:
        return None
    terms = sum_terms(root)
    return root if set(nodes) <= set(terms) and len(set(nodes)) == len(nodes) else None


def _has_additive(args: tuple[Any, ...]) -> bool:
    return any(_has_additive(a) if isinstance(a, tuple) else isinstance(a, External) and a.additive for a in args)
