"""A user's own cell over time: ``python -m benchmarks run --suite cells``

Compares ``hwbp_compiler.recurrent`` with the same loop written in Python: in eager mode, and compiled by stock
Inductor, which unrolls it (only up to 64 steps: its compile time grows faster than the length). A measurement is a
whole training step, forward and backward; ``exact`` is ``iterations="exact"``. Also reported: the backward alone,
seconds of a cold compile, and the cosine of all parameter gradients with eager mode's.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hwbp_compiler

from .harness import in_turns, say, summary, synchronize

RESUMES = True  # a run measures the cases that the results lack
LONGEST_UNROLLED = 64


class LayerNormGRU(nn.Module):
    """A GRU with a LayerNorm, for which no library has a fast kernel.

    The norm scales what comes from the state to size ``gain``, however small the weights are. With the usual gain of 1,
    much of an untrained cell's gradient goes through the blocks, and w^k needs a larger k than for a GRU without a
    norm.
    """

    def __init__(self, hidden: int, gain: float = 1.0) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.norm = nn.LayerNorm(3 * hidden)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, x, h):
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        rh, zh, nh = self.norm(self.from_h(h)).chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        h = z * h + (1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return h, h


class MinGRU(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x, h):
        h = h + torch.sigmoid(self.gate(x)) * (self.candidate(x) - h)
        return h, h


class GRU(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(hidden, hidden)

    def forward(self, x, h):
        h = self.cell(x, h)
        return h, h


class TanhRNN(nn.Module):
    """No elementwise path: never approximated."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(hidden, hidden)

    def forward(self, x, h):
        h = self.cell(x, h)
        return h, h


@dataclass(frozen=True)
class Case:
    cell: str
    batch: int
    hidden: int
    length: int


CELLS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm-GRU": LayerNormGRU,
    "LayerNorm-GRU, gain 0.1": functools.partial(LayerNormGRU, gain=0.1),
    "GRU": GRU,
    "minGRU": MinGRU,
    "tanh RNN": TanhRNN,
}
CASES = [
    *(Case(cell, 4, 128, 64) for cell in ("LayerNorm-GRU", "GRU", "minGRU")),
    *(Case(cell, 4, 128, 512) for cell in CELLS),
    *(Case(cell, 32, 64, 1024) for cell in ("LayerNorm-GRU", "LayerNorm-GRU, gain 0.1", "GRU", "minGRU")),
]
QUICK = [Case("LayerNorm-GRU", 2, 16, 16), Case("minGRU", 2, 16, 16)]
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"iterations": "exact"},
    **{f"k={k}": {"iterations": k, "rewrite": "always"} for k in (0, 1, 2, 4, 8)},
    "fpi k=2": {"iterations": 2, "damping": 1.0, "rewrite": "always"},
    "auto": {"iterations": 2},
}


def loop(cell: nn.Module, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    rows = []
    for x_t in x.unbind(0):
        y, h = cell(x_t, h)
        rows.append(y)
    return torch.stack(rows)


def run(device: str, quick: bool, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    known = {Case(r["case"], r["batch"], r["hidden"], r["length"]) for r in done}
    for case in QUICK if quick else CASES:
        if case in known:
            continue
        torch.manual_seed(0)
        cell = CELLS[case.cell](case.hidden).to(device)
        x = torch.randn(case.length, case.batch, case.hidden, device=device)
        h = torch.zeros(case.batch, case.hidden, device=device)
        weight = torch.randn_like(x)
        competitors: dict[str, Callable[[], torch.Tensor]] = {"eager": lambda c=cell, x=x, h=h: loop(c, x, h)}
        for name, options in RUNS.items():
            competitors[name] = lambda c=cell, x=x, h=h, o=options: hwbp_compiler.recurrent(c, x, h, options=o)[0]
        if case.length <= LONGEST_UNROLLED:
            torch._dynamo.reset()
            stock = torch.compile(loop, backend="inductor")
            competitors["inductor"] = lambda c=cell, x=x, h=h, s=stock: s(c, x, h)

        def step(forward: Callable[[], torch.Tensor], cell=cell, weight=weight) -> dict[str, float]:
            cell.zero_grad()
            synchronize(device)
            start = time.perf_counter()
            loss = (forward() * weight).sum()
            synchronize(device)
            middle = time.perf_counter()
            loss.backward()
            synchronize(device)
            end = time.perf_counter()
            return {"step": end - start, "backward": end - middle}

        compiling, gradients = {}, {}
        for name, forward in competitors.items():
            say(f"{case.cell} {case.batch}x{case.hidden}x{case.length}: {name}")
            start = time.perf_counter()
            step(forward)
            compiling[name] = time.perf_counter() - start
            gradients[name] = torch.cat([p.grad.flatten() for p in cell.parameters()])  # type: ignore[union-attr]
            step(forward)
        samples = in_turns({n: lambda f=f: step(f) for n, f in competitors.items()}, 5 if quick else 15, 5.0)
        for name, found in samples.items():
            cosine = torch.cosine_similarity(gradients[name].double(), gradients["eager"].double(), dim=0)
            yield {
                "case": case.cell,
                "batch": case.batch,
                "hidden": case.hidden,
                "length": case.length,
                "run": name,
                "compile_s": compiling[name],
                "cosine": float(cosine),
                **{key: value for what, seconds in found.items() for key, value in summary(what, seconds).items()},
            }
