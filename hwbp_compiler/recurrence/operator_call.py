"""A call of ``highway::recurrent_module``, as its kernels receive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class OperatorCall(NamedTuple):
    """The operator's arguments, except ``record``, in the order of the schema."""

    kind: str
    input: Tensor
    batch_sizes: Tensor | None
    state: Sequence[Tensor]
    weights: Sequence[Tensor]
    has_biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    autocast: torch.dtype | None

    @property
    def random(self) -> bool:
        """Whether random numbers are drawn: there is dropout between layers."""
        return self.train and self.dropout > 0 and self.layers > 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the outputs, as in eager mode. On a CPU, a GRU interpolates the state in its own type."""
        if self.autocast is None:
            return self.input.dtype
        if self.kind == "gru" and self.input.device.type == "cpu":
            return torch.promote_types(self.state[0].dtype, self.autocast)
        return self.autocast

    def run(self) -> tuple[Tensor, ...]:
        """PyTorch's own kernel: the outputs, then the last states."""
        hx = tuple(self.state) if self.kind == "lstm" else self.state[0]
        rest = (list(self.weights), self.has_biases, self.layers, self.dropout, self.train, self.bidirectional)
        function = getattr(torch, self.kind)
        device = self.input.device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None, cache_enabled=False):
            if self.batch_sizes is None:
                return function(self.input, hx, *rest, False)
            return function(self.input, self.batch_sizes, hx, *rest)
