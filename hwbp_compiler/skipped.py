"""Frames that Dynamo has given up for other backends are traced for ours.

Note [Skipped frames]
Where Dynamo finds nothing to compile in a frame, it marks the frame's code as skipped: from then on it looks at no
call of it, in whatever module and for whatever backend (pytorch issue 141184). Any other backend breaks the graph at
``nn.GRU`` and its like, so that a wrapper around one is skipped; under ours the call stays in the graph, but nobody
would ask. The marks are therefore lifted while a callable that is compiled with our backend runs, and put back when it
returns, as torch made them. They never hold for ours but where Dynamo gave the frame up while the same callable ran.
While a mark is lifted, other backends (in another thread, or called from within) are answered as the mark would.

What was skipped before this module was loaded is not known. There, marks are wiped off once, and other backends look
again at what they meet. What becomes of a frame is seen by standing around Dynamo's conversion of frames
(``watch_frames``); a frame that is found in the cache passes nothing of ours.
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

    strict    HighwayError where nothing was compiled in its first call, which is otherwise warned of
    given     options and mode: those that ``torch.compile`` got, with what was changed since
    options   what is in force in their place, from the next call on; None for what was given
    meter     what reads along while it trains
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
        self.given_up: list[str] = []  # frames that Dynamo looked at then, and left to eager mode

    def __getstate__(self) -> dict[str, Any]:
        """A copy of a compiled model is not read by the meter of the first."""
        return {**self.__dict__, "meter": None}


@dataclass(eq=False)
class _Mark:
    """On a code object, one of Dynamo's: what to do with its frames."""

    code: ref[CodeType]
    state: Any  # torch's own of this code, another one after ``torch._dynamo.reset()``
    strategy: Any
    given_up_for: set[int] = field(default_factory=set)  # numbers of callables of ours
    lifted: int = 0  # for how many calls that are running


_marks: dict[int, _Mark] = {}  # by id of the code: code objects compare by what they contain
_lock = threading.RLock()
_here = threading.local()


def running() -> Compiled | None:
    """The innermost callable of ours that runs in this thread."""
    return getattr(_here, "running", None)


class lifted:
    """A context in which the frames that ``compiled`` meets are traced although other backends have given them up."""

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
            if code is None or not was_seen(code):  # gone, or Dynamo was reset
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
    """In the place of Dynamo's ``original(converter, frame, entry, state)``."""
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
    # A region of its own has marks of its own; and what Dynamo never traces, it traces for nobody.
    skips = result.apply_to_code and result.frame_exec_strategy.cur_action != FrameAction.DEFAULT
    if not skips or in_an_isolated_region() or never_traced(code):
        return result
    with _lock:
        if mark is None or _marks.get(id(code)) is not mark:
            mark = _marks[id(code)] = _Mark(ref(code, _forget(id(code))), state, result.frame_exec_strategy)
        mark.strategy = result.frame_exec_strategy
        if compiled is not None and compiles_now():  # not on account of where it was called
            mark.given_up_for.add(compiled.number)
            if not compiled.warned:
                compiled.given_up.append(f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})")
    # Where it is lifted, some callable of ours is running: the mark is put back when that returns.
    return replace(result, apply_to_code=False) if mark.lifted else result


def _forget(key: int) -> Any:
    def gone(code: Any) -> None:
        mark = _marks.get(key)
        if mark is not None and mark.code is code:
            _marks.pop(key, None)

    return gone


def _tell(compiled: Compiled, hits: int) -> None:
    """After the first call: a user who asked for this backend, and got nothing of it, should know."""
    if not compiles_now():
        return  # nothing could be compiled here; the next call tells
    compiled.warned = True
    if compiled.converted or hits:
        return
    tried = "; ".join(dict.fromkeys(compiled.given_up))
    text = (
        "torch.compile compiled nothing in the first call of a model: all of it ran in eager mode, with exact "
        f"gradients. Dynamo {f'gave up {tried}' if tried else 'looked at none of its code'}. "
        "torch._dynamo.reset() makes it forget what it has given up before and look again; "
        'TORCH_LOGS="graph_breaks" tells why it gives up.'
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
