"""Residual paths as people write them: each kind is compared with the oracle, and has the expected number of links.

A case is one step of the trunk, written once. The model runs it as it is; the oracle puts ``hold`` around what mixes
elements.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwbp_compiler.testing import assert_gradients_close, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import capture, options
from hwbp_compiler.testing.compare import relative_error
from hwbp_compiler.testing.reference import Link, Program, keep

WIDTH, LINKS = 8, 5
STEPS = {}


def step(multiplier="1"):
    def register(function):
        STEPS[function.__name__] = function, multiplier
        return function

    return register


# -- a block writes into a slice in place --------------------------------------------------------------------------


@step()
def a_column_is_set_to_zero(block, x, first, hold):
    y = block(x).clone()
    y[:, 0] = 0
    return x + hold(y)


@step()
def half_is_doubled_in_place(block, x, first, hold):
    y = block(x).tanh() * 1.5
    y[:, :4].mul_(2)
    return x + hold(y)


@step()
def an_empty_output_is_filled(block, x, first, hold):
    y, out = block(x).tanh(), torch.empty_like(x)
    out[:, :4] = y[:, :4]
    out[:, 4:] = 2 * y[:, 4:]
    return x + hold(out)


@step()
def rotated_into_even_and_odd_columns(block, x, first, hold):
    y = block(x).tanh()
    out = torch.zeros_like(y)
    out[..., ::2] = 0.5 * y[..., ::2] - y[..., 1::2]
    out[..., 1::2] = 0.5 * y[..., 1::2] + y[..., ::2]
    return x + hold(out)


@step()
def columns_are_chosen_by_a_tensor(block, x, first, hold):
    y, columns = block(x).tanh() * 1.5, torch.tensor([1, 3])
    y[:, columns] = y[:, columns] * 3
    return x + hold(y)


@step()
def a_row_is_added_to_in_place(block, x, first, hold):
    y = block(x).tanh() * 1.5
    y[:, 2:5].fill_(0.5)
    y[0].add_(y[1])
    return x + hold(y)


@step()
def a_transposed_slice_is_written(block, x, first, hold):
    y = block(x).tanh() * 1.5
    y.t()[2:4] = y.t()[4:6] * 0.5
    return x + hold(y)


# -- every block reads the first state -----------------------------------------------------------------------------


@step()
def the_first_state_is_added(block, x, first, hold):
    return x + hold(block(x).tanh()) + 0.1 * first


@step()
def the_first_state_is_an_input_of_the_block(block, x, first, hold):
    return x + hold(block(x + first).tanh())


@step()
def later_blocks_read_the_first_state(block, x, first, hold):
    return x + hold(block(x if first is None else x + first).tanh())


@step()
def the_first_state_is_concatenated(block, x, first, hold):
    return x + hold(torch.cat([block(x), first], -1).cumsum(-1)[:, :WIDTH].tanh())


@step("0.45*mask + 1")
def the_first_state_is_mixed_in(block, x, first, hold):
    t = 0.9 * x + 0.1 * first
    return x + torch.relu(0.5 * t + 0.5 * hold(block(t)))


@step()
def the_first_state_gates(block, x, first, hold):
    return x + hold(block(x).tanh()) * torch.sigmoid(first)


# -- a part of the state is updated --------------------------------------------------------------------------------


@step()
def one_column_gets_something_added(block, x, first, hold):
    return torch.cat([x[:, :1] + hold(block(x).tanh())[:, :1], x[:, 1:]], 1)


@step()
def the_first_row_gets_something_added(block, x, first, hold):
    return torch.cat([x[:1] + hold(block(x).tanh().mean(0, keepdim=True)), x[1:]])


@step("mask + 1")
def a_column_is_doubled(block, x, first, hold):
    one = x[:, :1]
    return torch.cat([one + one + hold(block(x).tanh())[:, :1], x[:, 1:]], 1)


@step()
def half_gets_the_other_half_too(block, x, first, hold):
    one, other = x.chunk(2, -1)
    return torch.cat([one + 0.1 * hold(other) + hold(block(x).tanh())[:, :4], other], -1)


@step("2")
def both_halves_get_both(block, x, first, hold):
    one, other = hold(block(x).tanh()).chunk(2, -1)
    if hold is keep:
        both = x[:, :4] + x[:, 4:]
        return x + torch.cat([both + one, both - other], -1)
    return x + torch.cat([x[:, :4] + hold(x[:, 4:]) + one, hold(x[:, :4]) + x[:, 4:] - other], -1)


@step()
def half_is_scattered(block, x, first, hold):
    return torch.slice_scatter(x, x[:, :4] + hold(block(x).tanh())[:, :4], 1, 0, 4)


@step()
def chunks_are_put_together_again(block, x, first, hold):
    one, other = x.chunk(2, -1)
    return torch.cat([one + hold(block(x).tanh())[:, :4], other], -1)


@step()
def half_is_added_to_in_place(block, x, first, hold):
    z = hold(block(x).tanh())
    x = x.clone()
    x[:, :4] += z[:, :4]
    return x


@step()
def a_column_is_assigned(block, x, first, hold):
    z = hold(block(x).tanh())
    x = x.clone()
    x[:, 0] = x[:, 0] + z[:, 0]
    return x


@step("mask")
def a_part_is_replaced(block, x, first, hold):
    return torch.cat([hold(block(x).tanh())[:, :2], x[:, 2:]], -1)


@step()
def the_middle_is_coupled_to_the_ends(block, x, first, hold):
    ends = torch.cat([x[:, :2], x[:, 2:6] * 0, x[:, 6:]], -1)
    return torch.cat([x[:, :2], x[:, 2:6] + hold(block(ends).tanh())[:, 2:6], x[:, 6:]], -1)


# -- joins and views that stand in the way -------------------------------------------------------------------------


@step()
def the_trunk_is_seen_under_two_shapes(block, x, first, hold):
    shape = x.shape
    x = x.reshape(-1, WIDTH)
    return (x + hold(block(x).tanh())).view(shape)


@step("1/(sum(...) + 1)")
def a_ratio(block, x, first, hold):
    gate = torch.sigmoid(block(x))[:, :, None] * torch.sigmoid(block(x + 1))[:, None]
    return (x + hold((gate * block.weight).sum(1))) / (1 + hold(gate.sum(1)))


# -- operators inside blocks ---------------------------------------------------------------------------------------


@step()
def a_grid_is_sampled(block, x, first, hold):
    image = x.view(1, 1, 4, WIDTH)
    grid = block(x).tanh().view(1, 4, 4, 2)
    y = F.grid_sample(image, grid, align_corners=False)
    return x + hold(F.interpolate(y, size=(4, WIDTH)).view(4, WIDTH).tanh())


@step()
def distances_are_weights(block, x, first, hold):
    return x + hold((torch.cdist(0.1 * block(x), 0.1 * x) @ x).tanh())


@step()
def equations_are_solved(block, x, first, hold):
    return x + hold(torch.linalg.solve(4 * torch.eye(WIDTH).to(x) + block.weight, x.t()).t().tanh())


@step()
def experts_are_sorted_rows(block, x, first, hold):
    y = torch.cat([block(x), -block(x)])
    experts = torch.stack([block.weight, block.weight.t(), 2 * block.weight])
    out = torch.ops.transformers.grouped_mm_fallback(y, experts, torch.tensor([1, 5, 8], dtype=torch.int32))
    return x + hold((out[:4] + out[4:]).tanh())


@step()
def the_real_part_of_a_spectrum(block, x, first, hold):
    return x + hold(block(torch.fft.fft(x).real).tanh())


@step()
def pairs_are_rotated_as_complex_numbers(block, x, first, hold):
    turn = torch.polar(torch.ones(4), torch.arange(4.0)).to(torch.complex128)
    turned = torch.view_as_complex(block(x).view(-1, 4, 2)) * turn
    return x + hold(torch.view_as_real(turned).flatten(1).tanh())


@step()
def frequencies_are_filtered(block, x, first, hold):
    factor = torch.complex(block.weight[:, :5].mean(0), block.weight[:, 3:].mean(0))
    return x + hold(torch.fft.irfft(torch.fft.rfft(x, dim=-1) * factor, n=WIDTH, dim=-1).tanh())


@step("mask*(mask + 1)/2")
def the_larger_one(block, x, first, hold):
    return torch.maximum(x, hold(block(x)))


class Trunk(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LINKS)).double()

    def forward(self, x):
        first = x
        for number, block in enumerate(self.blocks):
            x = self.function(block, x, self.read(number, first), keep)
        return x

    def read(self, number, first):
        return None if number == 0 and self.function is later_blocks_read_the_first_state else first


def retold(model):
    def link(number, first):
        block, read = model.blocks[number], model.read(number, first)
        if read is None:
            return Link(lambda state, side, hold: ((model.function(block, state[0], None, hold),), ()))
        return Link(lambda state, side, hold: ((model.function(block, state[0], *side, hold),), ()), (read,))

    def forward(run, x):
        return run([link(number, x) for number in range(LINKS)], (x,)).states[-1][0]

    return Program(dict(model.named_parameters()), forward)


@pytest.fixture(params=STEPS, scope="module")
def case(request):
    function, multiplier = STEPS[request.param]
    if function is experts_are_sorted_rows:
        pytest.importorskip("transformers.integrations.moe")  # registers the operator
    model, x = Trunk(function), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    return model, x, multiplier, capture(model, (x,), probe_loss)


@pytest.mark.parametrize("k, gamma, segment", [(0, 0.0, 1), (1, 0.3, 1), (2, 0.0, 1), (0, 0.0, 2), (1, 0.3, 2)])
def test_every_step_is_a_link_and_its_gradient_is_the_oracles(case, k, gamma, segment):
    model, x, multiplier, captured = case
    settings = options(iterations=k, damping=gamma, segment=segment, min_length=2)
    output, found, records = captured.gradients(settings)
    wanted, expected = reference_gradients(retold(model), (x,), probe_loss, k, gamma, segment=segment)
    assert [(r.length, r.decision, r.multiplier) for r in records] == [(LINKS, "rewritten", multiplier)]
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-14)
    assert_gradients_close(found, expected, 1e-10, 1e-13)


def test_pytorchs_own_product_in_groups():
    """Under torch.compile it accepts only bfloat16. The oracle uses transformers' own product instead."""
    pytest.importorskip("transformers.integrations.moe")

    def experts(block, x, first, hold):
        y, weights = block(x), torch.stack([block.weight, block.weight.t(), 2 * block.weight])
        ends = torch.tensor([1, 1, 4], dtype=torch.int32)
        if x.dtype == torch.float32:
            return x + hold(torch._grouped_mm(y.bfloat16(), weights.bfloat16(), ends).float().tanh())
        return x + hold(torch.ops.transformers.grouped_mm_fallback(y, weights, ends).tanh())

    model, x = Trunk(experts), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    _, expected = reference_gradients(retold(model), (x,), probe_loss, 1, 0.3)
    model.float()
    single = x.detach().float().requires_grad_()
    settings = options(iterations=1, damping=0.3, min_length=2)
    _, found, (record,) = capture(model, (single,), probe_loss).gradients(settings)
    assert (record.length, record.decision) == (LINKS, "rewritten")
    assert relative_error(found, expected) < 2e-2  # eight bits


