"""The sequence of decisions, the same for chains, for loops of ``recurrent`` and for recurrent modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hwbp_compiler.options import Options, Truncation
from hwbp_compiler.reasons import Reason, Why

from .estimate import Estimate


@dataclass(frozen=True)
class Decision:
    """Whether a chain is rewritten, why, and its expected cost (None if nothing was estimated).

    ``candidates`` are the forms that may be chosen while the model trains, with their expected cost.
    """

    why: Why
    rewrites: bool = False
    estimate: Estimate | None = None
    candidates: tuple[tuple[Truncation, Estimate], ...] = ()


def decide(length: int, options: Options, estimate: Callable[[Truncation], Estimate], may_pay: bool = True) -> Decision:
    """Decide about a sound chain of ``length`` links.

    ``estimate`` takes the truncation to write out, and is called only if its answer is reported. ``may_pay`` says
    whether expected speed is enough to rewrite the chain, or only ``rewrite="always"``.
    """
    if options.rewrite == "never":
        return Decision(Reason.REWRITE_NEVER.of())
    if options.iterations != "exact" and length < options.min_length:
        return Decision(shorter(length, options))
    if (exact := ordinary(length, options)) is not None:
        return Decision(exact)
    if options.auto:
        return _to_be_chosen(length, options, estimate, may_pay)
    how = options.truncation(length)
    assert how is not None  # otherwise it is ordinary backprop
    expected = estimate(how)
    if options.rewrite == "always":
        return Decision(Reason.REWRITTEN_ALWAYS.of(estimate=expected), True, expected)
    if expected.pays and may_pay:
        return Decision(Reason.EXPECTED_FASTER.of(estimate=expected), True, expected)
    return Decision(Reason.NOT_EXPECTED_FASTER.of(estimate=expected), False, expected)


def _to_be_chosen(length: int, options: Options, estimate: Callable[[Truncation], Estimate], may_pay: bool) -> Decision:
    tried = [(how, estimate(how)) for how in options.tried(length)]
    tried = [(how, expected) for how, expected in tried if options.rewrite == "always" or (expected.pays and may_pay)]
    if not tried:
        return Decision(Reason.NO_CANDIDATE.of())
    fastest = min((expected for _, expected in tried), key=lambda expected: expected.rewritten)
    return Decision(Reason.TO_BE_CHOSEN.of(count=len(tried), estimate=fastest), False, fastest, tuple(tried))


def needs_memory(needed: float, limit: float, options: Options) -> Why:
    """Why a chain that holds ``needed`` bytes more than exact backprop stays exact."""
    return Reason.NEEDS_MEMORY.of(needed=needed / 1e6, limit=limit / 1e6, given=options.max_extra_memory)


# For a single link no number of iterations helps: none drops its block, and one is ordinary backprop.
_ALONE = "Nothing to do: a single link has no others to be computed at once with. Its gradients are exact."


def shorter(length: int, options: Options) -> Why:
    """Why a chain below ``min_length`` is left unchanged, and the advice."""
    exact = not options.tried(length)
    advice = _ALONE
    if length > 1:
        also = f" with {_short_of_backprop(length, options)}" if exact else ""
        advice = f"Use min_length={length}{also} to have it considered."
    return Reason.TOO_SHORT.of(min_length=options.min_length, advice=advice)


def ordinary(length: int, options: Options) -> Why | None:
    """Why ``iterations`` means ordinary backprop for ``length`` links, and the advice. None if it does not."""
    if options.tried(length):
        return None
    if options.auto:
        return Reason.NO_CANDIDATE.of()
    needed = options.needed(length)
    if options.iterations == "exact":
        any_of = f"Use iterations below {needed}." if needed else f"Use a segment below {length}, and iterations=0."
        return Reason.EXACT_ASKED_FOR.of(advice=any_of if length > 1 else _ALONE)
    fewer = f"iterations below {needed}" if needed else f"a segment below {length} and iterations=0"
    advice = f"Use {fewer}, or leave it: these gradients are exact." if length > 1 else _ALONE
    if options.segment == 1:
        return Reason.ITERATIONS_REACH_LENGTH.of(iterations=options.iterations, length=length, advice=advice)
    return Reason.ITERATIONS_REACH_SEGMENTS.of(
        iterations=options.iterations,
        segments=needed + 1,
        segment=options.segment,
        length=length,
        advice=advice,
    )


def _short_of_backprop(length: int, options: Options) -> str:
    needed = options.needed(length)
    return f"iterations={needed - 1} or fewer" if needed else f"a segment below {length} and iterations=0"
