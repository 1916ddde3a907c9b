"""Rows of results, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .harness import ROOT

FOLDER = ROOT / "docs" / "benchmarks"

Row = dict[str, Any]


def markdown(head: Iterable[str], lines: Iterable[Iterable[object]]) -> str:
    head = list(head)
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    out += ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join(out)


def by(found: list[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    grouped: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        grouped.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return grouped


def where(row: Row) -> str:
    """One line that says where a table was measured."""
    return (
        f"{row['device_name']}, {row['threads']} threads, torch {row['torch']}, commit {row['commit']}, {row['date']}"
    )


def places(found: list[Row]) -> str:
    """Where the rows were measured, each place once."""
    return "; ".join(dict.fromkeys(where(row) for row in found))


def time(row: Row, what: str) -> str:
    """Median and, in brackets, interquartile range, with a mark if the range is large beside the median. Empty if it
    was not measured.
    """
    if f"{what}_ms" not in row:
        return ""
    return f"{row[f'{what}_ms']:.2f} ({row[f'{what}_iqr_ms']:.2f}){doubtful(row, what)}"


def doubtful(row: Row, what: str) -> str:
    return " ?" if row[f"{what}_iqr_ms"] > row[f"{what}_ms"] / 2 else ""
