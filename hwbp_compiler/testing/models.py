"""Residual models made from plain data, each paired with its program for the oracle.

A :class:`Model` is a few stacks of equal links with heavy steps between them. Its ``repr`` names only what
differs from the simplest model, so a failing example can be read, and pasted back.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import probe_loss
from .reference import Hold, Link, Program, RunChain, Tensors

BlockKind = Literal["mlp", "glu", "conv", "attention"]
Update = Literal["add", "scaled", "vector", "gate", "input_gate", "lerp", "self_gate"]
PreNorm = Literal["none", "layer", "rms"]
After = Literal["none", "relu", "layer", "rms", "mask"]


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

    blocks      kinds of block, taken in turn
    update      how block output z and state x join:
                "add" x + z; "scaled" 0.8 x + z; "vector" a x + z, a learnt;
                "gate" g x + (1 - g) tanh z, g from the state; "input_gate" the same, g a learnt vector;
                "lerp" torch.lerp(x, tanh z, g); "self_gate" x + x sigmoid(z)
    pre         normalisation in front of the block (in J)
    after       what follows the addition, within the link: nothing, ReLU, a norm, a fixed 0/1 mask
    shared      one set of weights for all links
    vectors     a learnt vector is added to every state (not a link)
    taps        states, 1..depth, that the model returns
    penalties   links, 1..depth, whose hidden activity the model returns
    skip        (i, j): state i is added to the input of link j > i + 1; which chains that leaves is left open
    """

    depth: int = 3
    width: int = 3
    blocks: tuple[BlockKind, ...] = ("mlp",)
    update: Update = "add"
    pre: PreNorm = "none"
    after: After = "none"
    shared: bool = False
    vectors: bool = False
    taps: tuple[int, ...] = ()
    penalties: tuple[int, ...] = ()
    skip: tuple[int, int] | None = None


@dataclass(frozen=True, repr=False)
class Model(_ReadableRepr):
    """Stacks in a row with ``tanh(linear(x))`` between them, on inputs [batch, length, stacks[0].width].

    stem        start with a linear layer too
    head        end with one
    input_grad  the input requires a gradient
    dead_ends   every state is used for something that nobody wants, and one such thing is returned but not in the
                loss
    """

    stacks: tuple[Stack, ...] = (Stack(),)
    batch: int = 2
    length: int = 2
    stem: bool = False
    head: bool = False
    input_grad: bool = True
    dead_ends: bool = False
    seed: int = 0

    @property
    def pinned(self) -> bool:
        """Whether the contract says what the chains are, so that truncated gradients can be predicted."""
        return all(stack.skip is None for stack in self.stacks)

    @property
    def chain_lengths(self) -> list[int]:
        return [stack.depth for stack in self.stacks]


# ---------------------------------------------------------------------------------------------- the module


class Block(nn.Module):
    """``forward(x) -> (z, hidden activity)``; mixes elements."""

    def __init__(self, kind: BlockKind, width: int) -> None:
        super().__init__()
        self.kind = kind
        hidden = width + 2
        if kind == "conv":
            self.first, self.second = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        elif kind == "attention":
            self.first, self.second = nn.Linear(width, 3 * width), nn.Linear(width, width)
        else:
            self.first = nn.Linear(width, hidden if kind == "mlp" else 2 * hidden)
            self.second = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "conv":
            hidden = torch.relu(self.first(x.transpose(1, 2)))
            return self.second(hidden).transpose(1, 2), hidden
        if self.kind == "attention":
            q, k, v = self.first(x).chunk(3, -1)
            hidden = torch.softmax(q @ k.transpose(1, 2) / x.shape[-1] ** 0.5, -1)
            return self.second(hidden @ v), hidden
        hidden = self.first(x)
        hidden = F.gelu(hidden) if self.kind == "mlp" else F.glu(hidden)
        return self.second(hidden), hidden


def _norm(kind: str, width: int) -> nn.Module:
    norm = {"layer": nn.LayerNorm, "rms": lambda w: nn.RMSNorm(w, eps=1e-5)}.get(kind)
    if norm is None:
        return nn.Identity()
    made = norm(width)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


class Residual(nn.Module):
    """One link as a user would write it; ``forward(x) -> (next state, hidden activity)``."""

    def __init__(self, stack: Stack, kind: BlockKind, spec: Model) -> None:
        super().__init__()
        width = stack.width
        self.update, self.after = stack.update, stack.after
        self.pre, self.block = _norm(stack.pre, width), Block(kind, width)
        self.post = _norm(stack.after, width)
        if stack.update in ("gate", "lerp"):
            self.gate = nn.Linear(width, width)
        if stack.update in ("vector", "input_gate"):
            self.factor = nn.Parameter(0.7 + 0.3 * torch.randn(width))
        self.vector = nn.Parameter(0.3 * torch.randn(width)) if stack.vectors else None
        if stack.after == "mask":
            self.register_buffer("mask", (torch.rand(spec.batch, spec.length, 1) < 0.7).double())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, hidden = self.block(self.pre(x))
        if self.update == "add":
            x = x + z
        elif self.update == "scaled":
            x = 0.8 * x + z
        elif self.update == "vector":
            x = self.factor * x + z
        elif self.update == "gate":
            g = torch.sigmoid(self.gate(x))
            x = g * x + (1 - g) * torch.tanh(z)
        elif self.update == "input_gate":
            g = torch.sigmoid(self.factor)
            x = g * x + (1 - g) * torch.tanh(z)
        elif self.update == "lerp":
            x = torch.lerp(x, torch.tanh(z), torch.sigmoid(self.gate(x)))
        elif self.update == "self_gate":
            x = x + x * torch.sigmoid(z)
        if self.after == "relu":
            x = torch.relu(x)
        elif self.after == "mask":
            x = self.mask * x
        else:
            x = self.post(x)
        if self.vector is not None:
            x = x + self.vector
        return x, hidden


