"""The parts of random models: blocks, norms, updates, activations and recurrent cells.

Each part is written once for two uses. With ``hold is keep`` it is what a user would write. With any other ``hold`` the
same computation is written out for the oracle: each value that mixes elements passes through ``hold`` where it meets
the state (:class:`..reference.Step`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .reference import Hold, Tensors, keep

BlockKind = Literal[
    "mlp", "glu", "conv", "attention", "sdpa", "heads", "cross", "mixer", "experts", "squeeze", "cumulative",
    "shift", "pool", "parallel", "cast", "sized", "in_place",
]  # fmt: skip
Update = Literal[
    "add", "scaled", "vector", "gate", "input_gate", "lerp", "self_gate", "subtract", "scalar", "rezero", "kept",
    "product", "curved", "normed_gate", "inner", "part",
]  # fmt: skip
Norm = Literal["none", "layer", "rms", "batch", "batch_eval", "group"]
After = Literal["none", "relu", "layer", "rms", "mask", "tanh", "silu", "leaky", "batch", "batch_eval", "cast"]
CellKind = Literal[
    "gru",
    "lstm",
    "min_gru",
    "diagonal",
    "tanh",
    "residual",
    "leaky",
    "lerp",
    "peephole",
    "late_reset",
    "normed",
    "gates",
    "bounded_gates",
]


class Block(nn.Module):
    """``forward(x, context) -> (z, hidden activity)``; mixes elements. x is [batch, length, width].

    mlp, glu              linear, GELU or GLU, linear
    conv, pool, shift     a convolution, average pooling, or a roll along the length
    attention, sdpa, heads  softmax attention by hand; PyTorch's own, causal; two heads
    cross                 attention over ``context`` [batch, length', width']
    mixer, cumulative     a linear map or a running mean along the length
    experts               two experts mixed by a softmax router; the hidden activity is the router's
    squeeze               scaled by a sigmoid of the mean over the length
    parallel              attention plus MLP
    cast                  an MLP computed in float32
    sized                 swaps the halves of the length: computes with sizes of its own tensors
    in_place              the first column is set to zero, the rest is doubled, in place
    """

    def __init__(self, kind: BlockKind, width: int, length: int, context: int) -> None:
        super().__init__()
        self.kind = kind
        hidden = width + 2
        second: nn.Module = nn.Linear(width, width)
        if kind == "conv":
            self.first, second = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        elif kind in ("attention", "sdpa"):
            self.first = nn.Linear(width, 3 * width)
        elif kind == "heads":
            self.first, second = nn.Linear(width, 12), nn.Linear(4, width)
        elif kind == "cross":
            self.first, self.context = nn.Linear(width, width), nn.Linear(context, 2 * width)
        elif kind == "mixer":
            self.first, second = nn.Linear(length, length + 1), nn.Linear(length + 1, length)
        elif kind == "experts":
            self.first, self.other = nn.Linear(width, 2), nn.Linear(width, width)
        elif kind == "parallel":
            self.first = nn.Linear(width, 3 * width)
            self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        elif kind in ("squeeze", "cumulative", "shift", "pool", "sized", "in_place"):
            self.first = nn.Linear(width, width)
        else:
            self.first = nn.Linear(width, 2 * hidden if kind == "glu" else hidden)
            second = nn.Linear(hidden, width)
        self.second = second

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self, f"_{self.kind}")(x, context)

    def _mlp(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x)
        return self.second(F.gelu(hidden)), hidden

    def _glu(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.glu(self.first(x))
        return self.second(hidden), hidden

    def _cast(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.float32
        hidden = F.silu(F.linear(x.to(low), self.first.weight.to(low), self.first.bias.to(low)))
        return F.linear(hidden, self.second.weight.to(low)).to(x.dtype), hidden

    def _conv(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.first(x.transpose(1, 2)))
        return self.second(hidden).transpose(1, 2), hidden

    def _attention(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.first(x).chunk(3, -1)
        hidden = torch.softmax(q @ k.transpose(1, 2) / x.shape[-1] ** 0.5, -1)
        return self.second(hidden @ v), hidden

    def _sdpa(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t.unsqueeze(1) for t in self.first(x).chunk(3, -1))
        hidden = F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)
        return self.second(hidden), hidden

    def _heads(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.first(x).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        hidden = torch.softmax(q @ k.transpose(-2, -1), -1)
        return self.second((hidden @ v).transpose(1, 2).flatten(2)), hidden

    def _cross(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.context(context).chunk(2, -1)
        hidden = torch.softmax(self.first(x) @ k.transpose(1, 2), -1)
        return self.second(hidden @ v), hidden

    def _mixer(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(self.first(x.transpose(1, 2)))
        return self.second(hidden).transpose(1, 2), hidden

    def _experts(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        router = self.first(x)
        weight = torch.softmax(router, -1)
        return weight[..., :1] * self.second(x) + weight[..., 1:] * torch.tanh(self.other(x)), router

    def _squeeze(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.sigmoid(self.first(x.mean(1, keepdim=True)))
        return self.second(x) * scale, scale

    def _cumulative(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.cumsum(self.first(x), 1) / torch.arange(1, x.shape[1] + 1, dtype=x.dtype).unsqueeze(-1)
        return self.second(torch.tanh(hidden)), hidden

    def _shift(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(torch.roll(x, 1, 1)))
        return self.second(hidden), hidden

    def _pool(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.avg_pool1d(self.first(x).transpose(1, 2), 3, 1, 1).transpose(1, 2)
        return self.second(torch.tanh(hidden)), hidden

    def _sized(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.first(x))
        length = hidden.shape[1]
        early, late = hidden.split((length // 2, length - length // 2), 1)
        mean = (hidden.sum(1, keepdim=True) / length).expand(hidden.shape)
        return self.second((torch.cat([late, early], 1) + mean).reshape(x.shape[0], -1, x.shape[-1])), hidden

    def _in_place(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden = 1.5 * torch.tanh(self.first(x))
        hidden[..., 0] = 0
        hidden[..., 1:] *= 2
        return self.second(hidden), hidden

    def _parallel(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        z, hidden = self._attention(x, context)
        return z + self.down(F.gelu(self.up(x))), hidden


class Normal(nn.Module):
    """A norm over the last dimension (``group``: over length and width, in two groups if the width can be divided by
    four).
    """

    def __init__(self, kind: Norm | After, width: int) -> None:
        super().__init__()
        self.kind, self.eps = kind, 1e-5
        if kind in ("layer", "rms", "batch", "batch_eval", "group"):
            self.weight = nn.Parameter(1.0 + 0.2 * torch.randn(width))
            self.bias = nn.Parameter(0.2 * torch.randn(width))
        if kind == "batch_eval":
            self.register_buffer("mean", 0.1 * torch.randn(width))
            self.register_buffer("variance", 0.5 + torch.rand(width))

    def forward(self, x: Tensor, hold: Hold = keep) -> Tensor:
        width = x.shape[-1:]
        if self.kind == "layer":
            if hold is keep:
                return F.layer_norm(x, width, self.weight, self.bias, self.eps)
            centred = x - hold(x.mean(-1, keepdim=True))
            deviation = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + self.eps)
            return centred / hold(deviation) * self.weight + self.bias
        if self.kind == "rms":
            if hold is keep:
                return F.rms_norm(x, width, self.weight, self.eps)
            return x / hold(torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps)) * self.weight
        if self.kind in ("batch", "batch_eval"):
            mean, variance = (None, None) if self.kind == "batch" else (self.mean, self.variance)
            if hold is keep:
                columns = x.transpose(1, -1) if x.dim() == 3 else x
                training = self.kind == "batch"
                found = F.batch_norm(columns, mean, variance, self.weight, self.bias, training, eps=self.eps)
                return found.transpose(1, -1) if x.dim() == 3 else found
            others = tuple(range(x.dim() - 1))
            if mean is None or variance is None:
                mean, variance = x.mean(others), x.var(others, unbiased=False)
            return (x - hold(mean)) / hold(torch.sqrt(variance + self.eps)) * self.weight + self.bias
        if self.kind == "group":
            groups = 2 if x.shape[-1] % 4 == 0 else 1
            if hold is not keep:
                parts = x.transpose(1, -1).reshape(x.shape[0], groups, -1)
                centred = parts - hold(parts.mean(-1, keepdim=True))
                deviation = torch.sqrt(parts.var(-1, unbiased=False, keepdim=True) + self.eps)
                normed = (centred / hold(deviation)).view(x.transpose(1, -1).shape).transpose(1, -1)
                return normed * self.weight + self.bias
            return F.group_norm(x.transpose(1, -1), groups, self.weight, self.bias, self.eps).transpose(1, -1)
        return x


# Updates that use the block's normed input in addition to the block.
USED_TWICE = ("normed_gate", "inner")


def updated(kind: Update, x: Tensor, u: Tensor, z: Tensor, learnt: Learnt, hold: Hold) -> Tensor:
    """Combine block output z and state x; u is the block's input."""
    if kind == "gate":
        g = torch.sigmoid(learnt.gate(x))
        return hold(g) * x + hold((1 - g) * torch.tanh(z))
    if kind == "lerp":
        g = torch.sigmoid(learnt.gate(x))
        if hold is keep:
            return torch.lerp(x, torch.tanh(z), g)
        return hold(1 - g) * x + hold(g * torch.tanh(z))
    z = hold(z)
    if kind == "scaled":
        return 0.8 * x + z
    if kind == "vector" or kind == "scalar":
        return learnt.factor * x + z
    if kind == "input_gate":
        g = torch.sigmoid(learnt.factor)
        return g * x + (1 - g) * torch.tanh(z)
    if kind == "self_gate":
        return x + x * torch.sigmoid(z)
    if kind == "subtract":
        return x - z
    if kind == "rezero":
        return x + learnt.factor * z
    if kind == "kept":
        return torch.where(learnt.mask, x + z, x)
    if kind == "product":
        return x * (1.2 + z)
    if kind == "normed_gate":
        return x + 0.3 * u * torch.sigmoid(z)
    if kind == "inner":
        return x + 0.3 * (u + z)
    if kind == "part":
        return torch.cat([x[..., :1] + z[..., :1], x[..., 1:]], -1)
    if kind == "curved":
        return x + z + 0.3 * torch.tanh(x)
    return x + z


