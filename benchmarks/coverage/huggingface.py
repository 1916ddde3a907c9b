"""Hugging Face models from tiny configurations. Nothing is downloaded.

Models have three layers unless stated otherwise. A layer of a pre-norm or post-norm transformer has two links, one for
the attention and one for the MLP. A decoder layer that also attends to an encoder has three.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .case import Calls, Case, Made

WIDTH, LENGTH, BATCH, VOCABULARY = 16, 6, 2, 40
SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
    "initializer_range": 0.2,
}


def tokens(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, length))


def pixels(size: int = 16) -> torch.Tensor:
    return torch.randn(BATCH, 3, size, size)


INPUTS = {
    "input_ids": tokens,
    "decoder_input_ids": lambda: tokens(LENGTH - 1),
    "pixel_values": pixels,
}


def _make(settings: dict[str, Any], inputs: dict[str, Any]) -> Made:
    import transformers

    config = dict(settings["config"])
    if "backbone_of" in config:
        config["backbone_config"] = _config(**config.pop("backbone_of"))
    cls = getattr(transformers, settings["head"])
    found = _config(settings["kind"], **config)
    model = cls.from_config(found) if settings["head"].startswith("Auto") else cls(found)
    if settings["experts"]:
        model.set_experts_implementation(settings["experts"])
    made = {**INPUTS, **inputs}
    names = tuple(settings["names"].split())
    return Calls(model, names, settings["output"]), tuple(made[name]() for name in names)


def _config(kind: str, **sizes: Any) -> Any:
    import transformers

    return transformers.AutoConfig.for_model(kind, **sizes)


def hf(
    kind: str,
    family: str,
    chains: tuple[int, ...],
    *,
    note: str = "",
    why: str = "",
    names: str = "input_ids",
    output: Any = 0,
    head: str = "AutoModel",
    name: str = "",
    inputs: Any = None,
    drop: str = "",
    experts: str = "",
    single: str = "",
    **config: Any,
) -> Case:
    """``config`` goes on top of :data:`SIZES`, less those that are named in ``drop`` (all of them: ``"*"``)."""
    kept = {} if drop == "*" else {key: value for key, value in SIZES.items() if key not in drop.split()}
    settings = {
        "kind": kind,
        "config": kept | config,
        "names": names,
        "output": output,
        "head": head,
        "experts": experts,
    }
    make = partial(_make, settings, inputs or {})
    return Case(name or kind, f"transformers, {family}", make, chains, why or note, "transformers", settings, single)


GROUPED = "torch's grouped matrix product takes no float64"
OVERFLOWS = "the model fills a float32 tensor with the lowest float64"
TINY_MOE = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "top_k": 2,
    "moe_intermediate_size": 16,
    "moe_num_experts": 4,
    "moe_k": 2,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
}


def decoders() -> Iterator[Case]:
    one = partial(hf, family="decoder")
    kinds = (
        "gpt2 gpt_neo llama mistral gemma gemma2 gemma3_text phi3 stablelm olmo olmo2 olmo3 qwen2 qwen3 bloom mpt "
        "xglm biogpt persimmon starcoder2 gpt_bigcode granite nemotron helium glm glm4 smollm3 exaone4 ernie4_5 "
        "apertus arcee bitnet diffllama modernbert-decoder seed_oss hunyuan_v1_dense doge nanochat vaultgemma cwm "
        "imagegpt ministral"
    )
    for kind in kinds.split():
        more: dict[str, Any] = {"head_dim": 8} if kind not in ("phi3",) else {}
        if kind == "gpt_neo":
            more["attention_types"] = [[["global", "local", "global"], 1]]
        if kind == "modernbert-decoder":
            more["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
        if kind == "diffllama":
            more["num_key_value_heads"] = 2
        if kind == "xglm":
            more["single"] = OVERFLOWS
        yield one(kind, chains=(6,), **more)
    yield one("opt", chains=(6,), ffn_dim=32, word_embed_proj_dim=WIDTH)
    yield one("openai-gpt", chains=(6,))
    yield one("ctrl", chains=(6,), dff=32)
    for kind in ("gpt_neox", "gptj", "phi", "falcon", "codegen", "cohere", "cohere2"):
        yield one(
            kind,
            chains=(3,),
            note="attention and MLP side by side: one link a layer",
            rotary_dim=4,
            **({"num_attention_heads": 4} if kind == "codegen" else {}),
        )
    yield one("gpt_neox", chains=(6,), name="gpt_neox, one after the other", use_parallel_residual=False)
    yield one("falcon", chains=(6,), name="falcon, one after the other", parallel_attn=False)


def experts() -> Iterator[Case]:
    one = partial(hf, family="mixture of experts", **TINY_MOE)
    kinds = (
        "mixtral qwen2_moe qwen3_moe gpt_oss granitemoe granitemoeshared olmoe phimoe jetmoe llama4_text ernie4_5_moe "
        "glm4_moe dots1 flex_olmo hunyuan_v1_moe minimax minimax_m2 deepseek_v2 deepseek_v3 afmoe dbrx"
    )
    for kind in kinds.split():
        more: dict[str, Any] = {}
        if kind in ("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1"):
            more = {
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 4,
                "qk_nope_head_dim": 4,
                "v_head_dim": 8,
                "n_group": 2,
                "topk_group": 1,
                "n_shared_experts": 1,
                "first_k_dense_replace": 1,
                "num_key_value_heads": 2,
                "head_dim": 4,
            }
        if kind == "jetmoe":
            more = {"kv_channels": 8, "num_key_value_heads": 2}
        if kind == "dbrx":
            more = {
                "d_model": WIDTH,
                "n_heads": 2,
                "n_layers": 3,
                "max_seq_len": 32,
                "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
                "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
            }
        if kind not in ("dbrx", "jetmoe", "llama4_text"):
            more["single"] = GROUPED
        yield one(kind, chains=(6,), **more)
    yield hf("mixtral", "mixture of experts", (6,), name="mixtral, batched experts", experts="batched_mm", **TINY_MOE)


def state_spaces() -> Iterator[Case]:
    one = partial(hf, family="state space or recurrent")
    mamba = {"state_size": 4, "conv_kernel": 3, "expand": 2, "head_dim": 8, "num_heads": 4, "n_groups": 1}
    yield one("mamba", chains=(3,), note="one mixer a layer", **mamba)
    yield one("falcon_mamba", chains=(3,), note="one mixer a layer", **mamba)
    yield one("mamba2", chains=(3,), note="one mixer a layer", chunk_size=4, **mamba)
    yield one("rwkv", chains=(6,), attention_hidden_size=WIDTH, context_length=16)
    yield one("recurrent_gemma", chains=(6,), lru_width=WIDTH, attention_window_size=8)
    yield one("xlstm", chains=(6,), num_blocks=3, num_heads=2, head_dim=8, embedding_dim=WIDTH)
    yield one(
        "jamba",
        chains=(6,),
        single=GROUPED,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_d_conv=3,
        mamba_dt_rank=2,
        use_mamba_kernels=False,
        num_experts=2,
        num_experts_per_tok=1,
    )
    yield one(
        "bamba",
        chains=(6,),
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
    )
    yield one(
        "falcon_h1",
        chains=(6,),
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
        head_dim=8,
        note="attention and Mamba side by side, then an MLP",
    )
    yield one(
        "granitemoehybrid",
        chains=(6,),
        single=GROUPED,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=16,
    )
    yield one(
        "nemotron_h",
        chains=(4,),
        note="one mixer a layer",
        num_hidden_layers=4,
        layers_block_type=None,
        hybrid_override_pattern="M*M-",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=4,
        head_dim=8,
    )
    yield one(
        "qwen3_next",
        chains=(6,),
        single=GROUPED,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    yield one("lfm2", chains=(6,), layer_types=["conv", "full_attention", "conv"], block_multiple_of=8)
    yield one(
        "zamba2",
        chains=(3,),
        note="one Mamba a layer; the shared attention feeds into it",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=4,
        mamba_ngroups=1,
        n_mamba_heads=4,
        mamba_headdim=8,
        chunk_size=4,
        num_mem_blocks=1,
        adapter_rank=4,
    )


def encoders() -> Iterator[Case]:
    one = partial(hf, family="encoder")
    kinds = (
        "bert roberta camembert xlm-roberta xlm-roberta-xl electra albert mpnet deberta deberta-v2 nystromformer "
        "fnet squeezebert ibert layoutlm markuplm megatron-bert rembert roformer roberta-prelayernorm ernie esm "
        "convbert data2vec-text mra yoso nomic_bert eurobert modernbert tapas splinter bert-generation roc_bert "
        "big_bird longformer luke visual_bert"
    )
    for kind in kinds.split():
        more: dict[str, Any] = {}
        if kind in ("electra", "albert"):
            more["embedding_size"] = WIDTH
        if kind == "albert":
            more["inner_group_num"] = 1
        if kind == "squeezebert":
            more["embedding_size"] = WIDTH
        if kind == "convbert":
            more = {"embedding_size": WIDTH, "conv_kernel_size": 3, "head_ratio": 2, "num_groups": 1}
        if kind == "esm":
            more = {"mask_token_id": 4, "position_embedding_type": "rotary"}
        if kind == "longformer":
            more = {"attention_window": 4, "inputs": {"input_ids": partial(tokens, 8)}}
        if kind == "nystromformer":
            more = {"num_landmarks": 4, "segment_means_seq_len": 8, "inputs": {"input_ids": partial(tokens, 8)}}
        if kind == "yoso":
            more = {"use_expectation": True}
        if kind == "luke":
            more = {"entity_vocab_size": 8, "entity_emb_size": 8}
        if kind == "visual_bert":
            more = {"visual_embedding_dim": 8}
        if kind == "mra":
            more = {
                "inputs": {"input_ids": partial(tokens, 32)},
                "block_per_row": 1,
                "single": "parts of it are float32 whatever it is",
            }
        if kind == "roformer":
            more = {"embedding_size": WIDTH}
        yield one(kind, chains=(6,), **more)
    yield one("distilbert", chains=(6,), dim=WIDTH, n_layers=3, n_heads=2, hidden_dim=32)
    yield one("xlnet", chains=(6,), drop="max_position_embeddings", d_model=WIDTH, n_layer=3, n_head=2, d_inner=32)
    yield one("xlm", chains=(6,), emb_dim=WIDTH, n_layers=3, n_heads=2, n_words=VOCABULARY)
    yield one("flaubert", chains=(6,), emb_dim=WIDTH, n_layers=3, n_heads=2, n_words=VOCABULARY)
    yield one(
        "funnel",
        chains=(9,),
        head="FunnelModel",
        drop="num_hidden_layers",
        block_sizes=[2, 2],
        num_decoder_layers=2,
        d_model=WIDTH,
        n_head=2,
        d_head=8,
        d_inner=32,
        note="two layers, the pooled second stage as the block of one link, two layers of the decoder",
        inputs={"input_ids": partial(tokens, 8)},
    )
    yield one(
        "canine",
        chains=(2, 6, 2),
        num_hidden_layers=3,
        single=OVERFLOWS,
        local_transformer_stride=4,
        downsampling_rate=2,
        upsampling_kernel_size=2,
        num_hash_buckets=16,
        inputs={"input_ids": partial(tokens, 8)},
        note="a layer on characters, three on pieces, a layer on characters",
    )
    yield one(
        "perceiver",
        chains=(8,),
        d_model=WIDTH,
        d_latents=WIDTH,
        num_latents=4,
        num_blocks=1,
        num_self_attends_per_block=3,
        num_cross_attention_heads=2,
        num_self_attention_heads=2,
        qk_channels=8,
        v_channels=WIDTH,
        names="inputs",
        inputs={"inputs": partial(torch.randn, BATCH, LENGTH, WIDTH)},
        note="the latents through one cross attention and three layers",
    )
    yield one(
        "lilt",
        chains=(6, 6),
        channel_shrink_ratio=2,
        hidden_size=24,
        note="text and layout, whose attention scores are added",
        max_2d_position_embeddings=32,
    )
    yield one(
        "mobilebert",
        chains=(3, 4, 4, 4),
        embedding_size=WIDTH,
        intra_bottleneck_size=8,
        true_hidden_size=8,
        note="one link a layer on the wide stream; three MLPs and an output in the bottleneck of each, whose attention "
        "reads the wide stream alone",
    )


def encoder_decoders() -> Iterator[Case]:
    one = partial(hf, family="encoder-decoder", names="input_ids decoder_input_ids")
    bart = {
        "d_model": WIDTH,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 1,
    }
    t5 = {
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 3,
        "num_decoder_layers": 3,
        "num_heads": 2,
        "decoder_start_token_id": 1,
    }
    kinds = "bart mbart pegasus blenderbot blenderbot-small marian m2m_100 plbart bigbird_pegasus"
    for kind in kinds.split():
        more = {"attention_type": "original_full"} if kind == "bigbird_pegasus" else {}
        yield one(kind, chains=(6, 9), **bart, **more)
    yield one(
        "fsmt",
        chains=(6, 9),
        single=OVERFLOWS,
        src_vocab_size=VOCABULARY,
        tgt_vocab_size=VOCABULARY,
        langs=["a", "b"],
        **bart,
    )
    yield one(
        "led",
        chains=(6, 9),
        attention_window=4,
        inputs={"input_ids": partial(tokens, 8)},
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
        **bart,
    )
    yield one(
        "pegasus_x", chains=(6, 9), block_size=4, num_global_tokens=2, inputs={"input_ids": partial(tokens, 8)}, **bart
    )
    yield one(
        "nllb-moe",
        chains=(6, 9),
        num_experts=2,
        expert_capacity=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        **bart,
    )
    for kind in ("t5", "mt5", "umt5", "longt5"):
        yield one(kind, chains=(6, 9), **t5)
    yield one(
        "switch_transformers",
        chains=(6, 9),
        num_experts=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        **t5,
    )
    yield one(
        "prophetnet",
        chains=(6, 9),
        drop="num_hidden_layers",
        num_encoder_layers=3,
        num_decoder_layers=3,
        num_encoder_attention_heads=2,
        num_decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        ngram=2,
        num_buckets=8,
        relative_max_distance=16,
        decoder_start_token_id=1,
    )


PATCHES = {"image_size": 16, "patch_size": 4, "num_channels": 3}


def vision() -> Iterator[Case]:
    one = partial(hf, family="vision", names="pixel_values")
    kinds = (
        "vit deit beit data2vec-vision dinov2 dinov2_with_registers dinov3_vit vit_msn ijepa siglip_vision_model "
        "clip_vision_model yolos vit_mae"
    )
    for kind in kinds.split():
        more: dict[str, Any] = {}
        if kind == "yolos":
            more = {"image_size": [16, 16], "num_detection_tokens": 3}
        if kind == "vit_mae":
            more = {"mask_ratio": 0.0}
        yield one(kind, chains=(6,), **(PATCHES | more))
    stages = {
        "depths": [2, 2],
        "num_heads": [2, 2],
        "embed_dim": 8,
        "window_size": 2,
        "image_size": 16,
        "patch_size": 2,
    }
    for kind in ("swin", "swinv2", "donut-swin", "maskformer-swin"):
        yield one(
            kind,
            chains=(4, 4),
            note="two stages of two layers",
            **stages,
            drop="hidden_size num_hidden_layers num_attention_heads num_key_value_heads",
        )
    convs = {"hidden_sizes": [8, 16], "depths": [3, 3], "num_stages": 2, "patch_size": 2, "image_size": 16}
    narrow = "hidden_size num_hidden_layers num_attention_heads"
    for kind in ("convnext", "convnextv2"):
        yield one(kind, chains=(3, 3), note="two stages of three blocks", drop=narrow, **convs)
    resnet = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "hidden_act": "relu"}
    for layer in ("basic", "bottleneck"):
        yield one(
            "resnet",
            chains=(3, 2),
            name=f"resnet, {layer}",
            drop=narrow,
            layer_type=layer,
            note="the first block of the second stage is strided",
            **resnet,
        )
    yield one(
        "regnet",
        chains=(2, 2),
        drop=narrow,
        groups_width=4,
        layer_type="x",
        note="the first block of a stage is strided",
        **resnet,
    )
    yield one(
        "bit",
        chains=(2, 2),
        drop=narrow,
        num_groups=2,
        layer_type="preactivation",
        note="the first block of a stage has a convolution in its shortcut",
        **resnet,
    )
    yield one(
        "segformer",
        chains=(4, 4),
        drop=narrow,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
    )
    yield one(
        "pvt",
        chains=(4, 4),
        drop=narrow,
        num_encoder_blocks=2,
        depths=[2, 2],
        sequence_reduction_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        image_size=16,
    )
    yield one(
        "pvt_v2",
        chains=(4, 4),
        drop=narrow,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        image_size=16,
    )
    yield one(
        "poolformer",
        chains=(4, 4),
        drop=narrow,
        num_encoder_blocks=2,
        depths=[2, 2],
        hidden_sizes=[8, 16],
        patch_sizes=[3, 3],
        strides=[2, 2],
        padding=[1, 1],
        mlp_ratio=2.0,
        use_layer_scale=True,
    )
    yield one(
        "focalnet",
        chains=(4, 4),
        drop=narrow,
        embed_dim=8,
        hidden_sizes=[8, 16],
        depths=[2, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
        image_size=16,
        patch_size=2,
    )
    yield one(
        "mobilenet_v1",
        chains=(),
        drop=narrow,
        image_size=32,
        depth_multiplier=0.25,
        min_depth=4,
        why="convolutions one after the other, nothing is added",
        note="",
        inputs={"pixel_values": partial(pixels, 32)},
    )
    yield one(
        "swiftformer",
        chains=(4, 4),
        drop=narrow,
        depths=[2, 2],
        embed_dims=[8, 16],
        mlp_ratio=2,
        down_patch_size=3,
        down_stride=2,
        down_pad=1,
        downsamples=[True, True],
        note="a stage has a block of one link and a block of three",
    )
    yield one(
        "hiera",
        chains=(4, 3),
        drop=narrow,
        image_size=[16, 16],
        patch_size=[3, 3],
        patch_stride=[2, 2],
        patch_padding=[1, 1],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[1, 2],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, False],
        note="the first attention of the second stage pools its queries and widens the state: no link",
    )
    yield one("dpt", chains=(6,), head="AutoModel", is_hybrid=False, **PATCHES)
    yield one(
        "videomae",
        chains=(6,),
        num_frames=2,
        tubelet_size=2,
        inputs={"pixel_values": partial(torch.randn, BATCH, 2, 3, 16, 16)},
        **PATCHES,
    )
    yield one(
        "vivit",
        chains=(6,),
        num_frames=2,
        tubelet_size=[2, 4, 4],
        inputs={"pixel_values": partial(torch.randn, BATCH, 2, 3, 16, 16)},
        **PATCHES,
    )
    yield one(
        "timesformer",
        chains=(9,),
        num_frames=2,
        inputs={"pixel_values": partial(torch.randn, BATCH, 2, 3, 16, 16)},
        note="a layer has time, space and MLP; the class token takes no part in time",
        **PATCHES,
    )
    detection = {
        "d_model": WIDTH,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_queries": 4,
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
    }
    for kind in ("detr", "conditional_detr"):
        yield one(
            kind,
            chains=(6, 9),
            drop=narrow,
            backbone_of={"kind": "resnet", "layer_type": "basic", **resnet},
            note="a frozen ResNet, an encoder of three layers, a decoder of three",
            inputs={"pixel_values": partial(pixels, 32)},
            **detection,
        )


def audio() -> Iterator[Case]:
    one = partial(hf, family="audio", names="input_values")
    waves = {"input_values": lambda: torch.randn(BATCH, 400)}
    speech = {
        "conv_dim": [8, 8],
        "conv_stride": [5, 4],
        "conv_kernel": [10, 5],
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "inputs": waves,
        "mask_time_prob": 0.0,
    }
    position = "three layers, and the convolution that adds positions to the state"
    for kind in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat"):
        yield one(kind, chains=(7,), note=position, **speech)
    yield one(
        "wav2vec2",
        chains=(7,),
        name="wav2vec2, pre-norm",
        note=position,
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
        **speech,
    )
    yield one(
        "data2vec-audio",
        chains=(7,),
        note=position,
        **{**speech, "num_conv_pos_embeddings": 1, "conv_pos_kernel_size": 3},
    )
    conformer = "a layer has two half MLPs, attention and a convolution"
    yield one("wav2vec2-conformer", chains=(12,), note=conformer, conv_depthwise_kernel_size=3, **speech)
    yield one(
        "wav2vec2-bert",
        chains=(12,),
        note=conformer,
        names="input_features",
        feature_projection_input_dim=8,
        conv_depthwise_kernel_size=3,
        left_max_position_embeddings=4,
        right_max_position_embeddings=2,
        inputs={"input_features": partial(torch.randn, BATCH, LENGTH, 8)},
    )
    yield one(
        "audio-spectrogram-transformer",
        chains=(6,),
        max_length=12,
        num_mel_bins=8,
        patch_size=4,
        frequency_stride=4,
        time_stride=4,
        inputs={"input_values": partial(torch.randn, BATCH, 12, 8)},
    )
    sequence = {
        "d_model": WIDTH,
        "encoder_layers": 3,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "decoder_start_token_id": 1,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "max_target_positions": 16,
    }
    yield one(
        "whisper",
        chains=(6, 9),
        names="input_features decoder_input_ids",
        inputs={"input_features": partial(torch.randn, BATCH, 8, 16)},
        **sequence,
    )
    yield one(
        "speech_to_text",
        chains=(6, 9),
        names="input_features decoder_input_ids",
        input_feat_per_channel=8,
        num_conv_layers=1,
        conv_kernel_sizes=[3],
        conv_channels=16,
        inputs={"input_features": partial(torch.randn, BATCH, 8, 8)},
        **sequence,
    )
    yield one(
        "moonshine",
        chains=(6, 9),
        names="input_values decoder_input_ids",
        encoder_num_hidden_layers=3,
        decoder_num_hidden_layers=3,
        encoder_num_attention_heads=2,
        decoder_num_attention_heads=2,
        encoder_num_key_value_heads=2,
        decoder_num_key_value_heads=2,
        decoder_start_token_id=1,
        inputs={"input_values": partial(torch.randn, BATCH, 1600)},
    )


def several() -> Iterator[Case]:
    one = partial(hf, family="several modalities")
    text = {k: v for k, v in SIZES.items() if k not in ("use_cache",)}
    sight = {
        **{k: SIZES[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")},
        **PATCHES,
    }
    both = "text_embeds image_embeds"
    for kind in ("clip", "siglip", "owlvit", "altclip", "chinese_clip"):
        yield one(
            kind,
            chains=(6, 6),
            names="input_ids pixel_values",
            output=tuple(both.split()),
            drop="*",
            text_config={**text, "project_dim": WIDTH},
            vision_config=sight,
            projection_dim=8,
        )
    yield one(
        "blip",
        chains=(6, 6),
        names="input_ids pixel_values",
        output=tuple(both.split()),
        drop="*",
        text_config=text,
        vision_config=sight,
        projection_dim=8,
        image_text_hidden_size=8,
        note="the text tower is an encoder here: no cross attention",
    )
    yield one("vilt", chains=(6,), names="input_ids pixel_values", max_image_length=-1, **PATCHES)
    yield one("git", chains=(6, 6), names="input_ids pixel_values", vision_config=sight)
    yield one(
        "lxmert",
        chains=(4, 4, 6, 6),
        names="input_ids visual_feats visual_pos",
        visual_feat_dim=8,
        l_layers=2,
        r_layers=2,
        x_layers=2,
        inputs={"visual_feats": partial(torch.randn, BATCH, 4, 8), "visual_pos": partial(torch.rand, BATCH, 4, 4)},
        output=("language_output", "vision_output"),
        note="two layers of each stream, then two in which each attends to the other: three links a layer each",
    )
    yield one(
        "llava",
        chains=(6, 6),
        names="input_ids pixel_values",
        drop="*",
        image_token_id=3,
        vision_config={"model_type": "clip_vision_model", **sight},
        text_config={"model_type": "llama", **text},
        inputs={"input_ids": lambda: torch.cat([torch.full((BATCH, 16), 3), torch.randint(4, 40, (BATCH, 4))], 1)},
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    yield one(
        "decision_transformer",
        chains=(6,),
        names="states actions rewards returns_to_go timesteps",
        state_dim=3,
        act_dim=2,
        max_ep_len=16,
        inputs={
            "states": partial(torch.randn, BATCH, 4, 3),
            "actions": partial(torch.randn, BATCH, 4, 2),
            "rewards": partial(torch.randn, BATCH, 4, 1),
            "returns_to_go": partial(torch.randn, BATCH, 4, 1),
            "timesteps": lambda: torch.arange(4).expand(BATCH, 4).contiguous(),
        },
    )
    yield one(
        "patchtst",
        chains=(6,),
        names="past_values",
        num_input_channels=2,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=WIDTH,
        ffn_dim=32,
        inputs={"past_values": partial(torch.randn, BATCH, 16, 2)},
        drop="hidden_size",
        norm_type="layernorm",
    )
    yield one(
        "patchtsmixer",
        chains=(6,),
        names="past_values",
        num_input_channels=2,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        d_model=8,
        num_layers=3,
        expansion_factor=2,
        inputs={"past_values": partial(torch.randn, BATCH, 16, 2)},
        drop="hidden_size",
        norm_mlp="LayerNorm",
        note="patches and features mixed in each layer",
    )


def _all() -> list[Case]:
    families = (decoders, experts, state_spaces, encoders, encoder_decoders, vision, audio, several)
    return [case for family in families for case in family()]


CASES = _all() if importlib.util.find_spec("transformers") else []
