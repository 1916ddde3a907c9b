"""If something is not rewritten, the report gives a reason in PyTorch's terms and says what to change. It names no node
of the graph and nothing internal.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small import Residual
from torch import nn

from hwbp_compiler import explain
from hwbp_compiler.passes.apply import discard
from hwbp_compiler.reasons import Declined, Reason

ALWAYS = {"iterations": 1, "rewrite": "always"}
WIDTH = 4


def explained(model, *args, **options):
    """The report. None of its reasons and advice names a node of the graph or an internal of ours."""
    report = explain(model, *args, options={**ALWAYS, **options})
    for chain in report.chains:
        text = f"{chain.reason} {chain.advice}"
        assert not re.search(r"\b(primals|tangents)\b|\b[a-z]+_\d+\b|aten\.|Declined|\bNone\b", text), text
        assert chain.decision == "rewritten" or chain.advice, text
        assert isinstance(chain.reason_code, Reason)
    return report


def declined(model, *args, **options):
    chains = explained(model, *args, **options).chains
    assert all(chain.decision == "declined" for chain in chains), chains
    return chains


def only(chains):
    (chain,) = chains
    return chain


class Strided(nn.Module):
    """A residual block that halves the image: its shortcut is a strided convolution."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


def test_a_strided_shortcut():
    stages = nn.Sequential(
        *(Strided(2, 2, 1) for _ in range(4)), Strided(2, 3, 2), *(Strided(3, 3, 1) for _ in range(3))
    )
    report = explained(stages, torch.randn(1, 2, 4, 4, requires_grad=True), min_length=3)
    assert [chain.length for chain in report.chains if chain.decision == "rewritten"] == [3, 4]
    refused = only([chain for chain in report.chains if chain.decision == "declined"])
    assert "the shortcut of this block has a convolution in it" in refused.reason
    assert "changes its shape from [1, 2, 4, 4] to [1, 3, 2, 2]" in refused.reason
    assert refused.module == "4" and "self.shortcut(x) + self.conv2" in refused.source


class Padded(Strided):
    """The shortcut of the first ResNets for CIFAR: every second pixel, new channels zero."""

    def forward(self, x):
        new = self.conv2.out_channels - x.shape[1]
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, new)) if new else x
        return F.relu(shortcut + self.conv2(F.relu(self.conv1(x))))


def test_a_strided_shortcut_without_a_layer():
    stages = nn.Sequential(*(Padded(2, 2, 1) for _ in range(4)), Padded(2, 3, 2), *(Padded(3, 3, 1) for _ in range(3)))
    report = explained(stages, torch.randn(1, 2, 4, 4, requires_grad=True), min_length=3)
    refused = only([chain for chain in report.chains if chain.decision == "declined"])
    assert "the shortcut of this block changes its shape from [1, 2, 4, 4] to [1, 3, 2, 2]" in refused.reason
    assert refused.module == "4" and "shortcut + self.conv2" in refused.source


