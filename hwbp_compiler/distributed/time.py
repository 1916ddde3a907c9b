"""``recurrent``: a recurrence whose time dimension is sharded over the ranks of a mesh.

Rank s holds a stretch of the sequence, which is segment s. In the forward pass it waits for the state of the rank
before it, one part of the batch after another. In the backward pass, i_s is what the later ranks contribute at the last
state of segment s, and c is the losses' contribution at its own states:

    i^0       i_{s-1} = A_s + P_s i_s             A_s: the segment's own c's along the highway
    v_s       out_s(i^t_s) - P_s i^t_s            all ranks at once: one backward pass through the states of a stretch
    i^{t+1}   i_{s-1} = v_s + P_s i^{t+1}_s       one all-gather of v, then a scan on every rank

(e_s of docs/design.md, section 4.6, is i_s plus the c of that state; out_s includes all c's of the stretch.) The last
rank knows its i from the start, so everything it sends from the first round on is exact, and k = R - 1 is ordinary
backprop. Each of several stacked layers is a separate chain, the top one first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from hwbp_compiler.digest import source_digest

from .agreement import compared
from .errors import StageError, checked, refuse
from .faults import Watch, watch_of
from .layers import Layer, Run, layers_of

_WHERE = "distributed.recurrent"


def recurrent(
    module_or_cell: nn.Module,
    x_shard: Tensor,
    state: Any = None,
    *,
    mesh: DeviceMesh,
    iterations: int | Literal["exact"] = 4,
    segment: int | None = None,
    damping: float = 0.0,
    batches: int | None = None,
) -> tuple[Tensor, Any]:
    """Run a recurrence over a sequence whose time dimension is sharded over ``mesh``: each rank holds one stretch.

    Every rank must call this function, and must then call ``backward`` on something that depends on the result. A rank
    that has no loss uses ``0 * y.sum()``. The loss is the sum of the losses of all ranks. On each rank the parameters
    get the gradient of its own stretch; sum these over the mesh, as in context parallelism. A rank's stretch is a
    segment (docs/design.md, section 4.6, "Segments", and section 7).

    Args:
        module_or_cell: ``nn.GRU`` or ``nn.LSTM`` (any number of layers, one direction), ``nn.RNN`` (exact: it has no
            highway), or a module ``cell(x_t, state) -> (output, next_state)`` as for ``hwbp_compiler.recurrent``.
        x_shard: this rank's steps, ``[T_r, B, *]``, or ``[B, T_r, *]`` for a module with ``batch_first``. T_r may
            differ from rank to rank. If it is a ``DTensor`` sharded over ``mesh`` in that dimension, so is the output.
        state: the state before the first step of the whole sequence, in the form that the module takes. It must be the
            same on all ranks. None means zeros, which a cell does not allow. Its gradient arrives on rank 0.
        mesh: a mesh of one dimension; for a larger mesh pass ``mesh["name"]``. Its rank s holds the s-th stretch.
        iterations: k, an integer >= 0, or "exact". With R ranks, k >= R - 1 is ordinary backprop.
        segment: must be None. A segment is always a rank's stretch, and the gradient is exact inside it.
        damping: gamma, a number in [0, 1].
        batches: number of parts into which the batch is split. The parts pass through the ranks one after another in
            the forward pass. None: as many as there are ranks.

    Returns:
        The outputs of this shard, and the state after the last step of the whole sequence, on every rank.

    Raises:
        OptionError: a value is not allowed.
        StageError: the module cannot be run in this way.
        RankError: ranks differ in options, versions, or the shapes and dtypes of what they exchange.
    """
    # A rank that refuses leaves a note for the others, which wait for it.
    known = isinstance(mesh, DeviceMesh) and mesh.ndim == 1
    with _watch(mesh.get_group()).guarded() if known else contextlib.nullcontext():
        return _recurrent(module_or_cell, x_shard, state, mesh, iterations, segment, damping, batches)


def _recurrent(
    module_or_cell: nn.Module,
    x_shard: Tensor,
    state: Any,
    mesh: DeviceMesh,
    iterations: int | Literal["exact"],
    segment: int | None,
    damping: float,
    batches: int | None,
) -> tuple[Tensor, Any]:
    options = checked(_WHERE, iterations=iterations, damping=damping)
    if segment is not None:
        refuse(_WHERE, "segment", segment, "None: a rank's stretch is its segment, exact inside")
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        refuse(_WHERE, "batches", batches, "an integer >= 1")
    if mesh.ndim != 1:
        raise StageError(
            f'{_WHERE}: mesh has {mesh.ndim} dimensions; it takes one. Pass mesh["name of the time dimension"].'
        )
    time = int(getattr(module_or_cell, "batch_first", False))
    if not isinstance(x_shard, Tensor) or x_shard.ndim < 2 + isinstance(module_or_cell, nn.RNNBase):
        what = f"a tensor {list(x_shard.shape)}" if isinstance(x_shard, Tensor) else f"a {type(x_shard).__name__}"
        raise StageError(
            f"{_WHERE}: x_shard is {what}; it takes a tensor of this rank's steps, [T_r, B, *] (or [B, T_r, *] with "
            "batch_first). Give one sequence a batch of one, and pad packed ones."
        )
    x, wrap = _local(x_shard, mesh, time)
    if x.shape[time] == 0:
        raise StageError(f"{_WHERE}: this rank's shard has no time step; every rank needs one at least.")
    x = x.transpose(0, time)
    ranks = mesh.size()
    exact = options.iterations == "exact" or int(options.iterations) >= ranks - 1
    layers = layers_of(module_or_cell, x, state, exact)
    how = _How(
        mesh.get_group(),
        tuple(layers),
        None if options.iterations == "exact" else int(options.iterations),
        float(options.damping),
        min(batches or ranks, x.shape[1]),
    )
    given = _states(module_or_cell, layers, x, state)
    weights = [p for layer in layers for p in layer.weights]
    _agree(how, x, given)
    y, *last = _Sharded.apply(how, len(given), x, *given, *weights)
    return wrap(y.transpose(0, time)), layers_state(module_or_cell, layers, state, last)


def _watch(group: dist.ProcessGroup) -> Watch:
    return watch_of(_WHERE, group, "a stretch of time")


@dataclass(frozen=True)
class _How:
    group: dist.ProcessGroup
    layers: tuple[Layer, ...]
    iterations: int | None
    damping: float
    batches: int

    @property
    def watch(self) -> Watch:
        return _watch(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)


class _Sharded(torch.autograd.Function):
    """(x, first state, weights) -> (y of this shard, last state): all layers, and what ranks exchange in both
    directions.
    """

    @staticmethod
    def forward(ctx: Any, how: _How, count: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        states = tensors[:count]
        ctx.how = how
        ctx.runs = []
        last: list[Tensor] = []
        rest = iter(states)
        for layer in how.layers:
            first = [next(rest) for _ in range(layer.width)]
            runs = _forward(how, layer, x, first, ctx.needs_input_grad[2] or bool(ctx.runs))
            ctx.runs.append(runs)
            x = torch.cat([run.output.detach() for run in runs], 1)
            last += [torch.cat(part, 0) for part in zip(*([s.detach() for s in run.last] for run in runs), strict=True)]
        for part in last:
            dist.broadcast(part, group=how.group, group_src=how.ranks - 1)
        return (x, *last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor, *of_last: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.how.watch.guarded():
            return _Sharded._backward(ctx, of_y, of_last)

    @staticmethod
    def _backward(ctx: Any, of_y: Tensor, of_last: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        how: _How = ctx.how
        incoming = [g.contiguous().clone() for g in of_last]
        for part in incoming:
            dist.all_reduce(part, group=how.group)
        of_weights: list[Tensor | None] = []
        of_states: list[Tensor] = []
        rest = list(incoming)
        for layer, runs in zip(reversed(how.layers), reversed(ctx.runs), strict=True):
            head = rest[len(rest) - layer.width :]
            del rest[len(rest) - layer.width :]
            end = _joined(how, layer, runs, of_y, head)
            parts = of_y.split([run.batch for run in runs], 1), *(e.split([run.batch for run in runs]) for e in end)
            with how.watch.computing("it runs its steps backward"):
                results = [run.gradients(c, list(e)) for run, c, *e in zip(runs, *parts, strict=True)]
            of_first = [torch.cat(part) for part in zip(*(r.state for r in results), strict=True)]
            of_states = [*(g if how.rank == 0 else torch.zeros_like(g) for g in of_first), *of_states]
            of_layer = [_sum(parts) for parts in zip(*(r.weights for r in results), strict=True)]
            of_weights = [*of_layer, *of_weights]
            if results[0].input is not None:
                of_y = torch.cat([r.input for r in results], 1)  # type: ignore[misc]
        of_x = of_y if ctx.needs_input_grad[2] else None
        return None, None, of_x, *of_states, *of_weights


def _forward(how: _How, layer: Layer, x: Tensor, first: list[Tensor], wanted: bool) -> list[Run]:
    """Run the stretch, one part of the batch after another. Each part waits for the state from the rank before and then
    sends on its own.
    """
    runs, sent = [], []
    parts = zip(x.chunk(how.batches, 1), *(s.chunk(how.batches, 0) for s in first), strict=True)
    for part, *state in parts:
        state = [s.detach().clone() for s in state]
        if how.rank > 0:
            for s in state:
                dist.recv(s, group=how.group, group_src=how.rank - 1)
        with how.watch.computing("it runs its steps forward"):
            run = Run.of(layer, part, state, wanted)
            _same_forms(state, run.last)
        runs.append(run)
        if how.rank < how.ranks - 1:
            for s in run.last:
                tensor = s.detach().contiguous()
                sent.append((dist.isend(tensor, group=how.group, group_dst=how.rank + 1), tensor))
    for work, _ in sent:
        work.wait()  # type: ignore[union-attr]
    return runs


def _same_forms(first: list[Tensor], last: Sequence[Tensor]) -> None:
    """Check that a rank sends what the next one has allocated."""
    before, after = ([(tuple(t.shape), t.dtype) for t in state] for state in (first, last))
    if before != after:
        raise StageError(
            f"{_WHERE}: the state is {before} before this rank's steps and {after} after them; it must keep its form. "
            "Under autocast, pass a state in the dtype that the cell returns, or call this outside of autocast."
        )


def _joined(how: _How, layer: Layer, runs: list[Run], of_y: Tensor, head: list[Tensor]) -> list[Tensor]:
    """i^k of this rank: what later ranks contribute at the last state of its stretch, [B, *] per component."""
    rank, last = how.rank, how.ranks - 1
    width = layer.width
    sizes = [run.batch for run in runs]
    zeros = [torch.zeros_like(h) for h in head]
    mine = head if rank == last else zeros
    if last == 0:
        return mine

    def cut(end: list[Tensor]) -> Iterator[list[Tensor]]:
        return (list(part) for part in zip(*(e.split(sizes) for e in end), strict=True))

    def through(end: list[Tensor]) -> list[Tensor]:
        """out_s"""
        with how.watch.computing("it runs its steps backward, through their states"):
            found = [run.through(c, e) for run, c, e in zip(runs, of_y.split(sizes, 1), cut(end), strict=True)]
        return [torch.cat(part) for part in zip(*found, strict=True)]

    exact = how.iterations is None or how.iterations >= last or not layer.support
    if exact:
        # One stretch after the other; no highway is used.
        for s in range(last, 0, -1):
            rows = _gather(how, through(mine) if rank == s else zeros)
            if rank == s - 1:
                mine = rows[s]
        return mine

    with how.watch.computing("it computes its highway"):
        diagonals = [run.diagonals(how.damping) for run in runs]
        own = _concatenated([d.product for d in diagonals])
        parts = zip(runs, diagonals, of_y.split(sizes, 1), cut(mine), strict=True)
        along = [run.along(d, c, e) for run, d, c, e in parts]
    values = [torch.cat(part) for part in zip(*along, strict=True)]
    pairs = sorted(layer.support)
    gathered = _gather(how, [*(own[pair] for pair in pairs), *values])
    products = [dict(zip(pairs, rows, strict=False)) for rows in gathered]
    sent = [rows[len(pairs) :] for rows in gathered]

    def scan() -> list[Tensor]:
        end = head if rank == last else sent[last]
        for s in range(last - 1, rank, -1):
            end = [a + b for a, b in zip(sent[s], times(products[s], end), strict=True)]
        return end

    for t in range(how.iterations or 0):
        end = scan()
        if t == 0 or rank < last - t + 1:  # values that are exact already do not change
            values = through(end)
            if rank != last:
                values = [a - b for a, b in zip(values, times(products[rank], end), strict=True)]
        sent = _gather(how, values)
    assert len(sent[0]) == width
    return scan()


def times(product: dict[tuple[int, int], Tensor], end: Sequence[Tensor]) -> list[Tensor]:
    """P i; P holds a diagonal per (to, from)."""
    found = [torch.zeros_like(e) for e in end]
    for (to, source), diagonal in product.items():
        found[to] = found[to] + diagonal * end[source]
    return found


def _concatenated(products: list[dict[tuple[int, int], Tensor]]) -> dict[tuple[int, int], Tensor]:
    return {pair: torch.cat([p[pair] for p in products]) for pair in products[0]}


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [p for p in parts if p is not None]
    return sum(found[1:], found[0]) if found else None


def _gather(how: _How, rows: list[Tensor]) -> list[list[Tensor]]:
    """The rows of all ranks, in order, by one all-gather."""
    flat = torch.cat([r.reshape(-1) for r in rows])
    everyone = [torch.empty_like(flat) for _ in range(how.ranks)]
    dist.all_gather(everyone, flat, group=how.group)
    sizes = [r.numel() for r in rows]
    return [[p.view_as(r) for p, r in zip(f.split(sizes), rows, strict=True)] for f in everyone]


def _local(x: Tensor, mesh: DeviceMesh, time: int) -> tuple[Tensor, Any]:
    """The rank's own steps, and a function that gives outputs the form of the input."""
    if not isinstance(x, DTensor):
        return x, lambda y: y
    if x.device_mesh != mesh or tuple(x.placements) != (Shard(time),):
        raise StageError(
            f"{_WHERE}: x_shard is a DTensor with placements {x.placements} on {x.device_mesh}; it takes "
            f"(Shard({time}),) on the given mesh. Redistribute it, or pass plain tensors."
        )
    length = x.shape[time]

    def wrap(y: Tensor) -> Tensor:
        shape = list(y.shape)
        shape[time] = length
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(y.contiguous(), mesh, [Shard(time)], shape=torch.Size(shape), stride=stride)

    return x.to_local(), wrap


