"""One link of a :class:`.specs.Stack` or :class:`.specs.Streams`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import USED_TWICE, Block, BlockKind, Learnt, Normal, activated, updated
from .reference import Hold, keep
from .specs import Stack


class Residual(nn.Module):
    """One link; ``forward(x, context) -> (next state, hidden activity)`` as a user would write it."""

    def __init__(self, stack: Stack, kind: BlockKind, batch: int, length: int, context: int) -> None:
        super().__init__()
        width = stack.width
        self.update, self.after, self.layout = stack.update, stack.after, stack.layout
        self.pre = Normal(stack.pre, width)
        self.block = Block(kind, width, length, context)
        self.learnt = Learnt(stack.update, width, batch, length)
        self.post = Normal(stack.after, width)
        self.vector = nn.Parameter(0.3 * torch.randn(width)) if stack.vectors else None
        if stack.after == "mask":
            self.register_buffer("mask", (torch.rand(batch, length, 1) < 0.7).double())

    def forward(
        self, x: Tensor, context: Tensor, first: Tensor | None = None, hold: Hold = keep
    ) -> tuple[Tensor, Tensor]:
        u = self.pre(x, hold if self.update in USED_TWICE else keep)
        z, hidden = self.block(u if first is None else u + first, context)
        if self.layout == "flat" and self.update != "kept" and self.after != "mask":
            shape = x.shape
            flat = (x.reshape(-1, shape[-1]), u.reshape(-1, shape[-1]), z.reshape(-1, shape[-1]))
            found = self.joined(*flat, hold).view(shape)
        else:
            found = self.joined(x, u, z, hold)
        if self.layout == "swap":
            found = found.transpose(1, 2).contiguous().transpose(1, 2)
        return found, hidden

    def joined(self, x: Tensor, u: Tensor, z: Tensor, hold: Hold) -> Tensor:
        x = activated(self.after, updated(self.update, x, u, z, self.learnt, hold))
        x = self.post(x, hold)
        if self.after == "mask":
            x = self.mask.to(x.dtype) * x
        return x if self.vector is None else x + self.vector
