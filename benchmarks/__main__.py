"""``python -m benchmarks run [--suite NAME ...] [--device cpu|cuda]``, ``python -m benchmarks report``

``run`` writes one JSON line per case to ``benchmarks/results/SUITE-DEVICE.jsonl`` (and prints it); ``report`` turns
the committed results into the pages of ``docs/benchmarks/`` with their plots. Where a device is lent by the minute,
``run --ahead 120`` first compiles the cases side by side for at most two minutes, and measures what is compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .harness import ROOT, environment, say

RESULTS = ROOT / "benchmarks" / "results"
SUITES = {
    "recurrent": "recurrent",
    "deep": "unrolled",
    "compile": "compile_time",
    "accuracy": "accuracy",
    "scaling": "scaling",
    "scan": "scan",
    "cells": "cells",
    "loops": "loops",
    "segments": "segments",
    "auto": "auto",
    "beyond": "beyond",
    "engines": "engines",
}


def run(suite: str, device: str, quick: bool, only: str = "", ready: set[str] | None = None, keep: bool = True) -> None:
    """One suite, or its cases with ``only`` in their names. ``ready``: the cases that were compiled ahead; of suites
    with named cases no others are measured, nor seconds of compilation. Without ``keep`` nothing is written."""
    module = importlib.import_module(f".{SUITES[suite]}", __package__)
    where: dict[str, Any] = {"suite": suite, **environment(device)}
    say(", ".join(f"{key} {value}" for key, value in where.items()))
    path, done = results(module, suite, device, quick)
    named = hasattr(module, "names")

    def wanted(name: str) -> bool:
        return only in name and (ready is None or name in ready)

    more = {"done": done} if resumes(module) else {}
    rows = module.run(device, quick, **more, **({"wanted": wanted} if named else {}))
    if not keep:
        for _ in rows:
            pass
        return
    RESULTS.mkdir(exist_ok=True)
    with path.open("a" if resumes(module) else "w") as file:
        for row in rows:
            if named and ready is not None:
                row = {key: None if key.startswith("compile_") else value for key, value in row.items()}
            line = json.dumps(where | row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    say(f"written to {path.relative_to(ROOT)}")


def resumes(module: ModuleType) -> bool:
    """Whether the suite measures what the file of results lacks."""
    return getattr(module, "RESUMES", False)


def results(module: ModuleType, suite: str, device: str, quick: bool) -> tuple[Path, list[dict[str, Any]]]:
    """The file of results, and of a suite that resumes what is there already."""
    path = RESULTS / f"{suite}-{device}{'-quick' if quick else ''}.jsonl"
    there = resumes(module) and path.exists()
    return path, [json.loads(line) for line in path.read_text().splitlines()] if there else []


def compile_ahead(suites: list[str], device: str, quick: bool, only: str, caches: str, seconds: float) -> set[str]:
    """The names of the cases that could be compiled in so many seconds, each in a process of its own, as many at once
    as there are cores. What those measure is thrown away."""
    jobs = []
    for suite in suites:
        module = importlib.import_module(f".{SUITES[suite]}", __package__)
        if hasattr(module, "names"):
            names = module.names(device, quick, results(module, suite, device, quick)[1])
            jobs += [(suite, name) for name in names if only in name]
    command = [sys.executable, "-m", "benchmarks", "run", "--device", device, "--discard", "--caches", caches]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    end = time.monotonic() + seconds

    def one(job: tuple[str, str]) -> str:
        left = max(1.0, end - time.monotonic())
        mine = [*command, "--suite", job[0], "--only", job[1], *(["--quick"] if quick else [])]
        try:
            done = subprocess.run(mine, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=left)
        except subprocess.TimeoutExpired:
            return "took too long"
        return done.stderr[-500:] if done.returncode else ""

    ready = set()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (_, name), problem in zip(jobs, pool.map(one, jobs), strict=True):
            say(f"{name}: {problem}" if problem else f"compiled: {name}")
            if not problem:
                ready.add(name)
    return ready


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and write benchmarks/results")
    running.add_argument("--suite", nargs="*", choices=sorted(SUITES), default=sorted(SUITES))
    running.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--quick", action="store_true", help="few and small cases, to see that it works")
    running.add_argument("--only", default="", help="of suites with named cases, those whose name contains this")
    running.add_argument("--ahead", type=float, metavar="SECONDS", help="compile side by side first, untimed")
    running.add_argument("--caches", help="a folder for compile caches, to keep them (default: a new one, thrown away)")
    running.add_argument("--discard", action="store_true", help="write no results")
    commands.add_parser("report", help="docs/benchmarks/ from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from .report import write

        write()
        return
    with tempfile.TemporaryDirectory() as new:
        caches = arguments.caches or new
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        given = arguments.device, arguments.quick, arguments.only
        ready = None if arguments.ahead is None else compile_ahead(arguments.suite, *given, caches, arguments.ahead)
        for suite in arguments.suite:
            run(suite, *given, ready, not arguments.discard)


if __name__ == "__main__":
    main()
