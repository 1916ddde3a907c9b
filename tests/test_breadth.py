"""Residual paths as people write them: each kind against the oracle, with the links a reader counts.

A case is one step of the trunk, written once: the model runs it as it is, the oracle with ``hold`` around what mixes
elements.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hwbp_compiler.testing import assert_gradients_close, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import capture, options
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


@step("slice_scatter(...)")
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


class Trunk(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LINKS)).double()

    def forward(self, x):
        first = x
        for block in self.blocks:
            x = self.function(block, x, first, keep)
        return x


def retold(model):
    def link(block, first):
        return Link(lambda state, side, hold: ((model.function(block, state[0], *side, hold),), ()), (first,))

    def forward(run, x):
        return run([link(block, x) for block in model.blocks], (x,)).states[-1][0]

    return Program(dict(model.named_parameters()), forward)


@pytest.fixture(params=STEPS, scope="module")
def case(request):
    function, multiplier = STEPS[request.param]
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
