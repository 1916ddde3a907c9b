"""The forms of one graph that are expected to be faster than exact backprop, ordered as a ladder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.options import Truncation

# The most rungs: each costs a backward pass in every check, and a compilation when it is chosen.
RUNGS = 4


@dataclass(frozen=True)
class Rung:
    """k, gamma and S for all chains of a graph for which they pay; the other chains stay exact. ``saves``: expected
    seconds per step, from the cost model.
    """

    how: Truncation
    saves: float


def ladder(records: Iterable[ChainRecord], most: int = RUNGS) -> list[Rung]:
    """At most ``most`` rungs, cheapest first. Each keeps all paths over more links than any cheaper rung."""
    saves: dict[Truncation, float] = {}
    for record in records:
        for how, estimate in record.candidates:
            saved = record.times * (estimate.substitution - estimate.rewritten)
            saves[how] = saves.get(how, 0.0) + saved
    found: list[Rung] = []
    for how in sorted(saves, key=lambda how: (-saves[how], -how.reach, how.iterations)):
        if not found or how.reach > found[-1].how.reach:
            found.append(Rung(how, saves[how]))
    return _spread(found, most)


def saved(records: Iterable[ChainRecord]) -> float:
    """Seconds per step that the cost model expects the rewrite to save; negative if it is slower."""
    rewritten = [r for r in records if r.decision == "rewritten" and r.estimate is not None]
    return sum((r.times * (r.estimate.substitution - r.estimate.rewritten) for r in rewritten), 0.0)


def _spread(rungs: Sequence[Rung], most: int) -> list[Rung]:
    """Keep the first and the last, and rungs in between at about equal factors of reach."""
    if len(rungs) <= most:
        return list(rungs)
    kept = [round(i * (len(rungs) - 1) / (most - 1)) for i in range(most)]
    return [rungs[i] for i in kept]
