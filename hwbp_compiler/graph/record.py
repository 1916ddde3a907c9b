"""The record of a chain, which the log, the counters and ``explain`` read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hwbp_compiler.options import Truncation
from hwbp_compiler.reasons import Reason, Why


@dataclass
class GroupRecord:
    """Equal links of a chain, which are evaluated together.

    links        the number of links
    operators    the heavy operators of one link: how often each occurs, by name
    multiplier   K of these links as text
    module       the modules that contain the links, ``"blocks.0..blocks.23"``
    source       ``file:line: code`` of their residual addition or gated update
    batched      how the operators run for all links at once, one phrase per heavy operator; only ``explain`` fills it
    """

    links: int
    operators: dict[str, int] = field(default_factory=dict)
    multiplier: str = ""
    module: str = ""
    source: str = ""
    batched: list[str] = field(default_factory=list)


@dataclass
class ChainRecord:
    """What was found and decided about one chain, or about a part of the model that was declined.

    length        number of links
    decision      "rewritten" or "declined"
    reason        the reason for the decision, as text for a user who has not read our source
    reason_code   the reason as a member of ``Reason``. The name of a member never changes its meaning
    multiplier    K as text, one entry per kind of link, most frequent first, joined by " | "
    groups        the groups of equal links, each evaluated together
    source        ``file:line: code`` of the user's line with the residual addition or gated update; the most frequent
                  line if links differ
    estimate      expected seconds in ordinary backprop and rewritten, and bytes copied; None if not estimated
    failed        True if a pass failed, False if the chain was declined because of the model
    module        the modules that contain the links, in forward order: ``"blocks.0..blocks.23"``, ``"cell"``
    sources       all lines like ``source``, most frequent first
    advice        what to change so that the chain is rewritten; "" if there is no advice
    times         number of equal chains that this record stands for; above 1 only for declined ones
    members       group of each link, in forward order; empty if no groups were formed
    modules       module of each link, in forward order
    side_losses   links, in forward order, whose state receives a gradient from outside the chain
    added_bytes   the most memory that the rewritten chain needs at one time in addition to the original chain
    iterations, segment   k and S of the rewritten chain; None if it is not rewritten, or has no block
    candidates    with "auto": the forms to choose from while the model trains, each (k, gamma, S) with its estimate
    """

    length: int
    decision: str
    reason: str
    multiplier: str = ""
    groups: list[GroupRecord] = field(default_factory=list)
    source: str = ""
    estimate: Any = None
    failed: bool = False
    module: str = ""
    sources: list[str] = field(default_factory=list)
    advice: str = ""
    times: int = 1
    members: list[int] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    side_losses: list[int] = field(default_factory=list)
    added_bytes: int = 0
    reason_code: Reason | None = None
    iterations: int | None = None
    segment: int | None = None
    candidates: tuple[tuple[Truncation, Any], ...] = ()

    def rewritten(self, how: Truncation) -> None:
        """Mark the chain as rewritten with ``how``."""
        self.decision, self.iterations, self.segment = "rewritten", how.iterations, how.segment

    @property
    def name(self) -> str:
        """A name for the reader: the chain's modules, or its source line if they are unknown."""
        return self.module or self.source.partition(": ")[0]

    @property
    def segments(self) -> int | None:
        """C, the number of segments, if S > 1; else None."""
        return -(-self.length // self.segment) if self.segment is not None and self.segment > 1 else None

    @property
    def depth(self) -> tuple[int, int]:
        """How many blocks run one after another, in ordinary backprop and now. The first is L. The second is k, or
        (k + 1) S with segments.
        """
        if self.iterations is None or self.segment is None:
            return self.length, self.length
        return self.length, self.iterations if self.segment == 1 else (self.iterations + 1) * self.segment

    def because(self, why: Why) -> None:
        """Take reason and advice from ``why``."""
        self.reason, self.advice, self.reason_code = why.text, why.advice, why.code

    def to_dict(self) -> dict[str, Any]:
        """The record as plain data, ready for JSON. ``reason_code`` is the member's name."""
        return asdict(self) | {
            "reason_code": self.reason_code.name if self.reason_code is not None else None,
            "candidates": [asdict(how) for how, _ in self.candidates],
            "segments": self.segments,
            "depth": list(self.depth),
        }
