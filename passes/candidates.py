"""What may be rewritten: from the tracks of a joint graph to chains that are sound, split and grouped."""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx
from torch.fx import Node

from hwbp_compiler.cost.decide import ordinary
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined, Reason, Why

from .check_separation import Refusal, check_separation, score
from .find_chains import Track, followers, tracks
from .find_recurrences import SHORTEST_RECURRENCE, find_recurrences, shifted
from .group_links import group_links
from .regular_part import regular_part
from .split_links import Split, split_links
from .trunk import on_the_trunk


@dataclass
class Candidate:
    """A sound chain with all that is known before it is decided upon."""

    chain: Chain
    groups: list[Group]
    split: Split

    @property
    def key(self) -> tuple:
        return self.chain.last_known

    @property
    def first(self) -> Node:
        """A node that stands where the gradient enters the chain."""
        chain = self.chain
        return next(n for n in chain.states[min(1, len(chain.links))] if n is not None)

    @property
    def nodes(self) -> set[Node]:
        return {n for g in self.groups for p in g.programs for n in p.raw[p.arity :] if n is not None}


def candidates(info: GraphInfo, options: Options) -> tuple[list[Candidate], list[Refusal], list[Candidate]]:
    """What may be rewritten, what was refused, and chains below ``min_length``."""
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    short: list[Candidate] = []
    below: list[Refusal] = []
    for track in _tracks(info, options):
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
    kept, taken = _apart(info, found)
    short, below_length = _apart(info, short)
    # From the loss towards the input: a chain's side outputs are injections of the next one.
    kept.sort(key=lambda c: info.index[c.first])
    # A piece of something larger that is told of already is no news.
    held = taken | below_length
    refusals = [
        r
        for r in refusals
        if r.why.code is not Reason.CONNECTION_SKIPS_STEPS or 2 * len(held.intersection(r.nodes)) < len(r.nodes)
    ]
    told = taken.union(*(r.nodes for r in refusals))
    refusals += [r for r in below if told.isdisjoint(r.nodes)]
    return kept, refusals, [s for s in short if s.nodes.isdisjoint(told)]


def _tracks(info: GraphInfo, options: Options) -> list[Track]:
    """All tracks. Where the joins that gradients meet first and those on the trunk differ, what gives more links."""
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
        # Where neither gives any, the reasons are found at the joins that are met first.
        better = one != other and score_of(tracks(other)) >= max(score_of(tracks(one)), 1)
        chosen |= other if better else one
    return tracks(chosen)


def _steps(info: GraphInfo, track: Track) -> list[Chain]:
    """Chains of the steps of an elementwise recurrence."""
    return [c for chain in check_separation(info, track)[0] if (c := regular_part(info, chain)) is not None]


def _links(candidates: list[Candidate]) -> tuple[int, int]:
    """The last link counts where it has no state to send to, and more where it has."""
    return sum(len(c.chain.links) for c in candidates), sum(c.chain.length for c in candidates)


def _apart(info: GraphInfo, found: list[Candidate]) -> tuple[list[Candidate], set[Node]]:
    """Those of ``found`` that share no node, longest first, and their nodes."""
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
    """One refusal per reason; where every link but the first is refused, so is the first."""
    merged: dict[Why, Refusal] = {}
    for r in refused:
        before = merged.get(r.why)
        length = r.length + (before.length if before is not None else 0)
        merged[r.why] = Refusal((*before.nodes, *r.nodes) if before else r.nodes, length, r.why)
    joins = len(track.joins)
    if len(merged) == 1 and sum(r.length for r in merged.values()) == joins - 1:
        merged = {k: replace(r, length=joins, nodes=_along(info, track)) for k, r in merged.items()}
    return list(merged.values())


def _split_and_group(
    info: GraphInfo, chains: list[Chain], options: Options, refusals: list[Refusal]
) -> tuple[list[Candidate], list[Candidate]]:
    """Candidates, and those that are too short: one link alone is, unless its block is to be dropped (k = 0)."""
    found: list[Candidate] = []
    short: list[Candidate] = []
    for chain in chains:
        if not chain.links:
            continue
        try:
            split = split_links(chain)
        except Declined as declined:
            inside = tuple(n for link in chain.links for n in link.raw[link.arity :] if n is not None)
            refusals.append(Refusal(inside, chain.length, declined.why))
            continue
        candidate = Candidate(chain, group_links(info, chain), split)
        alone = chain.length == 1 and ordinary(1, options) is not None
        (short if alone or chain.length < options.min_length else found).append(candidate)
    return found, short
