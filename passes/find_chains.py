"""Find tracks: successive joins where an elementwise path and a heavy path from the same gradient meet.

In the forward pass, ``h' = h + Block(h)`` uses ``h`` twice. In the backward pass, the two gradients of ``h`` are added.
This addition, a *join*, is where one link ends and the next one (towards the input) begins. A sum of an elementwise
path and a mere reduction (LayerNorm's own backward) is not a join, because nothing heavy lies between.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch

from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.rules import Kind

aten = torch.ops.aten

CARRIERS = {aten.clone.default, aten.alias.default, torch.ops.prims.convert_element_type.default}

_ELEMENTWISE, _HEAVY, _INSIDE, _SMOOTHLY_INSIDE = 1, 2, 4, 8

# Give up a search after this many nodes without a join, or after this many nodes that are reached element by element.
# No block is that large, and no highway is that long within one link. Without the second limit, an entirely elementwise
# recurrence would cost T searches of T steps.
_SEARCH_LIMIT = 20_000
_ELEMENTWISE_LIMIT = 250


@dataclass(frozen=True)
class Track:
    """Successive joins in the order gradients reach them, and the branch points that lead to the first one.

    Indices into ``GraphInfo.nodes``; ``branches`` ascending.
    """

    joins: tuple[int, ...]
    branches: tuple[int, ...]


def find_chains(info: GraphInfo) -> list[Track]:
    """All maximal tracks of the graph, longest first. No join belongs to two of them."""
    return tracks(followers(info))


def followers(info: GraphInfo) -> dict[int, int]:
    """The next join after every branch point and after every join."""
    following: dict[int, int] = {}
    for start, users in enumerate(info.users):
        if len(users) >= 2:
            join = next_join(info, start)
            if join is not None:
                following[start] = join
    joins = set(following.values())
    for join in sorted(joins):
        if join not in following and info.users[join]:
            after = next_join(info, join)
            if after is not None:
                following[join] = after
    _leave_blocks(info, following)
    return following


def tracks(following: dict[int, int]) -> list[Track]:
    """All maximal tracks along ``following``, longest first."""
    joins = set(following.values())
    branches: dict[int, list[int]] = {}
    for start, join in following.items():
        branches.setdefault(join, []).append(start)
    # Joins form a forest (each is followed by at most one). Walk it from the end, so that the longest branch keeps the
    # stem.
    length: dict[int, int] = {}
    for join in sorted(joins):
        length.setdefault(join, 1)
        after = following.get(join)
        if after is not None:
            length[after] = max(length.get(after, 1), length[join] + 1)
    before: dict[int, list[int]] = {}
    for join in joins:
        if join in following:
            before.setdefault(following[join], []).append(join)
    found: list[Track] = []
    used: set[int] = set()
    for end in sorted(joins, key=lambda j: (-length[j], j)):
        if end in used:
            continue
        path = [end]
        while True:
            candidates = [j for j in before.get(path[-1], ()) if j not in used]
            if not candidates:
                break
            path.append(max(candidates, key=lambda j: (length[j], j)))
        used.update(path)
        path.reverse()
        found.append(Track(tuple(path), tuple(sorted(branches.get(path[0], ())))))
    return found


def _leave_blocks(info: GraphInfo, following: dict[int, int]) -> None:
    """Replace, in ``following``, each join inside a block by the join behind the block.

    A block that ends in ``y * gate(y)`` (squeeze and excitation) or ``y + f(y)`` has a join of its own, which comes
    before the join of the residual addition around it. No track continues from there.
    """
    todo = list(following)
    while todo:
        start = todo.pop()
        join = following[start]
        while join not in following and (outer := next_join(info, start, join)) is not None:
            following[start] = join = outer
            if join not in following and info.users[join] and (after := next_join(info, join)) is not None:
                following[join] = after
                todo.append(join)


def next_join(info: GraphInfo, start: int, inside: int | None = None, smoothly: bool = False) -> int | None:
    """The first join of an elementwise and a heavy path from ``start``, as the root of its tree of additions.

    With ``inside``, an earlier join: the first join where an elementwise path that avoids ``inside`` meets a heavy path
    through it. Then ``inside`` is part of the block. With ``smoothly``, that path may arrive there element by element.
    """
    flags = {start: _ELEMENTWISE}
    heap: list[int] = []
    waiting: set[int] = set()
    elementwise_waiting: set[int] = set()

    def push(node: int) -> None:
        for user in info.users[node]:
            if user not in waiting:
                waiting.add(user)
                heapq.heappush(heap, user)
            if flags[node] & _ELEMENTWISE and info.elementwise(node, user):
                elementwise_waiting.add(user)

    outer = (_INSIDE, _INSIDE | _SMOOTHLY_INSIDE) if smoothly else (_INSIDE,)
    push(start)
    smoothly_reached = 0
    while heap and elementwise_waiting and len(flags) < _SEARCH_LIMIT and smoothly_reached < _ELEMENTWISE_LIMIT:
        node = heapq.heappop(heap)
        elementwise_waiting.discard(node)
        reached = [p for p in info.sources[node] if p in flags]
        smooth = [p for p in reached if flags[p] & _ELEMENTWISE and info.elementwise(p, node)]
        heavy = [p for p in reached if flags[p] & _HEAVY]
        if inside is None or node != inside:
            inner = _INSIDE if any(flags[p] & _INSIDE for p in reached) else 0
            if any(flags[p] & _SMOOTHLY_INSIDE and info.elementwise(p, node) for p in reached):
                inner |= _SMOOTHLY_INSIDE
        else:
            smooth, inner = [], _HEAVY | _INSIDE | _SMOOTHLY_INSIDE
        if info.is_sum(node) and any(p != q for p in smooth for q in heavy) and (inside is None or inner in outer):
            return root_of_sum(info, node)
        smoothly_reached += bool(smooth)
        flags[node] = (_ELEMENTWISE if smooth else 0) | (_HEAVY if heavy else 0) | inner
        if info.kind(node) in (Kind.HEAVY, None):
            flags[node] |= _HEAVY
        push(node)
    return None


def root_of_sum(info: GraphInfo, node: int) -> int:
    """Follow single-use additions (through views and casts) to the last one: ``(g + a) + b`` is one join."""
    while True:
        cursor = node
        while len(info.users[cursor]) == 1:
            cursor = info.users[cursor][0]
            if info.is_sum(cursor):
                break
            if not is_carrier(info, cursor):
                return node
        else:
            return node
        if not info.elementwise(info.sources[cursor][0], cursor) or len(info.nodes[cursor].users) == 0:
            return node
        node = cursor


def is_carrier(info: GraphInfo, i: int) -> bool:
    """Whether ``i`` passes a gradient on unchanged: a view, a cast, a copy."""
    return info.kind(i) is Kind.LAYOUT or info.nodes[i].target in CARRIERS
