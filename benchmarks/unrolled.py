"""Unrolled chains against stock Inductor: ``python -m benchmarks run --suite deep``

Most of these models have a backward that is a long sequence of small steps: deep residual stacks, whose blocks have
their own weights; loops over GRUCell, whose steps share them; a pre-norm Transformer and a pre-activation ResNet. In
some the backward is not such a sequence. Every k is compiled first; then all of them and stock Inductor take turns.
Reported: the backward and the whole step (forward and backward), seconds of a cold compile, peak memory of a step, and
the cosine of all parameter gradients with stock Inductor's. ``auto`` is rewrite="profitable" at k = 2, ``fpi``
fixed-point iteration (gamma = 1).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .harness import in_turns, most_held, say, start_anew, summary, synchronize

ITERATIONS = (0, 1, 2, 4, 8)


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


class TransformerBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 32)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        batch, length, width = x.shape
        query, key, value = self.mix(self.before(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.between(x))))


class ConvolutionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x):
        branch = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            branch = convolution(F.relu(norm(branch)))
        return x + branch


@dataclass(frozen=True)
class Case:
    """``size`` blocks or steps, a model and its input. ``why`` says why the case is measured."""

    name: str
    why: str
    build: Callable[[], tuple[nn.Module, torch.Tensor]]
    size: int
    quick: bool = False


def stack(blocks: int, batch: int, width: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (nn.Sequential(*(Block(width) for _ in range(blocks))), torch.randn(batch, width))


def loop(steps: int, batch: int, hidden: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (Loop(hidden), torch.randn(steps, batch, hidden))


def transformer(blocks: int, batch: int, width: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (nn.Sequential(*(TransformerBlock(width) for _ in range(blocks))), torch.randn(batch, 32, width))


def resnet(blocks: int, batch: int, channels: int) -> Callable[[], tuple[nn.Module, torch.Tensor]]:
    return lambda: (
        nn.Sequential(*(ConvolutionBlock(channels) for _ in range(blocks))),
        torch.randn(batch, channels, 16, 16),
    )


CASES = [
    Case("stack, 64 blocks, batch 8, width 64", "deep and narrow, own weights", stack(64, 8, 64), 64),
    Case("GRUCell loop, 256 steps, batch 4, hidden 128", "small steps, shared weights", loop(256, 4, 128), 256),
    Case("GRUCell loop, 64 steps, batch 4, hidden 128", "the same, shorter", loop(64, 4, 128), 64, quick=True),
    Case("GRUCell loop, 64 steps, batch 64, hidden 256", "steps that fill the machine", loop(64, 64, 256), 64),
    Case("stack, 16 blocks, batch 512, width 256", "blocks that fill the machine", stack(16, 512, 256), 16),
    Case("pre-norm Transformer, 8 blocks, batch 4, width 128", "16 links of two kinds", transformer(8, 4, 128), 8),
    Case("pre-activation ResNet, 12 blocks, batch 16, 16 channels", "convolutions", resnet(12, 16, 16), 12),
]


class Contender:
    """One way to compile a model: its own copy of the compiled code, the same weights."""

    def __init__(
        self, name: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, device: str, **how: Any
    ) -> None:
        self.name, self.model, self.x, self.target, self.device = name, model, x, target, device
        self.how, self.options = how, how.get("options", {})
        forward, backward = self.compile()
        self.compiling = {"compile_forward_s": forward, "compile_backward_s": backward}
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()

    def compile(self) -> tuple[float, float]:
        """Seconds of the first forward and backward pass."""
        self.function = torch.compile(lambda x: self.model(x), **self.how)
        start = time.perf_counter()
        loss = (self.function(self.x) * self.target).sum()
        middle = time.perf_counter()
        self.model.zero_grad()
        loss.backward()
        synchronize(self.device)
        return middle - start, time.perf_counter() - middle

    def compile_again(self) -> float:
        """The same from the caches of the first compilation, for forward and backward together."""
        start_anew()
        return sum(self.compile())

    def step(self) -> dict[str, float]:
        """Seconds of the backward alone, and of forward and backward together."""
        self.model.zero_grad()
        synchronize(self.device)
        start = time.perf_counter()
        loss = (self.function(self.x) * self.target).sum()
        synchronize(self.device)
        middle = time.perf_counter()
        loss.backward()
        synchronize(self.device)
        end = time.perf_counter()
        return {"backward": end - middle, "step": end - start}

    def memory(self) -> float:
        self.model.zero_grad()
        return most_held(self.device, lambda: (self.function(self.x) * self.target).sum().backward())


def contenders(case: Case, device: str, iterations: tuple[int, ...] = ITERATIONS) -> list[Contender]:
    """Stock Inductor, every k, and what the cost model decides at k = 2, all compiled."""
    start_anew()
    torch.manual_seed(0)
    model, x = case.build()
    model, x = model.to(device), x.to(device)
    with torch.no_grad():
        target = torch.randn_like(model(x))
    ways: dict[str, dict[str, Any]] = {"inductor": {"backend": "inductor"}}
    for k in iterations:
        ways[f"k={k}"] = {"backend": "highway", "options": {"iterations": k, "rewrite": "always"}}
    ways["fpi k=2"] = {"backend": "highway", "options": {"iterations": 2, "damping": 1.0, "rewrite": "always"}}
    ways["auto"] = {"backend": "highway", "options": {"iterations": 2}}
    made = []
    for name, how in ways.items():
        made.append(Contender(name, model, x, target, device, **how))
        say(f"{case.name}: {name} compiled in {sum(made[-1].compiling.values()):.1f} s")
    return made


def measured(case: Case, made: list[Contender], repeats: int, warm: bool = True) -> Iterator[dict[str, Any]]:
    """One row per contender. Ratios are stock Inductor's median divided by the contender's. ``warm``: compile again
    too.
    """
    samples = in_turns({c.name: c.step for c in made}, repeats)
    stock = samples["inductor"]
    base = {what: summary(what, stock[what])[f"{what}_ms"] for what in stock}
    rows = []
    for c in made:
        row: dict[str, Any] = {"case": case.name, "why": case.why, "run": c.name, "k": c.options.get("iterations")}
        row["gamma"] = c.options.get("damping", 0.0)
        for what, seconds in samples[c.name].items():
            row |= summary(what, seconds)
            row[f"{what}_ratio"] = base[what] / row[f"{what}_ms"]
        row["cosine"] = F.cosine_similarity(c.gradient, made[0].gradient, dim=0).item()
        row |= c.compiling | {"peak_memory_mb": c.memory()}
        rows.append(row)
    for row, c in zip(rows, made, strict=True):  # the loop forgets all compiled code
        yield row | ({"compile_warm_s": c.compile_again()} if warm else {})


def table(rows: list[dict[str, Any]]) -> None:
    say(f"\n{rows[0]['case']}: backward ms (iqr)  ratio | step ms (iqr)  ratio | compile fwd, bwd s | cosine")
    for r in rows:
        say(
            f"{r['run']:>9}: {r['backward_ms']:8.2f} ({r['backward_iqr_ms']:.2f}) {r['backward_ratio']:6.2f}x | "
            f"{r['step_ms']:8.2f} ({r['step_iqr_ms']:.2f}) {r['step_ratio']:6.2f}x | "
            f"{r['compile_forward_s']:6.1f} {r['compile_backward_s']:6.1f} | {r['cosine']:.6f}"
        )


def cases(device: str, quick: bool) -> list[Case]:
    """The cases. A GPU skips the long loop, which stock Inductor compiles for minutes."""
    return [case for case in CASES if (case.quick or not quick) and (device == "cpu" or case.size <= 64)]


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    return [case.name for case in cases(device, quick)]


def run(device: str, quick: bool, wanted: Callable[[str], bool], repeats: int = 30) -> Iterator[dict[str, Any]]:
    """The rows of all cases, or only of the short ones."""
    for case in cases(device, quick):
        if not wanted(case.name):
            continue
        rows = list(measured(case, contenders(case, device, ITERATIONS if device == "cpu" else (0, 1, 2)), repeats))
        table(rows)
        yield from rows
