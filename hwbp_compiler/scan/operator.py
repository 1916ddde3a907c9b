"""``torch.ops.highway.linear_scan``: the scan of single tensors as one operator of the dispatcher.

``linear_scan(values, multipliers, reverse=False, initial=None)``. With ``initial``, a state of the shape of one link,
the scan starts from it and the result has one more row: ``initial`` itself, as the first row, or as the last with
``reverse``. So a graph need not concatenate the result with the initial state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hwbp_compiler.torch_private import (
    AutoDispatchBelowAutograd,
    DispatchKeySet,
    SingleLevelFunction,
    after_autograd_keyset,
    enable_single_level_autograd_function,
    functorch_levels,
    set_forward_grad_enabled,
)

from .checks import check_initial, check_multipliers, check_values
from .cpu import linear_scan_cpu
from .fallback import linear_scan_torch
from .reference import spread

NAME = "highway::linear_scan"

library = torch.library.Library("highway", "FRAGMENT")
library.define(
    "linear_scan(Tensor values, Tensor? multipliers, bool reverse=False, Tensor? initial=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
operator = torch.ops.highway.linear_scan.default


def check(values: Tensor, multipliers: Tensor | None, initial: Tensor | None) -> None:
    check_values(values)
    if multipliers is not None:
        check_multipliers(values, multipliers)
    if initial is not None:
        check_initial(values, initial)


def _cpu(values: Tensor, multipliers: Tensor | None, reverse: bool = False, initial: Tensor | None = None) -> Tensor:
    check(values, multipliers, initial)
    return linear_scan_cpu(values, multipliers, reverse, initial)


def _any_device(
    values: Tensor, multipliers: Tensor | None, reverse: bool = False, initial: Tensor | None = None
) -> Tensor:
    check(values, multipliers, initial)
    return linear_scan_torch(values, multipliers, reverse, initial)


def _fake(values: Tensor, multipliers: Tensor | None, reverse: bool = False, initial: Tensor | None = None) -> Tensor:
    check(values, multipliers, initial)
    rows = values.shape[0] if initial is None else values.shape[0] + 1
    return values.new_empty((rows, *values.shape[1:]))


library.impl("linear_scan", _cpu, "CPU")
library.impl("linear_scan", _any_device, "CompositeExplicitAutograd")
torch.library.register_fake(NAME, _fake, lib=library)


def previous(states: Tensor, reverse: bool) -> Tensor:
    """``states`` shifted by one link: row i holds row i-1 (i+1 if ``reverse``), or zero if there is none."""
    if states.shape[0] == 0:
        return states
    rest = [0, 0] * (states.ndim - 1)
    return F.pad(states[1:], [*rest, 0, 1]) if reverse else F.pad(states[:-1], [*rest, 1, 0])


# torch.library.register_autograd does not support forward mode: it silently drops the tangents. And its functions
# cannot be called inside torch.func.grad. torch.func derives this class itself for the level of a transform, and at
# that level the dispatcher calls an Autograd kernel.
class _Scan(SingleLevelFunction):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        multipliers: Tensor | None,
        reverse: bool,
        initial: Tensor | None,
        below: DispatchKeySet,
    ) -> Tensor:
        # apply turns both modes off, but the call below may be the kernel of an outer transform.
        with torch.enable_grad(), set_forward_grad_enabled(True), AutoDispatchBelowAutograd():
            states = operator.redispatch(below, values, multipliers, reverse, initial)
        ctx.reverse, ctx.starts = reverse, initial is not None
        ctx.save_for_backward(multipliers, states if ctx.needs_input_grad[1] else None)
        ctx.save_for_forward(values, multipliers, initial)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        """The adjoint of a scan is the scan in the other direction, with each multiplier shifted by one link: ``g[i] =
        grad[i] + conj(m[i+1]) * g[i+1]``, and ``grad_m[i] = g[i] * conj(u[i-1])``, summed over the dimensions in which
        m was broadcast. With an initial state no shift is needed: it is one row, followed by L links.
        """
        multipliers, states = ctx.saved_tensors
        adjoint = None if multipliers is None else multipliers.conj()
        grad_initial = None
        if ctx.starts:
            first, rest = _first_and_rest(grad, not ctx.reverse)
            grad_initial, grad_values = _first_and_rest(operator(rest, adjoint, not ctx.reverse, first), ctx.reverse)
        else:
            if adjoint is not None and adjoint.ndim > 0 and adjoint.shape[0] != 1:
                adjoint = previous(adjoint, not ctx.reverse)
            grad_values = operator(grad, adjoint, not ctx.reverse)
        grad_multipliers = None
        if ctx.needs_input_grad[1]:
            full = grad_values * _before(states, ctx.reverse, ctx.starts).conj()
            grad_multipliers = full.sum_to_size(spread(multipliers, full).shape).reshape(multipliers.shape)
        return grad_values, grad_multipliers, None, grad_initial, None

    @staticmethod
    def jvp(
        ctx: Any, values: Tensor | None, multipliers: Tensor | None, _: Any, initial: Tensor | None, *__: Any
    ) -> Tensor:
        """Also a scan: ``du[i] = da[i] + dm[i] * u[i-1] + m[i] * du[i-1]``, for tangents da and dm."""
        levels = functorch_levels.get_interpreter_stack() or []
        if sum(level.key() == functorch_levels.TransformType.Jvp for level in levels) > 1:
            # Torch turns forward mode off in here, so the outer tangents would be lost.
            raise NotImplementedError(
                "linear_scan: forward mode within forward mode (jvp of jvp, jacfwd of jacfwd) is not supported; "
                "make one of the two reverse mode (torch.func.hessian, jacfwd of jacrev)"
            )
        primal, factor, start = ctx.saved_tensors
        fed = torch.zeros_like(primal) if values is None else values
        if multipliers is not None:
            # Computed again, because the output of forward does not depend on the inputs yet.
            states = operator(primal, factor, ctx.reverse, start)
            fed = fed + spread(multipliers, primal) * _before(states, ctx.reverse, ctx.starts)
        if ctx.starts and initial is None:
            initial = torch.zeros_like(start)
        return operator(fed, factor, ctx.reverse, initial)


def _first_and_rest(rows: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The row with which a scan in this direction starts, and the others."""
    return (rows[-1], rows[:-1]) if reverse else (rows[0], rows[1:])


