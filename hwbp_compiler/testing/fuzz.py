"""Rewrite random programs with random options and compare their gradients with the float64 oracle.

    python -m hwbp_compiler.testing.fuzz --seconds 60 --seed 0

This draws models from :mod:`.strategies` and settings (k, gamma, S, ``min_length``), rewrites the joint graph without
generating code, and checks the gradients with :func:`.judge.judge`. A small share of the programs goes through Dynamo
and AOTAutograd. A smaller share goes through all of torch.compile; half of these are first compiled by another backend.
``--generated 1`` runs Inductor's code for every program, also with buffers that are never reused. Hypothesis reduces a
failing program to a small one, which is saved as a script. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import logging
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from hwbp_compiler.torch_private import SkipFrame, functorch_config, inductor_config

from . import models
from .capture import capture, leaves_of, options, trace
from .cases import Setting, cases
from .compare import total_norm
from .generated import APART, assert_same, kernels_together, run_generated
from .judge import Verdict, judge
from .models import Model, Recurrence, Stack
from .modules import Loop
from .reference import reference_gradients

Route = Literal["trace", "dynamo", "rolled", "symbolic", "inductor", "generated"]
BATCH = 200
LINEAR = ("min_gru", "diagonal", "gates")  # cells whose gates do not see the state
LARGEST = 400  # nodes of a rewritten graph whose generated code is run


def check(
    spec: Model, chosen: tuple[Setting, ...], route: Route = "trace", largest: float = float("inf")
) -> list[tuple[Verdict, list[Any]]]:
    """Assert that ``spec`` has the oracle's gradients under each setting.

    The result is empty if nothing in the model requires a gradient. Raises TooLarge if ``route`` is ``"generated"``
    and the rewritten graph has more than ``largest`` nodes.
    """
    model, args, loss = models.build(spec)
    if not any(leaf.requires_grad for leaf in leaves_of(model, args).values()):
        return []
    if route == "trace" and _in_place(spec):
        route = "dynamo"
    if route in ("rolled", "symbolic") and any(isinstance(s, Recurrence) and s.cell in LINEAR for s in spec.stacks):
        chosen = tuple(replace(setting, damping=0.0) for setting in chosen)  # rolled up, it is a scan without blocks
    if route == "generated":  # takes seconds each: use one setting, under which something is truncated
        chosen = (_below_length(spec, chosen[0]),)
    low = spec.dtype == "float32" or any(_casts(stage) for stage in spec.stacks)
    reference = copy.deepcopy(model).double()  # the same numbers
    wide_args = tuple(a.detach().double().requires_grad_(a.requires_grad) for a in args)
    # The compiler may leave loops alone if they have very few steps, or if they have no blocks and so are exact.
    loops = any(isinstance(stage, Recurrence) for stage in spec.stacks)
    found = []
    routes: dict[Route, Callable[..., Iterator[Any]]] = {
        "trace": _traced, "generated": functools.partial(_generated, largest=largest), "dynamo": _through_dynamo,
        "rolled": _rolled, "symbolic": _symbolic, "inductor": _through_inductor,
    }  # fmt: skip
    results = routes[route](spec, chosen)
    for setting, (output, gradients, records) in zip(chosen, results, strict=True):
        tolerance = 1e-6
        if low:
            loose = _rounding(model, args, reference, wide_args, loss, setting)
            if not loose < 1e-3:
                continue  # float32 gives no information about this one
            tolerance = max(5e-3, 50 * loose)
        verdict = judge(
            models.programs(reference), wide_args, loss, _widened(output), gradients, records,
            iterations=setting.iterations, damping=setting.damping, segment=setting.segment,
            least=max(setting.min_length, 3), tails=not spec.pinned,
            tolerance=tolerance, noise=1e-4 if low else 1e-12, forward_tolerance=1e-3 if low else 1e-11,
        )  # fmt: skip
        found.append((verdict, records))
        assert not verdict.missed or loops or not spec.pinned, (
            f"{verdict.missed} chains were passed over without a record: of lengths {verdict.lengths}, "
            f"rewritten {verdict.rewritten}"
        )
        failed = [record.reason for record in records if record.failed]
        assert not failed, f"rewriting failed: {failed[0]}"
    return found


def _rounding(
    model: Any, args: tuple[Any, ...], reference: Any, wide_args: tuple[Any, ...], loss: Any, setting: Setting
) -> float:
    """The error of the oracle itself in float32: the worst relative error of any gradient that is not noise."""
    k, gamma, segment = setting.iterations, setting.damping, setting.segment
    pair = [
        reference_gradients(next(models.programs(m)), a, loss, k, gamma, segment=segment)[1]
        for m, a in ((model, args), (_other_rounding(reference), wide_args))
    ]
    whole = total_norm(pair[1])
    worst = 0.0
    for key, exact in pair[1].items():
        if float(exact.norm()) > 1e-3 * whole:
            worst = max(worst, float((pair[0][key].double() - exact).norm() / exact.norm()))
    return worst


def _other_rounding(model: Any) -> Any:
    """The same model with a float32 rounding error added to every parameter, so that casts inside round differently."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(1.0 + 1e-7 * torch.sign(torch.sin(1e3 * parameter)))
    return moved


