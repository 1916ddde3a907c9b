"""Recurrent modules against eager mode: ``python -m benchmarks run --suite recurrent``

Stock ``torch.compile`` leaves ``nn.GRU``, ``nn.LSTM`` and ``nn.RNN`` to eager mode, so eager mode is the baseline:
oneDNN's kernel for an LSTM in float32, ATen's for the rest. All contenders are compiled first, then take turns:

    exact           ordinary backprop. Its gain over eager mode (GRU and RNN on a CPU) comes from our own kernels, and
                    from computing gates and weights' gradients for all steps at once. The gain of any k over exact is
                    Highway-BP's
    k=2             that many iterations; ``k=1, S=16`` is one iteration over segments of 16 links
    auto            rewrite="profitable" at k = 2
    fpi             fixed-point iteration (gamma = 1)
    jax             the same GRU on JAX, if it is installed (``jax_gru``); ``jax, unrolled`` has 8 steps per turn of its
                    loop
    loop            the same GRU as a loop over its cell, compiled by stock Inductor, which unrolls it. Only at 128
                    steps: at 512 it compiles for many minutes

Reported: the backward and the whole step, seconds of a cold and a warm compile, peak memory of a step, and the cosine
of the weights' gradient with eager mode's. The weights are not trained; ``segments`` has cosines of trained weights. On
a GPU the baseline is cuDNN, and the cases are the paper's, with one and three layers. There, products of float32
matrices are rounded to TF32 (``matmul`` "high"), as cuDNN does by default, or not ("highest", PyTorch's default for
products).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from . import jax_gru
from .harness import in_turns, most_held, say, start_anew, summary, synchronize

RESUMES = True  # a run measures the cases that the results lack
ITERATIONS = {"cpu": (0, 1, 2, 4, 8), "cuda": (0, 1, 2, 5, 10)}
SHAPES = ((1, 128, 512), (4, 128, 512), (16, 128, 512), (32, 64, 1024), (32, 256, 256))
SEGMENTS = ((1, 16), (1, 32), (1, "L/4"))  # k, S
UNROLLED = ((1, 128, 128), (16, 128, 128))  # beside a compiled loop
LONG = ((1, 64, 1_000), (1, 64, 10_000))  # a step's time must not grow with the length
PAPER = ((128, 512, 256), (128, 64, 1024))


@dataclass(frozen=True)
class Case:
    """``matmul`` is the precision of float32 products, as in ``torch.set_float32_matmul_precision``."""

    kind: str
    batch: int
    hidden: int
    steps: int
    layers: int = 1
    dtype: str = "float32"
    matmul: str = "highest"

    def __str__(self) -> str:
        more = f", {self.layers} layers" * (self.layers > 1) + f", {self.dtype}" + ", TF32" * self.tf32
        return f"{self.kind} {self.batch}x{self.hidden}x{self.steps}{more}"

    @property
    def tf32(self) -> bool:
        return self.matmul != "highest"


class Layer(nn.Module):
    def __init__(self, kind: str, hidden: int, layers: int = 1) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(hidden, hidden, layers)

    def forward(self, x):
        return self.layer(x)[0]


class Loop(nn.Module):
    """The same layer as a loop over its cell."""

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        self.cell = nn.GRUCell(layer.input_size, layer.hidden_size)
        for name, parameter in self.cell.named_parameters():
            parameter.data = getattr(layer, f"{name}_l0").data.clone()

    def forward(self, x):
        h = x.new_zeros(x.shape[1], self.cell.hidden_size)
        states = []
        for x_t in x:
            h = self.cell(x_t, h)
            states.append(h)
        return torch.stack(states)


class Contender:
    """One way to run a layer. The first call, which may compile, is timed."""

    def __init__(self, name: str, model: nn.Module, x: torch.Tensor, target: torch.Tensor, how: Any, device: str):
        self.name, self.model, self.x, self.target, self.device = name, model, x, target, device
        self.how, options = how, how.get("options", {})
        self.k, self.gamma = options.get("iterations"), options.get("damping", 0.0)
        self.compile()
        start = time.perf_counter()
        self.step()
        self.compile_s = time.perf_counter() - start if how else None
        self.step()  # the first step chooses algorithms and fills memory pools
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    def compile(self) -> None:
        self.function = torch.compile(lambda x: self.model(x), dynamic=False, **self.how) if self.how else self.model

    def compile_again(self) -> float | None:
        """Seconds of the first call, from the caches of the first compilation."""
        if not self.how:
            return None
        start_anew()
        self.compile()
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def step(self) -> dict[str, float]:
        self.model.zero_grad()
        self.x.grad = None
        synchronize(self.device)
        start = time.perf_counter()
        output = self.function(self.x)
        synchronize(self.device)
        middle = time.perf_counter()
        output.backward(self.target)
        del output  # eager mode frees its autograd graph here, a compiled backward at its end: time both
        synchronize(self.device)
        end = time.perf_counter()
        return {"forward": middle - start, "backward": end - middle, "step": end - start}

    def memory(self) -> float:
        self.model.zero_grad()
        self.x.grad = None
        return most_held(self.device, lambda: self.function(self.x).backward(self.target))


def segmented(case: Case) -> dict[str, dict[str, Any]]:
    found = {}
    for k, size in SEGMENTS:
        s = max(1, case.steps // 4) if size == "L/4" else size
        if (k + 1) * s < case.steps:
            found[f"k={k}, S={s}"] = {"iterations": k, "segment": s, "rewrite": "always"}
    return found


def contenders(case: Case, device: str) -> list[Contender | jax_gru.JaxGRU]:
    start_anew()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(case.matmul)
    dtype = getattr(torch, case.dtype)
    model = Layer(case.kind, case.hidden, case.layers).to(device, dtype)
    x = torch.randn(case.steps, case.batch, case.hidden, device=device, dtype=dtype, requires_grad=True)
    target = torch.randn_like(x)
    ways: dict[str, Any] = {"eager": {}}
    chosen = ("exact",) if case.kind == "RNN" else ("exact", *ITERATIONS[device])
    for k in chosen:
        name = k if k == "exact" else f"k={k}"
        ways[name] = {"backend": "highway", "options": {"iterations": k, "rewrite": "always"}}
    if case.kind != "RNN":
        ways |= {name: {"backend": "highway", "options": options} for name, options in segmented(case).items()}
        ways["fpi k=2"] = {"backend": "highway", "options": {"iterations": 2, "damping": 1.0, "rewrite": "always"}}
    ways["auto"] = {"backend": "highway", "options": {"iterations": 2}}
    made: list[Contender | jax_gru.JaxGRU] = [
        Contender(name, model, x, target, how, device) for name, how in ways.items()
    ]
    if device == "cpu" and case.kind == "GRU" and jax_gru.available():
        for name, unroll in (("jax", 1), ("jax, unrolled", 8)):
            made.append(jax_gru.JaxGRU(name, model.layer, x, target, unroll))
    if device == "cpu" and case.kind == "GRU" and (case.batch, case.hidden, case.steps) in UNROLLED:
        made.append(Contender("loop", Loop(model.layer).to(device), x, target, {"backend": "inductor"}, device))
    return made


def measured(case: Case, made: list[Contender | jax_gru.JaxGRU], repeats: int) -> Iterator[dict[str, Any]]:
    samples = in_turns({c.name: c.step for c in made}, repeats, budget=6.0)
    base = {what: summary(what, seconds)[f"{what}_ms"] for what, seconds in samples["eager"].items()}
    rows = []
    for c in made:
        row: dict[str, Any] = asdict(case) | {"run": c.name, "k": c.k, "gamma": c.gamma}
        for what, seconds in samples[c.name].items():
            row |= summary(what, seconds)
            row[f"{what}_ratio"] = base[what] / row[f"{what}_ms"]
        row["cosine"] = torch.nn.functional.cosine_similarity(c.gradient, made[0].gradient, dim=0).item()
        row["peak_memory_mb"] = c.memory()  # before compiling again, which forgets all compiled code
        rows.append(row)
    for row, c in zip(rows, made, strict=True):
        yield row | {"compile_s": c.compile_s, "compile_warm_s": c.compile_again()}


def cases(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case("GRU", 1, 32, 64)]
    if device == "cpu":
        every = [Case(kind, *shape) for kind in ("GRU", "LSTM", "RNN") for shape in SHAPES]
        return every + [Case("GRU", *shape) for shape in LONG + UNROLLED]
    tf32, low, full = ("float32", "high"), ("bfloat16", "highest"), ("float32", "highest")
    layers = {("GRU", 1): (tf32, low, full), ("GRU", 3): (tf32, low), ("LSTM", 1): (tf32, low), ("RNN", 1): (tf32,)}
    return [Case(kind, *shape, n, *how) for (kind, n), hows in layers.items() for how in hows for shape in PAPER]


def case_of(row: dict[str, Any]) -> Case:
    return Case(**{key: row[key] for key in Case.__dataclass_fields__ if key in row})


def missing(device: str, quick: bool, done: list[dict[str, Any]]) -> list[Case]:
    known = {case_of(row) for row in done}
    return [case for case in cases(device, quick) if case not in known]


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    return [f"{case};" for case in missing(device, quick, done)]


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool], repeats: int = 15
) -> Iterator[dict[str, Any]]:
    for case in missing(device, quick, done):
        if not wanted(f"{case};"):
            continue
        rows = list(measured(case, contenders(case, device), repeats))
        for r in rows:
            say(
                f"{case} {r['run']:>6}: {r['step_ms']:8.2f} ({r['step_iqr_ms']:.2f}) {r['step_ratio']:.2f}x,"
                f" forward {r.get('forward_ms', 0):.2f}, backward {r.get('backward_ms', 0):.2f}"
                f" {r.get('backward_ratio', 0):.2f}x,"
                f" cosine {r['cosine']:.6f}, {r['peak_memory_mb'] or 0:.0f} MB, compile {r['compile_s'] or 0:.1f} s"
            )
        yield from rows
