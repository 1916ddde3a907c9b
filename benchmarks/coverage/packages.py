"""Models from packages that install without a torch of their own: ``pip install --no-deps -r
benchmarks/coverage/packages.txt``.

Packages that are not installed are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .case import Case, Made

Inputs = Callable[[], tuple[Any, ...]]


def tokens(length: int = 8, most: int = 20) -> tuple[Tensor]:
    return (torch.randint(1, most, (2, length)),)


def drawn(*shape: int) -> tuple[Tensor]:
    """A random input that requires a gradient, so that a state among the inputs is like any other state."""
    return (torch.randn(shape, requires_grad=True),)


class First(nn.Module):
    """The first tensor of what a model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any) -> Any:
        found = self.model(*args)
        while not isinstance(found, Tensor):
            found = found[0]
        return found


def _make(module: str, build: Callable[[Any], nn.Module], inputs: Inputs) -> Made:
    model, args = build(load(module)), inputs()
    for parameter in model.parameters():
        parameter.requires_grad_()
    return First(model), args


def load(module: str) -> Any:
    """vit-pytorch's models stand in files of their own; only its package file asks for torchvision."""
    package = module.partition(".")[0]
    if package == "vit_pytorch" and package not in sys.modules:
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations)  # type: ignore[attr-defined]
    return importlib.import_module(module)


def one(
    name: str,
    module: str,
    chains: tuple[int, ...],
    build: Callable[[Any], nn.Module],
    inputs: Inputs,
    why: str = "",
    package: str = "",
    single: str = "",
) -> Case:
    """``build(module)`` is the model. ``package``: its name on PyPI where that is not the module's."""
    package = package or module.partition(".")[0].replace("_", "-")
    make = partial(_make, module, build, inputs)
    make.made_by = build  # type: ignore[attr-defined]
    return Case(name, f"packages, {package}", make, chains, why, package, {"module": module}, single)


SIZE = {"dim": 16, "depth": 3, "heads": 2, "dim_head": 8}
IMAGE = {"image_size": 16, "patch_size": 4, "num_classes": 5}
TWO = (6,)
MIXED = "the streams are mixed by a small matrix: K is a matrix of diagonals"
FIRST = "values of the first attention go into all later ones, so that it is no link of the chain"


def x_transformers() -> Iterator[Case]:
    def body(attention: str = "Decoder", **options: Any) -> Callable[[Any], nn.Module]:
        def build(x: Any) -> nn.Module:
            layers = getattr(x, attention)(dim=16, depth=3, heads=2, attn_dim_head=8, **options)
            return x.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)

        return build

    plans: dict[str, tuple[tuple[int, ...], dict[str, Any], str]] = {
        "decoder": (TWO, {}, ""),
        "encoder": (TWO, {"attention": "Encoder"}, ""),
        "post-norm": (TWO, {"pre_norm": False}, ""),
        "rotary, RMSNorm, GLU": (TWO, {"rotary_pos_emb": True, "use_rmsnorm": True, "ff_glu": True}, ""),
        "gated residuals": (TWO, {"gate_residual": True}, "GRU gates in place of additions"),
        "sandwich norms": (TWO, {"sandwich_norm": True}, ""),
        "ALiBi": (TWO, {"alibi_pos_bias": True}, ""),
        "macaron": ((9,), {"macaron": True}, "an MLP, attention and another MLP a layer"),
        "scaled residuals": (TWO, {"scale_residual": True}, ""),
        "shifted tokens": (TWO, {"shift_tokens": 1}, ""),
        "talking heads": (TWO, {"attn_pre_talking_heads": True, "attn_post_talking_heads": True}, ""),
        "qk norm": (TWO, {"attn_qk_norm": True}, ""),
        "value residual": ((5,), {"add_value_residual": True}, FIRST),
        "hyper-connections": (TWO, {"num_residual_streams": 4}, MIXED),
    }
    for name, (chains, options, why) in plans.items():
        yield one(f"x-transformers, {name}", "x_transformers", chains, body(**options), tokens, why)


