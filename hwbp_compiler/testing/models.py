"""Residual and recurrent models made from plain data, each paired with its programs for the oracle.

A :class:`Model` is a few stages, stacks of links or loops over time, with heavy steps between them. Its ``repr``
names only what differs from the simplest model, so a failing example can be read, and pasted back.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .blocks import (
    USED_TWICE,
    After,
    Block,
    BlockKind,
    Cell,
    CellKind,
    Learnt,
    Norm,
    Normal,
    Update,
    activated,
    updated,
)
from .losses import probe_loss
from .reference import Hold, Link, Program, RunChain, Tensors, keep

PreNorm = Norm


class _ReadableRepr:
    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        shown = ", ".join(f"{name}={value!r}" for name, value, default in values if value != default)
        return f"{type(self).__name__}({shown})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints
        printer.text(repr(self))


@dataclass(frozen=True, repr=False)
class Stack(_ReadableRepr):
    """``depth`` links of width ``width``; link i is ``after(update(x, block(pre(x))) + vector)``.

    Attributes:
        depth: links.
        width: of the state.
        blocks: kinds of block, taken in turn, see :class:`.blocks.Block`.
        update: how block output z and state x join: "add" x + z; "subtract" x - z; "scaled" 0.8 x + z; "scalar" and
            "vector" a x + z, a learnt; "rezero" x + a z; "kept" where(mask, x + z, x); "gate" g x + (1 - g) tanh z, g
            from the state; "input_gate" the same, g a learnt vector; "lerp" torch.lerp(x, tanh z, g); "self_gate"
            x + x sigmoid(z); "product" x (1.2 + z); "part" the same for one column of the state alone; "curved"
            x + z + 0.3 tanh x; "normed_gate" x + 0.3 u sigmoid(z) and "inner" x + 0.3 (u + z), u = pre(x).
        pre: normalisation in front of the block (in J).
        after: what follows the update, within the link: an activation, a norm, a fixed 0/1 mask, a cast and back.
        shared: 0: every link has its own weights; p: links i and i + p share theirs.
        vectors: a learnt vector is added to every state (not a link).
        taps: states, 1..depth, that the model returns.
        heads: each tap goes through a linear layer.
        penalties: links, 1..depth, whose hidden activity the model returns.
        skip: (i, j): state i is added to the input of link j > i + 1; which chains that leaves is left open.
        unet: the skips (0, depth), (1, depth - 1), ...
        rereads: every block's input has the first state added to it.
        layout: "flat": links work on [batch * length, width]; "swap": the state is transposed in every link.
        frozen: links, 1..depth, whose parameters want no gradient.
    """

    depth: int = 3
    width: int = 3
    blocks: tuple[BlockKind, ...] = ("mlp",)
    update: Update = "add"
    pre: PreNorm = "none"
    after: After = "none"
    shared: int = 0
    vectors: bool = False
    taps: tuple[int, ...] = ()
    heads: bool = False
    penalties: tuple[int, ...] = ()
    skip: tuple[int, int] | None = None
    unet: bool = False
    rereads: bool = False
    layout: Literal["none", "flat", "swap"] = "none"
    frozen: tuple[int, ...] = ()

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """(i, j): state i is added to the input of link j."""
        if self.unet:
            return tuple((i, self.depth - i) for i in range(self.depth) if self.depth - i > i + 1)
        return () if self.skip is None else (self.skip,)


@dataclass(frozen=True, repr=False)
class Recurrence(_ReadableRepr):
    """A loop over time of ``layers`` cells, layers interleaved: one chain per layer, as long as the input.

    Attributes:
        width: of the state.
        cell: see :class:`.blocks.Cell`.
        layers: how many.
        every_step: hands on the states of all steps, else of the last.
        start: the first state is "zeros", "learnt", or "given": one more argument of the model, [layers, 2, batch,
            width], that requires a gradient.
        reverse: runs from the last step to the first.
        masked: past its end a sequence keeps its state: where(mask, new, old).
        frozen: its parameters want no gradient.
    """

    width: int = 3
    cell: CellKind = "gru"
    layers: int = 1
    every_step: bool = True
    start: Literal["zeros", "learnt", "given"] = "zeros"
    reverse: bool = False
    masked: bool = False
    frozen: bool = False

    @property
    def has_highway(self) -> bool:
        """An elementwise path from state to state; past its end, a masked sequence has one in any case."""
        return self.cell != "tanh" or self.masked


Stage = Stack | Recurrence


@dataclass(frozen=True, repr=False)
class Model(_ReadableRepr):
    """Stages in a row with ``tanh(linear(x))`` between them, on inputs [batch, length, stacks[0].width].

    Attributes:
        stacks: the stages.
        batch: sequences in a batch.
        length: of the sequences.
        stem: start with a linear layer too.
        head: end with one.
        input_grad: the input requires a gradient.
        dead_ends: every state is used for something that nobody wants, and one such thing is returned but not in the
            loss.
        parallel: stages side by side: each reads the input, and all outputs are returned.
        dtype: of parameters and input.
        dynamic: compiled with sizes known only at run time, where it is compiled by way of Dynamo.
        seed: of the parameters and the input.
    """

    stacks: tuple[Stage, ...] = (Stack(),)
    batch: int = 2
    length: int = 2
    stem: bool = False
    head: bool = False
    input_grad: bool = True
    dead_ends: bool = False
    parallel: bool = False
    dtype: Literal["float64", "float32"] = "float64"
    dynamic: bool = False
    seed: int = 0

    @property
    def pinned(self) -> bool:
        """Whether the contract says what the chains are, so that truncated gradients can be predicted."""
        return not any(isinstance(stage, Stack) and (stage.skips or stage.rereads) for stage in self.stacks)

    @property
    def chain_lengths(self) -> list[int]:
        """The length of every chain, in forward order."""
        return [len(chain) for chain in _chains(self)]

    @property
    def lengths(self) -> list[int]:
        """The length of every stage's input: a recurrence can hand on its last state alone."""
        found, length = [], self.length
        for stage in self.stacks:
            found.append(length)
            if isinstance(stage, Recurrence) and not stage.every_step and not self.parallel:
                length = 1
        return found


