"""What segments are worth on trained models: ``python -m benchmarks run --suite segments``

Every model is trained once with exact gradients, in eager mode. There are three kinds of rows, in this order:

``"kind": "cosine"``: the gradient at the trained weights, for every k in ``ITERATIONS`` and S in ``SEGMENTS``, compared
with the exact gradient on held-out batches: cosine and relative error of all parameters, and ``within``, the cosine of
the chain's own parameters alone (a head's gradient is exact for any k). The rewritten graphs run in eager mode.
``exact`` marks (k, S) that are ordinary backprop and were not computed.

``"kind": "time"``: a training step of the trained model, compiled, at some (k, S). All contenders take turns.

``"kind": "course"``: compiled runs from several seeds, trained with gradients of some (k, S): held-out quality during
training. The same seed gives the same weights and batches to all.

The suite can be interrupted and restarted: it skips rows that the results file has, and keeps the trained weights in
``out/segments``. ``--only "cosine;"`` selects one kind, ``--only "GRU, 64 steps;"`` one case.
"""

from __future__ import annotations

import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hwbp_compiler
from hwbp_compiler.options import Options
from hwbp_compiler.testing.capture import Capture, capture, options
from hwbp_compiler.testing.compare import cosine, relative_error

from .harness import ROOT, in_turns, say, start_anew, summary, synchronize

RESUMES = True
ITERATIONS = (0, 1, 2, 4, 8, 16)
SEGMENTS = (1, 4, 8, 16, 32)
SEEDS = (0, 1, 2)
BATCHES, BATCH = 4, 32  # held out
LOOKS = 10  # evaluations on held-out data in a course
CLIP = 1.0  # of the gradient's norm: in a recurrent net it is sometimes a hundred times the usual norm
KINDS = ("cosine", "time", "course")


@dataclass(frozen=True)
class Way:
    """A gradient: k and S, or None for ordinary backprop, compiled or in eager mode."""

    label: str
    iterations: int | None = None
    segment: int = 1

    @classmethod
    def of(cls, iterations: int, segment: int) -> Way:
        return cls(f"k={iterations}, S={segment}", iterations, segment)

    def options(self) -> dict[str, Any]:
        if self.iterations is None:
            return {"iterations": "exact"}
        return {"iterations": self.iterations, "segment": self.segment, "rewrite": "always", "min_length": 2}


