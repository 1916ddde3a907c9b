"""What approximate gradients cost in quality: ``python -m benchmarks run --suite accuracy``

These are the paper's experiments, made small enough for two CPU cores and an hour: a ResNet of 15 links, language
models (a Transformer, a GRU), and a GRU that reads images pixel by pixel. Each is trained from three seeds with exact
backprop, with Highway-BP at k = 0, 1, 3, 5, 10, and with fixed-point iteration. They are the scripts in ``examples/``
with the arguments below. The same seed gives the same weights and batches with every method.

There are two kinds of rows. ``"kind": "quality"``: what a run reached on held-out data. ``"kind": "cosine"`` (the
paper's Figure 6): the cosine between each method's gradient of all parameters and the exact one, averaged over
``BATCHES`` batches, at the weights of the exact run of the first seed after ``step`` steps.

The suite can be interrupted and restarted: it skips rows that the results file has.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

import hwbp_compiler

from .harness import ROOT, say

RESUMES = True
SEEDS = (0, 1, 2)
QUALITY_EVERY = 8  # evaluations on held-out data in a run; gradients are compared at the same steps
BATCHES = 4


@dataclass(frozen=True)
class Method:
    label: str
    iterations: int | None  # None: exact backprop
    damping: float | None = None  # None: the example's own

    def arguments(self) -> list[str]:
        if self.iterations is None:
            return ["--method", "exact"]
        words = ["--method", "fpi" if self.damping == 1 else "highway", "--iterations", str(self.iterations)]
        return words if self.damping is None else [*words, "--damping", str(self.damping)]


EXACT = Method("exact", None)
HIGHWAY = [Method(f"k={k}", k) for k in (0, 1, 3, 5, 10)]
FPI = [Method(f"FPI k={k}", k, 1.0) for k in (1, 3, 10)]
UNDAMPED = [Method(f"k={k}, damping 0", k, 0.0) for k in (3,)]


@dataclass(frozen=True)
class Case:
    name: str
    example: str
    words: tuple[str, ...]
    metric: str
    methods: tuple[Method, ...]


CASES = [
    Case("ResNet32, digits", "resnet_cifar", ("--epochs", "12"), "accuracy", (EXACT, *HIGHWAY, *FPI)),
    Case(
        "Transformer, text", "char_lm", ("--cell", "transformer", "--batch", "8", "--steps", "400"),
        "held_out_loss", (EXACT, *HIGHWAY, *UNDAMPED, *FPI),
    ),
    Case("GRU, pixel by pixel", "pixel_gru", ("--epochs", "40"), "accuracy", (EXACT, *HIGHWAY, *FPI)),
    Case("GRU, text", "char_lm", ("--cell", "gru", "--steps", "400"), "held_out_loss", (EXACT, *HIGHWAY, *FPI)),
]  # fmt: skip


def example(name: str) -> ModuleType:
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


class Trained:
    """One case and one method: compiled once, trained from any seed."""

    def __init__(self, case: Case, method: Method, device: str, quick: bool) -> None:
        self.case, self.method, self.device, self.quick = case, method, device, quick
        self.training, self.module = example("training"), example(case.example)
        torch._dynamo.reset()
        before = hwbp_compiler.counters()
        start = time.perf_counter()
        args = self.arguments(SEEDS[0])
        self.model = self.module.task(args).model.to(device)
        self.compiled = torch.compile(self.model, backend="highway", options=self.training.compile_options(args))
        self.gradient(self.module.task(args), 1)  # compiles
        self.compile_s = time.perf_counter() - start
        self.rewritten = hwbp_compiler.counters()["chains_rewritten"] - before["chains_rewritten"]
        if method.iterations is not None and not self.rewritten:
            raise LookupError(f"{case.name}, {method.label}: no chain was rewritten, the gradients would be exact")

    def arguments(self, seed: int) -> Namespace:
        words = [*self.case.words, *self.method.arguments(), "--seed", str(seed), "--device", self.device]
        args: Namespace = self.module.arguments(words)
        if self.quick:
            args.steps = 6
        return args

    def steps(self, seed: int) -> int:
        args = self.arguments(seed)
        return int(args.steps or max(1, round(args.epochs * self.module.task(args).epoch)))

    def run(self, seed: int, look: Callable[[dict[str, torch.Tensor]], None] = lambda state: None) -> dict[str, Any]:
        """Train. ``look`` receives the weights at every evaluation on held-out data."""
        args = self.arguments(seed)
        task = self.module.task(args)
        self.model.load_state_dict(task.model.state_dict())

        def evaluate(model: torch.nn.Module) -> dict[str, float]:
            look({key: value.clone() for key, value in model.state_dict().items()})
            return task.evaluate(model)

        with tempfile.TemporaryDirectory() as out:
            args.out, args.every = Path(out), max(1, self.steps(seed) // QUALITY_EVERY)
            start = time.perf_counter()
            log = self.training.train(replace(task, model=self.model, evaluate=evaluate), args, self.compiled)
            seconds = time.perf_counter() - start
        values = [row[self.case.metric] for row in log if self.case.metric in row]
        return {
            "value": values[-1],
            "course": [(row["step"], row[self.case.metric]) for row in log if self.case.metric in row],
            "train_loss": log[-1]["loss"],
            "steps": self.steps(seed),
            "seconds": seconds,
            "compile_s": self.compile_s,
            "chains_rewritten": self.rewritten,
        }

    def gradient(self, task: Any, step: int) -> torch.Tensor:
        """The method's gradient on the batch of a step, at the model's current weights."""
        x, target = (tensor.to(self.device) for tensor in task.batch(step))
        torch.manual_seed(step)  # for dropout masks
        found: torch.Tensor = self.training.gradient(replace(task, model=self.model), self.compiled, x, target)
        return found


class Course:
    """The exact run of the first seed: its weights on the way, and its gradients at them."""

    def __init__(self, case: Case, device: str, quick: bool) -> None:
        exact = Trained(case, EXACT, device, quick)
        self.task = exact.module.task(exact.arguments(SEEDS[0]))
        self.states = [{key: value.clone() for key, value in self.task.model.to(device).state_dict().items()}]
        exact.run(SEEDS[0], self.states.append)
        every = max(1, exact.steps(SEEDS[0]) // QUALITY_EVERY)
        self.steps = [min(i * every, exact.steps(SEEDS[0])) for i in range(len(self.states))]
        self.gradients = self.along(exact)

    def along(self, trained: Trained) -> list[list[torch.Tensor]]:
        found = []
        for state in self.states:
            trained.model.load_state_dict(state)
            found.append([trained.gradient(self.task, batch) for batch in range(1, BATCHES + 1)])
        return found

    def cosines(self, trained: Trained) -> list[float]:
        return [
            sum(F.cosine_similarity(a, b, dim=0).item() for a, b in zip(ours, exact, strict=True)) / BATCHES
            for ours, exact in zip(self.along(trained), self.gradients, strict=True)
        ]


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kind"], row["case"], row["run"], row["seed"]


def run(device: str, quick: bool, done: list[dict[str, Any]] = ()) -> Iterator[dict[str, Any]]:  # type: ignore[assignment]
    """The rows that ``done`` lacks, method by method."""
    had = {key(row) for row in done}
    for case in CASES:
        course = None
        for method in case.methods[:3] if quick else case.methods:
            base = {"case": case.name, "run": method.label, "k": method.iterations, "metric": case.metric}
            wanted = [("quality", seed) for seed in (SEEDS[:1] if quick else SEEDS)]
            wanted += [("cosine", SEEDS[0])] if method is not EXACT else []
            wanted = [(kind, seed) for kind, seed in wanted if (kind, case.name, method.label, seed) not in had]
            if not wanted:
                continue
            if course is None and any(kind == "cosine" for kind, _ in wanted):
                course = Course(case, device, quick)
            try:
                trained = Trained(case, method, device, quick)
            except LookupError as error:
                say(error)
                continue
            args = trained.arguments(SEEDS[0])
            base["damping"] = trained.training.compile_options(args).get("damping", 0.0)
            base["command"] = f"python examples/{case.example}.py {' '.join([*case.words, *method.arguments()])}"
            for kind, seed in wanted:
                row = {"kind": kind, **base, "seed": seed}
                if kind == "quality":
                    row |= trained.run(seed)
                    say(f"{case.name}, {method.label}, seed {seed}: {case.metric} {row['value']:.4f}")
                    yield row
                    continue
                assert course is not None
                cosines = course.cosines(trained)
                say(f"{case.name}, {method.label}: cosine", *(f"{value:.4f}" for value in cosines))
                yield row | {"steps": course.steps, "cosines": cosines}
