"""The backward pass of a GRU layer in Highway-BP form (paper section 2: K is the update gate z)."""

from __future__ import annotations

import torch
from torch import Tensor

from hwbp_compiler.engine.segments import solve_segments
from hwbp_compiler.engine.solve import Highway, solve
from hwbp_compiler.engine.solve_tensors import TensorSeries
from hwbp_compiler.options import Truncation

from .layer import Gradients, Layer, at_the_last_state, column_sums, contributions, rows
from .runs import LayerRuns, Links, exact

MULTIPLIER = "sigmoid(...)"


def gradients(
    layer: Layer,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    truncation: Truncation | None,
) -> Gradients:
    """The gates r and z and the candidate n of every step are computed at once:

        h' = (1 - z) n + z h        n = tanh(W_in x + b_in + r (W_hn h + b_hn))

    Truncation None means exact backprop, one step after the other (``runs.exact``).
    """
    first, later = layer.state[0][0].to(layer.output.dtype), layer.output[:-1]  # the states before each step
    size = first.shape[-1]
    reset_update = _of_both(layer, first, later, slice(0, 2 * size))
    r, z = torch.sigmoid(reset_update.unflatten(-1, (2, size))).unbind(2)
    new = slice(2 * size, None)
    of_x, candidate_of_h = _of_input(layer, new), _of_states(layer, first, later, new)
    n = torch.tanh(of_x + r * candidate_of_h)
    into_n = (1 - z) * (1 - n * n)
    # ``into`` holds the factors that multiply a gradient of h' before a product with the weights: n on the side of x,
    # then r, z and n on the side of h. The first three lead through W_ih, the last three through W_hh. (h - n) z is h'
    # - n.
    of_z = (layer.output - n) * (1 - z)
    into = torch.stack([into_n, into_n * candidate_of_h * r * (1 - r), of_z, into_n * r], dim=2)
    c = contributions(layer, grad_output)
    last = at_the_last_state(c, grad_h_n)
    links = Links(c, z, None, into[:, :, 1:], layer.w_hh)
    w, of_first = exact(links, last) if truncation is None else _truncated(links, last, truncation)

    flat = rows(into * w.unsqueeze(2))
    of_ih, of_hh = flat[:, : 3 * size], flat[:, size:]
    sums = column_sums(flat)
    batch = first.shape[0]
    of_first_step = torch.mm(of_hh[:batch].t(), first)
    return Gradients(
        input=torch.mm(of_ih, _from_front(layer.w_ih, size)).view(layer.input.shape),
        state=(of_first.unsqueeze(0),),
        w_ih=_from_back(torch.mm(of_ih.t(), rows(layer.input)), size),
        w_hh=torch.addmm(of_first_step, of_hh[batch:].t(), rows(later)),
        b_ih=_from_back(sums[: 3 * size], size),
        b_hh=sums[size:],
    )


def _of_input(layer: Layer, gates: slice) -> Tensor:
    """[T, B, columns of ``gates``]"""
    weight = layer.w_ih[gates]
    of_x = torch.mm(rows(layer.input), weight.t()).view(*layer.input.shape[:2], weight.shape[0])
    return of_x if layer.b_ih is None else of_x + layer.b_ih[gates]


def _of_states(layer: Layer, first: Tensor, later: Tensor, gates: slice) -> Tensor:
    """The same for the states before each step, without joining these in memory."""
    weight = layer.w_hh[gates].t()
    of_h = torch.cat([torch.mm(first, weight), torch.mm(rows(later), weight)])
    of_h = of_h.view(*layer.output.shape[:2], weight.shape[1])
    return of_h if layer.b_hh is None else of_h + layer.b_hh[gates]


def _of_both(layer: Layer, first: Tensor, later: Tensor, gates: slice) -> Tensor:
    """Their sum. The second product is added to the first, without a separate tensor."""
    batch, weight = first.shape[0], layer.w_hh[gates].t()
    of_x = torch.mm(rows(layer.input), layer.w_ih[gates].t())
    both = torch.cat([torch.addmm(of_x[:batch], first, weight), torch.addmm(of_x[batch:], rows(later), weight)])
    both = both.view(*layer.output.shape[:2], weight.shape[1])
    return both if layer.b_ih is None or layer.b_hh is None else both + (layer.b_ih + layer.b_hh)[gates]


def _truncated(links: Links, last: Tensor, how: Truncation) -> tuple[Tensor, Tensor]:
    """w [T, B, H], and the resulting gradient at the state before the first step [B, H]. ``last`` is the gradient at
    the last state [B, H].
    """
    z, into, damping = links.multipliers, links.into, how.damping
    assert z is not None
    highway = Highway(order=(0,), k={(0, 0): z[1:]}, heads=[last], injected=[links.values[:-1]])
    series = TensorSeries(z.shape[0] - 1, [last])
    if how.segment > 1:
        runs = LayerRuns(links, how.segment)
        (w,) = solve_segments(series, highway, runs.cut, runs, how.iterations, damping, watched=how.watched)
        return w, runs.of_first[0]
    into_first = torch.zeros_like(last)

    def blocks(_: int, rows: list[Tensor]) -> list[Tensor]:
        nonlocal into_first
        (w,) = rows
        moved = _through_blocks(into, w, links.weight)
        into_first = moved[0] + damping * z[0] * w[0] if damping else moved[0]
        return [moved[1:]]

    (w,) = solve(series, highway, blocks, how.iterations, damping, watched=how.watched)
    return w, into_first + (1 - damping) * z[0] * w[0]


def _through_blocks(into: Tensor, w: Tensor, w_hh: Tensor) -> Tensor:
    """[T, B, H]. On a CPU in two halves, because the factor of W_hh is the largest tensor of an iteration."""
    steps = into.shape[0]
    by_halves = into.device.type == "cpu" and isinstance(steps, int) and steps > 1
    half = -(-steps // 2) if by_halves else steps
    parts = [slice(0, half), slice(half, steps)] if by_halves else [slice(None)]
    products = [torch.mm(rows(into[part] * w[part].unsqueeze(2)), w_hh) for part in parts]
    return (torch.cat(products) if by_halves else products[0]).view(w.shape)


def _from_front(weight: Tensor, size: int) -> Tensor:
    """Reorder (r, z, n) to (n, r, z)."""
    return torch.cat([weight[2 * size :], weight[: 2 * size]])


def _from_back(weight: Tensor, size: int) -> Tensor:
    """Reorder (n, r, z) to (r, z, n)."""
    return torch.cat([weight[size:], weight[:size]])
