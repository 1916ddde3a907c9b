"""Transformers, pre-LN (K = 1) and post-LN (K = weight / sigma). Attention and MLP are two links."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .case import Case, ExpectedChain, Link, program_of, residual, setup
from .residual import layer_norm, linear

LAYERS, WIDTH, HEADS, LENGTH, BATCH = 3, 8, 2, 5, 2


# --------------------------------------------------------------------------------------------- the models


class Attention(nn.Module):
    """Self- or cross-attention; ``manual`` spells it out with einsum, otherwise the fused operator is called."""

    def __init__(self, manual: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.manual, self.causal = manual, causal

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = (
            layer(y).view(*y.shape[:2], HEADS, -1)
            for layer, y in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        if self.manual:
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
            if self.causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
                scores = scores.masked_fill(~mask, float("-inf"))
            mixed = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        else:
            mixed = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=self.causal
            ).transpose(1, 2)
        return self.out(mixed.reshape(x.shape))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


class PreNormLayer(nn.Module):
    def __init__(self, **attention) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.mlp = Attention(**attention), mlp()

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PostNormLayer(PreNormLayer):
    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class ParallelLayer(PreNormLayer):
    def forward(self, x):
        return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))


class ParallelLayerSharedNorm(PreNormLayer):
    """The same with one norm and the branches added first, as in GPT-J and Falcon."""

    def __init__(self, **attention) -> None:
        super().__init__(**attention)
        del self.norm2

    def forward(self, x):
        y = self.norm1(x)
        return x + (self.attention(y) + self.mlp(y))


class PostRMSNormLayer(PreNormLayer):
    def __init__(self, **attention) -> None:
        super().__init__(**attention)
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)

    def forward(self, x):
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.mlp(x))


class SandwichLayer(PreNormLayer):
    """``x + norm(f(x))``, the norm inside the branch (Swin v2, OLMo 2): K = 1."""

    def forward(self, x):
        x = x + self.norm1(self.attention(x))
        return x + self.norm2(self.mlp(x))


class LanguageModel(nn.Module):
    """Embeddings, learnt positions, layers, a final norm if the layers are pre-norm, a tied head."""

    def __init__(self, layer, final_norm: bool = True, tied_layers: bool = False, **attention) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.positions = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList([layer(**attention)])
        for _ in range(LAYERS - 1):
            self.layers.append(self.layers[0] if tied_layers else layer(**attention))
        self.norm = nn.LayerNorm(WIDTH) if final_norm else nn.Identity()

    def forward(self, tokens):
        x = self.embedding(tokens) + self.positions
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.embedding.weight)


def torch_encoder(norm_first: bool, dropout: float = 0.0, final_norm: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, 2 * WIDTH, dropout, activation="gelu", batch_first=True, norm_first=norm_first
    )
    norm = nn.LayerNorm(WIDTH) if final_norm else None
    encoder = nn.TransformerEncoder(layer, LAYERS, norm, enable_nested_tensor=False)
    with torch.no_grad():  # the layers are copies of one another: make them differ
        for p in encoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return encoder


class CausalTorchEncoder(nn.Module):
    """nn.TransformerEncoder used as a decoder."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = torch_encoder(norm_first=True, dropout=dropout, final_norm=True)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.encoder(x, mask=mask, is_causal=True)


# ------------------------------------------------------------------------------------ the models, retold


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(-3, -2)


