"""Residual and recurrent models as plain data; :mod:`.models` builds them.

A :class:`Model` is a few stages (stacks of links, streams, or loops over time) with heavy steps between them. Its
``repr`` shows only what differs from the simplest model, so a failing example is short and can be pasted into a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from .blocks import After, BlockKind, CellKind, Norm, Update

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
        width: width of the state.
        blocks: kinds of block, taken in turn; see :class:`.blocks.Block`.
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
        skip: (i, j): state i is added to the input of link j > i + 1. The chains are then not determined.
        unet: the skips (0, depth), (1, depth - 1), ...
        rereads: the first state is added to every block's input.
        layout: "flat": links work on [batch * length, width]; "swap": the state is transposed in every link.
        frozen: links, 1..depth, whose parameters require no gradient.
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
        width: width of the state.
        cell: kind of cell; see :class:`.blocks.Cell`.
        layers: number of layers.
        every_step: return the states of all steps; else only the last.
        start: the first state is "zeros", "learnt", or "given". "given" means one more argument of the model, [layers,
            2, batch, width], that requires a gradient.
        reverse: run from the last step to the first.
        masked: sequences end at different steps and keep their state from then on: where(mask, new, old).
        frozen: its parameters require no gradient.
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
        """Whether there is an elementwise path from state to state. A masked sequence always has one past its end."""
        return self.cell != "tanh" or self.masked


@dataclass(frozen=True, repr=False)
class Streams(_ReadableRepr):
    """``depth`` steps on a state of ``count`` tensors that feed each other. Each starts as ``tanh(linear(x))``.

    Attributes:
        depth: steps.
        width: width of each component.
        count: components, 2 or 3.
        blocks, update, pre, after: of each component, as in :class:`Stack`. Its block reads a sum of all components.
        in_turns: components are updated one after the other, and each reads what the others have become.
        others: a block does not read its own component.
        taps: steps, 1..depth, whose state the model returns.
        ends: what comes next reads a sum of all components ("sum") or only the "first" one.
    """

    depth: int = 3
    width: int = 3
    count: int = 2
    blocks: tuple[BlockKind, ...] = ("mlp",)
    update: Update = "add"
    pre: PreNorm = "none"
    after: After = "none"
    in_turns: bool = False
    others: bool = False
    taps: tuple[int, ...] = ()
    ends: Literal["sum", "first"] = "sum"

    skips: ClassVar[tuple[tuple[int, int], ...]] = ()
    rereads: ClassVar[bool] = False

    @property
    def updates(self) -> int:
        """How many times the state changes."""
        return self.depth * (self.count if self.in_turns else 1)

    @property
    def updates_used(self) -> int:
        """The updates that the loss depends on: nothing reads what others become after the last of the first one."""
        unread = self.in_turns and self.ends == "first" and self.depth not in self.taps
        return self.updates - (self.count - 1 if unread else 0)

    def weights(self, component: int) -> tuple[float, ...]:
        """How much of each component the block of ``component`` reads."""
        all_of_them = tuple((1.0, -0.5, 2.0)[(i - component) % 3] for i in range(self.count))
        return tuple(0.0 if self.others and i == component else w for i, w in enumerate(all_of_them))


Stage = Stack | Recurrence | Streams


@dataclass(frozen=True, repr=False)
class Model(_ReadableRepr):
    """Stages in a row with ``tanh(linear(x))`` between them, on inputs [batch, length, stacks[0].width].

    Attributes:
        stacks: the stages.
        batch: sequences in a batch.
        length: length of the sequences.
        stem: also start with a linear layer.
        head: end with a linear layer.
        input_grad: the input requires a gradient.
        dead_ends: every state is also used for a value without effect. One such value is returned, but is not part of
            the loss.
        parallel: run the stages side by side: each reads the input, and all outputs are returned.
        dtype: dtype of the parameters and the input.
        dynamic: when compiled through Dynamo, use sizes that are known only at run time.
        seed: seed of the parameters and the input.
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
        """Whether the contract determines the chains, so that truncated gradients can be predicted."""
        return not any(
            isinstance(stage, Streams) or (isinstance(stage, Stack) and (stage.skips or stage.rereads))
            for stage in self.stacks
        )

    @property
    def chain_lengths(self) -> list[int]:
        """The length of every chain, in forward order."""
        return [len(chain) for chain in _chains(self)]

    @property
    def lengths(self) -> list[int]:
        """The length of every stage's input: a recurrence may return only its last state."""
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
        elif isinstance(stage, Streams):
            yield range(stage.updates_used)
        elif stage.has_highway:
            yield from [range(length)] * stage.layers
