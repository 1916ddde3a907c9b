"""Recurrences that are never unrolled: ``hwbp_compiler.recurrent`` runs any cell over time."""

from .function import recurrent

__all__ = ["recurrent"]
