"""Several residual streams that feed one another."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .made import W, by_hand
from .transformers import Attention, mlp


def layers(count: int, before: int = W, after: int = W) -> nn.ModuleList:
    return nn.ModuleList(nn.Sequential(nn.Linear(before, after), nn.Tanh()) for _ in range(count))


class RevNet(nn.Module):
    """``a += f(b); b += g(a)``."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = layers(4), layers(4)

    def forward(self, x):
        a, b = x, x * 0.5
        for f, g in zip(self.f, self.g, strict=True):
            a = a + f(b)
            b = b + g(a)
        return torch.cat([a, b], -1)


class MomentumResNet(nn.Module):
    """A velocity that decays and moves the state."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(5)

    def forward(self, x):
        v = torch.zeros_like(x)
        for block in self.blocks:
            v = 0.9 * v + 0.1 * block(x)
            x = x + v
        return x


class Leapfrog(nn.Module):
    """A Hamiltonian network: position and momentum, each moved by the other through a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = layers(4), layers(4)

    def forward(self, q, p):
        for f, g in zip(self.f, self.g, strict=True):
            p = p - 0.1 * f(q)
            q = q + 0.1 * g(p)
        return q, p


class HyperConnections(nn.Module):
    """Four streams, read by a weighted sum, mixed by a small learnt matrix (static hyper-connections)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(4)
        self.read, self.write = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4, 4))
        self.mix = nn.Parameter(torch.eye(4).repeat(4, 1, 1) + 0.1 * torch.randn(4, 4, 4))

    def forward(self, x):
        streams = x.unsqueeze(1).expand(-1, 4, -1)
        for i, block in enumerate(self.blocks):
            y = block(torch.einsum("s,bsc->bc", self.read[i], streams))
            streams = torch.einsum("ij,bjc->bic", self.mix[i], streams) + self.write[i][:, None] * y[:, None]
        return streams.sum(1)


class MMDiT(nn.Module):
    """Stable Diffusion 3: text and image attend together, each with its own weights and stream."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.ModuleList(nn.Linear(W, 3 * W) for _ in range(2))
            self.out, self.feed = (
                nn.ModuleList(nn.Linear(W, W) for _ in range(2)),
                nn.ModuleList(mlp() for _ in range(2)),
            )
            self.modulate = nn.ModuleList(nn.Linear(W, 4 * W) for _ in range(2))

        def forward(self, x, c, t):
            (xs, xb, xg, xf), (cs, cb, cg, cf) = (m(F.silu(t))[:, None].chunk(4, -1) for m in self.modulate)
            qkv = [
                layer(F.layer_norm(y, (W,)) * (1 + s) + b)
                for layer, y, s, b in zip(self.qkv, (x, c), (xs, cs), (xb, cb), strict=True)
            ]
            q, k, v = torch.cat(qkv, 1).chunk(3, -1)
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
            x = x + xg * self.out[0](y[:, : x.shape[1]])
            c = c + cg * self.out[1](y[:, x.shape[1] :])
            x = x + xf * self.feed[0](F.layer_norm(x, (W,)))
            c = c + cf * self.feed[1](F.layer_norm(c, (W,)))
            return x, c

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x, c, t):
        for block in self.blocks:
            x, c = block(x, c, t)
        return x, c


