"""Split every link into K and J: ``s' = K s + J s + b``.

K is read off the program by sending ones through its elementwise edges; J is everything else (see
``hwbp_compiler.graph.evaluate``). This pass checks that the split exists: elementwise paths must arrive in the order
they left, and K must be lower triangular when the state has several components.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hwbp_compiler.graph.chain import Chain
from hwbp_compiler.graph.program import INPUT, SUM, NotALink, Program, Ref, elementwise_argument
from hwbp_compiler.graph.rules import Kind, rule_of
from hwbp_compiler.torch_private import real_tensors

aten = torch.ops.aten

_LAYOUT_ADVICE = "Keep the residual stream in one layout: transpose inside the block, and back before the addition."


@dataclass(frozen=True)
class Split:
    """Where K is non-zero.

    support   pairs (to, from) of state components joined by an elementwise path in at least one link
    order     components so ordered that K is lower triangular
    """

    support: frozenset[tuple[int, int]]
    order: tuple[int, ...]


def split_links(chain: Chain) -> Split:
    """Raises NotALink where the elementwise part is no diagonal, or no triangular matrix of diagonals."""
    support: set[tuple[int, int]] = set()
    seen: set[tuple] = set()
    for link in chain.links:
        if link.signature in seen:
            continue
        seen.add(link.signature)
        with real_tensors():  # orders of elements are compared, and Inductor runs passes under fake tensors
            support |= _support(link)
    return Split(frozenset(support), _triangular_order(chain.width, support))


def _support(link: Program) -> set[tuple[int, int]]:
    """(output component, input component) pairs with an elementwise path, each checked to be a diagonal."""
    layouts: list[dict[int, torch.Tensor | None]] = []  # per statement: input component -> order of its elements
    for i, statement in enumerate(link.statements):
        if statement.target is INPUT:
            layouts.append({i: None})
            continue
        if i > max(link.outputs):
            break
        mine: dict[int, torch.Tensor | None] = {}
        for ref in _refs(statement.args):
            if not layouts[ref.id] or not elementwise_argument(link, i, ref):
                continue
            for component, order in layouts[ref.id].items():
                moved = _moved(link, i, ref, order)
                if component in mine and not _same_order(mine[component], moved):
                    raise NotALink("the state meets itself with its elements in another order", _LAYOUT_ADVICE)
                mine[component] = moved
        layouts.append(mine)
    found: set[tuple[int, int]] = set()
    for component, i in enumerate(link.outputs):
        for source, order in layouts[i].items():
            if not _same_order(order, None):
                raise NotALink(
                    "a block returns its state with the elements in another order than it was given", _LAYOUT_ADVICE
                )
            found.add((component, source))
    return found


def _moved(link: Program, i: int, ref: Ref, order: torch.Tensor | None) -> torch.Tensor | None:
    """The order of elements after statement i; None is the order of the state itself (a view keeps it)."""
    statement = link.statements[i]
    node = link.raw[i]
    rule = rule_of(node) if statement.target is not SUM and node is not None else None
    if rule is None or rule.kind is not Kind.LAYOUT:
        return order
    if statement.target not in (aten.permute.default, aten.transpose.int, aten.t.default):
        return order
    shape = link.statements[ref.id].shape
    assert shape is not None
    if not all(isinstance(s, int) for s in shape):
        # A symbolic shape: a permutation that moves only dimensions of size 1 keeps the order, others do not.
        dims = statement.args[1] if statement.target is aten.permute.default else None
        if dims is not None and [d for d in dims if shape[d] != 1] == sorted(d for d in dims if shape[d] != 1):
            return order
        raise NotALink(
            "a block permutes its state, and with sizes known only at run time (dynamic shapes) the order cannot be "
            "followed",
            "Compile with dynamic=False, or keep the residual stream in one layout.",
        )
    flat = torch.arange(_numel(shape)) if order is None else order
    move: Callable[..., torch.Tensor] = statement.target  # type: ignore[assignment]
    return move(flat.reshape(shape), *statement.args[1:]).reshape(-1)


def _numel(shape: tuple) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _same_order(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None and b is None:
        return True
    a = torch.arange(b.numel()) if a is None and b is not None else a
    b = torch.arange(a.numel()) if b is None and a is not None else b
    assert a is not None and b is not None
    return torch.equal(a, b)


def _refs(args):
    for a in args:
        if isinstance(a, Ref):
            yield a
        elif isinstance(a, tuple):
            yield from _refs(a)


def _triangular_order(width: int, support: set[tuple[int, int]]) -> tuple[int, ...]:
    order: list[int] = []
    while len(order) < width:
        free = [
            c
            for c in range(width)
            if c not in order and all(source in order or source == c for to, source in support if to == c)
        ]
        if not free:
            raise NotALink(
                "the tensors of the state feed one another element by element in a circle (a complex multiplication "
                "written with real parts, for example)",
                "Let each tensor of the state carry on itself and those after it only.",
            )
        order.append(free[0])
    return tuple(order)
