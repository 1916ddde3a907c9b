"""Which way a loop's gradient goes: Highway-BP, or step after step."""

from __future__ import annotations

from hwbp_compiler.graph.chain import Group
from hwbp_compiler.graph.program import closure
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.sizes import bytes_of
from hwbp_compiler.options import Options
from hwbp_compiler.passes.decide import Estimate, _cost, device_figures, ordinary, rounds_of, shorter
from hwbp_compiler.reasons import Reason

from .chain import How
from .link import Backward

# Python's part of a time step: finding the rows and calling the compiled step.
_CALL = 6e-6


def decide(link: Backward, options: Options, length: int) -> tuple[How, ChainRecord]:
    """For the ``length`` at hand. Others meet the same decision, unless they are on the other side of ``shortest``."""
    record = ChainRecord(length, "declined", "", link.multiplier)
    if link.split is None:
        assert link.why is not None
        record.because(link.why.after("left exact: "))
        return How(None), record
    record.groups = [link.group(length)]
    if options.rewrite == "never":
        record.because(Reason.REWRITE_NEVER.of())
        return How(None), record
    backprop = ordinary(length, options)
    if options.iterations == "exact":
        assert backprop is not None
        record.because(backprop)
        return How(None), record
    k = int(options.iterations)
    exact = How(None, 0.0, max(k + 1, options.min_length))
    if length < options.min_length:
        record.because(shorter(length, options))
        return exact, record
    written = rounds_of(k, length)
    if written is None:
        assert backprop is not None
        record.because(backprop)
        return exact, record
    expected = record.estimate = estimate(link, k, length)
    if options.rewrite != "always" and not expected.pays:
        record.because(Reason.NOT_EXPECTED_FASTER.of(estimate=expected, asks="rewrites it all the same"))
        return exact, record
    code = Reason.REWRITTEN_ALWAYS if options.rewrite == "always" else Reason.EXPECTED_FASTER
    record.decision = "rewritten"
    record.because(code.of(estimate=expected))
    if written != k:
        return How(written, options.damping, only=length), record
    return How(k, options.damping, exact.shortest), record


def estimate(link: Backward, iterations: int, length: int) -> Estimate:
    """Seconds for the gradients at all states; parameter and input gradients cost the same either way."""
    assert link.program is not None and link.split is not None
    like = link.tangents[0].meta["val"]
    figures = device_figures(like.device)
    group = Group([0], [link.program])
    block = set().union(*(closure(link.program, i) for i in link.program.outputs))
    rounds = iterations if link.has_block else 0
    substitution = length * (_CALL + _cost(group, block, figures, 1))
    scan = 2 * figures.launch + figures.seconds(3 * (length + 1) * bytes_of(like) / figures.cache_bytes)
    rewritten = rounds * _cost(group, block, figures, length) + (rounds + 1) * scan * len(link.tangents)
    return Estimate(substitution, rewritten, 0)
