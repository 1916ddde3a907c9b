"""Cases in which a reason was once wrong or its advice useless. Now each reason is true, and its advice works."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import Residual
from test_refusals import declined, explained, only
from torch import nn

from hwbp_compiler import explain, recurrent
from hwbp_compiler.testing.capture import capture, options
from hwbp_compiler.testing.compare import assert_gradients_close

pytestmark = pytest.mark.usefixtures("float64")

WIDTH, STEPS = 4, 6
RECURRENT = "hwbp_compiler.recurrent(cell, inputs, state)"


class Loop(nn.Module):
    """``step(self, x_t, *state) -> output, *state`` over time, from zeros. Weights are passed by name."""

    def __init__(self, step, states=1, last=False, **parts):
        super().__init__()
        self.step, self.states, self.last = step, states, last
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        state = [x.new_zeros(x.shape[1], WIDTH) for _ in range(self.states)]
        outputs = []
        for x_t in x:
            output, *state = self.step(self, x_t, *state)
            outputs.append(output)
        return outputs[-1] if self.last else torch.stack(outputs)


def vector():
    return nn.Parameter(torch.rand(WIDTH))


def inputs(width=3):
    return torch.randn(STEPS, 2, width)


# -- (a) the real reason ----------------------------------------------------------------------------------------


def wkv(self, x, a, b, p):
    """RWKV's attention in the form that cannot overflow."""
    k, v = self.key(x), self.value(x)
    most = torch.maximum(p, self.first + k)
    old, new = torch.exp(p - most), torch.exp(self.first + k - most)
    y = (old * a + new * v) / (old * b + new)
    decayed = p - torch.exp(self.decay)
    most = torch.maximum(decayed, k)
    old, new = torch.exp(decayed - most), torch.exp(k - most)
    a = old * a + new * v
    b = old * b + new
    return y, a, b, most


def rwkv():
    return Loop(wkv, 3, key=nn.Linear(3, WIDTH), value=nn.Linear(3, WIDTH), first=vector(), decay=vector())


def filtered(self, z, x, p):
    """A Kalman filter with one variance per entry."""
    x, p = self.by * x, self.by * p * self.by + self.q
    gain = p / (p + self.r)
    x = x + gain * (z - x)
    p = (1 - gain) * p
    return x, x, p


def kalman():
    return Loop(filtered, 2, by=vector(), q=vector(), r=vector())


@pytest.mark.parametrize(("model", "min_length"), [(rwkv, 1), (rwkv, 4), (kalman, 1)])
def test_an_elementwise_recurrence_of_several_tensors_is_called_one(model, min_length):
    chain = only(declined(model(), inputs(3 if model is rwkv else WIDTH), min_length=min_length))
    assert chain.reason.startswith("a recurrence that is entirely elementwise and carries several tensors")
    assert RECURRENT in chain.advice and 4 <= chain.length <= STEPS


class Assigned(nn.Module):
    """The same, batch first and written into slices, as in transformers."""

    def __init__(self):
        super().__init__()
        self.loop = rwkv()

    def forward(self, x):
        y = x.new_zeros(2, STEPS, WIDTH)
        state = [x.new_zeros(2, WIDTH) for _ in range(3)]
        for t in range(STEPS):
            y[:, t], *state = wkv(self.loop, x[t], *state)
        return torch.sigmoid(x[0, 0, 0]) * y


class Solved(nn.Module):
    """A Kalman filter with covariances."""

    def __init__(self):
        super().__init__()
        self.by, self.seen = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2, bias=False)

    def forward(self, zs):
        x, p, one = zs.new_zeros(zs.shape[1], WIDTH), torch.eye(WIDTH), torch.eye(2)
        by, seen = self.by.weight, self.seen.weight
        for z in zs:
            x, p = x @ by.T, by @ p @ by.T + torch.eye(WIDTH)
            gain = torch.cholesky_solve(seen @ p, torch.linalg.cholesky(seen @ p @ seen.T + one)).mT
            x, p = x + (z - x @ seen.T) @ gain.T, p - gain @ seen @ p
        return x


class Recast(nn.Module):
    """One gated step that returns the state in another dtype."""

    def __init__(self):
        super().__init__()
        self.gate, self.linear = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = torch.tanh(x * self.gate.bias)
        return (torch.sigmoid(self.gate(x)) * h + torch.tanh(self.linear(h))).float()


@pytest.mark.parametrize("min_length", [1, 4])
@pytest.mark.parametrize(
    ("model", "given", "said"),
    [(Assigned, 3, "carries several tensors"), (Solved, 2, "aten::cholesky_solve")],
)
def test_what_keeps_a_single_join_from_being_a_link_is_told(model, given, said, min_length):
    chains = declined(model(), inputs(given), min_length=min_length)
    assert any(said in chain.reason for chain in chains)
    assert not any(chain.reason.startswith("shorter than min_length=1") for chain in chains)


