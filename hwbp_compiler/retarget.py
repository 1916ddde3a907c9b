"""Turn a joint graph traced on a CPU into the one that the same model gives on a GPU.

Autograd cannot be traced on tensors, not even fake ones, of a device that this build of torch does not support. So
:func:`hwbp_compiler.generate_code` traces on the CPU and moves the finished graph. Three things in such a graph depend
on the device: where its tensors are, where its factories create new ones, and which attention kernel was chosen.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .errors import HighwayError
from .torch_private import CustomGraphPass, FakeTensor

aten, prims = torch.ops.aten, torch.ops.prims


class Retarget(CustomGraphPass):
    """A pass that moves a joint graph to ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, graph: Graph) -> None:
        move(graph, self.device)
        if self.device.type != "cpu":
            replace_operators_of_cpus(graph)

    def uuid(self) -> None:
        """None, which keeps the graph out of torch.compile's caches: it is not a graph of this machine."""
        return None


def move(graph: Graph, device: torch.device) -> None:
    """Put all tensors of ``graph`` on ``device``, in place. Constants, which are real tensors, are copied there."""
    for node in list(graph.nodes):
        node.args, node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = _moved(node.meta["val"], device)
        if node.op == "get_attr" and isinstance(node.meta.get("val"), torch.Tensor):
            _copy_constant(graph, node, device)


def replace_operators_of_cpus(graph: Graph) -> None:
    """Replace, in place, operators that PyTorch calls only on a CPU by those it calls on a GPU.

    Raises:
        HighwayError: an operator has no counterpart.
    """
    for node in list(graph.nodes):
        if node.target is aten._scaled_dot_product_flash_attention_for_cpu.default:
            _replace_attention(graph, node)
    for node in graph.nodes:
        if "_for_cpu" in str(node.target) or "mkldnn" in str(node.target):
            raise HighwayError(f"generate_code: {node.target} is an operator of CPUs with no counterpart on a GPU")


def _moved(value: Any, device: torch.device) -> Any:
    """The fake tensors in ``value``, moved to ``device``."""

    def move(fake: FakeTensor) -> torch.Tensor:
        with fake.fake_mode:
            return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=device)

    return pytree.tree_map_only(FakeTensor, move, value)


def _copy_constant(graph: Graph, node: Node, device: torch.device) -> None:
    """A constant is a real tensor and stays where it is. Its users get a copy instead."""
    users = [user for user in node.users if user.target is not prims.device_put.default]
    if not users:
        return
    with graph.inserting_after(node):
        copy = graph.call_function(prims.device_put.default, (node, device))
    copy.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, copy)


# -- attention --------------------------------------------------------------------------------------------------


def _replace_attention(graph: Graph, forward: Node) -> None:
    """Use the fused attention that ``F.scaled_dot_product_attention`` chooses on a GPU, and its backward."""
    arguments: Any = forward.args
    query, key, value, *rest = arguments
    dropout, causal = rest + [0.0, False][len(rest) :]
    mask, scale = forward.kwargs.get("attn_mask"), forward.kwargs.get("scale")
    backward = [
        user
        for node in forward.users
        for user in node.users
        if user.target is aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    ]
    like = query.meta["val"]
    head = like.shape[-1]
    flash = mask is None and like.dtype in (torch.float16, torch.bfloat16) and head % 8 == 0 and head <= 256
    if not flash and head * like.element_size() % 16:
        raise HighwayError(
            f"generate_code: attention over heads of size {head} in {like.dtype} is not fused on a GPU; "
            "let the model call it under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    fused: Any
    options: tuple
    if flash:
        fused, options = aten._scaled_dot_product_flash_attention.default, (dropout, causal)
    else:
        fused, options = aten._scaled_dot_product_efficient_attention.default, (mask, bool(backward), dropout, causal)
    # The outputs used here: the result, its logsumexp, and the state of the random numbers.
    with graph.inserting_before(forward):
        new = _call(graph, fused, (query, key, value, *options), scale)
        parts = [_call(graph, operator.getitem, (new, i)) for i in ((0, 1, 6, 7) if flash else (0, 1, 2, 3))]
    for node in list(forward.users):  # output and logsumexp come first on both devices
        node.replace_all_uses_with(parts[node.args[1]])
        graph.erase_node(node)
    graph.erase_node(forward)
    for node in dict.fromkeys(backward):
        inputs, out, logsumexp = node.args[:4], parts[0], parts[1]
        with graph.inserting_before(node):
            if flash:
                target = aten._scaled_dot_product_flash_attention_backward.default
                # Cumulative lengths, which dense batches do not have, then the longest of each.
                lengths = (None, None, like.shape[-2], key.meta["val"].shape[-2])
                rest = [out, logsumexp, *lengths, dropout, causal, *parts[2:]]
            else:
                target = aten._scaled_dot_product_efficient_attention_backward.default
                wanted = [True, True, True, False]
                rest = [mask, out, logsumexp, *parts[2:], dropout, wanted, causal]
            node.replace_all_uses_with(_call(graph, target, (*inputs, *rest), scale))
        graph.erase_node(node)
    for part in parts:
        if not part.users:
            graph.erase_node(part)


def _call(graph: Graph, target: Any, args: tuple, scale: Any = None) -> Node:
    """Add a node and compute its fake value."""
    node = graph.call_function(target, args, {} if scale is None else {"scale": scale})
    values, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    fakes = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, FakeTensor)]
    with fakes[0].fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node
