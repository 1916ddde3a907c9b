"""The measurements of a checked step: gradients of several forms against the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

from hwbp_compiler.options import Truncation


@dataclass(frozen=True)
class Compared:
    """How near the gradient of one form is to the exact gradient, both taken as vectors over some parameters.

    Attributes:
        cosine: of the angle between the two gradients; nan if the exact one is zero, or if either is not finite.
        relative_error: norm of their difference, divided by the norm of the exact one; nan in the same cases.
    """

    cosine: float
    relative_error: float

    @classmethod
    def of(cls, dot: float, exact: float, other: float) -> Compared:
        """From <e, o>, |e|^2 and |o|^2."""
        if exact == 0 or other == 0:
            return cls(float("nan"), float("nan"))
        error = max(exact - 2 * dot + other, 0.0)
        cosine = dot / (exact**0.5 * other**0.5)
        # The three sums are rounded apart, so that equal gradients may come out a little above 1.
        return cls(max(-1.0, min(1.0, cosine)) if cosine == cosine else cosine, (error / exact) ** 0.5)


@dataclass
class Check:
    """The measurements of one checked step.

    forms       k, gamma and S of each form compared
    total       per form, over all parameters (or all inputs, if none is a parameter) whose gradient it approximates
    chains      per form, by chain: over the parameters whose gradient comes from that chain
    parameters  per form, by name (or by position, "input 3", if the name is unknown)
    changes     per form, what its last iterations changed: the norm of the difference to the previous form with the
                same S and gamma, relative to the exact norm; nan if there is none
    saves       per form, seconds per step that the cost model expects it to save
    upstream    per form, over the gradients that go on to earlier graphs
    last_changes  per form, |w^k - w^{k-1}| / |w^k| over all chains; nan if it was not measured, as for k = 0
    used        the form that trains; None for exact backprop
    """

    forms: Sequence[Truncation]
    total: list[Compared] = field(default_factory=list)
    chains: list[dict[str, Compared]] = field(default_factory=list)
    parameters: list[dict[str, Compared]] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    saves: list[float] = field(default_factory=list)
    upstream: list[Compared] = field(default_factory=list)
    last_changes: list[float] = field(default_factory=list)
    used: Truncation | None = None

    @property
    def worst(self) -> list[float]:
        """For each form the lower of two cosines: over its parameters, and over the gradients that go upstream."""
        return [
            a.cosine if b.cosine != b.cosine else least(a.cosine, b.cosine)
            for a, b in zip(self.total, self.upstream, strict=True)
        ]


def relative(change: float, size: float) -> float:
    """|w^k - w^{k-1}| / |w^k| from the two squares; nan if either is not finite, or w is zero."""
    return float((change / size) ** 0.5) if size and isfinite(change) and isfinite(size) else float("nan")


def least(a: float, b: float) -> float:
    """The lower of two cosines; nan if either is nan: something was not finite, or nothing was measured."""
    return min(a, b) if a == a and b == b else float("nan")


class Sums:
    """Adds up <e, o>, |e|^2 and |o|^2 by name."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, names: Sequence[str], three: Sequence[float]) -> None:
        for name in names:
            self.sums[name] = [a + b for a, b in zip(self.sums.get(name, [0.0] * 3), three, strict=True)]

    def compared(self) -> dict[str, Compared]:
        return {name: Compared.of(*three) for name, three in self.sums.items()}

    @property
    def all(self) -> Compared:
        """Over everything that was added under the name ""; if nothing was added, the gradient is exact."""
        return Compared.of(*self.sums[""]) if "" in self.sums else Compared(1.0, 0.0)
