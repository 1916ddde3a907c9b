"""``docs/benchmarks.md`` and the READMEs' tables follow from the committed results, and are empty without any."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.accuracy_report import took


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The committed pages in a temporary folder, where they are written again."""
    pytest.importorskip("matplotlib")
    names = {"PAGE": "docs/benchmarks.md", "README": "README.md", "EXAMPLES": "examples/README.md"}
    committed = {name: (report.ROOT / path).read_text(encoding="utf-8") for name, path in names.items()}
    for name, path in names.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(committed[name], encoding="utf-8")
        monkeypatch.setattr(report, name, target)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.accuracy_report.PAGE", tmp_path / "docs" / "benchmarks.md")
    report.write()
    return {name: (committed[name], (tmp_path / path).read_text(encoding="utf-8")) for name, path in names.items()}


def test_the_committed_pages_are_those_of_the_committed_results(pages):
    for committed, written in pages.values():
        assert written == committed, "run: python -m benchmarks report"


def row(**figures: float) -> dict:
    return {"step_ms": 2.0, "step_iqr_ms": 0.1, "peak_memory_mb": 3.0} | figures


def test_a_spread_of_more_than_half_the_median_is_marked():
    assert report.time(row(step_iqr_ms=1.0), "step") == "2.00 (1.00)"
    assert report.time(row(step_iqr_ms=1.1), "step") == "2.00 (1.10) ?"


def test_a_table_in_which_one_peak_is_no_measurement_shows_none():
    good, bad = row(), row(peak_memory_mb=0.0)
    assert report.memory(good, [good, good]) == "3.0"
    assert report.memory(good, [good, bad]) == report.memory(good, [good, row(peak_memory_mb=None)]) == ""


def test_a_table_of_rows_from_two_machines_names_both():
    here = {"device_name": "A", "threads": 1, "torch": "2", "commit": "a", "date": "d"}
    assert report.places([here, here | {"device_name": "B"}, here]).count(", 1 threads") == 2


def test_minutes_of_all_runs_count_a_compilation_once():
    run = {"kind": "quality", "case": "c", "run": "k=1", "commit": "a"}
    run |= {"compile_s": 120.0, "threads": 1, "seconds": 60.0}
    said = took([run, run, run | {"kind": "cosine"}])
    assert said.startswith("The 2 runs took 2 minutes of training and 2 of compiling")
