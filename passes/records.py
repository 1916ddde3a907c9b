"""The records of chains: of one that is decided on, one that was refused, and one that is too short."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from hwbp_compiler.cost.decide import ordinary, shorter
from hwbp_compiler.graph.describe import multiplier_text
from hwbp_compiler.graph.origin import Origin, Origins, by_frequency, in_order, modules_of, name_range
from hwbp_compiler.graph.program import Program, is_heavy
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.graph.rules import operator_name
from hwbp_compiler.options import Options

from .candidates import Candidate
from .check_separation import Refusal


def forward_links(candidate: Candidate) -> list[Program]:
    """The chain's links in forward order, including one that has no next state."""
    by_position = {lane: p for group in candidate.groups for lane, p in zip(group.lanes, group.programs, strict=True)}
    return [by_position[lane] for lane in sorted(by_position, reverse=True)]


def described(candidate: Candidate, origins: list[Origin]) -> ChainRecord:
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
    # For a single link, name the block itself: `h.0.attn` where `h.0` adds.
    record.members = members
    record.modules = [o.inside if o.inside.startswith(m) else m for o, m in zip(origins, modules, strict=True)]
    record.side_losses = [i for i, link in enumerate(forward_links(candidate)) if any(link.injections.values())]
    return record


def refused(refusal: Refusal, origins: Origins) -> ChainRecord:
    """The record of a refusal, with the user's line and module."""
    origin = origins.of_nodes(refusal.nodes)
    record = ChainRecord(
        refusal.length,
        "declined",
        "",
        source=origin.source,
        module=name_range(origins.modules(origin)) or origin.inside,
        sources=[origin.source] if origin.source else [],
    )
    record.because(refusal.why)
    return record


def short(candidate: Candidate, origins: Origins, options: Options) -> ChainRecord:
    record = described(candidate, [origins.of_link(link) for link in forward_links(candidate)])
    exact = ordinary(record.length, options) if record.length >= options.min_length else None
    record.because(exact or shorter(record.length, options))
    return record


def collapsed(records: list[ChainRecord]) -> list[ChainRecord]:
    """Merge equal refusals of equal lines into one record that counts them."""
    kept: dict[Hashable, ChainRecord] = {}
    for record in records:
        key = (record.length, record.reason, record.source, record.multiplier)
        if key in kept:
            kept[key].times += 1
            names = {*kept[key].module.split(".."), *record.module.split("..")}
            kept[key].module = name_range(sorted(names, key=in_order))
        else:
            kept[key] = record
    return list(kept.values())
