"""Where Dynamo breaks the graph, and what keeps the model in one piece: Dynamo's own words, in short."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from traceback import FrameSummary

from hwbp_compiler.torch_private import watch_graph_breaks

_MOST_SHOWN = 3
# Hints that name nothing to do.
_NO_HELP = ("This graph break is fundamental", "This graph break may have been caused", "It may be possible to write")
# `if torch.rand([]) < self.layerdrop`: a switch of the model that makes a branch depend on a random number.
_RANDOM = re.compile(r"\brand")
_SWITCH = re.compile(r"\.(\w*drop\w*)\b(?!\()")
_here = threading.local()


@dataclass(frozen=True)
class GraphBreak:
    """``source`` is the user's line, as ``file:line: code``. ``what`` and ``hints`` are sentences."""

    source: str
    what: str
    hints: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([f"The graph breaks at {self.source} ({self.what}).", *self.hints])


@contextlib.contextmanager
def listening() -> Iterator[list[GraphBreak]]:
    """Collect the graph breaks of this thread while this lasts, one for each line of code."""
    before, _here.found = getattr(_here, "found", None), []
    try:
        yield _here.found
    finally:
        _here.found = before


def told(breaks: list[GraphBreak]) -> list[str]:
    """A sentence or two for each break. Of many, the first ones."""
    more = len(breaks) - _MOST_SHOWN
    return [*map(str, breaks[:_MOST_SHOWN]), *([f"The graph breaks at {more} further lines."] if more > 0 else [])]


def _seen(stack: list[FrameSummary], error: str) -> None:
    found = getattr(_here, "found", None)
    own = [frame for frame in stack if "/torch/" not in frame.filename]
    if found is None or not own:
        return
    source = f"{own[-1].filename}:{own[-1].lineno}: {(own[-1].line or '').strip()}"
    if all(source != other.source for other in found):
        found.append(GraphBreak(source, *_words(error)))


def _words(error: str) -> tuple[str, tuple[str, ...]]:
    """What happened, and what to do about it: the model's own switch if there is one, or else what Dynamo suggests.

    ``error`` starts with a headline. It may tell of another break that followed.
    """
    first = error.partition("*** While handling")[0]
    headline = first.strip().partition("\n")[0].rstrip(".")
    hints = re.findall(r"^\s*Hint: (.*?)(?: Please file an issue.*)?$", first, re.M)
    hints = [hint for hint in hints if not hint.startswith(_NO_HELP)]
    switches = dict.fromkeys(_SWITCH.findall(first)) if _RANDOM.search(first) else {}
    return headline, tuple(f"Set {name}=0 to keep it whole." for name in switches) or tuple(hints)


watch_graph_breaks(_seen)
