"""The report as one page: ``page.html`` filled in. It needs no network; its only script opens blocks on a click."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from torch import fx

from hwbp_compiler.graph.record import ChainRecord

from . import picture, summary, text
from .alike import Entry, entries_of
from .data import ExplainedGraph, ReportData

# A browser handles a few thousand lines easily; print_readable() shows the rest.
_MOST_LINES = 1500


def write(report: ReportData, path: str | os.PathLike[str]) -> None:
    """See :meth:`Report.to_html`."""
    environment = Environment(
        loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html")
    graphs = list(_graphs(report))
    page = template.render(
        name=report.name,
        title=text.title(report),
        summary=summary.rows(report),
        options=report.options.shown(),
        measured=text.measured_text(report) if report.measured is not None else "",
        notes=report.notes,
        graphs=graphs,
        plain=str(report),
    )
    Path(path).write_text(page, encoding="utf-8")


def _graphs(report: ReportData) -> Iterator[dict[str, Any]]:
    counted = 0
    for position, graph in enumerate(report.graphs):
        chains = [_entry(graph, entry) for entry in entries_of(graph.chains, counted)]
        counted += len(graph.chains)
        yield {
            "number": position + 1,
            "sizes": text.sizes(graph),
            "failure": graph.failure,
            "chains": chains,
            "no_chain": text.NO_CHAIN if not chains and report.options.rewrite != "never" else "",
            "errors": graph.errors,
            "in_segments": any(error.segment > 1 for error in graph.errors),
            "plot": picture.errors_svg(graph.errors) if _worth_a_plot(graph) else "",
            "programs": [("before", _readable(graph.before)), ("after", _readable(graph.after))],
        }


def _entry(graph: ExplainedGraph, entry: Entry) -> dict[str, Any]:
    """One chain. For several that are alike, the picture and the programs of the first."""
    first = entry.positions[0]
    chain = graph.chains[first]
    return {
        "number": entry.number,
        "title": entry.title,
        "record": entry.record,
        "heading": text.heading(entry),
        "entries": _joined(text.entries(entry)),
        "sources": [text.place_and_code(source) for source in chain.sources],
        "drawn": f"chain {entry.number}, {chain.name}" if entry.each else "",
        "picture": picture.chain_svg(chain, entry.number) if chain.members else "",
        "groups": list(_groups(graph, first)),
        "rest": _cut(graph.rest[first]) if first < len(graph.rest) else "",
    }


def _worth_a_plot(graph: ExplainedGraph) -> bool:
    return len(graph.errors) > 1 and any(e.relative_error for e in graph.errors)


def _groups(graph: ExplainedGraph, chain: int) -> Iterator[dict[str, Any]]:
    record = graph.chains[chain]
    programs = graph.programs[chain] if chain < len(graph.programs) else []
    for group, program in zip(record.groups, programs, strict=False):
        yield {
            "record": group,
            "text": text.group_text(group, record.decision == "rewritten"),
            "forward": [text.place_and_code(line) for line in program.forward],
            "example": _example(record, program.example),
            "before": _cut(program.before),
            "after": _cut(program.after),
        }


def _example(record: ChainRecord, link: int) -> str:
    module = record.modules[link - 1] if link <= len(record.modules) else ""
    return f"link {link}" + (f", {module}" if module else "")


def _joined(entries: Iterator[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Each label with all its lines. Sources are shown separately."""
    found: list[tuple[str, list[str]]] = []
    for label, line in entries:
        if label:
            found.append((label, [line]))
        elif line:
            found[-1][1].append(line.strip())
    return found


def _readable(module: fx.GraphModule) -> str:
    return _cut(module.print_readable(print_output=False))


def _cut(program: str) -> str:
    lines = program.splitlines()
    if len(lines) <= _MOST_LINES:
        return program
    return "\n".join(
        [*lines[:_MOST_LINES], "", f"# {len(lines) - _MOST_LINES} more lines: print_readable() shows them all"]
    )
