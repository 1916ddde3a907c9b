"""Find what may be rewritten: from the tracks of a joint graph to sound chains, split and grouped."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import networkx
from torch.fx import Node

from hwbp_compiler.cost.decide import ordinary
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import Program, inputs_of, references
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined, Reason, Why

from .check_separation import Refusal, along_states, check_separation, score, with_heads
from .find_chains import Track, followers, tracks
from .find_recurrences import SHORTEST_RECURRENCE, find_recurrences, shifted
from .find_streams import find_streams
from .group_links import group_links
from .regular_part import regular_part
from .split_links import Split, split_links
from .trunk import on_the_trunk


@dataclass
class Candidate:
    """A sound chain and what is known about it before the decision."""

    chain: Chain
    groups: list[Group]
    split: Split

    @property
    def key(self) -> tuple[Node | None, ...]:
        return (*self.chain.states[0], *self.chain.last_known)

    @property
    def first(self) -> Node:
        """A node at the place where the gradient enters the chain."""
        return next(n for state in (*self.chain.states[1:2], self.chain.states[0]) for n in state if n is not None)

    @functools.cached_property
    def nodes(self) -> set[Node]:
        return {n for g in self.groups for p in g.programs for n in p.raw[p.arity :] if n is not None}


@dataclass(frozen=True)
class Look:
    """What one look at a graph finds."""

    found: list[Candidate]
    """The chains that may be rewritten, from the loss towards the input. They share no node."""
    overlapping: list[Candidate]
    """Chains that share a node with a longer one."""
    refusals: list[Refusal]
    too_short: list[Candidate]


def candidates(info: GraphInfo, options: Options) -> Look:
    """The chains of the graph, and what is no chain or shorter than ``min_length``."""
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    short: list[Candidate] = []
    below: list[Refusal] = []
    for track in best_tracks(info, options):
        chains, refused = check_separation(info, track)
        (refusals if len(track.joins) >= options.min_length else below).extend(_of_one_track(info, track, refused))
        more, too_short = _split_and_group(info, chains, options, refusals)
        found, short = found + more, short + too_short
    used = {info.index[n] for candidate in found for n in candidate.nodes}
    for track in find_recurrences(info, used, max(options.min_length, SHORTEST_RECURRENCE) - 1):
        chains = _steps(info, track)
        ways = [chains, *(_steps(info, other) for chain in chains for other in shifted(info, chain))]
        best = max([_split_and_group(info, way, options, [])[0] for way in ways], key=_links)
        found += best
    found = _wider(info, options, found, refusals)
    kept, taken = _apart(info, found)
    short, below_length = _apart(info, short)
    # From the loss towards the input: a chain's side outputs are injections of the next one.
    kept.sort(key=lambda c: info.index[c.first])
    # Drop refusals of a piece of something larger that is reported already.
    held = taken | below_length
    refusals = [
        r
        for r in refusals
        if r.why.code is not Reason.CONNECTION_SKIPS_STEPS or 2 * len(held.intersection(r.nodes)) < len(r.nodes)
    ]
    covered = taken.union(*(r.nodes for r in refusals))
    refusals += [r for r in below if covered.isdisjoint(r.nodes)]
    overlapping = [c for c in found if all(c is not k for k in kept)]
    return Look(kept, overlapping, refusals, [s for s in short if s.nodes.isdisjoint(covered)])


def cut_off(look: Look, rewritten: set[Node], declined: set[Node]) -> list[Refusal]:
    """The links that ``look`` found, but that other chains cut off as they were rewritten.

    ``rewritten`` and ``declined`` are the nodes of the chains that were decided on. Chains that feed each other share
    no node, but after one is rewritten, a block of the other may lead through it.
    """
    refusals: list[Refusal] = []
    told = rewritten | declined
    for candidate in [*look.found, *look.overlapping]:
        if not declined.isdisjoint(candidate.nodes):
            continue  # left as it was, or overlapping a chain that was: nothing has cut it
        own = [[n for n in link.raw[link.arity :] if n is not None] for link in candidate.chain.links]
        lost = [nodes for nodes in own if 2 * len(told.intersection(nodes)) < len(nodes)]
        if lost:
            refusals.append(Refusal(tuple(n for nodes in lost for n in nodes), len(lost), Reason.CUT_OFF.of()))
            told.update(*lost)
    return refusals


def _wider(info: GraphInfo, options: Options, found: list[Candidate], refusals: list[Refusal]) -> list[Candidate]:
    """``found``, where a chain of several streams replaces other chains if it has more links. Updates ``refusals``."""
    for ways in find_streams(info):
        refused: list[Refusal] = []
        more = [_split_and_group(info, along_states(info, states)[0], options, refused)[0] for states in ways]
        # In every step, if possible. In some models one step mixes the streams, and the next treats each by itself.
        joined = [[c for c in way if _feed_each_other(c.chain, _middle(c.chain))] for way in more]
        if not any(joined):
            joined = [[c for c in way if _feed_each_other(c.chain, c.chain.links)] for way in more]
        for candidate in max(joined, key=lambda way: _worth(info, way)):
            others = [c for c in found if not c.nodes.isdisjoint(candidate.nodes)]
            nested = all(c.chain.length <= candidate.chain.length and c.nodes <= candidate.nodes for c in others)
            # A link of several streams does the work of one link of each. On a tie, one long chain wins.
            fewer = sum(c.chain.width * score([c.chain]) for c in others) - (len(others) > 1)
            if nested or candidate.chain.width * score([candidate.chain]) > fewer:
                found = [c for c in found if c not in others] + [candidate]
                refusals[:] = [r for r in refusals if 2 * len(candidate.nodes.intersection(r.nodes)) < len(r.nodes)]
        for refusal in sorted(refused, key=lambda r: r.length)[-1:]:
            # One reason for the whole is better than one for each piece.
            inside = set(refusal.nodes)
            if score(c.chain for c in found if not c.nodes.isdisjoint(inside)) < refusal.length - 1:
                refusals[:] = [r for r in refusals if 2 * len(inside.intersection(r.nodes)) < len(r.nodes)]
                refusals.append(refusal)
    return found


def _middle(chain: Chain) -> list[Program]:
    return [chain.links[len(chain.links) // 2]]


def _feed_each_other(chain: Chain, links: Sequence[Program]) -> bool:
    """Whether every component leads to another one, in some of ``links``. A component that does not only sums up what
    all links add to it.
    """
    leads: set[int] = set()
    for link in links:
        needed = [inputs_of(link, i) for i in link.outputs]
        leads |= {c for other, inputs in enumerate(needed) for c in inputs if c != other}
    return leads >= set(range(chain.width))


def _worth(info: GraphInfo, way: list[Candidate]) -> tuple[int, bool, bool]:
    """The number of links, plus one if a step begins with all components unchanged, that is, if no gradient of the head
    depends on another. On a tie, the head had better have a gradient of all that gets one.
    """
    heads = [{info.index[n] for n in c.chain.states[0] if n is not None} for c in way]
    at_once = not any(_comes_later(c.chain) for c in way)
    apart = at_once and all(info.descendants({i}, max(head)).isdisjoint(head - {i}) for head in heads for i in head)
    return score(c.chain for c in way) + apart, apart, at_once


def _comes_later(chain: Chain) -> bool:
    """Whether a component that is zero in the head gets its gradient from elsewhere inside the first link."""
    absent = {i for i, node in enumerate(chain.links[0].raw) if node is None}
    sums = (chain.links[0].statements[i] for i in chain.links[0].injections)
    return any(ref.id in absent for statement in sums for ref in references(statement.args))


def best_tracks(info: GraphInfo, options: Options) -> list[Track]:
    """All tracks. Where following the first joins and following the trunk differ, the way that gives more links."""
    first = followers(info)
    trunk = on_the_trunk(info, first)
    if trunk == first:
        return tracks(first)

    def score_of(way: list[Track]) -> int:
        chains = [chain for track in way for chain in check_separation(info, track)[0]]
        return score(candidate.chain for candidate in _split_and_group(info, chains, options, [])[0])

    chosen: dict[int, int] = {}
    connected = networkx.Graph([*first.items(), *trunk.items()])
    for component in networkx.connected_components(connected):
        one, other = ({a: way[a] for a in sorted(component) if a in way} for way in (first, trunk))
        # If neither gives any links, the first joins are the ones that give the reasons.
        better = one != other and score_of(tracks(other)) >= max(score_of(tracks(one)), 1)
        chosen |= other if better else one
    return tracks(chosen)


def _steps(info: GraphInfo, track: Track) -> list[Chain]:
    """Chains of the steps of an elementwise recurrence. Where something else comes first, like a gate of the outputs,
    the first step is found only when that is cut off.
    """
    found: list[Chain] = []
    for chain in check_separation(info, track)[0]:
        if (part := regular_part(info, chain)) is not None:
            longer = with_heads(info, part)
            found.append(longer if regular_part(info, longer) == longer else part)
    return found


def _links(candidates: list[Candidate]) -> tuple[int, int]:
    """The number of links. The second number does not count a last link that has no next state."""
    return sum(len(c.chain.links) for c in candidates), sum(c.chain.length for c in candidates)


def _apart(info: GraphInfo, found: list[Candidate]) -> tuple[list[Candidate], set[Node]]:
    """The longest candidates that share no node, longest first, and all their nodes."""
    kept: list[Candidate] = []
    taken: set[Node] = set()
    for candidate in sorted(found, key=lambda c: (-c.chain.length, info.index[c.first])):
        if candidate.nodes.isdisjoint(taken):
            kept.append(candidate)
            taken |= candidate.nodes
    return kept, taken


def _along(info: GraphInfo, track: Track) -> tuple[Node, ...]:
    """The nodes of all links of ``track``."""
    start = min(track.branches, default=track.joins[0])
    inside = info.between({start}, {track.joins[-1]}) - {start}
    return tuple(info.nodes[i] for i in sorted(inside))


def _of_one_track(info: GraphInfo, track: Track, refused: list[Refusal]) -> list[Refusal]:
    """One refusal per reason. If every link but the first is refused, the first is counted as refused too."""
    merged: dict[Why, Refusal] = {}
    for r in refused:
        before = merged.get(r.why)
        length = r.length + (before.length if before is not None else 0)
        merged[r.why] = Refusal((*before.nodes, *r.nodes) if before else r.nodes, length, r.why)
    joins = len(track.joins)
    if len(merged) == 1 and sum(r.length for r in merged.values()) == joins - 1:
        merged = {k: replace(r, length=joins, nodes=_along(info, track)) for k, r in merged.items()}
    return list(merged.values())


def _without_the_last(chain: Chain) -> Chain | None:
    """``chain`` without its last link, if the program of that link differs from all the others."""
    *others, last = chain.links
    if not others or any(link.signature == last.signature for link in others):
        return None
    return Chain(chain.states[:-1], others)


def _split_and_group(
    info: GraphInfo, chains: list[Chain], options: Options, refusals: list[Refusal]
) -> tuple[list[Candidate], list[Candidate]]:
    """The candidates, and those that are too short. A single link is too short, unless its block is to be dropped (k =
    0).
    """
    found: list[Candidate] = []
    short: list[Candidate] = []
    for chain in chains:
        if not chain.links or None in chain.last_known:
            continue
        try:
            split = split_links(chain)
        except Declined as declined:
            inside = tuple(n for link in chain.links for n in link.raw[link.arity :] if n is not None)
            refusals.append(Refusal(inside, chain.length, declined.why))
            continue
        whole, groups = group_links(info, chain)
        candidate = Candidate(whole, groups, split)
        if shorter := _without_the_last(whole):
            # In the first block, the path to its state and the path to the same tensor as an input of every block look
            # the same. And in a first step from zeros, a gate may look like the state. So prefer the chain whose links
            # are alike.
            shorter, groups = group_links(info, shorter)
            if shorter.length == whole.length and (whole.links[-1].remainders or shorter.tail):
                candidate = Candidate(shorter, groups, split_links(shorter))
        alone = whole.length == 1 and ordinary(1, options) is not None
        (short if alone or whole.length < options.min_length else found).append(candidate)
    return found, short