class ResidualModel(nn.Module):
    """The model of a :class:`Model`; returns ``{"final", "taps", "penalties"}`` and, with dead ends, ``"ignored"``."""

    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.spec = spec
        widths = [stack.width for stack in spec.stacks]
        self.stem = nn.Linear(widths[0], widths[0]) if spec.stem else nn.Identity()
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.head = nn.Linear(widths[-1], 2) if spec.head else nn.Identity()
        self.stacks = nn.ModuleList()
        for stack in spec.stacks:
            kinds = [stack.blocks[i % len(stack.blocks)] for i in range(stack.depth)]
            links = [Residual(stack, kinds[0], spec)]
            links += [links[0] if stack.shared else Residual(stack, kind, spec) for kind in kinds[1:]]
            self.stacks.append(nn.ModuleList(links))

    def forward(self, x: Tensor) -> dict[str, Any]:
        taps, penalties = [], []
        ignored = x
        x = self.stem(x)
        for number, (stack, links) in enumerate(zip(self.spec.stacks, self.stacks, strict=True)):
            if number:
                x = torch.tanh(self.between[number - 1](x))
            states = [x]
            for i, link in enumerate(links, start=1):
                if stack.skip is not None and stack.skip[1] == i:
                    x = x + states[stack.skip[0]]
                x, hidden = link(x)
                states.append(x)
                if self.spec.dead_ends:
                    torch.cosh(x)
                    ignored = torch.sin(x)
                if i in stack.taps:
                    taps.append(x)
                if i in stack.penalties:
                    penalties.append(hidden)
        found = {"final": self.head(x), "taps": taps, "penalties": penalties}
        return {**found, "ignored": ignored} if self.spec.dead_ends else found


def loss(output: dict[str, Any]) -> Tensor:
    """Of everything the model returns but ``"ignored"``."""
    return probe_loss({key: value for key, value in output.items() if key != "ignored"})


def build(spec: Model) -> tuple[ResidualModel, tuple[Tensor, ...], Any]:
    """``(model, args, loss)`` in float64; the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = ResidualModel(spec).double()
        x = torch.randn(spec.batch, spec.length, spec.stacks[0].width, dtype=torch.float64)
    return model, (x.requires_grad_(spec.input_grad),), loss


# ------------------------------------------------------------------------------------- the model, retold


def program(model: ResidualModel) -> Program:
    """The model of a pinned :class:`Model`, retold for the oracle on the same parameters."""
    spec = model.spec
    if not spec.pinned:
        raise ValueError(f"which chains {spec} has is left open: there is no program for it")

    def forward(run: RunChain, x: Tensor) -> dict[str, Any]:
        taps, penalties = [], []
        ignored = x
        x = model.stem(x)
        for number, (stack, links) in enumerate(zip(spec.stacks, model.stacks, strict=True)):
            if number:
                x = torch.tanh(model.between[number - 1](x))
            chain = run([_link(link, i in stack.penalties) for i, link in enumerate(links, start=1)], (x,))
            taps += [chain.states[i][0] for i in range(1, stack.depth + 1) if i in stack.taps]
            penalties += [outputs[0] for outputs in chain.outputs if outputs]
            (x,) = chain.states[-1]
            if spec.dead_ends:
                ignored = torch.sin(x)
        found = {"final": model.head(x), "taps": taps, "penalties": penalties}
        return {**found, "ignored": ignored} if spec.dead_ends else found

    return Program(dict(model.named_parameters()), forward)


def _link(link: Residual, penalised: bool) -> Link:
    def step(state: Tensors, side: Tensors, hold: Hold) -> tuple[Tensors, Tensors]:
        (x,) = state
        z, hidden = link.block(link.pre(x))
        x = _updated(link, x, z, hold)
        if link.after == "relu":
            x = x.clamp_min(0.0)
        elif link.after == "mask":
            x = x * link.mask
        elif link.after == "layer":
            centred = x - hold(x.mean(-1, keepdim=True))
            deviation = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + link.post.eps)
            x = centred / hold(deviation) * link.post.weight + link.post.bias
        elif link.after == "rms":
            x = x / hold(torch.sqrt(x.square().mean(-1, keepdim=True) + link.post.eps)) * link.post.weight
        if link.vector is not None:
            x = x + link.vector
        return (x,), (hidden,) if penalised else ()

    return Link(step)


def _updated(link: Residual, x: Tensor, z: Tensor, hold: Hold) -> Tensor:
    if link.update == "add":
        return x + hold(z)
    if link.update == "scaled":
        return 0.8 * x + hold(z)
    if link.update == "vector":
        return link.factor * x + hold(z)
    if link.update == "gate":
        g = torch.sigmoid(link.gate(x))
        return hold(g) * x + hold((1 - g) * torch.tanh(z))
    if link.update == "input_gate":
        g = torch.sigmoid(link.factor)
        return g * x + hold((1 - g) * torch.tanh(z))
    if link.update == "lerp":
        g = torch.sigmoid(link.gate(x))
        return hold(1 - g) * x + hold(g * torch.tanh(z))
    assert link.update == "self_gate"
    return x + x * hold(torch.sigmoid(z))
