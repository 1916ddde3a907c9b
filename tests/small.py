"""The residual models that most tests need: small, plain, and the same in every file."""

from __future__ import annotations

import torch
from torch import nn


class Residual(nn.Module):
    """One link, whose block is one layer."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def block(self, x):
        return torch.tanh(self.linear(x))

    def forward(self, x):
        return x + self.block(x)


class PreNorm(nn.Module):
    """One link as transformers have them: its block norms the state first, and has two layers."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Residuals(nn.Module):
    """``depth`` links in one module, written as a loop."""

    def __init__(self, depth: int = 5, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x
