"""Loops over time. Every recurrent layer is one chain, however the loop is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, setup
from .residual import linear

STEPS, BATCH, INPUT, HIDDEN = 7, 3, 4, 6


# --------------------------------------------------------------------------------------------- the models


class CellLoop(nn.Module):
    """``for t: h = cell(x[t], h)`` with a loss at every step or at the last, h_0 zeros or given."""

    def __init__(self, cell: nn.Module, every_step: bool) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(HIDDEN, 3)
        self.every_step = every_step

    def start(self, x):
        return x.new_zeros(x.shape[1], HIDDEN)

    def forward(self, x, h=None):
        h = self.start(x) if h is None else h
        outputs = []
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            outputs.append(h)
        return self.head(torch.stack(outputs)) if self.every_step else self.head(h)


class TupleCellLoop(CellLoop):
    """The same with a tuple state ``(h, c)``."""

    def forward(self, x, h=None, c=None):
        h = self.start(x) if h is None else h
        c = self.start(x) if c is None else c
        outputs = []
        for x_t in x.unbind(0):
            h, c = self.cell(x_t, (h, c))
            outputs.append(h)
        return self.head(torch.stack(outputs)) if self.every_step else self.head(h)


class ChunkGRU(nn.Module):
    """A GRU cell written by hand, gates through ``chunk``."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x = nn.Linear(INPUT, 3 * HIDDEN)
        self.from_h = nn.Linear(HIDDEN, 3 * HIDDEN)

    def forward(self, x, h):
        rx, zx, nx = self.from_x(x).chunk(3, dim=-1)
        rh, zh, nh = self.from_h(h).chunk(3, dim=-1)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        n = torch.tanh(nx + r * nh)
        return z * h + (1 - z) * n


class CatGRU(nn.Module):
    """A GRU cell with the reset before the matrix and gates of ``cat([x, h])``: ``r h`` is elementwise, but only
    on its way into a matrix, so it belongs to the block."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUT + HIDDEN, 2 * HIDDEN)
        self.candidate = nn.Linear(INPUT + HIDDEN, HIDDEN)

    def forward(self, x, h):
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], -1))).split(HIDDEN, dim=-1)
        n = torch.tanh(self.candidate(torch.cat([x, r * h], -1)))
        return h + z * (n - h)


class CatLSTM(nn.Module):
    """An LSTM cell written by hand, gates of ``cat([x, h])``."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUT + HIDDEN, 4 * HIDDEN)

    def forward(self, x, state):
        h, c = state
        i, f, o, g = self.gates(torch.cat([x, h], dim=-1)).chunk(4, dim=-1)
        c = torch.sigmoid(f + 1.0) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class MinGRU(nn.Module):
    """Gate and candidate depend only on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(INPUT, HIDDEN)
        self.candidate = nn.Linear(INPUT, HIDDEN)

    def forward(self, x, h):
        z = torch.sigmoid(self.gate(x))
        return (1 - z) * h + z * self.candidate(x)


class Diagonal(nn.Module):
    """``h = a h + b x`` with a learnt decay per unit."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(-1.0, 2.0, HIDDEN))
        self.input = nn.Linear(INPUT, HIDDEN)

    def forward(self, x, h):
        return torch.sigmoid(self.decay) * h + self.input(x)


class LerpCell(nn.Module):
    """``torch.lerp(h, n, z)``: K = 1 - z."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(INPUT, HIDDEN)
        self.gate_h = nn.Linear(HIDDEN, HIDDEN)
        self.from_x = nn.Linear(INPUT, HIDDEN)
        self.from_h = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, h):
        n = torch.tanh(self.from_x(x) + self.from_h(h))
        return torch.lerp(h, n, torch.sigmoid(self.gate(x) + self.gate_h(h)))


class MaskedGRU(nn.Module):
    """A GRUCell over padded sequences: past its end a sequence keeps its state. K = m z + 1 - m."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT, HIDDEN)
        self.register_buffer("lengths", torch.tensor([STEPS, STEPS - 2, STEPS - 4]))

    def forward(self, x):
        h = x.new_zeros(x.shape[1], HIDDEN)
        for t in range(x.shape[0]):
            h = torch.where((t < self.lengths).unsqueeze(-1), self.cell(x[t], h), h)
        return h


