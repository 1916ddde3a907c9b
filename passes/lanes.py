"""Take the rows of some links from a stack, and put rows of several groups back into the order of the chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from hwbp_compiler.engine.emitter import Emitter, Value

aten = torch.ops.aten

Part = Value | float | None
"""What a group gives for its lanes: a number is the same for all lanes, None is zero."""


def rows_at(e: Emitter, row: Node, lanes: Sequence[int]) -> Node:
    """Rows ``lanes`` (ascending) of a [rows, ...] stack: a slice if they are evenly spaced."""
    count = row.meta["val"].shape[0]
    if len(lanes) == 1:
        return row if count == 1 else e.call(aten.slice.Tensor, row, 0, lanes[0], lanes[0] + 1)
    step = lanes[1] - lanes[0]
    if all(b - a == step for a, b in zip(lanes, lanes[1:], strict=False)):
        if (lanes[0], lanes[-1] + 1, step) == (0, count, 1):
            return row
        return e.call(aten.slice.Tensor, row, 0, lanes[0], lanes[-1] + 1, step)
    pieces = [e.call(aten.slice.Tensor, row, 0, a, b + 1) for a, b in _runs(lanes)]
    return e.call(aten.cat.default, pieces)


def assemble(
    e: Emitter,
    emitters: Sequence[Emitter],
    parts: Sequence[Part],
    lanes: Sequence[Sequence[int]],
    count: int,
    like: torch.Tensor,
    full: bool = False,
) -> Node:
    """One part per group -> [count, ...], where ``lanes[g]`` (ascending) are the rows of group g.

    ``emitters``: one per group, for as many lanes as its part has. A part may have one more lane in front: the tail,
    which sends nothing on. ``full``: return the shape of ``like``, which is a state; otherwise rows that broadcast
    against it.
    """
    rank = like.dim()
    nodes: list[Node] = []
    for part, ge in zip(parts, emitters, strict=True):
        if part is None or isinstance(part, float):
            part = Value(ge.full([1] * rank, part or 0.0, like), False)
        part = ge.convert(part, like.dtype)
        if part.rank < rank:
            sizes = [1] * (rank - part.rank) + list(part.shape)
            node = ge.aligned(part, rank) if part.batched else ge.reshape(part.node, sizes)
            part = Value(node, part.batched)
        nodes.append(ge.batch(part))
    shapes = [tuple(n.meta["val"].shape[1:]) for n in nodes]
    if full or any(s != shapes[0] for s in shapes):
        target = tuple(like.shape)
        nodes = [
            n if tuple(n.meta["val"].shape[1:]) == target
            else e.call(aten.expand.default, n, [n.meta["val"].shape[0], *(e.size(s) for s in target)])
            for n in nodes
        ]  # fmt: skip
    trimmed = []
    for node, ge, mine in zip(nodes, emitters, lanes, strict=True):
        trimmed.append(e.call(aten.slice.Tensor, node, 0, 1, ge.count) if len(mine) < ge.count else node)
    return _interleave(e, trimmed, lanes, count)


def _interleave(e: Emitter, nodes: list[Node], lanes: Sequence[Sequence[int]], count: int) -> Node:
    if len(nodes) == 1:
        return nodes[0]
    period = len(nodes)
    first = sorted(range(period), key=lambda g: lanes[g][0])
    if all(list(lanes[g]) == list(range(i, count, period)) for i, g in enumerate(first)) and count % period == 0:
        columns = [e.call(aten.unsqueeze.default, nodes[g], 1) for g in first]
        joined = e.call(aten.cat.default, columns, 1)
        return e.reshape(joined, [count, *nodes[0].meta["val"].shape[1:]])
    position = {p: (g, i) for g, mine in enumerate(lanes) for i, p in enumerate(mine)}
    pieces: list[Node] = []
    p = 0
    while p < count:
        g, i = position[p]
        q = p + 1
        while q < count and position[q] == (g, i + q - p):
            q += 1
        whole = (i, i + q - p) == (0, nodes[g].meta["val"].shape[0])
        pieces.append(nodes[g] if whole else e.call(aten.slice.Tensor, nodes[g], 0, i, i + q - p))
        p = q
    return e.call(aten.cat.default, pieces) if len(pieces) > 1 else pieces[0]


def _runs(lanes: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for lane in lanes:
        if runs and runs[-1][1] == lane - 1:
            runs[-1] = (runs[-1][0], lane)
        else:
            runs.append((lane, lane))
    return runs
