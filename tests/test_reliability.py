"""docs/reliability.md matches the tests' markers."""

from __future__ import annotations

import reliability


def test_the_tables_are_those_of_the_markers():
    assert reliability.page() == reliability.PAGE.read_text(), "run: python tests/reliability.py"


def test_every_status_is_one_of_three():
    statuses = {args[1] for _, args in reliability.marked(reliability.test_combinations, "combination")}
    assert statuses <= {"supported", "declined", "refused"}
