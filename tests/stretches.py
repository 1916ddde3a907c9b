"""Recurrences whose time steps are spread over gloo processes, and the oracle they are compared with.

The oracle follows docs/design.md, section 4.6, "Segments", step by step with ``torch.func.vjp`` in one process. A
rank's stretch is a segment, and each layer is a chain, the top one first. It shares no code with ``hwbp_compiler``.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import vjp

INPUT, HIDDEN, BATCH = 3, 4, 3
Tensors = tuple[Tensor, ...]


def keep(t: Tensor) -> Tensor:
    return t


def gru_step(w: dict[str, Tensor], x: Tensor, state: Tensors, hold: Callable[[Tensor], Tensor]) -> Tensors:
    (h,) = state
    of_x = x @ w["weight_ih"].T + w["bias_ih"]
    of_h = h @ w["weight_hh"].T + w["bias_hh"]
    (xr, xz, xn), (hr, hz, hn) = of_x.chunk(3, -1), of_h.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return (hold((1 - z) * n) + hold(z) * h,)


def lstm_step(w: dict[str, Tensor], x: Tensor, state: Tensors, hold: Callable[[Tensor], Tensor]) -> Tensors:
    h, c = state
    i, f, g, o = (x @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"]).chunk(4, -1)
    following = hold(torch.sigmoid(f)) * c + hold(torch.sigmoid(i) * torch.tanh(g))
    return hold(torch.sigmoid(o)) * torch.tanh(following), following


def rnn_step(w: dict[str, Tensor], x: Tensor, state: Tensors, hold: Callable[[Tensor], Tensor]) -> Tensors:
    return (hold(torch.tanh(x @ w["weight_ih"].T + w["bias_ih"] + state[0] @ w["weight_hh"].T + w["bias_hh"])),)


class Cell(nn.Module):
    """A cell whose state has two parts. The second part uses the next value of the first. The output uses both."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2 * HIDDEN, INPUT + HIDDEN) / 2)
        self.u = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 2)
        self.f = nn.Parameter(torch.rand(HIDDEN))
        self.q = nn.Parameter(torch.randn(HIDDEN, INPUT) / 2)

    def forward(self, x, state):
        a, b = state["a"], state["b"]
        z, n = (torch.cat([x, a], -1) @ self.w.T).chunk(2, -1)
        z = torch.sigmoid(z)
        following = z * a + (1 - z) * torch.tanh(n + b @ self.u.T)
        added = self.f * b + 0.5 * following
        output = torch.tanh(following) + (x @ self.q.T) * a
        return output, {"a": following, "b": added}


def cell_step(w: dict[str, Tensor], x: Tensor, state: Tensors, hold: Callable[[Tensor], Tensor]) -> Tensors:
    a, b = state
    z, n = (torch.cat([x, a], -1) @ w["w"].T).chunk(2, -1)
    z = torch.sigmoid(z)
    following = hold(z) * a + hold((1 - z) * torch.tanh(n + b @ w["u"].T))
    return following, w["f"] * b + 0.5 * following


def cell_output(w: dict[str, Tensor], x: Tensor, before: Tensors, after: Tensors) -> Tensor:
    return torch.tanh(after[0]) + (x @ w["q"].T) * before[0]


