"""Between two checks of "auto", the last iteration's change of w is measured. A jump brings the next check forward."""

from __future__ import annotations

from collections import deque
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hwbp_compiler
from hwbp_compiler import recurrent, reset_counters
from hwbp_compiler.auto.changes import Changes
from hwbp_compiler.auto.measured import relative
from hwbp_compiler.auto.policy import Policy
from hwbp_compiler.auto.variants import Automatic
from hwbp_compiler.testing import assert_gradients_close, reference_gradients
from hwbp_compiler.testing.reference import Link, Program, keep

pytestmark = pytest.mark.usefixtures("float64")

# -- the policy ---------------------------------------------------------------------------------------------------


def checks(policy, changes, cosine=0.999, measured=0.1):
    """The steps that are checks, if each step in between measures the next of ``changes``."""
    found = []
    for step, change in enumerate(changes):
        if policy.checks_now():
            found.append(step)
            policy.observe([cosine], [measured])
        else:
            policy.notice(change)
    return found


def test_without_a_jump_checks_come_when_they_are_due():
    assert checks(Policy(1, 0.99, 20, [1]), [0.12] * 50) == [0, 20, 40]


@pytest.mark.parametrize("jump, seen", [(1, 5), (3, 5), (4, 5), (9, 10), (18, 19)])
def test_a_jump_makes_the_next_step_a_check_but_not_too_soon_after_the_last(jump, seen):
    changes = [0.1] * 21
    changes[jump] = 0.3
    assert checks(Policy(1, 0.99, 20, [1]), changes)[:2] == [0, seen]


