"""Report recurrent modules that receive a packed sequence.

Their code reads the number of sequences from a tensor (``batch_sizes[0]``). Dynamo breaks the graph there and leaves
the call to eager mode: PyTorch's own kernels, exact gradients. No pass ever sees the call in a graph, so Dynamo's graph
break is what gets reported.
"""

from __future__ import annotations

import functools
import logging

from torch.nn.modules import rnn

from hwbp_compiler.counting import count
from hwbp_compiler.graph_breaks import GraphBreak
from hwbp_compiler.reasons import Reason

log = logging.getLogger(__name__)

REASON = Reason.PACKED_BREAKS_GRAPH.of()

_READS = ("_local_scalar_dense", "Tensor.item()")  # Dynamo's words for reading a number from a tensor


def is_at(graph_break: GraphBreak) -> bool:
    """Whether this is a recurrent module that reads ``batch_sizes[0]``."""
    return graph_break.innermost == rnn.__file__ and any(what in graph_break.error for what in _READS)


def count_and_tell(graph_break: GraphBreak) -> None:
    """Called for Dynamo's graph breaks."""
    if is_at(graph_break):
        for name in ("chains_found", "chains_declined", f"declined: {REASON.code.name.lower()}"):
            count(name)
        _tell(graph_break.source)


@functools.cache
def _tell(source: str) -> None:
    """Log once per line: a recompilation for other shapes adds nothing new."""
    log.info("recurrent module declined: %s%s", REASON.text, f" [{source}]" if source else "")
