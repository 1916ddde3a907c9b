"""The order of the passes, and what happens to each chain: one after the other, from the loss towards the input."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, replace
from typing import Protocol

from torch.fx import Graph, Node

import hwbp_compiler.scan  # noqa: F401  (registers torch.ops.highway.linear_scan)
from hwbp_compiler.graph.batching import NoBatchingRule
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.describe import multiplier_text
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.old_values import keep_old_values
from hwbp_compiler.graph.origin import Origin, Origins, by_frequency, in_order, modules_of, name_range
from hwbp_compiler.graph.program import BY_PASS, NotALink, Program, is_heavy
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.graph.rules import operator_name
from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.graph.sizes_of_gradients import read_sizes_elsewhere
from hwbp_compiler.options import Options
from hwbp_compiler.rolled.settled import is_settled
from hwbp_compiler.torch_private import timed

from .apply import apply, discard
from .check_separation import Refusal, check_separation
from .decide import estimate, ordinary, rounds_of, shorter
from .find_chains import Track, find_chains
from .find_recurrences import SHORTEST_RECURRENCE, find_recurrences, shifted
from .group_links import group_links
from .keep_pieces import keep_pieces
from .regular_part import regular_part
from .rewrite import Rewriting, rewrite_chain
from .rewrite_recurrent_modules import Watcher as ModuleWatcher
from .rewrite_recurrent_modules import rewrite_recurrent_modules
from .split_links import Split, split_links

log = logging.getLogger(__name__)


@dataclass
class Candidate:
    """A sound chain with all that is known before it is decided upon."""

    chain: Chain
    groups: list[Group]
    split: Split

    @property
    def key(self) -> tuple:
        return self.chain.states[-1]

    @property
    def nodes(self) -> set[Node]:
        return {n for g in self.groups for p in g.programs for n in p.raw[p.arity :] if n is not None}


class Watcher(ModuleWatcher, Protocol):
    """Looks on while chains are treated; changes nothing."""

    def found(self, record: ChainRecord, candidate: Candidate, origins: list[Origin]) -> None:
        """Before ``candidate`` is decided upon; ``origins`` of its links, in forward order."""

    def rewritten(self, record: ChainRecord, candidate: Candidate, rewriting: Rewriting) -> None:
        """After it was rewritten."""


def run(graph: Graph, options: Options, watcher: Watcher | None = None) -> list[ChainRecord]:
    """Rewrite every chain of the joint ``graph`` that ``options`` ask for, in place; returns what was decided.

    A chain whose rewriting fails is left as it was and its record says so; with ``options.strict`` the error is
    raised. Any other exception comes before the graph is changed.
    """
    keep_old_values(graph)
    read_sizes_elsewhere(graph)
    origins = Origins(graph)
    records, settled = rewrite_recurrent_modules(graph, options, watcher)
    settled |= {node for node in graph.nodes if is_settled(node)}
    decided: set[tuple] = set()
    first_look = True
    while True:
        info = GraphInfo(graph, settled)
        if not info.has_tangents:
            break
        with timed("highway.find_chains"):
            candidates, refusals, short = _candidates(info, options)
        if first_look:
            declined = [refused(r, origins) for r in refusals]
            records += collapsed(declined + [_short(s, origins, options) for s in short])
        changed = first_look = False
        for candidate in candidates:
            if candidate.key in decided:
                continue
            decided.add(candidate.key)
            with timed("highway.rewrite"):
                record, changed = _treat(graph, info, candidate, options, settled, origins, watcher)
            records.append(record)
            if changed:
                break
        if not changed:
            break
    keep_pieces(graph, settled)
    return records


def _candidates(info: GraphInfo, options: Options) -> tuple[list[Candidate], list[Refusal], list[Candidate]]:
    """What may be rewritten, what was refused, and chains below ``min_length``."""
    found: list[Candidate] = []
    refusals: list[Refusal] = []
    short: list[Candidate] = []
    below: list[Refusal] = []
    for track in find_chains(info):
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
    kept.sort(key=lambda c: info.index[_any(c)])
    # A piece of something larger that is told of already is no news.
    held = taken | below_length
    refusals = [r for r in refusals if r.reason != BY_PASS or 2 * len(held.intersection(r.nodes)) < len(r.nodes)]
    told = taken.union(*(r.nodes for r in refusals))
    refusals += [r for r in below if told.isdisjoint(r.nodes)]
    return kept, refusals, [s for s in short if s.nodes.isdisjoint(told)]


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
    for candidate in sorted(found, key=lambda c: (-c.chain.length, info.index[_any(c)])):
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
    merged: dict[str, Refusal] = {}
    for r in refused:
        before = merged.get(r.reason)
        length = r.length + (before.length if before is not None else 0)
        merged[r.reason] = Refusal((*before.nodes, *r.nodes) if before else r.nodes, length, r.reason, r.advice)
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
        except NotALink as reason:
            inside = tuple(n for link in chain.links for n in link.raw[link.arity :] if n is not None)
            refusals.append(Refusal(inside, chain.length, str(reason), reason.advice))
            continue
        candidate = Candidate(chain, group_links(info, chain), split)
        alone = chain.length == 1 and ordinary(1, options) is not None
        (short if alone or chain.length < options.min_length else found).append(candidate)
    return found, short


def _any(candidate: Candidate) -> Node:
    return _first(candidate.chain)


def _first(chain: Chain) -> Node:
    return next(n for n in chain.states[min(1, len(chain.links))] if n is not None)


def _treat(
    graph: Graph,
    info: GraphInfo,
    candidate: Candidate,
    options: Options,
    settled: set[Node],
    origins: Origins,
    watcher: Watcher | None,
) -> tuple[ChainRecord, bool]:
    found = [origins.of_link(link) for link in _forward_links(candidate)]
    record = _described(candidate, found)
    if watcher is not None:
        watcher.found(record, candidate, found)
    reason = _decline(candidate, options, record)
    if reason is not None:
        record.reason = reason
        return record, False
    before = len(graph.nodes)
    iterations = rounds_of(int(options.iterations), candidate.chain.length)
    try:
        rewriting = rewrite_chain(
            graph,
            candidate.chain,
            candidate.groups,
            candidate.split,
            int(options.iterations) if iterations is None else iterations,
            float(options.damping),
        )
    except Exception as error:
        discard(graph, list(graph.nodes)[before - 1 : -1])
        record.failed = not isinstance(error, (NotALink, NoBatchingRule))
        if record.failed and options.strict:
            raise
        record.reason = f"{type(error).__name__}: {error}" if record.failed else str(error)
        record.advice = getattr(
            error, "advice", "A defect of ours: report.save_repro(path) writes a script for a report."
        )
        if record.failed:
            log.debug("rewriting a chain failed", exc_info=error)
        return record, False
    removable = {n for i, n in enumerate(info.nodes) if info.carries[i] and n.op == "call_function"}
    try:
        apply(graph, rewriting, removable, candidate.nodes - set(candidate.chain.states[0]))
    except NotALink as error:
        record.reason, record.advice = str(error), error.advice
        return record, False
    graph.lint()
    settled.update(rewriting.created)
    record.decision = "rewritten"
    # The stacks, and the last W beside the block results it is made from.
    state = sum(bytes_of(n.meta["val"]) for n in candidate.chain.states[-1] if n is not None)
    record.added_bytes = rewriting.copied_bytes + 2 * (len(candidate.chain.links) + 1) * state
    if watcher is not None:
        watcher.rewritten(record, candidate, rewriting)
    return record, True


def _decline(candidate: Candidate, options: Options, record: ChainRecord) -> str | None:
    """Why the chain is left to ordinary backprop, or None. Puts estimate and advice into ``record``."""
    length = candidate.chain.length
    if (exact := ordinary(length, options)) is not None:
        reason, record.advice = exact
        return reason
    expected = estimate(candidate.chain, candidate.groups, int(options.iterations))
    record.estimate = expected
    if options.rewrite == "always":
        record.reason = f'rewrite="always"; estimated {expected}'
    elif expected.pays:
        record.reason = f"expected to be faster: {expected}"
    else:
        record.advice = 'rewrite="always" asks for it all the same; fewer iterations or a smaller batch may pay.'
        return f"not expected to be faster: {expected}"
    return None


# -- records ----------------------------------------------------------------------------------------------------


def _forward_links(candidate: Candidate) -> list[Program]:
    """The chain's links in forward order, one that has no next state included."""
    by_position = {lane: p for group in candidate.groups for lane, p in zip(group.lanes, group.programs, strict=True)}
    return [by_position[lane] for lane in sorted(by_position, reverse=True)]


