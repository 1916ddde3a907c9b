"""Pipelines of tiny stages, run by gloo processes, and the oracle they are compared with.

The oracle follows docs/design.md, section 4.6, "Segments", link by link with ``torch.func.vjp`` in one process, and
shares no code with ``hwbp_compiler``. A stage is a list of links; each link defines its highway, or says that it has
none.
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
from torch.func import functional_call, vjp

WIDTH, STEPS, BATCH = 5, 3, 4


# -- links: forward(x) is the whole link, highway(x) is elementwise in x and has K as its derivative -------------------


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, WIDTH))

    def forward(self, x):
        return self.inner(x)


class PreLN(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm, self.block = nn.LayerNorm(WIDTH), Block(dropout)

    def forward(self, x):
        return x + self.block(self.norm(x))

    def highway(self, x):
        return x + self.block(self.norm(x)).detach()


class Attention(PreLN):
    def __init__(self):
        nn.Module.__init__(self)
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def block(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


class PostLN(PreLN):
    def __init__(self, dropout: float = 0.0):
        super().__init__(dropout)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        return self.norm(x + self.block(x))

    def highway(self, x):
        y = x + self.block(x).detach()
        fixed = y.detach()
        sigma = (fixed.var(-1, correction=0, keepdim=True) + self.norm.eps).sqrt()
        return (y - fixed.mean(-1, keepdim=True)) / sigma * self.norm.weight + self.norm.bias


class ReLU(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.block = Block(dropout)

    def forward(self, x):
        return torch.relu(x + self.block(x))

    def highway(self, x):
        return torch.relu(x + self.block(x).detach())


class BatchNormed(nn.Module):
    """A residual link with BatchNorm on the trunk, over all but the last dimension."""

    def __init__(self):
        super().__init__()
        self.block, self.norm = Block(), nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        y = x + self.block(x)
        return self.norm(y.flatten(0, 1)).view_as(y)

    def highway(self, x):
        y = x + self.block(x).detach()
        fixed = y.detach()
        sigma = (fixed.var((0, 1), correction=0) + self.norm.eps).sqrt()
        return (y - fixed.mean((0, 1))) / sigma * self.norm.weight + self.norm.bias


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.block = nn.Linear(WIDTH, WIDTH), Block()

    def forward(self, x):
        z = torch.sigmoid(self.gate(x))
        return z * x + (1 - z) * self.block(x)

    def highway(self, x):
        z = torch.sigmoid(self.gate(x)).detach()
        return z * x + ((1 - z) * self.block(x)).detach()


class Mixing(nn.Module):
    """A link without an elementwise path."""

    highway = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Embedding(nn.Module):
    highway = None

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)

    def forward(self, x):
        return self.table(x)


class Pooling(nn.Module):
    """The mean over the batch: its output has the same size for every batch size."""

    highway = None

    def forward(self, x):
        return x.mean(0, keepdim=True)


class Head(nn.Module):
    highway = None

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(self.norm(x))


class Counting(ReLU):
    """Not a function of its inputs: each call multiplies by a larger number."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.relu(x * self.calls + self.block(x))


class Masked(ReLU):
    """Multiplies by a mask from the stage before, or by its own copy of that mask if it gets none."""

    def forward(self, x, mask=None):
        return torch.relu(x + (the_mask() if mask is None else mask) * self.block(x))

    def highway(self, x):
        return torch.relu(x + (the_mask() * self.block(x)).detach())


def the_mask() -> Tensor:
    return (torch.arange(STEPS * WIDTH).view(STEPS, WIDTH) % 3 > 0).to(torch.get_default_dtype())


class HandsMaskOn(nn.Module):
    """(x, mask) -> (y, mask), where the mask requires no gradient. The first stage creates the mask."""

    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x, mask=None):
        mask = the_mask() if mask is None else mask
        for link in self.stage:
            x = link(x, mask)
        return x, mask


class GivesComplex(nn.Module):
    def __init__(self, stage):
        super().__init__()
        self.stage = stage

    def forward(self, x):
        y = self.stage(x.real)
        return torch.complex(y, y)


class Annealed(ReLU):
    """K is a Python number stored in the module."""

    def __init__(self):
        super().__init__()
        self.alpha = 0.5

    def factor(self):
        return self.alpha

    def forward(self, x):
        return self.factor() * x + self.block(x)

    def highway(self, x):
        return self.factor() * x + self.block(x).detach()


