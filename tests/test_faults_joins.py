"""Blocks that use their normalized input twice: the join inside a block does not hide the join on the trunk.

``u = norm(x); x = x + 0.3 * u * sigmoid(lin(u))`` has a join at u, which gradients meet first. The state is x: the
gradient at u is a part of the gradient at x.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hwbp_compiler.testing import assert_gradients_close, models, probe_loss, reference_gradients
from hwbp_compiler.testing.capture import capture, options, trace
from hwbp_compiler.testing.models import Model, Stack
from hwbp_compiler.testing.reference import Link, Program, keep

GATE = "(sigma + 0.3*sigmoid(...)*weight)/sigma"
MULTIPLIERS = {
    "layer norm gate": GATE,
    "rms norm gate": GATE,
    "relu gate": "0.3*mask*sigmoid(...) + 1",
    "scale gate": "0.3*sigmoid(...)*weight + 1",
    "inner residual": "(sigma + 0.3*weight)/sigma",
    "inner residual and gate": GATE,
    "pool former": "(sigma - weight)/sigma",
    "skip": "(sigma + weight*weight)/sigma",
    "skip inside": "1",
    "squeeze": "1",
    "plain": "1",
}


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.weight, self.bias = nn.Parameter(1 + 0.2 * torch.randn(6)), nn.Parameter(0.2 * torch.randn(6))
        self.lin, self.out, self.skip = nn.Linear(6, 6), nn.Linear(6, 6), nn.Parameter(torch.randn(6))

    def norm(self, x, hold):
        centre = x.mean(-1, keepdim=True) if "rms" not in self.kind else 0 * x[..., :1]
        if hold is keep:
            if "rms" in self.kind:
                return F.rms_norm(x, (6,), self.weight, 1e-5)
            return F.layer_norm(x, (6,), self.weight, self.bias)
        deviation = torch.sqrt((x - centre).square().mean(-1, keepdim=True) + 1e-5)
        normed = (x - hold(centre)) / hold(deviation) * self.weight
        return normed if "rms" in self.kind else normed + self.bias

    def forward(self, x, hold=keep):
        kind = self.kind
        u = x * self.weight if kind == "scale gate" else self.norm(x, hold)
        if kind == "relu gate":
            u = torch.relu(x)
        if "inner residual" in kind:
            v = u + hold(self.lin(u).tanh())
            return x + 0.3 * (v if kind == "inner residual" else v * hold(self.out(v).sigmoid()))
        if kind == "pool former":
            return x + hold(F.avg_pool1d(u.transpose(1, 2), 3, 1, 1).transpose(1, 2)) - u
        if kind == "skip":
            return x + hold(torch.cumsum(self.lin(u), 1).tanh()) + self.skip * u
        if kind == "skip inside":
            a = F.silu(self.lin(u))
            return x + hold(self.out(torch.cumsum(a, 1).tanh() + self.skip * a))
        if kind == "squeeze":
            z = self.lin(u)
            return x + hold(z * self.out(z).sigmoid())
        if kind == "plain":
            return x + hold(self.lin(u).tanh())
        return x + 0.3 * u * hold(self.lin(u).sigmoid())


class Blocks(nn.Module):
    def __init__(self, *kinds, stem=True):
        super().__init__()
        self.stem = nn.Linear(6, 6) if stem else nn.Identity()
        self.blocks, self.head = nn.ModuleList(map(Block, kinds)), nn.Linear(6, 3)
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def retold(model):
    def forward(run, x):
        links = [Link(lambda state, side, hold, b=b: ((b(state[0], hold),), ())) for b in model.blocks]
        return model.head(run(links, (model.stem(x),)).states[-1][0])

    return Program(dict(model.named_parameters()), forward)


def assert_all_links(model, x, through=trace, settings=((0, 0.0), (1, 0.0), (1, 0.3)), **more):
    traced = through(model, (x,), probe_loss)
    for k, gamma in settings:
        _, found, records = traced.gradients(options(iterations=k, damping=gamma, **more))
        _, expected = reference_gradients(retold(model), (x,), probe_loss, k, gamma)
        assert_gradients_close(found, expected, 1e-10, 1e-13)
        assert [(r.decision, r.length) for r in records] == [("rewritten", len(model.blocks))]
    return records[0]


def make(*kinds, **more):
    torch.manual_seed(0)
    return Blocks(*kinds, **more), torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_six_blocks_are_six_links_with_the_path_through_norm_and_gate(kind):
    assert assert_all_links(*make(*[kind] * 6)).multiplier == MULTIPLIERS[kind]


@pytest.mark.parametrize("kind", MULTIPLIERS)
def test_three_blocks_are_three_links(kind):
    assert_all_links(*make(*[kind] * 3), min_length=2)


def test_the_input_itself_may_be_the_first_state():
    assert_all_links(*make(*["layer norm gate"] * 4, stem=False))


@pytest.mark.parametrize("order", (("layer norm gate", "plain"), ("plain", "inner residual"), ("skip", "relu gate")))
def test_blocks_of_two_kinds_may_take_turns(order):
    assert_all_links(*make(*order * 3))


@pytest.mark.parametrize("kind", ("layer norm gate", "inner residual", "pool former"))
def test_an_input_without_gradient_ends_the_trunk_before_the_first_block(kind):
    """The inside of the first block is exact: no state lies between a block's input and its output."""
    model, x = make(*[kind] * 5, stem=False)
    x = x.detach()
    _, found, (record,) = trace(model, (x,), probe_loss).gradients(options(iterations=1, damping=0.3))
    _, expected = reference_gradients(retold(model), (x,), probe_loss, 1, 0.3)
    assert record.decision == "rewritten" and record.length in (4, 5)
    assert_gradients_close(found, expected, 1e-10, 1e-13)