class Scalar(nn.Module):
    """K is the number 0.5, which is not computed."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(HIDDEN, INPUT + HIDDEN) / 2)

    def forward(self, x, state):
        following = 0.5 * state + torch.tanh(torch.cat([x, state], -1) @ self.w.T)
        return following, following


def scalar_step(w: dict[str, Tensor], x: Tensor, state: Tensors, hold: Callable[[Tensor], Tensor]) -> Tensors:
    return (0.5 * state[0] + hold(torch.tanh(torch.cat([x, state[0]], -1) @ w["w"].T)),)


def state_itself(w: dict[str, Tensor], x: Tensor, before: Tensors, after: Tensors) -> Tensor:
    return after[0]


STEPS = {
    "GRU": gru_step,
    "LSTM": lstm_step,
    "RNN": rnn_step,
    "GRUCell": gru_step,
    "Cell": cell_step,
    "Scalar": scalar_step,
}
OUTPUTS = {"Cell": cell_output}
CELLS = {"Cell": Cell, "Scalar": Scalar, "GRUCell": lambda: nn.GRUCell(INPUT, HIDDEN)}


@dataclass(frozen=True)
class Case:
    """``stretches``: steps per rank. ``losses``: "all", or "last" if only the last state has one."""

    kind: str
    stretches: tuple[int, ...]
    k: int | str = 1
    damping: float = 0.0
    layers: int = 1
    losses: str = "all"
    batches: int | None = None
    batch_first: bool = False
    state: bool = True
    frozen: bool = False
    dtensor: bool = False
    later: int | None = None  # iterations of rank 1 in a second call

    def build(self) -> nn.Module:
        torch.manual_seed(5)
        if self.kind in CELLS:
            return CELLS[self.kind]()
        module = getattr(nn, self.kind)(INPUT, HIDDEN, self.layers, batch_first=self.batch_first)
        if self.frozen:
            module.weight_ih_l0.requires_grad_(False)
        return module

    def data(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """x of the whole sequence, the first state, and weights of the losses of outputs and last states."""
        torch.manual_seed(6)
        steps = sum(self.stretches)
        parts = 2 if self.kind in ("LSTM", "Cell") else 1
        state = [torch.randn(self.layers, BATCH, HIDDEN) * float(self.state) for _ in range(parts)]
        return (
            torch.randn(steps, BATCH, INPUT),
            state,
            torch.randn(steps, BATCH, HIDDEN) * float(self.losses == "all"),
            torch.randn(parts, self.layers, BATCH, HIDDEN),
        )

    def shard(self, whole: Tensor, rank: int) -> Tensor:
        return whole.split(self.stretches)[rank]


def oracle(case: Case) -> dict[str, Tensor]:
    """Gradients of the sum of all ranks' losses: by parameter, of "x", and of "state" parts."""
    module = case.build()
    x, first, of_y, of_last = case.data()
    ranks = len(case.stretches)
    step, output = STEPS[case.kind], OUTPUTS.get(case.kind, state_itself)
    if case.kind in CELLS:
        weights, suffix = [{n: p.detach() for n, p in module.named_parameters()}], ""
    else:
        names = "weight_ih", "weight_hh", "bias_ih", "bias_hh"
        weights = [{n: getattr(module, f"{n}_l{i}").detach() for n in names} for i in range(case.layers)]
        suffix = "_l{}"
    sequences, states = [x], []
    for layer in range(case.layers):
        state: Tensors = tuple(part[layer] for part in first)
        states.append([state])
        for row in sequences[-1]:
            state = step(weights[layer], row, state, keep)
            states[-1].append(state)
        sequences.append(torch.stack([s[0] for s in states[-1][1:]]))
    found: dict[str, Tensor] = {}
    c = of_y
    for layer in reversed(range(case.layers)):
        w, inputs, before = weights[layer], sequences[layer], states[layer]
        head = tuple(part * ranks for part in of_last[:, layer])  # every rank has a loss of the last state

        def whole(t, g, w=w, inputs=inputs, before=before):
            return vjp(lambda s: step(w, inputs[t], s, keep), before[t])[1](g)[0]

        def along(t, g, w=w, inputs=inputs, before=before):
            back = vjp(lambda s: step(w, inputs[t], s, torch.Tensor.detach), before[t])[1](g)[0]
            return tuple((1 - case.damping) * b for b in back)

        def outward(t, g, w=w, inputs=inputs, before=before):
            return vjp(lambda *a: output(w, inputs[t], *a), before[t], before[t + 1])[1](g)

        ends = states_of(case, [outward(t, g) for t, g in enumerate(c)], head, whole, along)
        gradient_of = {n: torch.zeros_like(p) for n, p in w.items()}
        of_x = []
        for t, g in enumerate(ends[1:]):
            of_w, of_row = vjp(
                lambda w, r, t=t, before=before: (
                    step(w, r, before[t], keep),
                    output(w, r, before[t], before[t + 1]),
                ),
                w,
                inputs[t],
            )[1]((g, c[t]))
            gradient_of = {n: gradient_of[n] + of_w[n] for n in w}
            of_x.append(of_row)
        found |= {n + suffix.format(layer): g for n, g in gradient_of.items()}
        found |= {f"state{part}_l{layer}": g for part, g in enumerate(ends[0])}
        c = torch.stack(of_x)
    return found | {"x": c}


