"""Combine chains that differ only in their layer or direction into one entry of the report."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hwbp_compiler.cost.estimate import Estimate
from hwbp_compiler.graph.record import ChainRecord

# The most names to list. If there are more, the rest is given as a number.
_MOST_NAMES = 6


@dataclass(frozen=True)
class Entry:
    """One chain, or several chains that are alike.

    positions   indices of these chains in the list of their graph, from 0. The first one is shown in pictures and code
    number      number of the first chain in the whole report, from 1
    numbers     numbers of all these chains, as text: ``"1 to 4"``
    record      one record for all of them, with all their modules, the sum of their estimates, the largest memory
    """

    positions: tuple[int, ...]
    number: int
    numbers: str
    record: ChainRecord

    @property
    def title(self) -> str:
        several = len(self.positions)
        return f"chain {self.numbers}" if several == 1 else f"{several} chains alike ({self.numbers})"

    @property
    def each(self) -> str:
        """The word to put after a number that holds for each of several chains."""
        return " each" if len(self.positions) > 1 else ""


def entries_of(chains: Sequence[ChainRecord], counted: int) -> list[Entry]:
    """The entries for the ``chains`` of one graph, in order. ``counted`` is the number of chains in earlier graphs."""
    found: dict[Any, list[int]] = {}
    for position, chain in enumerate(chains):
        found.setdefault(_key(chain), []).append(position)
    return [
        Entry(
            tuple(positions),
            counted + positions[0] + 1,
            _numbers([counted + position + 1 for position in positions]),
            _as_one([chains[position] for position in positions]),
        )
        for positions in found.values()
    ]


def _key(chain: ChainRecord) -> Any:
    """A key that is equal for chains that differ only in their position and their estimate."""
    groups = [(g.links, sorted(g.operators.items()), g.multiplier, g.batched, g.source) for g in chain.groups]
    return repr(
        (
            (chain.length, chain.times, chain.decision, chain.failed, chain.multiplier, groups),
            (chain.sources or [chain.source], chain.members, chain.side_losses),
            (chain.iterations, chain.segment, [how for how, _ in chain.candidates]),
            (chain.reason_code, _without_estimate(chain), chain.advice),
        )
    )


def _without_estimate(chain: ChainRecord) -> str:
    return chain.reason if chain.estimate is None else chain.reason.replace(str(chain.estimate), "")


def _as_one(chains: Sequence[ChainRecord]) -> ChainRecord:
    first = chains[0]
    if len(chains) == 1:
        return first
    total = total_of(chains)
    reason = first.reason
    if total is not None:
        every = "both" if len(chains) == 2 else f"all {len(chains)}"
        reason = reason.replace(str(first.estimate), f"{total}, {every} together")
    groups = [
        dataclasses.replace(group, module=together(chain.groups[i].module for chain in chains))
        for i, group in enumerate(first.groups)
    ]
    return dataclasses.replace(
        first,
        module=together(chain.module for chain in chains),
        groups=groups,
        estimate=total,
        reason=reason,
        added_bytes=max(chain.added_bytes for chain in chains),
    )


def total_of(chains: Iterable[ChainRecord]) -> Estimate | None:
    """The sum of all estimates, or None if no chain has one."""
    found = [chain.estimate for chain in chains if chain.estimate is not None]
    if not found:
        return None
    return Estimate(
        sum(e.substitution for e in found), sum(e.rewritten for e in found), sum(e.copied_bytes for e in found)
    )


def _numbers(numbers: Sequence[int]) -> str:
    """
    >>> _numbers([1, 2, 3, 4]), _numbers([1, 3]), _numbers([7])
    ('1 to 4', '1 and 3', '7')
    """
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return _listed([str(number) for number in numbers])


def together(modules: Iterable[str]) -> str:
    """Join names of modules into one text. Layers of one recurrent module are listed by number.

    >>> together(["r layer 1 reverse", "r layer 1", "r layer 0 reverse", "r layer 0"])
    'r layers 0 and 1, both directions'
    >>> together(["r reverse", "r"]), together(["cells.0", "cells.1"]), together(["r layer 0 reverse", "r layer 1"])
    ('r, both directions', 'cells.0 and cells.1', 'r layer 0 reverse and r layer 1')
    """
    names = list(dict.fromkeys(filter(None, modules)))
    matches = [re.fullmatch(r"(.*?)(?: layer (\d+))?( reverse)?", name) for name in names]
    parts = {(match[1], match[2], bool(match[3])) for match in matches if match is not None}
    owners = {owner for owner, _, _ in parts}
    layers = sorted({int(layer) for _, layer, _ in parts if layer is not None})
    directions = {reverse for _, _, reverse in parts}
    if len(names) == 1 or len(owners) != 1 or len(parts) != max(1, len(layers)) * len(directions):
        return _listed(names)
    (owner,) = owners
    text = owner
    if len(layers) == 1:
        text += f" layer {layers[0]}"
    elif len(layers) > 1:
        text += f" layers {_numbers(layers)}"
    return text + (", both directions" if len(directions) == 2 else " reverse" if True in directions else "")


def _listed(names: Sequence[str]) -> str:
    if len(names) > _MOST_NAMES:
        return ", ".join(names[: _MOST_NAMES - 1]) + f" and {len(names) - _MOST_NAMES + 1} more"
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
