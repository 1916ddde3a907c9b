"""A GRU reads images pixel by pixel and classifies them from its last state.

    python examples/pixel_gru.py                                     # digits: 64 steps, k = 10
    python examples/pixel_gru.py --method fpi                        # the same without the highway
    python examples/pixel_gru.py --data cifar10 --folder ... --batch 128 --lr 1e-3 --epochs 100   # 1,024 steps

The gradient has to travel from the last pixel to the first. Along the highway (the product of the update gates), one
scan is enough. Fixed-point iteration moves the gradient one step per iteration, and sees only the last k + 1 pixels.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import pixels, shuffled
from torch import nn
from training import Task, accuracy, main, parser


class PixelGRU(nn.Module):
    """[B, length, channels] -> [B, classes]"""

    def __init__(self, channels: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(channels, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x):
        states, _ = self.gru(x)
        return self.head(states[:, -1])


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, epochs=40, batch=64, iterations=10, lr=1e-2)
    p.add_argument("--hidden", type=int, default=64, help="64, the paper's")
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--data", choices=["digits", "cifar10", "cifar100"], default="digits")
    p.add_argument("--folder", help="folder with the unpacked CIFAR; by default, torchvision downloads it")
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    x, test_x, labels, test_labels = pixels(args.data, args.folder)
    torch.manual_seed(args.seed)
    model = PixelGRU(x.shape[2], args.hidden, args.layers, int(labels.max()) + 1)
    batch = shuffled(x, labels, args.batch, args.seed)
    return Task(model, batch, F.cross_entropy, accuracy(test_x, test_labels), max(1, len(x) // args.batch))


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
