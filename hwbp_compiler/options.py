"""What ``torch.compile(..., backend="highway", mode=..., options=...)`` accepts."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch._inductor import list_mode_options, list_options

from .errors import OptionError
from .memory import memory_of
from .torch_private import inductor_option_type, inductor_patches

REWRITES = ("profitable", "always", "never")
REROLLS = ("auto", "always", "never")


@dataclass(frozen=True)
class Truncation:
    """How a chain's gradient is truncated.

    Attributes:
        iterations: k, fewer than ordinary backprop needs.
        damping: gamma, from 0 to 1.
        segment: S, links per segment.
        watched: whether the last iteration's change of w is measured (:mod:`hwbp_compiler.engine.watch`).
    """

    iterations: int
    damping: float = 0.0
    segment: int = 1
    watched: bool = field(default=False, repr=False)

    def segments(self, length: Any) -> Any:
        """C, the number of segments in a chain of ``length`` links. It is a symbol if ``length`` is one. The segment
        next to the input may be shorter than the others."""
        return (length + self.segment - 1) // self.segment

    def needed(self, length: int) -> int:
        """The fewest iterations that give ordinary backprop for a chain of ``length`` links: L, or C - 1 with segments.

        With segments, the gradient of the chain's first state comes out of the last run through a segment. It needs no
        iteration of its own.
        """
        return length if self.segment == 1 else -(-length // self.segment) - 1

    def __str__(self) -> str:
        return f"k = {self.iterations}, S = {self.segment}" + (f", gamma = {self.damping:g}" if self.damping else "")

    @property
    def reach(self) -> int:
        """How many links a gradient can cross without losing a path: k, or (k + 1) S with segments."""
        return self.iterations if self.segment == 1 else (self.iterations + 1) * self.segment


# Means "auto" if ``iterations`` is "auto", and the paper's value otherwise.
UNSAID: Any = object()


@dataclass(frozen=True)
class Options:
    """The options of ``torch.compile(..., backend="highway")`` that are not Inductor's.

    ``iterations``, ``segment`` and ``damping`` may be "auto", which is their default. They are then chosen while the
    model trains, by comparing gradients with the exact one. If ``iterations`` is a number and the other two are not
    given, they have the paper's values: ``segment=1`` and ``damping=0.0``. Each option is also an attribute of the same
    name.

    Args:
        iterations: k, an integer >= 0, "exact" or "auto". The gradient is the sum over all paths that cross at most k
            blocks (Fagnou et al., ICLR 2025, Theorems 1 and 2). "exact" is ordinary backprop. So is any k >= L, where L
            is the number of links in the chain.
        segment: S, links per segment, an integer >= 1 or "auto". The gradient is exact inside a segment, and k counts
            segments (docs/design.md, section 4.6, "Segments"). S = 1 is the paper's algorithm. For S > 1, any
            k >= C - 1 is ordinary backprop, where C = ceil(L / S) is the number of segments.
        damping: gamma, a number in [0, 1] or "auto": K -> (1 - gamma) K and J -> J + gamma K. gamma = 1 is fixed-point
            iteration.
        target_cosine: a number between 0 and 1, both excluded. "auto" uses an approximate gradient only if its cosine
            with the exact parameter gradient was at least this at the last check.
        check_every: training steps from one check of "auto" to the next, an integer >= 1.
        max_extra_memory: the most memory that a rewritten chain may need at one time beyond exact backprop. Bytes, a
            share of the device's memory such as "25%", or None for no limit. A chain that needs more stays exact.
        reroll: which Python loops over time to roll up again after Dynamo has unrolled them. "auto": loops of 16 or
            more steps that are expected to take long to compile. "always": loops of three or more steps. "never": none.
        rewrite: which chains to rewrite. "profitable": those that are expected to become faster. "always": all that can
            be rewritten soundly. "never": none; this is plain Inductor.
        min_length: the shortest chain to rewrite, in links, an integer >= 1.
        strict: if a step fails, raise :class:`HighwayError` instead of compiling the graph unchanged.

    Raises:
        OptionError: a value is not allowed. The message says which values are.
    """

    iterations: int | Literal["exact", "auto"] = "auto"
    segment: int | Literal["auto"] = UNSAID
    damping: float | Literal["auto"] = UNSAID
    target_cosine: float = 0.99
    check_every: int = 200
    max_extra_memory: int | str | None = None
    reroll: Literal["auto", "always", "never"] = "auto"
    rewrite: Literal["profitable", "always", "never"] = "profitable"
    min_length: int = 4
    strict: bool = False
    watched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        searching = _is(self.iterations, "auto")
        for key, paper in (("segment", 1), ("damping", 0.0)):
            if getattr(self, key) is UNSAID:
                set_(self, key, "auto" if searching else paper)
        if not (_is(self.iterations, "exact") or _is(self.iterations, "auto")):
            set_(self, "iterations", self._integer("iterations", 0, ', "exact" (ordinary backprop) or "auto"'))
        if not _is(self.segment, "auto"):
            set_(self, "segment", self._integer("segment", 1, ' or "auto"'))
        set_(self, "min_length", self._integer("min_length", 1))
        set_(self, "check_every", self._integer("check_every", 1))
        if not _is(self.damping, "auto"):
            set_(self, "damping", self._fraction("damping", ' or "auto"'))
        set_(self, "target_cosine", self._cosine("target_cosine"))
        set_(self, "max_extra_memory", self._memory("max_extra_memory"))
        for key, allowed in (("rewrite", REWRITES), ("reroll", REROLLS)):
            value = getattr(self, key)
            if not (isinstance(value, str) and value in allowed):
                _refuse(key, value, f"one of {', '.join(map(repr, allowed))}", _DEFAULTS[key])
        if not isinstance(self.strict, bool):
            _refuse("strict", self.strict, "True or False", False)

    def shown(self) -> dict[str, Any]:
        """The options by name, for display. Options that have no effect are left out: those that only "auto" reads
        if nothing is "auto", the memory limit if there is none, and ``reroll`` if it has its default.
        """
        found = {name: getattr(self, name) for name in _DEFAULTS}
        unread = set() if self.auto else {"target_cosine", "check_every"}
        unread |= {"max_extra_memory"} if self.max_extra_memory is None else set()
        unread |= {"reroll"} if self.reroll == "auto" else set()
        return {key: value for key, value in found.items() if key not in unread}

    @property
    def auto(self) -> bool:
        """Whether anything is chosen while the model trains."""
        return self.iterations != "exact" and "auto" in (self.iterations, self.segment, self.damping)

    def tried(self, length: int) -> list[Truncation]:
        """The truncations that a chain of ``length`` links may get. Only "auto" gives more than one. Ordinary backprop
        is never among them.
        """
        if not self.auto:
            found = self.truncation(length)
            return [] if found is None else [found]
        powers = [2**i for i in range(1, 20) if 2 * 2**i < length]
        sizes = [1, *powers] if self.segment == "auto" else [self.segment]
        counts = _ITERATIONS if self.iterations == "auto" else [int(self.iterations)]
        damping = 0.0 if self.damping == "auto" else self.damping
        tried = [Truncation(k, damping, s) for s in sizes for k in counts]
        return [how for how in tried if how.iterations < how.needed(length)]

    @property
    def numbers(self) -> Truncation:
        """k, gamma and S, if none of them is "auto". ("exact" gives k = 0 here, which is never used.)"""
        assert not self.auto
        iterations = self.iterations if isinstance(self.iterations, int) else 0
        return Truncation(iterations, self.damping, self.segment, self.watched)  # type: ignore[arg-type]

    def at(self, how: Truncation, *, watched: bool = False) -> Options:
        """These options with the numbers of ``how`` in place of "auto". The options that control the choice return to
        their defaults. If ``watched``, the compiled form also measures what its last iteration changes.
        """
        found = replace(self, iterations=how.iterations, segment=how.segment, damping=how.damping, **_HOW_TO_CHOOSE)
        if not watched:
            return found
        kind: Any = type(self)
        return _watched(kind)(**{name: getattr(found, name) for name in _DEFAULTS})

    def in_numbers(self) -> Options:
        """These options with k = 4 and the paper's other values in place of "auto", for callers that need a single
        form.
        """
        return replace(
            self,
            iterations=4 if self.iterations == "auto" else self.iterations,
            segment=1 if self.segment == "auto" else self.segment,
            damping=0.0 if self.damping == "auto" else self.damping,
        )

    def exactly(self) -> Options:
        """These options with ordinary backprop."""
        return replace(self, iterations="exact", segment=1, damping=0.0, **_HOW_TO_CHOOSE)

    def truncation(self, length: int) -> Truncation | None:
        """The truncation for a chain of ``length`` links. None for ordinary backprop, or if "auto" is to choose."""
        if self.iterations == "exact" or self.auto:
            return None
        how = self.numbers
        return how if how.iterations < how.needed(length) else None

    def needed(self, length: int) -> int:
        """See :meth:`Truncation.needed`."""
        return Truncation(0, segment=1 if self.segment == "auto" else self.segment).needed(length)

    # numpy's numbers register as Integral and Real. A bool is an int to Python, but a user who passes one as a count
    # made a mistake.
    def _integer(self, key: str, least: int, also: str = "") -> int:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
            _refuse(key, value, f"an integer >= {least}{also}", _DEFAULTS[key])
        return int(value)

    def _fraction(self, key: str, also: str = "") -> float:
        value = getattr(self, key)
        # This form refuses nan, which compares false with everything.
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            _refuse(key, value, f"a number from 0 to 1{also}", _DEFAULTS[key])
        return float(value)

    def _memory(self, key: str) -> int | str | None:
        value = getattr(self, key)
        if isinstance(value, str) and _SHARE.fullmatch(value) and 0 < float(value[:-1]) <= 100:
            return value
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
            _refuse(key, value, 'bytes, an integer >= 0, a share of the device\'s memory such as "25%", or None', "25%")
        return int(value)

    def memory_limit(self, device: torch.device) -> float:
        """``max_extra_memory`` in bytes."""
        limit = self.max_extra_memory
        if isinstance(limit, str):
            return float(limit[:-1]) / 100 * memory_of(device)
        return inf if limit is None else float(limit)

    def _cosine(self, key: str) -> float:
        value = getattr(self, key)
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < 1:
            _refuse(key, value, "a number between 0 and 1, both excluded", _DEFAULTS[key])
        return float(value)


@functools.cache
def _watched(kind: Any) -> type[Options]:
    """Options that are watched equal no others, and have another text, which is a key in torch.compile's caches."""
    return type(f"Watched{kind.__name__}", (kind,), {"watched": True})


