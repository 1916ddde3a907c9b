"""Graph networks: a dense adjacency matrix, or edges as index pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .made import W, by_hand

NODES = 5
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 1], [1, 2, 3, 4, 0, 2, 4, 3]])


def propagation() -> torch.Tensor:
    adjacency = torch.eye(NODES)
    adjacency[EDGES[0], EDGES[1]] = adjacency[EDGES[1], EDGES[0]] = 1.0
    degree = adjacency.sum(1).rsqrt()
    return degree[:, None] * adjacency * degree


class APPNP(nn.Module):
    """``z = (1 - a) A z + a h``: the state goes through the adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))
        self.register_buffer("A", propagation())

    def forward(self, x):
        first = z = self.net(x)
        for _ in range(6):
            z = 0.9 * (self.A @ z) + 0.1 * first
        return z


class GCNII(nn.Module):
    """Identity mapping: ``(1 - b) s + b W s`` with ``s = .9 A x + .1 x0``; the state goes through A."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(W, W), nn.ModuleList(nn.Linear(W, W, bias=False) for _ in range(5))
        self.register_buffer("A", propagation())

    def forward(self, x):
        first = x = F.relu(self.stem(x))
        for i, layer in enumerate(self.layers, start=1):
            beta = 0.5 / i
            s = 0.9 * (self.A @ x) + 0.1 * first
            x = F.relu((1 - beta) * s + beta * layer(s))
        return x


class ResGCN(nn.Module):
    """Pre-activation residual graph convolutions (DeepGCN), which also read the first state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(W, W)
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(5))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(5))
        self.register_buffer("A", propagation())

    def forward(self, x):
        first = x = self.stem(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + self.A @ layer(F.relu(norm(x))) + 0.1 * first
        return x


class GGNN(nn.Module):
    """A GRU cell on messages."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.cell = nn.Linear(W, W), nn.GRUCell(W, W)
        self.register_buffer("A", propagation())

    def forward(self, x):
        for _ in range(5):
            x = self.cell(self.A @ self.message(x), x)
        return x


class MPNN(nn.Module):
    """Messages along edges, gathered by ``index_add``; edges have a residual state too."""

    def __init__(self) -> None:
        super().__init__()
        self.of_edges = nn.ModuleList(nn.Sequential(nn.Linear(3 * W, W), nn.ReLU(), nn.Linear(W, W)) for _ in range(4))
        self.of_nodes = nn.ModuleList(nn.Sequential(nn.Linear(2 * W, W), nn.ReLU(), nn.Linear(W, W)) for _ in range(4))

    def forward(self, x, e):
        source, target = EDGES
        for of_edges, of_nodes in zip(self.of_edges, self.of_nodes, strict=True):
            e = e + of_edges(torch.cat([x[source], x[target], e], -1))
            gathered = torch.zeros_like(x).index_add(0, target, e)
            x = x + of_nodes(torch.cat([x, gathered], -1))
        return x


class EGNN(nn.Module):
    """Features and positions, each updated by messages of both."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.ModuleList(nn.Sequential(nn.Linear(2 * W + 1, W), nn.SiLU()) for _ in range(4))
        self.node = nn.ModuleList(nn.Linear(2 * W, W) for _ in range(4))
        self.move = nn.ModuleList(nn.Linear(W, 1) for _ in range(4))

    def forward(self, h, x):
        n = h.shape[0]
        for edge, node, move in zip(self.edge, self.node, self.move, strict=True):
            apart = x[:, None] - x[None]
            pairs = torch.cat([h[:, None].expand(n, n, -1), h[None].expand(n, n, -1), apart.square().sum(-1, True)], -1)
            messages = edge(pairs)
            x = x + (apart * torch.tanh(move(messages))).mean(1)
            h = h + node(torch.cat([h, messages.sum(1)], -1))
        return h, x


class GraphTransformer(nn.Module):
    """Attention whose scores see edges; layer norms behind the additions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(W, 3 * W) for _ in range(3))
        self.feed = nn.ModuleList(nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(W) for _ in range(6))
        self.register_buffer("A", propagation())

    def forward(self, x):
        for i in range(3):
            q, k, v = self.qkv[i](x).chunk(3, -1)
            scores = (q @ k.T / W**0.5).masked_fill(self.A == 0, float("-inf"))
            x = self.norms[2 * i](x + torch.softmax(scores, -1) @ v)
            x = self.norms[2 * i + 1](x + self.feed[i](x))
        return x


class GIN(nn.Module):
    """``mlp((1 + eps) x + A x)``: the sum goes through the MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W)) for _ in range(4))
        self.eps = nn.Parameter(torch.zeros(4))
        self.register_buffer("A", propagation())

    def forward(self, x):
        for eps, layer in zip(self.eps, self.layers, strict=True):
            x = layer((1 + eps) * x + self.A @ x)
        return x


class GAT(nn.Module):
    """Attention over neighbours by pairs, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(4))
        self.left, self.right = nn.Parameter(torch.randn(4, W)), nn.Parameter(torch.randn(4, W))
        self.register_buffer("A", propagation())

    def forward(self, x):
        for layer, left, right in zip(self.layers, self.left, self.right, strict=True):
            y = layer(x)
            scores = F.leaky_relu((y @ left)[:, None] + (y @ right)[None], 0.2)
            x = x + F.elu(torch.softmax(scores.masked_fill(self.A == 0, float("-inf")), -1) @ y)
        return x


class JumpingKnowledge(nn.Module):
    """Residual graph convolutions; the maximum of all states is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(W, W) for _ in range(5))
        self.register_buffer("A", propagation())

    def forward(self, x):
        states = []
        for layer in self.layers:
            x = x + F.relu(self.A @ layer(x))
            states.append(x)
        return torch.stack(states).amax(0)


PAIR = "two streams that feed each other: one chain whose state is the pair"
case = by_hand("graphs")
X = (NODES, W)
CASES = [
    case("APPNP", (), APPNP, X, why="the state goes through the adjacency matrix, a sum over nodes: K = 0"),
    case(
        "GCNII",
        (2,),
        GCNII,
        X,
        why="the state goes through the adjacency matrix, but in the first layer, where it is x0",
    ),
    case("DeepGCN with the first state", (5,), ResGCN, X, why="the first state is added again by every layer"),
    case("GGNN", (5,), GGNN, X),
    case("MPNN with edge states", (8,), MPNN, X, (EDGES.shape[1], W), why=f"{PAIR}; each of eight updates reads both"),
    case("EGNN", (4,), EGNN, X, (NODES, 3), why=PAIR),
    case("graph transformer", (6,), GraphTransformer, X),
    case("GIN", (), GIN, X, why="the sum goes through an MLP: K = 0"),
    case("GAT with residuals", (4,), GAT, X),
    case("jumping knowledge", (5,), JumpingKnowledge, X),
]