class Evoformer(nn.Module):
    """Rows of an alignment and pairs of residues: attention biased by pairs, outer products, triangles."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.bias, self.out = nn.Linear(W, 3 * W), nn.Linear(4, 1), nn.Linear(W, W)
            self.feed, self.feed_pairs = mlp(), mlp(4)
            self.left, self.right, self.outer = nn.Linear(W, 3), nn.Linear(W, 3), nn.Linear(9, 4)
            self.a, self.b, self.gate, self.triangle = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, m, z):
            q, k, v = self.qkv(F.layer_norm(m, (W,))).chunk(3, -1)
            scores = q @ k.transpose(-1, -2) / W**0.5 + self.bias(F.layer_norm(z, (4,))).squeeze(-1)
            m = m + self.out(torch.softmax(scores, -1) @ v)
            m = m + self.feed(F.layer_norm(m, (W,)))
            y = F.layer_norm(m, (W,))
            outer = torch.einsum("sia,sjb->ijab", self.left(y), self.right(y)) / m.shape[0]
            z = z + self.outer(outer.flatten(-2))
            y = F.layer_norm(z, (4,))
            product = torch.einsum("ikc,jkc->ijc", self.a(y), self.b(y))
            z = z + torch.sigmoid(self.gate(y)) * self.triangle(F.layer_norm(product, (4,)))
            return m, z + self.feed_pairs(F.layer_norm(z, (4,)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, m, z):
        for block in self.blocks:
            m, z = block(m, z)
        return m, z


class CrossTowers(nn.Module):
    """Two towers whose layers attend to each other (LXMERT, ViLBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_b, self.to_a = (
            nn.ModuleList(Attention() for _ in range(3)),
            nn.ModuleList(Attention() for _ in range(3)),
        )
        self.feed_a, self.feed_b = nn.ModuleList(mlp() for _ in range(3)), nn.ModuleList(mlp() for _ in range(3))

    def forward(self, a, b):
        for i in range(3):
            before = a
            a = F.layer_norm(a + self.to_b[i](a, b), (W,))
            b = F.layer_norm(b + self.to_a[i](b, before), (W,))
            a = F.layer_norm(a + self.feed_a[i](a), (W,))
            b = F.layer_norm(b + self.feed_b[i](b), (W,))
        return a, b


class TwoStep(nn.Module):
    """``x[i+1] = 1.5 x[i] - .5 x[i-1] + f(x[i])``: a linear multistep network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(5)

    def forward(self, x):
        before, x = x, x + 0.1
        for block in self.blocks:
            before, x = x, 1.5 * x - 0.5 * before + 0.2 * block(x)
        return x


class DenselyWeighted(nn.Module):
    """DenseFormer: after each block a weighted mean of all states so far."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = layers(4)
        self.weights = nn.ParameterList(torch.eye(i + 2)[-1] + 0.1 * torch.randn(i + 2) for i in range(4))

    def forward(self, x):
        states = [x]
        for block, weights in zip(self.blocks, self.weights, strict=True):
            x = x + block(x)
            states.append(x)
            x = (weights[:, None, None] * torch.stack(states)).sum(0)
        return x


class BiFPN(nn.Module):
    """Levels of a pyramid, each fused with its resized neighbours by weights that are normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.ModuleList(nn.Conv2d(W, W, 3, 1, 1) for _ in range(3)),
            nn.ModuleList(nn.Conv2d(W, W, 3, 1, 1) for _ in range(3)),
        )
        self.w = nn.Parameter(torch.rand(3, 4))

    def forward(self, a, b):
        for up, down, w in zip(self.up, self.down, self.w, strict=True):
            w = F.relu(w) + 0.1
            a = a + up((w[0] * a + w[1] * F.interpolate(b, scale_factor=2)) / (w[0] + w[1]))
            b = b + down((w[2] * b + w[3] * F.max_pool2d(a, 2)) / (w[2] + w[3]))
        return a, b


case = by_hand("several streams")
X = (3, W)
PAIR = "two streams that feed each other: one chain whose state is the pair"
CASES = [
    case("RevNet", (4,), RevNet, X, why=PAIR),
    case("momentum ResNet", (5,), MomentumResNet, X, why="one chain whose state is velocity and position"),
    case("leapfrog", (4,), Leapfrog, X, X, why=PAIR),
    case("hyper-connections", (4,), HyperConnections, X, why="mixed by a small matrix: K is a matrix of diagonals"),
    case("MM-DiT", (6,), MMDiT, (2, 4, W), (2, 3, W), (2, W), why=PAIR),
    case("Evoformer", (6,), Evoformer, (3, 4, W), (4, 4, 4), why=f"{PAIR}; a block updates both twice or more"),
    case("two towers that attend to each other", (6,), CrossTowers, (2, 4, W), (2, 3, W), why=PAIR),
    case("two-step network", (5,), TwoStep, X, why="one chain whose state is this state and the one before"),
    case("DenseFormer", (4,), DenselyWeighted, X, why="every state is a mean over all before it"),
    case("BiFPN", (6,), BiFPN, (2, W, 4, 4), (2, W, 2, 2), why=f"{PAIR}; six fusions, each of which reads both"),
]
