"""Sizes as plain numbers, for estimates and reports: comparing a symbol would specialise the graph to its size."""

from __future__ import annotations

import torch


def hint(size: int | torch.SymInt) -> int:
    """The example value of a symbolic size; 1 if there is none."""
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else 1


def bytes_of(value: object) -> int:
    """Bytes of a node's value, summed if it is a tuple or list. A symbolic size counts as its hint."""
    if isinstance(value, (tuple, list)):
        return sum(bytes_of(v) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    total = value.element_size()
    for size in value.shape:
        total *= hint(size)
    return total
