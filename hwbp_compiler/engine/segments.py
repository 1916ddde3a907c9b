"""W by Highway-BP with segments: exact inside a segment of S links, highway across (docs/design.md, "Segments").

The L links are cut into C segments, counted from the loss; the one next to the input takes the remainder. e_s is the
estimate of the gradient at the last state of segment s. run_s is the substitution inside the segment (K + J, undamped),
out_s is its result at the segment's first state, and P_s is the product of its (1 - gamma) K:

    e^0       from the highway alone: one scan over the links
    e^{t+1}   scan(out(e^t) - P e^t, P), with the head as last row: S steps for all segments at once, then one scan
    W         run(e^k), whose inner states are the rows of W

The segment next to the input takes part only in the last run, because there is nothing before it that would use its
result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from .solve import Highway, Series, scan_along, solve

T = TypeVar("T")


@dataclass(frozen=True)
class Cut:
    """Where a series of L + 1 states is cut. Sizes are numbers or symbols.

    size    S, links per segment
    count   C
    first   the row of e_1, which is the number of links in the series that belong to the segment next to the input
    """

    size: int
    count: Any
    first: Any

    @classmethod
    def of(cls, links: Any, size: int, outside: int = 0) -> Cut:
        """Cut ``links`` links. ``outside`` of them are in the segment next to the input, but not in the series."""
        count = (links + size - 1) // size
        return cls(size, count, links - (count - 1) * size - outside)

    def last_run(self) -> Iterator[tuple[slice, bool, bool]]:
        """The steps of the last run. Each gives the rows of the links that take part (assuming none is outside),
        whether the segment next to the input is among them, and whether any other segment is.

        The segment next to the input ends after ``first`` steps. The others need no last step, because it would lead to
        the end of the segment before, which is known.
        """
        for step in range(max(self.first, self.size - 1) if self.count > 1 else self.first):
            with_first, with_rest = step < self.first, step < self.size - 1 and self.count > 1
            start = self.first - 1 - step + (0 if with_first else self.size)
            yield slice(start, None if with_rest else start + 1, self.size), with_first, with_rest


class SegmentSeries(Series[T], Protocol[T]):
    """A :class:`Series` that can be cut."""

    def ends(self, rows: T, cut: Cut, /) -> T:
        """e_1 ... e_C: [C, ...], taken from rows 0..L."""
        ...

    def product(self, k: T | float, keep: float, cut: Cut, /) -> T | float:
        """The product of ``keep`` k over the links of each segment: one row for each of segments 2..C."""
        ...

    def folded(self, k: T | float, cut: Cut, /) -> T | float:
        """k [L, ...] as [S, C - 1, ...]: each row has one link of each of segments 2..C; the links next to the loss
        come last.
        """
        ...

    def of_segments(self, cut: Cut, /) -> SegmentSeries[T]:
        """A series with one row for each of segments 2..C."""
        ...

    def inside(self, cut: Cut, /) -> SegmentSeries[T]:
        """A series with S rows, each of which holds segments 2..C side by side."""
        ...

    def all(self, component: int, value: float, /) -> T:
        """A head with this number everywhere."""
        ...

    def first_row(self, rows: T, /) -> T: ...


class Runs(Protocol[T]):
    """Substitution inside the segments: w_{i-1} = b_{i-1} + (K_i + J_i) w_i, step by step, for all segments at once."""

    def across(self, iteration: int, ends: list[T], /) -> list[T]:
        """out_2 ... out_C from e_2 ... e_C: [C - 1, ...] per component."""
        ...

    def through(self, ends: list[T], /) -> list[T]:
        """Rows 0..L from e_1 ... e_C, which are some of the rows."""
        ...


def solve_segments(
    series: SegmentSeries[T],
    highway: Highway[T],
    cut: Cut,
    runs: Runs[T],
    iterations: int,
    damping: float,
    before_scan: Callable[[int], Any] = lambda iteration: None,
    watched: bool = False,
) -> list[T]:
    """Rows 0..L of w per component. ``before_scan(t)`` is called before the scan that gives e^t. If ``watched``, e^k is
    marked with e^{k-1}.
    """
    width = len(highway.order)
    rows = solve(series, highway, lambda _, rows: [None] * width, 0, damping, before_scan)
    ends = [series.ends(r, cut) for r in rows]
    if iterations:
        outer = series.of_segments(cut)
        across = Highway(highway.order, _products(series, highway, damping, cut), highway.heads, [None] * width)
    for t in range(1, iterations + 1):
        before = [outer.before(e) for e in ends]
        values = list(runs.across(t, before))
        for (to, source), product in across.k.items():
            values[to] = outer.add(values[to], outer.scaled(before[source], product, -1.0))
        before_scan(t)
        last, ends = ends, scan_along(outer, across, values)
    if iterations and watched:
        ends = list(map(series.marked, ends, last))
    return runs.through(ends)


def _products(series: SegmentSeries[T], highway: Highway[T], damping: float, cut: Cut) -> dict[tuple[int, int], Any]:
    """P per (to, from), for segments 2..C."""
    width = len(highway.order)
    nothing: list[T | None] = [None] * width
    found: dict[tuple[int, int], Any] = {}
    for source in highway.order:
        reached = _reached(highway, source)
        if reached == [source]:
            if (source, source) in highway.k:
                found[source, source] = series.product(highway.k[source, source], 1.0 - damping, cut)
            continue
        # Components feed one another: find the highway's response to a gradient of ones at ``source`` alone.
        inside = series.inside(cut)
        k = {pair: series.folded(value, cut) for pair, value in highway.k.items() if set(pair) <= set(reached)}
        heads = [inside.all(c, 1.0 if c == source else 0.0) for c in range(width)]
        rows = scan_along(inside, Highway(reached, k, heads, nothing), nothing, damping)
        found.update({(to, source): inside.first_row(row) for to, row in zip(sorted(reached), rows, strict=True)})
    return found


def _reached(highway: Highway[T], source: int) -> list[int]:
    """``source`` and the components that K reaches from it, in the order of the scans."""
    reached = {source}
    for to in highway.order:
        if any((to, by) in highway.k for by in reached):
            reached.add(to)
    return [to for to in highway.order if to in reached]
