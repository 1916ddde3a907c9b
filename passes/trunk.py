"""Joins inside blocks may hide the joins on the trunk, the residual stream that every block reads and adds to."""

from __future__ import annotations

import heapq

from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.rules import Kind, operands

from .find_chains import CARRIERS, next_join

# A block may have a few joins of its own. More in a row are a chain inside a chain.
_JOINS_IN_A_BLOCK = 3


def on_the_trunk(info: GraphInfo, following: dict[int, int]) -> dict[int, int]:
    """``following``, with each join whose gradient is only a part of the trunk's replaced by the join on the trunk.

    A block that uses its normalized input twice, ``u = norm(x); x + u * gate(u)``, has a join at u. It comes before the
    join at x, where the trunk meets everything that comes through u. The first join after the one at u is the next
    block's join at u, so the join at x is passed over.
    """
    before, following = dict(following), dict(following)
    trunk: set[int] = set()
    highways: set[int | None] = set()  # from the trunk to the first join inside a block
    within: set[int] = set()  # joins inside blocks
    todo = sorted(before)
    while todo:
        start = heapq.heappop(todo)
        if start in within:
            continue
        join = before[start]
        outer = next_join(info, start, join, smoothly=True)
        if outer is None:
            # If no gradient of the first state is wanted, the trunk ends inside the first block.
            if start in trunk and _highway(info, start, join) in highways:
                del following[start]
            elif start in trunk:
                trunk.add(join)
            continue
        inner = [join]
        while (after := before.get(inner[-1])) is not None and after <= outer:
            inner.append(after)
        if inner[-1] != outer and len(inner) <= _JOINS_IN_A_BLOCK:
            following[start] = outer
            following.pop(inner[-1], None)
            within.update(inner)
            highways.add(_highway(info, start, join))
            trunk.add(outer)
            if outer not in before and (after := next_join(info, outer)) is not None:
                before[outer] = following[outer] = after
                heapq.heappush(todo, outer)
    return following


def _highway(info: GraphInfo, start: int, join: int) -> int | None:
    """A number that is equal for elementwise paths from ``start`` to ``join`` with the same operators."""
    forms: dict[int, int] = {start: 0}
    for i in sorted(info.between({start}, {join}) - {start}):
        node = info.nodes[i]
        found = {info.nodes[s]: forms[s] for s in info.sources[i] if s in forms and info.elementwise(s, i)}
        if found and (info.kind(i) is Kind.LAYOUT or node.target in CARRIERS or (len(found) == 1 and info.is_sum(i))):
            (forms[i],) = found.values()
        elif found and info.is_sum(i):
            forms[i] = hash(tuple(sorted(found.values())))
        elif found:
            forms[i] = hash((str(node.target), *(found.get(n, -1) for _, n in operands(node))))
    return forms.get(join)