class Overflowing(ReLU):
    """K is so large that its square overflows; a path outside the highway cancels it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("large", torch.full((WIDTH,), 1e200))

    def forward(self, x):
        return self.large * x - x @ torch.diag(self.large) + torch.tanh(self.block(x))


KEPT = [0.5]


class AnnealedElsewhere(Annealed):
    def factor(self):
        return KEPT[0]


class Bad(Mixing):
    def forward(self, x):
        raise RuntimeError("the weather is bad")


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """``stages``: the kinds of links of each stage. ``prepare(stage, index)`` changes a stage before it runs,
    ``before(stage, step)`` before every step. ``options_of(rank)``: keyword arguments of the schedule on that rank.
    """

    stages: tuple[tuple[Callable[[], nn.Module], ...], ...]
    k: int | str = 1
    damping: float = 0.0
    batches: int = 2
    scale: bool = True
    steps: int = 1
    prepare: Callable[[nn.Sequential, int], None] | None = None
    before: Callable[[nn.Sequential, int], None] | None = None
    evaluate: bool = False
    wrap: Callable[[nn.Sequential], nn.Module] | None = None
    options_of: Callable[[int], dict] | None = None

    def build(self) -> list[nn.Sequential]:
        torch.manual_seed(3)
        stages = [nn.Sequential(*(kind() for kind in kinds)) for kinds in self.stages]
        if self.prepare is not None:
            for index, stage in enumerate(stages):
                self.prepare(stage, index)
        return stages

    def data(self, part: int = 0) -> tuple[Tensor, Tensor]:
        """``part``: the rank in data parallelism."""
        torch.manual_seed(4 + part)
        words = self.stages[0][0] is Embedding
        x = torch.randint(0, 11, (BATCH, STEPS)) if words else torch.randn(BATCH, STEPS, WIDTH)
        return x, torch.randn(BATCH, STEPS, WIDTH)


def loss_fn(y: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
    y = y[0] if isinstance(y, tuple) else y
    return ((y.real - target) ** 2).mean()


def seed_of(stage: int) -> int:
    return 100 + stage


# -- the oracle --------------------------------------------------------------------------------------------------------


class LinkAt:
    """A link of one micro-batch at its saved input, with the random state of its run."""

    def __init__(self, link: nn.Module, x: Tensor):
        self.link, self.x, self.random = link, x.detach(), torch.get_rng_state()
        self.weights = {n: p.detach() for n, p in link.named_parameters() if p.requires_grad}
        self.rest = {n: b.detach().clone() for n, b in link.named_buffers()}
        self.y = self._whole(self.weights, self.x)

    def _whole(self, weights, x):
        return functional_call(self.link, weights | {n: b.clone() for n, b in self.rest.items()}, (x,))

    def _again(self, f, *primals):
        kept = torch.get_rng_state()
        torch.set_rng_state(self.random)
        found = vjp(f, *primals)[1]
        torch.set_rng_state(kept)
        return found

    def whole(self, w):
        return self._again(lambda x: self._whole(self.weights, x), self.x)(w)[0]

    def highway(self, w):
        return self._again(self.link.highway, self.x)(w)[0]

    def parameters(self, w):
        return self._again(lambda weights: self._whole(weights, self.x), self.weights)(w)[0]


def oracle(case: Case, part: int = 0) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Gradients by parameter name, per stage, and the losses of all micro-batches."""
    stages = case.build()
    total = [{n: torch.zeros_like(p) for n, p in s.named_parameters() if p.requires_grad} for s in stages]
    losses = []
    x, target = case.data(part)
    generators = [torch.manual_seed(seed_of(i)).get_state() for i in range(len(stages))]
    for number in range(case.steps):
        for stage in stages if case.before else ():
            case.before(stage, number)
        for part, wanted in zip(x.tensor_split(case.batches), target.tensor_split(case.batches), strict=True):
            at: list[list[LinkAt]] = []
            for i, stage in enumerate(stages):
                torch.set_rng_state(generators[i])
                at.append([])
                for link in stage:
                    at[i].append(LinkAt(link, part))
                    part = at[i][-1].y
                generators[i] = torch.get_rng_state()
            loss, back = vjp(lambda y, wanted=wanted: loss_fn(y, wanted), part)
            losses.append(loss)
            ends = ends_of_stages(at, back(torch.ones_like(loss))[0], case.k, case.damping)
            for i, links in enumerate(at):
                w = ends[i]
                for place, link in reversed(list(enumerate(links))):
                    for name, g in link.parameters(w).items():
                        owner = stages[i].get_parameter(f"{place}.{name}")
                        # tied parameters have one name
                        (first,) = [n for n, p in stages[i].named_parameters() if p is owner]
                        total[i][first] += g / (case.batches if case.scale else 1)
                    if link.x.is_floating_point():
                        w = link.whole(w)
    return total, losses