class OneLayer(nn.Module):
    """The smallest strided block: one convolution, and another one beside it."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.conv(x))


def test_a_strided_shortcut_beside_one_layer():
    stages = nn.Sequential(*(OneLayer(2, 2, 1) for _ in range(4)), OneLayer(2, 3, 2), *(OneLayer(3, 3, 1),) * 3)
    report = explained(stages, torch.randn(1, 2, 4, 4, requires_grad=True), min_length=3)
    refused = only([chain for chain in report.chains if chain.decision == "declined"])
    assert "the shortcut of this block has a convolution in it" in refused.reason and refused.module == "4"


class Gated(nn.Module):
    """Two layers side by side in front of a chain, but not a block."""

    def __init__(self):
        super().__init__()
        self.stem, self.value, self.gate = nn.Linear(3, 3), nn.Linear(3, WIDTH), nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(*(Residual() for _ in range(4)))

    def forward(self, x):
        x = torch.tanh(self.stem(x))
        return self.blocks(self.value(x) * torch.sigmoid(self.gate(x)))


def test_two_layers_side_by_side_are_no_block():
    assert [chain.decision for chain in explained(Gated(), torch.randn(2, 3)).chains] == ["rewritten"]


class Dense(nn.Module):
    def __init__(self, layers=5):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + 2 * i, 2) for i in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], -1)
        return x


def test_a_densely_connected_network():
    chain = only(declined(Dense(), torch.randn(3, WIDTH, requires_grad=True)))
    assert chain.reason.startswith("features are concatenated (torch.cat, as in a DenseNet), not added")
    assert chain.length >= 4 and "torch.cat([x" in chain.source


class DenseOnItsOwnLine(Dense):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(layer.in_features) for layer in self.layers)

    def forward(self, x):
        for norm, layer in zip(self.norms, self.layers, strict=True):
            new = layer(torch.relu(norm(x)))
            x = torch.cat([x, new], -1)
        return x


def test_the_line_of_a_densely_connected_network_is_the_one_that_concatenates():
    chain = only(declined(DenseOnItsOwnLine(), torch.randn(3, WIDTH, requires_grad=True)))
    assert chain.source.endswith("x = torch.cat([x, new], -1)") and chain.sources == [chain.source]


class DenseList(Dense):
    """Keeps its features in a list, as torchvision does."""

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(torch.relu(layer(torch.cat(features, -1))))
        return torch.cat(features, -1)


def test_a_densely_connected_network_that_keeps_a_list():
    chain = only(declined(DenseList(), torch.randn(3, WIDTH)))
    assert chain.reason.startswith("features are concatenated (torch.cat, as in a DenseNet), not added")
    assert chain.length >= 3 and "torch.cat(features, -1)" in chain.source and chain.module == "layers"


class Spoken(nn.Module):
    """A loss at every second step: gradients are cut off, but the network is not dense."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(2, WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x):
        h, total = x.new_zeros(x.shape[1], WIDTH), 0.0
        for i, x_t in enumerate(x):
            h = self.cell(x_t, h)
            total = total + self.head(h).mean() if i % 2 else total
        return total


def test_what_is_rewritten_stands_where_the_search_for_near_misses_fails(monkeypatch):
    report = explained(Spoken(), torch.randn(8, 2, 2))
    assert only(report.chains).decision == "rewritten" and report.notes == [] and report.graphs[0].failure is None

    def broken(*_):
        raise IndexError("list index out of range")

    monkeypatch.setattr("hwbp_compiler.report.explaining.near_misses", broken)
    report = explained(Spoken(), torch.randn(8, 2, 2))
    assert only(report.chains).decision == "rewritten" and report.graphs[0].failure is None
    assert report.notes == ["The search for near misses failed: IndexError: list index out of range."]


class Notes(nn.Module):
    """An LSTM cell with two extra states: four tensors from step to step, with weights shared by all steps."""

    def __init__(self):
        super().__init__()
        self.cell, self.linear = nn.LSTMCell(3, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h, c, m, n = (x.new_zeros(x.shape[1], WIDTH) for _ in range(4))
        for x_t in x:
            h, c = self.cell(x_t, (h, c))
            m = 0.9 * m + self.linear(h) * n.sigmoid()
            n = 0.5 * n + self.linear(m + c)
            h = h + m
        return h


def test_the_gradient_of_a_shared_weight_is_no_shortcut():
    reasons = {chain.reason for chain in declined(Notes(), torch.randn(6, 2, 3))}
    assert any(reason.startswith("4 tensors pass from each step to the next") for reason in reasons)
    assert not any("shortcut" in reason for reason in reasons), reasons


class Wide(nn.Module):
    """A recurrence that carries ``count`` tensors, each with a gate that sees all others."""

    def __init__(self, count):
        super().__init__()
        self.new = nn.ModuleList(nn.Linear(count * WIDTH, WIDTH) for _ in range(count))

    def forward(self, x):
        states = [x * (i + 1) for i in range(len(self.new))]
        for _ in range(5):
            seen = torch.cat(states, -1)
            states = [0.5 * s + torch.tanh(new(seen)) for s, new in zip(states, self.new, strict=True)]
        return sum(states)


def test_a_state_of_more_tensors_than_are_handled():
    chain = only(declined(Wide(5), torch.randn(3, WIDTH)))
    assert chain.reason.startswith("5 tensors pass from each step to the next")
    assert "at most 3 tensors" in chain.advice and "torch.tanh(new(seen))" in chain.source


class Peepholes(nn.Module):
    """An LSTM whose gates see the cell state, so that its gradient has a term for each gate."""

    def __init__(self):
        super().__init__()
        self.gates, self.peep = nn.Linear(3 + WIDTH, 4 * WIDTH), nn.Parameter(torch.rand(3, WIDTH))

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], WIDTH)
        for x_t in x:
            i, f, g, o = self.gates(torch.cat([x_t, h], -1)).chunk(4, -1)
            i, f = torch.sigmoid(i + self.peep[0] * c), torch.sigmoid(f + self.peep[1] * c)
            c = f * c + i * torch.tanh(g)
            h = torch.sigmoid(o + self.peep[2] * c) * torch.tanh(c)
        return h


