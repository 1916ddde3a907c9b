"""Find chains whose state is several tensors that feed each other: ``a = a + f(b); b = b + g(a)``.

No gradient splits there into an elementwise and a heavy path that meet again, so ``find_chains`` finds no join. Such a
model is recognized by a *stream*, a long elementwise path with sums on it. The backward pass is cut behind sums where
only two or three gradients cross the cut: those gradients are the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import State
from hwbp_compiler.graph.rules import Kind

from .check_separation import WIDEST

# Streams with fewer steps are not examined.
_SHORTEST = 3


def find_streams(info: GraphInfo) -> list[list[list[State]]]:
    """For every stream that has states of two or three components: the ways to go from state to state.

    If components are updated one after the other, a step may begin with any of them.
    """
    found: list[list[list[State]]] = []
    joins = _joins(info)
    for sums in _streams(info, joins):
        by_width = _cuts(info, sums, joins)
        least = len(_apart(by_width[0]))  # states of one tensor are found elsewhere
        ways: list[list[State]] = []
        for cuts in by_width[1:]:
            for start in range(min(WIDEST, len(cuts))):
                apart = _apart(cuts[start:])
                if len(apart) > least:
                    ways += [[tuple(info.nodes[i] for i in c) for c in states] for states in _in_order(info, apart)]
        if ways:
            found.append(ways)
    return found


def _streams(info: GraphInfo, joins: list[bool]) -> Iterator[list[int]]:
    """The sums on elementwise paths that have more than a few of them, the most first. No two paths share a node."""
    count = len(info.nodes)
    ahead: list[int | None] = [None] * count
    passed = [0] * count  # most sums on an elementwise path that starts here
    for i in range(count - 1, -1, -1):
        for user in info.users[i]:
            best = ahead[i]
            if info.elementwise(i, user) and (best is None or passed[user] > passed[best]):
                ahead[i] = user
        passed[i] = joins[i] + (0 if (after := ahead[i]) is None else passed[after])
    used: set[int] = set()
    for start in sorted((i for i in range(count) if passed[i] > _SHORTEST), key=lambda i: -passed[i]):
        sums: list[int] = []
        node: int | None = start
        while node is not None and node not in used:
            used.add(node)
            if joins[node]:
                sums.append(node)
            node = ahead[node]
        if len(sums) > _SHORTEST:
            yield sums


def _joins(info: GraphInfo) -> list[bool]:
    """Whether a node is a sum of gradients that come different ways. The sums inside a norm's derivative are none."""
    count = len(info.nodes)
    joins = [False] * count
    origin = list(range(count))  # the last node that is a join, or the result of a layer
    for i in range(count):
        origins = {origin[source] for source in info.sources[i]}
        if len(origins) == 1 and info.kind(i) is not Kind.HEAVY:
            (origin[i],) = origins
        joins[i] = len(origins) > 1 and info.is_sum(i)
    return joins


def _cuts(info: GraphInfo, sums: list[int], joins: list[bool]) -> list[list[tuple[int, ...]]]:
    """The sums that cross from before a sum to behind it, for the places where they are one, two or three."""
    inside = info.between({sums[0]}, {sums[-1]})
    order = _as_late_as_possible(info, inside, joins)
    place = {i: p for p, i in enumerate(order)}
    ends = {i: max((place[u] for u in info.users[i] if u in inside), default=p) for p, i in enumerate(order)}

    alive: list[int] = []
    found: list[list[tuple[int, ...]]] = [[] for _ in range(WIDEST)]
    for p, i in enumerate(order):
        alive = [a for a in alive if ends[a] > p]
        if ends[i] > p:
            alive.append(i)
        if 1 <= len(alive) <= WIDEST and alive[-1] == i and all(joins[a] for a in alive):
            found[len(alive) - 1].append(tuple(alive))
    return found


def _as_late_as_possible(info: GraphInfo, inside: set[int], joins: list[bool]) -> list[int]:
    """The nodes ``inside`` in another order: what is no join comes right before its first user. Otherwise what a gate
    makes of a state before the next step needs it would cross a cut beside the state itself.
    """
    place: dict[int, int] = {}
    for i in sorted(inside, reverse=True):
        place[i] = i if joins[i] else min((place[u] for u in info.users[i] if u in inside), default=i)
    return sorted(inside, key=lambda i: (place[i], i))


def _apart(cuts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those of ``cuts`` that share nothing with the one before: what a step passes on unchanged, it does not update."""
    found: list[tuple[int, ...]] = []
    for cut in cuts:
        if not found or set(found[-1]).isdisjoint(cut):
            found.append(cut)
    return found


def _in_order(info: GraphInfo, cuts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Stretches of ``cuts``, with components ordered so that each is reached element by element from the one before."""
    stretches: list[list[tuple[int, ...]]] = []
    for cut in cuts:
        before = stretches[-1][-1] if stretches else ()
        reached = [_reached(info, start, max(cut)) for start in before]
        ways = permutations(cut) if before else ()
        way = next((w for w in ways if all(i in there for i, there in zip(w, reached, strict=True))), None)
        if way is None:
            stretches.append([cut])
        else:
            stretches[-1].append(way)
    return [stretch for stretch in stretches if len(stretch) > 1]


def _reached(info: GraphInfo, start: int, last: int) -> set[int]:
    """The nodes reached from ``start`` element by element, up to ``last``."""
    reached, todo = {start}, [start]
    while todo:
        node = todo.pop()
        for user in info.users[node]:
            if user <= last and user not in reached and info.elementwise(node, user):
                reached.add(user)
                todo.append(user)
    return reached
