"""A selection of the coverage sweep; ``docs/coverage.md`` follows from the committed results."""

from __future__ import annotations

import pytest

from benchmarks.coverage import report
from benchmarks.coverage.case import Case
from benchmarks.coverage.cases import CASES
from benchmarks.coverage.measure import difference, measure, missing, outcome, tolerance
from benchmarks.coverage.untrue import UNTRUE

BY_NAME = {case.name: case for case in CASES}
SELECTION = (
    "gpt2", "bert", "falcon", "vit", "resnet, bottleneck",
    "ReZero", "WaveNet", "DiT", "GGNN", "JANET", "nn.LSTM", "nn.GRU", "highway network", "SE-ResNet", "VGG",
)  # fmt: skip
OF_TRANSFORMERS = SELECTION[:5]


@pytest.mark.parametrize("name", SELECTION)
def test_all_expected_links_are_found_and_exact_at_full_length(name):
    if name in OF_TRANSFORMERS:
        pytest.importorskip("transformers")
    row = measure(BY_NAME[name])
    assert row["outcome"] == "all", row
    assert row["rewritten"] == sorted(BY_NAME[name].chains)
    assert row["forced"] == row["rewritten"]  # at full length the rewritten graph was run, not the original
    assert row["exact"] <= row["tolerance"] == 1e-9


def test_the_committed_page_is_that_of_the_committed_results(tmp_path, monkeypatch):
    committed = report.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(report, "PAGE", tmp_path / "coverage.md")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.write()
    assert report.PAGE.read_text(encoding="utf-8") == committed, "run: python -m benchmarks.coverage report"


def test_the_committed_results_are_of_these_models():
    known = {row["name"]: row for row in report.rows()}
    stale = [c.name for c in CASES if c.name in known and known[c.name]["expected"] != list(c.chains)]
    assert not stale, "run: python -m benchmarks.coverage run"
    assert len(known) >= 200


def row(**more):
    return {
        "expected": [4, 6],
        "rewritten": [4, 6],
        "declined": [],
        "notes": [],
        "exact": 0.0,
        "tolerance": 1e-9,
    } | more


@pytest.mark.parametrize("found, said", [
    (row(), "all"),
    (row(rewritten=[4, 4, 6]), "all"),
    (row(rewritten=[4, 5]), "silent"),
    (row(rewritten=[6], declined=[{"code": "TOO_SHORT"}]), "reason"),
    (row(rewritten=[6], notes=["A graph break."]), "reason"),
    (row(rewritten=[6], declined=[{"code": "INTERRUPTED"}]), "untrue"),
    (row(exact=1e-3), "wrong"),
    (row(exact=float("nan")), "wrong"),
    (row(exact=1e-3, beyond_torch=0.0), "all"),
    (row(exact=1e-3, beyond_torch=1e-3), "wrong"),
    (row(failure="an error"), "crash"),
])  # fmt: skip
def test_an_outcome_is_no_better_than_what_was_found(found, said, monkeypatch):
    monkeypatch.setitem(UNTRUE, "a model", {"INTERRUPTED": "nothing interrupts it"})
    assert outcome("a model", found) == said


def test_two_chains_of_one_length_are_two():
    assert missing([6, 6, 9], [6, 9]) == [6]


def test_a_gradient_that_is_almost_nothing_does_not_decide():
    import torch

    exact = {"a": torch.ones(4), "b": torch.full((4,), 1e-12)}
    assert difference({"a": torch.ones(4), "b": torch.zeros(4)}, exact) < 1e-8
    assert difference({"a": torch.zeros(4), "b": exact["b"]}, exact) > 0.9
    assert tolerance(torch.float64) == 1e-9 < tolerance(torch.float32) < 2e-4


def test_no_link_expected_needs_a_reason():
    with pytest.raises(ValueError, match="say why"):
        Case("a model", "a family", lambda: None, ())
