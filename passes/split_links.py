"""Split every link into K and J: ``s' = K s + J s + b``.

K is read off the program by sending ones through its elementwise edges; J is everything else (see
``hwbp_compiler.engine.evaluate``). This pass checks that the split exists: elements on elementwise paths must arrive in
the order they left, and K must be lower triangular if the state has several components.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import networkx
import torch

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.order import AS_IT_WAS, Order, permuted
from hwbp_compiler.graph.program import INPUT, Program, Ref, elementwise_argument, references
from hwbp_compiler.reasons import Declined, Reason

aten = torch.ops.aten


@dataclass(frozen=True)
class Split:
    """Where K is non-zero.

    support   pairs (to, from) of state components joined by an elementwise path in at least one link
    order     the components, ordered so that K is lower triangular
    """

    support: frozenset[tuple[int, int]]
    order: tuple[int, ...]


def split_links(chain: Chain) -> Split:
    """Raises Declined if the elementwise part is neither a diagonal nor a triangular matrix of diagonals."""
    support: set[tuple[int, int]] = set()
    seen: set[Hashable] = set()
    # The first link may lack what a zero gradient leads to. An equal link has it.
    for link in sorted(chain.links, key=lambda link: None in link.raw):
        if link.signature in seen:
            continue
        seen.add(link.signature)
        support |= _support(link)
    return Split(frozenset(support), _triangular_order(chain.width, support))


def _support(link: Program) -> set[tuple[int, int]]:
    """(output component, input component) pairs with an elementwise path, each checked to be a diagonal."""
    way = _on_the_way(link)
    orders: list[dict[int, Order | None]] = []  # per statement: input component -> order of its elements
    for i, statement in enumerate(link.statements[: max(link.outputs) + 1]):
        mine: dict[int, Order | None] = {i: AS_IT_WAS} if statement.target is INPUT else {}
        for ref in references(statement.args) if i in way else ():
            if not elementwise_argument(link, i, ref):
                continue
            for component, order in orders[ref.id].items():
                moved = _moved(link, i, ref, order)
                if component in mine and not _same(mine[component], moved):
                    raise Declined(Reason.STATE_MEETS_ITSELF_PERMUTED)
                mine[component] = moved
        orders.append(mine)
    found: set[tuple[int, int]] = set()
    for component, i in enumerate(link.outputs):
        for source, order in orders[i].items():
            if not _same(order, AS_IT_WAS):
                raise Declined(Reason.STATE_RETURNED_PERMUTED)
            found.add((component, source))
    return found


def _on_the_way(link: Program) -> set[int]:
    """Statements with an elementwise path to an output. The operands of a matrix product may be in any order."""
    way = set(link.outputs)
    for i in range(max(link.outputs), -1, -1):
        if i in way:
            way |= {ref.id for ref in references(link.statements[i].args) if elementwise_argument(link, i, ref)}
    return way


def _moved(link: Program, i: int, ref: Ref, order: Order | None) -> Order | None:
    """The order of elements after statement i; None if it cannot be followed. A view keeps it."""
    statement = link.statements[i]
    if statement.target not in (aten.permute.default, aten.transpose.int, aten.t.default):
        return order
    shape = link.statements[ref.id].shape
    assert shape is not None
    dims = list(range(len(shape)))
    if statement.target is aten.permute.default:
        dims = [d % len(shape) for d in statement.args[1]]
    elif len(shape) > 1:
        a, b = statement.args[1:] or (0, 1)
        dims[a], dims[b] = dims[b], dims[a]
    return permuted(order, shape, dims)


def _same(a: Order | None, b: Order | None) -> bool:
    if a is None or b is None:
        raise Declined(Reason.ORDER_UNKNOWN)
    return a == b


def _triangular_order(width: int, support: set[tuple[int, int]]) -> tuple[int, ...]:
    feeds = networkx.DiGraph((source, to) for to, source in support if source != to)
    feeds.add_nodes_from(range(width))
    try:
        return tuple(networkx.lexicographical_topological_sort(feeds))
    except networkx.NetworkXUnfeasible:
        raise Declined(Reason.STATE_IN_A_CIRCLE) from None
