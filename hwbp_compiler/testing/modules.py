"""The modules of a :class:`.specs.Model`, written as a user would write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hwbp_compiler.rolled.function import recurrent

from .blocks import Cell
from .reference import Hold, Tensors, keep
from .residual import Residual
from .specs import Model, Recurrence, Stack, Streams
from .streams import StreamLinks


class Links(nn.Module):
    """A stack; ``forward(x, context) -> (states 0..depth, taps, penalties)``."""

    def __init__(self, spec: Stack, batch: int, length: int, context: int) -> None:
        super().__init__()
        self.spec = spec
        kinds = [spec.blocks[i % len(spec.blocks)] for i in range(spec.depth)]
        links: list[nn.Module] = []
        for i, kind in enumerate(kinds):
            shares = spec.shared and i >= spec.shared
            made = links[i - spec.shared] if shares else Residual(spec, kind, batch, length, context)
            links.append(made)
            if i + 1 in spec.frozen:
                made.requires_grad_(False)
        self.links = nn.ModuleList(links)
        self.heads = nn.ModuleList(nn.Linear(spec.width, 2) for _ in spec.taps if spec.heads)

    def forward(self, x: Tensor, context: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        states, penalties = [x], []
        first = x if self.spec.rereads else None
        for i, link in enumerate(self.links, start=1):
            for start, end in self.spec.skips:
                if end == i:
                    x = x + states[start]
            x, hidden = link(x, context, first)
            states.append(x)
            if i in self.spec.penalties:
                penalties.append(hidden)
        return states, self.taps(states), penalties

    def taps(self, states: list[Tensor]) -> list[Tensor]:
        found = [states[i] for i in self.spec.taps]
        return [head(tap) for head, tap in zip(self.heads, found, strict=True)] if self.spec.heads else found


class Loop(nn.Module):
    """A recurrence; ``forward(x, given) -> [batch, length or 1, width]``. ``given`` is the first state, or None.

    If ``rolled`` is set, it calls ``hwbp_compiler.recurrent`` instead of a loop in Python.
    """

    rolled = False

    def __init__(self, spec: Recurrence, inputs: int, batch: int, length: int) -> None:
        super().__init__()
        self.spec = spec
        widths = [inputs, *[spec.width] * (spec.layers - 1)]
        self.cells = nn.ModuleList(Cell(spec.cell, width, spec.width) for width in widths)
        if spec.start == "learnt":
            self.first = nn.Parameter(0.5 * torch.randn(spec.layers, 2, spec.width))
        if spec.masked:
            ends = torch.randint(1, length + 1, (batch, 1))
            self.register_buffer("mask", torch.arange(length) < ends)
        if spec.frozen:
            self.requires_grad_(False)

    def start(self, x: Tensor, given: Tensor | None, layer: int) -> Tensors:
        count = self.cells[layer].components
        if given is not None:
            return tuple(given[layer, i] for i in range(count))
        if self.spec.start == "learnt":
            return tuple(self.first[layer, i].expand(x.shape[0], -1) for i in range(count))
        cell = self.cells[layer]  # its weights say the width as a symbol where sizes are symbols
        width = cell.from_h.weight.shape[-1] if hasattr(cell, "from_h") else self.spec.width
        return tuple(x.new_zeros(x.shape[0], width) for _ in range(count))

    def times(self, x: Tensor) -> list[int]:
        steps = list(range(x.shape[1]))
        return steps[::-1] if self.spec.reverse else steps

    def step(self, layer: int, t: int, x_t: Tensor, state: Tensors, hold: Hold = keep) -> Tensors:
        new = self.cells[layer](x_t, state, hold)
        if not self.spec.masked:
            return new
        mask = self.mask[:, t, None]
        return tuple(torch.where(mask, a, b) for a, b in zip(new, state, strict=True))

    def forward(self, x: Tensor, given: Tensor | None) -> Tensor:
        states = [self.start(x, given, layer) for layer in range(self.spec.layers)]
        if self.rolled:
            return self._rolled(x, states)
        outputs = []
        for t in self.times(x):
            value = x[:, t]
            for layer in range(self.spec.layers):
                states[layer] = self.step(layer, t, value, states[layer])
                value = states[layer][0]
            outputs.append(value)
        return torch.stack(outputs, 1) if self.spec.every_step else outputs[-1].unsqueeze(1)

    def _rolled(self, x: Tensor, states: list[Tensors]) -> Tensor:
        """The same by one call of ``recurrent`` for each layer."""
        steps = {"x": x.transpose(0, 1)}
        if self.spec.masked:
            steps["mask"] = self.mask.transpose(0, 1).unsqueeze(-1)
        if self.spec.reverse:
            steps = {name: rows.flip(0) for name, rows in steps.items()}
        for cell, state in zip(self.cells, states, strict=True):

            def step(now: dict[str, Tensor], state: Tensors, cell: Any = cell) -> tuple[Tensor, Tensors]:
                new = cell(now["x"], state, keep)
                if "mask" in now:
                    new = tuple(torch.where(now["mask"], a, b) for a, b in zip(new, state, strict=True))
                return new[0], new

            steps["x"], _ = recurrent(step, steps, state)
        outputs = steps["x"].transpose(0, 1)
        return outputs if self.spec.every_step else outputs[:, -1:]


class ResidualModel(nn.Module):
    """Built from a :class:`Model`; returns ``{"final", "taps", "penalties"}`` and, with dead ends, ``"ignored"``."""

    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.spec = spec
        widths = [stage.width for stage in spec.stacks]
        inputs = widths[:1] * len(widths) if spec.parallel else [widths[0], *widths]
        self.stem = nn.Linear(widths[0], widths[0]) if spec.stem else nn.Identity()
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inputs[1:], widths[1:], strict=False))
        self.head = nn.Linear(widths[-1], 2) if spec.head else nn.Identity()
        self.stacks = nn.ModuleList()
        for stage, length in zip(spec.stacks, spec.lengths, strict=True):
            if isinstance(stage, Stack):
                self.stacks.append(Links(stage, spec.batch, length, widths[0]))
            elif isinstance(stage, Streams):
                self.stacks.append(StreamLinks(stage, spec.batch, length, widths[0]))
            else:
                self.stacks.append(Loop(stage, stage.width, spec.batch, length))

    def context(self, x: Tensor) -> Tensor:
        """What the first stage's cross-attention reads: the input, with no gradient to that chain's first state."""
        return x if self.spec.stem else x.detach()

    def given(self, states: tuple[Tensor, ...]) -> Iterator[Tensor | None]:
        """For every stage, the first state passed to the model; None if there is none."""
        rest = iter(states)
        for stage in self.spec.stacks:
            yield next(rest) if isinstance(stage, Recurrence) and stage.start == "given" else None

    def forward(self, x: Tensor, *states: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"taps": [], "penalties": []}
        given = self.given(states)
        ignored = x
        context, x = self.context(x), self.stem(x)
        first = x
        finals = []
        for number, (stage, start) in enumerate(zip(self.stacks, given, strict=True)):
            if number:
                x = torch.tanh(self.between[number - 1](first if self.spec.parallel else x))
            if isinstance(stage, Loop):
                x = stage(x, start)
            elif isinstance(stage, StreamLinks):
                together, taps = stage(x, context)
                found["taps"] += taps
                x = stage.last(together)
            else:
                passed, taps, penalties = stage(x, context)
                found["taps"] += taps
                found["penalties"] += penalties
                x = passed[-1]
                if self.spec.dead_ends:
                    for state in passed:
                        torch.cosh(state)
            if number == 0 and not self.spec.parallel:
                context = x
            ignored = torch.sin(x)
            finals.append(x)
        return self.returned(found, finals, ignored)

    def returned(self, found: dict[str, Any], finals: list[Tensor], ignored: Tensor) -> dict[str, Any]:
        found["final"] = self.head(finals[-1])
        if self.spec.parallel:
            found["others"] = finals[:-1]
        return {**found, "ignored": ignored} if self.spec.dead_ends else found
