"""Elementwise recurrences under damping: a state's gradient is w^k, and every gradient beside it is computed from w^k.

In the backward pass, ``w * a`` (the gradient of the state before a step) and ``w * h`` (the gradient of its gate) are
products of the same form. If one is taken for the other, the result is right at damping 0, and silently wrong at any
other.
"""

from __future__ import annotations

from math import comb

import pytest
import torch
from torch import nn

from hwbp_compiler.testing import assert_gradients_close, models, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import capture, options, trace
from hwbp_compiler.testing.models import Model, Recurrence
from hwbp_compiler.testing.reference import Link, Program

STEPS = 6
CELLS = {
    "gate and rest": lambda h, a, b: a * h + (1 - a) * b,
    "gate and input": lambda h, a, b: b + a * h,
    "step towards": lambda h, a, b: h + a * (b - h),
    "lerp": lambda h, a, b: torch.lerp(h, b, a),
    "two gates": lambda h, a, b: a.sigmoid() * h + a.cos() * b.tanh(),
    "tanh behind": lambda h, a, b: torch.tanh(a * h + b),
    "relu behind": lambda h, a, b: torch.relu(a * h + b),
    "scale behind": lambda h, a, b: (a * h + b) * b.cos(),
    "gate that sees the state": lambda h, a, b: torch.lerp(b, h, torch.sigmoid(a + h)),
    "bistable": lambda h, a, b: torch.lerp(torch.tanh(b + (1 + torch.tanh(a - h)) * h), h, torch.sigmoid(a * h)),
}
READS = ("select", "list", "unbind", "second dimension", "chunk", "linear", "one number a step", "one for all")
STARTS = ("given", "zeros", "learnt", "scaled", "no gradient")
LOSSES = ("last", "all", "some", "scaled")


class Loop(nn.Module):
    """``h = cell(h, a[t], b[t])``. a and b are read, h starts, and states are returned in one of several ways."""

    def __init__(self, cell, read="select", start="given", loss="last", steps=STEPS):
        super().__init__()
        self.cell, self.read, self.start, self.loss, self.steps = CELLS[cell], read, start, loss, steps
        if start in ("learnt", "scaled"):
            self.first = nn.Parameter(torch.randn(3) if start == "learnt" else torch.randn(2, 3))
            self.register_buffer("factor", torch.rand(2, 3))
        if read == "linear":
            self.make = nn.Linear(3, 6)
        if loss == "scaled":
            self.scale = nn.Parameter(torch.rand(2, 3))
        self.double()

    def example(self):
        def leaf(*shape):
            return (0.1 + 0.8 * torch.rand(*shape, dtype=torch.float64)).requires_grad_()

        steps = self.steps
        args = {
            "list": lambda: [leaf(2, 3) for _ in range(2 * steps)],
            "second dimension": lambda: [leaf(2, steps, 3), leaf(2, steps, 3)],
            "chunk": lambda: [leaf(steps, 2, 6)],
            "linear": lambda: [leaf(steps, 2, 3)],
            "one number a step": lambda: [leaf(steps), leaf(steps, 2, 3)],
            "one for all": lambda: [leaf(3), leaf(steps, 2, 3)],
        }.get(self.read, lambda: [leaf(steps, 2, 3), leaf(steps, 2, 3)])()
        if self.start in ("given", "no gradient"):
            args.append(leaf(2, 3).detach().requires_grad_(self.start == "given"))
        return tuple(args)

    def parts(self, args):
        """a and b of every step, and the first state."""
        args = list(args)
        h = args.pop() if self.start in ("given", "no gradient") else torch.zeros(2, 3, dtype=torch.float64)
        if self.start in ("learnt", "scaled"):
            h = self.first.expand(2, 3) if self.start == "learnt" else self.first * self.factor
        if self.read == "list":
            pairs = list(zip(args[: self.steps], args[self.steps :], strict=True))
        elif self.read == "unbind":
            pairs = list(zip(args[0].unbind(0), args[1].unbind(0), strict=True))
        elif self.read == "second dimension":
            pairs = [(args[0][:, t], args[1][:, t]) for t in range(self.steps)]
        elif self.read == "chunk":
            pairs = [tuple(args[0][t].chunk(2, -1)) for t in range(self.steps)]
        elif self.read == "linear":
            pairs = [tuple(self.make(args[0][t]).chunk(2, -1)) for t in range(self.steps)]
        elif self.read == "one for all":
            pairs = [(args[0], args[1][t]) for t in range(self.steps)]
        else:
            pairs = [(args[0][t], args[1][t]) for t in range(self.steps)]
        return pairs, h

    def returned(self, states):
        if self.loss == "scaled":
            return self.scale * states[-1]
        chosen = {"last": [-1], "some": [1, 3, -1], "all": range(len(states))}[self.loss]
        return [states[i] for i in chosen]

    def forward(self, *args):
        pairs, h = self.parts(args)
        states = []
        for a, b in pairs:
            h = self.cell(h, a, b)
            states.append(h)
        return self.returned(states)


