"""The order of the passes, and what happens to each chain: one after the other, from the loss towards the input."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

import hwbp_compiler.scan  # noqa: F401  (registers torch.ops.highway.linear_scan)
from hwbp_compiler.graph.batching import NoBatchingRule
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.describe import multiplier_text, source_line
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import INPUT, SUM, NotALink, Program
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.options import Options

from .apply import apply, discard
from .check_separation import Refusal, check_separation
from .decide import estimate
from .find_chains import find_chains
from .find_recurrences import find_recurrences
from .group_links import group_links
from .rewrite import rewrite_chain
from .split_links import Split, split_links

log = logging.getLogger(__name__)

# Two or three multiplications in a row occur everywhere; a recurrence is more than that.
_SHORTEST_RECURRENCE = 4


@dataclass
class _Candidate:
    chain: Chain
    groups: list[Group]
    split: Split

    @property
    def key(self) -> tuple:
        return self.chain.states[-1]

    @property
    def nodes(self) -> set[Node]:
        return {n for g in self.groups for p in g.programs for n in p.raw[p.arity :] if n is not None}


def run(graph: Graph, options: Options) -> list[ChainRecord]:
    """Rewrite every chain of the joint ``graph`` that ``options`` ask for, in place; returns what was decided.

    A chain whose rewriting fails is left as it was and its record says so; with ``options.strict`` the error is
    raised. Any other exception comes before the graph is changed.
    """
    records: list[ChainRecord] = []
    decided: set[tuple] = set()
    settled: set[Node] = set()
    while True:
        info = GraphInfo(graph, settled)
        if not info.has_tangents:
            return records
        candidates, refusals = _candidates(info, options)
        if not decided:
            records += [ChainRecord(r.length, "declined", r.reason, source=source_line(r.node)) for r in refusals]
        changed = False
        for candidate in candidates:
            if candidate.key in decided:
                continue
            decided.add(candidate.key)
            record, changed = _treat(graph, info, candidate, options, settled)
            records.append(record)
            if changed:
                break
        if not changed:
            return records


def _candidates(info: GraphInfo, options: Options) -> tuple[list[_Candidate], list[Refusal]]:
    found: list[_Candidate] = []
    refusals: list[Refusal] = []
    for track in find_chains(info):
        if len(track.joins) + 2 < options.min_length:  # head and tail can add one link each
            continue
        chains, refused = check_separation(info, track)
        if len(track.joins) >= options.min_length:
            refusals += refused
        found += _split_and_group(info, chains, options, refusals)
    used = {info.index[n] for candidate in found for n in candidate.nodes}
    for track in find_recurrences(info, used, max(options.min_length, _SHORTEST_RECURRENCE) - 1):
        chains, _ = check_separation(info, track)
        elementwise = [c for c in map(_regular_part, chains) if c is not None]
        found += _split_and_group(info, elementwise, options, refusals)
    found.sort(key=lambda c: (-c.chain.length, info.index[_any(c)]))
    kept: list[_Candidate] = []
    taken: set[Node] = set()
    for candidate in found:
        if candidate.nodes.isdisjoint(taken):
            kept.append(candidate)
            taken |= candidate.nodes
    # From the loss towards the input: a chain's side outputs are injections of the next one.
    kept.sort(key=lambda c: info.index[_any(c)])
    return kept, refusals


def _split_and_group(
    info: GraphInfo, chains: list[Chain], options: Options, refusals: list[Refusal]
) -> list[_Candidate]:
    found: list[_Candidate] = []
    for chain in chains:
        if not chain.links:
            continue
        try:
            split = split_links(chain)
        except NotALink as reason:
            refusals.append(Refusal(_first(chain), chain.length, str(reason)))
            continue
        candidate = _Candidate(chain, group_links(info, chain), split)
        if chain.length >= options.min_length:
            found.append(candidate)
    return found


def _regular_part(chain: Chain) -> Chain | None:
    """The stretch of an elementwise recurrence whose links are all alike, with a multiplier that is not 1."""
    if not chain.links:
        return None
    common = Counter(link.signature for link in chain.links).most_common(1)[0][0]
    alike = [link.signature == common for link in chain.links]
    start = alike.index(True)
    end = start
    while end < len(alike) and alike[end]:
        end += 1
    if end - start < _SHORTEST_RECURRENCE - 1:  # a first or last link may yet be found
        return None
    link = chain.links[start]
    if any(_is_heavy(link, i) for i in range(link.arity, len(link.statements))) or not _multiplies(link):
        return None
    return Chain(chain.states[start : end + 1], chain.links[start:end])


def _is_heavy(link: Program, i: int) -> bool:
    node = link.raw[i]
    if node is None or link.statements[i].target in (SUM, INPUT):
        return False
    rule = rule_of(node)
    return rule is not None and rule.kind is Kind.HEAVY


def _multiplies(link: Program) -> bool:
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, torch.ops.aten.div.Tensor)
    return any(s.target in products for s in link.statements)


def _any(candidate: _Candidate) -> Node:
    return _first(candidate.chain)


def _first(chain: Chain) -> Node:
    return next(n for n in chain.states[min(1, len(chain.links))] if n is not None)


def _treat(
    graph: Graph, info: GraphInfo, candidate: _Candidate, options: Options, settled: set[Node]
) -> tuple[ChainRecord, bool]:
    record = _described(candidate)
    reason = _decline(candidate, options, record)
    if reason is not None:
        record.reason = reason
        return record, False
    before = len(graph.nodes)
    try:
        rewriting = rewrite_chain(
            graph,
            candidate.chain,
            candidate.groups,
            candidate.split,
            int(options.iterations),
            float(options.damping),
        )
    except Exception as error:
        discard(graph, list(graph.nodes)[before - 1 : -1])
        record.failed = not isinstance(error, (NotALink, NoBatchingRule))
        if record.failed and options.strict:
            raise
        record.reason = f"{type(error).__name__}: {error}" if record.failed else str(error)
        if record.failed:
            log.debug("rewriting a chain failed", exc_info=error)
        return record, False
    removable = {n for i, n in enumerate(info.nodes) if info.carries[i] and n.op == "call_function"}
    try:
        apply(graph, rewriting, removable, candidate.nodes - set(candidate.chain.states[0]))
    except NotALink as error:
        record.reason = str(error)
        return record, False
    graph.lint()
    settled.update(rewriting.created)
    record.decision = "rewritten"
    return record, True


def _decline(candidate: _Candidate, options: Options, record: ChainRecord) -> str | None:
    """Why the chain is left to ordinary backprop, or None. Puts the estimate into ``record``."""
    length = candidate.chain.length
    if options.iterations == "exact":
        return 'iterations="exact" asks for ordinary backprop'
    if options.iterations >= length:
        return f"iterations={options.iterations} reaches the chain's length {length}: that is ordinary backprop"
    expected = estimate(candidate.chain, candidate.groups, int(options.iterations))
    record.estimate = expected
    if options.rewrite == "always":
        record.reason = f'rewrite="always"; estimated {expected}'
    elif expected.pays:
        record.reason = f"expected to be faster: {expected}"
    else:
        return f'not expected to be faster: {expected}; rewrite="always" rewrites it all the same'
    return None


def _described(candidate: _Candidate) -> ChainRecord:
    chain = candidate.chain
    texts = Counter[str]()
    groups: list[GroupRecord] = []
    for group in candidate.groups:
        program = group.template
        texts[multiplier_text(program, candidate.split.support)] += len(group.lanes)
        heavy = Counter(
            str(program.statements[i].target) for i in range(len(program.statements)) if _is_heavy(program, i)
        )
        groups.append(GroupRecord(len(group.lanes), dict(heavy)))
    return ChainRecord(
        chain.length,
        "declined",
        "",
        " | ".join(text for text, _ in texts.most_common()),
        groups,
        source_line(_first(chain)),
    )
