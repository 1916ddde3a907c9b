"""Rewrite random programs with random options and compare their gradients with the float64 oracle.

    python -m hwbp_compiler.testing.fuzz --seconds 60 --seed 0

This draws models from :mod:`.strategies` and settings (k, gamma, S, ``min_length``), rewrites the joint graph without
generating code, and checks the gradients with :func:`.judge.judge`. A small share of the programs goes through Dynamo
and AOTAutograd. A smaller share goes through all of torch.compile; half of these are first compiled by another backend.
``--generated 1`` runs Inductor's code for every program, also with buffers that are never reused; then ``--abreast 12``
saves the time of most calls of the C++ compiler. Hypothesis reduces a failing program to a small one, which is saved as
a script. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import logging
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from .cases import Setting, cases
from .judge import Verdict
from .models import Model, Recurrence, Stage, Streams
from .routes import Route, TooLarge, check
from .turns import Outcome, outcomes

Case = tuple[Model, tuple[Setting, ...]]
BATCH = 200


@dataclass
class Report:
    """The results of a run. ``programs`` counts different models, ``checks`` the settings compared with the oracle."""

    programs: int = 0
    checks: int = 0
    nothing: int = 0
    too_large: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    chains: Counter[str] = field(default_factory=Counter)
    declined: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[Path] = field(default_factory=list)

    def add(self, spec: Model, route: Route, found: list[tuple[Verdict, list[Any]]]) -> None:
        self.programs += 1
        self.nothing += not found
        self.routes[route] += 1
        for stage in spec.stacks:
            self.kinds[_kind(stage)] += 1
        for verdict, records in found:
            self.checks += 1
            self.chains["drawn"] += len(verdict.lengths)
            self.chains["rewritten"] += sum(verdict.rewritten)
            self.chains["passed over without a record"] += verdict.missed
            for record in records:
                if record.decision == "declined":
                    self.declined[record.reason_code.name.lower() if record.reason_code else "?"] += 1

    def __str__(self) -> str:
        lines = [
            f"{self.programs} programs ({_listed(self.routes)}), {self.checks} comparisons with the oracle, "
            f"{self.nothing} programs without any gradient, {self.too_large} further ones too large for Inductor",
            f"stages: {_listed(self.kinds)}",
            f"chains: {_listed(self.chains)}",
            *(f"  declined {count:6d}: {reason}" for reason, count in self.declined.most_common()),
            f"{len(self.failures)} failures",
            *(f"  {path}" for path in self.failures),
        ]
        return "\n".join(lines)


def _kind(stage: Stage) -> str:
    if isinstance(stage, Recurrence):
        return "loops"
    return "streams" if isinstance(stage, Streams) else "skips" if stage.skips else "stacks"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


class Fuzzer:
    def __init__(
        self, seed: int, seconds: float, folder: Path, dynamo: float, inductor: float, shrinking: float = 60.0,
        generated: float = 0.0, rolled: float = 0.0, symbolic: float = 0.0, abreast: int = 1, largest: int = 400,
    ) -> None:  # fmt: skip
        self.shrinking, self.limit, self.abreast = shrinking, float("inf"), abreast
        self.largest = largest
        self.seed, self.folder = seed, folder
        self.end = time.monotonic() + seconds
        self.shares: dict[Route, float] = {
            "inductor": inductor, "dynamo": dynamo, "rolled": rolled, "symbolic": symbolic, "generated": generated,
        }  # fmt: skip
        self.report = Report()
        self.seen: set[int] = set()
        self.known: set[str] = set()

    def run(self, max_programs: float = float("inf"), progress: float = 60.0) -> Report:
        self.limit = max_programs
        said = time.monotonic()
        batch = 0
        while time.monotonic() < self.end and self.report.programs < max_programs:
            self._batch(batch)
            batch += 1
            if batch % 8 == 0:
                gc.collect()
            if time.monotonic() - said > progress:
                said = time.monotonic()
                print(f"{self.report.programs} programs, {self.report.checks} comparisons, "
                      f"{len(self.report.failures)} failures", flush=True)  # fmt: skip
        return self.report

    def _batch(self, number: int) -> None:
        failed: dict[str, tuple[Model, tuple[Setting, ...], Route, BaseException]] = {}
        passed: set[str] = set()
        first_failure: list[float] = []

        ahead = _Ahead(self, self._drawn(number)) if self.abreast > 1 else None

        @self._over_batch(number)
        def one(case: Case) -> None:
            spec, chosen = case
            route = self.route(spec)
            if first_failure and route != "generated":
                route = "trace"
            key = repr(case)
            if key in failed:
                raise failed[key][3]
            late = time.monotonic() > (first_failure[0] + self.shrinking if first_failure else self.end)
            if key in passed or late or (not first_failure and self.report.programs >= self.limit):
                return
            if not first_failure and not self.is_new(spec):
                return
            try:
                found = ahead.check(case) if ahead and not first_failure else check(spec, chosen, route, self.largest)
            except TooLarge:
                self.report.too_large += 1
                self.seen.add(_name(spec))
                passed.add(key)
                return
            except Exception as error:
                if _signature(error) in self.known:
                    return
                failed[key] = (spec, chosen, route, error)
                first_failure.append(time.monotonic())
                raise
            passed.add(key)
            if not first_failure:
                self.seen.add(_name(spec))
                self.report.add(spec, route, found)

        try:
            one()
        except BaseException as error:
            if not failed or isinstance(error, KeyboardInterrupt):
                raise
            self._save(min(failed.values(), key=lambda f: len(repr(f[0])) + len(repr(f[1]))))

    def _over_batch(self, number: int) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
        """A decorator. The function is called with each case of the batch, and with smaller cases after a failure."""

        def decorate(function: Callable[[Case], None]) -> Callable[[], None]:
            limited = settings(
                max_examples=BATCH, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
                suppress_health_check=list(HealthCheck), print_blob=False,
            )  # fmt: skip
            over = given(cases(generated=self.shares["generated"] >= 1))
            return seeded(self.seed * 1_000_003 + number)(limited(over(function)))

        return decorate

    def _drawn(self, number: int) -> list[Case]:
        found: list[Case] = []
        self._over_batch(number)(lambda case: found.append(case))()
        return found

    def is_new(self, spec: Model) -> bool:
        return _name(spec) not in self.seen

    def route(self, spec: Model) -> Route:
        """The way that ``spec`` takes. The same model always takes the same way."""
        lot = _name(spec) / 2**32
        for route, share in self.shares.items():
            if 0 <= lot < share:
                return route
            lot -= share
        return "trace"

    def _save(self, failure: tuple[Model, tuple[Setting, ...], Route, BaseException]) -> None:
        spec, chosen, route, error = failure
        if not isinstance(error, AssertionError):  # crashes are distinguished by where they happened
            self.known.add(_signature(error))
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"failure_{self.seed}_{len(self.report.failures)}.py"
        text = "".join(traceback.format_exception(error))
        comment = "\n".join(f"# {line}" for line in text.splitlines()[-25:])
        path.write_text(
            f"{comment}\nfrom hwbp_compiler.testing.fuzz import Setting, check\n"
            "from hwbp_compiler.testing.models import Model, Recurrence, Stack, Streams\n\n"
            f"check(\n    {spec!r},\n    {chosen!r},\n    {route!r},\n)\n"
        )
        self.report.failures.append(path)
        print(f"FAILURE {path}: {type(error).__name__}: {str(error)[:300]}\n  {spec!r}\n  {chosen!r}", flush=True)


def _name(spec: Model) -> int:
    return zlib.crc32(repr(spec).encode())


class _Ahead:
    """Checks the next cases in turns before hypothesis comes to them."""

    def __init__(self, fuzzer: Fuzzer, upcoming: list[Case]) -> None:
        self.fuzzer, self.upcoming = fuzzer, upcoming
        self.found: dict[str, Outcome] = {}

    def check(self, case: Case) -> list[tuple[Verdict, list[Any]]]:
        """The same as ``check``, and it raises the same."""
        if repr(case) not in self.found:
            self._run_from(case)
        return self.found[repr(case)].get()

    def _run_from(self, case: Case) -> None:
        start = self.upcoming.index(case) if case in self.upcoming else len(self.upcoming)
        wanted = {_name(case[0]): case}
        for other in self.upcoming[start:]:
            if len(wanted) < self.fuzzer.abreast and self.fuzzer.is_new(other[0]) and repr(other) not in self.found:
                wanted.setdefault(_name(other[0]), other)
        tasks = [
            functools.partial(check, *each, self.fuzzer.route(each[0]), self.fuzzer.largest) for each in wanted.values()
        ]
        self.found.update(zip(map(repr, wanted.values()), outcomes(tasks), strict=True))


def _signature(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__} {place}" if not isinstance(error, AssertionError) else str(error)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hwbp_compiler.testing.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, help="default: 60, or as long as --programs takes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--programs", type=int, help="stop after so many")
    parser.add_argument("--output", type=Path, default=Path("fuzz_failures"), help="folder for scripts that repeat")
    parser.add_argument("--dynamo", type=float, default=0.01, help="share that goes through Dynamo and AOTAutograd")
    parser.add_argument("--rolled", type=float, default=0.01, help="share whose loops are rolled up")
    parser.add_argument("--symbolic", type=float, default=0.003, help="share whose weights have symbolic sizes")
    parser.add_argument("--inductor", type=float, default=0.001, help="share that is compiled and run by Inductor")
    parser.add_argument("--generated", type=float, default=0.0, help="share whose Inductor code is run, twice")
    parser.add_argument("--abreast", type=int, default=1, help="models whose kernels are built together")
    parser.add_argument("--largest", type=int, default=400, help="nodes of a joint graph that --generated compiles")
    parser.add_argument("--shrinking", type=float, default=60.0, help="seconds spent on minimising a failure")
    given_ = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("hwbp_compiler").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    gc.set_threshold(100_000, 20, 100)
    most = float("inf") if given_.programs is None else given_.programs
    seconds = given_.seconds if given_.seconds is not None else 60.0 if given_.programs is None else float("inf")
    shares = {name: getattr(given_, name) for name in ("dynamo", "rolled", "symbolic", "inductor", "generated")}
    fuzzer = Fuzzer(
        given_.seed, seconds, given_.output, shrinking=given_.shrinking, abreast=given_.abreast,
        largest=given_.largest, **shares,
    )  # fmt: skip
    report = fuzzer.run(most)
    print(report)
    return 1 if report.failures else 0


__all__ = ["Fuzzer", "Report", "Setting", "check", "main"]

if __name__ == "__main__":
    sys.exit(main())
