"""Whether "auto", the default, trains as well as exact backprop: ``python -m benchmarks run --suite auto``

``"kind": "course"``: the same short trainings as in ``segments``, from several seeds, with exact gradients and with the
default options (compared with the exact gradient at every ``CHECK_EVERY``-th step). Rows hold the held-out quality
during training, the form in use at every check, and its cosine with the exact gradient. ``forms`` is empty if "auto"
found nothing that it expects to be faster. Then it *is* exact backprop, and one seed is enough to show that.

``"kind": "time"``: a training step of the same model in turn with eager mode, Inductor, our exact backprop, and the
default options between two checks. The time of a check is reported too.

The suite can be interrupted and restarted, like ``segments``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import hwbp_compiler

from .harness import in_turns, say, start_anew, summary, synchronize
from .segments import CASES, CLIP, LOOKS, SEEDS, Case, example, problem

RESUMES = True
KINDS = ("course", "time")
CHECK_EVERY = 20
# As in ``segments``, and with batches so small that a recurrence spends its time waiting for its steps.


def one_long_sequence(cell: str) -> Case:
    words = ("--cell", cell, "--width", "128", "--length", "512")
    name = f"{cell.upper()}, text, 512 steps, batch 1"
    return Case(name, "char_lm", words, 512, "rnn.", "held_out_loss", steps=800, lr=3e-3, batch=1)


LONG = [case for case in CASES if case.name.endswith("256 steps")]
OWN = [
    *(case for case in CASES if case.steps <= 600),
    *(replace(case, name=f"{case.name}, batch 4", batch=4, lr=3e-3, steps=800) for case in LONG),
    *map(one_long_sequence, ("gru", "lstm")),
]
QUICK = [replace(OWN[0], name="quick", steps=6, batch=2, hidden=8)]
RUNS: dict[str, dict[str, Any]] = {
    "exact": {"iterations": "exact"},
    "auto": {"check_every": CHECK_EVERY},
}


class Watched:
    """The measurements of a compiled model at each step of a training."""

    def __init__(self, compiled: Any) -> None:
        self.step = 0
        self.checks: list[list[Any]] = []  # step, k, S, cosine, whether it was in use
        self.meter = hwbp_compiler.GradientMeter(compiled, callback=self._take, warn_below=None)

    def _take(self, reading: Any) -> None:
        # The result of a check is read at the step after it.
        found = [self.step - 1, reading.iterations, reading.segment, reading.cosine, reading.trains]
        self.checks.append(found)


def train(case: Case, task: Any, device: str, function: Any, watched: Watched) -> tuple[list[Any], list[float]]:
    """As ``segments.train``; also returns the seconds of every step."""
    training = example("training")
    model = task.model
    optimizer = torch.optim.Adam(model.parameters(), lr=case.lr)
    course, seconds = [], []
    for step in range(1, case.steps + 1):
        watched.step = step
        x, target = (tensor.to(device) for tensor in task.batch(step))
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, case.steps, case.lr)
        optimizer.zero_grad()
        synchronize(device)
        start = time.perf_counter()
        task.loss(function(x), target).backward()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % max(1, case.steps // LOOKS) == 0 or step == case.steps:
            course.append((step, training.evaluate(task)[case.metric]))
    return course, seconds


def course_rows(case: Case, device: str, quick: bool, before: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    done = {(row["run"], row["seed"]) for row in before}
    chosen = all(row["checks"] for row in before if row["run"] == "auto")
    for run in ("auto", "exact"):
        for seed in SEEDS[:1] if quick or not chosen else SEEDS:
            if (run, seed) in done:
                continue
            start_anew()
            task, _ = problem(case, seed)
            model = task.model.to(device).train()
            compiled = torch.compile(model, backend="highway", dynamic=False, options=RUNS[run])
            watched = Watched(compiled)
            course, seconds = train(case, task, device, compiled, watched)
            chosen = chosen and (run == "exact" or bool(watched.checks))
            used = [[step, k, s, c] for step, k, s, c, trains in watched.checks if trains]
            said = f"{case.metric} {course[-1][1]:.4f}; in use when checked: {used}"
            say(f"{case.name}, {run}, seed {seed}: {said}")
            yield {
                "run": run, "seed": seed, "metric": case.metric, "value": course[-1][1], "course": course,
                "steps": case.steps, "batch": case.batch, "length": case.length, "checks": watched.checks,
                "step_ms": statistics.median(seconds[2:]) * 1e3, "mean_ms": statistics.mean(seconds[2:]) * 1e3,
            }  # fmt: skip
            if not chosen:
                break


def time_rows(case: Case, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    start_anew()
    task, _ = problem(case, SEEDS[0])
    model = task.model.to(device).train()
    x, target = (tensor.to(device) for tensor in task.batch(1))

    def step(function: Callable[[Tensor], Tensor]) -> dict[str, float]:
        model.zero_grad()
        synchronize(device)
        start = time.perf_counter()
        task.loss(function(x), target).backward()
        synchronize(device)
        return {"step": time.perf_counter() - start}

    functions = {
        "eager": model,
        "Inductor": torch.compile(model, backend="inductor", dynamic=False),
        "exact": torch.compile(model, backend="highway", dynamic=False, options=RUNS["exact"]),
        "auto": torch.compile(model, backend="highway", dynamic=False, options={"check_every": 10**6}),
    }
    for function in functions.values():
        for _ in range(3):
            step(function)
    # Here any form is good enough, so that every step of it is a check.
    every = {"check_every": 1, "target_cosine": 1e-6}
    checking = torch.compile(model, backend="highway", dynamic=False, options=every)
    hwbp_compiler.reset_counters()
    seconds = [step(checking)["step"] for _ in range(4 if quick else 8)][1:]
    checks = hwbp_compiler.counters().get("checks", 0)  # read at the step after each check
    check = statistics.median(seconds) * 1e3 if checks == len(seconds) else None
    samples = in_turns({name: lambda f=f: step(f) for name, f in functions.items()}, 5 if quick else 41, 8.0)  # type: ignore[misc]
    for name, found in samples.items():
        row = {"run": name, "batch": case.batch, "length": case.length, **summary("step", found["step"])}
        say(f"{case.name}, {name}: {row['step_ms']:.2f} ms ({row['step_iqr_ms']:.2f})")
        yield row | ({"checked_ms": check} if name == "auto" else {})


def name_of(kind: str, case: Case) -> str:
    return f"{kind}; {case.name};"


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    """Nothing is compiled ahead."""
    return []


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    """The rows that ``done`` lacks."""
    courses = [row for row in done if row["kind"] == "course"]
    times = {row["case"] for row in done if row["kind"] == "time"}
    for kind in KINDS:
        for case in QUICK if quick else OWN:
            if not wanted(name_of(kind, case)):
                continue
            found: Iterator[dict[str, Any]] = iter(())
            if kind == "course":
                found = course_rows(case, device, quick, [row for row in courses if row["case"] == case.name])
            elif case.name not in times:
                found = iter(list(time_rows(case, device, quick)))
            for row in found:
                yield {"kind": kind, "case": case.name, **row}
