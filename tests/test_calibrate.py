"""``calibrate``: the gradient of every form on one batch, and the form that it recommends."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import hwbp_compiler
from hwbp_compiler import HighwayError, OptionError, calibrate
from hwbp_compiler.calibration import Calibration, Row
from hwbp_compiler.testing import models, reference_gradients
from hwbp_compiler.testing.models import Model, Stack

DEPTH = 9


@pytest.fixture(scope="module")
def stack():
    """A model with its loss, its exact gradients, and calibrate's result."""
    model, args, loss = models.build(Model(stacks=(Stack(depth=DEPTH, width=4),), batch=2, length=3))
    grid = {"iterations": (0, 1, 2, 8, 20), "segments": (1, 2, 5, 20), "dampings": (0.0, 0.3)}
    return model, args, loss, calibrate(model, args, loss, 0.9, **grid)


def test_every_row_is_the_oracles(stack):
    model, args, loss, found = stack
    program = next(models.programs(model))
    _, exact = reference_gradients(program, args, loss, "exact")
    for row in found.table:
        _, other = reference_gradients(program, args, loss, row.iterations, row.damping, segment=row.segment)
        a, b = (torch.cat([g[n].flatten() for n in row.parameters]) for g in (exact, other))
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-9)
        for name, compared in row.parameters.items():
            error = float((exact[name] - other[name]).norm() / exact[name].norm())
            assert compared.relative_error == pytest.approx(error, rel=1e-5, abs=1e-7)


def test_what_is_ordinary_backprop_is_no_row_and_each_form_is_one(stack):
    forms = [(row.segment, row.damping, row.iterations) for row in stack[3].table]
    expected = [(1, g, k) for g in (0.0, 0.3) for k in (0, 1, 2, 8)]
    expected += [(2, g, k) for g in (0.0, 0.3) for k in (0, 1, 2)] + [(5, g, 0) for g in (0.0, 0.3)]
    assert forms == expected


def test_a_change_is_the_norm_between_neighbours(stack):
    model, args, loss, found = stack
    program = next(models.programs(model))
    _, exact = reference_gradients(program, args, loss, "exact")
    rows = [row for row in found.table if row.segment == 1 and row.damping == 0]
    assert math.isnan(rows[0].change)
    for less, row in zip(rows, rows[1:], strict=False):
        a, b = (
            torch.cat([reference_gradients(program, args, loss, r.iterations)[1][n].flatten() for n in row.parameters])
            for r in (less, row)
        )
        whole = torch.cat([exact[n].flatten() for n in row.parameters])
        assert row.change == pytest.approx(float((a - b).norm() / whole.norm()), rel=1e-5)


def rows(*made):
    return [Row(k, s, 0.0, cosine, 0.1, change, saves) for k, s, cosine, change, saves in made]


def test_the_cheapest_form_that_is_good_enough_is_recommended():
    nan = math.nan
    table = rows((0, 1, 0.9, nan, 3.0), (1, 1, 0.995, 0.1, 2.0), (2, 1, 0.999, 0.2, 1.0), (0, 8, nan, nan, 9.0))
    assert Calibration(table, 0.99).options == {"iterations": 1, "segment": 1, "damping": 0.0}
    assert Calibration(table, 0.9).options["iterations"] == 0
    nothing = Calibration(table, 0.9999)
    assert nothing.options == {"iterations": "exact"} and "no form tried is good enough" in str(nothing)
    slow = Calibration(rows((0, 1, 0.999, nan, -1.0)), 0.99)
    assert slow.options == {"iterations": "exact"} and "exact backprop is faster" in str(slow)
    # Measurements count more than estimates.
    table[1].seconds, table[2].seconds = 3e-3, 1e-3
    assert Calibration(table, 0.99, exact_seconds=2e-3).options["iterations"] == 2


def test_terms_that_grow_are_named():
    table = rows((0, 1, 0.5, math.nan, 1), (1, 1, 0.5, 0.2, 1), (2, 1, 0.5, 0.3, 1), (4, 1, 0.5, 0.9, 1))
    found = Calibration(table, 0.99)
    assert found.growing == [table[2]]
    assert "terms grow: iteration 2 changes more than the one before (S = 1)" in str(found)


def test_it_is_plain_data_a_table_and_a_figure(stack, tmp_path):
    found = stack[3]
    data = found.to_dict()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["table"][0]["change"] is None and len(data["table"]) == len(found.table)
    assert len(str(found).splitlines()) >= len(found.table) + 2
    found.plot(tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").stat().st_size > 1000


class Disturbed(nn.Module):
    """Dropout, and buffers that a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        x = self.norm(x)
        for block in self.blocks:
            x = x + torch.tanh(nn.functional.dropout(block(x), 0.1, self.training))
        return x


def test_the_model_its_buffers_gradients_and_random_numbers_are_left_alone_and_a_step_is_measured():
    torch.manual_seed(0)
    model, x = Disturbed(), torch.randn(5, 4)
    model(x).sum().backward()
    before = [t.clone() for t in (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))]
    state = torch.get_rng_state()
    found = calibrate(model, x, lambda y: y.square().sum(), 0.5, iterations=(1,), segments=(1,), measure=True)
    assert torch.equal(torch.get_rng_state(), state)
    after = (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (row,) = found.table
    assert row.seconds > 0 and found.exact_seconds > 0
    assert set(row.parameters) == {name for name, _ in model.named_parameters()}  # the norm's come from the first state
    assert "exact backprop:" in str(found)


def test_a_loop_over_time_is_calibrated_too():
    torch.manual_seed(0)
    cell = nn.GRUCell(2, 3).double()

    def run(x):
        def step(x, h):
            h = cell(x, h)
            return h, h

        return hwbp_compiler.recurrent(step, x, torch.zeros(4, 3, dtype=x.dtype))[0]

    found = calibrate(
        run, torch.randn(12, 4, 2, dtype=torch.float64), lambda y: y.square().sum(), iterations=(0, 1), segments=(1, 4)
    )
    assert [(row.iterations, row.segment) for row in found.table] == [(0, 1), (1, 1), (0, 4), (1, 4)]
    errors = [row.relative_error for row in found.table]
    assert errors[0] > errors[1] > 0 and errors[0] > errors[2] > errors[3] > 0


def test_refusals():
    model, x = nn.Linear(2, 2), torch.randn(3, 2)
    with pytest.raises(HighwayError, match="nothing to choose"):
        calibrate(model, x, torch.sum)
    with pytest.raises(OptionError, match="'iterations' = -1"):
        calibrate(model, x, torch.sum, iterations=(-1,))
    with pytest.raises(OptionError, match="'target_cosine' = 2"):
        calibrate(model, x, torch.sum, 2)
