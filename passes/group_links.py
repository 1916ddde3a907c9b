"""Group links with equal programs, and add to each group what branches off its links.

Parameter gradients, input gradients and other side outputs are computed once, from the final w^k. They are found by
growing the aligned programs: if a statement's nodes have a user in every lane, with the same operator and corresponding
operands, that user becomes a statement of the group too. Any alignment is correct, since each lane computes its own
nodes from its own operands. A better alignment only batches more.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable
from typing import Any

import torch
from torch.fx import Node

from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.match import Ambiguous, Fits, match_sides, same_value
from hwbp_compiler.graph.program import (
    SUM,
    External,
    Program,
    Ref,
    State,
    Statement,
    _constant,
    closure,
    inner_additions,
    is_heavy,
    references,
    root_of,
)
from hwbp_compiler.graph.rules import dtype_of, form_of, rule_of, shape_of
from hwbp_compiler.graph.wiring import Pattern

# The pattern that the links have in common is taken from this many pairs of links.
_WIRED = 3


def group_links(info: GraphInfo, chain: Chain) -> tuple[Chain, list[Group]]:
    """The groups of ``chain``'s links, lanes in forward order. Adds the chain's last link if no join marks it."""
    chain = Chain(list(chain.states), [link.copy() for link in chain.links], chain.tail)
    by_signature: dict[Hashable, Group] = {}
    for position, link in enumerate(chain.links):
        group = by_signature.setdefault(link.signature, Group([], []))
        group.lanes.append(position)
        group.programs.append(link)
    groups = list(by_signature.values())
    states = {n for state in chain.states for n in state if n is not None}
    tainted = _tainted(info, chain)
    # With several components, one may lead to another within a link. Then nothing that branches off the link is taken.
    taken = states | {n for link in chain.links for n in link.raw[link.arity :] if n is not None}
    for group in groups:
        _grow(info, group, states, tainted, taken)
    for group in groups:
        group.exports = _exports(group, states)
    while _add_tail(info, chain, groups, states, tainted):
        pass
    for group in groups:  # forward order, as the model itself stacks values
        group.lanes.reverse()
        group.programs.reverse()
    return chain, groups


def _add_tail(info: GraphInfo, chain: Chain, groups: list[Group], states: set[Node], tainted: set[int]) -> bool:
    """Add the link behind the last state to ``chain`` and to its group. Returns whether another link may follow it."""
    if None in chain.states[-1]:
        return False
    # What the links give to the rest of the model depends on the head too, which is not tainted.
    own = {info.index[n] for g in groups for p in g.programs for n in p.raw[p.arity :] if n is not None}
    for group in sorted(groups, key=lambda g: -g.lanes[-1])[:4]:
        tail = _tail(info, group, chain, tainted | own)
        if tail is None:
            continue
        group.lanes.append(len(chain.links))
        group.programs.append(tail)
        if not tail.outputs:
            chain.tail = True
            return False
        chain.links.append(tail)
        chain.states.append(tuple(tail.raw[i] for i in tail.outputs))
        states |= {n for n in chain.states[-1] if n is not None}
        group.exports = _exports(group, states)
        # A state that is only a part of a larger sum, or that lacks a component, ends the chain.
        return all(n is not None for n in chain.states[-1])
    return False


def _tainted(info: GraphInfo, chain: Chain) -> set[int]:
    """Everything that depends on the inside of the chain. The head does not count: it is known exactly."""
    head = {n for n in chain.states[0] if n is not None}
    first = chain.links[0] if chain.links else None
    inner = set() if first is None else {n for n in first.raw[first.arity :] if n is not None} - head
    starts = {info.index[n] for n in inner}
    starts |= {info.index[n] for state in chain.states[1:] for n in state if n is not None}
    return info.descendants(starts)


# -- growing ----------------------------------------------------------------------------------------------------


class _Lane:
    def __init__(self, info: GraphInfo, program: Program, states: set[Node], tainted: set[int]) -> None:
        self.info = info
        self.program = program
        self.tainted = tainted
        self.id_of = program.statement_of()
        self.closed = (states | {n for n in (program.raw[i] for i in program.outputs) if n is not None}) - {
            n for n in program.inputs if n is not None
        }

    def users(self, node: Node) -> list[int]:
        i = self.info.index[node]
        return self.info.users[i]

    def statement(self, node: Node, slots: int) -> tuple[Statement, list[Node]] | None:
        """``node`` as the next statement of this lane, with its externals. None if it cannot be one."""
        if node.op != "call_function" or rule_of(node) is None:
            return None
        externals: list[Node] = []

        def argument(value: Any) -> Any:
            if isinstance(value, Node):
                if value in self.id_of and value not in self.closed:
                    return Ref(self.id_of[value])
                if self.info.index[value] in self.tainted:
                    raise _Refused
                externals.append(value)
                return External(slots + len(externals) - 1)
            if isinstance(value, (list, tuple)):
                return tuple(argument(v) for v in value)
            return _constant(value)

        try:
            args = tuple(argument(a) for a in node.args)
            kwargs = tuple((k, argument(node.kwargs[k])) for k in sorted(node.kwargs))
        except _Refused:
            return None
        if next(references(v for _, v in kwargs), None) is not None:
            return None
        if self.info.is_sum(self.info.index[node]) and any(self.info.carries[self.info.index[e]] for e in externals):
            return None  # an accumulation: its other terms may belong to another link
        return Statement(node.target, args, kwargs, shape_of(node), dtype_of(node)), externals


class _Refused(Exception):
    pass


def _key(statement: Statement, externals: list[Node]) -> Hashable:
    return (statement, tuple(map(form_of, externals)))


def _grow(info: GraphInfo, group: Group, states: set[Node], tainted: set[int], taken: set[Node]) -> None:
    lanes = [_Lane(info, p, states, tainted) for p in group.programs]
    first = lanes[0]
    waiting: list[int] = []
    seen: set[int] = set()

    def push(node: Node | None) -> None:
        if node is None or node in first.closed:
            return
        for user in first.users(node):
            if user not in seen:
                seen.add(user)
                heapq.heappush(waiting, user)

    for node in first.program.raw:
        push(node)
    while waiting:
        node = info.nodes[heapq.heappop(waiting)]
        if node in first.id_of or node in taken:
            continue
        slots = len(first.program.externals)
        made = first.statement(node, slots)
        if made is None:
            continue
        statement, externals = made
        anchor = _anchor(statement)
        if anchor is None:
            continue
        key = _key(statement, externals)
        found: list[tuple[Node, list[Node]]] = [(node, externals)]
        for lane in lanes[1:]:
            other = _counterpart(lane, anchor, key, slots, taken)
            if other is None:
                break
            found.append(other)
        if len(found) < len(lanes):
            continue
        for lane, (member, outside) in zip(lanes, found, strict=True):
            lane.program.statements.append(statement)
            lane.program.raw.append(member)
            lane.program.externals.extend(outside)
            lane.id_of[member] = len(lane.program.raw) - 1
        push(node)


def _anchor(statement: Statement) -> int | None:
    return max((ref.id for ref in references(statement.args)), default=None)


def _counterpart(
    lane: _Lane, anchor: int, key: Hashable, slots: int, taken: set[Node]
) -> tuple[Node, list[Node]] | None:
    node = lane.program.raw[anchor]
    if node is None:
        return None
    for user in lane.users(node):
        candidate = lane.info.nodes[user]
        if candidate in lane.id_of or candidate in taken:
            continue
        made = lane.statement(candidate, slots)
        if made is not None and _key(*made) == key:
            return candidate, made[1]
    return None


def sides_in_common(info: GraphInfo, links: list[Program]) -> int:
    """How many statements successive equal ``links`` have after growing together."""
    group = Group([], [program.copy() for program in links])
    states = {p.raw[i] for p in links for i in p.outputs} | {n for p in links for n in p.inputs}
    starts = {info.index[n] for n in states if n is not None}
    bounds = {n for n in states if n is not None}
    _grow(info, group, bounds, info.descendants(starts), bounds)
    return len(group.programs[0].statements)


# -- what leaves a group ----------------------------------------------------------------------------------------


def inner_sums(program: Program) -> set[Node]:
    """The inner additions of the program's sums. They are not statements, and disappear when the program is batched."""
    found: set[Node] = set()
    for statement, node in zip(program.statements, program.raw, strict=True):
        if statement.target is SUM and node is not None:
            found |= inner_additions(node)
    return found