def _is(value: Any, word: str) -> bool:
    """Equality that is safe for any ``value``: comparing an array, say, does not give a bool."""
    return isinstance(value, str) and value == word


_HOW_TO_CHOOSE: dict[str, Any] = {"target_cosine": Options.target_cosine, "check_every": Options.check_every}

_SHARE = re.compile(r"\d+(\.\d+)?%")

# The values of k that "auto" tries with every segment length.
_ITERATIONS = [0, 1, 2, 4]

# The class that ``parse`` instantiates. Tests replace it with one that writes out more rounds.
made_by: ContextVar[type[Options]] = ContextVar("made_by", default=Options)

_DEFAULTS = {field.name: field.default for field in fields(Options)} | {
    "segment": "auto",
    "damping": "auto",
}


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> tuple[Options, dict[str, Any]]:
    """Split ``options`` into ours and Inductor's.

    Returns the highway's :class:`Options`, and the config patches that Inductor derives from ``mode`` and from all
    other keys. As in Inductor, a dash in a key counts as an underscore. Raises :class:`OptionError` for anything that
    neither accepts.
    """
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(
            f'backend="highway": options = {options!r} is a {type(options).__name__}; it takes a dict '
            'such as {"iterations": 4}. Pass options={...}, or leave it out for the defaults.'
        )
    ours: dict[str, Any] = {}
    patches = _mode_patches(mode)
    for key, value in (options or {}).items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name in _DEFAULTS:
            ours[name] = value
        else:
            patches.update(_inductor_patch(key, name, value))
    return made_by.get()(**ours), patches


