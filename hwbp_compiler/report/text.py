"""The report for a terminal: plain text, or the same text coloured where ``rich`` is installed."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwbp_compiler.graph.record import ChainRecord, GroupRecord

from .data import ExplainedGraph, Report

if TYPE_CHECKING:
    from rich.text import Text

_NARROWEST, _WIDEST = 60, 100
_LABEL = 11
NO_CHAIN = (
    "nothing that carries a gradient past a block element by element (a residual addition, a gate) was found. "
    "All gradients of this graph are exact."
)


def plain(report: Report) -> str:
    return "\n".join(_lines(report))


def coloured(report: Report) -> Text:
    """For ``rich``: labels dim, decisions green or yellow."""
    from rich.text import Text

    text = Text(plain(report), no_wrap=True)
    text.highlight_regex(r"\brewritten\b(?=$|\n)", "bold green")
    text.highlight_regex(r"\bdeclined\b(?=$|\n)", "bold yellow")
    text.highlight_regex(r"(?m)^ +(?:[a-z]+ ?[a-z]*)(?= {2,}\S)", "dim")
    text.highlight_regex(r"(?m)^(graph .*|\d+ chains? in .*)$", "bold")
    return text


def show(report: Report) -> None:
    """Print it, coloured where that is possible."""
    try:
        import rich
    except ImportError:
        print(report)
    else:
        rich.print(report)


def title(report: Report) -> str:
    declined, rewritten = (
        sum(c.times for c in report.chains if (c.decision == "rewritten") is found) for found in (False, True)
    )
    return (
        f"{count(declined + rewritten, 'chain')} in {count(len(report.graphs), 'joint graph')}: "
        f"{rewritten} rewritten, {declined} declined"
    )


def _lines(report: Report) -> Iterator[str]:
    yield title(report)
    yield from _paragraph("options", ", ".join(f"{key}={value!r}" for key, value in asdict(report.options).items()))
    if report.measured is not None:
        yield from _paragraph("measured", measured_text(report))
    for note in report.notes:
        yield from _paragraph("note", note)
    number = 0
    for position, graph in enumerate(report.graphs):
        yield ""
        yield f"graph {position + 1} of {len(report.graphs)}: {sizes(graph)}"
        if graph.failure is not None:
            yield from _paragraph("failed", f"{graph.failure}. The graph is compiled as it is.", 2)
        elif not graph.chains and report.options.rewrite != "never":
            yield from _paragraph("no chain", NO_CHAIN, 2)
        for chain in graph.chains:
            number += 1
            yield f"  chain {number}: {heading(chain)}"
            for label, text in entries(chain):
                yield from _paragraph(label, text, 4)
        if graph.errors:
            yield "  error of w^k: parameter gradient against the exact one"
            for error in graph.errors:
                figures = f"cosine {error.cosine:.6f}   relative error {error.relative_error:.2e}"
                yield f"    k = {error.iterations:<3} {figures}"


def sizes(graph: ExplainedGraph) -> str:
    before, after = len(graph.before.graph.nodes), len(graph.after.graph.nodes)
    return f"{before} nodes" + (f", {after} after" if after != before else ", left as it is")


def measured_text(report: Report) -> str:
    times = report.measured
    assert times is not None
    return (
        f"a training step takes {times.inductor * 1e3:.3g} ms with Inductor alone and {times.highway * 1e3:.3g} ms "
        f"with the highway ({times.inductor / times.highway:.2g}x), median of 5"
    )


def heading(chain: ChainRecord) -> str:
    became = "left as it is: a pass failed" if chain.failed else chain.decision
    times = f", {chain.times} times" if chain.times > 1 else ""
    length = count(chain.length, "link") if chain.length else "a loop of unknown length"
    return f"{length}{times}, {became}"


def entries(chain: ChainRecord) -> Iterator[tuple[str, str]]:
    """What is said about one chain, as (label, text); a label "" continues the one before."""
    if chain.module:
        yield "module", chain.module
    for i, source in enumerate(chain.sources[:4] or ([chain.source] if chain.source else [])):
        place, code = place_and_code(source)
        yield "source" if i == 0 else "", place
        yield "", f"  {code}" if code else ""
    if chain.multiplier:
        yield "multiplier", chain.multiplier
    for group in chain.groups:
        yield "group", group_text(group, len(chain.groups) > 1)
    if chain.side_losses:
        yield "side losses", side_text(chain)
    yield "why", chain.reason
    if chain.estimate is not None and str(chain.estimate) not in chain.reason:
        yield "estimate", str(chain.estimate)
    if chain.added_bytes:
        yield "memory", f"at most {megabytes(chain.added_bytes)} more at a time"
    if chain.advice:
        yield "to change", chain.advice


def group_text(group: GroupRecord, with_module: bool = False) -> str:
    heavy = ", ".join(f"{times} {short(name)}" for name, times in group.operators.items()) or "elementwise only"
    text = f"{group.links} links at once, each: {heavy}" if group.links > 1 else f"1 link: {heavy}"
    if group.batched:
        text += f"; together, per iteration: {', '.join(group.batched)}"
    line = place_and_code(group.source)[0].rpartition("/")[2]
    return f"{text} ({line})" if with_module and line else text


def side_text(chain: ChainRecord) -> str:
    found = chain.side_losses
    if len(found) >= len(chain.members) - 1 and len(found) > 1:
        return "a gradient of its own arrives at every state"
    places = ", ".join(str(i + 1) for i in found[:6]) + (", ..." if len(found) > 6 else "")
    return f"a gradient of its own arrives after {count(len(found), 'link')} of {len(chain.members)}: {places}"


def short(operator: str) -> str:
    """``aten.mm.default`` -> ``mm``."""
    return re.sub(r"^aten(\.|::)|\.default$", "", operator)


def place_and_code(source: str) -> tuple[str, str]:
    """``file:line`` with the file as short as it can be said, and the code."""
    match = re.fullmatch(r"(.*?):(\d+): (.*)", source, re.DOTALL)
    if match is None:
        return source, ""
    path = Path(match[1])
    roots = [root for root in map(Path, (os.getcwd(), *sys.path)) if path.is_relative_to(root) and root.is_absolute()]
    shortest = min((str(path.relative_to(root)) for root in roots), key=len, default=match[1])
    return f"{shortest}:{match[2]}", match[3]


def megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size >= 1e4 else f"{size / 1e3:.3g} kB"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _paragraph(label: str, text: str, indent: int = 2) -> list[str]:
    """``label`` in a column of its own, ``text`` beside it, no line wider than the terminal."""
    width = min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((_WIDEST, 24)).columns))
    head = " " * indent + label.ljust(_LABEL) + " "
    rest = " " * len(head)
    inner = text.lstrip()
    head, rest = (part + " " * (len(text) - len(inner)) for part in (head, rest))
    return textwrap.wrap(inner, width, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)


__all__: Any = ["coloured", "plain", "show"]