def _exports(group: Group, states: set[Node]) -> list[int]:
    """Statements whose nodes something outside the group uses, in some lane."""
    exported: set[int] = set()
    for program in group.programs:
        inside = {n for n in program.raw if n is not None} | inner_sums(program)
        for i, node in enumerate(program.raw):
            if i >= program.arity and node is not None and node not in states:
                exported.update([i] if any(user not in inside for user in node.users) else [])
    return sorted(exported)


# -- the link behind the last state -----------------------------------------------------------------------------


def _tail(info: GraphInfo, group: Group, chain: Chain, tainted: set[int]) -> Program | None:
    """The link of the last state, if only its side outputs are computed, as one more lane of ``group``."""
    found = _tail_with(info, group, chain, tainted, group.exports)
    if found is not None:
        return found
    # A link without outputs does not compute what leaves the other links on the way to theirs,
    template = group.template
    on_the_way = set().union(*(closure(template, i) for i in template.outputs))
    apart = [i for i in group.exports if i not in on_the_way]
    # and perhaps not the products there, so nothing that needs them either.
    products = {i for i in on_the_way if is_heavy(template, i)}
    ahead = [i for i in apart if products.isdisjoint(closure(template, i))]
    for exports in (apart, ahead) if len(group.lanes) > 1 and len(ahead) < len(apart) else (apart,):
        if 0 < len(exports) < len(group.exports):
            found = _tail_with(info, group, chain, tainted, exports)
            if found is not None and not found.outputs and (exports is apart or _adds_to_others(group, found, exports)):
                return found
    return None


