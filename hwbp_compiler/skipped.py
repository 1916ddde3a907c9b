"""Let our backend trace frames that Dynamo has given up for other backends.

Note [Skipped frames]
~~~~~~~~~~~~~~~~~~~~~
If Dynamo finds nothing to compile in a frame, it marks the frame's code as skipped. From then on it looks at no call of
that code, in any module and for any backend (pytorch issue 141184). Other backends break the graph at ``nn.GRU`` and
similar modules, so Dynamo skips a wrapper around one. Under our backend the call stays in the graph, but Dynamo would
never look at the frame again.

So the marks are lifted while a callable compiled with our backend runs, and put back as torch made them when it
returns. A mark applies to our backend only if Dynamo gave the frame up while the same callable ran. While a mark is
lifted, other backends (in another thread, or called from within) still get the answer that the mark would give.

Frames skipped before this module was loaded are not known. Their marks are removed once, so other backends look at
those frames again. ``watch_frames`` wraps Dynamo's conversion of frames, so this module sees what becomes of each
frame; a frame found in the cache never gets here.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any
from weakref import ref

from .errors import HighwayError
from .torch_private import (
    CacheHits,
    ConvertFrameReturn,
    FrameAction,
    FrameExecStrategy,
    compiles_now,
    in_an_isolated_region,
    is_for_us,
    never_traced,
    seen_codes,
    set_code_exec_strategy,
    was_seen,
    watch_frames,
)

log = logging.getLogger(__name__)

_TRACE = FrameExecStrategy(FrameAction.DEFAULT, FrameAction.DEFAULT)


class Compiled:
    """One callable that is compiled with our backend.

    strict    raise HighwayError if the first call compiled nothing; otherwise that is only a warning
    given     options and mode: those passed to ``torch.compile``, with later changes
    options   the options that replace them from the next call on; None if they are unchanged
    meter     the gradient meter attached to it
    """

    _numbers = itertools.count()

    def __init__(
        self,
        strict: bool = False,
        warned: bool = False,
        given: tuple[Mapping[str, Any] | None, str | None] = (None, None),
    ) -> None:
        self.given = given
        self.options: Any = None
        self.meter: Any = None
        self.number = next(self._numbers)
        self.strict, self.warned = strict, warned
        self.converted = False  # whether a frame was compiled while it ran
        self.given_up: list[str] = []  # frames that Dynamo looked at then and left to eager mode

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a compiled model starts without a meter."""
        return {**self.__dict__, "meter": None}


@dataclass(eq=False)
class _Mark:
    """The mark that Dynamo puts on a code object: how to treat its frames."""

    code: ref[CodeType]
    state: Any  # torch's state for this code; a different object after ``torch._dynamo.reset()``
    strategy: Any
    given_up_for: set[int] = field(default_factory=set)  # numbers of our callables for which Dynamo gave it up
    lifted: int = 0  # the number of running calls for which it is lifted


_marks: dict[int, _Mark] = {}  # by the id of the code, because code objects compare by their content
_lock = threading.RLock()
_here = threading.local()


def running() -> Compiled | None:
    """The innermost callable of ours that runs in this thread."""
    return getattr(_here, "running", None)


class lifted:
    """A context in which frames met by ``compiled`` are traced, although other backends have given them up."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled

    def __enter__(self) -> None:
        self.outer, _here.running = getattr(_here, "running", None), self.compiled
        self.hits = None if self.compiled.warned else CacheHits()
        self.marks = list(_lift(self.compiled)) if _marks else []

    def __exit__(self, *error: object) -> None:
        _here.running = self.outer
        if self.marks:
            _put_back(self.marks)
        if self.hits is not None:
            _tell(self.compiled, self.hits.stop())


def _lift(compiled: Compiled) -> Iterator[_Mark]:
    with _lock:
        for key, mark in list(_marks.items()):
            code = mark.code()
            if code is None or not was_seen(code):  # the code is gone, or Dynamo was reset
                _marks.pop(key, None)
            elif compiled.number not in mark.given_up_for:
                mark.lifted += 1
                set_code_exec_strategy(code, _TRACE)
                yield mark


def _put_back(marks: list[_Mark]) -> None:
    with _lock:
        for mark in marks:
            mark.lifted -= 1
            code = mark.code()
            if not mark.lifted and code is not None and _marks.get(id(code)) is mark and was_seen(code):
                set_code_exec_strategy(code, mark.strategy)


def _convert(original: Any, converter: Any, frame: Any, entry: Any, state: Any) -> Any:
    """Replaces Dynamo's ``original(converter, frame, entry, state)``."""
    code = frame.f_code
    mark = _marks.get(id(code))
    if mark is not None and mark.state is not state:
        mark = None
    compiled = getattr(_here, "running", None) if is_for_us(converter) else None
    if mark is not None and mark.lifted and (compiled is None or compiled.number in mark.given_up_for):
        return ConvertFrameReturn(frame_exec_strategy=mark.strategy, apply_to_code=False)
    result = original(converter, frame, entry, state)
    if result.guarded_code is not None:
        if compiled is not None:
            compiled.converted = True
        return result
    # An isolated region has its own marks. Frames that Dynamo never traces are never traced for any backend.
    skips = result.apply_to_code and result.frame_exec_strategy.cur_action != FrameAction.DEFAULT
    if not skips or in_an_isolated_region() or never_traced(code):
        return result
    with _lock:
        if mark is None or _marks.get(id(code)) is not mark:
            mark = _marks[id(code)] = _Mark(ref(code, _forget(id(code))), state, result.frame_exec_strategy)
        mark.strategy = result.frame_exec_strategy
        if compiled is not None and compiles_now():  # not given up because of the place of the call
            mark.given_up_for.add(compiled.number)
            if not compiled.warned:
                compiled.given_up.append(f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})")
    # If the mark is lifted, a callable of ours is running and puts the mark back when it returns.
    return replace(result, apply_to_code=False) if mark.lifted else result


def _forget(key: int) -> Any:
    def gone(code: Any) -> None:
        mark = _marks.get(key)
        if mark is not None and mark.code is code:
            _marks.pop(key, None)

    return gone


def _tell(compiled: Compiled, hits: int) -> None:
    """After the first call, tell users who asked for this backend if it compiled nothing."""
    if not compiles_now():
        return  # nothing could be compiled here; check again in the next call
    compiled.warned = True
    if compiled.converted or hits:
        return
    tried = "; ".join(dict.fromkeys(compiled.given_up))
    text = (
        "torch.compile compiled nothing in the first call of a model: all of it ran in eager mode, with exact "
        f"gradients. Dynamo {f'gave up {tried}' if tried else 'looked at none of its code'}. "
        "torch._dynamo.reset() makes it look again at code that it gave up before; "
        'TORCH_LOGS="graph_breaks" shows why it gives up.'
    )
    if compiled.strict:
        raise HighwayError(f"strict=True: {text}")
    log.warning("%s", text)


def _wipe() -> None:
    for code in seen_codes():
        if not never_traced(code):
            set_code_exec_strategy(code, _TRACE)


_wipe()
watch_frames(_convert)
