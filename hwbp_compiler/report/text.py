"""The report for a terminal: plain text, or the same text in colour if ``rich`` is installed."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hwbp_compiler.graph.record import ChainRecord, GroupRecord

from . import summary
from .alike import Entry, entries_of
from .data import ExplainedGraph, ReportData

if TYPE_CHECKING:
    from rich.text import Text

# A line to print unchanged, or (indent, label, text to wrap).
_Line = str | tuple[int, str, str]

_NARROWEST, _WIDEST = 30, 100
_LABEL = 11
# Below this width, labels get their own lines.
_BESIDE = 60
NO_CHAIN = (
    "found nothing that carries a gradient past a block element by element (a residual addition, a gate). "
    "All gradients of this graph are exact."
)


def plain(report: ReportData, width: int | None = None) -> str:
    """The report with no line wider than ``width``. The default is the terminal's width, at most 100 columns."""
    return _wrapped(_lines(report), width)


def coloured(report: ReportData, width: int | None = None) -> Text:
    """For ``rich``: labels dim, decisions green or yellow."""
    from rich.text import Text

    text = Text(plain(report, width), no_wrap=True)
    heading = r"(?m)^ +(?:chain \d|\d+ chains alike).*"
    text.highlight_regex(heading + r"\b(?P<bold>(?P<green>rewritten))$")
    text.highlight_regex(heading + r"\b(?P<bold>(?P<yellow>declined))$")
    text.highlight_regex(r"(?m)^ +(?:[a-z]+ ?[a-z]*)(?= {2,}\S)", "dim")
    text.highlight_regex(r"(?m)^(graph .*|\d+ chains? in .*)$", "bold")
    return text


