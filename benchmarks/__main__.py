"""``python -m benchmarks run [--suite NAME ...] [--device cpu|cuda]``, ``python -m benchmarks report``

``run`` writes one JSON line per case to ``benchmarks/results/SUITE-DEVICE.jsonl`` (and prints it); ``report`` turns
the committed results into ``docs/benchmarks.md`` with its plots. Where a device is lent by the minute,
``run --ahead`` first compiles all cases side by side.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
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
}


def run(suite: str, device: str, quick: bool, only: str = "", ahead: str | None = None, keep: bool = True) -> None:
    """One suite, or its cases with ``only`` in their names. ``ahead``: a folder with caches in which they are compiled
    first, and then no seconds of compilation are reported. Without ``keep`` nothing is written."""
    module = importlib.import_module(f".{SUITES[suite]}", __package__)
    where: dict[str, Any] = {"suite": suite, **environment(device)}
    say(", ".join(f"{key} {value}" for key, value in where.items()))
    if not keep:
        for _ in rows(module, device, quick, [], only):
            pass
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{suite}-{device}{'-quick' if quick else ''}.jsonl"
    resumes = getattr(module, "RESUMES", False)  # such a suite measures what the file lacks
    done = [json.loads(line) for line in path.read_text().splitlines()] if resumes and path.exists() else []
    if ahead is not None and hasattr(module, "names"):
        compile_ahead(suite, device, [name for name in module.names(device, quick, done) if only in name], ahead)
    with path.open("a" if resumes else "w") as file:
        for row in rows(module, device, quick, done, only):
            if ahead is not None:
                row = {key: None if key.startswith("compile_") else value for key, value in row.items()}
            line = json.dumps(where | row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    say(f"written to {path.relative_to(ROOT)}")


def rows(module: ModuleType, device: str, quick: bool, done: list[dict[str, Any]], only: str) -> Any:
    more = {"done": done} if getattr(module, "RESUMES", False) else {}
    return module.run(device, quick, **more, **({"only": only} if hasattr(module, "names") else {}))


def compile_ahead(suite: str, device: str, names: list[str], caches: str) -> None:
    """Every case in a process of its own, as many at once as there are cores; what they measure is thrown away."""
    command = [sys.executable, "-m", "benchmarks", "run", "--suite", suite, "--device", device, "--discard"]

    def one(name: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*command, "--only", name, "--caches", caches], capture_output=True, text=True, env=environment, cwd=ROOT
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, done in zip(names, pool.map(one, names), strict=True):
            say(f"failed: {name}\n{done.stderr[-500:]}" if done.returncode else f"compiled: {name}")


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
    running.add_argument("--ahead", action="store_true", help="compile side by side first, and do not time it")
    running.add_argument("--caches", help="a folder for compile caches, to keep them (default: a new one, thrown away)")
    running.add_argument("--discard", action="store_true", help="write no results")
    commands.add_parser("report", help="docs/benchmarks.md from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from .report import write

        write()
        return
    with tempfile.TemporaryDirectory() as new:
        caches = arguments.caches or new
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
        for suite in arguments.suite:
            ahead = caches if arguments.ahead else None
            run(suite, arguments.device, arguments.quick, arguments.only, ahead, not arguments.discard)


if __name__ == "__main__":
    main()