def _mode_patches(mode: str | None) -> dict[str, Any]:
    try:
        return inductor_patches(mode, None)
    except (RuntimeError, TypeError):  # TypeError: the mode is not even hashable
        allowed = ", ".join(map(repr, list_mode_options()))
        raise OptionError(
            f'backend="highway": mode = {mode!r} is not allowed; it takes one of {allowed}. '
            'Use one of these, or leave mode out for "default".'
        ) from None


def _inductor_patch(key: Any, name: Any, value: Any) -> dict[str, Any]:
    known = list_options()
    if name not in known:
        near = difflib.get_close_matches(str(name), [*_DEFAULTS, *known], n=3)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Nothing is called similarly."
        raise OptionError(
            f'backend="highway": option {key!r} (given as {value!r}) is known neither to it nor to Inductor. '
            f"{hint} The highway's own options are {', '.join(map(repr, _DEFAULTS))}; "
            "torch._inductor.list_options() lists the rest. Rename the key or remove it."
        )
    try:
        return inductor_patches(None, {name: value})
    except RuntimeError:
        _refuse(key, value, f"a value of type {inductor_option_type(name)} (an option of Inductor's)")


def _refuse(key: str, value: Any, allowed: str, example: Any = None) -> NoReturn:
    advice = (
        f"Pass such a value, for example options={{{key!r}: {example!r}}}, or leave the key out."
        if example is not None
        else "Pass such a value, or leave the key out."
    )
    raise OptionError(
        f'backend="highway": option {key!r} = {value!r} ({type(value).__name__}) is not allowed; '
        f"it takes {allowed}. {advice}"
    )
