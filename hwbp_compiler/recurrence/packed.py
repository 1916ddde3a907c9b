"""Report recurrent modules that receive a packed sequence.

Their code reads the number of sequences from a tensor (``batch_sizes[0]``). Dynamo breaks the graph there and leaves
the call to eager mode: PyTorch's own kernels, exact gradients. No pass ever sees the call in a graph, so Dynamo's graph
break is what gets reported.
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

_READS = ("_local_scalar_dense", "Tensor.item()")  # Dynamo's words for reading a number from a tensor
_here = threading.local()


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    """Collect the source lines of such calls in this thread while this lasts. They are then not counted."""
    before, _here.found = getattr(_here, "found", None), []
    try:
        yield _here.found
    finally:
        _here.found = before


def seen(stack: list[FrameSummary], error: str) -> None:
    """Called for Dynamo's graph breaks, with the user's lines that led there, outermost first, and Dynamo's message."""
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
    """Log once per line: a recompilation for other shapes adds nothing new."""
    log.info("recurrent module declined: %s%s", REASON.text, f" [{source}]" if source else "")