class Stacked(nn.Module):
    """Several GRU layers: layer by layer, or all of them in one loop over time."""

    def __init__(self, layers: int, interleaved: bool, every_step: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(INPUT if i == 0 else HIDDEN, HIDDEN) for i in range(layers))
        self.interleaved, self.every_step = interleaved, every_step

    def forward(self, x):
        states = [x.new_zeros(x.shape[1], HIDDEN) for _ in self.cells]
        outputs = []
        if self.interleaved:
            for t in range(x.shape[0]):
                below = x[t]
                for i, cell in enumerate(self.cells):
                    below = states[i] = cell(below, states[i])
                outputs.append(below)
        else:
            outputs = list(x.unbind(0))
            for cell, h in zip(self.cells, states, strict=True):
                below, outputs = outputs, []
                for x_t in below:
                    h = cell(x_t, h)
                    outputs.append(h)
        return torch.stack(outputs) if self.every_step else outputs[-1]


class StackedLSTM(nn.Module):
    def __init__(self, interleaved: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(INPUT, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN)])
        self.interleaved = interleaved

    def forward(self, x):
        zeros = x.new_zeros(x.shape[1], HIDDEN)
        if self.interleaved:
            states, outputs = [(zeros, zeros), (zeros, zeros)], []
            for x_t in x:
                states[0] = self.cells[0](x_t, states[0])
                states[1] = self.cells[1](states[0][0], states[1])
                outputs.append(states[1][0])
            return torch.stack(outputs)
        outputs = list(x)
        for cell in self.cells:
            state, below, outputs = (zeros, zeros), outputs, []
            for x_t in below:
                state = cell(x_t, state)
                outputs.append(state[0])
        return torch.stack(outputs)


# --------------------------------------------------------- one time step each, retold: (state, x, hold) -> state


def gru_step(cell: nn.GRUCell):
    def step(state, side, hold):
        (h,), (x,) = state, side
        gates_x = F.linear(x, cell.weight_ih, cell.bias_ih)
        gates_h = F.linear(h, cell.weight_hh, cell.bias_hh)
        rx, zx, nx = gates_x.split(h.shape[-1], -1)
        rh, zh, nh = gates_h.split(h.shape[-1], -1)
        z = torch.sigmoid(zx + zh)
        n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return (hold(z) * h + hold((1 - z) * n),), ()

    return step


def lstm_step(cell: nn.LSTMCell):
    def step(state, side, hold):
        (h, c), (x,) = state, side
        gates = F.linear(x, cell.weight_ih, cell.bias_ih) + F.linear(h, cell.weight_hh, cell.bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = hold(torch.sigmoid(f)) * c + hold(torch.sigmoid(i) * torch.tanh(g))
        return (hold(torch.sigmoid(o)) * torch.tanh(c), c), ()

    return step


def chunk_gru_step(cell: ChunkGRU):
    def step(state, side, hold):
        (h,), (x,) = state, side
        a, b = linear(cell.from_x, x), linear(cell.from_h, h)
        r = torch.sigmoid(a[..., :HIDDEN] + b[..., :HIDDEN])
        z = torch.sigmoid(a[..., HIDDEN : 2 * HIDDEN] + b[..., HIDDEN : 2 * HIDDEN])
        n = torch.tanh(a[..., 2 * HIDDEN :] + r * b[..., 2 * HIDDEN :])
        return (hold(z) * h + hold((1 - z) * n),), ()

    return step


def cat_gru_step(cell: CatGRU):
    def step(state, side, hold):
        (h,), (x,) = state, side
        r, z = torch.sigmoid(linear(cell.gates, torch.cat([x, h], -1))).chunk(2, -1)
        n = torch.tanh(linear(cell.candidate, torch.cat([x, r * h], -1)))
        return (hold(1 - z) * h + hold(z * n),), ()

    return step


def cat_lstm_step(cell: CatLSTM):
    def step(state, side, hold):
        (h, c), (x,) = state, side
        i, f, o, g = linear(cell.gates, torch.cat([x, h], -1)).chunk(4, -1)
        c = hold(torch.sigmoid(f + 1.0)) * c + hold(torch.sigmoid(i) * torch.tanh(g))
        return (hold(torch.sigmoid(o)) * torch.tanh(c), c), ()

    return step


def min_gru_step(cell: MinGRU):
    def step(state, side, hold):
        (h,), (x,) = state, side
        z = torch.sigmoid(linear(cell.gate, x))
        return ((1 - z) * h + z * linear(cell.candidate, x),), ()

    return step


def diagonal_step(cell: Diagonal):
    def step(state, side, hold):
        (h,), (x,) = state, side
        return (torch.sigmoid(cell.decay) * h + linear(cell.input, x),), ()

    return step


def lerp_step(cell: LerpCell):
    def step(state, side, hold):
        (h,), (x,) = state, side
        z = torch.sigmoid(linear(cell.gate, x) + linear(cell.gate_h, h))
        n = torch.tanh(linear(cell.from_x, x) + linear(cell.from_h, h))
        return (hold(1 - z) * h + hold(z * n),), ()

    return step


def _layer(run, step, inputs, start):
    """One recurrent layer as one chain; the states of steps 1..T."""
    return run([Link(step, (x,)) for x in inputs], start).states[1:]


def _loop_program(step: Callable, width: int = 1):
    def make(model):
        def forward(run, x, *start):
            if not start:
                start = (torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype),) * width
            outputs = [state[0] for state in _layer(run, step(model.cell), x.unbind(0), start)]
            return linear(model.head, torch.stack(outputs) if model.every_step else outputs[-1])

        return program_of(model, forward)

    return make


