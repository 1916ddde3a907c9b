"""Published cells in a Python loop from zeros: the finder makes every step a link, with the oracle's gradients."""

from __future__ import annotations

import pytest
import torch
from cells import BATCH, INPUT, in_a_loop
from published_cells import (
    GRUD,
    PUBLISHED,
    QRNN,
    DeepHighwayRNN,
    IntersectionRNN,
    MomentumLSTM,
    ProjectedLSTM,
    PublishedCase,
    TimeLSTM,
)
from torch import nn

from hwbp_compiler.testing import assert_gradients_close, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import options, trace
from hwbp_compiler.testing.compare import relative_error
from hwbp_compiler.testing.reference import Program

STEPS = 6
# (k, damping, S)
SETTINGS = ((0, 0.3, 1), (1, 0.0, 1), (1, 0.3, 1), (1, 0.3, 2))
# Their chains begin a step elsewhere than the cell does: behind the decay, the projection or the discount, or with the
# momentum. What k and damping leave out depends on that. So do the layers inside DeepHighwayRNN, which are links too.
ELSEWHERE = {GRUD, ProjectedLSTM, TimeLSTM, MomentumLSTM, DeepHighwayRNN}
# One step is no link. The gradients are the oracle's all the same.
ONE_LESS = {QRNN, IntersectionRNN}
# Not one chain: no chain is found, or one is declined, or there are several or of other lengths.
OTHERS = {
    *("ALIF", "ForgetPeepholeLSTM", "NormalizedLSTM", "NestedLSTM", "RWKV"),
    *("SCRN", "MomentumRNN", "CoRNN", "UnICORNN", "IndyLSTM"),
}  # fmt: skip
IN_PLACE = {"ScalarLSTM"}  # trace does not take it
FOUND = [case for case in PUBLISHED if case.name not in OTHERS | IN_PLACE]


class Unrolled(nn.Module):
    """``case`` in a Python loop from zeros. All its outputs are used."""

    def __init__(self, case: PublishedCase) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = case.make().double()

    def forward(self, x):
        return in_a_loop(self.cell, x, self.start(x))[0]

    def start(self, x):
        state = tuple(x.new_zeros(x.shape[1], width) for width in self.cell.widths)
        return state if len(state) > 1 else state[0]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def traced(case):
    """The inputs, the joint graph, and the oracle's program."""
    model = Unrolled(case)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    written_out = case.program(model.cell).forward

    def retold(run, x):
        state = model.start(x)
        return written_out(run, x, *(state if isinstance(state, tuple) else (state,)))[0]

    return x, trace(model, (x,), probe_loss), Program(dict(model.named_parameters()), retold)


@by_name([case for case in FOUND if case.make not in ELSEWHERE])
def test_every_step_is_a_link_with_the_gradient_of_the_oracle(case):
    x, joint, program = traced(case)
    for k, gamma, segment in SETTINGS:
        if segment > 1 and case.make in ONE_LESS:
            continue  # the segments are others
        _, found, records = joint.gradients(options(iterations=k, damping=gamma, segment=segment, min_length=2))
        _, expected = reference_gradients(program, (x,), probe_loss, k, gamma, segment=segment)
        assert [(r.length, r.decision) for r in records] == [(STEPS - (case.make in ONE_LESS), "rewritten")]
        assert_gradients_close(found, expected, 1e-10, 1e-13, f"k = {k}, damping {gamma}, S = {segment}")


@by_name([case for case in FOUND if case.make in ELSEWHERE])
def test_a_step_that_begins_elsewhere_comes_to_the_same(case):
    _, joint, _ = traced(case)
    _, exact, _ = joint.gradients(None)
    errors = []
    for k in range(STEPS - 1):
        _, found, records = joint.gradients(options(iterations=k, min_length=2))
        assert {(r.length, r.decision) for r in records} <= {(STEPS, "rewritten"), (2 * STEPS, "rewritten")}
        errors.append(relative_error(found, exact))
    assert errors[-1] < 0.1 * errors[0]


@by_name([case for case in PUBLISHED if case.name in OTHERS])
def test_all_other_cells_have_exact_gradients_or_those_of_the_oracle(case):
    x, joint, program = traced(case)
    _, found, records = joint.gradients(options(iterations=1, min_length=2))
    if any(r.decision == "rewritten" for r in records):
        _, expected = reference_gradients(program, (x,), probe_loss, 1, 0.0)
    else:
        _, expected, _ = joint.gradients(None)
    assert_gradients_close(found, expected, 1e-10, 1e-13)
