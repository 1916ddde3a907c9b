"""A GRU reads images pixel by pixel. Every process has a stretch of pixels, and all stretches are differentiated at
once.

    torchrun --nproc-per-node 2 examples/time_parallel.py
    torchrun --nproc-per-node 4 examples/time_parallel.py --iterations 0
    torchrun --nproc-per-node 4 examples/time_parallel.py --iterations 3      # ranks - 1: ordinary backprop

Digits (scikit-learn's) are 64 steps. The loss is only on the last state, and counted on the last rank.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import pixels
from torch import nn

from hwbp_compiler.distributed import recurrent


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--iterations", type=int, default=1, help="k; ranks - 1 and more are ordinary backprop")
    p.add_argument("--damping", type=float, default=0.0)
    p.add_argument("--cell", choices=["GRU", "LSTM"], default="GRU")
    p.add_argument("--hidden", type=int, default=32)
    p.add_argument("--layers", type=int, default=1)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--every", type=int, default=10, help="print progress every N steps")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,), mesh_dim_names=("time",))
    x, _, labels, _ = pixels("digits", None)
    torch.manual_seed(args.seed)
    rnn = getattr(nn, args.cell)(x.shape[2], args.hidden, args.layers, batch_first=True)
    head = nn.Linear(args.hidden, 10)
    weights = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(weights, args.lr)
    drawn = torch.Generator().manual_seed(args.seed)
    began = time.perf_counter()
    for step in range(1, args.steps + 1):
        rows = torch.randint(len(x), (args.batch,), generator=drawn)
        optimizer.zero_grad()
        shard = x[rows].chunk(ranks, 1)[rank]
        _, last = recurrent(rnn, shard, mesh=mesh, iterations=args.iterations, damping=args.damping)
        logits = head((last[0] if args.cell == "LSTM" else last)[-1])
        loss = F.cross_entropy(logits, labels[rows])
        (loss * float(rank == ranks - 1)).backward()  # on every rank: all take part in the backward pass
        for weight in weights:
            dist.all_reduce(weight.grad)  # each rank has the gradient of its own stretch
        optimizer.step()
        if rank == 0 and (step % args.every == 0 or step == 1):
            right = (logits.argmax(-1) == labels[rows]).float().mean()
            print(f"step {step}: loss {loss:.4f}, right {right:.2f}, {time.perf_counter() - began:.1f} s", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(arguments())
