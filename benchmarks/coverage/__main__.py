"""``python -m benchmarks.coverage run [--only PATTERN] [--limit-seconds N] [--again]``, ``... report``

``run`` measures every model in its own process and immediately writes one JSON line each to
``benchmarks/results/coverage.jsonl``. It skips a model that has a line there, unless torch, the model's package or the
model itself has changed. ``report`` writes ``docs/coverage.md`` from these lines.
"""

from __future__ import annotations

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="measure what the results lack")
    running.add_argument("--only", default="", help="models whose family/name this regular expression is in")
    running.add_argument("--limit-seconds", type=float, default=180.0, help="for one model")
    running.add_argument("--again", action="store_true", help="also what is there already")
    commands.add_parser("report", help="docs/coverage.md from the committed results")
    arguments = parser.parse_args()
    if arguments.command == "report":
        from .report import write

        write()
        return
    from .cases import CASES
    from .runner import run

    run(CASES, arguments.only, arguments.limit_seconds, arguments.again)


if __name__ == "__main__":
    main()
