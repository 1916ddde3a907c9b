"""What is told about a chain: to the log, the counters and ``explain``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class GroupRecord:
    """Links evaluated together. ``operators`` counts the heavy operators of one link, by name."""

    links: int
    operators: dict[str, int] = field(default_factory=dict)


@dataclass
class ChainRecord:
    """One chain, or one stretch that was refused.

    length        number of links
    decision      "rewritten" or "declined"
    reason        why, for a user who has not read our source
    multiplier    K as text, one entry per kind of link, most frequent first, joined by " | "
    groups        links evaluated together
    source        ``file:line: code`` of the user's line where the last link (in forward order) ends
    estimate      expected seconds link after link and rewritten, and bytes stacked; None where nothing was estimated
    failed        declined because a pass broke, not because of the model
    """

    length: int
    decision: str
    reason: str
    multiplier: str = ""
    groups: list[GroupRecord] = field(default_factory=list)
    source: str = ""
    estimate: Any = None
    failed: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)
