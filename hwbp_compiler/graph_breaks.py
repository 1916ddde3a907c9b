"""Where Dynamo breaks a graph, in Dynamo's own words. One watcher hears of every break and tells whoever listens."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from traceback import FrameSummary

from .torch_private import watch_graph_breaks

# Hints that name nothing to do.
_NO_HELP = ("This graph break is fundamental", "This graph break may have been caused", "It may be possible to write")
# `if torch.rand([]) < self.layerdrop`: a switch of the model that makes a branch depend on a random number.
_RANDOM = re.compile(r"\brand")
_SWITCH = re.compile(r"\.(\w*drop\w*)\b(?!\()")
_here = threading.local()


@dataclass(frozen=True)
class GraphBreak:
    """``source`` is the user's line, as ``file:line: code``; empty if no line is the user's. ``innermost`` is the file
    of the last line, which may be torch's. ``error`` is Dynamo's message.
    """

    source: str
    innermost: str
    error: str

    @classmethod
    def of(cls, stack: list[FrameSummary], error: str) -> GraphBreak:
        own = [frame for frame in stack if "/torch/" not in frame.filename]
        source = f"{own[-1].filename}:{own[-1].lineno}: {(own[-1].line or '').strip()}" if own else ""
        return cls(source, stack[-1].filename if stack else "", error)

    def __str__(self) -> str:
        """The line, what happened, and what to do: the model's own switch if there is one, or Dynamo's suggestions."""
        first = self.error.partition("*** While handling")[0]  # another break may have followed
        headline = first.strip().partition("\n")[0].rstrip(".")
        hints = re.findall(r"^\s*Hint: (.*?)(?: Please file an issue.*)?$", first, re.M)
        hints = [hint for hint in hints if not hint.startswith(_NO_HELP)]
        switches = dict.fromkeys(_SWITCH.findall(first)) if _RANDOM.search(first) else {}
        cure = [f"Set {name}=0 to keep it whole." for name in switches] or hints
        return " ".join([f"The graph breaks at {self.source} ({headline}).", *cure])


@contextlib.contextmanager
def listening() -> Iterator[list[GraphBreak]]:
    """Collect the graph breaks of this thread while this lasts. Nobody else is told of them."""
    before, _here.found = getattr(_here, "found", None), []
    try:
        yield _here.found
    finally:
        _here.found = before


def watch(tell: Callable[[GraphBreak], None]) -> None:
    """From now on call ``tell`` for every graph break that nobody listens to."""

    def seen(stack: list[FrameSummary], error: str) -> None:
        found = getattr(_here, "found", None)
        (tell if found is None else found.append)(GraphBreak.of(stack, error))

    watch_graph_breaks(seen)
