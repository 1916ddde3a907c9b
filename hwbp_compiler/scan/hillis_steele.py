"""The paper's own scan, as a baseline: Hillis and Steele's log-depth algorithm in plain torch operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import spread


def linear_scan_hillis_steele(values: Tensor, multipliers: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """:func:`hwbp_compiler.linear_scan` in ``log2(L)`` passes over all links (the paper's Algorithm 1).

    After the pass with stride d, ``u[i]`` sums the last 2d links and ``p[i]`` is the product of their multipliers::

        u[i] = u[i] + p[i] * u[i-d]
        p[i] = p[i] * p[i-d]

    The paper's algorithm 1 solves ``u[i] = a[i] + u[i+1] K[i+1]``. Read literally, it starts with ``P[i] = K[i]``, but
    it must start with ``P[i] = K[i+1]``. Here the ``multipliers`` of a reverse scan are defined that way.
    """
    if reverse:
        flipped = multipliers
        if multipliers is not None and multipliers.ndim > 0 and multipliers.shape[0] != 1:
            flipped = multipliers.flip(0)
        return linear_scan_hillis_steele(values.flip(0), flipped).flip(0)
    length = values.shape[0]
    states = values
    product = None
    if multipliers is not None:
        product = spread(multipliers, values)
        product = product.expand(length, *product.shape[1:])
    stride = 1
    while stride < length:
        carried = states[:-stride]
        if product is not None:
            carried = product[stride:] * carried
            product = torch.cat([product[:stride], product[stride:] * product[:-stride]])
        states = torch.cat([states[:stride], states[stride:] + carried])
        stride *= 2
    return states.clone() if states is values else states
