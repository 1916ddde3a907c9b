"""Series as tensors, for :func:`~.solve.solve`: computed at once, or traced if the caller traces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .segments import Cut
from .watch import mark

linear_scan = torch.ops.highway.linear_scan


class TensorSeries:
    """``like`` holds one component of a state each; a series has ``links`` rows of that form (a number or a symbol)."""

    def __init__(self, links: int, like: Sequence[Tensor]) -> None:
        self.links, self.like = links, like

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def scaled(self, series: Tensor, k: Tensor | float, factor: float) -> Tensor:
        return (k if factor == 1.0 else k * factor) * series

    def before(self, rows: Tensor) -> Tensor:
        return rows[1:]

    def nothing(self, component: int) -> Tensor:
        like = self.like[component]
        return like.new_zeros((self.links, *like.shape))

    def repeated(self, component: int, head: Tensor) -> Tensor:
        return head.unsqueeze(0).expand(self.links + 1, *head.shape)

    def with_head(self, values: Tensor, head: Tensor) -> Tensor:
        return torch.cat([values, head.unsqueeze(0)])

    def scan(self, values: Tensor, k: Tensor | float, keep: float, head: Tensor) -> Tensor:
        return linear_scan(values, multiplier(k if keep == 1.0 else k * keep, head), True, head)

    def marked(self, rows: Tensor, before: Tensor) -> Tensor:
        return mark(rows, before)

    # -- cut into segments --------------------------------------------------------------------------------------

    def ends(self, rows: Tensor, cut: Cut) -> Tensor:
        return rows[cut.first :: cut.size]

    def product(self, k: Tensor | float, keep: float, cut: Cut) -> Tensor | float:
        if isinstance(k, float):
            return float((keep * k) ** cut.size)
        if k.shape[0] == 1:  # the same for all links
            return (keep * k).pow(cut.size)
        return self._by_segment(k, cut).prod(1) * keep**cut.size

    def folded(self, k: Tensor | float, cut: Cut) -> Tensor | float:
        if isinstance(k, float):
            return k
        if k.shape[0] == 1:  # the same for all links
            return k.unsqueeze(1)
        return self._by_segment(k, cut).transpose(0, 1).contiguous()

    def _by_segment(self, k: Tensor, cut: Cut) -> Tensor:
        """[C - 1, S, ...]"""
        return k[cut.first :].reshape(cut.count - 1, cut.size, *k.shape[1:])

    def of_segments(self, cut: Cut) -> TensorSeries:
        return TensorSeries(cut.count - 1, self.like)

    def inside(self, cut: Cut) -> TensorSeries:
        return TensorSeries(cut.size, [like.unsqueeze(0).expand(cut.count - 1, *like.shape) for like in self.like])

    def all(self, component: int, value: float) -> Tensor:
        like = self.like[component]
        return like.new_full(like.shape, value)

    def first_row(self, rows: Tensor) -> Tensor:
        return rows[0]


def multiplier(k: Tensor | float, like: Tensor) -> Tensor | None:
    """``k`` in the form that ``linear_scan`` takes; None means one."""
    if isinstance(k, float):
        return None if k == 1.0 else torch.full((), k, dtype=like.dtype, device=like.device)
    return k
