"""Keep Inductor from overwriting a piece of a concatenation.

Note [Pieces of a concatenation]
~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~
Inductor computes each piece of a concatenation in its final place: the piece is a view of the whole. A later kernel
that is the last to read both may write its own result over the piece. Inductor then considers the whole unused and
gives its memory to the next buffer of the same size, although the result stored there is still needed. The outcome is a
wrong value without any warning. Torch 2.11, 2.13 and 2.14 do this on CPUs, also with concatenations in the user's own
code.

The pass here forbids overwriting any buffer that lies in another buffer's memory. Nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .digest import source_digest
from .torch_private import SCHEDULER_PASS, CustomSchedulerPass, inductor_setting


def keeping_pieces(patches: Mapping[str, Any]) -> dict[str, Any]:
    """Add the pass of Note [Pieces of a concatenation] to ``patches`` of Inductor's config; a user's own pass runs
    first.
    """
    theirs = inductor_setting(SCHEDULER_PASS, patches)
    return {**patches, SCHEDULER_PASS: theirs if isinstance(theirs, KeepPieces) else KeepPieces(theirs)}


@dataclass(frozen=True)
class KeepPieces(CustomSchedulerPass):
    """A pass over Inductor's kernels before they are fused. ``first`` is the user's own pass."""

    first: Callable[[list[Any]], list[Any]] | None = None

    def __call__(self, nodes: list[Any]) -> list[Any]:
        if self.first is not None:
            nodes = self.first(nodes)
        for node in nodes:
            for buffer in node.get_outputs():
                if buffer.get_aliases():
                    for user in buffer.users:
                        user.can_inplace = False
        return nodes

    def uuid(self) -> Any:
        """None, which keeps the graph out of the caches, if the user's own pass has no uuid."""
        if self.first is None:
            return source_digest()
        theirs = self.first.uuid() if isinstance(self.first, CustomSchedulerPass) else None
        return (source_digest(), theirs) if theirs else None
