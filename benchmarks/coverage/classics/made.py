"""Build a case from a class and the shapes of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..case import Case, Made

W = 8


def _make(model: Callable[[], nn.Module], shapes: tuple[Any, ...]) -> Made:
    """Random inputs require a gradient, so that a state among the inputs is like any other state."""
    made = model()
    drawn = (torch.randn(shape, requires_grad=True) if isinstance(shape, tuple) else shape() for shape in shapes)
    return made, tuple(drawn)


def by_hand(family: str) -> Callable[..., Case]:
    """``case(name, chains, model, *shapes)``; ``why`` where no link is expected, or how they were counted."""

    def case(
        name: str, chains: tuple[int, ...], model: Callable[[], nn.Module], *shapes: Any, why: str = "", **more: Any
    ) -> Case:
        make = partial(_make, model, shapes)
        make.made_by = getattr(model, "func", model)  # type: ignore[attr-defined]
        settings = {"arguments": str((getattr(model, "args", ()), getattr(model, "keywords", {}))), "shapes": shapes}
        return Case(name, f"by hand, {family}", make, chains, why, settings=settings, **more)

    return case