def _casts(stage: models.Stage) -> bool:
    return isinstance(stage, Stack) and (stage.after == "cast" or "cast" in stage.blocks)


def _widened(output: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double(), output)


def _below_length(spec: Model, setting: Setting) -> Setting:
    """The setting with k and S small enough that the shortest chain of ``spec`` is not exact."""
    length = min(stage.depth if isinstance(stage, Stack) else spec.length for stage in spec.stacks)
    segment = min(setting.segment, max(1, length // 2))
    runs = -(-length // segment)
    return replace(setting, segment=segment, iterations=setting.iterations % max(1, runs - 1))


def _options(setting: Setting) -> Any:
    return options(**vars(setting))


def _traced(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    traced = trace(*models.build(spec))
    for setting in chosen:
        yield traced.gradients(_options(setting))


def _in_place(spec: Model) -> bool:
    """Whether ``spec`` has blocks that change something in place, which ``trace`` refuses."""
    return any(isinstance(stage, Stack) and "in_place" in stage.blocks for stage in spec.stacks)


def _generated(spec: Model, chosen: tuple[Setting, ...], largest: float) -> Iterator[Any]:
    if _in_place(spec):
        with kernels_together():
            yield from list(_through_inductor(spec, chosen))
        return

    def run_if_small(root: torch.fx.GraphModule, graph: torch.fx.Graph, inputs: list[Any]) -> Any:
        if len(graph.nodes) > largest:
            raise TooLarge
        return run_generated(root, graph, inputs)

    traced = trace(*models.build(spec))
    for setting in chosen:
        yield traced.gradients(_options(setting), run_if_small)


class TooLarge(Exception):
    """A program that takes Inductor too long for a fuzzer."""


def _through_dynamo(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    captured = capture(*models.build(spec), dynamic=spec.dynamic)
    for setting in chosen:
        yield captured.gradients(_options(setting))


def _rolled(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """Run through Dynamo, which unrolls the loops over time, and roll all loops up again. Sizes are static. Otherwise
    Dynamo may treat a size as a symbol until the first step shows that it is a number, and then the first step differs
    from the others.
    """
    captured = capture(*models.build(spec), dynamic=False)
    captured._options = options(reroll="always")
    for setting in chosen:
        yield captured.gradients(options(reroll="always", **vars(setting)))


def _symbolic(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """All sizes are symbols, also those of the weights, and loops call ``recurrent``."""
    model, args, loss = models.build(spec)
    for module in model.modules():
        if isinstance(module, Loop):
            module.rolled = True
    captured = capture(model, args, loss, dynamic=True, functional=True)
    for setting in chosen:
        yield captured.gradients(_options(setting))


def _through_inductor(spec: Model, chosen: tuple[Setting, ...]) -> Iterator[Any]:
    """Each setting is compiled twice, the second time for memory that is never reused. Both must agree."""
    for setting in chosen:
        result = _compiled_by_inductor(spec, setting)
        with inductor_config.patch(APART):
            _, apart, _ = _compiled_by_inductor(spec, setting)
        assert_same(result[1].values(), apart.values())
        yield result


def _compiled_by_inductor(spec: Model, setting: Setting) -> Any:
    from hwbp_compiler import passes

    model, args, loss = models.build(spec)
    records: list[Any] = []
    run = passes.run

    def noting(graph: Any, options: Any) -> Any:
        found = run(graph, options)
        records.extend(found)
        return found

    torch._dynamo.reset()
    _another_backend_first(spec)
    ours = {"strict": True, **vars(setting), "fx_graph_cache": False}
    with mock.patch.object(passes, "run", noting), functorch_config.patch(enable_autograd_cache=False):
        compiled = torch.compile(model, backend="highway", options=ours, dynamic=spec.dynamic or None)
        output = compiled(*args)
        leaves = leaves_of(model, args)
        found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    gradients = {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }
    return output, gradients, records


def _another_backend_first(spec: Model) -> None:
    """Compile half of the programs with another backend first. For half of these, Dynamo gives up on all the code."""
    lot = zlib.crc32(repr(spec).encode()[::-1]) % 4
    if lot < 2:
        model, args, _ = models.build(spec)
        torch.compile(model, backend="aot_eager" if lot else _gives_up)(*args)


def _gives_up(module: Any, inputs: Any) -> Any:
    raise SkipFrame


# ------------------------------------------------------------------------------------------------- the run


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
            self.kinds["loops" if isinstance(stage, Recurrence) else "skips" if stage.skips else "stacks"] += 1
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


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


class Fuzzer:
    def __init__(
        self, seed: int, seconds: float, folder: Path, dynamo: float, inductor: float, shrinking: float = 60.0,
        generated: float = 0.0, rolled: float = 0.0, symbolic: float = 0.0,
    ) -> None:  # fmt: skip
        self.shrinking, self.limit = shrinking, float("inf")
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

        @seeded(self.seed * 1_000_003 + number)
        @settings(
            max_examples=BATCH, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), print_blob=False,
        )  # fmt: skip
        @given(cases(generated=self.shares["generated"] >= 1))
        def one(case: tuple[Model, tuple[Setting, ...]]) -> None:
            spec, chosen = case
            route: Route = "trace"
            lot = zlib.crc32(repr(spec).encode()) / 2**32
            for other, share in self.shares.items():
                if 0 <= lot < share and (not first_failure or other == "generated"):
                    route = other
                lot -= share
            key = repr((spec, chosen))
            if key in failed:
                raise failed[key][3]
            late = time.monotonic() > (first_failure[0] + self.shrinking if first_failure else self.end)
            if key in passed or late or (not first_failure and self.report.programs >= self.limit):
                return
            name = zlib.crc32(repr(spec).encode())
            if not first_failure and name in self.seen:
                return
            try:
                found = check(spec, chosen, route, LARGEST)
            except TooLarge:
                self.report.too_large += 1
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
                self.seen.add(name)
                self.report.add(spec, route, found)

        try:
            one()
        except BaseException as error:
            if not failed or isinstance(error, KeyboardInterrupt):
                raise
            self._save(min(failed.values(), key=lambda f: len(repr(f[0])) + len(repr(f[1]))))

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
            "from hwbp_compiler.testing.models import Model, Recurrence, Stack\n\n"
            f"check(\n    {spec!r},\n    {chosen!r},\n    {route!r},\n)\n"
        )
        self.report.failures.append(path)
        print(f"FAILURE {path}: {type(error).__name__}: {str(error)[:300]}\n  {spec!r}\n  {chosen!r}", flush=True)


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
    parser.add_argument("--shrinking", type=float, default=60.0, help="seconds spent on minimising a failure")
    given_ = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("hwbp_compiler").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    most = float("inf") if given_.programs is None else given_.programs
    seconds = given_.seconds if given_.seconds is not None else 60.0 if given_.programs is None else float("inf")
    shares = {name: getattr(given_, name) for name in ("dynamo", "rolled", "symbolic", "inductor", "generated")}
    fuzzer = Fuzzer(given_.seed, seconds, given_.output, shrinking=given_.shrinking, **shares)
    report = fuzzer.run(most)
    print(report)
    return 1 if report.failures else 0


__all__ = ["Fuzzer", "Report", "Setting", "check", "main"]

if __name__ == "__main__":
    sys.exit(main())