def ends_of_stages(at: list[list[LinkAt]], gradient: Tensor, k: int | str, gamma: float) -> list[Tensor]:
    """e^k at the output of every stage of one micro-batch."""

    def run(i: int, e: Tensor) -> Tensor:
        for link in reversed(at[i]):
            e = link.whole(e)
        return e

    def along(i: int, e: Tensor) -> Tensor:
        for link in reversed(at[i]):
            e = (1 - gamma) * link.highway(e)
        return e

    has_highway = [all(link.link.highway is not None for link in links) for links in at]
    last = len(at) - 1
    ends = {last: gradient}
    while last > 0:
        head, top = run(last, ends[last]), last - 1
        low = top
        while low > 0 and has_highway[low]:
            low -= 1
        e = {top: head}
        for i in range(top, low, -1):
            e[i - 1] = along(i, e[i])
        for _ in range(len(at) if k == "exact" else k):
            v = {i: run(i, e[i]) - along(i, e[i]) for i in range(low + 1, top + 1)}
            e = {top: head}
            for i in range(top, low, -1):
                e[i - 1] = v[i] + along(i, e[i])
        ends |= e
        last = low
    return [ends[i] for i in range(len(at))]


# -- processes ---------------------------------------------------------------------------------------------------------


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
    for name, case in cases.items():
        try:
            found = trained(case, rank, size)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        torch.save(found, f"{folder}/{name}-{rank}.pt")
        if "RankError" not in found.get("error", "RankError"):
            raise RuntimeError(found["traceback"])  # the others wait for this rank
    dist.destroy_process_group()


def trained(case: Case, rank: int, size: int) -> dict:
    from torch.distributed.pipelining import PipelineStage

    from hwbp_compiler.distributed import ScheduleHighway

    module = case.build()[rank]
    stage = PipelineStage(case.wrap(module) if case.wrap else module, rank, size, torch.device("cpu"))
    options = {"iterations": case.k, "damping": case.damping, "scale_grads": case.scale} | (
        case.options_of(rank) if case.options_of else {}
    )
    schedule = ScheduleHighway(stage, case.batches, loss_fn=loss_fn, **options)
    x, target = case.data()
    torch.manual_seed(seed_of(rank))
    losses: list[Tensor] = []
    for number in range(case.steps):
        if case.before:
            case.before(module, number)
        kept: list[Tensor] = []
        schedule.step(*([x] if rank == 0 else []), target=target if rank == size - 1 else None, losses=kept)
        losses += [loss.detach() for loss in kept]
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    evaluated = {}
    if case.evaluate:
        before = {n: b.clone() for n, b in module.named_buffers()}
        module.eval()
        output = schedule.eval(*([x] if rank == 0 else []), target=target if rank == size - 1 else None)
        evaluated = {"output": output, "same": all(torch.equal(b, before[n]) for n, b in module.named_buffers())}
    assert schedule.plan is not None
    return {
        "gradients": gradients,
        "losses": losses,
        "buffers": dict(module.named_buffers()),
        "plan": schedule.plan,
        "text": schedule.explain(),
        "evaluated": evaluated,
        "rounds": schedule.rounds,
        "bytes": schedule.bytes,
    }


def mesh_worker(rank: int, size: int, folder: str, cases: dict[str, Case], seconds: float) -> None:
    """Two ranks of data parallelism over ``size / 2`` stages. The case's name starts with the wrapper: ddp or fsdp."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    from hwbp_compiler.distributed import ScheduleHighway

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
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "layer"))
    part, index = mesh["data"].get_local_rank(), mesh["layer"].get_local_rank()
    for name, case in cases.items():
        module = case.build()[index]
        if name.startswith("ddp"):
            held = DistributedDataParallel(module, process_group=mesh["data"].get_group())
        else:
            held = fully_shard(module, mesh=mesh["data"])
        stage = PipelineStage(held, index, size // 2, torch.device("cpu"), group=mesh["layer"].get_group())
        schedule = ScheduleHighway(
            stage, case.batches, loss_fn=loss_fn, iterations=case.k, damping=case.damping, scale_grads=case.scale
        )
        x, target = case.data(part)
        try:
            for _ in range(case.steps):
                schedule.step(*([x] if index == 0 else []), target=target if index == size // 2 - 1 else None)
            whole = {n: p.grad for n, p in module.named_parameters()}
            found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in whole.items()}
            told = {"gradients": found, "plan": schedule.plan}
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        torch.save(told, f"{folder}/{name}-{rank}.pt")
        if "error" in told:
            raise RuntimeError(told["traceback"])
    dist.destroy_process_group()


def run(
    size: int, cases: dict[str, Case], folder: Path, seconds: float = 60.0, worker: Callable = worker
) -> dict[str, list[dict]]:
    """The results of every rank, by case."""
    torch.multiprocessing.spawn(worker, (size, str(folder), cases, seconds), size)
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)] for name in cases
    }
