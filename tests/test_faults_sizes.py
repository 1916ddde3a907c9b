"""Sizes that a block computes from its own tensors, and sizes that are known only at run time (``dynamic=True``)."""

from __future__ import annotations

import itertools
import random

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn

from hwbp_compiler.graph.order import AS_IT_WAS, permuted
from hwbp_compiler.testing import Link, Program, assert_gradients_close, reference_gradients
from hwbp_compiler.testing.capture import eager_highway, leaves_of, options
from hwbp_compiler.testing.losses import probe_loss

LINKS = 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Stack(nn.Module):
    """``x = trunk(x) + 0.3 * block(x)``, where a block is ``function(tanh(layer(x)))``."""

    def __init__(self, layer, *functions, trunk=lambda x: x):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(LINKS))
        self.functions, self.trunk = functions, trunk

    def step(self, i, x, hold=lambda z: z):
        block = self.functions[i % len(self.functions)](torch.tanh(self.layers[i](x)))
        return self.trunk(x) + hold(0.3 * block)

    def forward(self, x):
        for i in range(LINKS):
            x = self.step(i, x)
        return x

    def retold(self):
        def link(i):
            return Link(lambda state, side, hold: ((self.step(i, state[0], hold),), ()))

        def forward(run, x):
            return run([link(i) for i in range(LINKS)], (x,)).states[-1][0]

        return Program(dict(self.named_parameters()), forward)


def conv():
    return nn.Conv2d(2, 2, 3, padding=1)


def linear():
    return nn.Linear(6, 6)


IMAGES = ((5, 2, 8, 8), (7, 2, 12, 12))
SEQUENCES = ((3, 7, 6), (4, 9, 6))


