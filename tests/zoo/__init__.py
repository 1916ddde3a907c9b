"""Models as people write them, each also written for the oracle, with the chains that must be found in it."""

from __future__ import annotations

from . import encoder_decoder, huggingface, nothing, recurrent, residual, resnet, side_losses, transformer
from .case import Case, ExpectedChain

CASES: list[Case] = [
    *residual.CASES,
    *resnet.CASES,
    *transformer.CASES,
    *recurrent.CASES,
    *encoder_decoder.CASES,
    *side_losses.CASES,
    *huggingface.CASES,
    *nothing.CASES,
]

# One of each kind, for everyday runs; the others are among the slow tests.
EVERYDAY = {
    "mlp_module_list",
    "mlp_raw_input_without_grad",
    "mlp_learnt_trunk",
    "mlp_all_states",
    "highway_network",
    "resnet_preact_train",
    "resnet_postact_eval",
    "resnet_norm_on_trunk_train",
    "resnet_squeeze_excite",
    "mlp_top_k_experts",
    "decoder_causal",
    "encoder_post_norm",
    "encoder_parallel",
    "torch_encoder_post_norm_dropout",
    "gru_cell_every_step",
    "lstm_cell_start_given",
    "cat_gru_last_step",
    "min_gru_every_step",
    "gru_2_layers_interleaved_every_step",
    "gru_bidirectional",
    "encoder_decoder",
    "mlp_stages",
    "activity_penalties",
    "gru_gates_returned",
    "hf_gpt2_sdpa",
    "hf_bert_eager",
    "nothing_tanh_rnn",
    "nothing_densenet",
    "unet",
}

__all__ = ["CASES", "EVERYDAY", "Case", "ExpectedChain"]
