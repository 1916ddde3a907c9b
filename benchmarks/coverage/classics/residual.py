"""Stacks of blocks on vectors."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .made import W, by_hand


class ReZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(W, W) for _ in range(6))
        self.alpha = nn.Parameter(torch.full((6,), 0.1))

    def forward(self, x):
        for alpha, block in zip(self.alpha, self.blocks, strict=True):
            x = x + alpha * torch.relu(block(x))
        return x


class FixUp(nn.Module):
    """Scalar biases and scales around every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(W, W, bias=False) for _ in range(5))
        self.second = nn.ModuleList(nn.Linear(W, W, bias=False) for _ in range(5))
        self.bias, self.scale = nn.Parameter(torch.zeros(5, 4)), nn.Parameter(torch.ones(5))

    def forward(self, x):
        for i in range(5):
            b = self.bias[i]
            y = self.first[i](x + b[0]) + b[1]
            y = self.scale[i] * self.second[i](F.relu(y) + b[2]) + b[3]
            x = F.relu(x + y)
        return x


class Maxout(nn.Module):
    """``max(x, f(x))``: K is a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(W, W) for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = torch.maximum(x, block(x))
        return x


class StochasticDepth(nn.Module):
    """As in torchvision: off in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(W), nn.Linear(W, W), nn.GELU()) for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            y = block(x)
            if self.training:
                y = y * torch.bernoulli(torch.full((x.shape[0], 1), 0.8)) / 0.8
            x = x + y
        return x


class EulerODE(nn.Module):
    """A neural ODE with fixed steps: the same field at every step, which also sees the time."""

    def __init__(self, order: int = 1) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(W + 1, 16), nn.Tanh(), nn.Linear(16, W))
        self.order = order

    def f(self, t, x):
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

    def forward(self, x):
        h = 0.2
        for i in range(6):
            t = i * h
            if self.order == 1:
                x = x + h * self.f(t, x)
            elif self.order == 2:
                x = x + h * self.f(t + h / 2, x + h / 2 * self.f(t, x))
            else:
                a = self.f(t, x)
                b = self.f(t + h / 2, x + h / 2 * a)
                c = self.f(t + h / 2, x + h / 2 * b)
                d = self.f(t + h, x + h * c)
                x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x


class CrossNet(nn.Module):
    """DCN v2: ``x0 * (W x + b) + x``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(5))

    def forward(self, x0):
        x0 = torch.tanh(x0)
        x = x0
        for layer in self.layers:
            x = x0 * layer(x) + x
        return x


class NBeats(nn.Module):
    """Backcasts are taken from the input, forecasts summed on the side."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(W, 16), nn.ReLU(), nn.Linear(16, W + 3)) for _ in range(5))

    def forward(self, x):
        forecast = 0
        for block in self.blocks:
            back, ahead = block(x).split([W, 3], -1)
            x = x - back
            forecast = forecast + ahead
        return forecast


class Unfolded(nn.Module):
    """LISTA: gradient steps and shrinkage, learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, W, bias=False)
        self.steps = nn.ModuleList(nn.Linear(W, 5, bias=False) for _ in range(5))
        self.back = nn.ModuleList(nn.Linear(5, W, bias=False) for _ in range(5))
        self.threshold = nn.Parameter(torch.full((5,), 0.05))

    def forward(self, y):
        x = self.encode(y)
        for forth, back, threshold in zip(self.steps, self.back, self.threshold, strict=True):
            x = x - back(forth(x) - y)
            x = torch.sign(x) * torch.relu(x.abs() - threshold)
        return x


class SoftTrees(nn.Module):
    """Gated linear residuals for tables (GRN of a temporal fusion transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(W, W) for _ in range(5))
        self.down = nn.ModuleList(nn.Linear(W, 2 * W) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(5))

    def forward(self, x):
        for up, down, norm in zip(self.up, self.down, self.norms, strict=True):
            x = norm(x + F.glu(down(F.elu(up(x))), -1))
        return x


class CouplingFlow(nn.Module):
    """RealNVP: half of the vector scales and shifts the other half, then they change places."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(6))

    def forward(self, x):
        a, b = x.chunk(2, -1)
        for net in self.nets:
            scale, shift = net(a).chunk(2, -1)
            b = b * torch.exp(torch.tanh(scale)) + shift
            a, b = b, a
        return torch.cat([a, b], -1)


class PlanarFlow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.w = nn.Parameter(torch.randn(6, W)), nn.Parameter(torch.randn(6, W))
        self.b = nn.Parameter(torch.zeros(6))

    def forward(self, z):
        total = 0
        for u, w, b in zip(self.u, self.w, self.b, strict=True):
            inner = torch.tanh(z @ w + b)
            psi = (1 - inner**2)[:, None] * w
            total = total + torch.log((1 + psi @ u).abs())
            z = z + u * inner[:, None]
        return z, total


class Hopfield(nn.Module):
    """Energy descent on one state with fixed patterns (an energy transformer's step)."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(7, W))

    def forward(self, x):
        for _ in range(5):
            x = x + 0.3 * (torch.softmax(x @ self.patterns.T, -1) @ self.patterns - x)
        return x


def plain(activation, depth=6):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(W, W), activation())))


case = by_hand("vectors")
X = (4, W)
CASES = [
    case("ReZero", (6,), ReZero, X),
    case("FixUp", (5,), FixUp, X, why="the ReLU behind an addition belongs to its link"),
    case("maximum of state and block", (5,), Maxout, X),
    case("stochastic depth", (5,), StochasticDepth, X),
    case("neural ODE, Euler", (6,), EulerODE, X),
    case("neural ODE, midpoint", (6,), partial(EulerODE, 2), X),
    case("neural ODE, Runge-Kutta 4", (6,), partial(EulerODE, 4), X),
    case("DCN v2 cross network", (5,), CrossNet, X, why="the first state is read by every block"),
    case("N-BEATS", (4,), NBeats, X, why="the fifth backcast is not used"),
    case("LISTA", (5,), Unfolded, (4, 5)),
    case("gated residual network", (5,), SoftTrees, X),
    case("RealNVP", (6,), CouplingFlow, X, why="every step updates one half; the other half's K is 1"),
    case("planar flow", (6,), PlanarFlow, X),
    case("Hopfield descent", (5,), Hopfield, X),
    case("MLP, GELU", (), partial(plain, nn.GELU), X, why="nothing is added: K = 0"),
    case("MLP, one residual block in all", (), lambda: _OneBlock(), X, why="one link is no chain"),
]


class _OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.block, self.after = plain(nn.Tanh, 2), nn.Linear(W, W), plain(nn.Tanh, 2)

    def forward(self, x):
        x = self.before(x)
        return self.after(x + torch.tanh(self.block(x)))
