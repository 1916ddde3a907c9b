"""What ``torch.compile(..., backend="highway", mode=..., options=...)`` accepts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from math import inf
from numbers import Integral, Real
from typing import Any, Literal, NoReturn

import torch
from torch._inductor import list_mode_options, list_options

from .errors import OptionError
from .memory import memory_of
from .torch_private import inductor_option_type, inductor_patches

REWRITES = ("profitable", "always", "never")
REROLLS = ("auto", "always", "never")


@dataclass(frozen=True)
class Truncation:
    """How a chain's gradient is truncated: k, gamma and S of :class:`Options`, with k below ordinary backprop."""

    iterations: int
    damping: float = 0.0
    segment: int = 1

    def segments(self, length: Any) -> Any:
        """C, the number of segments of a chain of ``length`` links, which may be a symbol. The segment next to the
        input takes the remainder.
        """
        return (length + self.segment - 1) // self.segment

    def needed(self, length: int) -> int:
        """The fewest iterations that equal ordinary backprop for a chain of ``length`` links: L, or C - 1 with
        segments.

        With segments it is not C, because the first state of all ends a segment, so its gradient needs no further
        iteration.
        """
        return length if self.segment == 1 else -(-length // self.segment) - 1

    def __str__(self) -> str:
        return f"k = {self.iterations}, S = {self.segment}" + (f", gamma = {self.damping:g}" if self.damping else "")

    @property
    def reach(self) -> int:
        """The number of links over which at least no path is lost."""
        return self.iterations if self.segment == 1 else (self.iterations + 1) * self.segment


# Means "auto" if ``iterations`` is "auto", and the paper's value otherwise.
UNSAID: Any = object()


@dataclass(frozen=True)
class Options:
    """The highway's own options; a bad value raises :class:`OptionError`.

    iterations     k of PAPER.md, section 1: an integer >= 0, or "exact" for ordinary backprop
    segment        S, links per segment: exact inside a segment, highway across. An integer >= 1; 1 is the paper
    damping        gamma of PAPER.md, section 2: a number in [0, 1]
    target_cosine  what "auto" keeps the cosine of the gradient with the exact one above: a number between 0 and 1
    check_every    training steps between two checks of "auto": an integer >= 1
    max_extra_memory   what the rewritten form of a chain may hold at a time beyond exact backprop: bytes, or a share of
                   the device's memory such as "25%"; None for any. A chain that needs more stays exact
    reroll         Python loops over time, which Dynamo unrolls, rolled up again. "auto": those of 16 steps or more
                   that are expected to take long to compile; "always": every loop of three steps or more; "never": none
    rewrite        "profitable": chains expected to gain; "always": every sound chain; "never": plain Inductor
    min_length     the shortest chain, in links, worth rewriting: an integer >= 1
    strict         raise :class:`HighwayError` when a step fails, instead of compiling the graph as it is

    ``iterations``, ``segment`` and ``damping`` may be "auto": chosen while the model trains, by comparing with the
    exact gradient (:mod:`hwbp_compiler.auto`). All three are, unless something is said; a number for ``iterations``
    alone means the paper, ``segment=1`` and ``damping=0.0``.
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
        """The options by name, for display. Leaves out what only "auto" reads if nothing is "auto", an absent memory
        limit, and ``reroll`` at its default.
        """
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        unread = set() if self.auto else {"target_cosine", "check_every"}
        unread |= {"max_extra_memory"} if self.max_extra_memory is None else set()
        unread |= {"reroll"} if self.reroll == "auto" else set()
        return {key: value for key, value in found.items() if key not in unread}

    @property
    def auto(self) -> bool:
        """Whether anything is chosen while the model trains."""
        return self.iterations != "exact" and "auto" in (self.iterations, self.segment, self.damping)

    def tried(self, length: int) -> list[Truncation]:
        """The truncations that may be written out for a chain of ``length`` links; more than one only with "auto". None
        of them is ordinary backprop.
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
        return Truncation(iterations, self.damping, self.segment)  # type: ignore[arg-type]

    def at(self, how: Truncation) -> Options:
        """These options with the numbers of ``how`` in place of "auto". The options that control the choice return to
        their defaults.
        """
        return replace(self, iterations=how.iterations, segment=how.segment, damping=how.damping, **_HOW_TO_CHOOSE)

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
        """What to write out for a chain of ``length`` links. None if that is ordinary backprop, or not chosen yet."""
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


def _is(value: Any, word: str) -> bool:
    """Equality that is safe for any ``value``: comparing an array, say, does not give a bool."""
    return isinstance(value, str) and value == word


_HOW_TO_CHOOSE: dict[str, Any] = {"target_cosine": Options.target_cosine, "check_every": Options.check_every}

_SHARE = re.compile(r"\d+(\.\d+)?%")

# The values of k that "auto" tries with every segment length.
_ITERATIONS = [0, 1, 2, 4]

# The class that ``parse`` instantiates. Tests replace it with one that writes out more rounds.
made_by: ContextVar[type[Options]] = ContextVar("made_by", default=Options)

_DEFAULTS = {field.name: field.default for field in fields(Options)} | {"segment": "auto", "damping": "auto"}


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
