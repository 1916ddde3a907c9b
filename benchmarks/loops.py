"""Python loops over time: ``python -m benchmarks run --suite loops``

Compares ``for t in range(T): h = cell(x[:, t], h)`` in eager mode, compiled by stock Inductor, which unrolls it (up to
256 steps: its compile time grows faster than the length), and rerolled by the compiler, with ``nn.GRU`` or ``nn.LSTM``
in eager mode. A measurement is a whole training step. Compilations are cold. The seconds in which Dynamo traces the
loop are reported separately, since no backend can save them. "Called often" is the same loop after so many steps that
it runs in one C++ call; longer loops do so from the first call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import compile_times
from torch._inductor.utils import fresh_cache

from hwbp_compiler.cost.devices import NATIVE_FROM
from hwbp_compiler.rolled.native_loop import CALLS

from .harness import in_turns, names_due, say, start_anew, summary, synchronize

RESUMES = True
HIDDEN = 64
LONGEST_UNROLLED = 256


@dataclass(frozen=True)
class Case:
    cell: str
    batch: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.cell}; batch {self.batch}; {self.length} steps"


CASES = [Case(c, b, t) for t in (64, 256, 1024, 4096) for c in ("GRUCell", "LSTMCell") for b in (4, 64)]
QUICK = [Case("GRUCell", 2, 20)]
OFTEN = "rolled, exact, called often"
RUNS: dict[str, dict[str, Any]] = {
    "rolled, exact": {"iterations": "exact", "reroll": "always"},
    # An option that changes nothing here: with equal options Dynamo would use one compiled loop for both.
    OFTEN: {"iterations": "exact", "reroll": "always", "check_every": 201},
    "rolled, k = 1, S = 16": {"iterations": 1, "segment": 16, "reroll": "always", "rewrite": "always"},
}


class Loop(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.two = getattr(nn, kind)(HIDDEN, HIDDEN), kind == "LSTMCell"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[1], HIDDEN)
        state: Any = (h, h) if self.two else h
        rows = []
        for x_t in x:
            state = self.cell(x_t, state)
            rows.append(state[0] if self.two else state)
        return torch.stack(rows)


def module_of(loop: Loop) -> Callable[[torch.Tensor], torch.Tensor]:
    """nn.GRU or nn.LSTM with the loop's own parameters."""
    module = (nn.LSTM if loop.two else nn.GRU)(HIDDEN, HIDDEN)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(module, f"{name}_l0", getattr(loop.cell, name))
    return lambda x: module(x)[0]


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    return names_due(QUICK if quick else CASES, done)


def traced_s() -> float:
    """The seconds that Dynamo has spent on tracing so far."""
    times = dict(zip(*compile_times(repr="csv", aggregate=True), strict=True))
    return float(times.get("bytecode_tracing", 0.0))


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    due = set(names(device, quick, done))
    for case in QUICK if quick else CASES:
        if case.name not in due or not wanted(case.name):
            continue
        start_anew()
        torch.manual_seed(0)
        loop = Loop(case.cell).to(device)
        x = torch.randn(case.length, case.batch, HIDDEN, device=device)
        weight = torch.randn_like(x)

        def step(forward: Callable[[torch.Tensor], torch.Tensor], loop=loop, x=x, weight=weight) -> dict[str, float]:
            loop.zero_grad()
            synchronize(device)
            start = time.perf_counter()
            (forward(x) * weight).sum().backward()
            synchronize(device)
            return {"step": time.perf_counter() - start}

        competitors: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"eager": loop, "module": module_of(loop)}
        how: dict[str, Any] = {name: ("highway", options) for name, options in RUNS.items()}
        if case.length >= NATIVE_FROM:
            del how[OFTEN]
        if case.length <= LONGEST_UNROLLED:
            how["inductor"] = ("inductor", None)
        compiling, tracing, gradients = {}, {}, {}
        for name in (*competitors, *how):
            say(f"{case.name}: {name}")
            if name in how:
                backend, options = how[name]
                competitors[name] = torch.compile(loop, backend=backend, options=options)
            before, start = traced_s(), time.perf_counter()
            with fresh_cache():
                step(competitors[name])
            compiling[name], tracing[name] = time.perf_counter() - start, traced_s() - before
            if name == OFTEN:
                for _ in range(CALLS // case.length + 1):
                    step(competitors[name])
            gradients[name] = torch.cat([p.grad.flatten() for p in loop.parameters()])  # type: ignore[union-attr]
        samples = in_turns({n: lambda f=f: step(f) for n, f in competitors.items()}, 5 if quick else 15, 5.0)
        for name, found in samples.items():
            cosine = torch.cosine_similarity(gradients[name].double(), gradients["eager"].double(), dim=0)
            yield {
                "name": case.name,
                "case": case.cell,
                "batch": case.batch,
                "hidden": HIDDEN,
                "length": case.length,
                "run": name,
                "compile_s": compiling[name] if name in how else None,
                "traced_s": tracing[name] if name in how else None,
                "cosine": float(cosine),
                **{key: value for what, seconds in found.items() for key, value in summary(what, seconds).items()},
            }
