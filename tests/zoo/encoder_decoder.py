"""Several chains in one model: encoder and decoder, both directions of a recurrence, stages cut by heavy steps."""

from __future__ import annotations

import torch
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, residual, setup
from .recurrent import BATCH as SEQUENCES
from .recurrent import HIDDEN, INPUT, STEPS, gru_step
from .residual import Block, branch, layer_norm, linear
from .transformer import (
    BATCH,
    HEADS,
    LENGTH,
    WIDTH,
    Attention,
    PreNormLayer,
    attention,
    feed_forward,
    mlp,
    post_norm,
    pre_norm_links,
    torch_attention,
    torch_encoder,
    torch_feed_forward,
    torch_links,
)

LAYERS = 2


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder's output, MLP: three links."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.own, self.cross, self.mlp = Attention(causal=True), Attention(), mlp()

    def forward(self, y, memory):
        y = y + self.own(self.norms[0](y))
        y = y + self.cross(self.norms[1](y), memory)
        return y + self.mlp(self.norms[2](y))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(PreNormLayer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.decoder = nn.ModuleList(DecoderLayer() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, y):
        for layer in self.encoder:
            x = layer(x)
        memory = self.norm(x)
        for layer in self.decoder:
            y = layer(y, memory)
        return self.head(y)


class TorchEncoderDecoder(nn.Module):
    """nn.TransformerEncoder and nn.TransformerDecoder, post-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch_encoder(norm_first=False)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, activation="gelu", batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, LAYERS)
        with torch.no_grad():
            for p in self.decoder.parameters():
                p.add_(0.1 * torch.randn_like(p))

    def forward(self, x, y):
        return self.decoder(y, self.encoder(x))


class Bidirectional(nn.Module):
    """The same inputs read forwards and backwards, the states joined at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards, self.backwards = nn.GRUCell(INPUT, HIDDEN), nn.GRUCell(INPUT, HIDDEN)
        self.head = nn.Linear(2 * HIDDEN, 3)

    def forward(self, x):
        ahead, back = [], []
        h = g = x.new_zeros(x.shape[1], HIDDEN)
        for t in range(x.shape[0]):
            h = self.forwards(x[t], h)
            ahead.append(h)
        for t in reversed(range(x.shape[0])):
            g = self.backwards(x[t], g)
            back.append(g)
        return self.head(torch.cat([torch.stack(ahead), torch.stack(back[::-1])], -1))


class Bridged(nn.Module):
    """A GRU reads; a tanh layer makes the writer's first state and its constant context; another GRU writes."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.GRUCell(INPUT, HIDDEN), nn.GRUCell(2 * HIDDEN, HIDDEN)
        self.bridge, self.feed, self.head = (
            nn.Linear(HIDDEN, HIDDEN),
            nn.Linear(INPUT, HIDDEN),
            nn.Linear(HIDDEN, 3),
        )

    def forward(self, x, y):
        h = x.new_zeros(x.shape[1], HIDDEN)
        for x_t in x:
            h = self.reader(x_t, h)
        context = h = torch.tanh(self.bridge(h))
        written = []
        for y_t in y:
            h = self.writer(torch.cat([self.feed(y_t), context], -1), h)
            written.append(self.head(h))
        return torch.stack(written)


class Stages(nn.Module):
    """Three residual stacks with a change of width between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(width) for _ in range(depth)) for width, depth in ((8, 4), (6, 3), (8, 5))
        )
        self.between = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])

    def forward(self, x):
        for i, stage in enumerate(self.stages):
            if i:
                x = torch.tanh(self.between[i - 1](x))
            for block in stage:
                x = block(x)
        return x


class TwoTowers(nn.Module):
    """Two stacks side by side, multiplied at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*(Block() for _ in range(4)))
        self.right = nn.Sequential(*(Block() for _ in range(5)))

    def forward(self, x, y):
        return self.left(x) * self.right(y)


class GraphBreak(nn.Module):
    """A graph break in the middle of a stack ends the chain there."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.Sequential(*(Block() for _ in range(3)))
        self.upper = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x):
        x = self.lower(x)
        torch._dynamo.graph_break()
        return self.upper(x)


# ------------------------------------------------------------------------------------ the models, retold


def decoder_links(layer: DecoderLayer, memory):
    return [
        residual(lambda y: attention(layer.own, layer_norm(layer.norms[0], y))),
        residual(lambda y, m: attention(layer.cross, layer_norm(layer.norms[1], y), m), memory),
        residual(lambda y: feed_forward(layer.mlp, layer_norm(layer.norms[2], y))),
    ]


