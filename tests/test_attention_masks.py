"""Attention masks passed by keyword, one made in every layer or one for all layers. The layers still form one group,
and each gets its own mask.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph

from hwbp_compiler import explain
from hwbp_compiler.graph.match import same_value
from hwbp_compiler.testing.capture import capture, options
from hwbp_compiler.testing.compare import assert_gradients_close
from hwbp_compiler.testing.losses import probe_loss

BATCH, HEADS, LENGTH, WIDTH, LAYERS = 2, 2, 3, 4, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """``masks``: one per layer, or one for all."""

    def __init__(self, masks) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask{i}", mask)
        self.masks = len(masks)

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x, getattr(self, f"mask{i % self.masks}"))
        return x


def additive(*shape):
    return torch.randn(shape, dtype=torch.float64)


def causal():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def padding():
    return torch.tensor([[True, True, False], [True, True, True]]).view(BATCH, 1, 1, LENGTH)


MASKS = {
    "one for all": lambda: [additive(LENGTH, LENGTH)],
    "one for all, per sentence": lambda: [additive(BATCH, 1, LENGTH, LENGTH)],
    "one for all, yes and no": lambda: [causal()],
    "padding": lambda: [padding()],
    "one per layer": lambda: [additive(LENGTH, LENGTH) for _ in range(LAYERS)],
    "one per layer and head": lambda: [additive(1, HEADS, LENGTH, LENGTH) for _ in range(LAYERS)],
    "one per layer and sentence": lambda: [additive(BATCH, HEADS, LENGTH, LENGTH) for _ in range(LAYERS)],
    "one per layer, padding": lambda: [padding().roll(i, -1) for i in range(LAYERS)],
}


def made(masks):
    torch.manual_seed(0)
    return Encoder(masks()).double(), (torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True),)


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
def test_layers_with_masks_are_one_group_and_exact_at_the_last_iteration(masks):
    model, args = made(masks)
    (chain,) = explain(model, *args, options={"iterations": 1, "rewrite": "always"}).chains
    (group,) = chain.groups
    assert chain.decision == "rewritten" and group.links == LAYERS
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in group.operators
    captured = capture(model, args, probe_loss)
    _, exact, _ = captured.gradients(None)
    # After L - 1 iterations, nothing is missing from the states from which the gradients of parameters are computed.
    _, found, (record,) = captured.gradients(options(iterations=LAYERS - 1))
    assert record.decision == "rewritten"
    exact.pop(0), found.pop(0)
    assert_gradients_close(found, exact, 1e-9)


def test_random_numbers_are_no_function_of_their_arguments():
    graph = Graph()
    a, b = (graph.call_function(torch.ops.aten.rand.default, ([2],)) for _ in range(2))
    c, d = (graph.call_function(torch.ops.aten.ones.default, ([2],)) for _ in range(2))
    assert not same_value(a, b) and same_value(c, d)