def gradients(step, model, args):
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(probe_loss(step(*args)), list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def check(model, shapes, program=None, k=1, compilations=1, **compiling):
    """For inputs of all ``shapes``, compiled once, the gradients are those of w^k. Returns the chains' records."""
    records = []
    backend = eager_highway(options(iterations=k), records=records)
    step = torch.compile(model, backend=backend, **{"dynamic": True, **compiling})
    for shape in shapes:
        args = (torch.randn(shape, requires_grad=True),)
        _, wanted = reference_gradients(program or model.retold(), args, probe_loss, k)
        assert_gradients_close(gradients(step, model, args), wanted, 1e-10)
    assert [r.reason for r in records if r.decision != "rewritten"] == []
    assert len(records) == compilations
    return records


def pooled(y):
    return F.interpolate(F.max_pool2d(y, 2), size=y.shape[-2:])


def averaged(y):
    return F.interpolate(F.avg_pool2d(y, 2), size=y.shape[-2:], mode="nearest")


def halves(y):
    first, second = y.split(y.shape[-1] // 2, -1)
    return torch.cat([second, first * second], -1)


def reshaped(y):
    z = y.reshape(y.shape[0], y.shape[1], -1, 2)
    return (z * z.mean(2, keepdim=True)).reshape(y.shape)


def shuffled(y):
    return F.pixel_shuffle(F.pixel_unshuffle(y, 2).flip(1), 2)


def reversed_by_index(y):
    last = y.shape[-1] - 1
    backwards = torch.arange(last, -1, -1).expand(y.shape)
    return y.gather(-1, backwards) / last - torch.zeros_like(y).scatter(-2, backwards.transpose(-1, -2), y * y)


ON_IMAGES = (pooled, averaged, halves, reshaped, shuffled, reversed_by_index)


@pytest.mark.parametrize("function", ON_IMAGES, ids=lambda function: function.__name__)
def test_blocks_on_images_that_compute_with_sizes(function):
    (record,) = check(Stack(conv, function), IMAGES)
    assert record.length == LINKS and record.multiplier == "1" and len(record.groups) == 1


class FromTheGradient(torch.autograd.Function):
    """A block that reads its sizes from the gradient itself."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        half = gradient.shape[1] // 2
        return torch.cat([gradient[:, half:], gradient[:, :half]], 1) / gradient.numel() * gradient.stride(0)


def heads(y):
    batch, length, width = y.shape
    z = y.view(batch, length, 2, width // 2).transpose(1, 2)
    mixed = torch.softmax(z @ z.transpose(-1, -2) / length**0.5, -1) @ z
    return mixed.transpose(1, 2).reshape(y.shape)


def turned(y):
    half = y.shape[1] // 2
    return torch.cat([y[:, half:], y[:, :half]], 1)


def turned_a_little(y):
    third = y.shape[1] // 3
    return torch.cat([y[:, third:], y[:, :third]], 1)


def symmetric(y):
    z = y @ y.transpose(1, 2)
    return (z + z.transpose(1, 2)) @ y


@pytest.mark.parametrize(
    "function", (FromTheGradient.apply, heads, symmetric), ids=("from_the_gradient", "heads", "symmetric")
)
def test_blocks_on_sequences_that_compute_with_sizes(function):
    (record,) = check(Stack(linear, function), SEQUENCES)
    assert record.length == LINKS and len(record.groups) == 1


def test_blocks_that_differ_in_a_size_alone_are_evaluated_apart():
    (record,) = check(Stack(linear, turned, turned_a_little), SEQUENCES, k=2)
    assert sorted(group.links for group in record.groups) == [1, 2]


def test_blocks_scaled_by_two_sizes_are_evaluated_apart():
    """Only the size distinguishes them: all shapes are equal."""
    (record,) = check(Stack(linear, lambda y: y / y.shape[0], lambda y: y / y.shape[1]), SEQUENCES, k=2)
    assert sorted(group.links for group in record.groups) == [1, 2]


def test_a_trunk_scaled_by_a_size():
    (record,) = check(Stack(linear, torch.tanh, trunk=lambda x: x * (1 - 1 / x.shape[1])), SEQUENCES)
    assert record.multiplier == "size"


def test_a_trunk_that_is_permuted_and_back():
    def trunk(x):
        batch, length, width = x.shape
        x = torch.relu(x.transpose(1, 2)).reshape(batch, 2, width // 2, length)  # takes the place of a norm over time
        return x.permute(0, 3, 1, 2).reshape(batch, length, width)

    (record,) = check(Stack(linear, torch.tanh, trunk=trunk), SEQUENCES)
    assert record.multiplier == "mask"


class Encoder(nn.Sequential):
    def __init__(self):
        super().__init__(*(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True) for _ in range(2)))

    def retold(self):
        def norm(found, x, hold):
            deviation = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + found.eps)
            return (x - hold(x.mean(-1, keepdim=True))) / hold(deviation) * found.weight + found.bias

        def link(block, found):
            return Link(lambda state, side, hold: ((norm(found, state[0] + hold(block(state[0])), hold),), ()))

        def forward(run, x):
            links = []
            for layer in self:
                attention = lambda x, layer=layer: layer._sa_block(x, None, None)  # noqa: E731
                links += [link(attention, layer.norm1), link(layer._ff_block, layer.norm2)]
            return run(links, (x,)).states[-1][0]

        return Program(dict(self.named_parameters()), forward)


def test_an_encoder_layer_is_rewritten_at_later_lengths_too():
    records = check(Encoder(), ((3, 5, 4), (3, 7, 4), (3, 6, 4)), compilations=2, dynamic=None)
    assert [r.length for r in records] == [4, 4]


def test_sizes_known_only_at_run_time_through_inductor():
    ours = {"rewrite": "always", "min_length": 2, "iterations": 1, "strict": True}
    model = Stack(conv, lambda y: pooled(y) + halves(y))
    step = torch.compile(model, backend="highway", dynamic=True, fullgraph=True, options=ours)
    for shape in IMAGES:
        args = (torch.randn(shape, requires_grad=True),)
        _, wanted = reference_gradients(model.retold(), args, probe_loss, 1)
        assert_gradients_close(gradients(step, model, args), wanted, 1e-10)


# -- what is not rewritten ------------------------------------------------------------------------------------------


class Counted(torch.autograd.Function):
    """The size of the result depends on the gradient's numbers."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.nonzero(gradient).shape[0]


class Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + gradient.shape[1]


@pytest.mark.parametrize("function, reason", (
    (Counted, "aten::nonzero"),
    (Added, "adds the constant that is a size to the gradient"),
))  # fmt: skip
def test_sizes_that_make_a_backward_nonlinear(function, reason):
    model, records = Stack(linear, lambda y: 0.01 * function.apply(y)), []
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        step = torch.compile(model, backend=eager_highway(options(iterations=1), records=records), dynamic=True)
        for shape in SEQUENCES:
            args = (torch.randn(shape, requires_grad=True),)
            assert_gradients_close(gradients(step, model, args), gradients(model, model, args), 1e-10)
    (record,) = records
    assert record.decision == "declined" and reason in record.reason


# -- orders ---------------------------------------------------------------------------------------------------------


def test_orders_are_those_of_real_elements():
    draw = random.Random(0)
    followed = 0
    for _ in range(1000):
        sizes = [draw.choice((1, 2, 2, 3, 4)) for _ in range(draw.randint(1, 4))]
        order, elements = AS_IT_WAS, torch.arange(torch.Size(sizes).numel())
        for _ in range(draw.randint(1, 4)):
            if draw.random() < 0.5:
                sizes = _factors(elements.numel(), draw)
            dims = draw.sample(range(len(sizes)), len(sizes))
            order, elements = permuted(order, sizes, dims), elements.view(sizes).permute(dims).reshape(-1)
            sizes = [sizes[d] for d in dims]
        if order is not None:
            followed += 1
            assert torch.equal(_elements(order, elements.numel()), elements)
            assert (order == AS_IT_WAS) == torch.equal(elements, torch.arange(elements.numel()))
    assert followed > 900


def _factors(number, draw):
    found = []
    while number > 1:
        found.append(draw.choice([d for d in range(2, number + 1) if number % d == 0]))
        number //= found[-1]
    draw.shuffle(found)
    return found or [1]


def _elements(order, count):
    if order == AS_IT_WAS:
        return torch.arange(count)
    places = itertools.product(*(range(size) for size, _ in order))
    strides = [stride for _, stride in order]
    return torch.tensor([sum(i * s for i, s in zip(place, strides, strict=True)) for place in places])


def test_orders_of_symbolic_shapes():
    b, t, c = sympy.symbols("b t c", integer=True, positive=True)
    half = t // 2
    there = permuted(AS_IT_WAS, (b, t, c), (1, 0, 2))
    assert there != AS_IT_WAS and permuted(there, (t, b, c), (1, 0, 2)) == AS_IT_WAS
    # A dimension is split by a size that divides it only because the view says so, moved in parts, and moved back.
    there = permuted(permuted(AS_IT_WAS, (b, t, c), (0, 2, 1)), (b, c, 2, half), (0, 2, 3, 1))
    assert there == AS_IT_WAS
    assert permuted(permuted(AS_IT_WAS, (b, t, c), (0, 2, 1)), (b, t, c), (0, 2, 1)) is None


@pytest.mark.parametrize(("blocks", "expected"), [(1, {True}), (6, {False})])
def test_convolutions_keep_inductors_layout_where_nothing_is_rewritten(blocks, expected, monkeypatch):
    import torch._inductor.graph as inductor

    seen = set()
    decide = inductor.GraphLowering.decide_layout_opt

    def decide_layout_opt(*args, **kwargs):
        seen.add(torch._inductor.config.layout_optimization)
        return decide(*args, **kwargs)

    monkeypatch.setattr(inductor.GraphLowering, "decide_layout_opt", staticmethod(decide_layout_opt))
    model = nn.Sequential(*(Residual() for _ in range(blocks)))
    ours = {"rewrite": "always", "iterations": 1, "strict": True, "fx_graph_cache": False}
    x = torch.randn(2, 2, 6, 6)
    torch.compile(model, backend="highway", dynamic=True, options=ours)(x).sum().backward()
    assert seen == expected


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x):
        return x + torch.tanh(self.conv(x))
