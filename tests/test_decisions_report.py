"""The page on the cost model's decisions counts them as the rows show."""

from __future__ import annotations

import pytest

from benchmarks.decisions_report import decisions, section

WHERE = {"device_name": "a CPU", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-01"}


def rows(name: str, exact: float, two: float, rewritten: bool, blocks: bool = True) -> list[dict]:
    cosine = {"exact": 1.0, "k=2": 0.9 if blocks else 1.0, "auto": 0.9 if rewritten else 1.0}
    times = {"exact": exact, "k=2": two, "auto": two if rewritten else exact}
    return [{"case": name, "run": run, "step_ms": times[run], "cosine": cosine[run], **WHERE} for run in cosine]


def of(*found: list[dict]):
    return lambda suite: [row for group in found for row in group] if suite == "deep" else []


@pytest.mark.parametrize(
    "exact, two, rewritten, cost",
    [(1.0, 2.0, False, 0), (1.0, 2.0, True, 1), (2.0, 1.0, True, 0), (3.0, 2.0, False, 0.5)],
)
def test_the_cost_is_what_the_chosen_form_takes_longer_than_the_faster_one(exact, two, rewritten, cost):
    (found,) = decisions(of(rows("a", exact, two, rewritten)))
    assert found.cost == pytest.approx(cost) and found.right == (cost <= 0.05)


def test_a_chain_without_blocks_is_exact_either_way_and_tells_nothing():
    assert not decisions(of(rows("a", 1.0, 2.0, False, blocks=False)))
    assert section(of()) is None


def test_a_module_beside_which_only_pytorch_was_measured_does_not_count():
    found = rows("nn.GRU, batch 4", 3.0, 2.0, True)
    assert decisions(of(found))
    found[0]["run"] = "inductor"
    assert not decisions(of(found))


def test_the_page_names_the_wrong_decisions_and_what_they_cost():
    text = section(of(rows("a", 1.0, 2.0, False), rows("b", 3.0, 2.0, False), rows("c", 1.0, 4.0, True)))
    assert text is not None and "**1 of 3 decisions (33%) are right.**" in text
    assert text.index("| a CPU, c | k = 2 | 1.00 | 4.00 | 300% |") < text.index(
        "| a CPU, b | exact | 3.00 | 2.00 | 50% |"
    )
