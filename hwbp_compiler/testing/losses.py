"""A loss that depends on every number a model returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def probe_loss(output: Any) -> Tensor:
    """A loss with fixed random weights: linear and quadratic terms in every floating-point tensor of ``output``.

    A plain sum would not do: the sum of a LayerNorm's output, for example, is constant, so its gradient is zero. The
    gradient of this loss differs from element to element.

    Args:
        output: what a model returns: a tensor, or any nesting of tuples, lists and dicts of tensors.

    Returns:
        A float64 tensor without dimensions.
    """
    total = torch.zeros((), dtype=torch.float64)
    for number, leaf in enumerate(pytree.tree_leaves(output)):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(1000 + number)
        slope, weight = (
            torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device) for _ in range(2)
        )
        value = leaf.to(torch.float64)
        total = total + (slope * value).sum() + 0.5 * (weight * value).square().sum()
    return total
