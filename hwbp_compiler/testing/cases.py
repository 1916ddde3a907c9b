"""The programs that the fuzzer draws, and the settings under which it runs them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from . import strategies
from .blocks import USED_TWICE
from .models import Model, Recurrence, Streams


@dataclass(frozen=True)
class Setting:
    iterations: int
    damping: float
    min_length: int = 2
    rewrite: str = "always"
    segment: int = 1


@st.composite
def cases(draw: st.DrawFn, generated: bool = False) -> tuple[Model, tuple[Setting, ...]]:
    spec, chosen = draw(for_inductor() if generated else programs()), draw(all_settings())
    if any(isinstance(s, Recurrence | Streams) or s.skips or s.update in USED_TWICE for s in spec.stacks):
        # Inside a cell, a block, or where a skip ends, there may be a further chain of one link.
        chosen = tuple(replace(setting, min_length=max(2, setting.min_length)) for setting in chosen)
    return spec, chosen


@st.composite
def all_settings(draw: st.DrawFn) -> tuple[Setting, ...]:
    """One setting for a traced program, sometimes two."""
    one = st.builds(
        Setting,
        strategies.iterations(),
        strategies.dampings(),
        st.sampled_from((2, 2, 2, 1, 3, 4)),
        st.sampled_from(("always",) * 15 + ("profitable",)),
        strategies.segments(),
    )
    return tuple(draw(st.lists(one, min_size=1, max_size=2)))


def programs() -> st.SearchStrategy[Model]:
    """Draw mostly small programs, because the kinds of parts matter, not their size. One program in four uses only two
    different sizes, so that many of its buffers have the same size and are reused.
    """
    return st.integers(0, 3).flatmap(lambda lot: coinciding() if lot == 3 else of_any_size())


def for_inductor() -> st.SearchStrategy[Model]:
    """Draw small programs, because Inductor takes a second for a small one and a minute for a large one. Half of them
    use only two different sizes. Of each of the other kinds there is one in sixteen: two stacks, larger parts, and
    blocks that change something in place, which need all of torch.compile."""
    small: dict[str, Any] = {"max_parts": 2, "max_layers": 1, "in_place": False}
    sizes = st.sampled_from(((2, 3), (3, 4), (3, 4), (4, 5)))
    kinds = {
        7: strategies.models(max_stacks=2, max_depth=3, max_width=3, **{**_ALL_KINDS, **small}),
        6: one_stack(),
        5: one_stack(**{**small, "in_place": True}),
    }
    coincide = sizes.flatmap(lambda two: one_stack(sizes=two, **small))
    return st.integers(0, 15).flatmap(lambda lot: coincide if lot > 7 else kinds.get(lot, one_stack(**small)))


def coinciding() -> st.SearchStrategy[Model]:
    pairs = st.sampled_from(((3, 4), (4, 5), (5, 6), (3, 6)))
    return pairs.flatmap(
        lambda sizes: strategies.models(max_stacks=1, sizes=sizes, skips=True, loops=True, in_streams=True)
    )


_ALL_KINDS: dict[str, Any] = {"skips": True, "loops": True, "dtypes": True, "in_place": True, "in_streams": True}


def one_stack(**limits: Any) -> st.SearchStrategy[Model]:
    return strategies.models(max_stacks=1, max_depth=4, max_width=3, **{**_ALL_KINDS, **limits})


def of_any_size() -> st.SearchStrategy[Model]:
    single = one_stack()
    double = strategies.models(max_stacks=2, max_depth=3, max_width=3, **_ALL_KINDS)
    wide = strategies.models(max_stacks=3, max_depth=6, max_width=6, **_ALL_KINDS)
    return st.integers(0, 15).flatmap(lambda lot: wide if lot == 15 else double if lot > 11 else single)
