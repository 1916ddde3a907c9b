"""One layer of a recurrence over a rank's stretch: how it runs, what is exact in it, and its highway.

K is that of docs/design.md, section 4.8. For a GRU it is z. For an LSTM, with state (h, c), it is f from c to c and o
(1 - tanh(c')^2) f from c to h. A layer without a highway (nn.RNN) is exact.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hwbp_compiler.scan  # noqa: F401  (registers torch.ops.highway.linear_scan)

from .errors import StageError
from .highway_of_stage import CellHighway, conditions, highway_of_cell

Pair = tuple[int, int]
_WHERE = "distributed.recurrent"


@dataclass(frozen=True)
class Diagonals:
    """The highway of a stretch, damped.

    product   P per (to, from), [B, *]: maps a gradient of the last state to the state before the first step
    k         the same for every step, [T, B, *]
    """

    k: dict[Pair, Tensor]

    @property
    def product(self) -> dict[Pair, Tensor]:
        steps = next(iter(self.k.values())).shape[0]
        total = {pair: k[steps - 1] for pair, k in self.k.items()}
        for t in range(steps - 2, -1, -1):
            row = {pair: k[t] for pair, k in self.k.items()}
            total = _after(total, row)
        return total

    def along(self, after: Sequence[list[Tensor]], before: Sequence[list[Tensor]], end: list[Tensor]) -> list[Tensor]:
        """Carry the losses' contributions at the states after and before every step, and ``end``, along the highway to
        the state before the first step.
        """
        state = list(end)
        for t in range(len(after) - 1, -1, -1):
            state = _times({pair: k[t] for pair, k in self.k.items()}, _plus(state, after[t]))
            state = _plus(state, before[t]) if before else state
        return state


def _times(k: dict[Pair, Tensor], state: list[Tensor]) -> list[Tensor]:
    found = [torch.zeros_like(s) for s in state]
    for (to, source), diagonal in k.items():
        found[to] = found[to] + diagonal * state[source]
    return found


def _plus(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x + y for x, y in zip(a, b, strict=True)]


def _after(total: dict[Pair, Tensor], row: dict[Pair, Tensor]) -> dict[Pair, Tensor]:
    """A gradient passes ``total`` first and then ``row``: row @ total."""
    found: dict[Pair, Tensor] = {}
    for (to, middle), second in row.items():
        for (arrived, source), first in total.items():
            if arrived == middle:
                term = second * first
                found[to, source] = found[to, source] + term if (to, source) in found else term
    both = total | row
    return {pair: found[pair] if pair in found else torch.zeros_like(both[pair]) for pair in both}


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
            return layer.recorded(x, first)

    @property
    def batch(self) -> int:
        return self.x.shape[1]

    def through(self, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        """out_s: exact, through the states only."""
        return self._gradients(contributions, end, self.first)  # type: ignore[return-value]

    def gradients(self, contributions: Tensor, end: list[Tensor]) -> Gradients:
        """All gradients, once."""
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
        return Diagonals({pair: (1.0 - damping) * value for pair, value in self._highway().items()})

    def _highway(self) -> dict[Pair, Tensor]:
        return self.layer.highway(self.x, self.first, self.output)

    def along(self, diagonals: Diagonals, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        """A_s, plus ``end`` carried along the highway. The output is component 0 of the state."""
        rest = [torch.zeros_like(s) for s in self.first[1:]]
        return diagonals.along([[c, *rest] for c in contributions], [], end)


class Layer:
    """One layer. ``width`` is the number of state components, ``support`` the pairs (to, from) with K not zero."""

    width = 1
    support: frozenset[Pair] = frozenset()
    weights: list[nn.Parameter]

    def recorded(self, x: Tensor, state: list[Tensor]) -> Run:
        """A run from x [T, B, *] and state [B, *], which are leaves, while autograd records."""
        raise NotImplementedError

    def highway(self, x: Tensor, state: list[Tensor], output: Tensor) -> dict[Pair, Tensor]:
        """K per (to, from) for every step, [T, B, *]."""
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
            self.support = frozenset({(1, 1), (1, 0)})
        elif self.is_gru:
            self.support = frozenset({(0, 0)})

    def recorded(self, x: Tensor, state: list[Tensor]) -> Run:
        stacked = tuple(s.unsqueeze(0) for s in state)
        output, last = self.inner(x, stacked if self.is_lstm else stacked[0])
        return Run(self, x, state, output, [s.squeeze(0) for s in (last if self.is_lstm else (last,))])

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


def layers_of(module: nn.Module, x: Tensor, state: Any, exact: bool) -> Sequence[Layer]:
    """The layers from the input upwards; ``x`` is [T, B, *]. ``exact`` means that no highway is needed."""
    if not isinstance(module, nn.RNNBase):
        return [CellLayer(module, x, state, exact)]
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
    return [ModuleLayer(module, n) for n in range(module.num_layers)]


# -- user-defined cells
# -------------------------------------------------------------------------------------------------


_KEPT = 4
"""How many traces of a cell to keep: training, evaluation and a smaller last batch may alternate."""

_TRACED: weakref.WeakKeyDictionary[nn.Module, list[tuple[Any, CellHighway]]] = weakref.WeakKeyDictionary()


class CellLayer(Layer):
    """``cell(x_t, state) -> (output, next_state)``, step by step. The compiler's passes find K in one step.

    The state is a pytree of tensors ``[B, *]``; x_t and the output are tensors ``[B, *]``.
    """

    def __init__(self, cell: Any, x: Tensor, state: Any, exact: bool) -> None:
        if not isinstance(cell, nn.Module):
            raise StageError(
                f"{_WHERE}: module_or_cell is a {type(cell).__name__}; it takes an nn.Module, so that its parameters "
                "are known. Make the cell a module."
            )
        flat, self.structure = pytree.tree_flatten(state)
        batch = x.shape[1]
        if state is None or not all(
            isinstance(s, Tensor) and s.is_floating_point() and s.ndim and s.shape[0] == batch for s in flat
        ):
            raise StageError(
                f"{_WHERE}: state is {_described(state)}; a cell takes floating-point tensors [{batch}, ...], one or a "
                "pytree of them: the state before the first step of the whole sequence."
            )
        self.width = len(flat)
        self.step = _Step(cell, self.structure)
        self.weights = list(cell.parameters())
        self.found = CellHighway() if exact else self._look(cell, x[0].detach(), flat)
        self.support = self.found.support

    def _look(self, cell: nn.Module, row: Tensor, state: list[Tensor]) -> CellHighway:
        """K, from a trace that is kept until something it depends on changes. A trace that gives only numbers is not
        kept: if a number is not stored in a module, no step would notice that it changed.
        """
        kind = row.device.type
        key = (
            [(tuple(t.shape), t.dtype, t.device) for t in (row, *state)],
            self.structure,
            conditions(cell),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )
        known = _TRACED.setdefault(cell, [])
        for earlier, found in known:
            if earlier == key:
                return found
        example = [s.detach().clone().requires_grad_() for s in state]
        with torch.enable_grad():
            found = highway_of_cell(self.step, [row], example)
        if found.graph is not None or found.why is not None:
            known[:] = [*known[1 - _KEPT :], (key, found)]
        return found

    def flat(self, state: Any) -> list[Tensor]:
        return pytree.tree_leaves(state)

    def structured(self, state: list[Tensor]) -> Any:
        return pytree.tree_unflatten(state, self.structure)

    def recorded(self, x: Tensor, state: list[Tensor]) -> Run:
        steps: list[Recorded] = []
        before = state
        for row in x.detach():
            row = row.clone().requires_grad_(x.requires_grad)
            *after, output = self.step(row, *before)
            steps.append(Recorded(row, before, after, output))
            before = [s.detach().requires_grad_() for s in after]
        return CellRun(self, x, state, torch.stack([s.output.detach() for s in steps]), steps[-1].after, steps)


class _Step(nn.Module):
    """(x_t, *state) -> (*next state, output)"""

    def __init__(self, cell: nn.Module, structure: Any) -> None:
        super().__init__()
        self.cell, self.structure = cell, structure

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        made = self.cell(x, pytree.tree_unflatten(list(state), self.structure))
        if isinstance(self.cell, nn.RNNCellBase):
            made = (made[0] if isinstance(made, tuple) else made), made
        output, following = made
        leaves = pytree.tree_leaves(following)
        if not isinstance(output, Tensor) or [tuple(s.shape) for s in leaves] != [tuple(s.shape) for s in state]:
            raise StageError(
                f"{_WHERE}: {type(self.cell).__name__} returns {_described(made)} for a state of "
                f"{_described(list(state))}; it must return (output, next_state): one tensor, and a state of the same "
                "form."
            )
        return (*leaves, output)


@dataclass(frozen=True)
class Recorded:
    """A step that started from leaves."""

    row: Tensor
    before: list[Tensor]
    after: list[Tensor]
    output: Tensor


@dataclass(frozen=True)
class CellRun(Run):
    """Step by step."""

    steps: list[Recorded]

    def through(self, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        for step, c in zip(reversed(self.steps), contributions.flip(0), strict=True):
            end = _vjp([step.output, *step.after], step.before, [c, *end])
        return end

    def gradients(self, contributions: Tensor, end: list[Tensor]) -> Gradients:
        weights = [w for w in self.layer.weights if w.requires_grad]
        totals = [torch.zeros_like(w) for w in weights]
        of_rows: list[Tensor] = []
        for step, c in zip(reversed(self.steps), contributions.flip(0), strict=True):
            rows = [step.row] if self.x.requires_grad else []
            found = _vjp([step.output, *step.after], [*step.before, *rows, *weights], [c, *end])
            width = len(step.before)
            end, totals = found[:width], _plus(totals, found[width + len(rows) :])
            of_rows += found[width : width + len(rows)]
        of_weights = iter(totals)
        return Gradients(
            torch.stack(of_rows[::-1]) if of_rows else None,
            end,
            [next(of_weights) if w.requires_grad else None for w in self.layer.weights],
        )

    def _highway(self) -> dict[Pair, Tensor]:
        assert isinstance(self.layer, CellLayer)
        rows = [
            self.layer.found.of_step(self.layer.step, [step.row, *step.before], step.before, step.after)
            for step in self.steps
        ]
        return {pair: torch.stack([row[pair] for row in rows]) for pair in rows[0]}

    def along(self, diagonals: Diagonals, contributions: Tensor, end: list[Tensor]) -> list[Tensor]:
        """An output computed from the next state contributes there. Any other output contributes at the state before
        its step, exactly, through the cell's interior.
        """
        of_after, of_before = [], []
        for step, c in zip(self.steps, contributions, strict=True):
            via = _vjp([step.output], step.after, [c])
            whole, link = _vjp([step.output], step.before, [c]), _vjp(step.after, step.before, via)
            of_after.append(via)
            of_before.append([a - b for a, b in zip(whole, link, strict=True)])
        return diagonals.along(of_after, of_before, end)


def _vjp(outputs: list[Tensor], inputs: list[Tensor], given: list[Tensor]) -> list[Tensor]:
    pairs = [(o, g) for o, g in zip(outputs, given, strict=True) if o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs and inputs:
        found = torch.autograd.grad(
            [o for o, _ in pairs], inputs, [g for _, g in pairs], retain_graph=True, allow_unused=True
        )
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _described(value: Any) -> str:
    return str(pytree.tree_map(lambda v: f"{type(v).__name__} {list(v.shape)}" if isinstance(v, Tensor) else v, value))
