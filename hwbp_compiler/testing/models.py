"""Residual and recurrent models made from plain data, each paired with its programs for the oracle.

A :class:`Model` is a few stages (stacks of links, streams, or loops over time) with heavy steps between them. Its
``repr`` shows only what differs from the simplest model, so a failing example is short and can be pasted into a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .losses import probe_loss
from .modules import Links, Loop, ResidualModel
from .reference import Hold, Link, Program, RunChain, Tensors, keep
from .residual import Residual
from .specs import Model, Recurrence, Stack, Stage, Streams
from .streams import Cut, StreamLinks, cuts, retold

__all__ = ["Model", "Recurrence", "Stack", "Stage", "Streams", "build", "loss", "program", "programs"]


def loss(output: dict[str, Any]) -> Tensor:
    """A loss of everything the model returns except ``"ignored"``."""
    return probe_loss({key: value for key, value in output.items() if key != "ignored"})


def build(spec: Model) -> tuple[ResidualModel, tuple[Tensor, ...], Any]:
    """``(model, args, loss)``; the same numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        dtype = getattr(torch, spec.dtype)
        model = ResidualModel(spec).to(dtype)
        x = torch.randn(spec.batch, spec.length, spec.stacks[0].width, dtype=torch.float64).to(dtype)
        loops = [stage for stage in spec.stacks if isinstance(stage, Recurrence) and stage.start == "given"]
        given = [torch.randn(s.layers, 2, spec.batch, s.width, dtype=torch.float64).to(dtype) for s in loops]
    return model, (x.requires_grad_(spec.input_grad), *(h.requires_grad_() for h in given)), loss


# ----------------------------------------------------------------------------- the model as a program of the oracle


def program(model: ResidualModel) -> Program:
    """The model of a pinned :class:`Model` as a program of the oracle, on the same parameters."""
    if not model.spec.pinned:
        raise ValueError(f"{model.spec} does not determine its chains: there is no single program for it")
    return next(programs(model))


def programs(model: ResidualModel) -> Iterator[Program]:
    """Every sound choice of chains in the model: one if the model is pinned, many if links are skipped.

    Highway-BP is sound with any of them, and a compiler may use any. If every block reads the first state, it is open
    for the first block whether this is its state or a side input.
    """
    skipped = [stage.spec for stage in model.stacks if isinstance(stage, Links) and stage.spec.skips]
    streams = [stage.spec for stage in model.stacks if isinstance(stage, StreamLinks)]
    if len(skipped) > 1 or len(streams) > 1:
        raise ValueError(f"{model.spec} has more than one stack of a kind that can be read in several ways")
    rereads = any(isinstance(stage, Links) and stage.spec.rereads for stage in model.stacks)
    ways = itertools.product(
        _readings(skipped[0]) if skipped else [()],
        cuts(streams[0]) if streams else [()],
        (True, False) if rereads else (True,),
        (False, True) if any(spec.in_turns and spec.taps for spec in streams) else (False,),
    )
    for way in ways:

        def forward(run: RunChain, x: Tensor, *states: Tensor, way: Way = way) -> dict[str, Any]:
            return _retold(model, run, x, states, *way)

        yield Program(dict(model.named_parameters()), forward)


Reading = tuple[tuple[int, ...], ...]
"""Chains by their states, for example ((0, 1, 2), (2, 4)): everything between two successive states is one link. State
i of a stack is what link i returns, plus what skips add to it. A last state written as -i excludes what skips add.
"""

Way = tuple[Reading, Cut, bool, bool]
"""How skips, streams, a first state that is read again, and the returned states of streams are read."""


def _readings(stack: Stack) -> Iterator[Reading]:
    """All sound readings of at most two chains of at least two links, longest first. Links in no chain are exact."""
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
    """Whether no skip bypasses one of ``states``: each comes from before the chain, or from inside the link it leads
    to.
    """
    for source, link in stack.skips:
        target = link - 1
        if states[0] < target <= states[-1] - bare:
            start = max(state for state in states if state < target)
            if states[0] < source < start:
                return False
    return True


def _retold(
    model: ResidualModel,
    run: RunChain,
    x: Tensor,
    given: tuple[Tensor, ...],
    reading: Reading,
    cut: Cut,
    apart: bool,
    late: bool,
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
        elif isinstance(stage, StreamLinks):
            together = retold(stage, cut, run, x, context)
            found["taps"] += stage.taps(together, late)
            x = stage.last(together)
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
    """``its_own``: the first state, which the block reads, is also the link's state."""

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
    known = {0: x}  # state by number, including what skips add
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
    # No state that a skip adds to is read before the addition: see ``strategies.stacks``.
    return [known[i] for i in range(spec.depth + 1)], [penalties[i] for i in spec.penalties]


def _between(stage: Links, start: int, end: int, outside: dict[int, Tensor], context: Tensor, bare: bool) -> Link:
    """State ``start`` to state ``end`` as one link. The states between them and all penalties are side outputs."""
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
