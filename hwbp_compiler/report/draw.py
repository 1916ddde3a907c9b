"""Graphs as DOT, SVG or PNG, drawn by torch's own drawer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import fx
from torch.fx.passes.graph_drawer import FxGraphDrawer

SUFFIXES = (".dot", ".svg", ".png")
_ENDINGS = "one of " + ", ".join(SUFFIXES)


def check(path: str | os.PathLike[str]) -> None:
    """Raise what :meth:`Report.draw` would raise for a missing program or package, or a wrong suffix."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"draw: {path.name!r} has the suffix {path.suffix!r}; it must end in {_ENDINGS}")
    try:
        import pydot  # noqa: F401
    except ImportError:
        raise ImportError("draw: torch's graph drawer needs pydot: pip install pydot") from None
    if path.suffix != ".dot" and shutil.which("dot") is None:
        raise FileNotFoundError(
            f"draw: {path.suffix} pictures need graphviz's program `dot` on the PATH (apt-get install graphviz); a "
            ".dot file needs nothing"
        )


def draw(module: fx.GraphModule | None, path: str | os.PathLike[str]) -> None:
    """See :meth:`Report.draw`."""
    if module is None:
        raise ValueError("draw: the report has no joint graph to draw; print(report) says why")
    path = Path(path)
    check(path)
    # print_readable() already shows the module's attributes and the calls' stack traces, so they are left out here.
    drawing = FxGraphDrawer(module, path.stem, ignore_getattr=True, ignore_parameters_and_buffers=True)
    drawing.get_dot_graph().write(str(path), format={".dot": "raw"}.get(path.suffix, path.suffix[1:]))
