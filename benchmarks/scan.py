"""How fast is ``linear_scan``?  ``python -m benchmarks.scan``

Every competitor computes the same scan in the same run, in turn (a busy machine then slows all of them alike), and
is measured against a copy that moves as many bytes: values and multipliers read, output written. Copy and scans
all allocate their output. The table goes to standard error, one JSON object a line to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hwbp_compiler.scan import linear_scan
from hwbp_compiler.scan.hillis_steele import linear_scan_hillis_steele
from hwbp_compiler.scan.inductor import register
from hwbp_compiler.scan.reference import linear_scan_reference

SHAPES = [(512, 16, 128), (1024, 128, 64), (256, 128, 512), (65536, 1, 64)]

Run = Callable[[], Any]


def associative_scan_generic(values: Tensor, multipliers: Tensor) -> Tensor:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return before[0] * after[0], after[0] * before[1] + after[1]

    return associative_scan(combine, (multipliers, values), dim=0, combine_mode="generic")[1]


def accelerated_scan(values: Tensor, multipliers: Tensor) -> Run | None:
    """The published kernel, which takes [batch, columns, length] with a power of two as length."""
    try:
        from accelerated_scan.triton import scan
    except ImportError:
        return None
    v, m = (x.permute(1, 2, 0).contiguous() for x in (values, multipliers))
    return lambda: scan(m, v)


def competitors(shape: tuple[int, ...], device: str, quick: bool) -> dict[str, tuple[Run, int]]:
    """Name -> what to run and the bytes it has to move."""
    values = torch.randn(shape, device=device)
    multipliers = torch.rand(shape, device=device)
    size = values.numel() * values.element_size()
    copied = {moved: torch.rand(moved * size // 8, device=device) for moved in (2, 3)}
    runs: dict[str, tuple[Run, int]] = {
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
    published = accelerated_scan(values, multipliers) if device == "cuda" else None
    if published is not None:
        runs["accelerated-scan"] = (published, 3 * size)
    runs["copy of the same bytes, K = 1"] = (lambda: copied[2].clone(), 2 * size)
    runs["linear_scan, K = 1"] = (lambda: linear_scan(values), 2 * size)
    runs["torch.cumsum, K = 1"] = (lambda: torch.cumsum(values, 0), 2 * size)
    return runs


def measure(runs: dict[str, Run], rounds: int, budget: float, device: str) -> dict[str, list[float]]:
    """Seconds of every run in every round; a slow one drops out after three, once its ``budget`` is spent."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if len(samples[name]) >= 3 and sum(samples[name]) > budget:
                continue
            samples[name].append(seconds(run, device))
    return samples


def seconds(run: Run, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def environment(device: str) -> dict[str, Any]:
    def version(package: str) -> str | None:
        from importlib import metadata

        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "device": device,
        "name": name,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "accelerated-scan")},
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for each competitor and shape")
    parser.add_argument("--quick", action="store_true", help="without the slow competitors")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    register()
    where = environment(arguments.device)
    print(json.dumps({"environment": where}), flush=True)
    print(", ".join(f"{key} {value}" for key, value in where.items()), file=sys.stderr)
    for shape in SHAPES:
        entries = competitors(shape, arguments.device, arguments.quick)
        for run, _ in entries.values():
            run()  # compiles
        samples = measure(
            {name: run for name, (run, _) in entries.items()},
            arguments.rounds,
            arguments.budget,
            arguments.device,
        )
        report(shape, entries, samples)


def report(shape: tuple[int, ...], entries: dict[str, tuple[Run, int]], samples: dict[str, list[float]]) -> None:
    median = {name: statistics.median(times) for name, times in samples.items()}
    copy = {moved: median[name] for name, (_, moved) in entries.items() if name.startswith("copy of the same bytes")}
    print(f"\n{list(shape)} float32", file=sys.stderr)
    print(f"{'':44}{'median ms':>10}{'quartiles':>19}{'least':>10}{'GB/s':>8}{'of copy':>9}", file=sys.stderr)
    for name, times in samples.items():
        moved = entries[name][1]
        low, _, high = statistics.quantiles(times, n=4)
        row = {
            "shape": list(shape),
            "dtype": "float32",
            "name": name,
            "median_ms": 1e3 * median[name],
            "quartiles_ms": [1e3 * low, 1e3 * high],
            "least_ms": 1e3 * min(times),
            "samples": len(times),
            "bytes": moved,
            "of_copy_bandwidth": copy[moved] / median[name],
        }
        print(json.dumps(row), flush=True)
        print(
            f"{name:44}{row['median_ms']:10.3f}{1e3 * low:10.3f}-{1e3 * high:<8.3f}{1e3 * min(times):10.3f}"
            f"{moved / median[name] / 1e9:8.1f}{row['of_copy_bandwidth']:9.0%}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
