"""The order of the passes, and what happens to each chain. Chains are treated one by one, from the loss towards the
input.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Protocol

from torch.fx import Graph, Node

import hwbp_compiler.scan  # noqa: F401  (registers torch.ops.highway.linear_scan)
from hwbp_compiler.cost.decide import decide, needs_memory
from hwbp_compiler.cost.estimate import estimate
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.old_values import keep_old_values
from hwbp_compiler.graph.origin import Origin, Origins
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.settled import is_settled
from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.graph.snapshot import Snapshot
from hwbp_compiler.options import Options
from hwbp_compiler.reasons import Declined, Reason
from hwbp_compiler.torch_private import timed

from .apply import apply, discard
from .candidates import Candidate, Look, candidates, cut_off
from .in_other_words import in_other_words
from .keep_pieces import keep_pieces
from .records import collapsed, described, forward_links, refused, short
from .rewrite import Rewriting, rewrite_chain
from .rewrite_recurrent_modules import Watcher as ModuleWatcher
from .rewrite_recurrent_modules import rewrite_recurrent_modules
from .sizes_of_gradients import read_sizes_elsewhere

log = logging.getLogger(__name__)


class Watcher(ModuleWatcher, Protocol):
    """Observes how chains are treated, and changes nothing."""

    def found(self, record: ChainRecord, candidate: Candidate, origins: list[Origin]) -> None:
        """Called before the decision on ``candidate``; ``origins`` of its links are in forward order."""

    def rewritten(self, record: ChainRecord, candidate: Candidate, rewriting: Rewriting) -> None:
        """Called after the chain was rewritten."""


def run(graph: Graph, options: Options, watcher: Watcher | None = None) -> list[ChainRecord]:
    """Rewrite in place every chain of the joint ``graph`` that ``options`` request. Returns what was decided.

    If rewriting a chain fails, the chain stays as it was and its record says so. With ``options.strict`` the error is
    raised. After any other exception the graph is left changed.
    """
    keep_old_values(graph)
    read_sizes_elsewhere(graph)
    origins = Origins(graph)
    records, settled = rewrite_recurrent_modules(graph, options, watcher)
    settled |= {node for node in graph.nodes if is_settled(node)}
    before = Snapshot(graph)
    reworded = in_other_words(graph, settled)
    decided: set[Hashable] = set()
    first_look: Look | None = None
    rewritten: set[Node] = set()
    declined: set[Node] = set()
    while True:
        info = GraphInfo(graph, settled)
        if not info.has_tangents:
            break
        with timed("highway.find_chains"):
            look = candidates(info, options)
        if first_look is None:
            first_look = look
            left = [refused(r, origins) for r in look.refusals]
            records += collapsed(left + [short(s, origins, options) for s in look.too_short])
        changed = False
        for candidate in look.found:
            if candidate.key in decided:
                continue
            decided.add(candidate.key)
            with timed("highway.rewrite"):
                record, changed = _treat(graph, info, candidate, options, settled, origins, watcher)
            records.append(record)
            (rewritten if changed else declined).update(candidate.nodes)
            if changed:
                break
        if not changed:
            break
    if first_look is not None:
        records += collapsed([refused(r, origins) for r in cut_off(first_look, rewritten, declined)])
    if reworded and not rewritten:  # if nothing was rewritten, Inductor gets its original operators
        new = before.restore()
        settled = {new[node] for node in settled}
    keep_pieces(graph, settled)
    return records


def _treat(
    graph: Graph,
    info: GraphInfo,
    candidate: Candidate,
    options: Options,
    settled: set[Node],
    origins: Origins,
    watcher: Watcher | None,
) -> tuple[ChainRecord, bool]:
    found = [origins.of_link(link) for link in forward_links(candidate)]
    record = described(candidate, found)
    if watcher is not None:
        watcher.found(record, candidate, found)
    decision = decide(candidate.chain.length, options, lambda how: estimate(candidate.chain, candidate.groups, how))
    record.estimate, record.candidates = decision.estimate, decision.candidates
    record.because(decision.why)
    if not decision.rewrites:
        return record, False
    before = len(graph.nodes)
    truncation = options.truncation(candidate.chain.length)
    assert truncation is not None  # otherwise it was declined
    try:
        rewriting = rewrite_chain(graph, candidate.chain, candidate.groups, candidate.split, truncation)
    except Exception as error:
        discard(graph, list(graph.nodes)[before - 1 : -1])
        record.failed = not isinstance(error, Declined)
        if record.failed and options.strict:
            raise
        said = f"{type(error).__name__}: {error}"
        record.because(error.why if isinstance(error, Declined) else Reason.DEFECT.of(error=said))
        if record.failed:
            log.debug("rewriting a chain failed", exc_info=error)
        return record, False
    removable = {n for i, n in enumerate(info.nodes) if info.carries[i] and n.op == "call_function"}
    state = [n.meta["val"] for n in candidate.chain.last_known if n is not None]
    # The stacks, and the last W beside the block results it is computed from.
    width = sum(map(bytes_of, state))
    added = rewriting.copied_bytes + 2 * (len(candidate.chain.links) + 1) * width
    if added > (limit := options.memory_limit(state[0].device)):
        discard(graph, rewriting.created)
        record.because(needs_memory(added, limit, options))
        return record, False
    try:
        apply(graph, rewriting, removable, candidate.nodes - set(candidate.chain.states[0]))
    except Declined as declined:
        record.because(declined.why)
        return record, False
    graph.lint()
    settled.update(rewriting.created)
    record.rewritten(truncation)
    record.added_bytes = added
    if watcher is not None:
        watcher.rewritten(record, candidate, rewriting)
    return record, True
