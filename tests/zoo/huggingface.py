"""Unchanged Hugging Face models with tiny random configurations, written for the oracle on their own parameters."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import nn

from hwbp_compiler.testing.losses import probe_loss

from .case import Case, ExpectedChain, program_of, residual
from .residual import layer_norm, linear
from .transformer import mix, post_norm

LAYERS, WIDTH, HEADS, LENGTH, BATCH, VOCABULARY = 3, 8, 2, 5, 2, 13
SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 2 * WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "initializer_range": 0.4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


class Only(nn.Module):
    """One field of what the model returns."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, *args):
        return getattr(self.model(*args), self.field)


def _build(make, field="logits", pixels=False):
    def build():
        torch.manual_seed(0)
        model = Only(make(), field).double().train()
        with torch.no_grad():  # biases start at zero and norms at one: make them matter
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        if pixels:
            arg = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, requires_grad=True)
        else:
            arg = torch.randint(2, VOCABULARY, (BATCH, LENGTH))
        return model, (arg,), probe_loss

    return build


def gpt2(attention: str):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCABULARY, n_positions=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(attention: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {k: v for k, v in SIZES.items() if "dropout" not in k}
    config = LlamaConfig(
        **sizes, num_key_value_heads=1, attention_dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        tie_word_embeddings=False, use_cache=False, attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert(attention: str):
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**SIZES, attn_implementation=attention), add_pooling_layer=False)


def roberta(attention: str):
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(**SIZES, attn_implementation=attention), add_pooling_layer=False)


def vit(attention: str):
    from transformers import ViTConfig, ViTModel

    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = ViTConfig(**sizes, image_size=8, patch_size=4, attn_implementation=attention)
    return ViTModel(config, add_pooling_layer=False)


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        num_hidden_layers=LAYERS, hidden_size=WIDTH, vocab_size=VOCABULARY, state_size=3, conv_kernel=3,
        residual_in_fp32=False, use_cache=False, initializer_range=0.4, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return MambaForCausalLM(config)


# ------------------------------------------------------------------------------------ the models, retold