def test_a_state_whose_gradient_has_too_many_terms():
    chain = only(declined(Peepholes(), torch.randn(6, 2, 3)))
    assert chain.reason.startswith("the gradient of a step's state is a sum of 5 terms")
    assert "hwbp_compiler.recurrent" in chain.advice


def test_a_loop_of_unknown_length():
    scan = pytest.importorskip("torch._higher_order_ops.scan").scan
    weight = torch.randn(WIDTH, WIDTH, requires_grad=True)

    def model(xs):
        def step(h, x):
            h = 0.5 * h + torch.tanh(x @ weight)
            return h, h.clone()

        return scan(step, xs.new_zeros(WIDTH), xs, dim=0)[1]

    report = explained(model, torch.randn(6, WIDTH))
    chain = only(report.chains)
    assert chain.decision == "declined" and report.notes == []  # its body is not a piece of the model
    assert chain.reason.startswith("a loop written with torch's scan may have any length")
    assert "Python loop" in chain.advice


class Turned(nn.Module):
    """Every block returns its state transposed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = (x + torch.relu(layer(x))).transpose(0, 1)
        return x


def test_a_state_that_is_permuted_in_every_block():
    chain = only(declined(Turned(), torch.randn(3, 3, WIDTH)))
    assert "elements in a different order" in chain.reason and "transpose inside the block" in chain.advice


@torch.library.custom_op("hwbp_test::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


@torch.library.custom_op("hwbp_test::swish_backward", mutates_args=())
def swish_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return g * (x.sigmoid() + x * x.sigmoid() * (1 - x.sigmoid()))


swish.register_fake(torch.empty_like)
swish_backward.register_fake(lambda g, x: torch.empty_like(g))
swish.register_autograd(
    lambda ctx, g: swish_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + swish(self.linear(x))


def test_an_operator_that_nobody_described():
    chain = only(declined(nn.Sequential(*(Opaque() for _ in range(5))), torch.randn(3, WIDTH, requires_grad=True)))
    assert "a block uses hwbp_test::swish_backward, an operator that the compiler has no rule for" in chain.reason
    assert chain.length == 5 and chain.source.endswith("return x + swish(self.linear(x))")


def test_a_chain_below_min_length_is_told_once():
    chain = only(declined(nn.Sequential(Residual(), Residual()), torch.randn(3, WIDTH)))
    assert chain.reason == "shorter than min_length=4" and f"min_length={chain.length} " in chain.advice


def test_equal_refusals_are_one_record_that_counts_them():
    between = [nn.Linear(WIDTH, WIDTH) for _ in range(6)]
    apart = [layer for _ in range(3) for layer in (Residual(), nn.Sequential(between.pop(), nn.Tanh(), between.pop()))]
    given = torch.randn(3, WIDTH, requires_grad=True)
    chain = only(declined(nn.Sequential(*apart), given))
    assert (chain.length, chain.times) == (1, 3) and chain.module == "0..4"
    assert "1 link, 3 times, declined" in str(explained(nn.Sequential(*apart), given))


@pytest.mark.parametrize("iterations", [1, 9, "exact"])
def test_what_is_too_short_names_all_its_modules_and_advice_that_helps(iterations):
    blocks = nn.Sequential(*(Residual() for _ in range(5)))
    x = torch.randn(2, WIDTH, requires_grad=True)
    chain = only(declined(blocks, x, min_length=9, iterations=iterations))
    assert chain.module == "0..4"
    advised = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", chain.advice)}
    followed = only(explained(blocks, x, **{"min_length": 9, "iterations": iterations, **advised}).chains)
    assert followed.decision == "rewritten", (chain.advice, followed.reason)


class U(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(Residual() for _ in range(4))
        self.up = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(x := block(x))
        for block in self.up:
            x = block(x) + skips.pop()
        return x


def test_connections_that_skip_over_blocks_leave_two_chains():
    """The state in the middle is the last one on the way up: the skips over blocks are added there."""
    up, down = explained(U(), torch.randn(2, WIDTH), min_length=2).chains
    assert [(chain.decision, chain.length) for chain in (up, down)] == [("rewritten", 5), ("rewritten", 3)]


@pytest.mark.parametrize("options", [{"rewrite": "profitable"}, {"iterations": "exact"}, {"iterations": 8}])
def test_advice_that_would_not_help_is_not_given(options, monkeypatch):
    def refuse(graph, rewriting, *_):
        discard(graph, rewriting.created)
        raise Declined(Reason.VALUE_USED_ELSEWHERE)

    monkeypatch.setattr("hwbp_compiler.passes.pipeline.apply", refuse)
    blocks = nn.Sequential(*(Residual() for _ in range(8)))
    chain = only(declined(blocks, torch.randn(2, WIDTH, requires_grad=True), **options))
    assert "would not change this" in chain.advice and "U-Net" in chain.advice


class Interrupted(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Residual() for _ in range(6)), between

    def forward(self, x):
        for block in self.blocks:
            x = self.between(block(x))
        return x


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (lambda x: x.roll(1, -1), "torch's roll"),
        (lambda x: x.flip(-1), "torch's flip"),
        (lambda x: x.cumsum(-1), "torch's cumsum"),
        (nn.Linear(WIDTH, WIDTH), "a linear layer"),
    ],
)
def test_what_stands_on_the_trunk_is_named(between, named):
    chain = only(declined(Interrupted(between), torch.randn(2, WIDTH, requires_grad=True)))
    assert chain.length == 6 and f"the state itself goes through {named}, which" in chain.reason


@torch.library.custom_op("hwbp_test::unknown", mutates_args=())
def unknown_to_us(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


unknown_to_us.register_fake(torch.empty_like)
unknown_to_us.register_autograd(lambda ctx, g: unknown_to_us(g))


class ByAnUnknownOperator(Residual):
    def forward(self, x):
        return unknown_to_us(x) + self.block(x)


def test_an_operator_without_a_rule_on_the_way_past_the_blocks():
    blocks = nn.Sequential(*(ByAnUnknownOperator() for _ in range(5)))
    chain = only(declined(blocks, torch.randn(2, WIDTH, requires_grad=True)))
    assert "on its way past the blocks the state goes through hwbp_test::unknown" in chain.reason
    assert (chain.length, chain.module) == (5, "0..4")


class PassesOnTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Residual() for _ in range(6))

    def forward(self, x):
        before = x
        for block in self.blocks:
            x, before = block(x) + before, x
        return x


def test_a_skip_over_one_block_says_what_to_change():
    assert all(chain.advice for chain in declined(PassesOnTwo(), torch.randn(2, WIDTH)))


def test_nothing_is_said_to_stand_on_a_trunk_that_is_free():
    report = explained(Interrupted(nn.Hardtanh()), torch.randn(2, WIDTH, requires_grad=True))
    assert only(report.chains).decision == "rewritten"
