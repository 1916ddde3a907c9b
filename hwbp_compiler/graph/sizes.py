"""Sizes as plain numbers, for estimates and for what is told: to compare a symbol would tie the graph to its size."""

from __future__ import annotations

import torch


def hint(size: int | torch.SymInt) -> int:
    """A symbolic size as it was seen; 1 where it was not."""
    return size if isinstance(size, int) else size.node.hint if size.node.has_hint() else 1


def bytes_of(value: object) -> int:
    """Bytes of a node's value, of the tensors in it if it is a tuple or list; a symbolic size counts as its hint."""
    if isinstance(value, (tuple, list)):
        return sum(bytes_of(v) for v in value)
    if not isinstance(value, torch.Tensor):
        return 0
    total = value.element_size()
    for size in value.shape:
        total *= hint(size)
    return total