def vit_pytorch() -> Iterator[Case]:
    image = partial(drawn, 2, 3, 16, 16)
    plans: dict[str, tuple[str, str, tuple[int, ...], dict[str, Any], str]] = {
        "ViT": ("vit", "ViT", TWO, {"mlp_dim": 32}, ""),
        "SimpleViT": ("simple_vit", "SimpleViT", TWO, {"mlp_dim": 32}, ""),
        "CaiT": ("cait", "CaiT", (6, 4), {"mlp_dim": 32, "cls_depth": 2}, "then the class token alone, two layers"),
        "DeepViT": ("deepvit", "DeepViT", TWO, {"mlp_dim": 32}, ""),
        "parallel ViT": ("parallel_vit", "ViT", TWO, {"mlp_dim": 32}, ""),
        "small-dataset ViT": ("vit_for_small_dataset", "ViT", TWO, {"mlp_dim": 32}, ""),
        "patch merger": (
            "vit_with_patch_merger",
            "ViT",
            (4, 2),
            {"mlp_dim": 32, "patch_merge_layer": 2},
            "tokens are merged after the second layer",
        ),
        "learnable memory": ("learnable_memory_vit", "ViT", TWO, {"mlp_dim": 32}, ""),
        "value residual": (
            "simple_vit_with_value_residual",
            "SimpleViT",
            (5,),
            {"mlp_dim": 32},
            FIRST,
        ),
        "register tokens": ("simple_vit_with_register_tokens", "SimpleViT", TWO, {"mlp_dim": 32}, ""),
        "FFT": ("simple_vit_with_fft", "SimpleViT", TWO, {"mlp_dim": 32, "freq_patch_size": 4}, ""),
        "hyper-connections": (
            "simple_vit_with_hyper_connections",
            "SimpleViT",
            TWO,
            {"mlp_dim": 32, "num_residual_streams": 4},
            MIXED,
        ),
        "normalized ViT": (
            "normalized_vit",
            "nViT",
            TWO,
            {"mlp_dim": 32},
            "the state is interpolated and brought back to length one",
        ),
        "Keel post-norm": ("vit_with_keel_post_ln", "ViT", TWO, {"mlp_dim": 32}, ""),
    }
    for name, (file, cls, chains, options, why) in plans.items():

        def build(v: Any, cls: str = cls, options: dict[str, Any] = options) -> nn.Module:
            return getattr(v, cls)(**(IMAGE | SIZE | options))

        yield one(f"vit-pytorch, {name}", f"vit_pytorch.{file}", chains, build, image, why)


