"""``torch.ops.highway.linear_scan``: the scan of single tensors as one operator of the dispatcher."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_multipliers, check_values
from .cpu import linear_scan_cpu
from .fallback import linear_scan_torch
from .reference import spread

NAME = "highway::linear_scan"

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "linear_scan(Tensor values, Tensor? multipliers, bool reverse=False) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
operator = torch.ops.highway.linear_scan.default


def check(values: Tensor, multipliers: Tensor | None) -> None:
    check_values(values)
    if multipliers is not None:
        check_multipliers(values, multipliers)


def _cpu(values: Tensor, multipliers: Tensor | None, reverse: bool = False) -> Tensor:
    check(values, multipliers)
    return linear_scan_cpu(values, multipliers, reverse)


def _any_device(values: Tensor, multipliers: Tensor | None, reverse: bool = False) -> Tensor:
    check(values, multipliers)
    return linear_scan_torch(values, multipliers, reverse)


def _fake(values: Tensor, multipliers: Tensor | None, reverse: bool = False) -> Tensor:
    check(values, multipliers)
    return values.new_empty(values.shape)


library.impl("linear_scan", _cpu, "CPU")
library.impl("linear_scan", _any_device, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=library)


def previous(states: Tensor, reverse: bool) -> Tensor:
    """``states`` moved by one link: row i holds row i-1 (i+1 if ``reverse``), and zero where there is none."""
    if states.shape[0] == 0:
        return states
    rest = [0, 0] * (states.ndim - 1)
    return F.pad(states[1:], [*rest, 0, 1]) if reverse else F.pad(states[:-1], [*rest, 1, 0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None, bool], output: Tensor) -> None:
    _, multipliers, ctx.reverse = inputs
    ctx.save_for_backward(multipliers, output if ctx.needs_input_grad[1] else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """The adjoint of a scan is the scan of the other direction, with each multiplier moved by one link:
    ``g[i] = grad[i] + conj(m[i+1]) * g[i+1]``, and ``grad_m[i] = g[i] * conj(u[i-1])`` summed as m was spread.
    """
    multipliers, states = ctx.saved_tensors
    adjoint = None
    if multipliers is not None:
        adjoint = multipliers.conj()
        if multipliers.ndim > 0 and multipliers.shape[0] != 1:
            adjoint = previous(adjoint, not ctx.reverse)
    grad_values = operator(grad, adjoint, not ctx.reverse)
    grad_multipliers = None
    if ctx.needs_input_grad[1]:
        full = grad_values * previous(states, ctx.reverse).conj()
        grad_multipliers = full.sum_to_size(spread(multipliers, full).shape).reshape(multipliers.shape)
    return grad_values, grad_multipliers, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context, lib=library)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, int | None, None],
    values: Tensor,
    multipliers: Tensor | None,
    reverse: bool = False,
) -> tuple[Tensor, int]:
    """The mapped dimension becomes one more column dimension, right behind the length."""
    values_dim, multipliers_dim = in_dims[:2]
    if values_dim is None:
        values = values.unsqueeze(1).expand(values.shape[0], info.batch_size, *values.shape[1:])
    else:
        values = values.movedim(values_dim, 1) if values.ndim > 1 else values
    if multipliers is not None:
        if multipliers_dim is not None:
            multipliers = multipliers.movedim(multipliers_dim, 0)
            single = multipliers[0]
            multipliers = multipliers.unsqueeze(0) if single.ndim == 0 else multipliers.movedim(0, 1)
            multipliers = spread(multipliers, values)
        elif multipliers.ndim > 1:
            multipliers = multipliers.unsqueeze(1)
    return operator(values, multipliers, reverse), 1


torch.library.register_vmap(NAME, _vmap, lib=library)