def test_the_same_through_dynamo():
    assert_all_links(*make(*["layer norm gate"] * 6), through=capture, settings=((1, 0.3),))


@pytest.mark.parametrize("update", ("normed_gate", "inner"))
@pytest.mark.parametrize(
    "stack",
    (
        {"pre": "layer", "layout": "swap"}, {"pre": "layer", "after": "batch_eval"}, {"pre": "rms", "after": "leaky"},
        {"pre": "group", "blocks": ("attention", "mlp")}, {"pre": "batch", "taps": (1, 3), "heads": True},
        {"pre": "layer", "vectors": True, "penalties": (2,)}, {"pre": "rms", "shared": 1},
    ),
    ids=lambda stack: "-".join(map(str, stack)),
)  # fmt: skip
def test_whatever_else_the_blocks_do(update, stack):
    spec = Model(stacks=(Stack(depth=4, width=4, update=update, **stack),), batch=3, length=2)
    model, args, loss = models.build(spec)
    _, found, records = trace(model, args, loss).gradients(options(iterations=1, damping=0.3))
    _, expected = reference_gradients(models.program(model), args, loss, 1, 0.3)
    assert_gradients_close(found, expected, 1e-9, 1e-12)
    assert ("rewritten", 4) in [(r.decision, r.length) for r in records]


class Nested(nn.Module):
    """A deep chain inside a residual connection."""

    def __init__(self, depth):
        super().__init__()
        self.stem, self.inside = nn.Linear(6, 6), nn.ModuleList(Block("plain") for _ in range(depth))
        self.double()

    def forward(self, x):
        x = y = self.stem(x)
        y = F.layer_norm(y, (6,))
        for block in self.inside:
            y = block(y)
        return x + torch.tanh(y)


def test_a_chain_inside_a_residual_connection_is_still_found():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_()
    *_, records = trace(Nested(6), (x,), probe_loss).gradients(options(iterations=1))
    assert ("rewritten", 6) in [(r.decision, r.length) for r in records]
