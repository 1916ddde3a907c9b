"""The list of planted bugs matches the sources; ``python tests/mutations.py`` runs it."""

from __future__ import annotations

import pytest
from mutations import MUTATIONS, ROOT, caught


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_the_planted_bug_still_has_its_place_and_its_tests(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), test


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_the_planted_bug_is_caught(mutation):
    assert caught(mutation)
