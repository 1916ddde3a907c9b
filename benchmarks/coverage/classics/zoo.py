"""Models of the test zoo (``tests/zoo``), where their links are counted."""

from __future__ import annotations

import importlib
from functools import partial

from ..case import Case, Made

NAMES = {
    "mlp_module_list": "residual MLP, pre-norm",
    "mlp_layer_scale": "LayerScale",
    "mlp_tied": "one block again and again",
    "mlp_scaled_trunk": "state times a constant",
    "mlp_learnt_trunk": "state times a learnt vector",
    "mlp_gated_self": "state times a gate of itself",
    "highway_network": "highway network",
    "mlp_top_k_experts": "mixture of experts, top-k",
    "mlp_stages": "three stages of other widths",
    "mlp_two_towers": "two towers",
    "mlp_trunk_in_place": "state added to in place",
    "resnet_preact_eval": "ResNet, pre-activation",
    "resnet_postact_eval": "ResNet, post-activation",
    "resnet_norm_on_trunk_eval": "ResNet, norm on the trunk",
    "resnet_squeeze_excite": "SE-ResNet",
    "encoder_post_rms_norm": "post-norm transformer, RMSNorm",
    "encoder_parallel": "parallel attention and MLP",
    "encoder_sandwich": "sandwich norms",
    "torch_encoder_decoder": "nn.Transformer's encoder and decoder layers",
    "encoder_decoder": "encoder and decoder",
    "gru_cell_every_step": "nn.GRUCell in a loop",
    "lstm_cell_last_step": "nn.LSTMCell in a loop",
    "cat_gru_every_step": "GRU, reset before the matrix",
    "min_gru_every_step": "minGRU",
    "diagonal_every_step": "diagonal recurrence",
    "masked_gru": "GRU with a mask",
    "gru_3_layers_interleaved_every_step": "three GRU layers in one loop",
    "lstm_2_layers_interleaved": "two LSTM layers in one loop",
    "gru_bidirectional": "GRU loops in both directions",
    "gru_encoder_decoder": "GRU encoder and decoder",
    "activity_penalties": "activity penalties",
    "router_logits": "router logits on the side",
    "auxiliary_heads": "auxiliary heads",
    "checkpointed": "checkpointed blocks",
    "partly_frozen": "partly frozen",
    "mlp_graph_break": "a graph break in the middle",
}
WHY = {
    "nothing_tanh_rnn": ("nn.RNNCell in a loop", "the state goes through a matrix: K = 0"),
    "nothing_tanh_mlp": ("MLP, tanh", "nothing is added: K = 0"),
}


def _make(name: str) -> Made:
    cases = importlib.import_module("tests.zoo").CASES
    (found,) = (case for case in cases if case.name == name)
    model, args, _ = found.build()
    return model, args


def _cases() -> list[Case]:
    try:
        counted = {case.name: case for case in importlib.import_module("tests.zoo").CASES}
    except ImportError:  # an installed package without its tests
        return []
    cases = []
    for name, (title, why) in {**{name: (title, "") for name, title in NAMES.items()}, **WHY}.items():
        lengths = tuple(chain.length for chain in counted[name].chains)
        cases.append(
            Case(title, "by hand, from the test zoo", partial(_make, name), lengths, why, settings={"zoo": name})
        )
    return cases


CASES = _cases()