@given(st.integers(1, 60), st.lists(st.floats(0, 10) | st.just(nan) | st.just(inf), min_size=1, max_size=200))
def test_at_most_three_extra_checks_lie_between_two_regular_ones(every, changes):
    found = checks(Policy(1, 0.99, every, [1]), changes)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert all(max(every // 4, 1) <= gap <= every for gap in gaps)


@pytest.mark.parametrize("iterations, power", [(1, 4), (2, 3), (4, 2.5)])
def test_the_cosine_is_expected_to_fall_with_the_change_as_the_error_of_a_geometric_series(iterations, power):
    """The last change is about r^k and the error r^(k+1), so that 1 - cosine grows with the change to the power of
    2 (k + 1) / k.
    """
    policy = Policy(1, 0.9, 100, [iterations])
    assert policy.checks_now()
    policy.observe([0.999], [0.01])  # 1 - cosine may grow a hundredfold
    assert policy.jump == pytest.approx(0.01 * 100 ** (1 / power))


@pytest.mark.parametrize("cosine, change", [(0.5, 0.1), (nan, 0.1), (1.0, 0.1), (0.999, nan), (0.999, 0.0)])
def test_nothing_is_a_jump_where_steps_are_exact_or_nothing_was_measured(cosine, change):
    policy = Policy(1, 0.99, 20, [1])
    assert policy.checks_now()
    policy.observe([cosine], [change])
    assert policy.jump == inf and not policy.notice(1e9)


def test_checks_that_came_early_in_vain_make_others_less_likely():
    """A batch that differs from the others by a factor of two is noise from the third time on."""
    changes = [0.1, *[0.1] * 9, 0.2] * 30
    found = checks(Policy(1, 0.99, 100, [1]), changes, cosine=0.99)
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert gaps[0] < 50 and max(gaps) == 100 and gaps.count(100) >= len(gaps) // 2 - 1


# -- what is measured -----------------------------------------------------------------------------------------------

LENGTH, WIDTH, BATCH = 9, 3, 2


class Blocks(nn.Module):
    """The gradient of row i of ``offsets`` is w_{i+1}, that of ``start`` is w_0."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LENGTH))
        self.offsets = nn.Parameter(torch.zeros(LENGTH, BATCH, WIDTH))
        self.start = nn.Parameter(torch.randn(BATCH, WIDTH))

    def step(self, i, x, offset, h, hold=keep):
        return h + hold(torch.tanh(self.layers[i](h + x[i]))) + offset

    def forward(self, x):
        h = self.start
        for i in range(LENGTH):
            h = self.step(i, x, self.offsets[i], h)
        return h

    def program(self):
        def link(x, i):
            return Link(lambda s, side, hold: ((self.step(i, x, side[0], s[0], hold),), ()), (self.offsets[i],))

        def forward(run, x):
            return run([link(x, i) for i in range(LENGTH)], (self.start,)).states[-1][0]

        return Program(dict(self.named_parameters()), forward)


class Loop(Blocks):
    """The same over time, for a cell with an update gate."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def step(self, i, x, offset, h, hold=keep):
        return self.cell(x[i], offset, h, hold)

    def cell(self, x, offset, h, hold=keep):
        keeps, new = self.layers
        gate = torch.sigmoid(keeps(h))
        return hold(gate) * h + hold((1 - gate) * torch.tanh(new(h) + x)) + offset

    def forward(self, x):
        def cell(inputs, h):
            h = self.cell(*inputs, h)
            return h, h

        return recurrent(cell, (x, self.offsets), self.start)[1]


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH)

    def forward(self, x):
        return self.gru(x)[1][0]


class CellOverTime(nn.Module):
    """Does what ``layer`` does."""

    def __init__(self, layer):
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(self.cell, name, getattr(layer.gru, f"{name}_l0"))

    def forward(self, x):
        def cell(x_t, h):
            h = self.cell(x_t, h)
            return h, h

        return recurrent(cell, x, torch.zeros(BATCH, WIDTH))[1]


def loss(y):
    return (y**3).sum()


def measured(model, x, monkeypatch, **options):
    """The forms, the one in use, what a check measured for each, and what three steps measured for the one in use. The
    model's gradients are those of the last step.
    """
    seen, used = [], []
    observe, notice = Policy.observe, Policy.notice

    def observed(self, cosines, changes=()):
        observe(self, cosines, changes)
        seen.append((self.position, list(changes)))

    def started(self, forms, options, checks, *args):
        start(self, forms, options, checks, *args)
        seen.append([rung.how for rung in checks.rungs])

    start = Automatic.__init__
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "observe", observed)
        patch.setattr(Policy, "notice", lambda self, change: used.append(change) or notice(self, change))
        patch.setattr(Automatic, "__init__", started)
        given = {"rewrite": "always", "segment": "auto", "target_cosine": 0.01, **options}
        compiled = torch.compile(model, backend="highway", options=given)
        for _ in range(5):
            if isinstance(model, nn.Module):
                model.zero_grad()
            loss(compiled(x)).backward()
    forms, (position, changes) = seen
    assert len(used) == 3
    return forms, position, changes, used


@pytest.mark.parametrize("kind", [Blocks, Loop])
@pytest.mark.parametrize("k, gamma", [(1, 0.0), (2, 0.3)])
def test_the_change_is_that_of_the_oracles_w(kind, k, gamma, monkeypatch):
    """Over all states; with segments over the last state of each. Checks and steps measure the same, and the gradient
    of the form that is watched is the oracle's.
    """
    model, x = kind(), torch.randn(LENGTH, BATCH, WIDTH)

    def states(iterations, how):
        _, of = reference_gradients(model.program(), (x,), loss, iterations, gamma, segment=how.segment)
        rows = torch.cat([of["start"][None], of["offsets"]])
        return rows if how.segment == 1 else rows.flip(0)[:: how.segment][: how.segments(LENGTH)]

    forms, position, changes, used = measured(model, x, monkeypatch, iterations=k, damping=gamma)
    assert {how.segment for how in forms} >= {1, 2}
    for how, change in zip(forms, changes, strict=True):
        now, before = states(k, how), states(k - 1, how)
        assert change == pytest.approx(float((now - before).norm() / now.norm()), rel=1e-5)  # float32
    assert used == pytest.approx([changes[position]] * 3, rel=1e-5)
    _, expected = reference_gradients(model.program(), (x,), loss, k, gamma, segment=forms[position].segment)
    assert_gradients_close({name: p.grad for name, p in model.named_parameters()}, expected, 1e-10, 1e-13)


