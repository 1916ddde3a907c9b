"""Rewrite a chain's backward into Highway-BP form.

Row i of W is w_i, the gradient at h_i, i = 0..L: forward order, so that what a model stacks over time is used as it
lies. The last row is the chain's head, known exactly. With CumSumProd the reverse linear scan,

    W^0     = scan([b, w_L], K)              b: what is injected at each link
    W^{t+1} = scan([b + J W^t, w_L], K)      all links at once, then one scan

(w^0 + CumSumProd(v) = CumSumProd(c + v): one scan per iteration and no stored w^0). Damping moves part of the highway
into the block: K -> (1 - gamma) K, J -> J + gamma K. Every other output of the links is evaluated once from the last W.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.batching import Emitter, Value
from hwbp_compiler.engine.evaluate import Coefficient, Evaluator, Mode
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_graph import GraphSeries
from hwbp_compiler.engine.stacking import Stacker, StackPlan
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.program import INPUT, External, references, sum_terms

from .group_links import inner_sums
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


def rewrite_chain(
    graph: Graph, chain: Chain, groups: list[Group], split: Split, iterations: int, damping: float
) -> Rewriting:
    """Emit ``iterations`` rounds for ``chain``; the old nodes stay until the replacements are applied."""
    return _ChainRewriter(graph, chain, groups, split, iterations, damping).run()


class _ChainRewriter:
    def __init__(self, graph, chain, groups, split, iterations, damping) -> None:
        self.graph, self.chain, self.groups, self.split = graph, chain, groups, split
        self.iterations, self.damping = iterations, damping
        output = next(n for n in reversed(graph.nodes) if n.op == "output")
        like = next(n for n in chain.states[0] if n is not None)
        self.e = Emitter(graph, output, like.meta["val"].fake_mode, len(chain.links))
        self.stackers: list[Stacker] = []
        self.sections: list[tuple[str, int | None, int]] = []
        self.like: list[torch.Tensor] = []
        for component in range(chain.width):
            self.like.append(next(s[component] for s in reversed(chain.states) if s[component] is not None).meta["val"])

    def run(self) -> Rewriting:
        e = self.e
        for group in self.groups:
            self.stackers.append(Stacker(e.for_count(len(group.lanes)), StackPlan(group.external_tuples)))
        heads = [self._head(c) for c in range(self.chain.width)]
        self._section("K of all links")
        diagonals = self._diagonals()
        injected = self._assemble_all(Mode.INJECT, None)
        rows = solve(
            GraphSeries(e, self.links, self.like),
            Highway(self.split.order, diagonals, heads, injected),
            blocks=lambda t, rows: self._assemble_all(Mode.REST, rows, f"iteration {t}"),
            iterations=self.iterations,
            damping=self.damping,
            before_scan=lambda t: self._section(f"w^{t}: one scan along the highway"),
        )
        replaced = Rewriting(created=e.created, sections=self.sections)
        self._section("the states that something else uses")
        self._replace_states(rows, replaced)
        for number, (group, stacker) in enumerate(zip(self.groups, self.stackers, strict=True)):
            self._section("parameter and side gradients, once", number)
            self._replace_sides(group, stacker, rows, replaced)
        replaced.copied_bytes = sum(s.copied_bytes for s in self.stackers)
        return replaced

    def _section(self, title: str, group: int | None = None) -> None:
        self.sections.append((title, group, len(self.e.created)))

    @property
    def links(self) -> int:
        return len(self.chain.links)

    def _row(self, state: int) -> int:
        """The row of a state: the head is the last."""
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
            states = [Value(self._rows(row, [self._row(p) for p in group.lanes]), True) for row in rows]
        return Evaluator(
            stacker.e,
            group,
            states,
            stack=lambda slot: stacker(group.external(slot)),
            inject=lambda statement: self._injected(group, stacker, statement),
        )

    def _injected(self, group: Group, stacker: Stacker, statement: int) -> Value | None:
        """Injections into one sum, stacked; lanes that have none get zeros."""
        per_lane = [p.injections.get(statement, []) for p in group.programs]
        depth = max(len(terms) for terms in per_lane)
        total: Value | None = None
        raw = next(n for n in group.raw(statement) if n is not None)
        for i in range(depth):
            zero = None
            column: list[Node] = []
            for terms in per_lane:
                if i < len(terms):
                    column.append(terms[i])
                else:
                    if zero is None:
                        zero = self.e.full(tuple(raw.meta["val"].shape), 0.0, raw.meta["val"])
                    column.append(zero)
            value = stacker(column)
            total = value if total is None else stacker.e.apply(aten.add.Tensor, (total, value), {})  # type: ignore
        return total

    def _direct_injections(self, component: int) -> Node | None:
        """b where there is one group and only its outputs are injected into, one term each: the terms as they are
        stacked (mostly rows of one tensor), without the tail, which would break the pattern."""
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

    def _rows(self, row: Node, lanes: list[int]) -> Node:
        """Rows ``lanes`` (ascending) of a [links + 1, ...] stack: a slice where they are evenly spaced."""
        count = row.meta["val"].shape[0]
        if len(lanes) == 1:
            return self.e.call(aten.slice.Tensor, row, 0, lanes[0], lanes[0] + 1)
        step = lanes[1] - lanes[0]
        if all(b - a == step for a, b in zip(lanes, lanes[1:], strict=False)):
            if (lanes[0], lanes[-1] + 1, step) == (0, count, 1):
                return row
            return self.e.call(aten.slice.Tensor, row, 0, lanes[0], lanes[-1] + 1, step)
        pieces = [self.e.call(aten.slice.Tensor, row, 0, a, b + 1) for a, b in _runs(lanes)]
        return self.e.call(aten.cat.default, pieces)

    def _diagonals(self) -> dict[tuple[int, int], Node | float]:
        """K per (to, from): a number, or [links, ...] broadcastable against the state."""
        found: dict[tuple[int, int], Node | float] = {}
        for to, source in sorted(self.split.support):
            parts: list[Value | float | None] = []
            for g, group in enumerate(self.groups):
                outputs = group.template.outputs
                parts.append(self._evaluator(g, None).value(Coefficient(source), outputs[to]))
            if all(isinstance(p, float) and p == parts[0] for p in parts):
                found[to, source] = parts[0]  # type: ignore[assignment]
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

    def _assemble(self, parts: list, like: torch.Tensor, full: bool = False) -> Node:
        """One part per group -> [links, ...] in chain order."""
        e = self.e
        rank = like.dim()
        nodes: list[Node] = []
        for part, stacker in zip(parts, self.stackers, strict=True):
            ge = stacker.e
            if part is None or isinstance(part, float):
                part = Value(ge.full([1] * rank, part or 0.0, like), False)
            part = ge.convert(part, like.dtype)
            if part.rank < rank:
                sizes = [1] * (rank - part.rank) + list(part.shape)
                node = ge.aligned(part, rank) if part.batched else ge.reshape(part.node, sizes)
                part = Value(node, part.batched)
            nodes.append(ge.batch(part))
        shapes = [tuple(n.meta["val"].shape[1:]) for n in nodes]
        if full or any(s != shapes[0] for s in shapes):
            target = tuple(like.shape)
            nodes = [
                n if tuple(n.meta["val"].shape[1:]) == target
                else e.call(aten.expand.default, n, [n.meta["val"].shape[0], *(e.size(s) for s in target)])
                for n in nodes
            ]  # fmt: skip
        lanes = [[self._row(p) - 1 for p in g.lanes if p < self.links] for g in self.groups]
        trimmed = []
        for node, group, mine in zip(nodes, self.groups, lanes, strict=True):
            if len(mine) < len(group.lanes):  # the tail, in front, sends nothing on
                node = e.call(aten.slice.Tensor, node, 0, 1, len(group.lanes))
            trimmed.append(node)
        return self._interleave(trimmed, lanes)

    def _interleave(self, nodes: list[Node], lanes: list[list[int]]) -> Node:
        """Rows of all groups -> [links, ...]; ``lanes[g]`` (ascending) says where group g's rows belong."""
        if len(nodes) == 1:
            return nodes[0]
        e = self.e
        period = len(nodes)
        first = sorted(range(period), key=lambda g: lanes[g][0])
        if all(lanes[g] == list(range(i, self.links, period)) for i, g in enumerate(first)) and (
            self.links % period == 0
        ):
            columns = [e.call(aten.unsqueeze.default, nodes[g], 1) for g in first]
            joined = e.call(aten.cat.default, columns, 1)
            return e.reshape(joined, [self.links, *nodes[0].meta["val"].shape[1:]])
        position = {p: (g, i) for g, mine in enumerate(lanes) for i, p in enumerate(mine)}
        pieces: list[Node] = []
        p = 0
        while p < self.links:
            g, i = position[p]
            q = p + 1
            while q < self.links and position[q] == (g, i + q - p):
                q += 1
            pieces.append(e.call(aten.slice.Tensor, nodes[g], 0, i, i + q - p))
            p = q
        return e.call(aten.cat.default, pieces) if len(pieces) > 1 else pieces[0]

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
                self._add_to(_root_of(last.remainders[i][0]), value, own, done)  # type: ignore[arg-type]

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
            if value is None or any(n is None for n in nodes):
                raise AssertionError(f"side output {nodes[0]} has no value")
            root = _accumulation(nodes)  # type: ignore[arg-type]
            if root is not None:
                self._add_to(root, stacker.e.sum_links(value), nodes, done)  # type: ignore[arg-type]
                continue
            for lane, node in enumerate(nodes):
                assert node is not None
                done.replacements[node] = (
                    self.e.call(aten.select.int, value.node, 0, lane) if value.batched else value.node
                )

    def _add_to(self, root: Node, total: Node, nodes: list[Node], done: Rewriting) -> None:
        """Replace the accumulation ``root`` of all links' ``nodes`` by one sum over links (plus what else is in it)."""
        left = [t for t in self._left.get(root, sum_terms(root, None)) if t not in nodes]  # type: ignore[arg-type]
        self._left[root] = left
        self._sums[root] = [*self._sums.get(root, []), total]
        acc = self._sums[root][0]
        for term in [*self._sums[root][1:], *left]:
            acc = self.e.call(aten.add.Tensor, acc, term)
        done.replacements[root] = acc

    @property
    def _left(self) -> dict[Node, list[Node]]:
        return self.__dict__.setdefault("_left_terms", {})

    @property
    def _sums(self) -> dict[Node, list[Node]]:
        return self.__dict__.setdefault("_summed", {})


def _accumulation(nodes: list[Node]) -> Node | None:
    """The root of the one addition tree that all of ``nodes`` are single-use terms of."""
    if len(nodes) < 2:
        return None
    root = _root_of(nodes[0])
    if root is nodes[0]:
        return None
    terms = sum_terms(root, None)  # type: ignore[arg-type]
    return root if set(nodes) <= set(terms) and len(set(nodes)) == len(nodes) else None


def _root_of(node: Node) -> Node:
    """The last of the single-use additions that ``node`` is a term of."""
    while len(node.users) == 1 and (user := next(iter(node.users))).target is aten.add.Tensor and not user.kwargs:
        node = user
    return node


def _has_additive(args) -> bool:
    return any(_has_additive(a) if isinstance(a, tuple) else isinstance(a, External) and a.additive for a in args)


def _runs(lanes: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for lane in lanes:
        if runs and runs[-1][1] == lane - 1:
            runs[-1] = (runs[-1][0], lane)
        else:
            runs.append((lane, lane))
    return runs