@pytest.mark.parametrize("min_length", [1, 4])
def test_a_single_join_that_changes_the_dtype_is_not_said_to_be_too_short(min_length):
    for chain in declined(Recast(), torch.randn(2, WIDTH), min_length=min_length):
        assert chain.reason != "shorter than min_length=1" and "iterations=0" not in chain.advice


def test_a_chain_is_found_whatever_min_length_below_its_own():
    """Single links used to take its nodes if ``min_length`` admitted them."""

    def step(self, z, x, p):
        x, p = self.by(x), p + self.q
        gain = p / (p + self.r)
        return (x + gain * (z - x), x + gain * (z - x), (1 - gain) * p)

    for min_length in (1, 4):
        torch.manual_seed(0)
        model = Loop(step, 2, by=nn.Linear(WIDTH, WIDTH), q=vector(), r=vector())
        chain = only(explained(model, inputs(WIDTH), min_length=min_length).chains)
        assert (chain.decision, chain.length) == ("rewritten", 5)


# -- (b) one link ------------------------------------------------------------------------------------------------


def block_input():
    return torch.randn(3, WIDTH, requires_grad=True)


@pytest.mark.parametrize(("iterations", "min_length"), [(1, 1), (4, 4), ("exact", 1)])
def test_nothing_is_advised_for_one_link(iterations, min_length):
    chain = only(declined(Residual(), block_input(), iterations=iterations, min_length=min_length))
    assert chain.length == 1 and chain.advice.startswith("Nothing to do: a single link")


class OneStep(nn.Module):
    def __init__(self, through_recurrent):
        super().__init__()
        self.cell, self.layer = nn.GRUCell(3, WIDTH), nn.GRU(3, WIDTH)
        self.through_recurrent = through_recurrent

    def forward(self, x):
        if self.through_recurrent:
            return recurrent(lambda x, h: (self.cell(x, h),) * 2, x, x.new_zeros(2, WIDTH))[0]
        return self.layer(x)[0]


@pytest.mark.parametrize("through_recurrent", [True, False])
def test_nothing_is_advised_for_one_step(through_recurrent):
    found = declined(OneStep(through_recurrent), inputs()[:1], iterations=1, min_length=1)
    assert found and all(chain.advice.startswith("Nothing to do: a single link") for chain in found)


def test_one_link_may_still_be_left_out_where_that_is_asked_for():
    chain = only(explained(Residual(), block_input(), iterations=0, min_length=1).chains)
    assert chain.decision == "rewritten"


# -- (c) name what handles it ------------------------------------------------------------------------------------


class StepByStep(nn.Module):
    """A recurrent module that is called with one step at a time."""

    def __init__(self, kind, layers=1):
        super().__init__()
        self.module, self.layers, self.is_lstm = kind(3, WIDTH, num_layers=layers), layers, kind is nn.LSTM

    def forward(self, x):
        h = x.new_zeros(self.layers, x.shape[1], WIDTH)
        state = (h, h) if self.is_lstm else h
        outputs = []
        for x_t in x:
            output, state = self.module(x_t[None], state)
            outputs.append(output)
        return torch.cat(outputs)


@pytest.mark.parametrize(("kind", "layers"), [(nn.GRU, 1), (nn.LSTM, 1), (nn.GRU, 2)])
def test_a_module_that_is_called_step_by_step_is_told_once(kind, layers):
    chains = declined(StepByStep(kind, layers), inputs(), min_length=layers)
    assert [(chain.length, chain.times) for chain in chains] == [(1, STEPS)] * layers
    assert all(chain.reason.startswith("called step by step in a loop") for chain in chains)
    assert all("nn.GRUCell" in chain.advice and RECURRENT in chain.advice for chain in chains)


def test_a_tanh_recurrence_that_is_called_step_by_step_is_told_once():
    chain = only(declined(StepByStep(nn.RNN), inputs()))
    assert chain.times == STEPS and chain.reason.startswith("no elementwise path")


def test_single_steps_that_do_not_follow_one_another_are_no_loop():
    class Apart(StepByStep):
        def forward(self, x):
            return torch.cat([self.module(x_t[None])[0] for x_t in x])

    chain = only(declined(Apart(nn.GRU), inputs()))
    assert chain.reason == "shorter than min_length=4" and chain.times == STEPS


