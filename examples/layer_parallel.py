"""A deep pre-LN Transformer whose layers are spread over processes, and whose backward passes run at once.

    torchrun --nproc-per-node 2 examples/layer_parallel.py
    torchrun --nproc-per-node 4 examples/layer_parallel.py --iterations 1 --blocks 16
    torchrun --nproc-per-node 4 examples/layer_parallel.py --schedule gpipe      # ordinary backprop, to compare with
    torchrun --nproc-per-node 4 --max-restarts 3 examples/layer_parallel.py --checkpoints FOLDER

The last line starts again from the last checkpoint if a process dies. Checkpoints hold the names of the whole model, so
any number of processes can go on from them.

Digits (scikit-learn's) are read as 16 patches of 4 pixels. Every rank builds its own blocks from the same seed. The
first rank embeds the patches; the last one has the head and the loss.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from data import digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from hwbp_compiler.distributed import ScheduleHighway


class Embed(nn.Module):
    """[B, 16, 4] -> [B, 16, width]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch, self.place = nn.Linear(4, width), nn.Parameter(torch.zeros(16, width))

    def forward(self, x):
        return self.patch(x) + self.place


class Head(nn.Module):
    """[B, 16, width] -> [B, 10]"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.classes = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        return self.classes(self.norm(x).mean(1))


def stage_of(rank: int, ranks: int, blocks: int, width: int, seed: int) -> nn.Sequential:
    """Blocks are divided as evenly as possible. Each has its own seed and name, whatever the number of ranks."""
    mine = range(rank * blocks // ranks, (rank + 1) * blocks // ranks)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    torch.manual_seed(seed - 1)
    embed, head = Embed(width), Head(width)
    if rank == 0:
        layers["embed"] = embed
    for number in mine:
        torch.manual_seed(seed + number)
        layers[f"block{number}"] = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, batch_first=True, norm_first=True
        )
    if rank == ranks - 1:
        layers["head"] = head
    return nn.Sequential(layers)


class Checkpoints:
    """What training needs to go on, in ``folder/<step>``. None as the folder: nothing is saved."""

    def __init__(self, folder: Path | None, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.folder, self.module, self.optimizer = folder, module, optimizer
        self.options = StateDictOptions(flatten_optimizer_state_dict=True)  # so that ranks may hold different layers

    def _state(self, step: int) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.module, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer, "step": step}

    def save(self, step: int) -> None:
        if self.folder is not None:
            dcp.save(self._state(step), checkpoint_id=self.folder / str(step))

    def load(self) -> int:
        """Load the last complete checkpoint. Returns its step, or 0 if there is none."""
        complete = [] if self.folder is None else [p.parent for p in self.folder.glob("*/.metadata")]
        if not complete:
            return 0
        state = self._state(0)
        dcp.load(state, checkpoint_id=max(complete, key=lambda path: int(path.name)))
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )
        return int(state["step"])


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--schedule", choices=["highway", "gpipe"], default="highway")
    p.add_argument("--iterations", type=int, default=1, help="k; ranks - 2 and more are ordinary backprop")
    p.add_argument("--damping", type=float, default=0.0)
    p.add_argument("--microbatches", type=int, default=1)
    p.add_argument("--blocks", type=int, default=8)
    p.add_argument("--width", type=int, default=32)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--steps", type=int, default=100)
    p.add_argument("--every", type=int, default=10, help="print progress, and save a checkpoint, every N steps")
    p.add_argument("--checkpoints", type=Path, help="folder to save to, and to go on from")
    p.add_argument("--seed", type=int, default=0)
    return p.parse_args()


def main(args: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = stage_of(rank, ranks, args.blocks, args.width, args.seed)
    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    if args.schedule == "highway":
        schedule = ScheduleHighway(
            stage, args.microbatches, loss_fn=F.cross_entropy, iterations=args.iterations, damping=args.damping
        )
    else:
        schedule = ScheduleGPipe(stage, args.microbatches, loss_fn=F.cross_entropy)
    optimizer = torch.optim.Adam(module.parameters(), args.lr)
    x, _, labels, _ = digits()
    x = x.reshape(-1, 16, 4)
    checkpoints = Checkpoints(args.checkpoints, module, optimizer)
    first = checkpoints.load() + 1
    began = time.perf_counter()
    for step in range(first, args.steps + 1):
        drawn = torch.Generator().manual_seed(args.seed + step)  # the same batch if the step is taken again
        rows = torch.randint(len(x), (args.batch,), generator=drawn)
        optimizer.zero_grad()
        losses: list[torch.Tensor] = []
        given = [x[rows]] if rank == 0 else []
        output = schedule.step(*given, target=labels[rows] if rank == ranks - 1 else None, losses=losses)
        optimizer.step()
        if step % args.every == 0:
            checkpoints.save(step)
        if rank == ranks - 1 and (step % args.every == 0 or step == 1):
            right = (output.argmax(-1) == labels[rows]).float().mean()
            mean = torch.stack(losses).mean()
            print(f"step {step}: loss {mean:.4f}, right {right:.2f}, {time.perf_counter() - began:.1f} s", flush=True)
        if rank == 0 and step == first and isinstance(schedule, ScheduleHighway):
            print(schedule.explain(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(arguments())
