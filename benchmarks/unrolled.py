"""Unrolled chains against stock Inductor: ``python -m benchmarks.unrolled [--case stack] [--iterations 0 2]``

Two models, one per regime: a narrow deep residual stack (64 blocks, width 64, batch 8), whose blocks have their own
weights, and a loop over GRUCell (256 steps, batch 4, hidden 128), whose steps share them. Every k is compiled first;
then all of them and stock Inductor take turns, so that a busy machine slows all alike. Reported: median and
interquartile range of the backward and of the whole step (forward and backward), seconds of a cold compile, ratios
to stock Inductor's median, and the cosine of all parameter gradients with stock's. One JSON object a line on standard
output, the table on standard error. ``k = auto`` is rewrite="profitable" at k = 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Loop(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(hidden, hidden)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], x.shape[2])
        states = []
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            states.append(h)
        return torch.stack(states)


def stack(size: int) -> tuple[nn.Module, torch.Tensor]:
    return nn.Sequential(*(Block(64) for _ in range(size))), torch.randn(8, 64)


def loop(size: int) -> tuple[nn.Module, torch.Tensor]:
    return Loop(128), torch.randn(size, 4, 128)


CASES = {"stack": (stack, 64), "loop": (loop, 256)}


class Contender:
    """One way to compile the model: its own copy of the compiled code, the same weights."""

    def __init__(self, name: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, **how: Any) -> None:
        self.name, self.model, self.x, self.target = name, model, x, target
        self.forward_times: list[float] = []
        self.backward_times: list[float] = []
        self.function = torch.compile(lambda x: model(x), **how)
        start = time.perf_counter()
        loss = (self.function(x) * target).sum()
        middle = time.perf_counter()
        model.zero_grad()
        loss.backward()
        self.compile_forward, self.compile_backward = middle - start, time.perf_counter() - middle
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    def step(self) -> None:
        self.model.zero_grad()
        start = time.perf_counter()
        loss = (self.function(self.x) * self.target).sum()
        middle = time.perf_counter()
        loss.backward()
        self.forward_times.append(middle - start)
        self.backward_times.append(time.perf_counter() - middle)

    @property
    def steps(self) -> list[float]:
        return [a + b for a, b in zip(self.forward_times, self.backward_times, strict=True)]


def spread(times: list[float]) -> tuple[float, float]:
    """Median and interquartile range, in milliseconds."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle * 1e3, (high - low) * 1e3


def measure(case: str, iterations: list[int], size: int, repeats: int) -> None:
    torch.manual_seed(0)
    model, x = CASES[case][0](size)
    with torch.no_grad():
        target = torch.randn_like(model(x))
    contenders = [Contender("inductor", model, x, target, backend="inductor")]
    for k in iterations:
        options = {"iterations": k, "rewrite": "always"}
        contenders.append(Contender(f"k={k}", model, x, target, backend="highway", options=options))
        print(f"{case}: k={k} compiled", file=sys.stderr, flush=True)
    contenders.append(Contender("k=auto", model, x, target, backend="highway", options={"iterations": 2}))
    for _ in range(repeats):
        for contender in contenders:
            contender.step()
    stock = contenders[0]
    head = "backward ms (iqr)  ratio | step ms (iqr)  ratio | compile forward, backward s | cosine"
    print(f"\n{case} of {size}: {head}", file=sys.stderr)
    for c in contenders:
        backward, backward_iqr = spread(c.backward_times)
        step, step_iqr = spread(c.steps)
        row = {
            "benchmark": "unrolled",
            "case": case,
            "size": size,
            "run": c.name,
            "backward_ms": backward,
            "backward_iqr_ms": backward_iqr,
            "step_ms": step,
            "step_iqr_ms": step_iqr,
            "backward_ratio": spread(stock.backward_times)[0] / backward,
            "step_ratio": spread(stock.steps)[0] / step,
            "compile_forward_s": c.compile_forward,
            "compile_backward_s": c.compile_backward,
            "cosine": F.cosine_similarity(c.gradient, stock.gradient, dim=0).item(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        }
        print(json.dumps(row), flush=True)
        print(
            f"{c.name:>9}: {backward:8.2f} ({backward_iqr:.2f}) {row['backward_ratio']:6.2f}x | {step:8.2f} "
            f"({step_iqr:.2f}) {row['step_ratio']:6.2f}x | {c.compile_forward:6.1f} {c.compile_backward:6.1f} | "
            f"{row['cosine']:.6f}",
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=sorted(CASES), nargs="*", default=sorted(CASES, reverse=True))
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 1, 2, 4, 8])
    parser.add_argument("--size", type=int, default=None, help="blocks or steps, in place of 64 and 256")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # every compile is a cold one
        for case in args.case:
            torch._dynamo.reset()
            measure(case, args.iterations, args.size or CASES[case][1], args.repeats)


if __name__ == "__main__":
    main()
