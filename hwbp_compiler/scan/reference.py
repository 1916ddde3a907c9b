"""The scan as defined: a Python loop over the links. Tests compare all other implementations with it."""

from __future__ import annotations

import torch
from torch import Tensor


def spread(multipliers: Tensor, values: Tensor) -> Tensor:
    """``multipliers`` with as many dimensions as ``values``; a 1-d tensor has one multiplier per link."""
    return multipliers.reshape(multipliers.shape + (1,) * (values.ndim - multipliers.ndim))


def linear_scan_reference(values: Tensor, multipliers: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """``u[i] = values[i] + multipliers[i] * u[i-1]`` (``u[i+1]`` if ``reverse``), one link after the other.

    Computes in the dtype of its input, and plain autograd differentiates it. Shapes as in
    :func:`hwbp_compiler.linear_scan`.
    """
    length = values.shape[0]
    factors = None if multipliers is None else spread(multipliers, values).expand_as(values)
    links = range(length - 1, -1, -1) if reverse else range(length)
    states: list[Tensor] = [values[0]] * length if length else []
    state: Tensor | None = None
    for i in links:
        if state is None:
            state = values[i]
        elif factors is None:
            state = values[i] + state
        else:
            state = values[i] + factors[i] * state
        states[i] = state
    return torch.stack(states) if states else values.clone(memory_format=torch.contiguous_format)
