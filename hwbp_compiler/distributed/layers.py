"""A layer of a recurrence over a rank's stretch: how it runs, what is exact in it, and its highway.

K is that of PAPER.md, section 2: z for a GRU; for an LSTM, with state (h, c), f from c to c and o (1 - tanh(c')^2) f
from c to h. What has no highway (nn.RNN) is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hwbp_compiler.scan  # noqa: F401  (registers torch.ops.highway.linear_scan)

from .errors import StageError

Pair = tuple[int, int]
_WHERE = "distributed.recurrent"


@dataclass(frozen=True)
class Diagonals:
    """The highway of a stretch, damped.

    product   P per (to, from), [B, *]: what a gradient of the last state becomes at the state before the first step
    k         the same of every step, [T, B, *]
    """

    k: dict[Pair, Tensor]
    order: tuple[int, ...]

    @property
    def product(self) -> dict[Pair, Tensor]:
        steps = next(iter(self.k.values())).shape[0]
        total = {pair: k[steps - 1] for pair, k in self.k.items()}
        for t in range(steps - 2, -1, -1):
            row = {pair: k[t] for pair, k in self.k.items()}
            total = _after(total, row)
        return total

    def along(self, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        """``contributions`` [T, B, *] at component 0 after every step, and ``end``, brought along the highway to the
        state before the first step."""
        state = list(end)
        for t in range(contributions.shape[0] - 1, -1, -1):
            state[0] = state[0] + contributions[t]
            state = _times({pair: k[t] for pair, k in self.k.items()}, state)
        return state


def _times(k: dict[Pair, Tensor], state: list[Tensor]) -> list[Tensor]:
    found = [torch.zeros_like(s) for s in state]
    for (to, source), diagonal in k.items():
        found[to] = found[to] + diagonal * state[source]
    return found


def _after(total: dict[Pair, Tensor], row: dict[Pair, Tensor]) -> dict[Pair, Tensor]:
    """``row`` follows ``total`` on a gradient's way: row @ total."""
    found: dict[Pair, Tensor] = {}
    for (to, middle), second in row.items():
        for (arrived, source), first in total.items():
            if arrived == middle:
                term = second * first
                found[to, source] = found[to, source] + term if (to, source) in found else term
    return {pair: found.get(pair, torch.zeros_like(next(iter(row.values())))) for pair in total.keys() | row.keys()}


@dataclass(frozen=True)
class Gradients:
    input: Tensor | None
    state: list[Tensor]
    weights: list[Tensor | None]


@dataclass(frozen=True)
class Run:
    """A layer on one part of the batch of this rank's stretch, recorded by autograd.

    x [T, B, *]; first, last: states before and after, [B, *] per component; output [T, B, *]
    """

    layer: Layer
    x: Tensor
    first: list[Tensor]
    output: Tensor
    last: list[Tensor]

    @classmethod
    def of(cls, layer: Layer, x: Tensor, first: list[Tensor], wanted: bool) -> Run:
        x = x.detach().requires_grad_(wanted)
        first = [s.requires_grad_() for s in first]
        with torch.enable_grad():
            output, last = layer.run(x, first)
        return cls(layer, x, first, output, last)

    @property
    def batch(self) -> int:
        return self.x.shape[1]

    def through(self, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        """out_s: exact, through the states alone."""
        return self._gradients(contributions, end, self.first)  # type: ignore[return-value]

    def gradients(self, contributions: Tensor, end: list[Tensor]) -> Gradients:
        """Everything, once."""
        weights = [w for w in self.layer.weights if w.requires_grad]
        inputs = [self.x] if self.x.requires_grad else []
        found = self._gradients(contributions, end, [*inputs, *self.first, *weights])
        of_weights = iter(found[len(inputs) + len(self.first) :])
        return Gradients(
            found[0] if inputs else None,
            found[len(inputs) : len(inputs) + len(self.first)],  # type: ignore[arg-type]
            [next(of_weights) if w.requires_grad else None for w in self.layer.weights],
        )

    def _gradients(self, contributions: Tensor, end: list[Tensor], wanted: list[Tensor]) -> list[Tensor | None]:
        found = torch.autograd.grad(
            [self.output, *self.last], wanted, [contributions, *end], retain_graph=True, allow_unused=True
        )
        return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]

    @torch.no_grad()
    def diagonals(self, damping: float) -> Diagonals:
        k = self.layer.highway(self.x, self.first, self.output)
        return Diagonals({pair: (1.0 - damping) * value for pair, value in k.items()}, self.layer.order)


