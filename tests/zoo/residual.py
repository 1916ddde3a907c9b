"""Pre-norm residual stacks of small MLPs, written in different ways: K = 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, residual, setup

WIDTH, DEPTH, BATCH = 8, 6, 4


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.branch(x)


class Looped(nn.Module):
    """A ModuleList, a stem and a head."""

    def __init__(self, depth: int = DEPTH) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Experts(nn.Module):
    """The two best of three experts, as mixtures of experts choose them: ``gather`` and ``topk``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.route = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.Parameter(0.3 * torch.randn(3, WIDTH, WIDTH))

    def forward(self, x):
        x = self.norm(x)
        weight, best = self.route(x).softmax(-1).topk(2, -1)
        found = torch.einsum("bi,eij->bej", x, self.experts)
        chosen = found.gather(1, best.unsqueeze(-1).expand(-1, -1, WIDTH))
        return (chosen * weight.unsqueeze(-1)).sum(1)


class MixtureOfExperts(Looped):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class AddInPlace(Looped):
    """``out += identity``, as in torchvision."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            out = block.branch(x)
            out += x
            x = out
        return self.head(self.norm(x))


class TrunkInPlace(nn.Module):
    """``x += f(x)``: allowed by autograd where f does not save x, here because f starts with a sine of a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for linear in self.blocks:
            x += torch.tanh(linear(x.clone()))
        return x


class Functional(nn.Module):
    """Parameters in lists, everything through torch.nn.functional."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ParameterList(torch.randn(2 * WIDTH, WIDTH) / WIDTH**0.5 for _ in range(DEPTH))
        self.down = nn.ParameterList(torch.randn(WIDTH, 2 * WIDTH) / WIDTH for _ in range(DEPTH))

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            y = F.layer_norm(x, (WIDTH,))
            y = F.linear(F.silu(F.linear(y, up)), down)
            x = torch.add(x, y)
        return x


class LayerScale(Looped):
    """Every branch scaled by a small learnt vector: in J, not in K."""

    def __init__(self) -> None:
        super().__init__()
        self.gammas = nn.ParameterList(torch.full((WIDTH,), 0.3) + 0.1 * i for i in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for block, gamma in zip(self.blocks, self.gammas, strict=True):
            x = x + gamma * block.branch(x)
        return self.head(self.norm(x))


class Tied(nn.Module):
    """One block applied again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, WIDTH)
        self.block = Block()

    def forward(self, x):
        x = self.stem(x)
        for _ in range(DEPTH):
            x = self.block(x)
        return x


class ScaledTrunk(Looped):
    """``a x + f(x)`` with a fixed a: K = a."""

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = 0.9 * x + block.branch(x)
        return self.head(x)


class LearntTrunk(Looped):
    """``a x + f(x)`` with a learnt vector per block: K = a."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ParameterList(torch.linspace(0.5, 1.2, WIDTH) + 0.05 * i for i in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for block, a in zip(self.blocks, self.trunk, strict=True):
            x = a * x + block.branch(x)
        return self.head(x)


class GatedSelf(nn.Module):
    """``x + x sigmoid(W x)``: the product's elementwise path joins K = 1 + sigmoid(...)."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for gate in self.gates:
            x = x + x * torch.sigmoid(gate(x) - 2.0)
        return x


class Highway(nn.Module):
    """A highway network: ``t h + (1 - t) x``, K = 1 - t."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.carry = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for transform, carry in zip(self.transform, self.carry, strict=True):
            t = torch.sigmoid(carry(x) - 1.0)
            x = t * torch.relu(transform(x)) + (1 - t) * x
        return x


class PositionsOnTheWay(Looped):
    """A learnt vector added to the state between blocks: not a link."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.ParameterList(0.1 * torch.randn(WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for block, vector in zip(self.blocks, self.added, strict=True):
            x = block(x) + vector
        return self.head(self.norm(x))


class AllStates(Looped):
    """Returns every state, so the loss touches each."""

    def forward(self, x):
        x = self.stem(x)
        states = [x]
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return states


def linear(layer: nn.Linear, x):
    return F.linear(x, layer.weight, layer.bias)


def layer_norm(norm: nn.LayerNorm, x):
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def branch(block: Block):
    return lambda x: linear(block.down, F.gelu(linear(block.up, layer_norm(block.norm, x))))


def _looped(model, link=lambda model, i: residual(branch(model.blocks[i])), norm=True, head=True):
    def forward(run, x):
        chain = run([link(model, i) for i in range(len(model.blocks))], (linear(model.stem, x),))
        (x,) = chain.states[-1]
        x = layer_norm(model.norm, x) if norm else x
        return linear(model.head, x) if head else x

    return program_of(model, forward)


def _experts(model, i):
    block = model.blocks[i]

    def mixed(x):
        x = layer_norm(block.norm, x)
        shares = torch.softmax(linear(block.route, x), -1)
        threshold = shares.sort(-1).values[:, 1:2]  # the second best of three
        kept = torch.where(shares >= threshold, shares, 0.0)
        return sum(kept[:, e : e + 1] * (x @ block.experts[e]) for e in range(3))

    return residual(mixed)


