"""Measure how fast a device is, in a few seconds: ``python -m hwbp_compiler doctor --probe``."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from .cost.probe import Probe
from .rolled.loop import operator as loop

_TURNS = 9  # the fastest counts
_STEPS = 256

# A step that does next to nothing: what is left is finding the rows and calling the compiled code.
_STEP = "def forward(self, state, row): return (torch.ops.aten.add.Tensor(state, row),)"


def measured(device: torch.device) -> Probe:
    """Measure ``device``. Compiles one small kernel if that has not been done before."""
    size, numbers = (1024, 1 << 25) if device.type == "cpu" else (8192, 1 << 28)
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out = torch.empty_like(a)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        product = _seconds(device, lambda: torch.mm(a, b, out=out))
        launch = _launch(device)
        pieces = list(torch.randn(64, 8, 8, device=device))
        stacking = _seconds(device, lambda: torch.stack(pieces)) - launch
        step = _seconds(device, _loop(device)) / _STEPS
    finally:
        torch.set_num_threads(threads)
    large = torch.ones(numbers, device=device)
    copy = torch.empty_like(large)
    copying = _seconds(device, lambda: copy.copy_(large))
    moved = 2 * large.numel() * large.element_size()
    return Probe(2.0 * size**3 / product, moved / copying, launch, max(stacking, 1e-7) / len(pieces), step)


def _launch(device: torch.device, times: int = 1000) -> float:
    little = torch.zeros(4, 4, device=device)

    def many() -> None:
        for _ in range(times):
            torch.add(little, 1.0, out=little)

    return _seconds(device, many) / times


def _loop(device: torch.device) -> Callable[[], object]:
    rows, start = torch.zeros(_STEPS, 8, 8, device=device), torch.zeros(8, 8, device=device)
    return lambda: loop(_STEP, [rows], [start], [], _STEPS, False, [])


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    found = []
    for turn in range(_TURNS + 1):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if turn:  # the first compiles, chooses algorithms and touches the memory
            found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