def split_heads(x, width=WIDTH // HEADS):
    return x.unflatten(-1, (-1, width)).transpose(-3, -2)


def conv1d(layer, x):
    """GPT-2 stores a linear layer's matrix transposed."""
    return x @ layer.weight + layer.bias


def _gpt2_program(model):
    body = model.model.transformer

    def links(block):
        def attend(x):
            q, k, v = conv1d(block.attn.c_attn, layer_norm(block.ln_1, x)).chunk(3, -1)
            return conv1d(block.attn.c_proj, mix(split_heads(q), split_heads(k), split_heads(v), causal=True))

        def feed(x):
            hidden = F.gelu(conv1d(block.mlp.c_fc, layer_norm(block.ln_2, x)), approximate="tanh")
            return conv1d(block.mlp.c_proj, hidden)

        return [residual(attend), residual(feed)]

    def forward(run, tokens):
        x = body.wte.weight[tokens] + body.wpe.weight[: tokens.shape[1]]
        (x,) = run([link for block in body.h for link in links(block)], (x,)).states[-1]
        return layer_norm(body.ln_f, x) @ model.model.lm_head.weight.T

    return program_of(model, forward)


def llama_norm(norm, x):
    """Computed in float32 for every dtype of the input, as in the model."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _llama_program(model):
    body = model.model.model

    def rotary(x):
        width = WIDTH // HEADS
        frequency = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
        angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * frequency
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    def links(layer):
        def attend(x):
            y = llama_norm(layer.input_layernorm, x)
            cos, sin = rotary(x)
            own = layer.self_attn
            q, k, v = (split_heads(linear(p, y)) for p in (own.q_proj, own.k_proj, own.v_proj))
            k, v = (t.expand(-1, HEADS, -1, -1) for t in (rotate(k, cos, sin), v))
            return linear(own.o_proj, mix(rotate(q, cos, sin), k, v, causal=True))

        def feed(x):
            y = llama_norm(layer.post_attention_layernorm, x)
            hidden = F.silu(linear(layer.mlp.gate_proj, y)) * linear(layer.mlp.up_proj, y)
            return linear(layer.mlp.down_proj, hidden)

        return [residual(attend), residual(feed)]

    def forward(run, tokens):
        x = body.embed_tokens.weight[tokens]
        (x,) = run([link for layer in body.layers for link in links(layer)], (x,)).states[-1]
        return linear(model.model.lm_head, llama_norm(body.norm, x))

    return program_of(model, forward)


def _bert_program(first_position=0):
    def make(model):
        embeddings, layers = model.model.embeddings, model.model.encoder.layer

        def links(layer):
            own = layer.attention.self

            def attend(x):
                q, k, v = (split_heads(linear(p, x)) for p in (own.query, own.key, own.value))
                return linear(layer.attention.output.dense, mix(q, k, v))

            def feed(x):
                return linear(layer.output.dense, F.gelu(linear(layer.intermediate.dense, x)))

            return [
                post_norm(layer.attention.output.LayerNorm, attend),
                post_norm(layer.output.LayerNorm, feed),
            ]

        def forward(run, tokens):
            positions = torch.arange(tokens.shape[1]) + first_position
            x = embeddings.word_embeddings.weight[tokens] + embeddings.token_type_embeddings.weight[0]
            # The embeddings' own LayerNorm is before the first link: exact.
            x = layer_norm(embeddings.LayerNorm, x + embeddings.position_embeddings.weight[positions])
            return run([link for layer in layers for link in links(layer)], (x,)).states[-1][0]

        return program_of(model, forward)

    return make


def _vit_program(model):
    body = model.model
    layers = body.layers if hasattr(body, "layers") else body.encoder.layer

    def links(layer):
        own = layer.attention

        def attend(x):
            y = layer_norm(layer.layernorm_before, x)
            q, k, v = (split_heads(linear(p, y)) for p in (own.q_proj, own.k_proj, own.v_proj))
            return linear(own.o_proj, mix(q, k, v))

        def feed(x):
            y = layer_norm(layer.layernorm_after, x)
            return linear(layer.mlp.fc2, F.gelu(linear(layer.mlp.fc1, y)))

        return [residual(attend), residual(feed)]

    def forward(run, pixels):
        embeddings = body.embeddings
        projection = embeddings.patch_embeddings.projection
        patches = F.conv2d(pixels, projection.weight, projection.bias, projection.stride).flatten(2).mT
        x = torch.cat([embeddings.cls_token.expand(len(pixels), -1, -1), patches], 1)
        x = x + embeddings.position_embeddings
        (x,) = run([link for layer in layers for link in links(layer)], (x,)).states[-1]
        return layer_norm(body.layernorm, x)

    return program_of(model, forward)


# ---------------------------------------------------------------------------------------------- the cases

PRE_NORM, POST_NORM = (ExpectedChain(2 * LAYERS, "1"),), (ExpectedChain(2 * LAYERS, "weight/sigma"),)
# RMSNorm and ViT's eager softmax run in float32 inside a float64 model.
SINGLE = {"tolerance": 1e-4, "noise": 1e-6, "forward_tolerance": 1e-5}


def _cases():
    for attention in ("eager", "sdpa"):

        def made(make, *args, attention=attention, **kwargs):
            return _build(lambda: make(attention), *args, **kwargs)

        hidden = "last_hidden_state"
        yield Case(f"hf_gpt2_{attention}", made(gpt2), _gpt2_program, PRE_NORM)
        yield Case(f"hf_llama_{attention}", made(llama), _llama_program, PRE_NORM, **SINGLE)
        yield Case(f"hf_bert_{attention}", made(bert, hidden), _bert_program(), POST_NORM)
        yield Case(f"hf_roberta_{attention}", made(roberta, hidden), _bert_program(2), POST_NORM)
        loose = SINGLE if attention == "eager" else {}
        yield Case(f"hf_vit_{attention}", made(vit, hidden, pixels=True), _vit_program, PRE_NORM, **loose)
    # Its slow path runs a diagonal recurrence inside every block: chains inside links are left open.
    yield Case("hf_mamba", _build(mamba), None, None, **SINGLE)


CASES = list(_cases()) if importlib.util.find_spec("transformers") else []
