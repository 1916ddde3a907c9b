"""The benchmark page states what the measured rows show about segments, also if some rows are missing."""

from __future__ import annotations

import pytest

from benchmarks import segments, segments_report
from benchmarks.segments_report import (
    Results,
    against_the_paper,
    cell,
    courses,
    gradients,
    points,
    runs,
    section,
    times,
)

WHERE = {"device_name": "A", "threads": 1, "torch": "2", "commit": "c", "date": "d"}
NAME = "GRU, 64 steps"


def compared(k: int, segment: int, cosine: float, case: str = NAME, **more) -> dict:
    row = {"kind": "cosine", "case": case, "k": k, "segment": segment, "cosine": cosine, "cosines": [cosine]}
    return row | {"exact": False, "length": 64, "metric": "accuracy", "value": 0.85, "train_s": 9.0} | more | WHERE


def timed(run: str, k: int | None, segment: int, ms: float, case: str = NAME, batch: int = 32) -> dict:
    row = {"kind": "time", "case": case, "run": run, "k": k, "segment": segment, "batch": batch, "compile_s": 1.0}
    return row | {"step_ms": ms, "step_iqr_ms": 0.1, "backward_ms": ms / 2, "backward_iqr_ms": 0.1} | WHERE


def trained(run: str, *values: float, case: str = NAME) -> list[dict]:
    row = {"kind": "course", "case": case, "run": run, "metric": "accuracy"}
    return [row | {"seed": seed, "value": value} | WHERE for seed, value in enumerate(values)]


TIMES = [
    timed("eager", None, 1, 9.0),
    timed("exact", None, 1, 8.0),
    timed("k=8, S=1", 8, 1, 6.0),
    timed("k=1, S=16", 1, 16, 4.0),
]
COSINES = [compared(8, 1, 0.5), compared(1, 16, 0.7), compared(1, 32, 1.0, exact=True)]


def test_an_iteration_of_the_paper_counts_as_a_run():
    assert [runs(0, 1), runs(2, 1), runs(0, 16), runs(1, 16)] == [0, 2, 1, 2]


def test_what_takes_two_runs_is_bold_and_a_batch_that_is_worse_is_told():
    assert cell(compared(1, 16, 0.7)) == "**0.700**"
    assert cell(compared(2, 16, 0.9, cosines=[0.895, 0.905])) == "0.900"
    assert cell(compared(8, 1, 0.9, cosines=[0.8, 1.0])) == "0.900 (0.800)"
    assert cell(compared(1, 32, 1.0, exact=True)) == "exact"
    assert cell(None) == ""


def test_a_size_of_segment_that_is_always_exact_has_no_line():
    text = gradients(Results([*COSINES, compared(0, 64, 1.0, exact=True)]))
    assert "S = 16" in text and "S = 64" not in text


@pytest.mark.parametrize("ours, said", [
    (0.7, "in 1 of 1 cases."),
    (0.5005, "in 0 of 1 cases, and as near (within 0.001) in 1."),
    (0.4, f"in 0 of 1 cases. Not in {NAME}: 0.400 against 0.500."),
])  # fmt: skip
def test_two_runs_are_compared_with_eight_iterations_and_a_case_that_loses_is_named(ours, said):
    assert against_the_paper(Results([compared(8, 1, 0.5), compared(1, 16, ours)])).endswith(said)


def test_nothing_is_said_of_a_case_in_which_two_runs_are_exact():
    short = compared(1, 16, 1.0, case="ResNet32, digits", exact=True)
    assert against_the_paper(Results([short, compared(8, 1, 0.5, case="ResNet32, digits")])) == ""


def test_ratios_are_to_exact_backprop_and_stay_out_without_it():
    assert "| k=1, S=16 | 2.00 (0.10) | 2.00x | 4.00 (0.10) | 2.00x | 0.700 | 1.0 |" in times(Results(TIMES + COSINES))
    assert "2.00x" not in times(Results(TIMES[2:]))


def test_the_last_measurement_of_a_row_counts():
    again = Results([compared(1, 16, 0.7), compared(1, 16, 0.8)])
    assert again.cosine(NAME, 1, 16) == 0.8


def test_courses_are_means_over_the_seeds_that_ran():
    text = courses(Results([*trained("exact", 0.8, 0.9, 1.0), *trained("k=1, S=16", 0.7)]))
    assert f"| {NAME}, accuracy | 90.0% ± 10.0% | " in text
    assert "70.0% ± 0.0% (one seed)" in text


def test_rows_of_one_kind_alone_make_a_section(tmp_path):
    for found in (COSINES, TIMES, trained("exact", 0.8)):
        text = section(found, tmp_path)
        assert text.count("\n### ") == 1 and segments_report.FIGURE not in text
    assert section([], tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_only_what_was_timed_and_compared_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = [*TIMES, timed("k=2, S=16", 2, 16, 5.0), timed("k=1, S=16", 1, 16, 1.0, batch=1), *COSINES]
    drawn = [(way.label, ms, cosine) for way, ms, _, cosine in points(Results(found), NAME)]
    assert drawn == [("exact", 8.0, 1.0), ("k=8, S=1", 6.0, 0.5), ("k=1, S=16", 4.0, 0.7)]
    assert segments_report.FIGURE in section(found, tmp_path)
    once = (tmp_path / segments_report.FIGURE).read_bytes()
    section(found, tmp_path)
    assert (tmp_path / segments_report.FIGURE).read_bytes() == once


def test_every_case_is_compared_where_it_is_timed_or_trained():
    for case in segments.CASES:
        ways = [*(case.timed_ways() if case.timed else ()), *(case.course_ways() if case.course else ())]
        assert {(way.iterations, way.segment) for way in ways if way.iterations is not None} <= set(case.grid())


def quick(kind: str, done: list[dict]) -> list[dict]:
    return list(segments.run("cpu", True, done, lambda name: name.startswith(kind)))


def test_a_quick_run_compares_gradients_and_measures_none_anew():
    pytest.importorskip("sklearn")
    found = quick("cosine", [])
    cosines = {(row["k"], row["segment"]): row["cosine"] for row in found}
    assert cosines[0, 1] < cosines[1, 1] < 1
    assert cosines[1, 1] < cosines[1, 16] < 1 + 1e-12
    assert [row["exact"] for row in found if row["k"] == 8] == [True]
    assert quick("cosine", found) == []


@pytest.mark.slow
def test_a_quick_run_times_steps_and_trains():
    pytest.importorskip("sklearn")
    timed = quick("time", [])
    assert [row["run"] for row in timed] == ["eager", "exact", "k=2, S=1"]
    assert all(row["step_ms"] > row["backward_ms"] > 0 for row in timed)
    course = quick("course", [])
    assert [row["run"] for row in course] == ["exact", "k=2, S=1"]
    assert quick("time", timed) == quick("course", course) == []
