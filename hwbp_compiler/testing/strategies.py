"""Hypothesis strategies for random models. The smallest model has three residual MLP blocks of width 2.

@given(testing.strategies.models())
def test_something(spec):
    model, args, loss = models.build(spec)
    _, expected = testing.reference_gradients(models.program(model), args, loss, iterations=1)
"""

from __future__ import annotations

from typing import Any, get_args

from hypothesis import strategies as st

from .blocks import After, BlockKind, CellKind, Norm, Update
from .models import Model, Recurrence, Stack, Streams

_often_false = st.sampled_from((False, False, False, True))


Sizes = tuple[int, ...] | None


def _size(sizes: Sizes, least: int, most: int) -> st.SearchStrategy[int]:
    """One of ``sizes``, or any number from ``least`` to ``most`` if ``sizes`` is None."""
    return st.integers(least, most) if sizes is None else st.sampled_from([s for s in sizes if s >= least])


@st.composite
def stacks(
    draw: st.DrawFn, max_depth: int = 6, max_width: int = 6, skips: bool = False, dtypes: bool = False,
    sizes: Sizes = None, in_place: bool = False, max_parts: int = 3,
) -> Stack:  # fmt: skip
    """A strategy for one stack of links.

    Args:
        max_depth: the most links.
        max_width: the largest width of the state.
        skips: also draw long skips over links, and blocks that all read the first state. The chains of such models
            cannot be predicted.
        dtypes: also draw stacks that compute in float32 inside.
        sizes: the sizes from which depth and width are drawn; None for any size up to the limits.
        in_place: also draw blocks that change slices in place. ``testing.capture`` accepts these, ``testing.trace``
            does not.
        max_parts: the most kinds of parts in a block.

    Returns:
        A strategy that draws a :class:`..models.Stack`.
    """
    left_out = {name for name, wanted in {"cast": dtypes, "in_place": in_place}.items() if not wanted}
    kinds, afters = (
        st.sampled_from([kind for kind in get_args(names) if kind not in left_out]) for names in (BlockKind, After)
    )
    depth = draw(_size(sizes, 3, max_depth))
    some = st.lists(st.integers(1, depth), unique=True, max_size=depth).map(lambda found: tuple(sorted(found)))
    links = st.one_of(st.just(()), some)
    skip = None
    unet = skips and depth > 3 and draw(_often_false)
    if skips and not unet and draw(st.booleans()):
        start = draw(st.integers(0, depth - 2))
        skip = (start, draw(st.integers(start + 2, depth)))
    joins = {j - 1 for _, j in Stack(depth=depth, skip=skip, unet=unet).skips}
    # A state read before a skip is added to it would be ambiguous: a state, or a side output of its link?
    taps = links.map(lambda found: tuple(i for i in found if i not in joins))
    blocks = tuple(draw(st.lists(kinds, min_size=1, max_size=max_parts)))
    return Stack(
        depth=depth,
        width=draw(_size(sizes, min(2, max_width), max_width)),
        blocks=blocks,
        update=draw(st.sampled_from(get_args(Update))),
        pre=draw(st.sampled_from(get_args(Norm))),
        # An operation after the last link belongs to it only if the other links end the same way, but links before a
        # skip do not.
        after="none" if joins else draw(st.one_of(st.just("none"), afters)),
        # Links that share weights are of the same kind.
        shared=draw(st.sampled_from((0, 0, len(blocks)))),
        vectors=draw(_often_false),
        taps=draw(taps),
        heads=draw(st.booleans()),
        penalties=draw(links),
        skip=skip,
        unet=unet,
        rereads=skips and not joins and draw(_often_false),
        layout=draw(st.sampled_from(("none", "none", "flat", "swap"))),
        frozen=draw(st.one_of(st.just(()), st.just(()), links)),
    )


@st.composite
def recurrences(draw: st.DrawFn, max_width: int = 6, sizes: Sizes = None, max_layers: int = 2) -> Recurrence:
    """A strategy for a loop over time.

    Args:
        max_width: the largest width of the state.
        sizes: the sizes from which the width is drawn; None for any size up to the limit.
        max_layers: 1 or 2, the most layers of the cell.

    Returns:
        A strategy that draws a :class:`..models.Recurrence`.
    """
    cell = draw(st.sampled_from(get_args(CellKind)))
    return Recurrence(
        width=draw(_size(sizes, min(2, max_width), max_width)),
        cell=cell,
        layers=min(draw(st.sampled_from((1, 1, 2))), max_layers),
        every_step=draw(st.sampled_from((True, False))),
        start=draw(st.sampled_from(("zeros", "learnt", "given"))),
        reverse=draw(_often_false),
        # If both state and memory cell bypass the step, more than three values do, and the chain is not determined.
        masked=cell not in ("lstm", "peephole") and draw(_often_false),
        frozen=draw(_often_false),
    )


