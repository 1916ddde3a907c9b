"""Rephrase the backward pass in operators that the passes understand. Each file says why."""

from __future__ import annotations

from collections.abc import Set

from torch.fx import Graph, Node

from .complex_sums import add_complex_numbers
from .forms_of_gradients import ask_no_gradient_for_its_form
from .parts_of_gradients import mask_parts


def in_other_words(graph: Graph, settled: Set[Node]) -> bool:
    """Returns whether anything was rephrased. ``settled`` nodes stay as they are."""
    changed = ask_no_gradient_for_its_form(graph, settled)
    changed |= add_complex_numbers(graph, settled)
    return changed | mask_parts(graph, settled)
