"""The benchmark page states what the measured rows show about "auto", also if some rows are missing."""

from __future__ import annotations

import pytest

from benchmarks import auto, auto_report
from benchmarks.auto_report import EXACT, forms, longest_below, section

WHERE = {"device_name": "a CPU", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-01"}
CASE = auto.OWN[0]


def course(run: str, seed: int, value: float, checks: list) -> dict:
    row = {"kind": "course", "case": CASE.name, "run": run, "seed": seed, "metric": CASE.metric, "value": value}
    return row | {"checks": checks, "course": [], **WHERE}


def timed(run: str, ms: float) -> dict:
    row = {"kind": "time", "case": CASE.name, "run": run, "batch": 4, "length": 64, "step_ms": ms, "step_iqr_ms": 0.1}
    return row | ({"checked_ms": 30.0} if run == "auto" else {}) | WHERE


CHECKS = [[0, 0, 4, 0.99, False], [0, 0, 16, 0.999, False], [20, 0, 4, 0.9, True], [20, 0, 16, 0.99, False],
          [40, 0, 4, 0.8, False], [40, 0, 16, 0.97, True]]  # fmt: skip


def test_forms_in_use_are_counted_by_check():
    assert forms([course("auto", 0, 0.8, CHECKS)]) == (f"k=0, S=4 33%, k=0, S=16 33%, {EXACT} 33%", "0.900", "1")
    assert forms([course("auto", 0, 0.8, [])]) == (EXACT, "", "")
    assert forms([course("auto", 0, 0.8, CHECKS[:2])]) == (f"{EXACT} 100%", "", "")


@pytest.mark.parametrize("cosines, longest", [([], 0), ([0.99, 0.9, 0.9, 0.96, 0.9], 2), ([0.9] * 3, 3)])
def test_the_longest_time_below_is_of_neighbours(cosines, longest):
    assert longest_below(cosines) == longest


def test_the_section_says_what_there_is(tmp_path):
    assert section([], tmp_path) is None
    courses = [course("auto", 0, 0.81, CHECKS), course("exact", 0, 0.83, [])]
    text = section(courses, tmp_path)
    assert auto_report.FIGURE in text and (tmp_path / auto_report.FIGURE).exists() and "### A step" not in text
    times = [timed("eager", 9.0), timed("Inductor", 6.0), timed("exact", 5.0), timed("auto", 4.0)]
    assert "| 1.25x | 30.0 |" in section(times, tmp_path)
    assert section(courses[1:], tmp_path).count("\n### ") == 0


@pytest.mark.slow
def test_the_suite_measures_what_the_page_needs():
    rows = list(auto.run("cpu", True, []))
    assert {(row["kind"], row["run"]) for row in rows} == {
        *(("course", run) for run in auto.RUNS),
        *(("time", run) for run in ("eager", "Inductor", "exact", "auto")),
    }
    assert list(auto.run("cpu", True, rows)) == []
