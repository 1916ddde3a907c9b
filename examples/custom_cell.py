"""Read handwritten digits pixel by pixel with a recurrent cell of one's own, exactly and with Highway-BP.

    python examples/custom_cell.py
    python examples/custom_cell.py --iterations 0 2 4 --epochs 20

The cell is a GRU with a LayerNorm inside, for which no library has a fast kernel; ``hwbp_compiler.recurrent`` compiles
it and runs it over the 64 pixels of an image without unrolling. The digits (1,797 images of 8 x 8 pixels) ship with
scikit-learn. Every run starts from the same seed and sees the same batches. Shown for each: test accuracy, the cosine
of its gradient with the one of a Python loop after training, and the median time of a training step.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import hwbp_compiler


class LayerNormGRUCell(nn.Module):
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
    def __init__(self, hidden: int, options: dict | None) -> None:
        super().__init__()
        self.cell, self.head = LayerNormGRUCell(1, hidden), nn.Linear(hidden, 10)
        self.options = options  # None: a plain Python loop

    def forward(self, images):
        pixels = images.t().unsqueeze(-1)  # [64, batch, 1]
        h = pixels.new_zeros(pixels.shape[1], self.head.in_features)
        if self.options is not None:
            _, h = hwbp_compiler.recurrent(self.cell, pixels, h, options=self.options)
        else:
            for pixel in pixels:
                _, h = self.cell(pixel, h)
        return self.head(h)


def gradient(model: Reader, x, y) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())])


def train(options: dict | None, args: argparse.Namespace, data) -> tuple[float, float, float]:
    train_x, test_x, train_y, test_y = data
    torch.manual_seed(args.seed)
    model = Reader(args.hidden, options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(args.seed)
    times = []
    for _ in range(args.epochs):
        for rows in torch.randperm(len(train_x), generator=order).split(args.batch)[:-1]:
            start = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(train_x[rows]), train_y[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            times.append(time.perf_counter() - start)
    probe = train_x[: args.batch], train_y[: args.batch]
    found = gradient(model, *probe)
    model.options = None
    cosine = F.cosine_similarity(found, gradient(model, *probe), dim=0).item()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return accuracy, cosine, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 2], metavar="K")
    parser.add_argument("--hidden", type=int, default=48)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    data = [torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts]

    runs: dict[str, dict | None] = {"Python loop": None, "exact": {"iterations": "exact"}}
    runs |= {f"k = {k}": {"iterations": k, "rewrite": "always"} for k in args.iterations}
    print(f"{'':>12} {'accuracy':>9} {'cosine':>8} {'step':>9} {'vs loop':>8}")
    first = None
    for name, options in runs.items():
        accuracy, cosine, step = train(options, args, data)
        first = first or step
        print(f"{name:>12} {accuracy:>9.1%} {cosine:>8.4f} {step * 1e3:>6.2f} ms {first / step:>7.2f}x", flush=True)


if __name__ == "__main__":
    main()
