"""A side output of a block is a loss contribution at the state before the block. A head on a state is one at that
state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, setup
from .recurrent import BATCH as SEQUENCES
from .recurrent import HIDDEN, INPUT, STEPS
from .residual import BATCH, DEPTH, WIDTH, Block, Looped, branch, layer_norm, linear
from .transformer import PostNormLayer, attention, feed_forward, held_layer_norm


class ActivityPenalty(Looped):
    """Every block returns the mean square of its hidden activity; the model returns them all, or their sum."""

    def __init__(self, summed: bool) -> None:
        super().__init__()
        self.summed = summed

    def forward(self, x):
        x = self.stem(x)
        penalties = []
        for block in self.blocks:
            hidden = F.gelu(block.up(block.norm(x)))
            penalties.append(hidden.square().mean())
            x = x + block.down(hidden)
        out = self.head(self.norm(x))
        return (out, sum(penalties)) if self.summed else (out, penalties)


class AuxiliaryHeads(Looped):
    """Deep supervision: a head on every second state."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({str(i): nn.Linear(WIDTH, 2) for i in range(0, DEPTH, 2)})

    def forward(self, x):
        x = self.stem(x)
        auxiliary = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i % 2 == 0:
                auxiliary.append(self.heads[str(i)](x))
        return self.head(self.norm(x)), auxiliary


class Routed(nn.Module):
    """A dense mixture of two experts per block; the router's logits are returned, as for a balancing loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(DEPTH))
        self.routers = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(DEPTH))
        self.experts = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        logits = []
        for norm, router, experts in zip(self.norms, self.routers, self.experts, strict=True):
            y = norm(x)
            logits.append(router(y))
            weights = logits[-1].softmax(-1)
            first, second = torch.tanh(experts(y)).chunk(2, -1)
            x = x + weights[..., :1] * first + weights[..., 1:] * second
        return x, torch.stack(logits)


class PenalisedPostNorm(nn.Module):
    """A post-norm encoder whose MLPs return an activity penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PostNormLayer() for _ in range(3))

    def forward(self, x):
        penalty = 0.0
        for layer in self.layers:
            x = layer.norm1(x + layer.attention(x))
            hidden = layer.mlp[:2](x)
            penalty = penalty + hidden.abs().mean()
            x = layer.norm2(x + layer.mlp[2](hidden))
        return x, penalty


class GatesReturned(nn.Module):
    """A gated recurrence that also returns every update gate."""

    def __init__(self) -> None:
        super().__init__()
        self.from_x, self.from_h = nn.Linear(INPUT, 2 * HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], HIDDEN)
        gates = []
        for x_t in x:
            z, n = (self.from_x(x_t) + self.from_h(h)).chunk(2, -1)
            z = torch.sigmoid(z)
            gates.append(z)
            h = z * h + (1 - z) * torch.tanh(n)
        return h, torch.stack(gates)


class PartlyFrozen(Looped):
    """Every other block frozen."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks[::2]:
            block.requires_grad_(False)


class Checkpointed(Looped):
    """Every block under activation checkpointing."""

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


class DeadEnds(Looped):
    """Computes values that nothing uses, and returns one that the loss ignores."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            torch.tanh(self.unused(x))
            ignored = torch.sin(x)
            x = block(x)
        return self.head(self.norm(x)), ignored


# ------------------------------------------------------------------------------------ the models, retold


def _penalty_program(model):
    def link(block: Block):
        def step(state, side, hold):
            (x,) = state
            hidden = F.gelu(linear(block.up, layer_norm(block.norm, x)))
            return (x + hold(linear(block.down, hidden)),), (hidden.square().mean(),)

        return Link(step)

    def forward(run, x):
        chain = run([link(block) for block in model.blocks], (linear(model.stem, x),))
        out = linear(model.head, layer_norm(model.norm, chain.states[-1][0]))
        penalties = [penalty for (penalty,) in chain.outputs]
        return (out, sum(penalties)) if model.summed else (out, penalties)

    return program_of(model, forward)


def _plain(block: Block):
    return Link(lambda state, side, hold: ((state[0] + hold(branch(block)(state[0])),), ()))