def _layer_scale(model, i):
    block = branch(model.blocks[i])
    return residual(lambda x: model.gammas[i] * block(x))


def _scaled(model, i, factor):
    block = branch(model.blocks[i])
    return Link(lambda state, side, hold: ((factor * state[0] + hold(block(state[0])),), ()))


def _with_vector(model, i):
    block = branch(model.blocks[i])
    return Link(lambda state, side, hold: ((state[0] + hold(block(state[0])) + model.added[i],), ()))


def _bare(model, links, stem=None):
    def forward(run, x):
        chain = run([residual(link) if callable(link) else link for link in links], (stem(x) if stem else x,))
        return chain.states[-1][0]

    return program_of(model, forward)


def _functional(model):
    def block(up, down):
        return lambda x: F.linear(F.silu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)

    return _bare(model, [block(up, down) for up, down in zip(model.up, model.down, strict=True)])


def _gated_self(model):
    def link(gate):
        return Link(
            lambda state, side, hold: (
                (state[0] + state[0] * hold(torch.sigmoid(linear(gate, state[0]) - 2.0)),),
                (),
            )
        )

    return _bare(model, [link(gate) for gate in model.gates])


def _highway(model):
    def link(transform, carry):
        def step(state, side, hold):
            (x,) = state
            t = torch.sigmoid(linear(carry, x) - 1.0)
            return (hold(t * torch.relu(linear(transform, x))) + hold(1 - t) * x,), ()

        return Link(step)

    return _bare(model, [link(t, c) for t, c in zip(model.transform, model.carry, strict=True)])


def _all_states(model):
    def forward(run, x):
        chain = run([residual(branch(block)) for block in model.blocks], (linear(model.stem, x),))
        return [state for (state,) in chain.states]

    return program_of(model, forward)


def _chain(multiplier="1"):
    return (ExpectedChain(DEPTH, multiplier),)


def _sequential():
    return nn.Sequential(nn.Linear(5, WIDTH), *(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH))


def _sequential_program(model):
    stem, *blocks, norm = model

    def forward(run, x):
        chain = run([residual(branch(block)) for block in blocks], (linear(stem, x),))
        return layer_norm(norm, chain.states[-1][0])

    return program_of(model, forward)


def _raw():
    return nn.Sequential(*(Block() for _ in range(DEPTH)))


def _raw_program(model):
    return _bare(model, [branch(block) for block in model])


X, RAW = (BATCH, 5), (BATCH, WIDTH)

CASES = [
    Case("mlp_module_list", setup(Looped, X), _looped, _chain()),
    Case("mlp_sequential", setup(_sequential, X), _sequential_program, _chain()),
    Case("mlp_raw_input_with_grad", setup(_raw, RAW), _raw_program, _chain()),
    Case(
        "mlp_raw_input_without_grad",
        setup(_raw, RAW, grad=False),
        _raw_program,
        _chain(),
    ),
    Case("mlp_functional", setup(Functional, RAW), _functional, _chain()),
    Case("mlp_add_in_place", setup(AddInPlace, X), _looped, _chain()),
    Case(
        "mlp_trunk_in_place",
        setup(TrunkInPlace, X),
        lambda model: _bare(
            model,
            [lambda x, layer=layer: torch.tanh(linear(layer, x)) for layer in model.blocks],
            stem=lambda x: linear(model.stem, x),
        ),
        _chain(),
    ),
    Case("mlp_layer_scale", setup(LayerScale, X), lambda m: _looped(m, _layer_scale), _chain()),
    Case(
        "mlp_tied",
        setup(Tied, X),
        lambda m: _bare(m, [branch(m.block)] * DEPTH, stem=lambda x: linear(m.stem, x)),
        _chain(),
    ),
    Case(
        "mlp_scaled_trunk",
        setup(ScaledTrunk, X),
        lambda m: _looped(m, lambda m, i: _scaled(m, i, 0.9), norm=False),
        _chain("scale"),
    ),
    Case(
        "mlp_learnt_trunk",
        setup(LearntTrunk, X),
        lambda m: _looped(m, lambda m, i: _scaled(m, i, m.trunk[i]), norm=False),
        _chain("scale"),
    ),
    Case("mlp_gated_self", setup(GatedSelf, RAW), _gated_self, _chain("gate")),
    Case("highway_network", setup(Highway, RAW), _highway, _chain("gate")),
    Case("mlp_positions_on_the_way", setup(PositionsOnTheWay, X), lambda m: _looped(m, _with_vector), _chain()),
    Case("mlp_top_k_experts", setup(MixtureOfExperts, X), lambda m: _looped(m, _experts), _chain()),
    Case("mlp_all_states", setup(AllStates, X), _all_states, _chain()),
]
