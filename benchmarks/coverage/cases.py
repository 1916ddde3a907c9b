"""All models, sorted."""

from __future__ import annotations

from . import classics, huggingface, packages
from .case import Case

CASES: list[Case] = sorted(
    [*classics.CASES, *huggingface.CASES, *packages.CASES],
    key=lambda case: (case.family, case.name),
)
assert len({case.name for case in CASES}) == len(CASES)
