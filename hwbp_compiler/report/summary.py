"""The table about the whole model, which the report shows before the chains."""

from __future__ import annotations

from hwbp_compiler.graph.record import ChainRecord

from .alike import total_of
from .data import ReportData


def rows(report: ReportData) -> list[tuple[str, str]]:
    """Pairs (label, text) about chains, gradients, speed and memory. Empty if there is no joint graph."""
    if not report.graphs:
        return []
    rewritten = [chain for chain in report.chains if chain.decision == "rewritten"]
    found = [("chains", _chains(report.chains))] if report.chains else []
    found += [("gradients", _gradients(report, rewritten)), ("speed", _speed(rewritten))]
    if rewritten:
        most = max(chain.added_bytes for chain in rewritten)
        found.append(("memory", f"{f'at most {size(most)} more' if most else 'no more'} at a time, in any one chain"))
    return found


def _chains(chains: list[ChainRecord]) -> str:
    """
    >>> _chains([ChainRecord(24, "rewritten", ""), ChainRecord(1, "declined", "", times=2)])
    '1 rewritten (24 links), 2 declined (2 links)'
    """
    said = []
    for decision in ("rewritten", "declined"):
        these = [chain for chain in chains if chain.decision == decision]
        links = sum(chain.length * chain.times for chain in these)
        more = "" if all(chain.length for chain in these) else " and loops of unknown length"
        counted = f" ({links} link{'' if links == 1 else 's'}{more})" if these else ""
        said.append(f"{sum(chain.times for chain in these)} {decision}{counted}")
    return ", ".join(said)


def _gradients(report: ReportData, rewritten: list[ChainRecord]) -> str:
    options = report.options
    forms = {(c.iterations, c.segment): None for c in rewritten if c.iterations is not None}
    if not forms:
        return "exact"
    shown = " or ".join(f"k = {k}" + (f", S = {s}" if s is not None and s > 1 else "") for k, s in forms)
    if options.auto:
        return (
            f"approximate only where their cosine with the exact ones is at least {options.target_cosine:g}, checked "
            f"every {options.check_every} steps. Shown here: {shown}"
        )
    damping = options.in_numbers().numbers.damping
    return f"approximate, {shown}" + (f", damping {damping:g}" if damping else "")


def _speed(rewritten: list[ChainRecord]) -> str:
    total = total_of(rewritten)
    if not rewritten:
        return "unchanged: no chain is rewritten"
    if total is None:
        return "not estimated"
    return (
        f"estimated {total.ratio:.2g}x for the backward pass of the rewritten chains: "
        f"{total.substitution * 1e3:.3g} ms link after link, {total.rewritten * 1e3:.3g} ms rewritten"
    )


def size(number: int) -> str:
    """A number of bytes as text."""
    return f"{number / 1e6:.3g} MB" if number >= 1e4 else f"{number / 1e3:.3g} kB"
