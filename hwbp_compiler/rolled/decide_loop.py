"""Decide how a loop's gradient is computed: Highway-BP, or step after step."""

from __future__ import annotations

from hwbp_compiler.cost.decide import decide, needs_memory
from hwbp_compiler.cost.devices import device_figures
from hwbp_compiler.cost.estimate import Estimate, of_blocks, of_scans, seconds_of
from hwbp_compiler.graph.chain import Group
from hwbp_compiler.graph.program import closure
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.options import Options, Truncation

from .chain import How
from .link import Backward


def decide_loop(link: Backward, options: Options, length: int) -> tuple[How, ChainRecord]:
    """Decide for the current ``length``. Other lengths get the same decision, except those on the other side of
    ``shortest``.
    """
    record = ChainRecord(length, "declined", "", link.multiplier)
    if link.split is None:
        assert link.why is not None
        record.because(link.why.after("left exact: "))
        return How(None), record
    record.groups = [link.group(length)]
    decision = decide(length, options, lambda how: estimate(link, how, length))
    record.estimate, record.candidates = decision.estimate, decision.candidates
    record.because(decision.why)
    if options.rewrite == "never" or options.iterations == "exact" or options.auto:
        return How(None), record
    chosen = options.numbers
    shortest = max(chosen.iterations + 1, options.min_length)
    if chosen.segment > 1:  # the fewest links for which the iterations are not exact
        shortest = max((chosen.iterations + 1) * chosen.segment + 1, options.min_length)
    if not decision.rewrites:
        return How(None, shortest), record
    needed = length * _held_by_a_link(link)
    if needed > (limit := options.memory_limit(link.tangents[0].meta["val"].device)):
        record.because(needs_memory(needed, limit, options))
        return How(None, shortest), record
    record.rewritten(chosen)
    record.added_bytes = needed
    truncation = options.truncation(length)
    if truncation != chosen:
        return How(truncation, only=length), record
    return How(chosen, shortest), record


def _held_by_a_link(link: Backward) -> int:
    """Bytes of everything that one link computes. At most, the values of all steps exist at once."""
    nodes = [node for node in link.module.graph.nodes if node.op == "call_function"]
    kinds = [(node, rule_of(node)) for node in nodes]
    return sum(bytes_of(n.meta.get("val")) for n, rule in kinds if rule is None or rule.kind is not Kind.LAYOUT)


def estimate(link: Backward, how: Truncation, length: int) -> Estimate:
    """Seconds for the gradients at all states. Parameter and input gradients cost the same either way."""
    assert link.program is not None and link.split is not None
    like = link.tangents[0].meta["val"]
    figures = device_figures(like.device)
    group = Group([0], [link.program])
    block = set().union(*(closure(link.program, i) for i in link.program.outputs))
    substitution = length * (figures.step_of(length) + seconds_of(group, block, figures, 1))
    rewritten = len(link.tangents) * of_scans(like, length, figures, how, link.has_block)
    if link.has_block:
        rewritten += of_blocks(group, block, figures, how, range(length))
        if how.segment > 1:
            rewritten += (how.iterations + 1) * how.segment * figures.step
    return Estimate(substitution, rewritten, 0)