def _chains(spec: Model) -> Iterator[range]:
    for stage, length in zip(spec.stacks, spec.lengths, strict=True):
        if isinstance(stage, Stack):
            yield range(stage.depth)
        elif stage.has_highway:
            yield from [range(length)] * stage.layers


# ---------------------------------------------------------------------------------------------- the modules


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
            found = self._joined(*flat, hold).view(shape)
        else:
            found = self._joined(x, u, z, hold)
        if self.layout == "swap":
            found = found.transpose(1, 2).contiguous().transpose(1, 2)
        return found, hidden

    def _joined(self, x: Tensor, u: Tensor, z: Tensor, hold: Hold) -> Tensor:
        x = activated(self.after, updated(self.update, x, u, z, self.learnt, hold))
        x = self.post(x, hold)
        if self.after == "mask":
            x = self.mask.to(x.dtype) * x
        return x if self.vector is None else x + self.vector


class Links(nn.Module):
    """A stack; ``forward(x, context) -> (states 0..depth, taps, penalties)``."""

    def __init__(self, spec: Stack, batch: int, length: int, context: int) -> None:
        super().__init__()
        self.spec = spec
        kinds = [spec.blocks[i % len(spec.blocks)] for i in range(spec.depth)]
        links: list[nn.Module] = []
        for i, kind in enumerate(kinds):
            again = spec.shared and i >= spec.shared
            made = links[i - spec.shared] if again else Residual(spec, kind, batch, length, context)
            links.append(made)
            if i + 1 in spec.frozen:
                made.requires_grad_(False)
        self.links = nn.ModuleList(links)
        self.heads = nn.ModuleList(nn.Linear(spec.width, 2) for _ in spec.taps if spec.heads)

    def forward(self, x: Tensor, context: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        states, penalties = [x], []
        first = x if self.spec.rereads else None
        for i, link in enumerate(self.links, start=1):
            for start, end in self.spec.skips:
                if end == i:
                    x = x + states[start]
            x, hidden = link(x, context, first)
            states.append(x)
            if i in self.spec.penalties:
                penalties.append(hidden)
        return states, self.taps(states), penalties

    def taps(self, states: list[Tensor]) -> list[Tensor]:
        found = [states[i] for i in self.spec.taps]
        return [head(tap) for head, tap in zip(self.heads, found, strict=True)] if self.spec.heads else found


class Loop(nn.Module):
    """A recurrence; ``forward(x, given) -> [batch, length or 1, width]``; ``given`` is the first state if that is."""

    def __init__(self, spec: Recurrence, inputs: int, batch: int, length: int) -> None:
        super().__init__()
        self.spec = spec
        widths = [inputs, *[spec.width] * (spec.layers - 1)]
        self.cells = nn.ModuleList(Cell(spec.cell, width, spec.width) for width in widths)
        if spec.start == "learnt":
            self.first = nn.Parameter(0.5 * torch.randn(spec.layers, 2, spec.width))
        if spec.masked:
            ends = torch.randint(1, length + 1, (batch, 1))
            self.register_buffer("mask", torch.arange(length) < ends)
        if spec.frozen:
            self.requires_grad_(False)

    def start(self, x: Tensor, given: Tensor | None, layer: int) -> Tensors:
        count = self.cells[layer].components
        if given is not None:
            return tuple(given[layer, i] for i in range(count))
        if self.spec.start == "learnt":
            return tuple(self.first[layer, i].expand(x.shape[0], -1) for i in range(count))
        return tuple(x.new_zeros(x.shape[0], self.spec.width) for _ in range(count))

    def times(self, x: Tensor) -> list[int]:
        steps = list(range(x.shape[1]))
        return steps[::-1] if self.spec.reverse else steps

    def step(self, layer: int, t: int, x_t: Tensor, state: Tensors, hold: Hold = keep) -> Tensors:
        new = self.cells[layer](x_t, state, hold)
        if not self.spec.masked:
            return new
        mask = self.mask[:, t, None]
        return tuple(torch.where(mask, a, b) for a, b in zip(new, state, strict=True))

    def forward(self, x: Tensor, given: Tensor | None) -> Tensor:
        states = [self.start(x, given, layer) for layer in range(self.spec.layers)]
        outputs = []
        for t in self.times(x):
            value = x[:, t]
            for layer in range(self.spec.layers):
                states[layer] = self.step(layer, t, value, states[layer])
                value = states[layer][0]
            outputs.append(value)
        return torch.stack(outputs, 1) if self.spec.every_step else outputs[-1].unsqueeze(1)


class ResidualModel(nn.Module):
    """The model of a :class:`Model`; returns ``{"final", "taps", "penalties"}`` and, with dead ends, ``"ignored"``."""

    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.spec = spec
        widths = [stage.width for stage in spec.stacks]
        inputs = widths[:1] * len(widths) if spec.parallel else [widths[0], *widths]
        self.stem = nn.Linear(widths[0], widths[0]) if spec.stem else nn.Identity()
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inputs[1:], widths[1:], strict=False))
        self.head = nn.Linear(widths[-1], 2) if spec.head else nn.Identity()
        self.stacks = nn.ModuleList()
        for stage, length in zip(spec.stacks, spec.lengths, strict=True):
            if isinstance(stage, Stack):
                self.stacks.append(Links(stage, spec.batch, length, widths[0]))
            else:
                self.stacks.append(Loop(stage, stage.width, spec.batch, length))

    def context(self, x: Tensor) -> Tensor:
        """What the first stage's cross-attention looks at: the input, of which that chain's first state is no part."""
        return x if self.spec.stem else x.detach()

    def given(self, states: tuple[Tensor, ...]) -> Iterator[Tensor | None]:
        """For every stage the first state that the model was given, None where it is not."""
        rest = iter(states)
        for stage in self.spec.stacks:
            yield next(rest) if isinstance(stage, Recurrence) and stage.start == "given" else None

    def forward(self, x: Tensor, *states: Tensor) -> dict[str, Any]:
        found: dict[str, Any] = {"taps": [], "penalties": []}
        given = self.given(states)
        ignored = x
        context, x = self.context(x), self.stem(x)
        first = x
        finals = []
        for number, (stage, start) in enumerate(zip(self.stacks, given, strict=True)):
            if number:
                x = torch.tanh(self.between[number - 1](first if self.spec.parallel else x))
            if isinstance(stage, Loop):
                x = stage(x, start)
            else:
                passed, taps, penalties = stage(x, context)
                found["taps"] += taps
                found["penalties"] += penalties
                x = passed[-1]
                if self.spec.dead_ends:
                    for state in passed:
                        torch.cosh(state)
            if number == 0 and not self.spec.parallel:
                context = x
            ignored = torch.sin(x)
            finals.append(x)
        return self.returned(found, finals, ignored)

    def returned(self, found: dict[str, Any], finals: list[Tensor], ignored: Tensor) -> dict[str, Any]:
        found["final"] = self.head(finals[-1])
        if self.spec.parallel:
            found["others"] = finals[:-1]
        return {**found, "ignored": ignored} if self.spec.dead_ends else found


