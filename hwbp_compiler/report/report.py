"""The report that users get: its data, and every way to show it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from . import draw, page, repro, text
from .data import ReportData

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


class Report(ReportData):
    """What :func:`hwbp_compiler.explain` found: ``print(report)`` for people, :meth:`to_dict` for programs,
    :meth:`to_html` for a browser. It has the attributes of :class:`ReportData`."""

    def __str__(self) -> str:
        return text.plain(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """For ``rich.print(report)``: the same text in colour."""
        yield text.coloured(self, options.max_width)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one page that needs no network: every chain as a picture whose blocks open on a click.

        Args:
            path: the file to write. An existing file is replaced.
        """
        page.write(self, path)

    def draw(self, path: str | os.PathLike[str], after: bool = True) -> None:
        """Draw a joint graph with torch's ``FxGraphDrawer``.

        Args:
            path: the file to write; its suffix says how: ``.dot``, ``.svg`` or ``.png``.
            after: draw ``graph_after``; else ``graph_before``.

        Raises:
            ImportError: pydot is not installed.
            FileNotFoundError: graphviz is not installed, which ``.svg`` and ``.png`` need.
            ValueError: another suffix, or there is no graph.
        """
        draw.draw(self.graph_after if after else self.graph_before, path)

    def save_repro(self, path: str | os.PathLike[str], graph: int | None = None) -> None:
        """Write a script for a bug report that needs this package alone: it rebuilds a joint graph, draws inputs of the
        same shapes, runs the passes, and compares the gradients.

        Args:
            path: the file to write.
            graph: which joint graph, counted from 0; the one that ``graph_before`` shows if None.

        Raises:
            ValueError: there is no graph, or it holds sub-graphs that no script can spell out.
        """
        repro.write(self.shown() if graph is None else self.graphs[graph], self.options, path)