def _masked_program(model):
    inner = gru_step(model.cell)

    def forward(run, x):
        def link(t):
            def step(state, side, hold):
                (new,), _ = inner(state, side, hold)
                return (torch.where((t < model.lengths)[:, None], new, state[0]),), ()

            return Link(step, (x[t],))

        start = (torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype),)
        return run([link(t) for t in range(STEPS)], start).states[-1][0]

    return program_of(model, forward)


def _stacked_program(step: Callable, width: int = 1):
    """Layer by layer, whatever order the model uses."""

    def make(model):
        def forward(run, x):
            outputs = list(x.unbind(0))
            for cell in model.cells:
                start = (torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype),) * width
                outputs = [state[0] for state in _layer(run, step(cell), outputs, start)]
            return torch.stack(outputs) if getattr(model, "every_step", True) else outputs[-1]

        return program_of(model, forward)

    return make


# ---------------------------------------------------------------------------------------------- the cases

SEQUENCE, STATE = (STEPS, BATCH, INPUT), (BATCH, HIDDEN)


def _loops(name, cell, step, multiplier="gate", width=1, elementwise=False):
    """A loss at every step and only at the last, with h_0 zeros; and h_0 given, with a gradient."""
    loop = CellLoop if width == 1 else TupleCellLoop
    program = _loop_program(step, width)
    for every_step in (True, False):
        yield Case(
            f"{name}_{'every_step' if every_step else 'last_step'}",
            setup(lambda every_step=every_step: loop(cell(), every_step), SEQUENCE),
            program,
            (ExpectedChain(STEPS, multiplier),),
            elementwise=elementwise,
        )
    yield Case(
        f"{name}_start_given",
        setup(lambda: loop(cell(), True), SEQUENCE, *[STATE] * width),
        program,
        (ExpectedChain(STEPS, multiplier),),
        elementwise=elementwise,
    )


def _stacked(layers: int):
    for interleaved in (False, True):
        for every_step in (True, False):
            way = "interleaved" if interleaved else "layer_by_layer"
            yield Case(
                f"gru_{layers}_layers_{way}_{'every_step' if every_step else 'last_step'}",
                setup(
                    lambda interleaved=interleaved, every_step=every_step: Stacked(layers, interleaved, every_step),
                    SEQUENCE,
                ),
                _stacked_program(gru_step),
                (ExpectedChain(STEPS, "gate"),) * layers,
            )


CASES = [
    *_loops("gru_cell", lambda: nn.GRUCell(INPUT, HIDDEN), gru_step),
    *_loops("lstm_cell", lambda: nn.LSTMCell(INPUT, HIDDEN), lstm_step, width=2),
    *_loops("chunk_gru", ChunkGRU, chunk_gru_step),
    *_loops("cat_gru", CatGRU, cat_gru_step),
    *_loops("cat_lstm", CatLSTM, cat_lstm_step, width=2),
    *_loops("min_gru", MinGRU, min_gru_step, elementwise=True),
    *_loops("diagonal", Diagonal, diagonal_step, "scale", elementwise=True),
    *_loops("lerp_cell", LerpCell, lerp_step),
    Case(
        "masked_gru",
        setup(MaskedGRU, SEQUENCE),
        _masked_program,
        (ExpectedChain(STEPS, "gate"),),
    ),
    *_stacked(2),
    *_stacked(3),
    *(
        Case(
            f"lstm_2_layers_{'interleaved' if interleaved else 'layer_by_layer'}",
            setup(lambda interleaved=interleaved: StackedLSTM(interleaved), SEQUENCE),
            _stacked_program(lstm_step, width=2),
            (ExpectedChain(STEPS, "gate"),) * 2,
        )
        for interleaved in (False, True)
    ),
]
