"""The report that users get: its data, and every way to show it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import draw, page, repro, text
from .data import ReportData

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Report(ReportData):
    """What :func:`hwbp_compiler.explain` found. Use ``print(report)`` to read it, :meth:`to_dict` for programs,
    :meth:`to_html` for a browser. Attributes: see :class:`ReportData`.
    """

    def __str__(self) -> str:
        return text.plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For ``rich.print(report)``: the same text in colour."""
        yield text.coloured(self, options.max_width)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs no network: every chain as a picture whose blocks open on a click."""
        page.write(self, path)

    def draw(self, path: str | os.PathLike[str], after: bool = True) -> None:
        """Draw ``graph_after`` (or ``graph_before``) with torch's ``FxGraphDrawer``, as ``.dot``, ``.svg`` or ``.png``.

        Raises ImportError if pydot is missing; FileNotFoundError if graphviz is missing and a picture is wanted;
        ValueError for another suffix or if there is no graph.
        """
        draw.draw(self.graph_after if after else self.graph_before, path)

    def save_repro(self, path: str | os.PathLike[str], graph: int | None = None) -> None:
        """Write a script that needs only this package. It rebuilds a joint graph, draws inputs of the same shapes, runs
        the passes, and compares the gradients. ``graph`` counts from 0; by default it is the graph shown.

        Raises ValueError if there is no graph, or if the graph holds sub-graphs that a script cannot contain.
        """
        repro.write(self.shown() if graph is None else self.graphs[graph], self.options, path)