def retold(model):
    def forward(run, *args):
        pairs, h = model.parts(args)
        links = [Link(lambda state, side, hold: ((model.cell(state[0], *side),), ()), pair) for pair in pairs]
        return model.returned([state for (state,) in run(links, (h,)).states[1:]])

    return Program(dict(model.named_parameters()), forward)


def make(*how, **more):
    torch.manual_seed(0)
    model = Loop(*how, **more)
    return model, model.example()


def assert_six_links(model, args, through=trace, settings=((0, 0.3), (1, 0.3), (3, 0.3), (1, 0.0), (1, 1.0))):
    traced, program = through(model, args, probe_loss), retold(model)
    for k, gamma in settings:
        _, found, records = traced.gradients(options(iterations=k, damping=gamma))
        _, expected = reference_gradients(program, args, probe_loss, k, gamma)
        assert_gradients_close(found, expected, 1e-10, 1e-13)
        assert [(r.decision, r.length) for r in records] == [("rewritten", STEPS)]


# -- the program of the report ------------------------------------------------------------------------------------


def by_hand(a, b, h, tangent, k, gamma):
    """w^k of six links, without the oracle: of n links, at most k are crossed by gamma K."""

    def crossed(n):
        return sum(comb(n, j) * (1 - gamma) ** (n - j) * gamma**j for j in range(min(n, k) + 1))

    states = [h]
    for t in range(STEPS):
        states.append(a[t] * states[-1] + (1 - a[t]) * b[t])
    w = [crossed(STEPS - t) * tangent * torch.prod(a[t:], 0) for t in range(STEPS + 1)]
    return {
        0: torch.stack([w[t + 1] * (states[t] - b[t]) for t in range(STEPS)]),
        1: torch.stack([w[t + 1] * (1 - a[t]) for t in range(STEPS)]),
        2: w[0],
    }


@pytest.mark.parametrize("k", (0, 1, 2, 5))
@pytest.mark.parametrize("gamma", (0.0, 0.2, 1.0))
def test_six_steps_from_a_given_state_are_six_links(k, gamma):
    model, args = make("gate and rest")
    tangent = torch.randn(2, 3, dtype=torch.float64)

    def loss(output):
        return (tangent * output[0]).sum()

    _, found, _ = trace(model, args, loss).gradients(options(iterations=k, damping=gamma))
    _, oracle = reference_gradients(retold(model), args, loss, k, gamma)
    with torch.no_grad():
        expected = by_hand(*args, tangent, k, gamma)
    assert_gradients_close(oracle, expected, 1e-10, 1e-14)
    assert_gradients_close(found, expected, 1e-10, 1e-14)


# -- the kind -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("start", ("given", "zeros"))
@pytest.mark.parametrize("loss", ("last", "all"))
def test_every_cell_has_a_link_for_each_step(cell, start, loss):
    assert_six_links(*make(cell, "list", start, loss))


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("start", STARTS)
def test_gates_may_be_read_and_the_first_state_made_in_any_way(read, start):
    assert_six_links(*make("gate and rest", read, start), settings=((1, 0.3),))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("start", STARTS)