@st.composite
def streams(draw: st.DrawFn, max_width: int = 6, sizes: Sizes = None, max_parts: int = 2) -> Streams:
    """A strategy for a stack whose state is two or three tensors that feed each other.

    It has five or six steps: in a shorter one, each stream may be a chain of its own.

    Args:
        max_width, max_parts: the largest width, the most kinds of blocks.
        sizes: the sizes from which the width is drawn; None for any size up to the limit.

    Returns:
        A strategy that draws a :class:`..models.Streams`.
    """
    depth, count = draw(st.integers(5, 6)), draw(st.sampled_from((2, 2, 3)))
    blocks = st.sampled_from([kind for kind in get_args(BlockKind) if kind not in ("cast", "in_place")])
    taps = st.sets(st.integers(1, depth)).map(lambda found: tuple(sorted(found)))
    in_turns, others = draw(st.booleans()), draw(_often_false)
    # If a link is more than one update, the order of a factor and of what others read is open, and so is where in the
    # link a gradient enters.
    open_ = in_turns and others
    factors = () if open_ else ("scaled", "vector", "gate", "lerp", "scalar")
    return Streams(
        depth=depth,
        width=draw(_size(sizes, min(2, max_width), max_width)),
        count=count,
        blocks=tuple(draw(st.lists(blocks, min_size=1, max_size=max_parts))),
        update=draw(st.sampled_from(("add", "subtract", *factors))),
        pre=draw(st.sampled_from(("none", "none", "layer", "rms"))),
        after=draw(st.sampled_from(("none", "none", "none", "tanh", "silu"))),
        in_turns=in_turns,
        others=others,
        taps=() if open_ else draw(st.one_of(st.just(()), taps)),
        # Of three streams that do not read themselves, the first links may be lost if the loss reads only one.
        ends="sum" if others and count == 3 else draw(st.sampled_from(("sum", "first"))),
    )


@st.composite
def models(
    draw: st.DrawFn, max_stacks: int = 3, max_depth: int = 6, max_width: int = 6, skips: bool = False,
    loops: bool = False, dtypes: bool = False, sizes: Sizes = None, in_place: bool = False, max_parts: int = 3,
    max_layers: int = 2, in_streams: bool = False,
) -> Model:  # fmt: skip
    """A strategy for a whole model.

    Args:
        max_stacks: the most stages.
        max_depth: the most links of a stack.
        max_width: the largest width of a state.
        skips: see :func:`stacks`. Without skips, :func:`..models.program` can describe every model for the oracle.
        loops: also draw recurrences.
        dtypes: also draw models in float32, or with casts inside.
        sizes: the sizes from which all sizes are drawn, so that many buffers have the same size; None for any size up
            to the limits.
        in_place, max_parts: see :func:`stacks`.
        max_layers: see :func:`recurrences`.
        in_streams: also draw one stack of :func:`streams`.

    Returns:
        A strategy that draws a :class:`..models.Model`. :func:`..models.build` turns it into a module.
    """
    limits: dict[str, Any] = {"dtypes": dtypes, "sizes": sizes, "in_place": in_place, "max_parts": max_parts}
    stage: st.SearchStrategy = stacks(max_depth, max_width, **limits)
    if loops:
        stage = st.one_of(stage, stage, recurrences(max_width, sizes, max_layers))
    stages = draw(st.lists(stage, min_size=1, max_size=max_stacks))
    if skips and draw(st.booleans()):  # at most one stack, because each can be read in several ways
        stages[draw(st.integers(0, len(stages) - 1))] = draw(stacks(max_depth, max_width, skips=True, **limits))
    elif in_streams and draw(st.integers(0, 7)) == 7:
        found = draw(streams(max_width, sizes, min(max_parts, 2)))
        stages[draw(st.integers(0, len(stages) - 1))] = found
    recurrent = any(isinstance(stage, Recurrence) for stage in stages)
    batched = any(isinstance(stage, Stack) and "batch" in (stage.pre, stage.after) for stage in stages)
    return Model(
        stacks=tuple(stages),
        batch=draw(_size(sizes, 2 if batched else 1, 3)),  # torch refuses the variance of a single value
        length=draw(_size(sizes, 3, 7) if recurrent else _size(None if sizes is None else (1, *sizes), 1, 4)),
        stem=draw(st.booleans()),
        head=draw(st.booleans()),
        input_grad=draw(st.booleans().map(lambda flag: not flag)),
        dead_ends=draw(_often_false),
        parallel=len(stages) > 1 and draw(_often_false),
        dtype="float32" if dtypes and draw(st.integers(0, 9)) == 9 else "float64",
        dynamic=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def iterations() -> st.SearchStrategy[int]:
    """A strategy for k: mostly below a chain's length, sometimes beyond it."""
    return st.sampled_from((0, 1, 2, 1, 2, 3, 4, 5, 7))


def dampings() -> st.SearchStrategy[float]:
    """A strategy for gamma: 0, 1, and values between."""
    return st.sampled_from((0.0, 1.0, 0.2, 0.5, 0.8))


def segments() -> st.SearchStrategy[int]:
    """A strategy for S: mostly 1, the paper."""
    return st.sampled_from((1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 5, 8))
