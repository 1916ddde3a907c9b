"""A user-defined recurrent cell reads images pixel by pixel: a GRU with a LayerNorm inside.

    python examples/custom_cell.py                                   # digits: 64 steps, k = 10
    python examples/custom_cell.py --method exact                    # the same with exact backprop
    python examples/custom_cell.py --loop --method exact --steps 20  # as a Python loop, which has to be unrolled

No library has a fast kernel for such a cell, and ``torch.compile`` unrolls a Python loop over it.
``hwbp_compiler.recurrent`` compiles one step, runs it over time, and finds the highway in it (here the update gate).
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import pixels, shuffled
from torch import nn
from training import Task, accuracy, main, parser

from hwbp_compiler import recurrent


class LayerNormGRUCell(nn.Module):
    """[B, inputs], [B, hidden] -> output and next state, both [B, hidden]"""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)
        self.norm = nn.LayerNorm(3 * hidden)

    def forward(self, x, h):
        rx, zx, nx = self.from_x(x).chunk(3, -1)
        rh, zh, nh = self.norm(self.from_h(h)).chunk(3, -1)
        z = torch.sigmoid(zx + zh + 1.0)
        h = z * h + (1 - z) * torch.tanh(nx + torch.sigmoid(rx + rh) * nh)
        return h, h


class Reader(nn.Module):
    """[B, length, channels] -> [B, classes]"""

    def __init__(self, channels: int, hidden: int, classes: int, loop: bool) -> None:
        super().__init__()
        self.cell, self.head = LayerNormGRUCell(channels, hidden), nn.Linear(hidden, classes)
        self.loop = loop

    def forward(self, x):
        pixels = x.transpose(0, 1)  # time comes first
        h = pixels.new_zeros(pixels.shape[1], self.head.in_features)
        if self.loop:
            for pixel in pixels:
                _, h = self.cell(pixel, h)
        else:
            _, h = recurrent(self.cell, pixels, h)
        return self.head(h)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, epochs=20, batch=64, iterations=10, lr=5e-3)
    p.add_argument("--hidden", type=int, default=48)
    p.add_argument("--loop", action="store_true", help="use a Python loop over the cell instead of recurrent")
    p.add_argument("--data", choices=["digits", "cifar10", "cifar100"], default="digits")
    p.add_argument("--folder", help="folder with the unpacked CIFAR; by default, torchvision downloads it")
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    x, test_x, labels, test_labels = pixels(args.data, args.folder)
    torch.manual_seed(args.seed)
    model = Reader(x.shape[2], args.hidden, int(labels.max()) + 1, args.loop)
    batch = shuffled(x, labels, args.batch, args.seed)
    return Task(model, batch, F.cross_entropy, accuracy(test_x, test_labels), max(1, len(x) // args.batch))


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