def loss(output: dict[str, Any]) -> Tensor:
    """Of everything the model returns but ``"ignored"``."""
    return probe_loss({key: value for key, value in output.items() if key != "ignored"})


def build(spec: Model) -> tuple[ResidualModel, tuple[Tensor, ...], Any]:
    """Make a model of plain data; the same numbers every time.

    Args:
        spec: what to make.

    Returns:
        The module, the tuple it is called with ([batch, length, width], and given first states), and a loss.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        dtype = getattr(torch, spec.dtype)
        model = ResidualModel(spec).to(dtype)
        x = torch.randn(spec.batch, spec.length, spec.stacks[0].width, dtype=torch.float64).to(dtype)
        loops = [stage for stage in spec.stacks if isinstance(stage, Recurrence) and stage.start == "given"]
        given = [torch.randn(s.layers, 2, spec.batch, s.width, dtype=torch.float64).to(dtype) for s in loops]
    return model, (x.requires_grad_(spec.input_grad), *(h.requires_grad_() for h in given)), loss


# ------------------------------------------------------------------------------------- the model, retold


def program(model: ResidualModel) -> Program:
    """Describe a model for the oracle, on the same parameters.

    Args:
        model: what :func:`build` made.

    Returns:
        Its :class:`..reference.Program`.

    Raises:
        ValueError: which chains the model has is left open (``pinned`` is False).
    """
    if not model.spec.pinned:
        raise ValueError(f"which chains {model.spec} has is left open: there is no single program for it")
    return next(programs(model))


def programs(model: ResidualModel) -> Iterator[Program]:
    """Every way of reading chains into the model: one where it is pinned, many where links are skipped.

    Highway-BP of any of them is sound; which one a compiler chooses is its own affair. Where every block reads the
    first state, that of the first block is its state: a side input, or not.
    """
    skipped = [stage.spec for stage in model.stacks if isinstance(stage, Links) and stage.spec.skips]
    if len(skipped) > 1:
        raise ValueError(f"{model.spec} skips links in more than one stack: too many ways to read chains into it")
    rereads = any(isinstance(stage, Links) and stage.spec.rereads for stage in model.stacks)
    ways = [(reading, apart) for reading in (_readings(skipped[0]) if skipped else [()]) for apart in (True, False)]
    for reading, apart in ways if rereads else ways[::2]:

        def forward(
            run: RunChain, x: Tensor, *states: Tensor, reading: Reading = reading, apart: bool = apart
        ) -> dict[str, Any]:
            return _retold(model, reading, run, x, states, apart)

        yield Program(dict(model.named_parameters()), forward)


Reading = tuple[tuple[int, ...], ...]
"""Chains by their states, for example ((0, 1, 2), (2, 4)): what lies between two successive ones is one link. State i
of a stack is what link i returns, plus what skips add to it; a last state written -i is without that."""


def _readings(stack: Stack) -> Iterator[Reading]:
    """All sound readings of at most two chains of at least two links, the longest first; what is in none is exact."""
    found = [
        states
        for count in range(stack.depth + 1, 2, -1)
        for states in itertools.combinations(range(stack.depth + 1), count)
        if _is_sound(stack, states)
    ]
    found += [
        (*states[:-1], -states[-1])
        for count in range(stack.depth + 1, 2, -1)
        for states in itertools.combinations(range(stack.depth + 1), count)
        if any(link - 1 == states[-1] and source > states[0] for source, link in stack.skips)
        and _is_sound(stack, states, bare=True)
    ]
    pairs = [(a, b) for a in found for b in found if abs(a[-1]) <= b[0]]
    yield from sorted([*((one,) for one in found), *pairs], key=lambda chains: -sum(map(len, chains)))
    yield ()


def _is_sound(stack: Stack, states: tuple[int, ...], bare: bool = False) -> bool:
    """No skip by-passes one of ``states``: it comes from before the chain, or from within the link it leads to."""
    for source, link in stack.skips:
        target = link - 1
        if states[0] < target <= states[-1] - bare:
            start = max(state for state in states if state < target)
            if states[0] < source < start:
                return False
    return True


def _retold(
    model: ResidualModel, reading: Reading, run: RunChain, x: Tensor, given: tuple[Tensor, ...], apart: bool
) -> dict[str, Any]:
    spec = model.spec
    found: dict[str, Any] = {"taps": [], "penalties": []}
    ignored = x
    context, x = model.context(x), model.stem(x)
    first = x
    finals = []
    for number, (stage, start) in enumerate(zip(model.stacks, model.given(given), strict=True)):
        if number:
            x = torch.tanh(model.between[number - 1](first if spec.parallel else x))
        if isinstance(stage, Loop):
            x = _run_loop(stage, run, x, start)
        elif stage.spec.skips:
            states, penalties = _run_skipping(stage, reading, run, x, context)
            found["taps"] += stage.taps(states)
            found["penalties"] += penalties
            x = states[-1]
        else:
            side = (context, x) if stage.spec.rereads else (context,)
            links = [
                _link(link, i in stage.spec.penalties, side, its_own=i == 1 and stage.spec.rereads and not apart)
                for i, link in enumerate(stage.links, start=1)
            ]
            chain = run(links, (x,))
            states = [state for (state,) in chain.states]
            found["taps"] += stage.taps(states)
            found["penalties"] += [outputs[0] for outputs in chain.outputs if outputs]
            x = states[-1]
        if number == 0 and not spec.parallel:
            context = x
        ignored = torch.sin(x)
        finals.append(x)
    return model.returned(found, finals, ignored)


def _link(link: Residual, penalised: bool, side: Tensors, its_own: bool = False) -> Link:
    """``its_own``: the first state that it reads is its state."""

    def step(state: Tensors, side: Tensors, hold: Hold) -> tuple[Tensors, Tensors]:
        found, hidden = link(state[0], *((side[0], state[0]) if its_own else side), hold=hold)
        return (found,), (hidden,) if penalised else ()

    return Link(step, side)


def _run_loop(loop: Loop, run: RunChain, x: Tensor, given: Tensor | None) -> Tensor:
    times = loop.times(x)
    values = [x[:, t] for t in times]
    for layer in range(loop.spec.layers):
        start = loop.start(x, given, layer)
        if not loop.spec.has_highway:  # no chain
            states = [start]
            for t, value in zip(times, values, strict=True):
                states.append(loop.step(layer, t, value, states[-1]))
        else:
            links = [_time_step(loop, layer, t, value) for t, value in zip(times, values, strict=True)]
            states = run(links, start).states
        values = [state[0] for state in states[1:]]
    return torch.stack(values, 1) if loop.spec.every_step else values[-1].unsqueeze(1)


def _time_step(loop: Loop, layer: int, t: int, value: Tensor) -> Link:
    def step(state: Tensors, side: Tensors, hold: Hold) -> tuple[Tensors, Tensors]:
        return loop.step(layer, t, side[0], state, hold), ()

    return Link(step, (value,))


def _run_skipping(
    stage: Links, reading: Reading, run: RunChain, x: Tensor, context: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """States 0..depth as the model returns them, and penalties."""
    spec = stage.spec
    known = {0: x}  # state by number, with what skips add
    penalties: dict[int, Tensor] = {}
    starts = {states[0]: states for states in reading}
    position = 0
    while position < spec.depth:
        states = starts.get(position, (position, position + 1))
        bare, states = states[-1] < 0, (*states[:-1], abs(states[-1]))
        links = [
            _between(
                stage, a, b, {i: known[i] for i, _ in spec.skips if i <= states[0]}, context, bare and b == states[-1]
            )
            for a, b in itertools.pairwise(states)
        ]
        if position in starts:
            chain = run(links, (known[position],))
            reached, outputs = chain.states[1:], chain.outputs
        else:
            state, sideways = links[0].step((known[position],), links[0].side, keep)
            reached, outputs = [state], [sideways]
        for (a, b), (state,), sideways in zip(itertools.pairwise(states), reached, outputs, strict=True):
            known[b] = state
            leaving = iter(sideways)
            known.update((i, next(leaving)) for i in range(a + 1, b))
            penalties.update((i, next(leaving)) for i in range(a + 1, b + 1) if i in spec.penalties)
        position = states[-1]
        if bare:
            added = (known[source] for source, link in spec.skips if link == position + 1)
            known[position] = sum(added, known[position])
    # Nobody looks at a state to which a skip adds something before it does: see ``strategies.stacks``.
    return [known[i] for i in range(spec.depth + 1)], [penalties[i] for i in spec.penalties]


def _between(stage: Links, start: int, end: int, outside: dict[int, Tensor], context: Tensor, bare: bool) -> Link:
    """State ``start`` to state ``end`` as one link; the states between them and all penalties leave sideways."""
    spec = stage.spec

    def step(state: Tensors, side: Tensors, hold: Hold) -> tuple[Tensors, Tensors]:
        known = {**dict(zip(outside, side[1:], strict=True)), start: state[0]}
        hiddens = []
        for i in range(start + 1, end + 1):
            known[i], hidden = stage.links[i - 1](known[i - 1], side[0], hold=hold)
            hiddens += [hidden] if i in spec.penalties else []
            for source, link in spec.skips:
                if link == i + 1 and not (bare and i == end):
                    known[i] = known[i] + known[source]
        return (known[end],), (*(known[i] for i in range(start + 1, end)), *hiddens)

    return Link(step, (context, *outside.values()))
