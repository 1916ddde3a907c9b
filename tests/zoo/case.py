"""The description of every model in the zoo."""

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
    """A chain that the compiler has to find.

    length        links
    multiplier    K in words: "1", "mask", "gate", "scale", "weight/sigma"
    """

    length: int
    multiplier: str


@dataclass(frozen=True)
class Case:
    """A model as people write it, and what is known about it.

    build       () -> (model, args, loss), always the same numbers, float64
    program     the model written for the oracle, on the model's own parameters; None if there is no oracle
    chains      the chains that have to be found, in any order. Empty: none, so every gradient stays exact. None: the
                contract leaves it open, so only exactness at full length is known
    elementwise links without a block (J = 0): exact for every k if damping is 0
    random      draws random numbers (dropout): equal only from the same seed. The program draws in the same order
    tolerance   relative error allowed in a gradient, and ``noise`` the error allowed in any gradient relative to the
                largest of them. Larger only if a model computes in float32 inside.
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
    """Make a ``build`` that sets the seed, makes the float64 model, and draws one normal input per shape."""

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