def _encoder_decoder_program(model):
    def forward(run, x, y):
        (x,) = run([link for layer in model.encoder for link in pre_norm_links(layer)], (x,)).states[-1]
        memory = layer_norm(model.norm, x)
        (y,) = run([link for layer in model.decoder for link in decoder_links(layer, memory)], (y,)).states[-1]
        return linear(model.head, y)

    return program_of(model, forward)


def torch_decoder_links(layer: nn.TransformerDecoderLayer, memory):
    return [
        post_norm(layer.norm1, lambda y: torch_attention(layer.self_attn, y)),
        post_norm(layer.norm2, lambda y, m: torch_attention(layer.multihead_attn, y, m), memory),
        post_norm(layer.norm3, lambda y: torch_feed_forward(layer, y)),
    ]


def _torch_encoder_decoder_program(model):
    def forward(run, x, y):
        links = [link for layer in model.encoder.layers for link in torch_links(layer)]
        (memory,) = run(links, (x,)).states[-1]
        links = [link for layer in model.decoder.layers for link in torch_decoder_links(layer, memory)]
        return run(links, (y,)).states[-1][0]

    return program_of(model, forward)


def _zeros(x):
    return (torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype),)


def _bidirectional_program(model):
    def forward(run, x):
        def read(cell, inputs):
            return [h for (h,) in run([Link(gru_step(cell), (x_t,)) for x_t in inputs], _zeros(x)).states[1:]]

        ahead = read(model.forwards, list(x.unbind(0)))
        back = read(model.backwards, list(x.unbind(0))[::-1])[::-1]
        return linear(model.head, torch.cat([torch.stack(ahead), torch.stack(back)], -1))

    return program_of(model, forward)


def _bridged_program(model):
    def forward(run, x, y):
        read = run([Link(gru_step(model.reader), (x_t,)) for x_t in x.unbind(0)], _zeros(x))
        context = torch.tanh(linear(model.bridge, read.states[-1][0]))
        fed = [torch.cat([linear(model.feed, y_t), context], -1) for y_t in y.unbind(0)]
        written = run([Link(gru_step(model.writer), (f,)) for f in fed], (context,))
        return torch.stack([linear(model.head, h) for (h,) in written.states[1:]])

    return program_of(model, forward)


def _stack(run, blocks, x):
    return run([residual(branch(block)) for block in blocks], (x,)).states[-1][0]


def _stages_program(model):
    def forward(run, x):
        x = _stack(run, model.stages[0], x)
        x = _stack(run, model.stages[1], torch.tanh(linear(model.between[0], x)))
        return _stack(run, model.stages[2], torch.tanh(linear(model.between[1], x)))

    return program_of(model, forward)


def _two_towers_program(model):
    return program_of(model, lambda run, x, y: _stack(run, model.left, x) * _stack(run, model.right, y))


def _graph_break_program(model):
    return program_of(model, lambda run, x: _stack(run, model.upper, _stack(run, model.lower, x)))


TOKENS, SEQUENCE = (BATCH, LENGTH, WIDTH), (STEPS, SEQUENCES, INPUT)


def _ones(*lengths):
    return tuple(ExpectedChain(length, "1") for length in lengths)


CASES = [
    Case(
        "encoder_decoder",
        setup(EncoderDecoder, TOKENS, (BATCH, LENGTH - 1, WIDTH)),
        _encoder_decoder_program,
        _ones(2 * LAYERS, 3 * LAYERS),
    ),
    Case(
        "torch_encoder_decoder",
        setup(TorchEncoderDecoder, TOKENS, (BATCH, LENGTH - 1, WIDTH)),
        _torch_encoder_decoder_program,
        (ExpectedChain(6, "weight/sigma"), ExpectedChain(3 * LAYERS, "weight/sigma")),
    ),
    Case(
        "gru_bidirectional",
        setup(Bidirectional, SEQUENCE),
        _bidirectional_program,
        (ExpectedChain(STEPS, "gate"),) * 2,
    ),
    Case(
        "gru_encoder_decoder",
        setup(Bridged, SEQUENCE, (STEPS - 1, SEQUENCES, INPUT)),
        _bridged_program,
        (ExpectedChain(STEPS, "gate"), ExpectedChain(STEPS - 1, "gate")),
    ),
    Case("mlp_stages", setup(Stages, (4, 8)), _stages_program, _ones(4, 3, 5)),
    Case("mlp_two_towers", setup(TwoTowers, (4, 8), (4, 8)), _two_towers_program, _ones(4, 5)),
    Case("mlp_graph_break", setup(GraphBreak, (4, 8)), _graph_break_program, _ones(3, 4)),
]
