"""Several passes over a joint graph as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .torch_private import CustomGraphPass


@dataclass(frozen=True)
class PassSequence(CustomGraphPass):
    """Runs several joint passes in order as one: torch 2.11 accepts only a single one."""

    passes: tuple[Callable[[torch.fx.Graph], Any], ...]

    def __call__(self, graph: torch.fx.Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """None, which keeps the graph out of the caches, unless every pass has a uuid."""
        uuids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes)
        return uuids if all(uuids) else None


def in_sequence(*parts: Callable[[torch.fx.Graph], Any]) -> Callable[[torch.fx.Graph], Any]:
    return parts[0] if len(parts) == 1 else PassSequence(parts)
