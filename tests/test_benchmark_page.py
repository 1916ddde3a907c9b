"""``docs/benchmarks/`` and the tables in the READMEs match the committed results, and show what was not measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import snippets

from benchmarks import report
from benchmarks.accuracy_report import took
from benchmarks.against_exact import best_last, duel


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """The committed pages, written again into a separate folder."""
    pytest.importorskip("matplotlib")
    root, folder = report.ROOT, report.FOLDER.relative_to(report.ROOT)
    readmes = {"README": "README.md", "EXAMPLES": "examples/README.md"}
    for name, path in readmes.items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text((root / path).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(report, name, target)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "FOLDER", tmp_path / folder)
    report.write()

    def texts(where: Path) -> dict[str, str]:
        paths = [*(where / folder).glob("*.md"), *(where / path for path in readmes.values())]
        return {str(path.relative_to(where)): path.read_text(encoding="utf-8") for path in paths}

    return texts(root), texts(tmp_path)


def test_the_committed_pages_are_those_of_the_committed_results(pages):
    committed, written = pages
    assert written == committed, "run: python -m benchmarks report"


def test_every_plot_on_a_page_lies_beside_it():
    found = re.compile(r"^!\[.*?\]\((\S+)\)$", re.MULTILINE)
    pages = report.FOLDER.glob("*.md")
    plots = [page.with_name(plot) for page in pages for plot in found.findall(page.read_text(encoding="utf-8"))]
    assert len(plots) > 8 and [plot for plot in plots if not plot.exists()] == []


def test_the_index_shows_cases_that_lose():
    claims = report.claims()
    assert len([claim for claim in claims if claim.duels and claim.duels[0].ratio < 1]) > 10
    assert {claim.page for claim in claims} <= {page.name for page in report.PAGES}


def test_a_row_of_the_index_is_short_and_its_cases_are_on_the_page_it_leads_to():
    text = (report.FOLDER / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(.*)\]\((\w+)\.md(?:#([\w-]+))?\) \| (.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) == len(report.claims()) > 20
    for what, name, anchor, figure, of in rows:
        assert len(what + figure + of) < 120
        page = (report.FOLDER / f"{name}.md").read_text(encoding="utf-8")
        assert not anchor or anchor in snippets.anchors(page) and f"worst of {of}" in page


def duel_of(ours: float, **exact: float):
    runs = {"k=2": row(step_ms=ours)} | {run: row(step_ms=ms) for run, ms in exact.items()}
    return duel("case", runs, "k=2")


def test_ours_is_compared_with_the_fastest_exact_run():
    met = duel_of(2.0, eager=9.0, exact=4.0, jax=5.0)
    assert (met.exact_name, met.ratio) == ("exact with this backend", 2.0)
    assert duel_of(2.0) is None


def test_a_disturbed_case_is_neither_best_nor_worst():
    disturbed = duel("d", {"k=2": row(step_iqr_ms=1.5), "exact": row(step_ms=100.0)}, "k=2")
    assert best_last([disturbed, duel_of(2.0, exact=1.0)])[-1].ratio == 0.5
    assert best_last([disturbed]) == [disturbed]


def test_readme_shows_at_most_twelve_rows_and_a_case_that_loses():
    lines = [line for line in report.in_short().splitlines() if re.search(r"\d\.\d\dx", line)]
    ratios = [float(re.search(r"([\d.]+)x", line)[1]) for line in lines]
    assert 6 < len(lines) <= 12 and min(ratios) < 1 < max(ratios)


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
