"""Tests for the gradients of any model: assertions, an oracle, and randomly generated models.

    from hwbp_compiler import testing

    testing.assert_exact_at_full_length(model, args, loss)      # with enough iterations it is ordinary backprop
    testing.assert_forward_unchanged(model, args)
    testing.check(model, args, loss)                            # runs all assertions and prints a verdict

Only ``testing.strategies`` needs the ``hypothesis`` package.
"""

from __future__ import annotations

import importlib
from typing import Any

from hwbp_compiler.rolled.function import exactly

from .assertions import (
    assert_closer,
    assert_exact_at_full_length,
    assert_forward_unchanged,
    assert_linear,
    assert_matches_truncation,
    check,
)
from .compare import assert_gradients_close, cosine, relative_error
from .losses import probe_loss
from .reference import Link, Program, fixed_point, highway_bp, reference_gradients, sum_over_paths

__all__ = [
    "Link",
    "Program",
    "assert_closer",
    "assert_exact_at_full_length",
    "assert_forward_unchanged",
    "assert_gradients_close",
    "assert_linear",
    "assert_matches_truncation",
    "check",
    "cosine",
    "exactly",
    "fixed_point",
    "highway_bp",
    "probe_loss",
    "reference_gradients",
    "relative_error",
    "strategies",
    "sum_over_paths",
]


def __getattr__(name: str) -> Any:
    if name == "strategies":
        return importlib.import_module(".strategies", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
