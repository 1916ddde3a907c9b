"""Pre-activation ResNet32, ResNet56 or ResNet110 on CIFAR, or by default on scikit-learn's digits.

    python examples/resnet_cifar.py                                         # digits, ResNet32, k = 3
    python examples/resnet_cifar.py --method exact
    python examples/resnet_cifar.py --data cifar10 --depth 110 --width 16 --shortcut strided --epochs 100 --iterations 4

``--shortcut identity``, as in the paper: every residual path is an identity. The only down-sampling is an invertible
one before the first block (pixels into channels), so all blocks are one chain: 15, 27 or 54 links. ``--shortcut
strided``: the standard network, three stages with a strided convolution on the residual path between them. Each stage
is a chain; what lies between is exact. The default schedule is much shorter than the usual 200 epochs for CIFAR.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from data import flipped_and_shifted, generator, images, shuffled
from torch import nn
from training import Task, accuracy, main, parser


def convolution(channels_in: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels_in), convolution(channels_in, channels, stride)
        self.norm2, self.conv2 = nn.BatchNorm2d(channels), convolution(channels, channels)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)

    def forward(self, x):
        branch = self.conv1(F.relu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.relu(self.norm2(branch)))


class ResNet(nn.Module):
    """[B, channels, H, W] -> [B, classes]; ``depth`` counts convolutions and the last layer: 6 n + 2."""

    def __init__(self, depth: int, width: int, shortcut: str, channels: int, classes: int) -> None:
        super().__init__()
        n = (depth - 2) // 6
        if shortcut == "identity":
            self.stem = nn.Sequential(nn.PixelUnshuffle(2), convolution(4 * channels, width))
            blocks = [Block(width, width) for _ in range(3 * n)]
            last = width
        else:
            self.stem = convolution(channels, width)
            stages = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
            blocks = [Block(a if i == 0 else b, b, s if i == 0 else 1) for a, b, s in stages for i in range(n)]
            last = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.BatchNorm2d(last), nn.Linear(last, classes)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    p = parser(__doc__, epochs=15, batch=64)
    p.add_argument("--depth", type=int, choices=[32, 56, 110], default=32)
    p.add_argument("--width", type=int, default=16, help="channels of the first stage (default: 16)")
    p.add_argument("--shortcut", choices=["identity", "strided"], default="identity")
    p.add_argument("--data", choices=["digits", "cifar10", "cifar100"], default="digits")
    p.add_argument("--folder", help="folder with the unpacked CIFAR; by default, torchvision downloads it")
    return p.parse_args(words)


def task(args: argparse.Namespace) -> Task:
    x, test_x, labels, test_labels = images(args.data, args.folder)
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, test_x = (x - mean) / deviation, (test_x - mean) / deviation
    plain = shuffled(x, labels, args.batch, args.seed)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, target = plain(step)
        return (x, target) if args.data == "digits" else (flipped_and_shifted(x, generator(args.seed, -step)), target)

    torch.manual_seed(args.seed)
    model = ResNet(args.depth, args.width, args.shortcut, x.shape[1], int(labels.max()) + 1)
    return Task(model, batch, F.cross_entropy, accuracy(test_x, test_labels), max(1, len(x) // args.batch))


if __name__ == "__main__":
    args = arguments()
    main(task(args), args)
