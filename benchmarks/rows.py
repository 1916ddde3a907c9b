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
    """One line that says what a table was measured on."""
    return (
        f"{row['device_name']}, {row['threads']} threads, torch {row['torch']}, commit {row['commit']}, {row['date']}"
    )


def places(found: list[Row]) -> str:
    """Where and on what the rows were measured, each once."""
    return "; ".join(dict.fromkeys(where(row) for row in found))


def time(row: Row, what: str) -> str:
    """Median and, in brackets, interquartile range; marked where the one says little beside the other. Nothing where
    it was not measured."""
    if f"{what}_ms" not in row:
        return ""
    return f"{row[f'{what}_ms']:.2f} ({row[f'{what}_iqr_ms']:.2f}){doubtful(row, what)}"


def doubtful(row: Row, what: str) -> str:
    return " ?" if row[f"{what}_iqr_ms"] > row[f"{what}_ms"] / 2 else ""
