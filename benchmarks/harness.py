"""What every suite shares: environment, contenders that take turns, medians and spread, one JSON object per line."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str) -> dict[str, Any]:
    """Device, threads, versions, commit, load and date. A figure means nothing without them."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "triton", "jax", "hwbp_compiler")},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def commit() -> str | None:
    """The short hash of the checkout, with a + if more than results has changed. None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    status = ("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short", "HEAD") + ("+" if git(*status) else "")
    return None


def names_due(cases: Sequence[Any], done: list[dict[str, Any]]) -> list[str]:
    """The names of the cases that the results lack."""
    known = {row["name"] for row in done}
    return [case.name for case in cases if case.name not in known]


def start_anew() -> None:
    """Forget all compiled code. Otherwise Dynamo's limit on recompilations of one function would be reached."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(
    runs: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, budget: float = float("inf")
) -> dict[str, dict[str, list[float]]]:
    """Run everything in turn ``repeats`` times. Each run returns seconds by name.

    Turns make a busy machine slow all runs alike. The order changes every time, so that no run always finds the memory
    as the same other run left it. A run that has used ``budget`` seconds drops out, but not before its third turn.
    """
    shuffle = random.Random(0).shuffle
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for turn in range(repeats):
        order = list(runs.items())
        shuffle(order)
        for name, run in order:
            if turn >= 3 and spent[name] > budget:
                continue
            start = time.perf_counter()
            for what, seconds in run().items():
                samples[name].setdefault(what, []).append(seconds)
            spent[name] += time.perf_counter() - start
    return samples


def summary(what: str, seconds: list[float]) -> dict[str, float]:
    """Median and interquartile range in milliseconds."""
    if len(seconds) < 2:
        return {f"{what}_ms": seconds[0] * 1e3, f"{what}_iqr_ms": 0.0}
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {f"{what}_ms": middle * 1e3, f"{what}_iqr_ms": (high - low) * 1e3}


def most_held(device: str, run: Callable[[], object]) -> float:
    """The peak of the memory (in megabytes) of tensors that ``run`` allocates. On a CPU, the resident memory of the
    process would not show it: the allocator keeps what an earlier contender has used.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 1e6


def say(*words: object) -> None:
    """Print progress and tables to standard error; standard output is for the rows."""
    print(*words, file=sys.stderr, flush=True)
