"""A case is data: a model, and the residual paths that a person counts in its source."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """One model.

    name      unique
    family    the group under which the page lists it
    make      returns the model and its positional arguments, tiny
    chains    the number of links of each residual path, counted in the model's source; () if there is none
    why       why there is none, or how they were counted if that is not obvious
    package   the package that has to be installed; its version is part of the result
    settings  what ``make`` uses beyond its own code
    single    why the model runs in float32: its code does not accept float64; "" if it does
    """

    name: str
    family: str
    make: Callable[[], Made]
    chains: tuple[int, ...]
    why: str = ""
    package: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    single: str = ""

    def __post_init__(self) -> None:
        if not self.chains and not self.why:
            raise ValueError(f"{self.name}: no link is expected, so say why")

    @property
    def digest(self) -> str:
        """A hash that changes if the model or the expected chains change."""
        written = [self.name, list(self.chains), json.dumps(self.settings, sort_keys=True, default=str), self.single]
        return hashlib.sha256(json.dumps([*written, _source(self.make)]).encode()).hexdigest()[:12]


def _source(make: Callable[..., Any]) -> str:
    """The source of a class or function, and of the classes in the same file that it names."""
    seen: dict[str, str] = {}
    waiting = [getattr(make, "made_by", make)]
    while waiting:
        one = waiting.pop()
        name = getattr(one, "__qualname__", "")
        if name in seen:
            continue
        try:
            seen[name] = inspect.getsource(one)
        except (OSError, TypeError):
            continue
        here = inspect.getmodule(one)
        words = set(seen[name].replace("(", " ").replace(")", " ").replace(",", " ").replace(":", " ").split())
        for word in sorted(words & set(vars(here))):
            if inspect.isclass(vars(here)[word]) and vars(here)[word].__module__ == here.__name__:
                waiting.append(vars(here)[word])
    return "\n".join(seen[name] for name in sorted(seen))


class Calls(nn.Module):
    """``model`` called with named arguments; returns one or several fields of its result."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: Any = 0, **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.output, self.fixed = model, names, output, fixed

    def forward(self, *args: Any) -> Any:
        found = self.model(**dict(zip(self.names, args, strict=True)), **self.fixed)
        if isinstance(found, Tensor):
            return found
        if isinstance(self.output, tuple):
            return tuple(found[name] for name in self.output)
        return found[self.output]


def prepared(case: Case, seed: int = 0) -> Made:
    """The model in float64, if its code allows that, and in eval mode, where nothing is random. Biases and norms get
    values other than zero and one.
    """
    torch.manual_seed(seed)
    model, args = case.make()
    dtype = torch.float32 if case.single else torch.float64
    model = (model.float() if case.single else model.double()).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return model, tuple(wide(arg) for arg in args)
