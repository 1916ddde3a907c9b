"""Which way a loop's gradient goes: Highway-BP, or step after step."""

from __future__ import annotations

from hwbp_compiler.cost.decide import decide
from hwbp_compiler.cost.devices import device_figures
from hwbp_compiler.cost.estimate import Estimate, seconds_of
from hwbp_compiler.graph.chain import Group
from hwbp_compiler.graph.program import closure
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.options import Options

from .chain import How
from .link import Backward

# Python's part of a time step: finding the rows and calling the compiled step.
_CALL = 6e-6


def decide_loop(link: Backward, options: Options, length: int) -> tuple[How, ChainRecord]:
    """For the ``length`` at hand. Others meet the same decision, unless they are on the other side of ``shortest``."""
    record = ChainRecord(length, "declined", "", link.multiplier)
    if link.split is None:
        assert link.why is not None
        record.because(link.why.after("left exact: "))
        return How(None), record
    record.groups = [link.group(length)]
    decision = decide(length, options, lambda k: estimate(link, k, length))
    record.estimate = decision.estimate
    record.because(decision.why)
    if options.rewrite == "never" or options.iterations == "exact":
        return How(None), record
    k = int(options.iterations)
    shortest = max(k + 1, options.min_length)
    if not decision.rewrites:
        return How(None, 0.0, shortest), record
    record.decision = "rewritten"
    rounds = options.rounds(length)
    if rounds != k:
        return How(rounds, options.damping, only=length), record
    return How(k, options.damping, shortest), record


def estimate(link: Backward, iterations: int, length: int) -> Estimate:
    """Seconds for the gradients at all states; parameter and input gradients cost the same either way."""
    assert link.program is not None and link.split is not None
    like = link.tangents[0].meta["val"]
    figures = device_figures(like.device)
    group = Group([0], [link.program])
    block = set().union(*(closure(link.program, i) for i in link.program.outputs))
    rounds = iterations if link.has_block else 0
    substitution = length * (_CALL + seconds_of(group, block, figures, 1))
    scan = 2 * figures.launch + figures.seconds(3 * (length + 1) * bytes_of(like) / figures.cache_bytes)
    rewritten = rounds * seconds_of(group, block, figures, length) + (rounds + 1) * scan * len(link.tangents)
    return Estimate(substitution, rewritten, 0)
