"""What the examples share: the command line, the training loop, checkpoints, the CSV log and the plot.

    python examples/training.py out/exact out/highway --to both.png     # the logs of several runs in one plot

An example describes a :class:`Task` and calls :func:`main`. Exact backprop, Highway-BP at any k and damping,
fixed-point iteration, and the compiler's default options (``auto``) differ only in :func:`compile_options`: the same
seed gives the same weights and batches.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


@dataclass
class Task:
    """What to train: a model, its batches, a loss, and a measure of quality on held-out data."""

    model: nn.Module
    batch: Callable[[int], tuple[Tensor, Tensor]]
    """Step (from 1) -> input and target. The same step gives the same batch, so that a run can be resumed."""
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], dict[str, float]]
    """Called in eval mode without gradients."""
    epoch: int
    """Steps in one pass over the data."""


def positive(word: str) -> int:
    """The type of options that count something."""
    if (number := int(word)) < 1:
        raise argparse.ArgumentTypeError(f"{number}, but at least 1 is needed")
    return number


def parser(description: str | None, damping: float = 0.0, **defaults: Any) -> argparse.ArgumentParser:
    """The options of all examples. ``defaults`` overrides some of their defaults."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--method", choices=["exact", "highway", "fpi", "auto"], default="highway")
    p.add_argument(
        "--check-every", type=positive, default=50, metavar="N", help="for auto: steps from one check to the next"
    )
    p.add_argument("--iterations", type=int, default=3, metavar="K", help="for highway and fpi (default: %(default)s)")
    p.add_argument("--damping", type=float, default=damping, metavar="G", help="gamma, for highway; fpi is gamma = 1")
    p.add_argument(
        "--rewrite", choices=["always", "profitable"], default="always", help="profitable: only if it is faster"
    )
    p.add_argument("--seed", type=int, default=0)
    length = p.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=10)
    length.add_argument("--steps", type=positive, help="instead of --epochs")
    p.add_argument("--batch", type=positive, default=128)
    p.add_argument("--lr", type=float, default=1e-3, help="peak of a cosine schedule with warm-up (%(default)s)")
    p.add_argument("--every", type=positive, metavar="N", help="evaluate, log, save every N steps (default: 20 times)")
    p.add_argument("--watch", type=int, default=0, metavar="N", help="log the cosine with the exact gradient")
    p.add_argument("--out", type=Path, help="folder of log.csv, log.png, checkpoint.pt (default: out/...)")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out, if there is one")
    p.add_argument("--stop", type=positive, metavar="N", help="stop after step N, to be resumed later")
    p.add_argument("--explain", action="store_true", help="print what the compiler finds, and stop")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.set_defaults(**defaults)
    return p


