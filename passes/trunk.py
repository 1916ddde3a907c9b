"""Joins inside blocks that hide those on the trunk: the residual stream that every block reads and adds to."""

from __future__ import annotations

import heapq

from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.rules import Kind, operands

from .find_chains import CARRIERS, next_join

# A block may have a few joins of its own; more in a row are a chain inside a chain.
_JOINS_IN_A_BLOCK = 3


def on_the_trunk(info: GraphInfo, following: dict[int, int]) -> dict[int, int]:
    """``following`` with joins whose gradient is only a part of the trunk's replaced by those on the trunk.

    A block that uses its normed input twice, ``u = norm(x); x + u * gate(u)``, has a join at u, which gradients meet
    before the one at x, and the next block's join at u is the first one behind it: the join at x, where the trunk and
    all that comes through u meet, is passed over.
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
            # The trunk of a first state that wants no gradient ends inside the block.
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
    """A number that is the same for elementwise paths from ``start`` to ``join`` and for others like them."""
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