def _heads_program(model):
    def forward(run, x):
        chain = run([_plain(block) for block in model.blocks], (linear(model.stem, x),))
        auxiliary = [linear(head, chain.states[int(i) + 1][0]) for i, head in model.heads.items()]
        return linear(model.head, layer_norm(model.norm, chain.states[-1][0])), auxiliary

    return program_of(model, forward)


def _routed_program(model):
    def link(norm, router, experts):
        def step(state, side, hold):
            (x,) = state
            y = layer_norm(norm, x)
            logits = linear(router, y)
            weights = torch.softmax(logits, -1)[..., None]
            outputs = torch.tanh(linear(experts, y)).unflatten(-1, (2, -1))
            return (x + hold((weights * outputs).sum(-2)),), (logits,)

        return Link(step)

    def forward(run, x):
        links = [link(*parts) for parts in zip(model.norms, model.routers, model.experts, strict=True)]
        chain = run(links, (x,))
        return chain.states[-1][0], torch.stack([logits for (logits,) in chain.outputs])

    return program_of(model, forward)


def _penalised_post_norm_program(model):
    def links(layer):
        def attend(state, side, hold):
            (x,) = state
            return (held_layer_norm(layer.norm1, x + hold(attention(layer.attention, x)), hold),), ()

        def feed(state, side, hold):
            (x,) = state
            penalty = F.gelu(linear(layer.mlp[0], x)).abs().mean()
            return (held_layer_norm(layer.norm2, x + hold(feed_forward(layer.mlp, x)), hold),), (penalty,)

        return [Link(attend), Link(feed)]

    def forward(run, x):
        chain = run([link for layer in model.layers for link in links(layer)], (x,))
        return chain.states[-1][0], sum(outputs[0] for outputs in chain.outputs if outputs)

    return program_of(model, forward)


def _gates_program(model):
    def step(state, side, hold):
        (h,), (x,) = state, side
        z, n = (linear(model.from_x, x) + linear(model.from_h, h)).chunk(2, -1)
        z = torch.sigmoid(z)
        return (hold(z) * h + hold((1 - z) * torch.tanh(n)),), (z,)

    def forward(run, x):
        start = (torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype),)
        chain = run([Link(step, (x_t,)) for x_t in x.unbind(0)], start)
        return chain.states[-1][0], torch.stack([z for (z,) in chain.outputs])

    return program_of(model, forward)


def _looped_program(model):
    def forward(run, x):
        chain = run([_plain(block) for block in model.blocks], (linear(model.stem, x),))
        return linear(model.head, layer_norm(model.norm, chain.states[-1][0]))

    return program_of(model, forward)


def _dead_ends_program(model):
    def forward(run, x):
        chain = run([_plain(block) for block in model.blocks], (linear(model.stem, x),))
        return linear(model.head, layer_norm(model.norm, chain.states[-1][0])), torch.sin(chain.states[-2][0])

    return program_of(model, forward)


def _ignoring_the_second(build):
    def without():
        model, args, loss = build()
        return model, args, lambda output: loss(output[0])

    return without


X = (BATCH, 5)
ONE = (ExpectedChain(DEPTH, "1"),)

CASES = [
    Case("activity_penalties", setup(lambda: ActivityPenalty(False), X), _penalty_program, ONE),
    Case("activity_penalty_summed", setup(lambda: ActivityPenalty(True), X), _penalty_program, ONE),
    Case("auxiliary_heads", setup(AuxiliaryHeads, X), _heads_program, ONE),
    Case("router_logits", setup(Routed, (BATCH, WIDTH)), _routed_program, ONE),
    Case(
        "penalised_post_norm",
        setup(PenalisedPostNorm, (2, 5, WIDTH)),
        _penalised_post_norm_program,
        (ExpectedChain(6, "weight/sigma"),),
    ),
    Case(
        "gru_gates_returned",
        setup(GatesReturned, (STEPS, SEQUENCES, INPUT)),
        _gates_program,
        (ExpectedChain(STEPS, "gate"),),
    ),
    Case("partly_frozen", setup(PartlyFrozen, X), _looped_program, ONE),
    Case("checkpointed", setup(Checkpointed, X), _looped_program, ONE),
    Case("dead_ends", _ignoring_the_second(setup(DeadEnds, X)), _dead_ends_program, ONE),
]