def show(report: ReportData) -> None:
    """Print the report, in colour if it goes to a terminal and ``rich`` is installed."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import rich

            return rich.print(report)
    print(report)


def title(report: ReportData) -> str:
    declined, rewritten = (
        sum(c.times for c in report.chains if (c.decision == "rewritten") is found) for found in (False, True)
    )
    return (
        f"{count(declined + rewritten, 'chain')} in {count(len(report.graphs), 'joint graph')}: "
        f"{rewritten} rewritten, {declined} declined"
    )


def _lines(report: ReportData) -> Iterator[_Line]:
    yield title(report)
    for label, text in summary.rows(report):
        yield 2, label, text
    yield 2, "options", ", ".join(f"{key}={value!r}" for key, value in report.options.shown().items())
    if report.measured is not None:
        yield 2, "measured", measured_text(report)
    for note in report.notes:
        yield 2, "note", note
    number = 0
    for position, graph in enumerate(report.graphs):
        yield ""
        yield f"graph {position + 1} of {len(report.graphs)}: {sizes(graph)}"
        if graph.failure is not None:
            yield 2, "failed", f"{graph.failure}. The graph is compiled as it is."
        elif not graph.chains and report.options.rewrite != "never":
            yield 2, "no chain", NO_CHAIN
        yield from _chains(graph.chains, number)
        number += len(graph.chains)
        if graph.errors:
            yield "  error of w^k: parameter gradient against the exact one"
            in_segments = any(error.segment > 1 for error in graph.errors)
            for error in graph.errors:
                figures = f"cosine {error.cosine:.6f}   relative error {error.relative_error:.2e}"
                size = f"S = {error.segment:<4} " if in_segments else ""
                yield f"    {size}k = {error.iterations:<3} {figures}"


def graph_text(records: list[ChainRecord], before: int, after: int) -> str:
    """The text about one joint graph that a running compilation logs."""
    head = f"joint graph: {_nodes(before, after)}"
    return _wrapped([head, *(_chains(records, 0) if records else [(2, "no chain", NO_CHAIN)])])


def _chains(records: list[ChainRecord], counted: int) -> Iterator[_Line]:
    for entry in entries_of(records, counted):
        yield f"  {entry.title}: {heading(entry)}"
        for label, text in entries(entry):
            yield 4, label, text


def sizes(graph: ExplainedGraph) -> str:
    text = _nodes(len(graph.before.graph.nodes), len(graph.after.graph.nodes))
    if any(chain.decision == "rewritten" for chain in graph.chains[: graph.loops]):
        text = text.removesuffix(", unchanged") + ", its loops rewritten before it was traced"
    return text


def _nodes(before: int, after: int) -> str:
    return f"{before} nodes" + (f", {after} after" if after != before else ", unchanged")


def measured_text(report: ReportData) -> str:
    times = report.measured
    assert times is not None
    return (
        f"a training step takes {times.inductor * 1e3:.3g} ms with Inductor alone and {times.highway * 1e3:.3g} ms "
        f"with the highway ({times.inductor / times.highway:.2g}x), median of 5"
    )


def heading(entry: Entry) -> str:
    chain = entry.record
    became = "unchanged: a pass failed" if chain.failed else chain.decision
    times = f", {chain.times} times" if chain.times > 1 else ""
    length = f"{count(chain.length, 'link')}{entry.each}" if chain.length else "a loop of unknown length"
    return f"{length}{times}, {became}"


def entries(entry: Entry) -> Iterator[tuple[str, str]]:
    """The text about one chain or several alike, as (label, text); the label "" continues the entry before."""
    chain = entry.record
    if chain.module:
        yield "module", chain.module
    for i, source in enumerate(chain.sources[:4] or ([chain.source] if chain.source else [])):
        place, code = place_and_code(source)
        yield "source" if i == 0 else "", place
        yield "", f"  {code}" if code else ""
    if chain.multiplier:
        yield "multiplier", chain.multiplier
    for group, place in zip(chain.groups, _places(chain.groups), strict=True):
        text = group_text(group, chain.decision == "rewritten")
        yield "group", f"{text} ({place})" if place else text
    if chain.side_losses:
        yield "side losses", side_text(chain)
    if chain.segments is not None:
        yield "segments", segments_text(chain)
    if chain.iterations is not None:
        yield "depth", depth_text(chain)
    yield "why", chain.reason
    if chain.estimate is not None and str(chain.estimate) not in chain.reason:
        yield "estimate", str(chain.estimate)
    if chain.added_bytes:
        yield "memory", f"at most {summary.size(chain.added_bytes)} more at a time{entry.each and ', each'}"
    if chain.advice:
        yield "to change", chain.advice


def _places(groups: list[GroupRecord]) -> list[str]:
    """What tells groups apart: their source lines, or their modules if a line belongs to several."""
    lines = [place_and_code(group.source)[0].rpartition("/")[2] for group in groups]
    if len(groups) == 1:
        return [""]
    apart = len(set(lines)) == len(groups)
    return [line if apart else group.module or line for group, line in zip(groups, lines, strict=True)]


def group_text(group: GroupRecord, rewritten: bool) -> str:
    heavy = ", ".join(f"{times} {short(name)}" for name, times in group.operators.items()) or "elementwise only"
    how = "at once" if rewritten else "alike"
    text = f"{group.links} links {how}, each: {heavy}" if group.links > 1 else f"1 link: {heavy}"
    if group.batched:
        text += f"; together, per iteration: {', '.join(group.batched)}"
    return text


def side_text(chain: ChainRecord) -> str:
    found = chain.side_losses
    if len(found) >= len(chain.members) - 1 and len(found) > 1:
        return "a gradient of its own arrives at every state"
    places = ", ".join(str(i + 1) for i in found[:6]) + (", ..." if len(found) > 6 else "")
    return f"a gradient of its own arrives after {count(len(found), 'link')} of {len(chain.members)}: {places}"


def segments_text(chain: ChainRecord) -> str:
    size, number = chain.segment, chain.segments
    assert size is not None and number is not None
    rest = chain.length % size
    return f"C = {number}, S = {size} links" + (f"; the one next to the input has {rest}" if rest else "")


def depth_text(chain: ChainRecord) -> str:
    before, after = chain.depth
    scans = count((chain.iterations or 0) + 1, "scan")
    runs = f" ({count((chain.iterations or 0) + 1, 'run')} of {chain.segment} steps)" if chain.segments else ""
    return f"{count(before, 'block')} one after the other before, {after} now{runs}, and {scans}"


def short(operator: str) -> str:
    """``aten.mm.default`` -> ``mm``."""
    return re.sub(r"^aten(\.|::)|\.default$", "", operator)


def place_and_code(source: str) -> tuple[str, str]:
    """``file:line`` with the shortest form of the path, and the code."""
    match = re.fullmatch(r"(.*?):(\d+): (.*)", source, re.DOTALL)
    if match is None:
        return source, ""
    path = Path(match[1])
    roots = [root for root in map(Path, (os.getcwd(), *sys.path)) if path.is_relative_to(root) and root.is_absolute()]
    shortest = min((str(path.relative_to(root)) for root in roots), key=len, default=match[1])
    return f"{shortest}:{match[2]}", match[3]


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _wrapped(lines: Iterable[_Line], width: int | None = None) -> str:
    """Put labels in their own column, with text beside or below them, and no line wider than the terminal."""
    if width is None:
        width = min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)
    width = max(_NARROWEST, width)
    done: list[str] = []
    for line in lines:
        if isinstance(line, str):
            head, text = "", line
            margin = " " * (len(line) - len(line.lstrip()) + 2)
        else:
            indent, label, text = line
            head = " " * indent + label.ljust(_LABEL) + " "
            margin = " " * len(head)
            if width < _BESIDE:
                margin = " " * (indent + 2)
                head = f"{' ' * indent}{label}  " if label else margin
                if len(head + text) > width and label:
                    done.append(head.rstrip())
                    head = margin
        inner = text.lstrip()
        kept = " " * (len(text) - len(inner))
        done += textwrap.wrap(
            inner, width, initial_indent=head + kept, subsequent_indent=margin + (kept if head else ""),
            break_on_hyphens=False,
        ) or [""]  # fmt: skip
    return "\n".join(done)
