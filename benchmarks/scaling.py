"""Where it pays: ``python -m benchmarks run --suite scaling``

Step and compile time against length or depth, width, and batch. Each range goes from sizes where the machine waits for
launches to sizes where it is busy, so that the crossover shows. The models are recurrences that ``nn.GRU`` runs, and
stacks and loops that Dynamo unrolls. The baseline is ``torch.compile`` with Inductor (PyTorch's own kernels for
``nn.GRU``); ``auto`` is what the cost model decides at k = 2. The methods of a point take turns. Points that the
results file has are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .harness import say
from .unrolled import Case, contenders, loop, measured, stack

RESUMES = True
REPEATS = 10
Build = Callable[[], tuple[nn.Module, torch.Tensor]]


class Rolled(nn.Module):
    """Input [steps, batch, hidden] -> states of the same shape"""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(hidden, hidden)

    def forward(self, x):
        return self.gru(x)[0]


def rolled(steps: int, batch: int, hidden: int) -> Build:
    return lambda: (Rolled(hidden), torch.randn(steps, batch, hidden))


# name of the curve -> what varies, the model at a size, sizes
AXES: dict[str, tuple[str, Callable[[int], Build], tuple[int, ...]]] = {
    "residual stack, width 64, batch 8": ("blocks", lambda n: stack(n, 8, 64), (8, 32, 128, 512)),
    "residual stack, 32 blocks, batch 8": ("width", lambda n: stack(32, 8, n), (16, 64, 256, 1024)),
    "residual stack, 32 blocks, width 64": ("batch", lambda n: stack(32, n, 64), (1, 8, 64, 512)),
    "GRUCell loop, batch 4, hidden 64": ("steps", lambda n: loop(n, 4, 64), (8, 32, 128)),  # stock: minutes for more
    "nn.GRU, batch 4, hidden 64": ("steps", lambda n: rolled(n, 4, 64), (64, 512, 4096, 65536)),
    "nn.GRU, 1024 steps, batch 4": ("hidden", lambda n: rolled(1024, 4, n), (16, 64, 256)),
    "nn.GRU, 1024 steps, hidden 64": ("batch", lambda n: rolled(1024, n, 64), (1, 16, 128)),
}


def run(device: str, quick: bool, done: Sequence[dict[str, Any]] = ()) -> Iterator[dict[str, Any]]:
    """One row per curve, size and method."""
    had = {(row["curve"], row["size"]) for row in done}
    for curve, (axis, build, sizes) in AXES.items():
        for size in sizes[:1] if quick else sizes:
            if (curve, size) in had:
                continue
            case = Case(f"{curve}, {size} {axis}", curve, build(size), size)
            rows = list(measured(case, contenders(case, device, (2,)), REPEATS, warm=False))
            for row in rows:
                say(f"{case.name}, {row['run']}: step {row['step_ms']:.2f} ms, {row['step_ratio']:.2f}x")
            yield from ({"curve": curve, "axis": axis, "size": size} | row for row in rows)