def _states(module: nn.Module, layers: Sequence[Layer], x: Tensor, state: Any) -> list[Tensor]:
    """The first state, layer by layer, [B, *] per component."""
    if isinstance(module, nn.RNNBase):
        parts = None if state is None else [state] if isinstance(state, Tensor) else list(state)
        shape = x.shape[1], module.hidden_size
        if parts is None:
            return [x.new_zeros(shape) for layer in layers for _ in range(layer.width)]
        wanted = layers[0].width, (len(layers), *shape)
        if len(parts) != wanted[0] or any(tuple(p.shape) != wanted[1] for p in parts):
            raise StageError(
                f"{_WHERE}: state holds {[tuple(p.shape) for p in parts]}; {type(module).__name__} takes {wanted[0]} "
                f"of shape {wanted[1]} here."
            )
        return [part[number] for number in range(len(layers)) for part in parts]
    (layer,) = layers
    return layer.flat(state)  # type: ignore[attr-defined,no-any-return]


def layers_state(module: nn.Module, layers: Sequence[Layer], given: Any, last: list[Tensor]) -> Any:
    """``last``, layer by layer, in the form that the module returns."""
    if not isinstance(module, nn.RNNBase):
        (layer,) = layers
        return layer.structured(last)  # type: ignore[attr-defined]
    width = layers[0].width
    parts = tuple(torch.stack(last[c::width]) for c in range(width))
    return parts if isinstance(module, nn.LSTM) else parts[0]


def _agree(how: _How, x: Tensor, states: Sequence[Tensor]) -> None:
    """Check what must be the same on all ranks in every call. A rank that differs would leave the others waiting."""
    mine = {
        "torch": torch.__version__,
        "hwbp_compiler (a hash of its sources)": source_digest()[:16],
        "iterations": "exact" if how.iterations is None else how.iterations,
        "damping": how.damping,
        "batches": how.batches,
        "the form of a step": (tuple(x.shape[1:]), x.dtype),
        "the highway, as pairs (to, from) of parts of the state": [sorted(layer.support) for layer in how.layers],
        "the form of the state": tuple((tuple(s.shape), s.dtype) for s in states),
    }
    compared(_WHERE, mine, how.group, x.device)
    how.watch.agreed()
