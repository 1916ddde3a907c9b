"""Train a 24-block residual network on handwritten digits with exact backprop and with Highway-BP, side by side.

    python examples/quickstart.py                # exact, and k = 0, 1, 3
    python examples/quickstart.py --iterations 0 2 --epochs 10

The digits (1,797 images of 8 x 8 pixels) ship with scikit-learn. Every run starts from the same seed and sees the
same batches; only the gradient differs. Shown for each: what the compiler found, test accuracy, the cosine between
its gradient and the exact one (before and after training), and the median time of a training step.
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
from tqdm import tqdm

import hwbp_compiler


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def make_model(blocks: int, width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, width), *(Block(width) for _ in range(blocks)), nn.LayerNorm(width), nn.Linear(width, 10)
    )


def digits() -> tuple[torch.Tensor, ...]:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16.0, labels, test_size=0.25, random_state=0, stratify=labels)
    return tuple(torch.tensor(p, dtype=torch.float32 if p.ndim == 2 else torch.int64) for p in parts)


def gradient(function, model: nn.Module, x, y) -> torch.Tensor:
    """The gradient of all parameters as one vector; the model's own ``grad`` is left empty."""
    model.zero_grad()
    F.cross_entropy(function(x), y).backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def cosine(compiled, model: nn.Module, x, y) -> float:
    return F.cosine_similarity(gradient(compiled, model, x, y), gradient(model, model, x, y), dim=0).item()


def train(name: str, options: dict, args: argparse.Namespace, data) -> dict:
    train_x, test_x, train_y, test_y = data
    torch._dynamo.reset()
    model = make_model(args.blocks, args.width, args.seed)
    compiled = torch.compile(model, backend="highway", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    probe = train_x[: args.batch], train_y[: args.batch]
    before = cosine(compiled, model, *probe)  # compiles
    order = torch.Generator().manual_seed(args.seed)
    steps = len(train_x) // args.batch
    times = []
    with tqdm(total=args.epochs * steps, desc=f"{name:>8}", unit="step", leave=False, disable=None) as bar:
        for _ in range(args.epochs):
            for rows in torch.randperm(len(train_x), generator=order)[: steps * args.batch].view(steps, -1):
                start = time.perf_counter()
                optimizer.zero_grad()
                loss = F.cross_entropy(compiled(train_x[rows]), train_y[rows])
                loss.backward()
                optimizer.step()
                times.append(time.perf_counter() - start)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    after = cosine(compiled, model, *probe)
    with torch.no_grad():
        accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    return {"run": name, "accuracy": accuracy, "before": before, "after": after, "step": statistics.median(times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 1, 3], metavar="K")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = digits()

    print(f"{args.blocks} residual blocks of width {args.width}; {len(data[0])} images to learn from\n")
    report = hwbp_compiler.explain(
        make_model(args.blocks, args.width, args.seed),
        data[0][: args.batch],
        options={"iterations": max([1, *args.iterations]), "rewrite": "always"},
    )
    print(report, "\n")

    runs = [("exact", {"iterations": "exact"})]
    runs += [(f"k = {k}", {"iterations": k, "rewrite": "always"}) for k in args.iterations]
    print(f"{'':>8} {'accuracy':>9} {'cosine before':>14} {'after':>8} {'step':>9} {'vs exact':>9}")
    exact = None
    for name, options in runs:
        r = train(name, options, args, data)
        exact = exact or r["step"]
        print(
            f"{r['run']:>8} {r['accuracy']:>9.1%} {r['before']:>14.4f} {r['after']:>8.4f} "
            f"{r['step'] * 1e3:>6.2f} ms {exact / r['step']:>8.2f}x",
            flush=True,
        )
    print("\ncosine: with the exact gradient of the same weights on the first batch.")


if __name__ == "__main__":
    main()
