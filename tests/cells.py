"""Cells as people write them for ``hwbp_compiler.recurrent``, each with one step rewritten for the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hwbp_compiler.testing.reference import Link, Program

BATCH, INPUT, HIDDEN = 3, 4, 5


class GRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(INPUT, HIDDEN)

    def forward(self, x, h):
        h = self.cell(x, h)
        return h, h

    def retold(self, state, side, hold):
        (h,), (x,) = state, side
        c = self.cell
        rx, zx, nx = F.linear(x, c.weight_ih, c.bias_ih).chunk(3, -1)
        rh, zh, nh = F.linear(h, c.weight_hh, c.bias_hh).chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        n = torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return (hold(z) * h + hold((1 - z) * n),), ()


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUT, HIDDEN)

    def forward(self, x, state):
        h, c = self.cell(x, state)
        return h, (h, c)

    def retold(self, state, side, hold):
        (h, c), (x,) = state, side
        m = self.cell
        gates = F.linear(x, m.weight_ih, m.bias_ih) + F.linear(h, m.weight_hh, m.bias_hh)
        i, f, g, o = gates.chunk(4, -1)
        c = hold(torch.sigmoid(f)) * c + hold(torch.sigmoid(i) * torch.tanh(g))
        return (hold(torch.sigmoid(o)) * torch.tanh(c), c), ()


class PeepholeLSTM(nn.Module):
    """An LSTM whose gates see the cell state through vectors: elementwise, so all of it belongs to K."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(INPUT + HIDDEN, 4 * HIDDEN)
        self.peep = nn.Parameter(torch.linspace(-0.5, 0.5, 3 * HIDDEN).view(3, HIDDEN).clone())

    def forward(self, x, state):
        h, c = state["h"], state["c"]
        i, f, g, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        h = torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)
        return h, {"h": h, "c": c}  # not in the order of the given state

    def retold(self, state, side, hold):
        (c, h), (x,) = state, side  # a dict's leaves come in the order of its keys
        i, f, g, o = hold(self.gates(torch.cat([x, h], -1))).chunk(4, -1)
        i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
        c = f * c + i * torch.tanh(g)
        return (c, torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)), ()


class MinGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(INPUT, HIDDEN), nn.Linear(INPUT, HIDDEN)

    def forward(self, x, h):
        h = h + torch.sigmoid(self.gate(x)) * (self.candidate(x) - h)
        return h, h

    def retold(self, state, side, hold):
        (h,), (x,) = state, side
        z = torch.sigmoid(self.gate(x))
        return (hold(1 - z) * h + hold(z * self.candidate(x)),), ()


class LiGRU(nn.Module):
    """No reset gate, and a ReLU candidate."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(INPUT, 2 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)

    def forward(self, x, h):
        z, n = (self.from_x(x) + self.from_h(h)).chunk(2, -1)
        z = torch.sigmoid(z)
        h = z * h + (1 - z) * torch.relu(n)
        return h, h

    def retold(self, state, side, hold):
        (h,), (x,) = state, side
        z, n = (self.from_x(x) + self.from_h(h)).chunk(2, -1)
        z = torch.sigmoid(z)
        return (hold(z) * h + hold((1 - z) * torch.relu(n)),), ()


class IndRNN(nn.Module):
    """``h' = relu(W x + u h)``: entirely elementwise, but not a linear recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.decay = nn.Linear(INPUT, HIDDEN), nn.Parameter(torch.linspace(-0.9, 0.9, HIDDEN))

    def forward(self, x, h):
        h = torch.relu(self.from_x(x) + self.decay * h)
        return h, h

    def retold(self, state, side, hold):
        (h,), (x,) = state, side
        return (torch.relu(self.from_x(x) + self.decay * h),), ()


class LayerNormGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(INPUT, 3 * HIDDEN), nn.Linear(HIDDEN, 3 * HIDDEN)
        self.norm = nn.LayerNorm(3 * HIDDEN)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x, h):
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        rh, zh, nh = self.norm(self.from_h(h)).chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        h = z * h + (1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return self.head(h), h

    def output(self, state):
        return self.head(state[0])

    def retold(self, state, side, hold):
        (h,), (x,) = state, side
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        rh, zh, nh = self.norm(self.from_h(h)).chunk(3, -1)
        z = torch.sigmoid(zx + zh)
        return (hold(z) * h + hold((1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh)),), ()


class NormalizedGRU(GRU):
    """A GRU with batch norm, which keeps its statistics fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUT).eval()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x, h):
        return super().forward(self.norm(x), h)

    def retold(self, state, side, hold):
        return super().retold(state, (self.norm(side[0]),), hold)


class TanhRNN(nn.Module):
    """No elementwise path."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(INPUT, HIDDEN)

    def forward(self, x, h):
        h = self.cell(x, h)
        return h, h

    def retold(self, state, side, hold):
        return (hold(self.cell(side[0], state[0])),), ()


@dataclass(frozen=True)
class CellCase:
    """A cell and what is expected of it.

    multiplier: K in the report; "0" means none, so the gradient is exact. linear: exact at k = 0, with scans in both
    directions.
    """

    make: Callable[[], nn.Module]
    multiplier: str
    linear: bool = False
    elementwise: bool = False

    @property
    def name(self) -> str:
        return self.make.__name__

    def build(self, length: int, seed: int = 0) -> tuple[nn.Module, Tensor, Any]:
        torch.manual_seed(seed)
        cell = self.make().double()
        x = torch.randn(length, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
        h, c = (torch.randn(BATCH, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(2))
        state: Any = h
        if isinstance(cell, LSTM):
            state = (h, c)
        elif isinstance(cell, PeepholeLSTM):
            state = {"c": c, "h": h}
        return cell, x, state

    def program(self, cell: Any) -> Program:
        """``(x, *state leaves) -> (outputs, last state leaves)``"""

        def forward(run_chain: Any, x: Tensor, *state: Tensor) -> Any:
            states = run_chain([Link(cell.retold, (x_t,)) for x_t in x.unbind(0)], state).states
            position = 1 if isinstance(cell, PeepholeLSTM) else 0
            output = cell.output if hasattr(cell, "output") else lambda s: s[position]
            return torch.stack([output(s) for s in states[1:]]), states[-1]

        return Program(dict(cell.named_parameters()), forward)


CASES = [
    CellCase(GRU, "sigmoid(...)"),
    CellCase(LSTM, "c->h"),
    CellCase(PeepholeLSTM, "sigmoid(...)"),
    CellCase(MinGRU, "1 - sigmoid(...)", linear=True),
    CellCase(LiGRU, "sigmoid(...)"),
    CellCase(IndRNN, "mask*weight", elementwise=True),
    CellCase(LayerNormGRU, "sigmoid(...)"),
    CellCase(NormalizedGRU, "sigmoid(...)"),
    CellCase(TanhRNN, "0"),
]


def in_a_loop(cell: Any, inputs: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The loop that defines what ``recurrent`` computes."""
    outputs = []
    for t in range(inputs.shape[0]):
        output, state = cell(inputs[t], state)
        outputs.append(output)
    if isinstance(state, dict):
        state = dict(sorted(state.items()))
    return torch.stack(outputs), state
