"""How fast is ``linear_scan``?  ``python -m benchmarks run --suite scan``

All competitors compute the same scan in the same run, in turn. Each is compared with a copy that moves as many bytes:
values and multipliers read, output written. The copy and all scans allocate their output. A competitor that cannot run
on the device gets a row that says why.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hwbp_compiler.scan import linear_scan
from hwbp_compiler.scan.hillis_steele import linear_scan_hillis_steele
from hwbp_compiler.scan.inductor import register
from hwbp_compiler.scan.reference import linear_scan_reference

from .harness import in_turns, say, synchronize

SHAPES = [(512, 16, 128), (1024, 128, 64), (65536, 1, 64), (256, 128, 512)]

Run = Callable[[], Any]


def associative_scan_generic(values: Tensor, multipliers: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return before[0] * after[0], after[0] * before[1] + after[1]

    return associative_scan(combine, (multipliers, values), dim=0, combine_mode="generic")[1]


def accelerated_scan(values: Tensor, multipliers: Tensor) -> Run | str:
    """The published package's Triton kernel, for [batch, columns, length], or why it cannot run."""
    if not values.is_cuda:
        return "needs a CUDA GPU"
    try:
        from accelerated_scan.scalar import scan
    except ImportError as error:
        return f"cannot be imported: {error}"
    v, m = (x.permute(1, 2, 0).contiguous() for x in (values, multipliers))
    return lambda: scan(m, v)


def assoc_scan(values: Tensor, multipliers: Tensor) -> Run | str:
    """The published package's scan in torch operators, for [batch, length, columns], or why it cannot run."""
    try:
        from assoc_scan import AssocScan
    except ImportError as error:
        return f"cannot be imported: {error}"
    v, m = (x.movedim(0, 1).contiguous() for x in (values, multipliers))
    scan = AssocScan()
    return lambda: scan(m, v)


def competitors(shape: tuple[int, ...], device: str, quick: bool) -> dict[str, tuple[Run | str, int]]:
    """Name -> what to run, or the reason why it cannot run, and the bytes it has to move."""
    values = torch.randn(shape, device=device)
    multipliers = torch.rand(shape, device=device)
    size = values.numel() * values.element_size()
    copied = {moved: torch.rand(moved * size // 8, device=device) for moved in (2, 3)}
    runs: dict[str, tuple[Run | str, int]] = {
        "copy of the same bytes": (lambda: copied[3].clone(), 3 * size),
        "linear_scan": (lambda: linear_scan(values, multipliers), 3 * size),
        "linear_scan, reverse": (lambda: linear_scan(values, multipliers, reverse=True), 3 * size),
    }
    if device != "cpu":
        compiled = torch.compile(linear_scan)
        fused = torch.compile(lambda v, m: linear_scan(2 * v, m.sigmoid()))
        runs["linear_scan compiled"] = (lambda: compiled(values, multipliers), 3 * size)
        runs["linear_scan compiled with sigmoid and mul"] = (lambda: fused(values, multipliers), 3 * size)
    hillis_steele = torch.compile(linear_scan_hillis_steele)
    runs["Hillis-Steele compiled"] = (lambda: hillis_steele(values, multipliers), 3 * size)
    if not quick:
        generic = torch.compile(associative_scan_generic)
        runs["associative_scan compiled"] = (lambda: generic(values, multipliers), 3 * size)
        runs["Python loop"] = (lambda: linear_scan_reference(values, multipliers), 3 * size)
    runs["assoc-scan"] = (assoc_scan(values, multipliers), 3 * size)
    runs["accelerated-scan"] = (accelerated_scan(values, multipliers), 3 * size)
    runs["copy of the same bytes, K = 1"] = (lambda: copied[2].clone(), 2 * size)
    runs["linear_scan, K = 1"] = (lambda: linear_scan(values), 2 * size)
    runs["torch.cumsum, K = 1"] = (lambda: torch.cumsum(values, 0), 2 * size)
    return runs


def run(device: str, quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each shape and competitor."""
    register()
    for shape in SHAPES[: 2 if quick else 3 if device == "cpu" else 4]:
        say(f"{list(shape)} float32")
        entries = competitors(shape, device, quick)
        running = {name: timed(name, what, device) for name, (what, _) in entries.items() if not isinstance(what, str)}
        for each in running.values():
            each()  # compiles
        samples = in_turns(running, 10 if quick else 40, budget=2.0)
        median = {name: statistics.median(times[name]) for name, times in samples.items()}
        for name, (what, moved) in entries.items():
            row: dict[str, Any] = {"shape": list(shape), "dtype": "float32", "run": name, "bytes": moved}
            if isinstance(what, str):
                yield row | {"not_run": what}
                continue
            low, _, high = statistics.quantiles(samples[name][name], n=4)
            copy = next(n for n, (_, size) in entries.items() if n.startswith("copy") and size == moved)
            yield row | {
                "run_ms": 1e3 * median[name],
                "run_iqr_ms": 1e3 * (high - low),
                "least_ms": 1e3 * min(samples[name][name]),
                "gb_per_s": moved / median[name] / 1e9,
                "of_copy": median[copy] / median[name],
                # On a machine that does other work too, the fastest turns are the undisturbed ones.
                "of_copy_least": min(samples[copy][copy]) / min(samples[name][name]),
            }


def timed(name: str, work: Run, device: str) -> Callable[[], dict[str, float]]:
    def once() -> dict[str, float]:
        synchronize(device)
        start = time.perf_counter()
        result = work()
        synchronize(device)
        seconds = time.perf_counter() - start
        del result
        return {name: seconds}

    return once
