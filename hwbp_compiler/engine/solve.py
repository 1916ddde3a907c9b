"""W by Highway-BP. This is the only place that computes it: for chains in a joint graph, for loops, and for modules.

Row i of W is w_i, the gradient at state i, i = 0..L. The last row is the chain's head, which is known exactly. With b
for the injections at each link (docs/design.md, section 4.6):

    W^0     = scan([b, w_L], (1 - gamma) K)
    W^{t+1} = scan([b + J W^t + gamma K W^t, w_L], (1 - gamma) K)        all links at once, then one scan

A state may have several components. K is lower triangular among them, so they are scanned one after another. A series
is a graph node or a tensor; only the given :class:`Series` knows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")
"""A tensor with one row per link or per state; or a head, which has a state's shape without rows."""


class Series(Protocol[T]):
    """Arithmetic on series: :class:`~.solve_graph.GraphSeries` writes nodes, :class:`TensorSeries` computes."""

    def add(self, a: T, b: T, /) -> T: ...

    def scaled(self, series: T, k: T | float, factor: float, /) -> T:
        """``factor * k * series``; ``k`` broadcasts against the series."""
        ...

    def before(self, rows: T, /) -> T:
        """w_1..w_L of w_0..w_L: the input of each link."""
        ...

    def nothing(self, component: int, /) -> T:
        """Zeros, one row per link."""
        ...

    def repeated(self, component: int, head: T, /) -> T:
        """Rows 0..L that are all ``head``."""
        ...

    def with_head(self, values: T, head: T, /) -> T:
        """Rows 0..L: ``values``, then ``head``."""
        ...

    def scan(self, values: T, k: T | float, keep: float, head: T, /) -> T:
        """Rows 0..L with ``head`` as the last: row i is values i plus ``keep`` k of link i + 1 times row i + 1."""
        ...

    def marked(self, rows: T, before: T, /) -> T:
        """``rows``, marked as what the last iteration made of ``before`` (:mod:`.watch`)."""
        ...


@dataclass(frozen=True)
class Highway(Generic[T]):
    """The input of the solver for one chain.

    order     components ordered so that K is lower triangular
    k         K per (to, from): a number, or one row per link; pairs without an elementwise path are left out
    heads     w_L per component
    injected  b per component: one row per link; None if there is none
    """

    order: Sequence[int]
    k: Mapping[tuple[int, int], T | float]
    heads: Sequence[T]
    injected: Sequence[T | None]


def solve(
    series: Series[T],
    highway: Highway[T],
    blocks: Callable[[int, list[T]], Sequence[T | None]],
    iterations: int,
    damping: float,
    before_scan: Callable[[int], Any] = lambda iteration: None,
    watched: bool = False,
) -> list[T]:
    """Rows 0..L of w^k per component, k = ``iterations``.

    ``blocks(t, rows)`` applies J to all links at once in iteration t. It returns one row per link and component; None
    means zero. ``before_scan(t)`` is called before the scan that gives w^t. If ``watched``, the result is marked with
    w^{k-1}.
    """
    nothing: list[T | None] = [None] * len(highway.order)
    before_scan(0)
    rows = scan_along(series, highway, nothing, damping)
    before: list[T] | None = None
    for t in range(1, iterations + 1):
        found = blocks(t, rows)
        if all(block is None for block in found) and not damping:
            break  # no block at all (a diagonal recurrence): exact without iterations
        before_scan(t)
        before, rows = rows, scan_along(series, highway, found, damping, rows)
    return rows if before is None or not watched else list(map(series.marked, rows, before))


def scan_along(
    series: Series[T],
    highway: Highway[T],
    blocks: Sequence[T | None],
    damping: float = 0.0,
    rows: Sequence[T] | None = None,
) -> list[T]:
    """One scan along the highway, component by component. Returns rows 0..L of each, by component number.

    Damping adds gamma K times the previous ``rows`` to the block.
    """
    keep = 1.0 - damping
    done: dict[int, T] = {}
    for to in highway.order:
        head = highway.heads[to]
        terms = [term for term in (highway.injected[to], blocks[to]) if term is not None]
        for (target, source), k in highway.k.items():
            if target != to:
                continue
            if damping and rows is not None:
                terms.append(series.scaled(series.before(rows[source]), k, damping))
            if source != to and keep:
                terms.append(series.scaled(series.before(done[source]), k, keep))
        own = highway.k.get((to, to))
        if not terms and isinstance(own, float) and own * keep == 1.0:
            done[to] = series.repeated(to, head)
            continue
        values = terms[0] if terms else series.nothing(to)
        for term in terms[1:]:
            values = series.add(values, term)
        if own is None or not keep or (isinstance(own, float) and own == 0.0):  # the highway carries nothing
            done[to] = series.with_head(values, head)
        else:
            done[to] = series.scan(values, own, keep, head)
    return [done[to] for to in sorted(done)]
