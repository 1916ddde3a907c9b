"""Hypothesis strategies for random residual models; shrinks to ``Model()``, three residual MLP blocks of width 3.

    @given(testing.strategies.models())
    def test_something(spec):
        model, args, loss = models.build(spec)
        _, expected = testing.reference_gradients(models.program(model), args, loss, iterations=1)
"""

from __future__ import annotations

from typing import get_args

from hypothesis import strategies as st

from .models import After, BlockKind, Model, PreNorm, Stack, Update


@st.composite
def stacks(draw: st.DrawFn, max_depth: int = 6, max_width: int = 6, skips: bool = False) -> Stack:
    """One stack of links. ``skips``: some have a long skip over links, and with it no predictable chains."""
    depth = draw(st.integers(3, max_depth))
    links = st.lists(st.integers(1, depth), unique=True, max_size=depth).map(lambda found: tuple(sorted(found)))
    skip = None
    if skips and draw(st.booleans()):
        start = draw(st.integers(0, depth - 2))
        skip = (start, draw(st.integers(start + 2, depth)))
    return Stack(
        depth=depth,
        width=draw(st.integers(3, max_width)),
        blocks=tuple(draw(st.lists(st.sampled_from(get_args(BlockKind)), min_size=1, max_size=3))),
        update=draw(st.sampled_from(get_args(Update))),
        pre=draw(st.sampled_from(get_args(PreNorm))),
        after=draw(st.sampled_from(get_args(After))),
        shared=draw(st.booleans()),
        vectors=draw(st.booleans()),
        taps=draw(links),
        penalties=draw(links),
        skip=skip,
    )


@st.composite
def models(
    draw: st.DrawFn, max_stacks: int = 3, max_depth: int = 6, max_width: int = 6, skips: bool = False
) -> Model:
    """A whole model. Without ``skips`` every model is pinned: :func:`..models.program` can retell it."""
    stack = stacks(max_depth, max_width, skips)
    return Model(
        stacks=tuple(draw(st.lists(stack, min_size=1, max_size=max_stacks))),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 4)),
        stem=draw(st.booleans()),
        head=draw(st.booleans()),
        input_grad=draw(st.booleans().map(lambda flag: not flag)),
        dead_ends=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


def iterations() -> st.SearchStrategy[int]:
    """k: mostly short of a chain's length, sometimes beyond it."""
    return st.integers(0, 7)


def dampings() -> st.SearchStrategy[float]:
    """gamma: both ends and what lies between."""
    return st.sampled_from((0.0, 1.0, 0.2, 0.5, 0.8))