def test_losses_may_look_at_any_state(loss, start):
    assert_six_links(*make("gate and input", "select", start, loss), settings=((1, 0.3),))


@pytest.mark.parametrize("wanted", ("gates", "inputs", "first state and inputs"))
def test_some_gradients_may_not_be_wanted(wanted):
    model, args = make("gate and rest")
    frozen = {"gates": (1, 2), "inputs": (0, 2), "first state and inputs": (0,)}[wanted]
    args = tuple(a.detach().requires_grad_(i not in frozen) for i, a in enumerate(args))
    assert_six_links(model, args, settings=((1, 0.3),))


@pytest.mark.parametrize("start", ("given", "scaled"))
def test_the_scale_of_the_result_is_no_link(start):
    """``c * h`` multiplies like a step, but adds nothing."""
    model, args = make("gate and rest", "list", start, "scaled")
    assert_six_links(model, args)
    gates_alone = tuple(a.detach().requires_grad_(i < STEPS) for i, a in enumerate(args))
    assert_six_links(model, gates_alone)


class LRU(nn.Module):
    """A decay that is computed at every step, and inputs that get their gradient as a whole, for all steps at once."""

    def __init__(self, start):
        super().__init__()
        self.into, self.out, self.decay = nn.Linear(3, 3), nn.Linear(3, 3), nn.Parameter(torch.rand(3))
        self.first = nn.Parameter(torch.randn(2, 3)) if start == "learnt" else None
        self.double()

    def step(self, h, b):
        return torch.sigmoid(self.decay) * h + b

    def start(self, x):
        return torch.zeros_like(x[0]) if self.first is None else self.first

    def forward(self, x):
        h, states = self.start(x), []
        for b in self.into(x):
            h = self.step(h, b)
            states.append(h)
        return self.out(torch.nn.functional.gelu(torch.stack(states)))


@pytest.mark.parametrize("start", ("zeros", "learnt"))
@pytest.mark.parametrize("k, gamma", ((0, 0.3), (1, 0.3), (2, 1.0), (1, 0.0)))
def test_inputs_may_get_their_gradient_for_all_steps_at_once(start, k, gamma):
    torch.manual_seed(0)
    model, x = LRU(start), torch.randn(STEPS, 2, 3, dtype=torch.float64, requires_grad=True)

    def forward(run, x):
        links = [Link(lambda state, side, hold: ((model.step(state[0], *side),), ()), (b,)) for b in model.into(x)]
        states = run(links, (model.start(x),)).states[1:]
        return model.out(torch.nn.functional.gelu(torch.stack([h for (h,) in states])))

    program = Program(dict(model.named_parameters()), forward)
    _, found, records = trace(model, (x,), probe_loss).gradients(options(iterations=k, damping=gamma))
    _, expected = reference_gradients(program, (x,), probe_loss, k, gamma)
    assert_gradients_close(found, expected, 1e-10, 1e-13)
    assert [(r.decision, r.length) for r in records] == [("rewritten", STEPS)]


def test_the_same_through_dynamo():
    assert_six_links(*make("gate and rest"), through=capture, settings=((1, 0.2),))


@pytest.mark.parametrize("cell", ("gates", "bounded_gates", "min_gru", "diagonal", "gru", "lstm"))
@pytest.mark.parametrize("start", ("given", "learnt", "zeros"))
def test_random_models_recurrences_under_damping(cell, start):
    spec = Model(stacks=(Recurrence(cell=cell, start=start),), length=6)
    model, args, loss = models.build(spec)
    _, found, records = trace(model, args, loss).gradients(options(iterations=1, damping=0.3))
    _, expected = reference_gradients(models.program(model), args, loss, 1, 0.3)
    assert_gradients_close(found, expected, 1e-10, 1e-13)
    assert [(r.decision, r.length) for r in records if r.length > 1] == [("rewritten", 6)]
