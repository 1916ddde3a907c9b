"""What becomes of recurrent modules that are given a packed sequence.

Their code reads the number of sequences out of a tensor (``batch_sizes[0]``). Dynamo breaks the graph there and leaves
the call to eager mode: PyTorch's own kernels, exact gradients. No graph ever shows it to a pass, so it is Dynamo's
break that is told of.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from traceback import FrameSummary

from torch.nn.modules import rnn

from hwbp_compiler.counting import count
from hwbp_compiler.reasons import Reason

log = logging.getLogger(__name__)

REASON = Reason.PACKED_BREAKS_GRAPH.of()

_READS = ("_local_scalar_dense", "Tensor.item()")  # how Dynamo says that a number was read out of a tensor
_here = threading.local()


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """The source lines of such calls that are found in this thread while it lasts, which are then not counted."""
    before, _here.found = getattr(_here, "found", None), []
    try:
        yield _here.found
    finally:
        _here.found = before


def seen(stack: list[FrameSummary], error: str) -> None:
    """What Dynamo's graph breaks are shown to: the lines that led to one, outermost first, and what is said there."""
    if not (stack and stack[-1].filename == rnn.__file__ and any(what in error for what in _READS)):
        return
    own = [frame for frame in stack if "/torch/" not in frame.filename]
    source = f"{own[-1].filename}:{own[-1].lineno}: {(own[-1].line or '').strip()}" if own else ""
    found = getattr(_here, "found", None)
    if found is None:
        for name in ("chains_found", "chains_declined", f"declined: {REASON.code.name.lower()}"):
            count(name)
        _tell(source)
    elif source not in found:
        found.append(source)


@functools.cache
def _tell(source: str) -> None:
    """Once for each line: what is compiled anew for other shapes says nothing new."""
    log.info("recurrent module declined: %s%s", REASON.text, f" [{source}]" if source else "")
