"""Recurrences: a cell in a Python loop over six steps, torch's own modules, and scans written by hand.

The first state is zeros and requires no gradient, and every step's output is used, so there are as many links as steps.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn, relu, sigmoid, tanh

from .made import W, by_hand

T, INPUT = 6, 5


class Loop(nn.Module):
    """``h = step(x_t, h)``; a cell defines ``parts`` (how many times as wide a matrix's result is) and ``step``."""

    parts = (1, 1)
    outputs: int | None = None

    def __init__(self) -> None:
        super().__init__()
        of_x, of_h = self.parts
        self.x, self.h = nn.Linear(INPUT, of_x * W), nn.Linear(W, of_h * W)
        self.v = nn.Parameter(torch.rand(6, W))

    def start(self, x):
        return x.new_zeros(x.shape[1], W)

    def forward(self, x):
        h, outputs = self.start(x), []
        for x_t in x:
            h = self.step(x_t, h)
            outputs.append(h[self.outputs] if self.outputs is not None else h)
        return torch.stack(outputs)


class Pair(Loop):
    """The state is a pair, whose first tensor is the output."""

    outputs = 0

    def start(self, x):
        return (x.new_zeros(x.shape[1], W),) * 2


class MGU(Loop):
    parts = (2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.candidate = nn.Linear(W, W)

    def step(self, x, h):
        xf, xn = self.x(x).chunk(2, -1)
        f = sigmoid(xf + self.h(h))
        return (1 - f) * h + f * tanh(xn + self.candidate(f * h))


class UGRNN(Loop):
    parts = (2, 2)

    def step(self, x, h):
        g, c = (self.x(x) + self.h(h)).chunk(2, -1)
        g = sigmoid(g)
        return g * h + (1 - g) * tanh(c)


class LiGRU(Loop):
    parts = (2, 2)

    def step(self, x, h):
        z, c = (self.x(x) + self.h(h)).chunk(2, -1)
        z = sigmoid(z)
        return torch.lerp(relu(c), h, z)


class FastGRNN(Loop):
    def step(self, x, h):
        common = self.x(x) + self.h(h)
        z = sigmoid(common + self.v[0])
        return (sigmoid(self.v[1, 0]) * (1 - z) + sigmoid(self.v[1, 1])) * tanh(common + self.v[2]) + z * h


class Leaky(Loop):
    """An echo state network's update, trained."""

    def step(self, x, h):
        return 0.7 * h + 0.3 * tanh(self.x(x) + self.h(h))


class AntisymmetricRNN(Loop):
    def step(self, x, h):
        matrix = self.h.weight - self.h.weight.T
        return h + 0.1 * tanh(self.x(x) + h @ matrix.T - 0.01 * h)


class LipschitzRNN(Loop):
    """The state also goes through a matrix of its own, without a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(W, W, bias=False)

    def step(self, x, h):
        return h + 0.1 * (self.a(h) - h) + 0.1 * tanh(self.x(x) + self.h(h))


class IndRNN(Loop):
    def step(self, x, h):
        return relu(self.x(x) + self.v[0] * h)


class BistableCell(Loop):
    """BRC: gates that see the state element by element."""

    parts = (3, 1)

    def step(self, x, h):
        xa, xc, xh = self.x(x).chunk(3, -1)
        a, c = 1 + tanh(xa + self.v[0] * h), sigmoid(xc + self.v[1] * h)
        return c * h + (1 - c) * tanh(xh + a * h)


class JANET(Loop):
    parts = (2, 2)

    def step(self, x, h):
        f, c = (self.x(x) + self.h(h)).chunk(2, -1)
        return sigmoid(f) * h + (1 - sigmoid(f - 1)) * tanh(c)


class MinimalLSTM(Pair):
    """An LSTM with peepholes, gates cut by ``split``."""

    parts = (4, 4)

    def step(self, x, state):
        h, c = state
        i, f, g, o = (self.x(x) + self.h(h)).split(W, -1)
        c = sigmoid(f + self.v[0] * c) * c + sigmoid(i + self.v[1] * c) * tanh(g)
        h = sigmoid(o + self.v[2] * c) * tanh(c)
        return h, c


class RAN(Pair):
    parts = (3, 2)

    def step(self, x, state):
        h, c = state
        (xi, xf, xc), (hi, hf) = self.x(x).chunk(3, -1), self.h(h).chunk(2, -1)
        c = sigmoid(xi + hi) * xc + sigmoid(xf + hf) * c
        return tanh(c), c


class LEM(Pair):
    """Two time scales; the second state is updated with the first one's new value."""

    parts = (4, 3)

    def __init__(self) -> None:
        super().__init__()
        self.of_z = nn.Linear(W, W)

    def step(self, x, state):
        y, z = state
        (xa, xb, xz, xy), (ha, hb, hz) = self.x(x).chunk(4, -1), self.h(y).chunk(3, -1)
        a, b = sigmoid(xa + ha), sigmoid(xb + hb)
        z = (1 - a) * z + a * tanh(xz + hz)
        return (1 - b) * y + b * tanh(xy + self.of_z(z)), z


class CoRNN(Pair):
    """Coupled oscillators: position and velocity feed each other element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.of_z = nn.Linear(W, W)

    def step(self, x, state):
        y, z = state
        z = z + 0.1 * (tanh(self.x(x) + self.h(y) + self.of_z(z)) - 1.0 * y - 0.5 * z)
        return y + 0.1 * z, z


class LiquidTimeConstant(Loop):
    """LTC, fused solver, two unfoldings a step: a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma, self.erev = (nn.Parameter(torch.rand(W, W)) for _ in range(3))
        self.w = nn.Parameter(torch.rand(W, W))

    def step(self, x, h):
        drive = self.x(x)
        for _ in range(2):
            g = self.w * sigmoid(self.sigma * (h[:, :, None] - self.mu))
            h = (h + 0.5 * (drive + (g * self.erev).sum(1))) / (1 + 0.5 * (1 + g.abs().sum(1)))
        return h


class ClosedForm(Loop):
    """CfC: a gate that depends on the time between steps."""

    parts = (3, 3)

    def step(self, x, h):
        f, g, k = (self.x(x) + self.h(h)).chunk(3, -1)
        gate = sigmoid(-f * 0.5)
        return gate * tanh(g) + (1 - gate) * h * torch.sigmoid(k)


class SpikingLIF(Loop):
    """Leaky integrate and fire: a sigmoid stands for the spike, and resets the potential."""

    def step(self, x, h):
        spike = sigmoid(5 * (h - 1))
        return 0.9 * h * (1 - spike) + self.x(x) + self.h(spike)


class RealLRU(nn.Module):
    """A linear recurrence with real diagonal decay in a loop, between two linear layers; four layers with shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (
            nn.ModuleList(nn.Linear(W, W) for _ in range(2)),
            nn.ModuleList(nn.Linear(W, W) for _ in range(2)),
        )
        self.decay = nn.Parameter(torch.rand(2, W))

    def forward(self, x):
        for into, out, decay in zip(self.into, self.out, self.decay, strict=True):
            h, states = torch.zeros_like(x[0]), []
            for b in into(x):
                h = sigmoid(decay) * h + b
                states.append(h)
            x = out(F.gelu(torch.stack(states)))
        return x


class ComplexLRU(nn.Module):
    """LRU as published, complex numbers in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.nu, self.theta = nn.Parameter(torch.rand(W)), nn.Parameter(torch.rand(W))
        self.b = nn.Parameter(torch.randn(2, W, INPUT) / 4)
        self.c = nn.Parameter(torch.randn(2, 3, W) / 4)

    def forward(self, x):
        decay = torch.polar(torch.exp(-torch.exp(self.nu)), self.theta)
        b, c = torch.complex(self.b[0], self.b[1]), torch.complex(self.c[0], self.c[1])
        h, outputs = torch.zeros(x.shape[1], W, dtype=b.dtype), []
        for x_t in x.to(b.dtype) @ b.T:
            h = decay * h + x_t
            outputs.append((h @ c.T).real)
        return torch.stack(outputs)


class S4D(nn.Module):
    """Diagonal state spaces as convolutions by FFT, in residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(4, W, 4, 2))
        self.c = nn.Parameter(torch.randn(4, W, 4, 2))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(4))
        self.out = nn.ModuleList(nn.Linear(W, 2 * W) for _ in range(4))

    def forward(self, x):
        for a, c, norm, out in zip(self.a, self.c, self.norms, self.out, strict=True):
            y = norm(x).transpose(1, 2)
            decay = torch.complex(-F.softplus(a[..., 0]), 3 * a[..., 1])
            powers = torch.exp(decay[..., None] * torch.arange(T))
            kernel = 2 * (torch.view_as_complex(c)[..., None] * powers).sum(1).real
            y = torch.fft.irfft(torch.fft.rfft(y, n=2 * T) * torch.fft.rfft(kernel, n=2 * T), n=2 * T)[..., :T]
            x = x + F.glu(out(F.gelu(y).transpose(1, 2)), -1)
        return x


class SelectiveScan(nn.Module):
    """Mamba by hand: a loop over time in each residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (
            nn.ModuleList(nn.Linear(W, 4 * W) for _ in range(3)),
            nn.ModuleList(nn.Linear(2 * W, W) for _ in range(3)),
        )
        self.dbc = nn.ModuleList(nn.Linear(2 * W, 2 * W + 6) for _ in range(3))
        self.norms, self.a = nn.ModuleList(nn.LayerNorm(W) for _ in range(3)), nn.Parameter(torch.rand(3, 2 * W, 3))

    def forward(self, x):
        for into, out, dbc, norm, a in zip(self.into, self.out, self.dbc, self.norms, self.a, strict=True):
            u, gate = into(norm(x)).chunk(2, -1)
            delta, b, c = dbc(u).split([2 * W, 3, 3], -1)
            delta = F.softplus(delta)[..., None]
            decay, drive = torch.exp(-delta * torch.exp(a)), delta * b[:, :, None] * u[..., None]
            h, states = torch.zeros_like(drive[:, 0]), []
            for t in range(x.shape[1]):
                h = decay[:, t] * h + drive[:, t]
                states.append((h * c[:, t, None]).sum(-1))
            x = x + out(torch.stack(states, 1) * F.silu(gate))
        return x


class MinGRUParallel(nn.Module):
    """minGRU by a parallel scan in log space, in residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(W, 2 * W) for _ in range(4))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(4))

    def forward(self, x):
        for layer, norm in zip(self.maps, self.norms, strict=True):
            gate, hidden = layer(norm(x)).chunk(2, -1)
            log_keep, log_take = -F.softplus(gate), -F.softplus(-gate)
            log_g = torch.where(hidden >= 0, (relu(hidden) + 0.5).log(), -F.softplus(-hidden))
            total = log_keep.cumsum(1)
            x = x + (total + (log_take + log_g - total).logcumsumexp(1)).exp()
        return x


class RWKV4(nn.Module):
    """Time mixing as a loop with a running maximum, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.kvr, self.out = nn.Linear(W, 3 * W), nn.Linear(W, W)
        self.decay, self.first = nn.Parameter(torch.rand(W)), nn.Parameter(torch.rand(W))

    def forward(self, x):
        k, v, r = self.kvr(x).chunk(3, -1)
        top, bottom = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        most, outputs = torch.full_like(x[0], -1e30), []
        for k_t, v_t in zip(k, v, strict=True):
            m = torch.maximum(most, self.first + k_t)
            a, b = torch.exp(most - m), torch.exp(self.first + k_t - m)
            outputs.append((a * top + b * v_t) / (a * bottom + b))
            m = torch.maximum(most - self.decay, k_t)
            a, b = torch.exp(most - self.decay - m), torch.exp(k_t - m)
            top, bottom, most = a * top + b * v_t, a * bottom + b, m
        return x + self.out(sigmoid(r) * torch.stack(outputs))


class DeltaNet(nn.Module):
    """A matrix state: what is read is taken off, then the new value is written."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvb = nn.Linear(INPUT, 3 * W + 1)

    def forward(self, x):
        state, outputs = x.new_zeros(x.shape[1], W, W), []
        for x_t in x:
            q, k, v, beta = self.qkvb(x_t).split([W, W, W, 1], -1)
            k = F.normalize(k, dim=-1)
            old = torch.einsum("bvk,bk->bv", state, k)
            state = state + torch.einsum("bv,bk->bvk", sigmoid(beta) * (v - old), k)
            outputs.append(torch.einsum("bvk,bk->bv", state, q))
        return torch.stack(outputs)


class Seq2Seq(nn.Module):
    """A GRU cell over the input, another over the output with attention to all states of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRUCell(INPUT, W), nn.GRUCell(2 * W, W)
        self.embed = nn.Parameter(torch.randn(5, W))

    def forward(self, x):
        h, states = x.new_zeros(x.shape[1], W), []
        for x_t in x:
            h = self.encoder(x_t, h)
            states.append(h)
        memory, outputs = torch.stack(states), []
        for word in self.embed:
            weights = torch.softmax((memory * h).sum(-1, keepdim=True), 0)
            h = self.decoder(torch.cat([word.expand_as(h), (weights * memory).sum(0)], -1), h)
            outputs.append(h)
        return torch.stack(outputs)


class Module(nn.Module):
    """torch's own module, and a head."""

    def __init__(self, kind, **options) -> None:
        super().__init__()
        self.body = kind(INPUT, W, **options)
        self.head = nn.Linear(W * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.head(self.body(x)[0])


class ResidualLSTM(nn.Module):
    """nn.LSTM in residual blocks, as in GNMT."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(W, W) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


class AWDLSTM(nn.Module):
    """An embedding, three LSTM layers, a tied decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(11, W), nn.LSTM(W, W, num_layers=3, dropout=0.2)

    def forward(self, tokens):
        return self.body(self.embed(tokens))[0] @ self.embed.weight.T


case = by_hand("recurrences")
X, S = (T, 3, INPUT), (3, T, W)
LOOP = (T,)
CASES = [
    case("MGU", LOOP, MGU, X),
    case("UGRNN", LOOP, UGRNN, X),
    case("Li-GRU", LOOP, LiGRU, X),
    case("FastGRNN", LOOP, FastGRNN, X),
    case("leaky echo state", LOOP, Leaky, X),
    case("antisymmetric RNN", LOOP, AntisymmetricRNN, X),
    case("Lipschitz RNN", LOOP, LipschitzRNN, X),
    case("IndRNN", LOOP, IndRNN, X, why="entirely elementwise"),
    case("bistable recurrent cell", LOOP, BistableCell, X, why="entirely elementwise"),
    case("JANET", LOOP, JANET, X),
    case("peephole LSTM", LOOP, MinimalLSTM, X),
    case("recurrent additive network", LOOP, RAN, X),
    case("LEM", LOOP, LEM, X, why="one chain whose state is a pair"),
    case("coRNN", LOOP, CoRNN, X, why="one chain whose state is a pair, K a circle"),
    case("liquid time constant", (2 * T,), LiquidTimeConstant, X, why="two unfoldings a step"),
    case("closed-form continuous time", LOOP, ClosedForm, X),
    case("leaky integrate and fire", LOOP, SpikingLIF, X),
    case("LRU, real", (T, T), RealLRU, (T, 3, W), why="a linear recurrence a layer"),
    case("LRU, complex", LOOP, ComplexLRU, X),
    case("S4D", (4,), S4D, S),
    case("Mamba by hand", (3,), SelectiveScan, S, why="one link a block; the loop over time is inside"),
    case("minGRU, parallel", (4,), MinGRUParallel, S),
    case(
        "RWKV-4 time mixing", LOOP, RWKV4, (T, 3, W), why="one chain over time; the shortcut round it is one link alone"
    ),
    case("DeltaNet", LOOP, DeltaNet, X),
    case("GRU with attention", (T, 5), Seq2Seq, X, why="an encoder over six steps, a decoder over five"),
    case("nn.GRU", LOOP, partial(Module, nn.GRU), X),
    case("nn.GRU, 2 layers, both directions", (T,) * 4, partial(Module, nn.GRU, num_layers=2, bidirectional=True), X),
    case("nn.LSTM", LOOP, partial(Module, nn.LSTM), X),
    case("nn.LSTM, both directions", (T,) * 2, partial(Module, nn.LSTM, bidirectional=True), X),
    case("nn.RNN", (), partial(Module, nn.RNN), X, why="the state goes through a matrix: K = 0"),
    case(
        "nn.LSTM in residual blocks", (3, T, T, T), ResidualLSTM, (T, 3, W), why="three blocks, and each LSTM's steps"
    ),
    case("AWD-LSTM", (T,) * 3, AWDLSTM, lambda: torch.randint(0, 11, (T, 3)), why="three layers"),
]
