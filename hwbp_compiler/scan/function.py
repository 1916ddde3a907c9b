"""``hwbp_compiler.linear_scan``: the public scan, over tensors or over small tuples of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number
from typing import TypeAlias, overload

import torch
from torch import Tensor

from .checks import check_multipliers, check_values
from .operator import operator, previous
from .reference import spread

# What may multiply a component; None means one for every link.
Multiplier: TypeAlias = "Tensor | float | complex | None"


@overload
def linear_scan(values: Tensor, multipliers: Multiplier = None, *, reverse: bool = False) -> Tensor: ...
@overload
def linear_scan(
    values: Sequence[Tensor], multipliers: Sequence[Sequence[Multiplier]], *, reverse: bool = False
) -> tuple[Tensor, ...]: ...
def linear_scan(values, multipliers=None, *, reverse=False):
    """Compute the linear recurrence ``u[i] = values[i] + multipliers[i] * u[i-1]`` along dim 0, with ``u[-1] = 0``.

    With ``reverse=True`` it runs the other way, ``u[i] = values[i] + multipliers[i] * u[i+1]``. This is
    ``linear_scan(values.flip(0), multipliers.flip(0)).flip(0)``. The scan does not use the multiplier of the link that
    it starts with. The paper's ``CumSumProd(a, K)`` is the reverse scan with ``multipliers[i] = K[i+1]``.

    Args:
        values: tensor of shape ``[L, *columns]``, L >= 0, any strides, of dtype float16, bfloat16, float32,
            float64, complex64 or complex128. The 16-bit types are accumulated in float32.
        multipliers: the factors between one link and the next, of the dtype and on the device of ``values``:

            * ``None``: one everywhere, which gives a cumulative sum;
            * a number or a 0-d tensor: the same for all links and columns;
            * a tensor ``[L]`` (or ``[1]``): one multiplier per link;
            * a tensor with as many dimensions as ``values``; each has the same size as in ``values``, or 1.

            A 1-d tensor always runs along the length. Write a vector over the last dimension as ``[1, ..., 1, D]``.
        reverse: run from the last link to the first.

    Returns:
        A new contiguous tensor of the shape and dtype of ``values``.

    Raises:
        TypeError: an argument has a wrong type or dtype, or values and multipliers have different dtypes.
        ValueError: the shapes do not fit, the values have no dimension, or the devices differ.

    **Tuples.** A state may have several components, where each depends on itself and on those before it (an LSTM's
    hidden state depends on the cell state). Then ``values`` is a tuple of tensors ``[L, *columns]`` of one shape, and
    ``multipliers`` is a lower-triangular tuple, whose row j has j + 1 entries::

        u_j[i] = values[j][i] + sum over k <= j of multipliers[j][k][i] * u_k[i-1]

    Every entry is a multiplier as above; ``None`` means one, and the number ``0`` means no path at all. The result is
    a tuple. An example is ``linear_scan((c, h), ((f,), (o, 0)))``. Each component takes one scan.

    The scan can be differentiated any number of times, also under ``torch.compile`` and with ``torch.func``. Forward
    mode works once, over any number of reverse modes. Forward mode within forward mode is refused, because torch would
    lose the outer tangent.

    >>> linear_scan(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0, 0.5, 2.0]))
    tensor([1.0000, 1.5000, 4.0000])
    >>> linear_scan(torch.tensor([1.0, 1.0, 1.0]), reverse=True)
    tensor([3., 2., 1.])
    """
    if not isinstance(reverse, bool):
        raise TypeError(f"linear_scan: reverse is {reverse!r}; allowed are True and False")
    if isinstance(values, Tensor):
        return operator(values, _tensor(multipliers, values, "multipliers"), reverse)
    if isinstance(values, (tuple, list)):
        return _scan_components(values, multipliers, reverse)
    raise TypeError(f"linear_scan: values is {type(values).__name__}; allowed are a tensor or a tuple of tensors")


def _tensor(multiplier: object, values: Tensor, name: str) -> Tensor | None:
    """A multiplier as the operator takes it: None, or a tensor whose shape and dtype the operator checks."""
    if multiplier is None:
        return None
    if isinstance(multiplier, Number) and not isinstance(multiplier, bool):
        if isinstance(multiplier, complex) and not values.dtype.is_complex:
            raise TypeError(f"linear_scan: {name} is {multiplier!r}, values are {values.dtype}")
        return torch.full((), multiplier, dtype=values.dtype, device=values.device)  # type: ignore[arg-type]
    if not isinstance(multiplier, Tensor):
        raise TypeError(f"linear_scan: {name} is {type(multiplier).__name__}; allowed are None, a number or a tensor")
    return multiplier


def _entry(multipliers: Sequence[Sequence[object]], j: int, k: int, values: Tensor) -> Tensor | None:
    name = f"multipliers[{j}][{k}]"
    multiplier = _tensor(multipliers[j][k], values, name)
    if multiplier is not None:
        check_multipliers(values, multiplier, name)
    return multiplier


def _scan_components(values: Sequence[Tensor], multipliers: object, reverse: bool) -> tuple[Tensor, ...]:
    _check_components(values, multipliers)
    assert isinstance(multipliers, (tuple, list))
    states: list[Tensor] = []
    for j, (component, row) in enumerate(zip(values, multipliers, strict=True)):
        fed = component
        for k, state in enumerate(states):
            if not _is_zero(row[k]):
                factor = _entry(multipliers, j, k, component)
                carried = state if factor is None else _moved(factor, state, reverse) * state
                fed = fed + previous(carried, reverse)
        if not _is_zero(row[j]):
            fed = operator(fed, _entry(multipliers, j, j, component), reverse)
        states.append(fed if fed is not component else component.clone(memory_format=torch.contiguous_format))
    return tuple(states)


def _moved(factor: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """The multipliers by which each state enters its successor, which are those of the successor."""
    if factor.ndim > 0 and factor.shape[0] != 1:
        factor = previous(factor, not reverse)
    return spread(factor, state)


def _is_zero(multiplier: object) -> bool:
    return isinstance(multiplier, Number) and multiplier == 0


def _check_components(values: Sequence[Tensor], multipliers: object) -> None:
    if not values:
        raise ValueError("linear_scan: values is an empty tuple; at least one component is needed")
    if not isinstance(multipliers, (tuple, list)) or len(multipliers) != len(values):
        raise TypeError(
            f"linear_scan: multipliers must be a lower-triangular tuple of {len(values)} rows, "
            f"one for each component of values"
        )
    for j, component in enumerate(values):
        if not isinstance(component, Tensor):
            raise TypeError(f"linear_scan: values[{j}] is {type(component).__name__}; a tensor is needed")
        check_values(component, f"values[{j}]")
        first = values[0]
        if component.shape != first.shape or component.dtype != first.dtype or component.device != first.device:
            raise ValueError(
                f"linear_scan: values[{j}] is {list(component.shape)} {component.dtype} on {component.device}, "
                f"values[0] is {list(first.shape)} {first.dtype} on {first.device}; they must agree"
            )
        row = multipliers[j]
        if not isinstance(row, (tuple, list)) or len(row) != j + 1:
            raise TypeError(
                f"linear_scan: multipliers[{j}] must be a tuple of {j + 1} entries, for components 0 to {j}"
            )
