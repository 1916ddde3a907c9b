"""What every model of the zoo is described by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwbp_compiler.testing.losses import probe_loss
from hwbp_compiler.testing.reference import Link, Program

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class ExpectedChain:
    """A chain the compiler has to find.

    length        links
    multiplier    K in words: "1", "mask", "gate", "scale", "weight/sigma"
    """

    length: int
    multiplier: str


@dataclass(frozen=True)
class Case:
    """A model as people write it, and what is known about it.

    build       () -> (model, args, loss), always the same numbers, float64
    program     the model retold for the oracle, on the model's own parameters; None where there is no oracle
    chains      what has to be found, in any order; empty: nothing, so every gradient stays exact; None: the
                contract leaves it open, so only exactness at full length is known
    elementwise links with no block at all (J = 0): exact for every k when damping is 0
    random      draws random numbers (dropout): the same only from the same seed; the program draws in the same order
    tolerance   relative error allowed in a gradient, and ``noise`` the error allowed in any gradient relative to the
                largest of them. Larger only where a model computes in float32 inside.
    """

    name: str
    build: Callable[[], tuple[nn.Module, tuple[Any, ...], Loss]]
    program: Callable[[nn.Module], Program] | None
    chains: tuple[ExpectedChain, ...] | None = ()
    elementwise: bool = False
    random: bool = False
    tolerance: float = 1e-6
    noise: float = 1e-12
    forward_tolerance: float = 1e-12

    def __str__(self) -> str:
        return self.name


def setup(make: Callable[[], nn.Module], *inputs: tuple[int, ...], grad: bool = True, seed: int = 0) -> Any:
    """A ``build``: seeds, makes the float64 model, draws one normal input per shape."""

    def build() -> tuple[nn.Module, tuple[Tensor, ...], Loss]:
        torch.manual_seed(seed)
        model = make().double()
        args = tuple(torch.randn(shape, dtype=torch.float64).requires_grad_(grad) for shape in inputs)
        return model, args, probe_loss

    return build


def program_of(model: nn.Module, forward: Callable[..., Any]) -> Program:
    return Program(dict(model.named_parameters()), forward)


def residual(block: Callable[..., Tensor], *side: Tensor) -> Link:
    """``x + block(x, *side)``: K = 1."""

    def step(state, side, hold):
        (x,) = state
        return (x + hold(block(x, *side)),), ()

    return Link(step, side)