def _adds_to_others(group: Group, found: Program, exports: list[int]) -> bool:
    """Whether ``found`` and the links of ``group`` use the same weights: what they give to these is added up. Without
    the products on the way to its outputs, a step would otherwise look like any layer that ends like a block.
    """
    pairs = [(found.raw[i], group.programs[0].raw[i]) for i in exports if _heavy_within(group.template, i)]
    return any(a is not None and b is not None and root_of(a) is root_of(b) for a, b in pairs)


def _heavy_within(program: Program, i: int) -> bool:
    return any(_is_product(program, c) for c in closure(program, i))


def _tail_with(info: GraphInfo, group: Group, chain: Chain, tainted: set[int], exports: list[int]) -> Program | None:
    template, state = group.template, chain.states[-1]
    sides = [(i, sorted(closure(template, i), reverse=True)) for i in exports]
    heavy = any(is_heavy(template, c) for c in range(template.arity, len(template.statements)))
    blocks = any(is_heavy(template, c) for i in template.outputs for c in closure(template, i))
    told_by_sides = not heavy or any(_is_product(template, c) for _, needed in sides for c in needed)
    if not (told_by_sides or blocks):
        return None
    reached = [info.nodes[i] for i in sorted(_near(info, state, 8 * len(template.statements)))]
    found: Program | None = None
    # A product with the weights that all links share is unmistakable. An elementwise program can be recognized only by
    # the forward pass.
    for told_by in (_shared, _wired)[0 if blocks else 1 :]:
        fits = told_by(info, group, chain)
        try:
            found = match_sides(template, state, sides, reached, info, tainted, fits) if fits else None
            # No sum marks it, and its weights are its own, as any layer's are: only the forward pass tells it apart.
            if found and not found.outputs and told_by is _shared and not _adds_to_others(group, found, exports):
                fits = _wired_directly(info, group, chain)
                found = match_sides(template, state, sides, reached, info, tainted, fits) if fits else found
            break
        except Ambiguous:
            continue
    if found is None or found.outputs:
        return found
    if not told_by_sides or _goes_on(info, found, template):
        return None
    if blocks:
        return found
    # If more follows than side outputs, there is a state that was not found.
    return found if sides and _left_over(info, found) <= _left_over(info, template) else None


