"""Models without an elementwise path from state to state, and models that are too short. No chain is found in them, and
every gradient is exact. Also models whose chains are not determined: only exactness at full length is known for these.
"""

from __future__ import annotations

import torch
from torch import nn

from .case import Case, program_of, setup
from .residual import WIDTH, Block


class TanhRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(4, 6)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 6)
        outputs = []
        for x_t in x:
            h = self.cell(x_t, h)
            outputs.append(h)
        return torch.stack(outputs)


class Dense(nn.Module):
    """DenseNet: every layer's output is appended, nothing is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + 2 * i, 2) for i in range(6))
        self.head = nn.Linear(WIDTH + 12, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], -1)
        return self.head(x)


class UNet(nn.Module):
    """Residual blocks on the way down and up, and long skips between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Block() for _ in range(4))
        self.up = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        for block in self.up:
            x = block(x) + skips.pop()
        return x


class ReadsItsPast(nn.Module):
    """A gated recurrence whose candidate attends to all earlier states, so gradients leave the chain and return."""

    def __init__(self) -> None:
        super().__init__()
        self.candidate, self.gate = nn.Linear(16, WIDTH), nn.Linear(8, WIDTH)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], WIDTH)
        past = [h]
        for x_t in x:
            memory = torch.stack(past)
            weights = torch.softmax((memory * h).sum(-1, keepdim=True), 0)
            z = torch.sigmoid(self.gate(h))
            h = z * h + (1 - z) * torch.tanh(self.candidate(torch.cat([x_t, (weights * memory).sum(0)], -1)))
            past.append(h)
        return h


def _exact(model):
    """Nothing is a chain: the model itself is the program."""
    return program_of(model, lambda run, *args: model(*args))


def _tanh_mlp():
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))


def _relu_mlp():
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))


CASES = [
    Case("nothing_tanh_mlp", setup(_tanh_mlp, (4, WIDTH)), _exact),
    Case("nothing_relu_mlp", setup(_relu_mlp, (4, WIDTH)), _exact),
    Case("nothing_tanh_rnn", setup(TanhRNN, (7, 3, 4)), _exact),
    Case("nothing_densenet", setup(Dense, (4, WIDTH)), _exact),
    Case("nothing_single_block", setup(Block, (4, WIDTH)), _exact),
    Case("unet", setup(UNet, (4, WIDTH)), None, chains=None),
    Case("reads_its_past", setup(ReadsItsPast, (6, 3, WIDTH)), None, chains=None),
]