def lucidrains() -> Iterator[Case]:
    """Small packages of one author, and the like."""
    embedded = partial(drawn, 2, 8, 16)
    yield one(
        "Perceiver",
        "perceiver_pytorch",
        (12,),
        lambda p: p.Perceiver(
            num_freq_bands=2,
            depth=3,
            max_freq=4.0,
            num_latents=4,
            latent_dim=16,
            latent_heads=2,
            cross_dim_head=8,
            latent_dim_head=8,
            num_classes=5,
        ),
        partial(drawn, 2, 6, 6, 3),
        "cross attention, attention, two MLPs, thrice",
    )
    yield one(
        "Perceiver IO",
        "perceiver_pytorch",
        (8,),
        lambda p: p.PerceiverIO(
            depth=3,
            dim=16,
            queries_dim=16,
            num_latents=4,
            latent_dim=16,
            latent_heads=2,
            cross_dim_head=8,
            latent_dim_head=8,
        ),
        embedded,
        "cross attention and an MLP, then three layers",
    )
    yield one(
        "Performer",
        "performer_pytorch",
        TWO,
        lambda p: p.Performer(dim=16, depth=3, heads=2, dim_head=8, nb_features=8),
        embedded,
    )
    yield one(
        "Linear attention transformer",
        "linear_attention_transformer",
        TWO,
        lambda p: p.LinearAttentionTransformerLM(num_tokens=20, dim=16, heads=2, depth=3, max_seq_len=8),
        tokens,
    )
    yield one(
        "H-Transformer-1D",
        "h_transformer_1d",
        TWO,
        lambda p: p.HTransformer1D(num_tokens=20, dim=16, depth=3, max_seq_len=8, heads=2, dim_head=8, block_size=2),
        tokens,
    )
    yield one(
        "PaLM",
        "palm_pytorch",
        (3,),
        lambda p: p.PaLM(dim=16, num_tokens=20, depth=3, dim_head=8, heads=2),
        tokens,
        "attention and MLP side by side",
    )
    yield one(
        "Mega",
        "mega_pytorch",
        TWO,
        lambda p: p.Mega(dim=16, num_tokens=20, depth=3, ema_heads=4, attn_dim_qk=8, attn_dim_value=16),
        tokens,
    )
    yield one(
        "minGRU language model",
        "minGRU_pytorch.minLM",
        TWO,
        lambda p: p.minLM(num_tokens=20, dim=16, depth=3),
        tokens,
        package="minGRU-pytorch",
    )
    yield one(
        "MLP-Mixer (package)",
        "mlp_mixer_pytorch",
        TWO,
        lambda p: p.MLPMixer(image_size=16, channels=3, patch_size=4, dim=16, depth=3, num_classes=5),
        partial(drawn, 2, 3, 16, 16),
    )
    yield one(
        "gMLP (package)", "g_mlp_pytorch", (3,), lambda p: p.gMLP(num_tokens=20, dim=16, depth=3, seq_len=8), tokens
    )
    yield one(
        "ResMLP",
        "res_mlp_pytorch",
        TWO,
        lambda p: p.ResMLP(image_size=16, patch_size=4, dim=16, depth=3, num_classes=5),
        partial(drawn, 2, 3, 16, 16),
    )
    yield one(
        "Conformer (package)",
        "conformer",
        (12,),
        lambda p: p.Conformer(16, depth=3, heads=2, dim_head=8, conv_kernel_size=3),
        embedded,
        "two half MLPs, attention and a convolution a layer, then a norm",
    )
    yield one(
        "EGNN (package)",
        "egnn_pytorch",
        (3,),
        lambda p: p.EGNN_Network(num_tokens=20, dim=16, depth=3),
        lambda: (*tokens(5), torch.randn(2, 5, 3)),
        "features and positions feed each other: one chain of pairs",
    )
    yield one(
        "graph transformer (package)",
        "graph_transformer_pytorch",
        TWO,
        lambda p: p.GraphTransformer(dim=16, depth=3, edge_dim=8, with_feedforwards=True, gated_residual=True),
        lambda: (torch.randn(2, 5, 16), torch.randn(2, 5, 5, 8)),
        "gated residuals",
    )
    yield one(
        "Nystromformer (package)",
        "nystrom_attention",
        TWO,
        lambda p: p.Nystromformer(dim=16, dim_head=8, heads=2, depth=3, num_landmarks=4),
        embedded,
    )
    yield one(
        "iTransformer",
        "iTransformer",
        (5,),
        lambda p: p.iTransformer(
            num_variates=4,
            lookback_len=8,
            depth=3,
            dim=16,
            pred_length=2,
            dim_head=8,
            heads=2,
            num_residual_streams=1,
            flash_attn=False,
        ),
        partial(drawn, 2, 8, 4),
        FIRST,
        package="iTransformer",
    )
    yield one(
        "FT-transformer",
        "rtdl_revisiting_models",
        TWO,
        lambda p: p.FTTransformer(
            n_cont_features=4,
            cat_cardinalities=[],
            d_out=2,
            n_blocks=3,
            d_block=16,
            attention_n_heads=2,
            attention_dropout=0.0,
            ffn_d_hidden=None,
            ffn_d_hidden_multiplier=1.0,
            ffn_dropout=0.0,
            residual_dropout=0.0,
        ),
        lambda: (torch.randn(3, 4), None),
        package="rtdl-revisiting-models",
    )
    yield one(
        "tabular ResNet",
        "rtdl_revisiting_models",
        (4,),
        lambda p: p.ResNet(
            d_in=6, d_out=2, n_blocks=4, d_block=16, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.0, dropout2=0.0
        ),
        partial(drawn, 3, 6),
        package="rtdl-revisiting-models",
    )
    yield one(
        "TabTransformer",
        "tab_transformer_pytorch",
        TWO,
        lambda p: p.TabTransformer(
            categories=(4, 5),
            num_continuous=3,
            dim=16,
            dim_out=1,
            depth=3,
            heads=2,
            dim_head=8,
            mlp_act=nn.ReLU(),
            num_residual_streams=1,
        ),
        lambda: (torch.randint(0, 4, (3, 2)), torch.randn(3, 3)),
    )
    yield one(
        "TCN (package)",
        "pytorch_tcn",
        (3,),
        lambda p: p.TCN(num_inputs=8, num_channels=[8, 8, 8], kernel_size=3, causal=True),
        partial(drawn, 2, 8, 12),
    )
    yield one(
        "LTC (package)",
        "ncps.torch",
        (12,),
        lambda p: p.LTC(4, 6, batch_first=True, ode_unfolds=2),
        partial(drawn, 2, 6, 4),
        "two unfoldings a step, six steps",
        package="ncps",
        single="its first state is always float32",
    )
    yield one(
        "CfC (package)",
        "ncps.torch",
        (),
        lambda p: p.CfC(4, 6, batch_first=True),
        partial(drawn, 2, 6, 4),
        "gates choose between two functions of the state: K = 0",
        package="ncps",
    )
    yield one(
        "Mamba (package)",
        "mambapy.mamba",
        (3,),
        lambda p: p.Mamba(p.MambaConfig(d_model=16, n_layers=3, d_state=4, d_conv=3, pscan=False)),
        embedded,
        "a loop over time inside every block",
        package="mambapy",
    )
    yield one(
        "Mamba, parallel scan (package)",
        "mambapy.mamba",
        (3,),
        lambda p: p.Mamba(p.MambaConfig(d_model=16, n_layers=3, d_state=4, d_conv=3, pscan=True)),
        embedded,
        "its scan is an autograd.Function",
        package="mambapy",
    )
    yield one(
        "LRU (package)",
        "LRU_pytorch",
        (6,),
        lambda p: p.LRU(4, 3, 6),
        partial(drawn, 6, 4),
        package="LRU-pytorch",
        single="its state is complex64 whatever it is",
    )
    yield one(
        "EfficientNet (package)",
        "efficientnet_pytorch",
        (2, 2, 3),
        lambda p: p.EfficientNet.from_name(
            "efficientnet-b0", {"width_coefficient": 0.25, "num_classes": 5, "image_size": 32}
        ),
        partial(drawn, 2, 3, 32, 32),
        "stages of three, three and four blocks, the first of each strided or widening",
    )
    yield one(
        "ResNet (MONAI)",
        "monai.networks.nets.resnet",
        (3, 2),
        lambda p: p.ResNet(
            block="basic",
            layers=[3, 3, 1, 1],
            block_inplanes=[8, 16, 16, 16],
            spatial_dims=2,
            n_input_channels=3,
            num_classes=5,
            conv1_t_size=3,
        ),
        partial(drawn, 2, 3, 32, 32),
        package="monai",
    )
    yield one(
        "SegResNet (MONAI)",
        "monai.networks.nets.segresnet",
        (5,),
        lambda p: p.SegResNet(
            spatial_dims=2, init_filters=8, in_channels=3, out_channels=2, blocks_down=(2, 2), blocks_up=(2,)
        ),
        partial(drawn, 2, 3, 16, 16),
        "two blocks, the lower level as a block, two blocks",
        package="monai",
    )
    yield one(
        "UNETR (MONAI)",
        "monai.networks.nets.unetr",
        (24,),
        lambda p: p.UNETR(
            in_channels=1,
            out_channels=2,
            img_size=16,
            feature_size=4,
            hidden_size=12,
            mlp_dim=16,
            num_heads=2,
            spatial_dims=2,
        ),
        partial(drawn, 1, 1, 16, 16),
        "twelve layers; some states also go to the decoder",
        package="monai",
    )
    yield one(
        "Restormer (MONAI)",
        "monai.networks.nets.restormer",
        (4, 4, 8),
        lambda p: p.Restormer(
            spatial_dims=2,
            in_channels=3,
            out_channels=3,
            dim=8,
            num_blocks=(2, 2),
            heads=(1, 2),
            num_refinement_blocks=2,
        ),
        partial(drawn, 1, 3, 16, 16),
        "two layers a level; refinement follows on the way up without a break",
        package="monai",
    )
    yield one(
        "HighResNet (MONAI)",
        "monai.networks.nets.highresnet",
        (3,),
        lambda p: p.HighResNet(
            spatial_dims=2,
            in_channels=1,
            out_channels=2,
            layer_params=(
                {"name": "conv_0", "n_features": 8, "kernel_size": 3},
                {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 3},
                {"name": "conv_1", "n_features": 8, "kernel_size": 1},
                {"name": "conv_2", "n_features": 2, "kernel_size": 1},
            ),
        ),
        partial(drawn, 1, 1, 8, 8),
        package="monai",
    )


