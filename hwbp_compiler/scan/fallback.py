"""The scan in plain torch operators, for devices and machines without a kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import accumulator
from .reference import spread

# Rows this wide keep the machine busy one link at a time. Narrower ones are cut into blocks of links.
_WIDE = 16384


def linear_scan_torch(
    values: Tensor, multipliers: Tensor | None, reverse: bool, initial: Tensor | None = None
) -> Tensor:
    """``torch.ops.highway.linear_scan`` as a loop over links, or over blocks of links that advance together."""
    if initial is not None:
        # One more link; its multiplier has nothing to multiply.
        values = torch.cat([values, initial[None]] if reverse else [initial[None], values])
        if multipliers is not None and multipliers.ndim > 0 and multipliers.shape[0] == values.shape[0] - 1:
            unused = multipliers.new_ones((1, *multipliers.shape[1:]))
            multipliers = torch.cat([multipliers, unused] if reverse else [unused, multipliers])
    dtype = accumulator(values.dtype)
    a = values.to(dtype)
    if multipliers is None:
        m = a.new_ones(()).expand((a.shape[0],) + (1,) * (a.ndim - 1))
    else:
        m = spread(multipliers, values).to(dtype)
        m = m.expand(a.shape[0], *m.shape[1:])
    if reverse:
        a, m = a.flip(0), m.flip(0)
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    length, columns = a.shape[0], math.prod(a.shape[1:])
    if length < 64 or columns >= _WIDE or not _scan_blocks(a, m, out, math.isqrt(length)):
        _scan_links(a, m, out, 0)
    if reverse:
        out = out.flip(0)
    return out.to(values.dtype)


def _scan_links(a: Tensor, m: Tensor, out: Tensor, first: int) -> None:
    """One link after the other from link ``first``; the states before it are already in ``out``."""
    for i in range(first, a.shape[0]):
        if i == 0:
            out[0] = a[0]
        else:
            torch.addcmul(a[i], m[i], out[i - 1], out=out[i])


def _scan_blocks(a: Tensor, m: Tensor, out: Tensor, block: int) -> bool:
    """Scan blocks of ``block`` links side by side, in about ``2 sqrt(L)`` steps instead of L.

    Every block is scanned from zero. Then the carries pass from block to block, and ``carry * product of the block's
    multipliers`` is added. Returns False if a product or a carry overflows: infinity times zero is not a number, while
    the scan link by link has a finite or an infinite state.
    """
    blocks = a.shape[0] // block
    head = blocks * block

    def cut(x: Tensor) -> Tensor:
        return x[:head].unflatten(0, (blocks, block)).transpose(0, 1)

    a_block, m_block, local = cut(a), cut(m), cut(out)
    product = torch.empty_like(m_block)
    local[0] = a_block[0]
    product[0] = m_block[0]
    for j in range(1, block):
        torch.addcmul(a_block[j], m_block[j], local[j - 1], out=local[j])
        torch.mul(m_block[j], product[j - 1], out=product[j])
    for b in range(1, blocks):
        local[:, b].addcmul_(product[:, b], local[-1, b - 1])
    # Either overflow shows at the end of a block. On an accelerator this check would wait for the device; there the
    # scan is normally compiled, and this code is only a fallback.
    if a.device.type == "cpu" and not bool(torch.isfinite(local[-1]).all()):
        return False
    _scan_links(a, m, out, head)
    return True
