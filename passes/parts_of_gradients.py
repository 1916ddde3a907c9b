"""Express parts of a gradient that are cut out and put back in place as the gradient under a mask.

Note [Masks]
~~~~~~~~~~~~
``cat([a[:, :1] + f(a), a[:, 1:]], 1)`` changes a part of the state. In the backward pass, the gradient g is cut in two
and put together again: ``zeros[:, :1] = g[:, :1]``, ``zeros[:, 1:] = g[:, 1:]``, then the sum. Judged by their
operators, a cut and its inverse mix elements, so no elementwise path would be found. ``where(m, g, 0)``, with m the
mask of the part that was kept, is elementwise. If the masks that meet in a sum cover everything, the sum is g itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.program import ADD, sum_terms
from hwbp_compiler.graph.rules import form_of, is_zero

aten = torch.ops.aten

_PUT_BACK = {aten.slice_scatter.default, aten.select_scatter.default, aten.cat.default}

Ranges = frozenset[tuple[int, int]]
"""Ranges of positions along a dimension, [start, stop) each."""


@dataclass(frozen=True)
class Place:
    """The place of a part in a tensor: [start, stop) of ``dim``. ``lost``: selecting a single element removed the
    dimension.
    """

    dim: int
    start: int
    stop: int
    lost: bool = False


@dataclass(frozen=True)
class Part:
    """``gradient`` at ``ranges`` of ``dim``, zero elsewhere."""

    gradient: Node
    dim: int
    ranges: Ranges


def mask_parts(graph: Graph, settled: Set[Node]) -> bool:
    """Rewrite ``graph`` to use masks instead of parts. Returns whether any part was found. ``settled`` nodes stay."""
    if not any(graph.find_nodes(op="call_function", target=target) for target in _PUT_BACK):
        return False
    return _Masking(graph, settled).run()


class _Masking:
    def __init__(self, graph: Graph, settled: Set[Node]) -> None:
        self.graph, self.settled = graph, settled
        self.gradients: set[Node] = set()
        self.parts: dict[Node, Part] = {}
        self.masks: dict[Hashable, Node] = {}
        self.first: Node | None = None

    def run(self) -> bool:
        for node in list(self.graph.nodes):  # in order, so that the gradient of a part is final
            if is_tangent(node):
                self.gradients.add(node)
            elif not self.gradients.isdisjoint(node.all_input_nodes):
                self.gradients.add(node)
                self.first = self.first or node
                if node in self.settled:
                    continue
                if node.target in _PUT_BACK:
                    self._treat(node)
                elif self.parts and node.target is ADD and not _is_inner(node):
                    self._join(node)
        if self.parts:
            self._drop_unused()
        return bool(self.parts)

    def _drop_unused(self) -> None:
        """Erase nodes without users: each would count as a user of its operands."""
        for node in reversed(self.graph.nodes):
            if not node.users and node in self.gradients and not node.is_impure():
                self.graph.erase_node(node)

    # -- one operator that puts parts where they were ------------------------------------------------------------

    def _treat(self, node: Node) -> None:
        written = _written(node)
        if written is None:
            return
        base, pieces = written
        found: list[Part] = []
        left: list[list[Node]] = []  # per piece, the terms that are not parts
        for piece, place in pieces:
            terms = [] if is_zero(piece) else sum_terms(piece)
            parts = [self._cut_from(term, place, node) for term in terms]
            found += [part for part in parts if part is not None]
            left.append([term for term, part in zip(terms, parts, strict=True) if part is None])
        if base is not None and not is_zero(base):
            if base not in self.gradients or any(left):
                return  # the overwritten values may matter
            (place,) = (place for _, place in pieces)
            if ranges := _complement(place, _size(base, place.dim)):
                found.append(Part(base, place.dim, ranges))
        fixed = all(isinstance(size, int) for size in node.meta["val"].shape)
        if found and (fixed or not any(left)):  # otherwise zeros of a symbolic size would be needed
            self._replace(node, found, [piece for piece, _ in pieces], left)

    def _cut_from(self, node: Node, place: Place, whole: Node) -> Part | None:
        """``node`` as the part at ``place`` of a gradient that has the form of ``whole``."""
        while node.target in (aten.clone.default, aten.alias.default):
            node = node.args[0]
        if node not in self.gradients or _cut(node) != place:
            return None
        source = node.args[0]
        if not isinstance(source, Node) or form_of(source) != form_of(whole):
            return None
        return Part(source, place.dim, frozenset({(place.start, place.stop)}))

    def _replace(self, node: Node, found: list[Part], pieces: list[Node], left: list[list[Node]]) -> None:
        emitter = Emitter(self.graph, node, node.meta["val"].fake_mode, 1, {})
        terms = [self._masked(emitter, part) for part in _joined(found)]
        if any(left):
            terms.append(self._without(emitter, node, pieces, left))
        self._put(node, _added(emitter, terms), emitter.created)

    def _without(self, emitter: Emitter, node: Node, pieces: list[Node], left: list[list[Node]]) -> Node:
        """``node`` without the parts that were found."""
        values = [piece.meta["val"] for piece in pieces]
        rest = [
            _added(emitter, terms) if terms else emitter.full(tuple(value.shape), 0.0, value)
            for terms, value in zip(left, values, strict=True)
        ]
        if node.target is aten.cat.default:
            return emitter.call(node.target, rest, *node.args[1:], **node.kwargs)
        base, _, *where = node.args
        return emitter.call(node.target, base, *rest, *where, **node.kwargs)

    def _masked(self, emitter: Emitter, part: Part) -> Node:
        size = _size(part.gradient, part.dim)
        if part.ranges == {(0, size)}:
            return part.gradient
        # Chosen, not multiplied: the values left out may be infinite.
        zero = emitter.full((), 0.0, part.gradient.meta["val"])
        masked = emitter.call(aten.where.self, self._mask(part, size), part.gradient, zero)
        self.parts[masked] = part
        return masked

    def _mask(self, part: Part, size: int) -> Node:
        """A mask [size, 1, ...], emitted at the start of the backward pass."""
        value = part.gradient.meta["val"]
        key = (part.dim - value.dim(), size, part.ranges, value.device, value.dim())
        if key not in self.masks:
            assert self.first is not None
            emitter = Emitter(self.graph, self.first, value.fake_mode, 1, {})
            mask = emitter.full((size,), False, value, torch.bool)
            for start, stop in sorted(part.ranges):
                ones = emitter.full((stop - start,), True, value, torch.bool)
                mask = emitter.call(aten.slice_scatter.default, mask, ones, 0, start, stop)
            self.masks[key] = emitter.call(aten.view.default, mask, [size, *[1] * (value.dim() - part.dim - 1)])
        return self.masks[key]

    # -- masks that meet -----------------------------------------------------------------------------------------

    def _join(self, root: Node) -> None:
        terms = sum_terms(root)
        parts = [self.parts[t] for t in terms if t in self.parts]
        joined = _joined(parts)
        if len(joined) == len(parts):
            return
        emitter = Emitter(self.graph, root, root.meta["val"].fake_mode, 1, {})
        rest = [term for term in terms if term not in self.parts]
        total = _added(emitter, [*(self._masked(emitter, part) for part in joined), *rest])
        self._put(root, total, emitter.created)

    def _put(self, old: Node, new: Node, created: Sequence[Node]) -> None:
        if self.first is old:
            self.first = new
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self.gradients.update(created)


def _added(emitter: Emitter, terms: Sequence[Node]) -> Node:
    total = terms[0]
    for term in terms[1:]:
        total = emitter.call(ADD, total, term)
    return total


def _written(node: Node) -> tuple[Node | None, list[tuple[Node, Place]]] | None:
    """The tensor that is overwritten (None: nothing is), and the pieces written, each with its place."""
    if node.target is aten.cat.default:
        pieces, dim = node.args[0], _dim(node, node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))
        if not isinstance(_size(node, dim), int):
            return None  # the place of a piece is a symbol
        found, start = [], 0
        for piece in pieces:
            if piece.meta["val"].dim() != node.meta["val"].dim():
                return None  # an empty tensor, which torch.cat still accepts
            stop = start + _size(piece, dim)
            found.append((piece, Place(dim, start, stop)))
            start = stop
        return None, found
    base, piece = node.args[:2]
    place = _place(node, node.args[2:], node.kwargs, node.target is aten.select_scatter.default)
    if place is None or not isinstance(base, Node) or not isinstance(piece, Node):
        return None
    return base, [(piece, place)]


def _cut(node: Node) -> Place | None:
    """The place of ``node`` in the tensor that it was cut from."""
    if node.target not in (aten.slice.Tensor, aten.select.int):
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    return _place(source, node.args[1:], node.kwargs, node.target is aten.select.int)


def _place(whole: Node, args: Sequence[Any], kwargs: dict[str, Any], single: bool) -> Place | None:
    if single:
        dim, index = (*args, *kwargs.values())[:2]
        dim = _dim(whole, dim)
        size = whole.meta["val"].shape[dim]
        if not isinstance(index, int) or not isinstance(size, int):
            return None
        return Place(dim, index % size, index % size + 1, lost=True)
    given = dict(zip(("dim", "start", "end", "step"), args, strict=False)) | kwargs
    dim = _dim(whole, given.get("dim", 0))
    size = whole.meta["val"].shape[dim]
    start, stop = given.get("start") or 0, given.get("end")
    stop = size if stop is None else stop
    if given.get("step", 1) != 1 or not all(isinstance(n, int) for n in (size, start, stop)):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Place(dim, start, stop) if start < stop else None


def _dim(node: Node, dim: int) -> int:
    return dim % int(node.meta["val"].dim())


def _size(node: Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _complement(place: Place, size: int) -> Ranges:
    return frozenset(r for r in ((0, place.start), (place.stop, size)) if r[0] < r[1])


def _joined(parts: Sequence[Part]) -> list[Part]:
    """The parts of each gradient, joined if they do not overlap."""
    found: dict[tuple[Node, int], list[Ranges]] = {}
    for part in parts:
        groups = found.setdefault((part.gradient, part.dim), [])
        for i, group in enumerate(groups):
            if _apart(group, part.ranges):
                groups[i] = _merged(group | part.ranges)
                break
        else:
            groups.append(part.ranges)
    return [Part(gradient, dim, ranges) for (gradient, dim), groups in found.items() for ranges in groups]


def _apart(one: Ranges, other: Ranges) -> bool:
    return all(a[1] <= b[0] or b[1] <= a[0] for a in one for b in other)


def _merged(ranges: Ranges) -> Ranges:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return frozenset(merged)


def _is_inner(node: Node) -> bool:
    """Whether the addition ``node`` is part of a larger one."""
    user = next(iter(node.users), None)
    return user is not None and len(node.users) == 1 and user.target is ADD and form_of(user) == form_of(node)
