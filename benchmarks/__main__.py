"""``python -m benchmarks run [--suite NAME ...] [--device cpu|cuda]``, ``python -m benchmarks report``

``run`` writes one JSON line per case to ``benchmarks/results/SUITE-DEVICE.jsonl`` (and prints it); ``report`` turns
the committed results into ``docs/benchmarks.md`` with its plots.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile

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


def run(suite: str, device: str, quick: bool) -> None:
    """One suite, with compile caches of its own: every compile is a cold one."""
    module = importlib.import_module(f".{SUITES[suite]}", __package__)
    where = {"suite": suite, **environment(device)}
    say(", ".join(f"{key} {value}" for key, value in where.items()))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{suite}-{device}{'-quick' if quick else ''}.jsonl"
    resumes = getattr(module, "RESUMES", False)  # such a suite measures what the file lacks
    done = [json.loads(line) for line in path.read_text().splitlines()] if resumes and path.exists() else []
    with path.open("a" if resumes else "w") as file:
        for row in module.run(device, quick, done) if resumes else module.run(device, quick):
            line = json.dumps(where | row)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()
    say(f"written to {path.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure, and write benchmarks/results")
    running.add_argument("--suite", nargs="*", choices=sorted(SUITES), default=sorted(SUITES))
    running.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    running.add_argument("--quick", action="store_true", help="few and small cases, to see that it works")
    commands.add_parser("report", help="docs/benchmarks.md from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from .report import write

        write()
        return
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for suite in arguments.suite:
            run(suite, arguments.device, arguments.quick)


if __name__ == "__main__":
    main()