def _goes_on(info: GraphInfo, found: Program, template: Program) -> bool:
    """Whether ``found``, a link without outputs, contains the beginning of a path to outputs. Then it is a layer that
    looks like a block, not a step from zeros.
    """
    for i in set().union(*(closure(template, i) for i in template.outputs)):
        statement = template.statements[i]
        if found.raw[i] is not None or statement.target is SUM:
            continue
        before = [n for ref in references(statement.args) if (n := found.raw[ref.id]) is not None]
        after = (info.nodes[u] for n in before if n not in found.inputs for u in info.users[info.index[n]])
        form = (statement.shape, statement.dtype)
        if any(u.target is statement.target and form_of(u) == form and u not in found.raw for u in after):
            return True
    return False


def _left_over(info: GraphInfo, link: Program) -> Counter[Any]:
    """The operators that take a gradient from the state of ``link`` without being part of it."""
    users = (info.nodes[u] for n in link.inputs if n is not None for u in info.users[info.index[n]])
    return Counter(user.target for user in users if user not in link.raw)


def _shared(info: GraphInfo, group: Group, chain: Chain) -> Fits:
    """The test that the link behind the last one takes the same external values (an RNN's weights) as all links of the
    group.
    """
    slots = range(len(group.template.externals)) if len(group.lanes) > 1 else ()
    columns = {slot: group.external(slot) for slot in slots}
    shared = {slot: nodes[0] for slot, nodes in columns.items() if all(same_value(n, nodes[0]) for n in nodes[1:])}
    return lambda slot, node: slot not in shared or same_value(node, shared[slot])


def _wired(info: GraphInfo, group: Group, chain: Chain) -> Fits | None:
    """The same test, and what differs from step to step must be computed as in the steps before. None if that says
    nothing.
    """
    pattern = _pattern(info, group, chain)
    return pattern.fits(chain.links[-1]) if pattern.is_known else None


def _wired_directly(info: GraphInfo, group: Group, chain: Chain) -> Fits | None:
    """The same by those wires alone that end at an external itself. What an external is computed from may be different
    in a first step, whose state is given.
    """
    pattern = _pattern(info, group, chain)
    pattern.wires = {wire for wire in pattern.wires if not wire.earlier.route}
    return pattern.fits(chain.links[-1]) if pattern.is_known else None


def _pattern(info: GraphInfo, group: Group, chain: Chain) -> Pattern:
    pairs = [(chain.links[p - 1], chain.links[p]) for p in sorted(group.lanes) if p]
    return Pattern(info, [pair for pair in pairs if pair[0].signature == chain.links[-1].signature][-_WIRED:])


def _near(info: GraphInfo, state: State, limit: int) -> set[int]:
    """The first ``limit`` gradient nodes that depend on ``state``, in graph order."""
    starts = [info.index[n] for n in state if n is not None]
    waiting = sorted({u for s in starts for u in info.users[s]})
    heapq.heapify(waiting)
    reached: set[int] = set()
    while waiting and len(reached) < limit:
        node = heapq.heappop(waiting)
        if node not in reached:
            reached.add(node)
            for user in info.users[node]:
                heapq.heappush(waiting, user)
    return reached


def _is_product(program: Program, i: int) -> bool:
    """Whether it is heavy, or a matrix product with an inner dimension of one that became ``[n, 1] * [1, m]``."""
    node = program.raw[i]
    if node is None or node.target is not torch.ops.aten.mul.Tensor or program.statements[i].target is SUM:
        return is_heavy(program, i)
    shapes = [shape_of(a) for a in node.args if isinstance(a, Node)]
    return len(shapes) == 2 and shape_of(node) not in shapes