def test_recurrent_layers_inside_residual_blocks():
    """The blocks of the outer chain contain the rewritten inner chains: scans."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.LSTM(WIDTH, WIDTH) for _ in range(LINKS)).double()

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)[0]
            return x

    model, x = Recurrent(), torch.randn(6, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    captured = capture(model, (x,), probe_loss)
    _, exact, _ = captured.gradients(None)
    # Five iterations are exact inside the layers, four in the chain of five. So both are exact first, and then neither.
    for k, limit in ((5, 1e-10), (1, 0.2)):
        _, found, records = captured.gradients(options(iterations=k, min_length=2))
        outer = [r for r in records if r.length == LINKS]
        assert [r.decision for r in outer] == ["rewritten" if k < LINKS else "declined"]
        assert relative_error(found, exact) < limit
    assert relative_error(found, exact) > 1e-6


@pytest.mark.parametrize("name", ["half_is_doubled_in_place", "chunks_are_put_together_again"])
def test_where_nothing_is_rewritten_the_graph_is_as_it_was(name):
    """The graph is changed to look for a chain, and restored, because ``iterations="exact"`` rewrites none."""
    model, x = Trunk(STEPS[name][0]), torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)
    captured = capture(model, (x,), probe_loss)
    captured.gradients(None)
    (joint,) = captured.joints
    exact, (record,) = joint.rewritten(options(iterations="exact", min_length=2))
    written, _ = joint.rewritten(options(iterations=1, min_length=2))
    assert record.decision == "declined"
    assert operators(exact) == operators(joint.module) != operators(written)


def operators(module):
    return [(node.op, str(node.target)) for node in module.graph.nodes]


def test_what_was_cut_away_may_be_infinite():
    """The mask selects, so a gradient that is not selected has no effect, even if it is infinite."""

    class Cut(Trunk):
        def forward(self, x):
            square = super().forward(x).square()
            return torch.cat([torch.zeros_like(square[:, :1]), square[:, 1:]], 1).sqrt()

    model, x = Cut(STEPS["one_column_gets_something_added"][0]), torch.randn(4, WIDTH, dtype=torch.float64)
    captured = capture(model, (x.requires_grad_(),), lambda y: y[:, 1:].sum())
    _, exact, _ = captured.gradients(None)
    _, found, (record,) = captured.gradients(options(iterations=1, min_length=2))
    assert record.decision == "rewritten"
    assert all(g.isfinite().all() for gradients in (exact, found) for g in gradients.values())


# -- complex numbers -----------------------------------------------------------------------------------------------


class Complex(nn.Module):
    """Steps of a complex state, written once for model and oracle. ``kind`` is a linear recurrence (LRU) with a learnt
    first state, one with a block beside it, a gate computed from the state, or a residual net.
    """

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.decay = nn.Parameter(torch.polar(torch.rand(WIDTH), torch.rand(WIDTH)))
        self.first = nn.Parameter(torch.randn(4, WIDTH, dtype=torch.complex64))
        self.blocks = nn.ParameterList(0.1 * torch.randn(WIDTH, WIDTH, dtype=torch.complex64) for _ in range(LINKS))
        self.to(torch.complex128)

    def step(self, block, x, h, hold):
        if self.kind == "lru":
            return self.decay * h + x @ block
        if self.kind == "lru and block":
            return self.decay * h + x @ block + hold(torch.tanh(h @ block))
        if self.kind == "gate":
            gate = torch.polar(torch.sigmoid((h @ block).real), (h @ block).imag)
            return hold(gate) * h + hold(torch.tanh(h @ block.t()))
        return h + hold(torch.tanh(h @ block))

    def forward(self, x):
        h, states = self.first, []
        for block in self.blocks:
            h = self.step(block, x, h, keep)
            states.append(h.real)
        return torch.stack(states)


@pytest.mark.parametrize("kind", ["lru", "lru and block", "gate", "residual"])
@pytest.mark.parametrize("k, gamma, segment", [(0, 0.0, 1), (1, 0.3, 1), (1, 0.3, 2)])
def test_complex_states_have_the_gradient_of_the_oracle(kind, k, gamma, segment):
    model, x = Complex(kind), torch.randn(4, WIDTH, dtype=torch.complex128, requires_grad=True)

    def forward(run, x):
        links = [
            Link(lambda state, side, hold, b=block: ((model.step(b, side[0], state[0], hold),), ()), (x,))
            for block in model.blocks
        ]
        return torch.stack([state.real for (state,) in run(links, (model.first,)).states[1:]])

    program = Program(dict(model.named_parameters()), forward)
    settings = options(iterations=k, damping=gamma, segment=segment, min_length=2)
    _, found, (record,) = capture(model, (x,), probe_loss).gradients(settings)
    _, expected = reference_gradients(program, (x,), probe_loss, k, gamma, segment=segment)
    assert (record.length, record.decision) == (LINKS, "rewritten")
    pairs = ({key: torch.view_as_real(g) for key, g in gradients.items()} for gradients in (found, expected))
    assert_gradients_close(*pairs, 1e-10, 1e-13)
