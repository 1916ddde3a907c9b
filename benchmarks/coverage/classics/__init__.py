"""Models as people write them by hand."""

from __future__ import annotations

from ..case import Case
from . import convolutions, graphs, recurrent, residual, streams, transformers, zoo

CASES: list[Case] = [
    *residual.CASES,
    *convolutions.CASES,
    *transformers.CASES,
    *recurrent.CASES,
    *graphs.CASES,
    *streams.CASES,
    *zoo.CASES,
]