class Learnt(nn.Module):
    """What an update needs besides state and block output."""

    def __init__(self, kind: Update, width: int, batch: int, length: int) -> None:
        super().__init__()
        if kind in ("gate", "lerp"):
            self.gate = nn.Linear(width, width)
        if kind in ("vector", "input_gate", "rezero"):
            self.factor = nn.Parameter(0.7 + 0.3 * torch.randn(width))
        if kind == "scalar":
            self.factor = nn.Parameter(0.7 + 0.3 * torch.randn(()))
        if kind == "kept":
            self.register_buffer("mask", torch.rand(batch, length, 1) < 0.7)


def activated(kind: After, x: Tensor) -> Tensor:
    """The activations that can follow an update within the link."""
    if kind == "relu":
        return torch.relu(x)
    if kind == "tanh":
        return torch.tanh(x)
    if kind == "silu":
        return F.silu(x)
    if kind == "leaky":
        return F.leaky_relu(x, 0.1)
    if kind == "cast":
        return x.to(torch.float32).to(x.dtype)
    return x


class Cell(nn.Module):
    """One time step: ``forward(x, state, hold) -> state``. The first entry of a state is passed upwards.

    gru, lstm           as ``nn.GRUCell`` and ``nn.LSTMCell``; ``late_reset``: the reset gate before the matrix
    peephole            an LSTM whose forget gate also sees c, elementwise
    min_gru, diagonal   gates depend only on the input; no matrix on the state
    gates               a h + (1 - a) b, where the input itself is a and b; bounded_gates: tanh(a h + b)
    residual, leaky     h + tanh(..); (1 - a) h + a tanh(..) with a learnt vector a
    lerp                ``torch.lerp(h, n, z)``
    normed              a LayerNorm over the GRU's new state
    tanh                no elementwise path
    """

    def __init__(self, kind: CellKind, inputs: int, width: int) -> None:
        super().__init__()
        self.kind = kind
        gates = {"gru": 3, "normed": 3, "late_reset": 3, "lstm": 4, "peephole": 4, "lerp": 2, "min_gru": 2}.get(kind, 1)
        if kind not in ("gates", "bounded_gates"):
            self.from_x = nn.Linear(inputs, gates * width)
        if kind not in ("min_gru", "diagonal", "gates", "bounded_gates"):
            self.from_h = nn.Linear(width, gates * width)
        if kind in ("diagonal", "leaky", "peephole"):
            self.factor = nn.Parameter(torch.randn(width))
        if kind == "normed":
            self.norm = Normal("layer", width)

    @property
    def components(self) -> int:
        return 2 if self.kind in ("lstm", "peephole") else 1

    def forward(self, x: Tensor, state: Tensors, hold: Hold = keep) -> Tensors:
        return getattr(self, f"_{self.kind}")(x, state, hold)

    def _gru(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        (h,) = state
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        rh, zh, nh = self.from_h(h).chunk(3, -1)
        r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
        n = torch.tanh(nx + r * nh)
        return (hold(z) * h + hold((1 - z) * n),)

    def _normed(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        return (self.norm(self._gru(x, state, hold)[0], hold),)

    def _late_reset(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        (h,) = state
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        weights, biases = self.from_h.weight.chunk(3), self.from_h.bias.chunk(3)
        r, z = (torch.sigmoid(a + F.linear(h, w, b)) for a, w, b in zip((rx, zx), weights[:2], biases[:2], strict=True))
        n = torch.tanh(nx + F.linear(r * h, weights[2], biases[2]))
        if hold is keep:
            return (h + z * (n - h),)
        return (hold(1 - z) * h + hold(z * n),)

    def _lstm(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        h, c = state
        i, f, g, o = (self.from_x(x) + self.from_h(h)).chunk(4, -1)
        c = hold(torch.sigmoid(f)) * c + hold(torch.sigmoid(i) * torch.tanh(g))
        return hold(torch.sigmoid(o)) * torch.tanh(c), c

    def _peephole(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        h, c = state
        i, f, g, o = hold(self.from_x(x) + self.from_h(h)).chunk(4, -1)
        c = torch.sigmoid(f + self.factor * c) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def _lerp(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        (h,) = state
        z, n = (self.from_x(x) + self.from_h(h)).chunk(2, -1)
        z, n = torch.sigmoid(z), torch.tanh(n)
        return (torch.lerp(h, n, z) if hold is keep else hold(1 - z) * h + hold(z * n),)

    def _min_gru(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        z, n = self.from_x(x).chunk(2, -1)
        z = torch.sigmoid(z)
        return ((1 - z) * state[0] + z * n,)

    def _diagonal(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        return (torch.sigmoid(self.factor) * state[0] + self.from_x(x),)

    def _gates(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        a, b = torch.sigmoid(x), torch.cos(x)
        return (a * state[0] + (1 - a) * b,)

    def _bounded_gates(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        return (torch.tanh(torch.sigmoid(x) * state[0] + torch.cos(x)),)

    def _block(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.from_x(x) + self.from_h(h))

    def _tanh(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        return (hold(self._block(x, state[0])),)

    def _residual(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        return (state[0] + hold(self._block(x, state[0])),)

    def _leaky(self, x: Tensor, state: Tensors, hold: Hold) -> Tensors:
        a = torch.sigmoid(self.factor)
        return ((1 - a) * state[0] + a * hold(self._block(x, state[0])),)