def _described(candidate: Candidate, origins: list[Origin]) -> ChainRecord:
    chain = candidate.chain
    length = len(origins)
    modules = modules_of(origins)
    sources = by_frequency(o.source for o in origins)
    record = ChainRecord(
        chain.length, "declined", "", source=sources[0] if sources else "", module=name_range(modules), sources=sources
    )
    texts = Counter[str]()
    members = [0] * length
    for number, group in enumerate(candidate.groups):
        program = group.template
        text = multiplier_text(program, candidate.split.support)
        texts[text] += len(group.lanes)
        heavy = Counter(
            operator_name(node).removeprefix("aten::")
            for i, node in enumerate(program.raw)
            if node is not None and is_heavy(program, i)
        )
        mine = sorted(len(origins) - 1 - lane for lane in group.lanes)
        for i in mine:
            members[i] = number
        lines = by_frequency(origins[i].source for i in mine)
        record.groups.append(
            GroupRecord(len(mine), dict(heavy), text, name_range([modules[i] for i in mine]), lines[0] if lines else "")
        )
    record.multiplier = " | ".join(text for text, _ in texts.most_common())
    # Of one link the block itself is of interest: `h.0.attn` where `h.0` adds.
    record.members = members
    record.modules = [o.inside if o.inside.startswith(m) else m for o, m in zip(origins, modules, strict=True)]
    record.side_losses = [i for i, link in enumerate(_forward_links(candidate)) if any(link.injections.values())]
    return record


def refused(refusal: Refusal, origins: Origins) -> ChainRecord:
    """A refusal as it is told, with the user's line and module."""
    origin = origins.of_nodes(refusal.nodes)
    return ChainRecord(
        refusal.length,
        "declined",
        refusal.reason,
        source=origin.source,
        module=name_range(origins.modules(origin)) or origin.inside,
        sources=[origin.source] if origin.source else [],
        advice=refusal.advice,
    )


def _short(candidate: Candidate, origins: Origins, options: Options) -> ChainRecord:
    record = _described(candidate, [origins.of_link(link) for link in _forward_links(candidate)])
    exact = ordinary(record.length, options) if record.length >= options.min_length else None
    record.reason, record.advice = exact or shorter(record.length, options)
    return record


def collapsed(records: list[ChainRecord]) -> list[ChainRecord]:
    """Equal refusals of equal lines as one record that counts them."""
    kept: dict[tuple, ChainRecord] = {}
    for record in records:
        key = (record.length, record.reason, record.source, record.multiplier)
        if key in kept:
            kept[key].times += 1
            names = {*kept[key].module.split(".."), *record.module.split("..")}
            kept[key].module = name_range(sorted(names, key=in_order))
        else:
            kept[key] = record
    return list(kept.values())
