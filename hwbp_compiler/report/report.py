"""The report that ``explain`` returns, and every way to show it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import draw, page, repro, text
from .data import ReportData

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Report(ReportData):
    """What :func:`hwbp_compiler.explain` found. ``print(report)`` shows it in a terminal, :meth:`to_html` writes a page
    for a browser, and :meth:`to_dict` gives plain data. The attributes are those of :class:`ReportData`."""

    def __str__(self) -> str:
        return text.plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For ``rich.print(report)``: the same text in colour."""
        yield text.coloured(self, options.max_width)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one HTML page, which needs no network. It draws every chain; a click on a block opens it.

        Args:
            path: the file to write. An existing file is replaced.
        """
        page.write(self, path)

    def draw(self, path: str | os.PathLike[str], after: bool = True) -> None:
        """Draw a joint graph with torch's ``FxGraphDrawer``.

        Args:
            path: the file to write. Its suffix gives the format: ``.dot``, ``.svg`` or ``.png``.
            after: True draws ``graph_after``, False ``graph_before``.

        Raises:
            ImportError: pydot is not installed.
            FileNotFoundError: graphviz is not installed; ``.svg`` and ``.png`` need it.
            ValueError: the suffix is another one, or there is no graph.
        """
        draw.draw(self.graph_after if after else self.graph_before, path)

    def save_repro(self, path: str | os.PathLike[str], graph: int | None = None) -> None:
        """Write a script for a bug report. It needs only this package, not the model. It rebuilds a joint graph, makes
        random inputs of the same shapes, runs the passes, and compares the gradients.

        Args:
            path: the file to write.
            graph: number of the joint graph, from 0. None: the graph that ``graph_before`` shows.

        Raises:
            ValueError: there is no graph, or it holds sub-graphs that cannot be written as code.
        """
        repro.write(self.shown() if graph is None else self.graphs[graph], self.options, path)
