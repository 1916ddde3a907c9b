"""What is told about a chain: to the log, the counters and ``explain``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hwbp_compiler.options import Truncation
from hwbp_compiler.reasons import Reason, Why


@dataclass
class GroupRecord:
    """Links evaluated together.

    Attributes:
        links: how many they are.
        operators: the heavy operators of one link, by name, and how often each occurs.
        multiplier: K of these links as text.
        module: the modules they stand in, ``"blocks.0..blocks.23"``.
        source: ``file:line: code`` of their residual addition or gated update.
        batched: how they are evaluated at once, one phrase per heavy operator; filled by ``explain`` alone.
    """

    links: int
    operators: dict[str, int] = field(default_factory=dict)
    multiplier: str = ""
    module: str = ""
    source: str = ""
    batched: list[str] = field(default_factory=list)


@dataclass
class ChainRecord:
    """One chain, or one stretch that was refused.

    Attributes:
        length: number of links.
        decision: "rewritten" or "declined".
        reason: why, for a user who has not read our source.
        reason_code: the same as a member of ``Reason``, whose name never changes its meaning.
        multiplier: K as text, one entry per kind of link, most frequent first, joined by " | ".
        groups: links evaluated together.
        source: ``file:line: code`` of the user's line with the residual addition or gated update; of the most frequent
            one where links differ.
        estimate: expected seconds link after link and rewritten, and bytes stacked; None where nothing was estimated.
        failed: declined because a pass broke, not because of the model.
        module: the modules the links stand in, in forward order: ``"blocks.0..blocks.23"``, ``"cell"``.
        sources: all such lines, most frequent first.
        advice: what to change to have it rewritten; "" where there is nothing.
        times: how many equal chains this record stands for (declined ones only).
        members: the group of each link, in forward order; empty where no groups were made.
        modules: the module of each link, in forward order.
        side_losses: links, in forward order, at whose state something besides the chain adds a gradient.
        added_bytes: memory in bytes that the rewritten form holds at one time beyond that of the chain itself, at most.
        iterations: k it was rewritten with; None where it was not, or has no block.
        segment: S it was rewritten with; None where it was not, or has no block.
        candidates: with "auto", what may be chosen while the model trains, as (k, gamma, S) and the estimate.
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
        """The chain takes the form that ``how`` says."""
        self.decision, self.iterations, self.segment = "rewritten", how.iterations, how.segment

    @property
    def name(self) -> str:
        """What a reader knows it by: its modules, or else its line."""
        return self.module or self.source.partition(": ")[0]

    @property
    def segments(self) -> int | None:
        """C, where it was rewritten in segments of more than one link."""
        return -(-self.length // self.segment) if self.segment is not None and self.segment > 1 else None

    @property
    def depth(self) -> tuple[int, int]:
        """Blocks that wait for one another, in ordinary backprop and as it is now: L, and k, or (k + 1) S in runs over
        segments."""
        if self.iterations is None or self.segment is None:
            return self.length, self.length
        return self.length, self.iterations if self.segment == 1 else (self.iterations + 1) * self.segment

    def because(self, why: Why) -> None:
        """Take reason and advice from ``why``."""
        self.reason, self.advice, self.reason_code = why.text, why.advice, why.code

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the reason's code by its name, and what follows from k and S."""
        return asdict(self) | {
            "reason_code": self.reason_code.name if self.reason_code is not None else None,
            "candidates": [asdict(how) for how, _ in self.candidates],
            "segments": self.segments,
            "depth": list(self.depth),
        }