class Layer:
    """One layer; ``width`` components of state, ``support`` the pairs (to, from) of K that are not zero."""

    width = 1
    support: frozenset[Pair] = frozenset()
    order: tuple[int, ...] = (0,)
    weights: list[nn.Parameter]

    def run(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(x [T, B, *], state [B, *]) -> (output [T, B, *], state after the last step)"""
        raise NotImplementedError

    def highway(self, x: Tensor, state: list[Tensor], output: Tensor) -> dict[Pair, Tensor]:
        """K per (to, from) of every step, [T, B, *]."""
        raise NotImplementedError


class ModuleLayer(Layer):
    """Layer ``number`` of an ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN``, run by PyTorch's own kernel."""

    def __init__(self, module: nn.RNNBase, number: int) -> None:
        inputs = module.input_size if number == 0 else module.hidden_size
        shapes = {"num_layers": 1, "bias": module.bias, "device": "meta"}
        if isinstance(module, nn.RNN):
            shapes["nonlinearity"] = module.nonlinearity
        self.inner = type(module)(inputs, module.hidden_size, **shapes)  # type: ignore[arg-type]
        self.inner.train(module.training)
        names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]
        for name in names:
            setattr(self.inner, f"{name}_l0", getattr(module, f"{name}_l{number}"))
        self.weights = [getattr(module, f"{name}_l{number}") for name in names]
        self.size = module.hidden_size
        self.is_lstm, self.is_gru = isinstance(module, nn.LSTM), isinstance(module, nn.GRU)
        self.width = 2 if self.is_lstm else 1
        if self.is_lstm:
            self.support, self.order = frozenset({(1, 1), (1, 0)}), (0, 1)
        elif self.is_gru:
            self.support = frozenset({(0, 0)})

    def run(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        stacked = tuple(s.unsqueeze(0) for s in state)
        output, last = self.inner(x, stacked if self.is_lstm else stacked[0])
        return output, [s.squeeze(0) for s in (last if self.is_lstm else (last,))]

    def highway(self, x: Tensor, state: list[Tensor], output: Tensor) -> dict[Pair, Tensor]:
        before = torch.cat([state[0].unsqueeze(0), output[:-1]])
        w_ih, w_hh, *biases = (w.detach() for w in self.weights)

        def gate(number: int) -> Tensor:
            rows = slice(number * self.size, (number + 1) * self.size)
            found = x @ w_ih[rows].t() + before @ w_hh[rows].t()
            return found + sum(b[rows] for b in biases) if biases else found

        if self.is_gru:
            return {(0, 0): torch.sigmoid(gate(1))}
        i, f, o = (torch.sigmoid(gate(number)) for number in (0, 1, 3))
        c = torch.ops.highway.linear_scan(i * torch.tanh(gate(2)), f, False, state[1].detach())
        return {(1, 1): f, (1, 0): o * (1 - torch.tanh(c[1:]) ** 2) * f}


def layers_of(module: nn.Module) -> tuple[Sequence[Layer], int]:
    """The layers from the input up, and the dimension of time."""
    if not isinstance(module, (nn.GRU, nn.LSTM, nn.RNN)):
        raise StageError(f"{_WHERE}: module_or_cell is a {type(module).__name__}; it takes nn.GRU, nn.LSTM or nn.RNN.")
    for option, plain in (("bidirectional", False), ("proj_size", 0)):
        if getattr(module, option, plain) != plain:
            raise StageError(
                f"{_WHERE}: {type(module).__name__} has {option} = {getattr(module, option)}; it must be {plain} here. "
                "Run such a layer on unsharded time."
            )
    if module.training and module.dropout and module.num_layers > 1:
        raise StageError(
            f"{_WHERE}: {type(module).__name__} has dropout = {module.dropout} between its layers; it must be 0 while "
            "training here. Use one call a layer, and nn.Dropout between them."
        )
    return [ModuleLayer(module, n) for n in range(module.num_layers)], int(module.batch_first)