def mix(q, k, v, causal=False, dropout=0.0):
    """Softmax attention over the last but one dimension of [batch, heads, length, width]."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=q.dtype).triu(1)
    return (F.dropout(torch.softmax(scores, -1), dropout) @ v).transpose(-3, -2).flatten(-2)


def attention(module: Attention, x, memory=None):
    memory = x if memory is None else memory
    q, k, v = linear(module.query, x), linear(module.key, memory), linear(module.value, memory)
    return linear(module.out, mix(heads(q), heads(k), heads(v), module.causal))


def feed_forward(module: nn.Sequential, x):
    return linear(module[2], F.gelu(linear(module[0], x)))


def torch_attention(module: nn.MultiheadAttention, x, memory=None, causal=False):
    memory = x if memory is None else memory
    (wq, wk, wv), (bq, bk, bv) = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    q, k, v = F.linear(x, wq, bq), F.linear(memory, wk, bk), F.linear(memory, wv, bv)
    out = linear(module.out_proj, mix(heads(q), heads(k), heads(v), causal, module.dropout))
    # nn.MultiheadAttention has time first, and a dropout mask is drawn in memory order.
    return out.transpose(0, 1).contiguous().transpose(0, 1)


def torch_feed_forward(layer: nn.TransformerEncoderLayer, x):
    return linear(layer.linear2, F.dropout(F.gelu(linear(layer.linear1, x)), layer.dropout.p))


def held_layer_norm(norm: nn.LayerNorm, x, hold):
    """LayerNorm with the mean and the deviation held: K = weight / sigma."""
    mean = x.mean(-1, keepdim=True)
    deviation = torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + norm.eps)
    return (x - hold(mean)) / hold(deviation) * norm.weight + norm.bias


def held_rms_norm(norm: nn.RMSNorm, x, hold):
    return x / hold(torch.sqrt(x.square().mean(-1, keepdim=True) + norm.eps)) * norm.weight


def post_norm(norm, block, *side, normalise=held_layer_norm) -> Link:
    """``norm(x + block(x))``: one link."""

    def step(state, side, hold):
        (x,) = state
        return (normalise(norm, x + hold(block(x, *side)), hold),), ()

    return Link(step, side)


def pre_norm_links(layer):
    return [
        residual(lambda x: attention(layer.attention, layer_norm(layer.norm1, x))),
        residual(lambda x: feed_forward(layer.mlp, layer_norm(layer.norm2, x))),
    ]


def post_norm_links(layer, normalise=held_layer_norm):
    return [
        post_norm(layer.norm1, lambda x: attention(layer.attention, x), normalise=normalise),
        post_norm(layer.norm2, lambda x: feed_forward(layer.mlp, x), normalise=normalise),
    ]


def parallel_links(layer):
    second = getattr(layer, "norm2", layer.norm1)
    return [
        residual(
            lambda x: (
                attention(layer.attention, layer_norm(layer.norm1, x)) + feed_forward(layer.mlp, layer_norm(second, x))
            )
        )
    ]


def sandwich_links(layer):
    return [
        residual(lambda x: layer_norm(layer.norm1, attention(layer.attention, x))),
        residual(lambda x: layer_norm(layer.norm2, feed_forward(layer.mlp, x))),
    ]


def torch_links(layer, causal=False):
    def attend(x):
        return F.dropout(torch_attention(layer.self_attn, x, causal=causal), layer.dropout1.p)

    def feed(x):
        return F.dropout(torch_feed_forward(layer, x), layer.dropout2.p)

    if layer.norm_first:
        return [
            residual(lambda x: attend(layer_norm(layer.norm1, x))),
            residual(lambda x: feed(layer_norm(layer.norm2, x))),
        ]
    return [post_norm(layer.norm1, attend), post_norm(layer.norm2, feed)]


def _language_program(links):
    def make(model):
        def forward(run, tokens):
            x = model.embedding.weight[tokens] + model.positions
            (x,) = run([link for layer in model.layers for link in links(layer)], (x,)).states[-1]
            if isinstance(model.norm, nn.LayerNorm):
                x = layer_norm(model.norm, x)
            return x @ model.embedding.weight.T

        return program_of(model, forward)

    return make


def _torch_program(model, causal=False):
    encoder = getattr(model, "encoder", model)

    def forward(run, x):
        (x,) = run([link for layer in encoder.layers for link in torch_links(layer, causal)], (x,)).states[-1]
        return x if encoder.norm is None else layer_norm(encoder.norm, x)

    return program_of(model, forward)


# ---------------------------------------------------------------------------------------------- the cases


def language_setup(make):
    build = setup(make)

    def with_tokens():
        model, _, loss = build()
        return model, (torch.randint(0, 11, (BATCH, LENGTH)),), loss

    return with_tokens


TWO_PER_LAYER = (ExpectedChain(2 * LAYERS, "1"),)
POST_NORM = (ExpectedChain(2 * LAYERS, "weight/sigma"),)
INPUT = (BATCH, LENGTH, WIDTH)


def _language(name, layer, links, chains, **kwargs):
    return Case(name, language_setup(lambda: LanguageModel(layer, **kwargs)), _language_program(links), chains)


def _post_rms_links(layer):
    return post_norm_links(layer, held_rms_norm)


CASES = [
    _language("encoder_pre_norm", PreNormLayer, pre_norm_links, TWO_PER_LAYER),
    _language("encoder_pre_norm_manual", PreNormLayer, pre_norm_links, TWO_PER_LAYER, manual=True),
    _language("decoder_causal", PreNormLayer, pre_norm_links, TWO_PER_LAYER, causal=True),
    _language("decoder_causal_manual", PreNormLayer, pre_norm_links, TWO_PER_LAYER, causal=True, manual=True),
    _language("encoder_tied_layers", PreNormLayer, pre_norm_links, TWO_PER_LAYER, tied_layers=True),
    _language("encoder_post_norm", PostNormLayer, post_norm_links, POST_NORM, final_norm=False),
    _language("encoder_post_norm_manual", PostNormLayer, post_norm_links, POST_NORM, final_norm=False, manual=True),
    _language("encoder_post_rms_norm", PostRMSNormLayer, _post_rms_links, POST_NORM, final_norm=False),
    _language("encoder_parallel", ParallelLayer, parallel_links, (ExpectedChain(LAYERS, "1"),)),
    _language("encoder_parallel_shared_norm", ParallelLayerSharedNorm, parallel_links, (ExpectedChain(LAYERS, "1"),)),
    _language("encoder_sandwich", SandwichLayer, sandwich_links, TWO_PER_LAYER),
    Case("torch_encoder_pre_norm", setup(lambda: torch_encoder(True), INPUT), _torch_program, TWO_PER_LAYER),
    Case(
        "torch_encoder_pre_norm_final_norm",
        setup(lambda: torch_encoder(True, final_norm=True), INPUT),
        _torch_program,
        TWO_PER_LAYER,
    ),
    Case("torch_encoder_post_norm", setup(lambda: torch_encoder(False), INPUT), _torch_program, POST_NORM),
    Case(
        "torch_encoder_causal",
        setup(CausalTorchEncoder, INPUT),
        lambda model: _torch_program(model, causal=True),
        TWO_PER_LAYER,
    ),
    Case(
        "torch_encoder_pre_norm_dropout",
        setup(lambda: torch_encoder(True, dropout=0.1), INPUT),
        _torch_program,
        TWO_PER_LAYER,
        random=True,
    ),
    Case(
        "torch_encoder_post_norm_dropout",
        setup(lambda: torch_encoder(False, dropout=0.1), INPUT),
        _torch_program,
        POST_NORM,
        random=True,
    ),
    Case(
        "torch_encoder_causal_dropout",
        setup(lambda: CausalTorchEncoder(dropout=0.1), INPUT),
        lambda model: _torch_program(model, causal=True),
        TWO_PER_LAYER,
        random=True,
    ),
]
