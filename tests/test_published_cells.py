"""``hwbp_compiler.recurrent`` on cells from the literature: the oracle's gradients for every (S, k, damping)."""

from __future__ import annotations

import itertools

import pytest
from cells import CASES, in_a_loop
from published_cells import ALIF, GORU, LINEAR, LTC, NO_PATH, PUBLISHED, SNU, OrderedNeuronsLSTM, ScalarLSTM
from test_any_cell import LENGTH, assert_matches_oracle, every_step, gradients, last_state, last_step, rolled

from hwbp_compiler.options import Options
from hwbp_compiler.rolled import lanes, loop
from hwbp_compiler.rolled.chain import How
from hwbp_compiler.testing.compare import assert_gradients_close

TOLERANCE = 1e-10
SEGMENTS = (1, 2, 3, 5, LENGTH, 8)  # of 7 steps: 7, 4, 3, 2, 1 and 1
DAMPINGS = (0.0, 0.3)


def settings():
    """(S, k, damping): k = 0, 1, 2 and C - 1. The last is ordinary backprop except at S = 1."""
    for segment in SEGMENTS:
        count = -(-LENGTH // segment)
        for iterations, damping in itertools.product(sorted({0, 1, 2, count - 1}), DAMPINGS):
            yield segment, iterations, damping


ALL = list(settings())
# In turns, because tracing a step over lanes takes longer than everything else.
FEW = (
    [(1, 0, 0.0), (1, 2, 0.3), (2, 1, 0.3), (2, 2, 0.0), (2, 3, 0.3), (8, 0, 0.3)],
    [(1, 1, 0.0), (1, 6, 0.3), (3, 0, 0.3), (3, 1, 0.0), (5, 0, 0.3), (5, 1, 0.0)],
)
APPROXIMATED = [case for case in PUBLISHED if not case.make.exact]
EXACT = [case for case in PUBLISHED if case.make.exact]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.fixture
def steps_in_eager_mode(monkeypatch):
    """Steps run operator by operator. Compiling them would take ten times as long as everything else here."""
    for module in (loop, lanes):
        monkeypatch.setattr(module, "compile_step", lambda graph, *_: lambda arguments: graph(*arguments))
        module._compiled.cache_clear()
    yield
    for module in (loop, lanes):
        module._compiled.cache_clear()


def assert_all_match(case, chosen):
    cell, x, state, run, recurrence = rolled(case, LENGTH)
    record, plan = recurrence.records[-1], recurrence.recurring[-1]
    assert record.decision == "rewritten"
    exact = gradients(in_a_loop, cell, x, state, every_step)[1]
    for segment, iterations, damping in chosen:
        truncation = Options(iterations=iterations, damping=damping, segment=segment).truncation(LENGTH)
        plan.how = How(truncation)
        loss = last_step if iterations == 1 else every_step
        assert_matches_oracle(case, cell, x, state, run, iterations, damping, loss, TOLERANCE, segment)
        if truncation is None:
            assert_gradients_close(gradients(run, cell, x, state, every_step)[1], exact, TOLERANCE)


@by_name(APPROXIMATED)
def test_gradients_are_the_oracles(case, steps_in_eager_mode):
    assert_all_match(case, FEW[PUBLISHED.index(case) % 2])


@pytest.mark.slow
@by_name(APPROXIMATED)
def test_gradients_are_the_oracles_for_every_segment_iterations_and_damping(case, steps_in_eager_mode):
    assert_all_match(case, ALL)


@pytest.mark.slow
@by_name([case for case in APPROXIMATED if case.make in (ALIF, GORU, LTC, OrderedNeuronsLSTM, ScalarLSTM, SNU)])
def test_steps_compiled_by_inductor_are_the_same(case):
    """The cells with operators that no other test has in a step."""
    assert_all_match(case, [(1, 1, 0.0), (2, 1, 0.3), (3, 1, 0.0), (5, 1, 0.0)])


@by_name(EXACT)
def test_linear_and_declined_cells_are_exact_at_no_iterations(case, steps_in_eager_mode):
    cell, x, state, run, recurrence = rolled(case, LENGTH)
    *others, record = recurrence.records
    assert case.make.exact in record.reason
    assert record.decision == ("rewritten" if case.make.exact == LINEAR else "declined")
    assert all(LINEAR in other.reason for other in others)
    for loss in (every_step, last_step, last_state):
        assert_matches_oracle(case, cell, x, state, run, "exact", 0.0, loss, TOLERANCE)


def test_ordinary_backprop_starts_at_one_iteration_less_than_segments():
    for segment, iterations, damping in ALL:
        truncation = Options(iterations=iterations, damping=damping, segment=segment).truncation(LENGTH)
        enough = LENGTH if segment == 1 else -(-LENGTH // segment) - 1
        assert (truncation is None) == (iterations >= enough)
    assert {*ALL} >= {*FEW[0], *FEW[1]}


def test_there_are_forty_cells_of_which_few_have_no_highway():
    names = [case.name for case in (*CASES, *PUBLISHED)]
    assert len(names) == len(set(names)) >= 40
    assert len(APPROXIMATED) + len(CASES) >= 40
    assert sum(case.make.exact == NO_PATH for case in PUBLISHED) <= 3