def _before(states: Tensor, reverse: bool, starts: bool) -> Tensor:
    """The state before each link, from a scan's result."""
    if not starts:
        return previous(states, reverse)
    return states[1:] if reverse else states[:-1]


def _autograd(
    keys: DispatchKeySet,
    values: Tensor,
    multipliers: Tensor | None,
    reverse: bool = False,
    initial: Tensor | None = None,
) -> Tensor:
    below = keys & after_autograd_keyset
    with enable_single_level_autograd_function():
        states: Tensor = _Scan.apply(values, multipliers, reverse, initial, below)
    return states


library.impl("linear_scan", _autograd, "Autograd", with_keyset=True)


def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    values: Tensor,
    multipliers: Tensor | None,
    reverse: bool = False,
    initial: Tensor | None = None,
) -> tuple[Tensor, int]:
    """The mapped dimension becomes one more column dimension, directly after the length."""
    values_dim, multipliers_dim, _, initial_dim = (*in_dims, None, None)[:4]
    if values.ndim == (values_dim is not None):
        check_values(values.new_empty(()))  # raises with a message
    if values_dim is None:
        values = values.unsqueeze(1).expand(values.shape[0], info.batch_size, *values.shape[1:])
    else:
        values = values.movedim(values_dim, 1)
    if multipliers is not None:
        if multipliers_dim is not None:
            multipliers = multipliers.movedim(multipliers_dim, 0)
            single = multipliers[0]
            multipliers = multipliers.unsqueeze(0) if single.ndim == 0 else multipliers.movedim(0, 1)
            multipliers = spread(multipliers, values)
        elif multipliers.ndim > 1:
            multipliers = multipliers.unsqueeze(1)
    if initial is not None:
        if initial_dim is None:
            initial = initial.expand(info.batch_size, *initial.shape)
        else:
            initial = initial.movedim(initial_dim, 0)
    return operator(values, multipliers, reverse, initial), 1


torch.library.register_vmap(NAME, _vmap, lib=library)
