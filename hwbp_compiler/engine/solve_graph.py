"""Series as nodes of a joint graph, for :func:`~.solve.solve`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from .emitter import Emitter
from .segments import Cut
from .watch import mark

aten = torch.ops.aten


class GraphSeries:
    """``like`` holds one component of a state each; a series has ``links`` rows of that form."""

    def __init__(self, emitter: Emitter, links: int, like: Sequence[Tensor]) -> None:
        self.e, self.links, self.like = emitter, links, like
        self._multipliers: dict[tuple[Node | float, float], Node | None] = {}

    def add(self, a: Node, b: Node) -> Node:
        return self.e.call(aten.add.Tensor, a, b)

    def scaled(self, series: Node, k: Node | float, factor: float) -> Node:
        if isinstance(k, float):
            return series if k * factor == 1.0 else self.e.call(aten.mul.Tensor, series, k * factor)
        scaled = self.e.call(aten.mul.Tensor, series, k)
        return scaled if factor == 1.0 else self.e.call(aten.mul.Tensor, scaled, factor)

    def before(self, rows: Node) -> Node:
        return self.e.call(aten.slice.Tensor, rows, 0, 1, self.links + 1)

    def nothing(self, component: int) -> Node:
        return self.e.full([self.links, *self.like[component].shape], 0.0, self.like[component])

    def repeated(self, component: int, head: Node) -> Node:
        sizes = [self.links + 1, *(self.e.size(s) for s in self.like[component].shape)]
        return self.e.call(aten.expand.default, self.e.call(aten.unsqueeze.default, head, 0), sizes)

    def with_head(self, values: Node, head: Node) -> Node:
        return self.e.call(aten.cat.default, [values, self.e.call(aten.unsqueeze.default, head, 0)])

    def scan(self, values: Node, k: Node | float, keep: float, head: Node) -> Node:
        return self.e.call(torch.ops.highway.linear_scan.default, values, self._multiplier(values, k, keep), True, head)

    def marked(self, rows: Node, before: Node) -> Node:
        return self.e.call(mark, rows, before)

    # -- cut into segments --------------------------------------------------------------------------------------

    def ends(self, rows: Node, cut: Cut) -> Node:
        return self.e.call(aten.slice.Tensor, rows, 0, cut.first, self.links + 1, cut.size)

    def product(self, k: Node | float, keep: float, cut: Cut) -> Node | float:
        if isinstance(k, float):
            return float((keep * k) ** cut.size)
        product = self.e.call(aten.prod.dim_int, self._by_segment(k, cut), 1)
        return product if keep == 1.0 else self.e.call(aten.mul.Tensor, product, keep**cut.size)

    def folded(self, k: Node | float, cut: Cut) -> Node | float:
        if isinstance(k, float):
            return k
        apart = self._by_segment(k, cut)
        rank = apart.meta["val"].dim()
        return self.e.call(aten.clone.default, self.e.permute(apart, [1, 0, *range(2, rank)]))

    def _by_segment(self, k: Node, cut: Cut) -> Node:
        """[C - 1, S, ...]"""
        inside = self.e.call(aten.slice.Tensor, k, 0, cut.first, self.links) if cut.first else k
        return self.e.reshape(inside, [cut.count - 1, cut.size, *k.meta["val"].shape[1:]])

    def of_segments(self, cut: Cut) -> GraphSeries:
        return GraphSeries(self.e, cut.count - 1, self.like)

    def inside(self, cut: Cut) -> GraphSeries:
        return GraphSeries(
            self.e, cut.size, [like.unsqueeze(0).expand(cut.count - 1, *like.shape) for like in self.like]
        )

    def all(self, component: int, value: float) -> Node:
        return self.e.full(list(self.like[component].shape), value, self.like[component])

    def first_row(self, rows: Node) -> Node:
        return self.e.call(aten.select.int, rows, 0, 0)

    def _multiplier(self, values: Node, k: Node | float, keep: float) -> Node | None:
        """``keep * k``, created once for all rounds; None means one."""
        if (k, keep) not in self._multipliers:
            made: Node | None
            if not isinstance(k, float):
                made = k if keep == 1.0 else self.e.call(aten.mul.Tensor, k, keep)
            elif k * keep == 1.0:
                made = None
            else:
                tensor = values.meta["val"]
                made = self.e.full([1] * tensor.dim(), k * keep, tensor)
            self._multipliers[k, keep] = made
        return self._multipliers[k, keep]