EXACT, EAGER = Way("exact"), Way("eager")


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    model    "pixels" (an image read pixel by pixel, with a loss only on the last state) or an example's name
    words    for pixels, the module and the side of an image; for an example, its arguments
    length   L, the links of its chain; ``within``: the prefix of the names of the chain's parameters
    timed    the batches at which a step is timed
    course   whether courses are run
    """

    name: str
    model: str
    words: tuple[str, ...]
    length: int
    within: str
    metric: str
    steps: int
    lr: float
    batch: int
    hidden: int = 64
    timed: tuple[int, ...] = ()
    course: bool = False

    @property
    def quarter(self) -> int:
        """S of four segments."""
        return max(1, round(self.length / 4))

    def grid(self) -> list[tuple[int, int]]:
        return [(k, s) for s in sorted({*SEGMENTS, self.quarter}) for k in ITERATIONS]

    def is_exact(self, iterations: int, segment: int) -> bool:
        return iterations >= Options(segment=segment).needed(self.length)

    def ways(self, *wanted: tuple[int, int]) -> list[Way]:
        """Those of ``wanted`` that are not ordinary backprop, each once."""
        return [Way.of(k, s) for k, s in dict.fromkeys(wanted) if not self.is_exact(k, s)]

    def timed_ways(self) -> list[Way]:
        compiles_long = self.within == "blocks."  # unrolled: up to a minute each
        some = ((2, 1),) if compiles_long else ((2, 1), (8, 1), (1, 16), (2, 16))
        return [EAGER, EXACT, *self.ways(*some, (1, self.quarter))]

    def course_ways(self) -> list[Way]:
        return [EXACT, *self.ways((2, 1), (1, 16), (2, 16), (1, self.quarter))]


def pixel_case(kind: str, side: int, **how: Any) -> Case:
    steps = side * side
    return Case(
        f"{kind}, {steps} steps", "pixels", (kind, str(side)), steps, "rnn.", "accuracy", lr=1e-2, batch=64,
        timed=(32, 1), course=True, **how,
    )  # fmt: skip


def text_case(cell: str, **how: Any) -> Case:
    words = ("--cell", cell, "--width", "64", "--length", "64")
    return Case(
        f"{cell.upper()}, text", "char_lm", words, 64, "rnn.", "held_out_loss", 600, 1e-2, 32, timed=(32,), **how
    )


CASES = [
    pixel_case("GRU", 8, steps=400),
    pixel_case("LSTM", 8, steps=600),
    pixel_case("GRU", 16, steps=400),
    pixel_case("LSTM", 16, steps=400),
    text_case("gru", course=True),
    text_case("lstm"),
    Case(
        "Transformer, text", "char_lm", ("--cell", "transformer", "--layers", "12", "--width", "32"), 24, "blocks.",
        "held_out_loss", 1200, 3e-3, 16, timed=(16,),
    ),
    Case("ResNet32, digits", "resnet_cifar", (), 15, "blocks.", "accuracy", 240, 1e-3, 64),
]  # fmt: skip
QUICK = [replace(CASES[1], name="quick", steps=6, hidden=8, timed=(2,))]


# -- models and data ------------------------------------------------------------------------------------------------


def example(name: str) -> ModuleType:
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


class Pixels(nn.Module):
    """[B, steps, 1] -> [B, classes], from the last state only."""

    def __init__(self, kind: str, hidden: int, classes: int = 10) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        states, _ = self.rnn(x)
        return self.head(states[:, -1])


Batches = Callable[[int], tuple[Tensor, Tensor]]


def problem(case: Case, seed: int) -> tuple[Any, Callable[[int], Batches]]:
    """The example's ``Task`` (weights, training batches, loss, quality), and held-out batches of one size."""
    data, training = example("data"), example("training")
    if case.model == "pixels":
        kind, side = case.words[0], int(case.words[1])
        x, test_x, labels, test_labels = data.images("digits", None)
        x, test_x = (in_a_row(part, side) for part in (x, test_x))
        torch.manual_seed(seed)
        model = Pixels(kind, case.hidden)
        batch = data.shuffled(x, labels, case.batch, seed)
        task = training.Task(model, batch, F.cross_entropy, training.accuracy(test_x, test_labels), 1)
        return task, lambda size: data.shuffled(test_x, test_labels, size, 0)
    module = example(case.model)
    args = module.arguments([*case.words, "--batch", str(case.batch), "--seed", str(seed), "--device", "cpu"])
    task = module.task(args)
    if case.model == "char_lm":
        stream, _ = data.characters(data.text(None))
        held_out = stream[-(len(stream) // 10) :]
        return task, lambda size: data.windows(held_out, args.length, size, 0)
    x, test_x, _, test_labels = data.images("digits", None)
    test_x = (test_x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    return task, lambda size: data.shuffled(test_x, test_labels, size, 0)


def in_a_row(images: Tensor, side: int) -> Tensor:
    """[N, 1, 8, 8] in 0..1 -> [N, side * side, 1] in -0.5..0.5."""
    if side != images.shape[-1]:
        images = F.interpolate(images, (side, side), mode="bilinear")
    return images.flatten(2).mT.contiguous() - 0.5


# -- training -------------------------------------------------------------------------------------------------------


def train(
    case: Case, task: Any, device: str, function: Callable[[Tensor], Tensor] | None = None
) -> list[tuple[int, float]]:
    """Train with Adam, the examples' schedule, and clipped gradients. ``function`` is the task's model as the caller
    compiled it. Returns the steps and the held-out quality.
    """
    training = example("training")
    model = task.model.to(device).train()
    function = model if function is None else function
    optimizer = torch.optim.Adam(model.parameters(), lr=case.lr)
    course = []
    for step in range(1, case.steps + 1):
        x, target = (tensor.to(device) for tensor in task.batch(step))
        optimizer.param_groups[0]["lr"] = training.learning_rate(step, case.steps, case.lr)
        optimizer.zero_grad()
        task.loss(function(x), target).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if step % max(1, case.steps // LOOKS) == 0 or step == case.steps:
            course.append((step, training.evaluate(task)[case.metric]))
    return course


@dataclass(frozen=True)
class Trained:
    """A case trained with exact gradients; ``value``: its quality."""

    task: Any
    held_out: Callable[[int], Batches]
    value: float
    seconds: float

    def told(self) -> dict[str, Any]:
        return {"value": self.value, "train_s": self.seconds}


@functools.lru_cache(maxsize=1)
def trained(case: Case, device: str, keep: bool) -> Trained:
    """Train now, or (with ``keep``) load the weights of an earlier run whose case has the same description."""
    task, held_out = problem(case, SEEDS[0])
    path = ROOT / "out" / "segments" / f"{case.name.replace(', ', '-').replace(' ', '-')}.pt"
    found = torch.load(path, map_location=device) if keep and path.exists() else {}
    if found.get("case") != repr(replace(case, timed=(), course=False)):
        start = time.perf_counter()
        value = train(case, task, device)[-1][1]
        found = {
            "case": repr(replace(case, timed=(), course=False)),
            "model": task.model.state_dict(),
            "value": value,
            "seconds": time.perf_counter() - start,
        }
        say(f"{case.name}: trained, {case.metric} {value:.4f} in {found['seconds']:.0f} s")
        if keep:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, path)
    task.model.to(device).load_state_dict(found["model"])
    return Trained(task, held_out, found["value"], found["seconds"])


# -- quality of the gradient ----------------------------------------------------------------------------------------


Gradients = dict[Any, Tensor]


class Compared:
    """The gradients of a trained model on held-out batches: the exact ones by autograd, the others by the rewritten
    graph.
    """

    def __init__(self, case: Case, model: Trained, device: str) -> None:
        self.case, self.task = case, model.task
        held_out = model.held_out(BATCH)
        self.batches = [tuple(tensor.to(device) for tensor in held_out(step)) for step in range(1, BATCHES + 1)]
        self.task.model.train()
        self.captured: Capture = capture(self.task.model, self.batches[0][:1], self.loss(0))
        self.exact = [self.by_autograd(i) for i in range(BATCHES)]
        self.captured.gradients(None)  # compiles
        for joint in self.captured.joints:
            joint.rewritten = functools.cache(joint.rewritten)  # type: ignore[method-assign]  # once for all batches

    def loss(self, batch: int) -> Callable[[Tensor], Tensor]:
        return lambda output: self.task.loss(output, self.batches[batch][1])

    def by_autograd(self, batch: int) -> Gradients:
        model = self.task.model
        found = torch.autograd.grad(self.loss(batch)(model(self.batches[batch][0])), list(model.parameters()))
        return {name: gradient for (name, _), gradient in zip(model.named_parameters(), found, strict=True)}

    def rewritten(self, iterations: int, segment: int) -> list[Gradients]:
        """Raises LookupError if what is rewritten is not the case's chain."""
        found = []
        for batch, (x, _) in enumerate(self.batches):
            self.captured.args, self.captured.loss = (x,), self.loss(batch)
            _, gradients, records = self.captured.gradients(options(iterations=iterations, segment=segment))
            lengths = [record.length for record in records if record.decision == "rewritten"]
            if lengths != [self.case.length]:
                raise LookupError(f"{self.case.name}: chains of {lengths} links rewritten, not of {self.case.length}")
            found.append(gradients)
        return found

    def row(self, iterations: int, segment: int) -> dict[str, Any]:
        ours = self.rewritten(iterations, segment)
        cosines = [cosine(a, b) for a, b in zip(ours, self.exact, strict=True)]
        within = [cosine(self.of_chain(a), self.of_chain(b)) for a, b in zip(ours, self.exact, strict=True)]
        errors = [relative_error(a, b) for a, b in zip(ours, self.exact, strict=True)]
        means = {"cosine": cosines, "within": within, "error": errors}
        return {key: sum(found) / BATCHES for key, found in means.items()} | {"cosines": cosines}

    def of_chain(self, gradients: Gradients) -> Gradients:
        return {name: g for name, g in gradients.items() if str(name).startswith(self.case.within)}


def cosine_rows(case: Case, device: str, quick: bool, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    wanted = [(k, s) for k, s in case.grid() if (case.name, k, s) not in done]
    if quick:
        wanted = [(k, s) for k, s in wanted if (k < 2 and s in (1, 16)) or (k, s) == (8, 32)]
    if not wanted:
        return
    compared, base = None, {"metric": case.metric, "length": case.length}
    model = trained(case, device, not quick)
    for k, s in wanted:
        start = time.perf_counter()
        row = {"k": k, "segment": s, **base, **model.told(), "exact": case.is_exact(k, s)}
        if row["exact"]:
            yield row | {"cosine": 1.0, "within": 1.0, "error": 0.0}
            continue
        compared = compared or Compared(case, model, device)
        row |= compared.row(k, s)
        say(
            f"{case.name}, k={k}, S={s}: cosine {row['cosine']:.4f}, of the chain {row['within']:.4f},"
            f" error {row['error']:.3f}, {time.perf_counter() - start:.1f} s"
        )
        yield row


# -- time -----------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module, way: Way) -> Callable[[Tensor], Tensor]:
    return model if way is EAGER else torch.compile(model, backend="highway", dynamic=False, options=way.options())


def first_call(case: Case, way: Way, call: Callable[[], object]) -> float:
    """The seconds of the first call. Raises LookupError if nothing was rewritten although it should have been."""
    before = hwbp_compiler.counters()["chains_rewritten"]
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    if way.iterations is not None and hwbp_compiler.counters()["chains_rewritten"] == before:
        raise LookupError(f"{case.name}, {way.label}: no chain was rewritten, the gradients would be exact")
    say(f"{case.name}, {way.label}: the first call took {seconds:.1f} s")
    return seconds


def time_rows(case: Case, batch: int, device: str, quick: bool) -> Iterator[dict[str, Any]]:
    start_anew()
    model = trained(case, device, not quick)
    task = model.task
    task.model.train()
    x, target = (tensor.to(device) for tensor in model.held_out(batch)(1))

    def step(function: Callable[[Tensor], Tensor]) -> dict[str, float]:
        task.model.zero_grad()
        synchronize(device)
        start = time.perf_counter()
        loss = task.loss(function(x), target)
        synchronize(device)
        middle = time.perf_counter()
        loss.backward()
        synchronize(device)
        end = time.perf_counter()
        return {"forward": middle - start, "backward": end - middle, "step": end - start}

    runs, compiling = {}, {}
    ways = case.timed_ways()
    ways = ways[:3] if quick else ways
    for way in ways:
        runs[way.label] = functools.partial(step, compiled(task.model, way))
        seconds = first_call(case, way, runs[way.label])
        compiling[way.label] = None if way is EAGER else seconds
        runs[way.label]()  # the first step chooses algorithms and fills memory pools
    samples = in_turns(runs, 5 if quick else 21, 1.0 if quick else 8.0)
    for way in ways:
        row = {"run": way.label, "k": way.iterations, "segment": way.segment, "length": case.length, "batch": batch}
        for what, seconds in samples[way.label].items():
            row |= summary(what, seconds)
        say(f"{case.name}, batch {batch}, {way.label}: {row['step_ms']:.2f} ms ({row['step_iqr_ms']:.2f})")
        yield row | {"compile_s": compiling[way.label]}


# -- courses --------------------------------------------------------------------------------------------------------


def backward(task: Any, function: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor], device: str) -> None:
    x, target = (tensor.to(device) for tensor in batch)
    task.loss(function(x), target).backward()


def course_rows(case: Case, device: str, quick: bool, done: set[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for way in case.course_ways()[: 2 if quick else None]:
        seeds = [seed for seed in (SEEDS[:1] if quick else SEEDS) if (case.name, way.label, seed) not in done]
        if not seeds:
            continue
        start_anew()
        model = problem(case, seeds[0])[0].model.to(device).train()
        function = compiled(model, way)
        for number, seed in enumerate(seeds):
            task, _ = problem(case, seed)
            model.load_state_dict(task.model.state_dict())
            task = replace(task, model=model)
            if number == 0:
                compile_s = first_call(case, way, functools.partial(backward, task, function, task.batch(1), device))
            start = time.perf_counter()
            course = train(case, task, device, function)
            row = {"run": way.label, "k": way.iterations, "segment": way.segment, "length": case.length, "seed": seed}
            row |= {"metric": case.metric, "value": course[-1][1], "course": course, "steps": case.steps}
            say(f"{case.name}, {way.label}, seed {seed}: {case.metric} {row['value']:.4f}")
            yield row | {"seconds": time.perf_counter() - start, "compile_s": compile_s}


# -- the suite ------------------------------------------------------------------------------------------------------


def parts(quick: bool) -> Iterator[tuple[str, Case, int | None]]:
    """The parts of the suite in order: kind, case, and for times the batch."""
    cases = QUICK if quick else CASES
    yield from (("cosine", case, None) for case in cases)
    yield from (("time", case, batch) for case in cases for batch in case.timed)
    yield from (("course", case, None) for case in cases if case.course)


def name_of(kind: str, case: Case, batch: int | None) -> str:
    return f"{kind}; {case.name};" + (f" batch {batch};" if batch is not None else "")


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    """What can be compiled ahead: the steps that are timed."""
    timed = {(row["case"], row["batch"]) for row in done if row["kind"] == "time"}
    return [name_of(*part) for part in parts(quick) if part[0] == "time" and (part[1].name, part[2]) not in timed]


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    """The rows that ``done`` lacks."""
    had = {kind: [row for row in done if row["kind"] == kind] for kind in KINDS}
    cosines = {(row["case"], row["k"], row["segment"]) for row in had["cosine"]}
    times = {(row["case"], row["batch"]) for row in had["time"]}
    courses = {(row["case"], row["run"], row["seed"]) for row in had["course"]}
    for kind, case, batch in parts(quick):
        if not wanted(name_of(kind, case, batch)):
            continue
        found: Iterator[dict[str, Any]] = iter(())
        if kind == "cosine":
            found = cosine_rows(case, device, quick, cosines)
        elif kind == "time" and (case.name, batch) not in times:
            assert batch is not None
            found = iter(list(time_rows(case, batch, device, quick)))  # all rows of a table, or none
        elif kind == "course":
            found = course_rows(case, device, quick, courses)
        for row in found:
            yield {"kind": kind, "case": case.name, **row}