def test_a_recurrent_module_measures_what_its_cell_does(monkeypatch):
    layer, x = Layer(), torch.randn(LENGTH, BATCH, WIDTH)
    forms, _, changes, used = measured(layer, x, monkeypatch, iterations=1)
    same, _, expected, _ = measured(CellOverTime(layer), x, monkeypatch, iterations=1)
    assert forms == same
    apart = [i for i, how in enumerate(forms) if how.segment > 1]  # S = 1: the module's rows begin after h_0
    assert apart and [changes[i] for i in apart] == pytest.approx([expected[i] for i in apart], rel=1e-5)


def test_with_an_lstm_all_components_count(monkeypatch):
    model = nn.LSTM(WIDTH, WIDTH)
    forms, _, changes, used = measured(lambda x: model(x)[0], torch.randn(40, BATCH, WIDTH), monkeypatch, iterations=1)
    assert all(0 < change < 1 for change in changes) and used


def test_a_jump_in_training_is_followed_by_a_check(monkeypatch):
    """And by a better form, long before the next check is due."""
    model, x = Blocks(), torch.randn(LENGTH, BATCH, WIDTH)
    options = {"rewrite": "always", "iterations": 1, "segment": "auto", "target_cosine": 0.95, "check_every": 40}
    compiled = torch.compile(model, backend="highway", options=options)
    reset_counters()
    cosines = []
    for number in range(14):
        if number == 2:
            with torch.no_grad():
                for layer in model.layers:
                    layer.weight *= 3
        model.zero_grad()
        loss(compiled(x)).backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        exact = torch.autograd.grad(loss(model(x)), list(model.parameters()))
        cosines.append(float(torch.cosine_similarity(found, torch.cat([g.flatten() for g in exact]), dim=0)))
    assert cosines[1] >= 0.95 > min(cosines[2:10]) and cosines[10] == pytest.approx(1, abs=1e-12)
    assert min(cosines[11:]) >= 0.95
    counters = hwbp_compiler.counters()
    assert counters["checks"] == 2 and counters["checks_brought_forward"] == 1


def test_with_k_0_nothing_is_measured(monkeypatch):
    model, x = Blocks(), torch.randn(LENGTH, BATCH, WIDTH)
    options = {"rewrite": "always", "iterations": 0, "segment": 4, "damping": "auto", "target_cosine": 0.01}
    compiled = torch.compile(model, backend="highway", options=options)
    seen = []
    monkeypatch.setattr(Policy, "notice", lambda self, change: seen.append(change))
    for _ in range(4):
        model.zero_grad()
        loss(compiled(x)).backward()
    exact = torch.autograd.grad(loss(model(x)), list(model.parameters()))
    assert not all(torch.allclose(p.grad, e) for p, e in zip(model.parameters(), exact, strict=True))  # the form ran
    assert not seen


def test_on_a_gpu_a_change_is_read_when_the_host_need_not_wait_for_it():
    changes = Changes(deque(), later=8)
    read = []
    for number in range(10):
        changes.arrived.append(lambda number=number: read.append(number) or float(number))
        assert changes.take() == ([] if number < 8 else [number - 8.0])
    assert read == [0, 1]
    changes.forget()
    assert not changes.arrived


@pytest.mark.parametrize("change, size", [(nan, 1.0), (1.0, inf), (1.0, 0.0), (inf, inf)])
def test_without_a_finite_gradient_there_is_no_change(change, size):
    assert relative(change, size) != relative(change, size)
