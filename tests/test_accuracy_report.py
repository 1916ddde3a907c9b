"""The benchmark page states what the measured rows show about the paper's claims, even if they contradict the paper."""

from __future__ import annotations

import pytest

from benchmarks.accuracy_report import Quality, Results, beats_fpi, claims, damping_helps, fpi_fails, later, small_k


def rows(case: str, metric: str, quality: dict[str, list[float]], cosines: dict[str, list[float]] | None = None):
    for run, values in quality.items():
        for seed, value in enumerate(values):
            yield {"kind": "quality", "case": case, "run": run, "seed": seed, "metric": metric, "value": value}
    for run, course in (cosines or {}).items():
        steps = list(range(len(course)))
        yield {"kind": "cosine", "case": case, "run": run, "seed": 0, "steps": steps, "cosines": course}


def results(*parts) -> Results:
    return Results([row for part in parts for row in part])


def test_as_good_as_means_within_the_larger_spread():
    exact = Quality("accuracy", [0.95, 0.96, 0.97])
    assert Quality("accuracy", [0.95, 0.95, 0.96]).as_good_as(exact)
    assert not Quality("accuracy", [0.90, 0.90, 0.90]).as_good_as(exact)
    assert Quality("held_out_loss", [2.0, 2.0]).as_good_as(Quality("held_out_loss", [2.5, 2.5]))
    assert not Quality("held_out_loss", [2.6, 2.6]).as_good_as(Quality("held_out_loss", [2.5, 2.5]))


@pytest.mark.parametrize("k5, said", [([0.97, 0.98, 0.99], "Confirmed"), ([0.5, 0.5, 0.5], "Not confirmed")])
def test_small_k(k5, said):
    good = [0.97, 0.98, 0.99]
    found = results(rows("ResNet32, digits", "accuracy", {"exact": good, "k=0": [0.1] * 3, "k=5": k5, "k=10": good}))
    assert small_k(found)[1] == said
    assert ("k = 5" in small_k(found)[2]) == (said == "Confirmed")


def test_fpi_is_compared_at_equal_k_and_a_lower_loss_is_better():
    quality = {"exact": [1.0], "k=1": [2.0], "FPI k=1": [3.0], "k=3": [2.0], "FPI k=3": [1.5]}
    found = results(rows("GRU, text", "held_out_loss", quality))
    assert beats_fpi(found)[1] == "Confirmed in 1 of 2 comparisons"


@pytest.mark.parametrize("ours, fpi, said", [
    (0.95, 0.4, "Confirmed"), (0.95, 0.95, "Not confirmed"), (0.4, 0.4, "Confirmed for FPI"),
])  # fmt: skip
def test_fpi_with_a_loss_at_the_last_state_alone(ours, fpi, said):
    quality = {"exact": [0.95, 0.95], "k=10": [ours] * 2, "FPI k=10": [fpi] * 2}
    assert fpi_fails(results(rows("GRU, pixel by pixel", "accuracy", quality)))[1] == said


@pytest.mark.parametrize(
    "course, said",
    [([0.9, 0.5], "Confirmed"), ([0.5, 0.9], "Not confirmed"), ([1.0, 0.99999], "Not confirmed")],
)
def test_more_iterations_are_needed_late_where_the_cosine_falls(course, said):
    found = results(rows("GRU, text", "held_out_loss", {"exact": [1.0]}, {"k=1": course, "k=3": course}))
    assert later(found)[1] == said


@pytest.mark.parametrize("plain, said", [(2.0, "Not confirmed"), (3.0, "Confirmed")])
def test_damping(plain, said):
    quality = {"exact": [2.0], "k=3": [2.1, 2.11], "k=3, damping 0": [plain] * 2}
    assert damping_helps(results(rows("Transformer, text", "held_out_loss", quality)))[1] == said


def test_what_was_not_measured_is_not_claimed():
    assert claims(Results([])) == ""