def compile_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of torch.compile for exact backprop, Highway-BP or fixed-point iteration (which damps the highway
    away).
    """
    if args.method == "exact":
        return {"iterations": "exact"}
    if args.method == "auto":  # the compiler's own defaults, but that a short training is checked more often
        return {"check_every": args.check_every}
    damping = 1.0 if args.method == "fpi" else args.damping
    return {"iterations": args.iterations, "damping": damping, "rewrite": args.rewrite}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The paper's schedule: a linear warm-up over the first tenth, then a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 10)
    if step <= warm_up:
        return peak * step / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def train(task: Task, args: argparse.Namespace, compiled: Callable[[Tensor], Tensor] | None = None) -> list[dict]:
    """Train, log and save. Returns the rows of the log. ``compiled`` is task.model as the caller compiled it."""
    model, steps = task.model.to(args.device), args.steps or max(1, round(args.epochs * task.epoch))
    every = args.every or max(1, steps // 20)
    if compiled is None:
        compiled = torch.compile(model, backend="highway", options=compile_options(args))
    watch = Watch(task) if args.watch else None
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    out = folder(args)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)  # for dropout masks and the like
    done, rows, losses = load(out, model, optimizer, args) if args.resume else (0, [], [])
    last = min(args.stop or steps, steps)
    times: list[float] = []
    model.train()
    with tqdm(total=steps, initial=done, desc=name(args), unit="step", disable=None) as bar:
        for step in range(done + 1, last + 1):
            x, target = (tensor.to(args.device) for tensor in task.batch(step))
            row: dict[str, Any] = {"step": step, "loss": None, "cosine": None}
            if watch and (step == 1 or step % args.watch == 0):
                row["cosine"] = watch.cosine(compiled, x, target)

            start = time.perf_counter()
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, args.lr)
            optimizer.zero_grad()
            loss = task.loss(compiled(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)

            due = step % every == 0 or step == steps
            if due or row["cosine"] is not None:
                row["loss"], losses = torch.stack(losses).mean().item(), []
                if due:
                    row |= evaluate(task)
                rows.append(row)
                bar.set_postfix({key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)})
            if due or step == last:
                save(out, model, optimizer, args, step, rows, losses)
            bar.update()
    if times:
        say = f"{statistics.median(times) * 1e3:.1f} ms a step, the first {times[0]:.1f} s"
        last_row = ", ".join(f"{key} {value:.4g}" for key, value in (rows or [{}])[-1].items() if value is not None)
        tqdm.write(f"{name(args)}: {last_row}; {say}", file=sys.stderr)
    return rows


def name(args: argparse.Namespace) -> str:
    return args.method if args.method in ("exact", "auto") else f"{args.method}-k{args.iterations}"


def folder(args: argparse.Namespace) -> Path:
    return args.out or Path("out") / f"{Path(sys.argv[0]).stem}-{name(args)}-seed{args.seed}"


def evaluate(task: Task) -> dict[str, float]:
    task.model.eval()
    with torch.no_grad():
        found = task.evaluate(task.model)
    task.model.train()
    return found


def accuracy(x: Tensor, labels: Tensor) -> Callable[[nn.Module], dict[str, float]]:
    """For ``Task.evaluate``: the share of correct answers."""

    def of(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        answers = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(500)])
        return {"accuracy": (answers == labels).float().mean().item()}

    return of


def main(task: Task, args: argparse.Namespace) -> None:
    """Train, or with --explain print what the compiler finds in the model."""
    if not args.explain:
        train(task, args)
        plot([folder(args)], folder(args) / "log.png")
        print(f"written to {folder(args)}: log.csv, log.png, checkpoint.pt")
        return
    import hwbp_compiler

    task.model.to(args.device)
    print(hwbp_compiler.explain(task.model, task.batch(1)[0].to(args.device), options=compile_options(args)))


# -- the cosine with the exact gradient -----------------------------------------------------------------------------


class Watch:
    """Compares gradients at the current weights. The run itself is the same with and without it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        # Compiled too, because eager code would draw other dropout masks.
        self.exact = torch.compile(task.model, backend="highway", options={"iterations": "exact"})

    def cosine(self, compiled: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> float:
        ours, exact = (gradient(self.task, function, x, target) for function in (compiled, self.exact))
        return F.cosine_similarity(ours, exact, dim=0).item()


def gradient(task: Task, function: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    """The gradient of the loss with respect to all parameters, as one double-precision vector. ``function``: the task's
    model.
    """
    with unchanged(task.model):
        loss = task.loss(function(x), target)
        found = torch.autograd.grad(loss, list(task.model.parameters()), allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten().double() for g in found])


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore random number generators and buffers (BatchNorm's statistics) at the end."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng():
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


# -- checkpoint, log and plot ---------------------------------------------------------------------------------------

# Options that may differ between a run and its continuation.
FREE = {"resume", "stop", "out", "device", "explain"}


def save(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace, step: int,
         rows: list[dict], losses: list[Tensor]) -> None:  # fmt: skip
    """Write the checkpoint in one atomic move: an interruption leaves either the old one or the new one."""
    state = {
        "step": step,
        "rows": rows,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": losses,
        "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])],
        "args": {key: value for key, value in vars(args).items() if key not in FREE},
    }
    torch.save(state, out / "checkpoint.tmp")
    os.replace(out / "checkpoint.tmp", out / "checkpoint.pt")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (out / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or ["step"])
        writer.writeheader()
        writer.writerows(rows)


def load(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, args: argparse.Namespace
) -> tuple[int, list[dict], list[Tensor]]:
    """Restore what :func:`save` wrote. Returns the step, the log, and the losses not logged yet."""
    if not (out / "checkpoint.pt").exists():
        return 0, [], []
    state = torch.load(out / "checkpoint.pt", map_location="cpu", weights_only=True)
    now = {key: value for key, value in vars(args).items() if key not in FREE}
    other = {key: value for key, value in state["args"].items() if now.get(key) != value}
    if other:
        was = ", ".join(f"--{key} {value} (now {now.get(key)})" for key, value in other.items())
        raise SystemExit(f"{out / 'checkpoint.pt'} was written with {was}: give the same options, or another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"][0])
    if torch.cuda.is_available() and len(state["random"]) > 1:
        torch.cuda.set_rng_state_all(state["random"][1:])
    return state["step"], state["rows"], [loss.to(args.device) for loss in state["losses"]]


def read_log(run: Path) -> list[dict[str, float]]:
    if not (run / "log.csv").exists():
        raise SystemExit(f"{run}: no log.csv there; give folders that were --out of a run")
    with (run / "log.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def plot(runs: list[Path], to: Path) -> None:
    """The columns of one or several logs against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {run.name: read_log(run) for run in runs}
    columns = list(dict.fromkeys(key for log in logs.values() for row in log for key in row if key != "step"))
    if not columns:
        return
    figure, axes = pyplot.subplots(1, len(columns), figsize=(4 * len(columns), 3), squeeze=False, layout="constrained")
    for column, axis in zip(columns, axes[0], strict=True):
        for label, log in logs.items():
            points = [(row["step"], row[column]) for row in log if column in row]
            axis.plot(*zip(*points, strict=True), marker=".", label=label) if points else None
        axis.set(xlabel="step", title=column)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(to, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the --out folder of a run")
    p.add_argument("--to", type=Path, default=Path("runs.png"))
    arguments = p.parse_args()
    plot(arguments.runs, arguments.to)