def slstm_step(weights, x, h, c, n, m):
    """xLSTM's scalar cell: gates in the exponent, with a stabilizer against overflow."""
    i, f, z, o = (torch.cat([x, h], -1) @ weights).chunk(4, -1)
    kept = F.logsigmoid(f) + m
    most = torch.maximum(kept, i)
    i, f = torch.exp(i - most), torch.exp(kept - most)
    c, n = f * c + i * torch.tanh(z), f * n + i
    h = torch.sigmoid(o) * c / n
    return h, h, c, n, most


class SLSTM(nn.Module):
    def __init__(self, rolled=False):
        super().__init__()
        self.weights, self.rolled = nn.Parameter(0.3 * torch.randn(3 + WIDTH, 4 * WIDTH)), rolled

    def cell(self, x, state):
        h, *state = slstm_step(self.weights, x, *state)
        return h, tuple(state)

    def forward(self, x):
        state = (x.new_zeros(2, WIDTH),) * 4
        if self.rolled:
            return recurrent(self.cell, x, state)[0]
        outputs = []
        for x_t in x:
            h, state = self.cell(x_t, state)
            outputs.append(h)
        return torch.stack(outputs)


def test_a_state_of_four_tensors_is_sent_to_recurrent_which_takes_it():
    for chain in declined(SLSTM(), inputs()):
        assert chain.reason.startswith("4 tensors pass from each step to the next") and RECURRENT in chain.advice
    assert only(explained(SLSTM(rolled=True), inputs()).chains).decision == "rewritten"


# -- (d) no connection skips steps -------------------------------------------------------------------------------


class LSTM(nn.Module):
    """A loss only at the last step. What returns through ``hidden`` may be cast or reshaped before it is used."""

    def __init__(self, how="plain"):
        super().__init__()
        self.input, self.hidden, self.how = nn.Linear(3, 4 * WIDTH), nn.Linear(WIDTH, 4 * WIDTH), how

    def forward(self, x):
        lead = (x.shape[1], 1) if self.how == "reshaped" else (x.shape[1],)
        h = c = x.new_zeros(*lead, WIDTH)
        for x_t in x:
            seen = self.hidden(h)
            if self.how == "cast":
                seen = F.linear(h.float(), self.hidden.weight.float()).double() + self.hidden.bias
            i, f, g, o = (self.input(x_t.view(*lead, 3)) + seen).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return h.view(-1, WIDTH)


@pytest.mark.parametrize(("how", "tolerance"), [("reshaped", 1e-10), ("cast", 1e-5)])
def test_an_lstm_whose_products_are_cast_or_reshaped_is_the_same_chain(how, tolerance):
    x, weights = inputs(), torch.randn(2, WIDTH)
    plain = LSTM()
    other = LSTM(how)
    other.load_state_dict(plain.state_dict())
    found = [capture(model, (x,), lambda y: (y * weights).sum()) for model in (plain, other)]
    for k in (0, 1, 3):
        chosen = options(iterations=k, rewrite="always")
        (_, expected, _), (_, actual, records) = (one.gradients(chosen) for one in found)
        assert [(r.length, r.decision) for r in records] == [(STEPS, "rewritten")]
        assert_gradients_close(actual, expected, tolerance, what=f"{how}, k = {k}")


def test_an_lstm_cell_under_autocast_is_a_chain():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(3, WIDTH)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                state = (x.new_zeros(x.shape[1], WIDTH),) * 2
                for x_t in x:
                    state = self.cell(x_t, state)
                return state[0]

    chain = only(explained(Cell().float(), inputs().float()).chains)
    assert (chain.decision, chain.length) == ("rewritten", STEPS)
    assert chain.multiplier.startswith("c->h: sigmoid(...)*sigmoid(...)*(1 - tanh(...)**2); c->c: sigmoid(...)")


class Momentum(nn.Module):
    """x' = x + v' with v' = 0.9 v + f(x): a state of two tensors, found from either one."""

    def __init__(self, blocks):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))

    def forward(self, x):
        v = torch.zeros_like(x)
        for layer in self.layers:
            v = 0.9 * v + 0.1 * torch.tanh(layer(x))
            x = x + v
        return x


@pytest.mark.parametrize("blocks", [6, 12])
def test_a_momentum_network_is_not_said_to_skip_steps(blocks):
    chains = explained(Momentum(blocks), torch.randn(2, WIDTH)).chains
    assert not any("skips" in chain.reason for chain in chains)
    longest = max(chains, key=lambda chain: chain.length)
    assert (longest.decision, longest.length) == ("rewritten", blocks)


# -- (e) complex numbers -----------------------------------------------------------------------------------------


