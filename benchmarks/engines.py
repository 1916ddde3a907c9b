"""nn.GRU and nn.LSTM by formulas of their own, or as cells of the loop engine: ``python -m benchmarks run --suite
engines``

Recurrent modules have an operator and formulas of their own (``hwbp_compiler/recurrence``). Any other cell goes through
the loop engine (``hwbp_compiler/rolled``). One engine for both would be less code. This suite shows what it would cost:
the same layer both ways in one process, taking turns. Reported: the backward pass, and the peak memory of a step. The
forward pass is left out, since a joint engine would keep PyTorch's kernel for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import hwbp_compiler

from .harness import in_turns, most_held, names_due, say, start_anew, summary
from .recurrent import LONG, SHAPES, Contender, Layer

RESUMES = True
HOW: dict[str, dict[str, Any]] = {
    "exact": {"iterations": "exact"},
    **{f"k={k}": {"iterations": k, "rewrite": "always"} for k in (0, 2, 4)},
}


@dataclass(frozen=True)
class Case:
    kind: str
    batch: int
    hidden: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}; {self.batch}x{self.hidden}x{self.steps}"


CASES = [Case(kind, *shape) for kind in ("GRU", "LSTM") for shape in (*SHAPES, *LONG[:1])]
QUICK = [Case("GRU", 2, 8, 12)]


class AsCell(nn.Module):
    """The layer as a cell of the loop engine."""

    def __init__(self, layer: nn.Module, options: dict[str, Any]) -> None:
        super().__init__()
        self.two = isinstance(layer, nn.LSTM)
        self.cell = (nn.LSTMCell if self.two else nn.GRUCell)(layer.input_size, layer.hidden_size)
        for name, _ in list(self.cell.named_parameters()):
            setattr(self.cell, name, getattr(layer, f"{name}_l0"))
        self.options = options

    def step(self, x: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        state = self.cell(x, state)
        return state[0] if self.two else state, state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[1], self.cell.hidden_size)
        return hwbp_compiler.recurrent(self.step, x, (h, h) if self.two else h, options=self.options)[0]


def names(device: str, quick: bool, done: list[dict[str, Any]]) -> list[str]:
    return names_due(QUICK if quick else CASES, done)


def run(
    device: str, quick: bool, done: list[dict[str, Any]], wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[dict[str, Any]]:
    due = set(names(device, quick, done))
    for case in QUICK if quick else CASES:
        if case.name not in due or not wanted(case.name):
            continue
        start_anew()
        torch.manual_seed(0)
        layer = Layer(case.kind, case.hidden).to(device)
        x = torch.randn(case.steps, case.batch, case.hidden, device=device, requires_grad=True)
        target = torch.randn(case.steps, case.batch, case.hidden, device=device)
        contenders = {}
        for what, options in HOW.items():
            say(f"{case.name}: {what}")
            how = {"backend": "highway", "options": options}
            contenders["module", what] = Contender("module", layer, x, target, how, device)
            cell = AsCell(layer.layer, options)
            contenders["loop", what] = Contender("loop", cell, x, target, {}, device)
        samples = in_turns({str(key): c.step for key, c in contenders.items()}, 5 if quick else 25, 4.0)
        for (run, what), contender in contenders.items():
            found = samples[str((run, what))]
            yield {
                "name": case.name,
                "kind": case.kind,
                "batch": case.batch,
                "hidden": case.hidden,
                "length": case.steps,
                "run": run,
                "how": what,
                **summary("backward", found["backward"]),
                "peak_mb": most_held(device, lambda c=contender: c.function(c.x).backward(c.target)),
            }
