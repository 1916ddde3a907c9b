"""Find the links of an entirely elementwise recurrence that are its steps.

A track runs along products, and one product looks much like a step: the scale of the last state, the scale of the first
one, the gradient of a gate. So there are three tests for a step. The links are alike, the forward pass wires them to
one another in the same way (Note [Wires]), and what branches off one link branches off all of them.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import torch

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.program import Program, is_heavy
from hwbp_compiler.graph.wiring import Pattern

from .find_recurrences import SHORTEST_RECURRENCE
from .group_links import sides_in_common

# The pattern that all links have in common is taken from this many pairs in the middle.
_SAMPLE = 4


def regular_part(info: GraphInfo, chain: Chain) -> Chain | None:
    """The stretch of ``chain`` whose links are all steps of one recurrence, with a multiplier that is not 1."""
    if not chain.links:
        return None
    common = Counter(link.signature for link in chain.links).most_common(1)[0][0]
    start, end = _run([link.signature == common for link in chain.links])
    link = chain.links[start]
    if any(is_heavy(link, i) for i in range(link.arity, len(link.statements))) or not _multiplies(link):
        return None
    first, last = _wired(info, chain.links[start:end])
    start, end = start + first, start + last
    # The ends must look like the middle: a first or last link with fewer side outputs than its neighbours is not a
    # step.
    while end - start > 2 and _lacks_sides(info, chain.links[start : start + 3]):
        start += 1
    while end - start > 2 and _lacks_sides(info, chain.links[start:end][:-4:-1]):
        end -= 1
    if end - start < SHORTEST_RECURRENCE - 1:  # a first or last link may be found later
        return None
    return Chain(chain.states[start : end + 1], chain.links[start:end])


def _run(flags: list[bool]) -> tuple[int, int]:
    """Start and end of the longest run of true values; the first one on a tie."""
    best, start = (0, 0), 0
    for i, flag in enumerate([*flags, False]):
        if not flag:
            best, start = max(best, (start, i), key=lambda run: run[1] - run[0]), i + 1
    return best


def _wired(info: GraphInfo, links: list[Program]) -> tuple[int, int]:
    """Start and end of the longest run of links that follow one another as those in the middle do."""
    pairs = list(pairwise(links))
    if not pairs:
        return 0, 0
    inner = pairs[1:-1][:: max(1, (len(pairs) - 2) // _SAMPLE)]
    samples = [inner] if len(pairs) > _SAMPLE else [pairs, inner, pairs[1:], pairs[:-1]]
    patterns = (Pattern(info, sample) for sample in samples if sample)
    pattern = next((p for p in patterns if p.is_known), None)
    if pattern is None:
        return 0, 0
    start, end = _run([pattern.follows(earlier, later) for later, earlier in pairs])
    end += end > start  # there is one pair fewer than links
    while start < end and not pattern.may_be_first(links[start]):
        start += 1
    return start, end


def _lacks_sides(info: GraphInfo, links: list[Program]) -> bool:
    """Whether the first link has fewer side outputs than the two behind it have in common."""
    return sides_in_common(info, links) < sides_in_common(info, links[1:])


def _multiplies(link: Program) -> bool:
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar, torch.ops.aten.div.Tensor)
    return any(s.target in products for s in link.statements)