class LRU(nn.Module):
    """A linear recurrence with a complex decay; with ``block``, it is not linear."""

    def __init__(self, block=False, rolled=False):
        super().__init__()
        self.decay = nn.Parameter(torch.polar(torch.rand(WIDTH), torch.rand(WIDTH)))
        self.input = nn.Parameter(torch.randn(3, WIDTH, dtype=torch.complex128))
        self.back = nn.Parameter(0.3 * torch.randn(WIDTH, WIDTH, dtype=torch.complex128)) if block else None
        self.rolled = rolled

    def cell(self, x, h):
        new = self.decay * h + x.to(torch.complex128) @ self.input
        h = new if self.back is None else new + torch.tanh(h @ self.back)
        return h.real, h

    def forward(self, x):
        h = x.new_zeros(2, WIDTH, dtype=torch.complex128)
        if self.rolled:
            return recurrent(self.cell, x, h)[0]
        outputs = []
        for x_t in x:
            output, h = self.cell(x_t, h)
            outputs.append(output)
        return torch.stack(outputs)


class ComplexResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH, dtype=torch.complex128) for _ in range(STEPS))

    def forward(self, x):
        x = x.to(torch.complex128)
        for weight in self.weights:
            x = x + torch.tanh(x @ weight)
        return x.real


class ComplexBlock(ComplexResidual):
    def forward(self, x):
        for weight in self.weights:
            x = x + torch.tanh((x.to(torch.complex128) @ weight).real)
        return x


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
@pytest.mark.parametrize(
    ("model", "shape", "multiplier"),
    [
        (LRU, (STEPS, 2, 3), "weight"),
        (lambda: LRU(block=True), (STEPS, 2, 3), "weight"),
        (ComplexResidual, (2, WIDTH), "1"),
        (ComplexBlock, (2, WIDTH), "1"),
    ],
)
def test_complex_numbers_keep_nothing_from_being_a_chain(model, shape, multiplier):
    """These are chains. In the past they were declined with a reason about complex numbers."""
    chain = only(explained(model(), torch.randn(shape)).chains)
    assert (chain.decision, chain.length, chain.multiplier) == ("rewritten", STEPS, multiplier)


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_recurrent_takes_what_is_sent_to_it_for_its_complex_state():
    assert only(explained(LRU(block=True, rolled=True), inputs()).chains).decision == "rewritten"


# -- (f) not linear in the gradient ------------------------------------------------------------------------------


def changed_by(formula):
    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return formula(gradient)

    return lambda x: Changed.apply(x)  # torch 2.11 breaks the graph at Changed.apply itself


FORMULAS = {
    "gt": lambda g: g * (g > 0),
    "eq": lambda g: torch.where(g == 0, 1.0, g),
    "pow": lambda g: g.pow(3),
    "clamp_min": lambda g: g.clamp_min(-0.1),
    "abs": lambda g: g.abs(),
    "amax": lambda g: g / (1 + g.amax()),
}


class Changing(nn.Module):
    def __init__(self, change, on_trunk):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(STEPS))
        self.change, self.on_trunk = change, on_trunk

    def forward(self, x):
        for layer in self.layers:
            y = torch.tanh(layer(x))
            x = self.change(x + y) if self.on_trunk else x + self.change(y)
        return x


@pytest.mark.parametrize("on_trunk", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_backward_that_is_not_linear_in_the_gradient_is_called_so(name, on_trunk):
    chains = declined(Changing(changed_by(FORMULAS[name]), on_trunk), torch.randn(2, WIDTH))
    chain = chains[-1]
    assert chain.reason == f"the result of aten::{name} is not linear in the gradient"
    assert chain.length >= STEPS - 1 and "hook" in chain.advice


def test_a_hook_that_is_not_linear_in_the_gradient_is_called_so():
    class Hooked(Changing):
        def forward(self, x):
            for layer in self.layers:
                y = torch.tanh(layer(x))
                y.register_hook(lambda g: g.clamp(-1, 1))
                x = x + y
            return x

    reasons = [chain.reason for chain in declined(Hooked(None, False), torch.randn(2, WIDTH))]
    assert any(reason.endswith("is not linear in the gradient") for reason in reasons), reasons


def test_where_only_other_parts_are_compiled_explain_says_so():
    linear = torch.compiler.disable(nn.Linear(3, 3))
    note, where = explain(lambda x: linear(x.sin()), torch.randn(2, 3)).notes
    assert "Whatever needs a gradient runs in eager mode" in note
    assert where.startswith("The graph breaks at ") and "linear(x.sin())" in where
    (note,) = explain(lambda x: x.sin(), torch.randn(2, 3)).notes
    assert "No parameter or input that the output depends on requires a gradient" in note
