"""The rows of a tensor that steps read or write, one row per step: ``x[:, t]``, ``x[t : t + 2]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_ALL = ("slice", None, None, None)


@dataclass(frozen=True)
class Rows:
    """Evenly spaced rows of a tensor.

    index   the index that takes all of them at once
    dim     the dimension of the result along which the rows lie
    width   how many entries of that dimension a row has; None for a single entry, which drops the dimension
    stride  entries from one row to the next; negative if they are taken from the end
    """

    index: tuple[Any, ...]
    dim: int
    width: int | None
    stride: int

    @classmethod
    def of(cls, indices: Sequence[tuple[Any, ...]], shape: Sequence[Any]) -> Rows | None:
        """The rows ``indices[t]`` of a tensor of this shape. None if they are not evenly spaced rows."""
        plain = [_one_item_each(index, shape) for index in indices]
        first = plain[0]
        if first is None or any(p is None or len(p) != len(first) for p in plain):
            return None
        varying = [i for i in range(len(first)) if any(p[i] != first[i] for p in plain)]  # type: ignore[index]
        if len(varying) != 1:
            return None
        at = varying[0]
        items = [p[at] for p in plain]  # type: ignore[index]
        width: int | None = None
        if all(isinstance(item, tuple) for item in items):
            ends = [item[2] for item in items]
            items, steps = [item[1] for item in items], {item[3] for item in items}
            widths = (
                {end - start for start, end in zip(items, ends, strict=True)} if None not in (*ends, *items) else set()
            )
            if len(widths) != 1 or not steps <= {None, 1}:
                return None
            width = widths.pop()
        if not all(type(item) is int for item in items) or width == 0:
            return None
        spaced = evenly(items)
        if spaced is None:
            return None
        stride = spaced[1]
        stop = max(items) + (width or 1)
        index = [*first[:at], ("slice", min(items), stop, abs(stride) if width is None else None), *first[at + 1 :]]
        return cls(tuple(index), sum(type(item) is not int for item in first[:at]), width, stride)


def evenly(numbers: Sequence[int]) -> tuple[int, int] | None:
    """First number and stride, if the numbers are evenly spaced and not all the same."""
    stride = numbers[1] - numbers[0]
    if stride == 0 or any(n != numbers[0] + t * stride for t, n in enumerate(numbers)):
        return None
    return numbers[0], stride


def _one_item_each(index: tuple[Any, ...], shape: Sequence[Any]) -> tuple[Any, ...] | None:
    """The index with one item per dimension (and None for new ones), with numbers counted from 0. None if a number
    counts back from a symbolic size.
    """
    missing = len(shape) - sum(item is not None and item is not Ellipsis for item in index)
    items: list[Any] = []
    for item in index:
        items += [_ALL] * missing if item is Ellipsis else [item]
    if Ellipsis not in index:
        items += [_ALL] * missing
    sizes = iter(shape)
    for place, item in enumerate(items):
        size = None if item is None else next(sizes)
        if type(item) is int and item < 0:
            if not isinstance(size, int):
                return None
            items[place] = item + size
        elif isinstance(item, tuple) and item != _ALL and isinstance(size, int):
            start, stop, step = slice(*item[1:]).indices(size)
            items[place] = _ALL if (start, stop, step) == (0, size, 1) else ("slice", start, stop, step)
    return tuple(items)