def states_of(case: Case, outward: list[tuple[Tensors, Tensors]], head: Tensors, whole, along) -> list[Tensors]:
    """w_0 .. w_T. ``whole`` and ``along`` take a gradient from state t + 1 to state t. ``outward``: what the loss of
    every output contributes at the states before and after its step.
    """
    steps = sum(case.stretches)
    b = [0]
    for stretch in case.stretches:
        b.append(b[-1] + stretch)
    zero = tuple(torch.zeros_like(h) for h in head)

    def at(t):  # c_t of the state after step t
        found = zero if t == 0 else outward[t - 1][1]
        return found if t == steps else add(found, outward[t][0])

    def add(p, q):
        return tuple(u + v for u, v in zip(p, q, strict=True))

    def minus(p, q):
        return tuple(u - v for u, v in zip(p, q, strict=True))

    def run(s, e):  # w_{b_s} .. w_{a_s}
        w = [e]
        for t in reversed(range(b[s - 1], b[s])):
            w.append(add(at(t), whole(t, w[-1])))
        return w

    def product(s, e):
        for t in reversed(range(b[s - 1], b[s])):
            e = along(t, e)
        return e

    def gathered(s):
        row = zero
        for t in reversed(range(b[s - 1], b[s])):
            row = add(at(t), along(t, row))
        return row

    count = len(case.stretches)
    no_highway = case.kind == "RNN"
    top = add(at(steps), head)

    def scan(values):
        e = {count: top}
        for s in range(count, 0, -1):
            e[s - 1] = add(values[s], product(s, e[s]))
        return e

    e = scan({s: gathered(s) for s in range(1, count + 1)})
    for _ in range(count if case.k == "exact" or no_highway else case.k):
        e = scan({s: minus(run(s, e[s])[-1], product(s, e[s])) for s in range(1, count + 1)})
    w = [run(1, e[1])[-1]]
    for s in range(1, count + 1):
        w += run(s, e[s])[::-1][1:]
    return w


def worker(rank: int, size: int, folder: str, cases: dict[str, Case], seconds: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=seconds),
    )
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,), mesh_dim_names=("time",))
    for name, case in cases.items():
        try:
            found = differentiated(case, rank, mesh)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        torch.save(found, f"{folder}/{name}-{rank}.pt")
        if "RankError" not in found.get("error", "RankError"):
            raise RuntimeError(found["traceback"])
    dist.destroy_process_group()


def differentiated(case: Case, rank: int, mesh) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor, Shard

    from hwbp_compiler.distributed import recurrent

    module = case.build()
    x, first, of_y, of_last = case.data()
    x = case.shard(x, rank).clone().requires_grad_()
    first = [part.clone().requires_grad_() for part in first]
    given = x.transpose(0, 1) if case.batch_first else x
    if case.dtensor:
        given = DTensor.from_local(given, mesh, [Shard(int(case.batch_first))])
    state = None if not case.state else tuple(first) if len(first) > 1 else first[0]
    if case.kind in CELLS:
        state = {"a": first[0][0], "b": first[1][0]} if case.kind == "Cell" else first[0][0]
    y, last = recurrent(module, given, state, mesh=mesh, iterations=case.k, damping=case.damping, batches=case.batches)
    if case.dtensor:
        y = y.to_local()
    y = y.transpose(0, 1) if case.batch_first else y
    if case.kind in CELLS:
        last = tuple(part.unsqueeze(0) for part in (last.values() if isinstance(last, dict) else [last]))
    last = torch.stack(last) if isinstance(last, tuple) else last.unsqueeze(0)
    if case.later is not None:
        for number in (case.later, case.k):  # both known to all ranks, in a different order
            recurrent(module, given, state, mesh=mesh, iterations=number)
        recurrent(module, given, state, mesh=mesh, iterations=case.later if rank == 1 else case.k)
    ((y * case.shard(of_y, rank)).sum() + (last * of_last).sum()).backward()
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    for part, leaf in enumerate(first):
        if leaf.grad is not None:
            found |= {f"state{part}_l{layer}": leaf.grad[layer] for layer in range(case.layers)}
    return found | {"x": x.grad, "y": y.detach(), "last": last.detach()}


def run(size: int, cases: dict[str, Case], folder: Path, seconds: float = 60.0) -> dict[str, list[dict]]:
    torch.multiprocessing.spawn(worker, (size, str(folder), cases, seconds), size)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)] for name in cases
    }
