"""Write the tables of docs/reliability.md from the tests' markers:  python tests/reliability.py [--check]"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import test_combinations
import test_faults

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def marked(module, name: str) -> list[tuple]:
    """(test, marker arguments), in the order of the file."""
    found = []
    for test, value in vars(module).items():
        marks = getattr(value, "pytestmark", ()) if test.startswith("test_") else ()
        found += [(test, mark.args) for mark in marks if mark.name == name]
    return found


def tables() -> dict[str, str]:
    combinations = [
        f"| {name} | {status} | {note} | `{test}` |"
        for test, (name, status, note) in marked(test_combinations, "combination")
    ]
    faults = [f"| {name} | {outcome} | `{test}` |" for test, (name, outcome) in marked(test_faults, "fault")]
    return {
        "combinations": "\n".join(["| with | status | note | test |", "|---|---|---|---|", *combinations]),
        "faults": "\n".join(["| what fails | what happens | test |", "|---|---|---|", *faults]),
    }


def page() -> str:
    text = PAGE.read_text()
    for name, table in tables().items():
        between = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = between.subn(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text)
        assert count == 1, f"{PAGE} has no place for the table of {name}"
    return text


def main() -> int:
    if "--check" in sys.argv:
        return int(page() != PAGE.read_text())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
