"""The page on what was tried beside a grid of (k, S) states what the rows show."""

from __future__ import annotations

import pytest

from benchmarks.beyond import probability
from benchmarks.beyond_report import best_by_runs, duels, hits, of_method, section, verdict

WHERE = {"device_name": "a CPU", "threads": 2, "torch": "2.13", "commit": "abc", "date": "2026-01-01"}


def row(method: str, segment: int, k: int, cosine: float) -> dict:
    about = {"kind": "method", "case": "a model", "length": 64, "segment": segment, "k": k, **WHERE}
    return {**about, "method": method, "cosine": cosine, "cosines": [cosine] * 3}


def test_without_results_there_is_no_page():
    assert section([]) is None


def test_a_method_that_is_better_at_its_k_may_still_lose_to_the_best_of_the_grid():
    rows = [row("plain", 1, 8, 0.4), row("plain", 16, 2, 0.9), row("fitted", 1, 8, 0.5), row("plain", 1, 2, 0.3)]
    assert "| fitted | 1 | 1 | 0 | +0.100 | 1 | 0 | 1 | -0.400 |" in verdict(rows)


def test_the_best_of_a_grid_takes_no_more_arithmetic():
    plain = of_method([row("plain", 1, 1, 0.2), row("plain", 16, 0, 0.5), row("plain", 16, 1, 0.8)], "plain")
    assert best_by_runs(plain) == {("a model", 1): 0.5, ("a model", 2): 0.8}


def test_small_differences_count_as_none():
    assert duels([(0.505, 0.5), (0.6, 0.5), (0.4, 0.5)]) == (3, 1, 1, "+0.100")


def test_an_estimate_is_right_or_wrong_in_two_ways():
    found = hits([{"estimates": [0.01, 0.01, None, 0.5], "errors": [0.1, 0.2, 0.1, 0.5]}])
    assert "| 0.99: error at most 0.141 | 1 | 1 | 1 | 1 |" in found


@pytest.mark.parametrize("mean, most", [(0.5, 3), (1, 7), (4, 7)])
def test_k_drawn_at_random_has_the_mean_that_was_asked_for(mean, most):
    p = probability(mean, most)
    assert sum(p**j for j in range(1, most + 1)) == pytest.approx(mean)
