"""The order of a state's elements after permutations, also with sizes known only at run time.

An order is written like a tensor's strides: factors ``(size, stride)``, outermost first. They say that element ``(i, j,
...)`` is number ``i * stride_i + j * stride_j + ...`` of the state. A view keeps the order. A permutation splits the
factors into groups, one per dimension, and moves the groups. Sizes are ints or sympy expressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

Factor = tuple[Any, Any]
Order = tuple[Factor, ...]

AS_IT_WAS: Order = ()
"""The order of the state itself."""


def permuted(order: Order | None, shape: Sequence, dims: Sequence[int]) -> Order | None:
    """The order of a tensor of ``shape`` after ``permute(dims)``. None, also as ``order``, means unknown."""
    groups = None if order is None else _strided(shape) if order == AS_IT_WAS else _grouped(order, shape)
    return None if groups is None else _joined([factor for d in dims for factor in groups[d]])


def _strided(shape: Sequence) -> list[list[Factor]]:
    """The factors of a contiguous tensor, one per dimension."""
    groups: list[list[Factor]] = []
    stride: Any = 1
    for size in reversed(shape):
        groups.insert(0, [(size, stride)])
        stride = _product(size, stride)
    return groups


def _grouped(order: Order, shape: Sequence) -> list[list[Factor]] | None:
    """The factors of each dimension of ``shape``. A factor is split if a dimension is part of it."""
    left, sizes = list(order), list(shape)
    front: list[list[Factor]] = []
    while sizes and (sizes[0] == 1 or left and left[0][0] == sizes[0]):
        front.append([left.pop(0)] if sizes.pop(0) != 1 else [])
    back: list[list[Factor]] = []
    for wanted in reversed(sizes[1:]):
        group: list[Factor] = []
        while wanted != 1:
            if not left:
                return None
            size, stride = left.pop()
            rest = _quotient(wanted, size)
            if rest is not None:
                group.insert(0, (size, stride))
                wanted = rest
                continue
            rest = _quotient(size, wanted)
            if rest is None and left:
                return None
            if rest is None:
                # The last factor has the size of all remaining dimensions together, so each of them divides it.
                rest = size / sympy.sympify(wanted)
            left.append((rest, _product(wanted, stride)))
            group.insert(0, (wanted, stride))
            wanted = 1
        back.insert(0, group)
    if not sizes:
        return None if left else front
    return [*front, left, *back]  # the remaining factors make up the outermost dimension


def _joined(factors: list[Factor]) -> Order:
    """The same order with as few factors as possible."""
    joined: list[Factor] = []
    for size, stride in factors:
        if size == 1:
            continue
        if joined and joined[-1][1] == _product(size, stride):
            size = _product(joined.pop()[0], size)
        joined.append((size, stride))
    return AS_IT_WAS if len(joined) < 2 else tuple(joined)


def _product(a: Any, b: Any) -> Any:
    return a * b if isinstance(a, int) and isinstance(b, int) else sympy.expand(a * b)


def _quotient(a: Any, b: Any) -> Any | None:
    """``a / b`` if that is a whole number for all sizes, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    found = sympy.cancel(sympy.sympify(a) / b)
    return found if sympy.fraction(found)[1] == 1 else None