EDGES = torch.tensor([[0, 1, 2, 3, 4, 0, 2, 1], [1, 2, 3, 4, 0, 2, 4, 3]])


class Layered(nn.Module):
    """Graph layers one after the other, as torch_geometric's examples write them."""

    def __init__(self, layers: list[nn.Module], kind: str) -> None:
        super().__init__()
        self.layers, self.kind = nn.ModuleList(layers), kind

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        first = x
        for layer in self.layers:
            if self.kind == "residual":
                x = x + torch.relu(layer(x, edges))
            elif self.kind == "first state":
                x = torch.relu(layer(x, first, edges))
            else:
                x = layer(x, edges)
        return x


def graphs() -> Iterator[Case]:
    def nodes() -> tuple[Any, ...]:
        return *drawn(5, 16), EDGES

    def layered(make: Callable[[Any], nn.Module], kind: str) -> Callable[[Any], nn.Module]:
        return lambda g: Layered([make(g) for _ in range(4)], kind)

    name = "torch-geometric"
    for conv in ("GCNConv", "SAGEConv", "GATv2Conv", "TransformerConv"):

        def make(g: Any, conv: str = conv) -> nn.Module:
            return getattr(g, conv)(16, 16)

        yield one(f"residual {conv}", "torch_geometric.nn", (4,), layered(make, "residual"), nodes, package=name)
    yield one(
        "GCN2Conv",
        "torch_geometric.nn",
        (),
        layered(lambda g: g.GCN2Conv(16, alpha=0.1, theta=0.5, layer=1), "first state"),
        nodes,
        package=name,
        why="the state goes through the adjacency matrix: K = 0",
    )
    yield one(
        "ResGatedGraphConv, residual",
        "torch_geometric.nn",
        (4,),
        layered(lambda g: g.ResGatedGraphConv(16, 16), "residual"),
        nodes,
        package=name,
    )
    yield one(
        "DeepGCN",
        "torch_geometric.nn",
        (4,),
        layered(
            lambda g: g.DeepGCNLayer(g.GENConv(16, 16, num_layers=1), nn.LayerNorm(16), nn.ReLU(), block="res+"),
            "plain",
        ),
        nodes,
        package=name,
    )
    yield one(
        "GPS",
        "torch_geometric.nn",
        (8,),
        layered(lambda g: g.GPSConv(16, g.GCNConv(16, 16), heads=2, norm="layer_norm"), "plain"),
        nodes,
        package=name,
        why="message passing and attention side by side, their sum, then an MLP: one link for the sum, one for the MLP",
    )
    yield one(
        "GatedGraphConv",
        "torch_geometric.nn",
        (5,),
        lambda g: g.GatedGraphConv(16, 5),
        nodes,
        package=name,
        why="a GRU cell five times",
    )
    yield one(
        "AntiSymmetricConv",
        "torch_geometric.nn",
        (4,),
        lambda g: g.AntiSymmetricConv(16, num_iters=4),
        nodes,
        package=name,
    )


def _all() -> list[Case]:
    found = [*x_transformers(), *vit_pytorch(), *lucidrains(), *graphs()]
    return [case for case in found if importlib.util.find_spec(case.settings["module"].partition(".")[0])]


CASES = _all()
