"""Choose the states of a chain so that no gradient path bypasses one, and cut out the links between them.

Note [Separation]
~~~~~~~~~~~~~~~~~
``u_i = K u_{i+1} + J u_{i+1} + c_i`` holds only if everything that state i receives from the chain comes through state
i + 1. If something bypasses a state, there are three ways out. The one that keeps the most links wins:

- keep only the joins that every path passes through (for short skips that repeat along the chain);
- split into sub-chains, so that every bypass starts before or ends behind one (for a long skip, as in a U-Net);
- widen the state to everything that crosses the boundary (for an LSTM's (h, c)).
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Set
from dataclasses import dataclass

from torch.fx import Node

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.match import match_backward
from hwbp_compiler.graph.program import (
    Program,
    State,
    extract,
    has_block,
    inner_additions,
    sum_terms,
)
from hwbp_compiler.graph.rules import Kind, shape_of
from hwbp_compiler.reasons import Declined, Reason, Why

from .find_chains import Track, is_carrier

# A state is at most this many tensors.
WIDEST = 3


@dataclass(frozen=True)
class Refusal:
    """A stretch that is not a chain, and why. ``nodes`` locate it in the user's source, and ``length`` is the number of
    joins it would have had.
    """

    nodes: tuple[Node, ...]
    length: int
    why: Why


def check_separation(info: GraphInfo, track: Track) -> tuple[list[Chain], list[Refusal]]:
    """The chains with sound states along ``track``, first link included, and the refusals."""
    joins = list(track.joins)
    crossings = _crossings(info, joins)
    options: list[list[list[State]]]
    if not crossings:
        options = [[[(info.nodes[j],) for j in joins]]]
    else:
        options = [
            [[(info.nodes[j],) for j in _uncrossed(joins, crossings)]],
            [[(info.nodes[j],) for j in joins[a : b + 1]] for a, b in _sub_ranges(info, joins)],
            [[s for j in joins if (s := _widened(info, j)) is not None]],
        ]
    best: tuple[list[Chain], list[Refusal]] = ([], [])
    for option in options:
        chains: list[Chain] = []
        refusals: list[Refusal] = []
        for states in option:
            if states:
                _build(info, track, states, chains, refusals)
        if score(chains) > score(best[0]) or not (best[0] or best[1]):
            best = (chains, refusals)
    chains, refusals = best
    kept = sum(c.length for c in chains if c.length > 1)
    other = [r for r in refusals if r.why.code is not Reason.CONNECTION_SKIPS_STEPS]
    if crossings and (len(other) < len(refusals) or 2 * kept < len(joins)):
        refusals = other or [_too_wide(info, joins, max(1, len(joins) - kept))]
    if len(joins) == 1 and not chains[0].links:
        refusals = _alone(info, track, chains[0])
    return chains, refusals


def along_states(info: GraphInfo, states: list[State]) -> tuple[list[Chain], list[Refusal]]:
    """The chains through the given ``states``, and the refusals."""
    found: list[Chain] = []
    chains: list[Chain] = []
    refusals: list[Refusal] = []
    track = Track((), ())
    _build(info, track, states, chains, refusals)
    for chain in chains:
        # Sums inside the last block may look like states: there are only more sums between them.
        while chain.links and not has_block(chain.links[0]):
            chain = Chain(chain.states[1:], chain.links[1:])
        found.append(with_heads(info, chain))
    return found, refusals


def with_heads(info: GraphInfo, chain: Chain) -> Chain:
    """``chain`` with all links in front of its first state that look like its own."""
    while None not in chain.states[0] and (longer := _with_head(info, Track((), ()), chain)) is not None:
        chain = longer
    return chain


def _alone(info: GraphInfo, track: Track, chain: Chain) -> list[Refusal]:
    """Why the only join of ``track`` ends no link. A join that no branch leads to lies inside a larger link and is not
    reported.
    """
    if not track.branches:
        return []
    try:
        _head_from_branch(info, track, chain)
    except Declined as declined:
        start = (info.nodes[track.branches[0]],)
        return [Refusal(_between(info, start, chain.states[0]), 1, declined.why)]
    raise AssertionError("the join has a link in front of it")


def _too_wide(info: GraphInfo, joins: list[int], lost: int) -> Refusal:
    """The refusal for a track of which bypasses leave little."""
    inside = info.between({joins[0]}, {joins[-1]})
    nodes = tuple(info.nodes[i] for i in sorted(inside))
    width = _width(info, joins, inside)
    if width <= WIDEST:
        parts = len(_parts(info, joins[len(joins) // 2]))
        return (
            _divided(nodes, lost, parts) if parts > WIDEST else Refusal(nodes, lost, Reason.CONNECTION_SKIPS_STEPS.of())
        )
    return Refusal(nodes, lost, Reason.STATE_TOO_WIDE.of(width=width, widest=WIDEST))


def _divided(nodes: tuple[Node, ...], lost: int, parts: int) -> Refusal:
    """For an LSTM with peepholes: two tensors cross, but the gradient of one sums more terms than a state holds."""
    return Refusal(nodes, lost, Reason.GRADIENT_IN_TOO_MANY_TERMS.of(parts=parts, widest=WIDEST))


def _width(info: GraphInfo, joins: list[int], inside: set[int]) -> int:
    """How many gradients cross from one step to the next: counted at the narrowest place of each step, for the widest
    step.
    """
    ends = {i: max((u for u in info.users[i] if u in inside), default=i) for i in inside}
    alive: list[int] = []  # last uses of the gradients that cross the present position
    narrowest = [len(inside)] * len(joins)
    for i in sorted(inside):
        alive = [end for end in alive if end > i]
        if ends[i] > i:
            alive.append(ends[i])
        step = bisect_left(joins, i)
        narrowest[step] = min(narrowest[step], len(alive)) if alive else narrowest[step]
    return max(narrowest[1:])  # the first and the last step are incomplete


def score(chains: Iterable[Chain]) -> int:
    """The number of links beyond the first of each chain: a chain of one link gains nothing."""
    return sum(max(0, c.length - 1) for c in chains)


def _crossings(info: GraphInfo, joins: list[int], of_last: Set[int] = frozenset()) -> list[tuple[int, int]]:
    """Bypasses as (p, q): an edge that starts at or behind join p and ends at or before join q skips those between.

    ``of_last`` are nodes that are added up into the last join, so an edge to one of them ends there.
    """
    if len(joins) < 3:
        return []
    inside = info.between({joins[0]}, {joins[-1]})
    found: set[tuple[int, int]] = set()
    for node in inside - of_last:
        for user in info.users[node]:
            if user in inside:
                end = joins[-1] if user in of_last else user
                p, q = bisect_right(joins, node) - 1, bisect_left(joins, end)
                if q - p > 1:
                    found.add((p, q))
    return sorted(found)


def _uncrossed(joins: list[int], crossings: list[tuple[int, int]]) -> list[int]:
    crossed: set[int] = set()
    for p, q in crossings:
        crossed.update(range(p + 1, q))
    return [j for i, j in enumerate(joins) if i not in crossed]


def _sub_ranges(info: GraphInfo, joins: list[int]) -> list[tuple[int, int]]:
    """Maximal ranges of joins in which no bypass both starts and ends, except at the last join.

    A longer range has more bypasses, so doubling and bisection find its end, in near-linear time overall.
    """
    ranges: list[tuple[int, int]] = []
    start, last = 0, len(joins) - 1

    def sound(end: int) -> bool:
        return not _crossings(info, joins[start : end + 1])

    def sound_but_for_the_end(end: int) -> bool:
        of_last = {info.index[n] for n in inner_additions(info.nodes[joins[end]])}
        return all(q == end - start for _, q in _crossings(info, joins[start : end + 1], of_last))

    while start < last:
        good, step = start + 1, 2
        bad = None
        while bad is None and good < last:
            trial = min(start + step, last)
            if sound(trial):
                good, step = trial, step * 2
            else:
                bad = trial
        while bad is not None and bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if sound(middle) else (good, middle)
        if good < last and sound_but_for_the_end(good + 1):
            good += 1  # the first state of a chain may receive gradients from anywhere in the chain
        ranges.append((start, good))
        start = good
    return ranges


def _widened(info: GraphInfo, join: int) -> State | None:
    """The parts of ``join`` as a state: (dh, dc) for an LSTM."""
    parts = _parts(info, join)
    return parts if 2 <= len(parts) <= WIDEST else None


def _parts(info: GraphInfo, join: int) -> tuple[Node, ...]:
    """The terms summed in ``join``, each traced back to where it is a gradient of its own."""
    heavy: list[Node] = []
    light: list[Node] = []
    for term in sum_terms(info.nodes[join]):
        node = term
        while not _is_own(info, node):
            carriers = info.sources[info.index[node]]
            if len(carriers) != 1 or info.kind(info.index[node]) not in (Kind.ELEMENTWISE, Kind.LAYOUT):
                break
            node = info.nodes[carriers[0]]
        if _crosses_by_heavy(info, node):
            heavy.append(node)
        elif info.carries[info.index[term]]:
            light.append(term)
    # Heavy terms first. K is then lower triangular, in the order of the model's own state, (h, c).
    return tuple(dict.fromkeys([*heavy, *light]))


def _is_own(info: GraphInfo, node: Node) -> bool:
    i = info.index[node]
    return info.is_sum(i) or info.kind(i) not in (Kind.ELEMENTWISE, Kind.LAYOUT) or len(info.users[i]) > 1


def _crosses_by_heavy(info: GraphInfo, node: Node) -> bool:
    """Whether ``node`` is a sum with a heavy term, or the result of a heavy operator: then it arrives through a block.
    A block may end in a cast (autocast) or a view.
    """
    arrived = (Kind.HEAVY, Kind.MIXING)
    return any(info.kind(_behind_carriers(info, info.index[term])) in arrived for term in sum_terms(node))


def _behind_carriers(info: GraphInfo, i: int) -> int:
    """The node that ``i`` is only a view or cast of."""
    while is_carrier(info, i):
        i = info.sources[i][0]
    return i


def _build(info: GraphInfo, track: Track, states: list[State], chains: list[Chain], refusals: list[Refusal]) -> None:
    """Cut links between successive states. A stretch that is not a link ends one chain and starts the next."""
    tainted = info.descendants({info.index[n] for n in states[0] if n is not None})
    current: list[State] = [states[0]]
    links: list[Program] = []
    pieces: list[tuple[list[State], list[Program]]] = []
    for before, after in zip(states, states[1:], strict=False):
        try:
            _check_shapes(before, after)
            link = extract(info, before, [n for n in after if n is not None], tainted, last=after is states[-1])
        except Declined as declined:
            refusals.append(Refusal(_between(info, before, after), 1, declined.why))
            pieces.append((current, links))
            current, links = [after], []
            continue
        # A state with a remainder has no node of its own.
        rest = [link.raw[i] is None for i in link.outputs]
        current.append(tuple(None if gone else n for n, gone in zip(after, rest, strict=True)))
        links.append(link)
    pieces.append((current, links))
    for piece_states, piece_links in pieces:
        chain = Chain(piece_states, piece_links)
        chains.append(_with_head(info, track, chain) or chain)


def _check_shapes(before: State, after: State) -> None:
    if len(before) != len(after):
        raise Declined(Reason.STATE_CHANGES_WIDTH.of(before=len(before), after=len(after)))
    for a, b in zip(before, after, strict=True):
        if a is not None and b is not None:
            # The gradient flows backward, so in the model the state first has the shape of ``b``.
            if shape_of(a) != shape_of(b):
                raise Declined(Reason.STATE_CHANGES_SHAPE.of(before=_sizes(b), after=_sizes(a)))
            if a.meta["val"].dtype != b.meta["val"].dtype:
                raise Declined(Reason.STATE_CHANGES_DTYPE.of(before=b.meta["val"].dtype, after=a.meta["val"].dtype))


def _sizes(node: Node) -> str:
    return "[" + ", ".join(map(str, shape_of(node) or ())) + "]"


def _between(info: GraphInfo, before: State, after: State) -> tuple[Node, ...]:
    starts = {info.index[n] for n in before if n is not None}
    ends = {info.index[n] for n in after if n is not None}
    inside = [info.nodes[i] for i in sorted(info.between(starts, ends) - starts)]
    return tuple(inside or (n for n in after if n is not None))


def _with_head(info: GraphInfo, track: Track, chain: Chain) -> Chain | None:
    """``chain`` with the link in front of its first state, or None if there is no such link."""
    outputs = [n for n in chain.states[0] if n is not None]
    for neighbour in chain.links[:4]:
        head = match_backward(neighbour, outputs, info)
        if head is not None and _head_is_sound(info, head, chain):
            return Chain([head.inputs, *chain.states], [head, *chain.links])
    if len(outputs) == 1 and track.branches and info.index[outputs[0]] == track.joins[0]:
        with contextlib.suppress(Declined):
            return _head_from_branch(info, track, chain)
    return None


def _head_is_sound(info: GraphInfo, head: Program, chain: Chain) -> bool:
    inputs = {n for n in head.inputs if n is not None}
    if not inputs.isdisjoint(n for n in chain.states[0] if n is not None):
        return False
    if not all(info.carries[info.index[n]] for n in inputs):
        return False
    own = {info.index[n] for n in head.raw[head.arity :] if n is not None and n not in inputs}
    tainted = info.descendants(own)
    if any(info.index[n] in tainted for n in inputs):
        return False
    for program in (head, *chain.links):
        outside = [*program.externals, *(t for terms in program.injections.values() for t in terms)]
        if any(info.index[n] in tainted for n in outside):
            return False
    # If the state also reaches an injection, that is a block of this link, and the match was with a neighbour that has
    # fewer blocks.
    reached = info.descendants({info.index[n] for n in inputs})
    return not any(info.index[t] in reached for terms in head.injections.values() for t in terms)


def _head_from_branch(info: GraphInfo, track: Track, chain: Chain) -> Chain:
    """For a first link that is built differently from its neighbours: it starts at the last branch point before the
    join. Raises Declined if what lies between the two is not a link.
    """
    join = track.joins[0]
    branch = _branch_before(info, set(track.branches[:1]), join)
    if branch is None:
        raise Declined(Reason.CONNECTION_SKIPS_STEPS)
    start = info.nodes[branch]
    for link, (before,) in zip(chain.links[:4], chain.states, strict=False):
        # What the neighbours have between state and branch point (the mask of a ReLU) belongs to this link too.
        after = link.raw[link.outputs[0]]
        if after is None:  # it is only a part of a sum
            break
        assert before is not None
        inner = _branch_before(info, {info.index[before]}, info.index[after])
        if inner is None or inner == info.index[before]:
            break
        try:
            lead = extract(info, (before,), [info.nodes[inner]], set())
        except Declined:
            break
        found = match_backward(lead, [start], info)
        if found is not None and found.inputs[0] is not None:
            start = found.inputs[0]
            break
    state: State = (start,)
    _check_shapes(state, chain.states[0])
    head = extract(info, state, [info.nodes[join]], set())
    if not _head_is_sound(info, head, chain):
        raise Declined(Reason.CONNECTION_SKIPS_STEPS)
    return Chain([state, *chain.states], [head, *chain.links])


def _branch_before(info: GraphInfo, starts: set[int], join: int) -> int | None:
    """The last node before ``join`` on every path from ``starts`` that more than one path leaves."""
    inside = info.between(starts, {join})
    reach = -1
    found = None
    for node in sorted(inside - {join}):
        users = [u for u in info.users[node] if u in inside]
        if reach <= node and len(users) > 1:
            found = node
        reach = max([reach, *users])
    return found
