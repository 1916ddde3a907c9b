"""Handwritten digits with exact backprop and Highway-BP side by side: a deep residual network, and a GRU over pixels.

    python examples/quickstart.py                # both: exact, and the defaults, which choose k and S by themselves
    python examples/quickstart.py --only deep --iterations 0 2 --epochs 10

The digits (1,797 images of 8 x 8 pixels) are included in scikit-learn. The GRU reads them enlarged to 16 x 16, one
pixel after the other. Every run starts from the same seed and sees the same batches; only the gradient differs. Each
run prints what the compiler found, the test accuracy, the smallest cosine between its gradient and the exact one during
training, the form in use at the end, and the median time of a training step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from tqdm import tqdm

import hwbp_compiler


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def deep(blocks: int = 24, width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, width), *(Block(width) for _ in range(blocks)), nn.LayerNorm(width), nn.Linear(width, 10)
    )


class Pixels(nn.Module):
    """Reads an image one pixel after the other, with a loss only after the last pixel."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.gru, self.classify = nn.GRU(1, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x):
        states, _ = self.gru(x.unsqueeze(-1))
        return self.classify(states[:, -1])


def digits() -> tuple[torch.Tensor, ...]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    return tuple(torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts)


def enlarged(x: torch.Tensor, side: int) -> torch.Tensor:
    """[N, 64] -> [N, side * side]."""
    return F.interpolate(x.view(-1, 1, 8, 8), (side, side), mode="bilinear").flatten(1)


def train(name: str, build: Callable[[], nn.Module], how: dict[str, Any] | None, epochs: int, args, data) -> dict:
    """One run from the seed. ``how``: the arguments of torch.compile, or None for eager mode."""
    train_x, test_x, train_y, test_y = data
    torch._dynamo.reset()
    torch.manual_seed(args.seed)
    model = build()
    function = model if how is None else torch.compile(model, **how)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    meter = None if how is None else hwbp_compiler.GradientMeter(function, every=args.every, warn_below=None)
    order = torch.Generator().manual_seed(args.seed)
    steps = len(train_x) // args.batch
    times = []
    with tqdm(total=epochs * steps, desc=f"{name:>16}", unit="step", leave=False, disable=None) as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(train_x), generator=order)[: steps * args.batch].view(steps, -1):
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(function(train_x[rows]), train_y[rows])
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                times.append(time.perf_counter() - start)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    used = [reading for reading in meter.readings if reading.trains] if meter is not None else []
    return {
        "accuracy": accuracy,
        "cosine": min((reading.cosine for reading in used), default=1.0),
        "form": f"k = {used[-1].iterations}, S = {used[-1].segment}" if used else "exact",
        "step": statistics.median(times),
        "compiling": sum(sorted(times)[-3:]),  # each form compiles in its first step
    }


def compare(title: str, build: Callable[[], nn.Module], runs: dict[str, Any], epochs: int, args, data) -> None:
    """Train every run of ``runs`` (name -> how to compile). The others are compared with the first."""
    torch.manual_seed(args.seed)
    shown = runs["defaults"]["options"]
    print(f"{title}; {len(data[0])} training images\n", flush=True)
    print(hwbp_compiler.explain(build(), data[0][: args.batch], options=shown), "\n", flush=True)
    first = next(iter(runs))
    print(f"{'':>16} {'accuracy':>9} {'least cosine':>13} {'form':>14} {'step':>9} {'compile':>9}  against {first}")
    base = None
    for name, how in runs.items():
        r = train(name, build, how, epochs, args, data)
        base = base or r["step"]
        print(
            f"{name:>16} {r['accuracy']:>9.1%} {r['cosine']:>13.4f} {r['form']:>14} {r['step'] * 1e3:>6.2f} ms "
            f"{r['compiling']:>7.1f} s  {base / r['step']:.2f}x",
            flush=True,
        )
    print()


def highway(iterations: int | str, rewrite: str = "always") -> dict[str, Any]:
    return {"backend": "highway", "options": {"iterations": iterations, "rewrite": rewrite}}


def by_default(args) -> dict[str, Any]:
    """The default options, but with more frequent checks, because the training is so short."""
    return {"backend": "highway", "options": {"check_every": args.every}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["deep", "pixels"], help="run only one of the two")
    parser.add_argument(
        "--iterations", type=int, nargs="*", default=[], metavar="K", help="also run the deep network at these k"
    )
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--side", type=int, default=16, help="side of the images that the GRU reads")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="check every N steps")
    parser.add_argument("--pixel-batch", type=int, default=8)
    parser.add_argument("--pixel-epochs", type=int, default=3)
    parser.add_argument("--pixel-learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = digits()
    if args.only != "pixels":
        runs = {"exact": highway("exact")} | {f"k = {k}": highway(k) for k in args.iterations}
        runs["defaults"] = by_default(args)
        title = f"{args.blocks} residual blocks of width {args.width}"
        compare(title, lambda: deep(args.blocks, args.width), runs, args.epochs, args, data)
    if args.only != "deep":
        runs = {"exact, eager": None, "exact": highway("exact"), "defaults": by_default(args)}
        # With small batches, a recurrence spends more time waiting for its steps than computing.
        args.batch, args.learning_rate = args.pixel_batch, args.pixel_learning_rate
        data = (*(enlarged(x, args.side) for x in data[:2]), *data[2:])
        compare(f"A GRU over {args.side**2} pixels, one at a time", Pixels, runs, args.pixel_epochs, args, data)
    print("least cosine: the smallest cosine, over all checks, between the gradient used and the exact one.")


if __name__ == "__main__":
    main()
