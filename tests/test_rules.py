"""Operators that autograd calls on an incoming gradient: each has a rule, is decomposed before the passes see it, or
stands in a list that may only get shorter. The list may name operators that no graph contains in practice.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchgen
import yaml
from torch import nn

from hwbp_compiler.graph import rules
from hwbp_compiler.testing import assert_gradients_close, probe_loss
from hwbp_compiler.testing.assertions import AtFullLength
from hwbp_compiler.testing.capture import capture, options
from hwbp_compiler.torch_private import select_decomp_table

FORMULAS = Path(torchgen.__file__).parent / "packaged" / "autograd" / "derivatives.yaml"
LISTED = Path(__file__).with_name("without_rule.txt")
GRAD = r"grads?(?:_output|_out)?(?:\[\d\])?"
CALLED = re.compile(rf"\b{GRAD}\.(\w+)\(|\b(\w+)\({GRAD}\b")


def called_on_gradients() -> set[str]:
    """Names in the formulas of ``derivatives.yaml``. Helpers that are written in C++ are not operators: left out."""
    found: set[str] = set()
    for entry in yaml.safe_load(FORMULAS.read_text()):
        if is_replaced(entry["name"]):
            continue
        formulas = {**entry, **entry.get("dispatch", {}).get("Default", {})}
        for argument, formula in formulas.items():
            if argument not in ("name", "dispatch", "result") and isinstance(formula, str):
                found |= {name.removesuffix("_symint") for pair in CALLED.findall(formula) for name in pair if name}
    return {name for name in found if hasattr(torch.ops.aten, name)}


def is_replaced(schema: str) -> bool:
    """Whether torch replaces this operator of the forward pass by others before autograd sees it."""
    packet, _, overload = schema.partition("(")[0].partition(".")
    target = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    return target is not None and any(key in target.py_kernels for key in keys)


def carries_a_gradient(overload: torch._ops.OpOverload) -> bool:
    """Whether it returns tensors, and is an operator of ATen's own: TorchScript has some that no other part knows."""
    returns = any(
        isinstance(returned.type, (torch.TensorType, torch.ListType)) for returned in overload._schema.returns
    )
    return returns and torch._C._dispatch_has_kernel(overload.name())


def is_taken_apart(overload: torch._ops.OpOverload, table: dict) -> bool:
    return overload in table or overload._can_decompose()


def without_rule() -> set[str]:
    table = select_decomp_table()
    found = set()
    for name in called_on_gradients():
        packet = getattr(torch.ops.aten, name)
        overloads = [getattr(packet, o) for o in packet.overloads() if not o.endswith("out")]
        overloads = [o for o in overloads if carries_a_gradient(o)]
        known = (is_taken_apart(o, table) or o in rules._RULES for o in overloads)
        if overloads and not any(known):
            found.add(name)
    return found


@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="the list is that of torch 2.13")
def test_the_list_of_operators_without_a_rule_only_gets_shorter():
    assert sorted(without_rule()) == LISTED.read_text().split()


def test_the_formulas_are_read():
    assert {"sum", "expand", "unfold", "tanh_backward", "avg_pool3d_backward"} - called_on_gradients() == set()


def padded(y):
    """Padded at both ends of every dimension of the image, and cropped again: at one end less."""
    larger = F.pad(y, (1, 1) * (y.dim() - 2), mode="replicate")
    return larger[(..., *[slice(-2)] * (y.dim() - 2))]


BRANCHES = {
    **{f"replication_pad{d}d_backward": (d, padded) for d in (1, 2, 3)},
    "avg_pool3d_backward": (3, lambda y: F.interpolate(F.avg_pool3d(y, 2), scale_factor=2)),
    "max_pool3d_with_indices_backward": (3, lambda y: F.interpolate(F.max_pool3d(y, 2), scale_factor=2)),
    "adaptive_max_pool2d_backward": (2, lambda y: F.interpolate(F.adaptive_max_pool2d(y, 2), size=y.shape[-2:])),
}


class Images(nn.Module):
    def __init__(self, dimensions, branch):
        super().__init__()
        convolution = getattr(nn, f"Conv{dimensions}d")
        self.layers = nn.ModuleList(convolution(2, 2, 3, padding=1) for _ in range(4))
        self.branch = branch

    def forward(self, x):
        for layer in self.layers:
            x = x + 0.3 * self.branch(layer(x).tanh())
        return x


@pytest.mark.parametrize("operator", BRANCHES)
def test_a_block_with_this_operator_in_its_backward_pass_is_a_link(operator):
    torch.manual_seed(0)
    dimensions, branch = BRANCHES[operator]
    model = Images(dimensions, branch).double()
    x = torch.randn(2, 2, *[4] * dimensions, dtype=torch.float64, requires_grad=True)
    captured = capture(model, (x,), probe_loss)
    leaves = {**dict(model.named_parameters()), 0: x}
    exact = dict(zip(leaves, torch.autograd.grad(probe_loss(model(x)), list(leaves.values())), strict=True))
    _, found, records = captured.gradients(
        AtFullLength(iterations=4, rewrite="always", damping=0.0, strict=True, min_length=2)
    )
    assert any(operator in str(node.target) for joint in captured.joints for node in joint.module.graph.nodes)
    assert [(r.length, r.decision) for r in records] == [(4, "rewritten")]
    assert_gradients_close(found, exact, 1e-10, 1e-13)
    # The blocks count: with one iteration, paths through several of them are missing.
    _, fewer, _ = captured.gradients(options(iterations=1))
    with pytest.raises(AssertionError):
        assert_gradients_close(fewer, exact, 1e-3)
