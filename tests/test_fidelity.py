"""The rewritten gradients are w^k's, in every model of the zoo: the compiler is compared with the oracle, in float64.

Most tests run the rewritten joint graph directly (``testing.capture``); a few go through Inductor.
"""

from __future__ import annotations

import operator
from itertools import product

import pytest
import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils import _pytree as pytree
from zoo import CASES, EVERYDAY

from hwbp_compiler.testing.capture import capture, eager_highway, leaves_of, options
from hwbp_compiler.testing.compare import assert_gradients_close, assert_outputs_close
from hwbp_compiler.testing.reference import reference_gradients

BY_NAME = {case.name: case for case in CASES}
SEED = 7
DAMPINGS = (0.0, 0.2, 0.8, 1.0)
# Every k and every gamma at least once, and both ends with each kind of damping.
SOME = ((0, 0.0), (1, 0.2), (2, 0.8), (3, 0.0), (1, 1.0), ("L-1", 0.0), ("L", 0.2))
ALL = tuple((k, gamma) for k in (0, 1, 2, 3, "L-1", "L") for gamma in DAMPINGS)


@pytest.fixture(autouse=True)
def fresh_state():
    """Replaces the fixture of all other tests, because here a captured model serves all tests of its case."""
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(case, id=case.name, marks=[] if case.name in EVERYDAY else [pytest.mark.slow]) for case in CASES
    ],
)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def captured(case):
    found = capture(*case.build())
    found.gradients(None)  # only now is it traced
    assert found.joints
    return found


def eager(case):
    model, args, loss = case.build()
    leaves = leaves_of(model, args)
    torch.manual_seed(SEED)
    output = model(*args)
    found = torch.autograd.grad(loss(output), list(leaves.values()), allow_unused=True)
    return output, {
        key: torch.zeros_like(leaf) if g is None else g for (key, leaf), g in zip(leaves.items(), found, strict=True)
    }


def oracle(case, iterations, damping, segment=1):
    """The expected gradients: the oracle's, or eager mode's if the contract leaves the chains open."""
    if case.program is None:
        return eager(case)
    model, args, loss = case.build()
    torch.manual_seed(SEED)
    return reference_gradients(case.program(model), args, loss, iterations, damping, segment=segment)


def iterations_of(case, k):
    if isinstance(k, int):
        return k
    length = max((chain.length for chain in case.chains or ()), default=4)
    return {"L-1": length - 1, "L": length}[k]


def compare(case, captured, settings):
    for k, damping in settings:
        iterations = iterations_of(case, k)
        if case.program is None and k != "L":
            continue
        if case.program is None:
            iterations = 10**6
        torch.manual_seed(SEED)
        _, found, _ = captured.gradients(options(iterations=iterations, damping=damping))
        _, expected = oracle(case, iterations, damping)
        tolerance = case.tolerance if k != "L" else max(1e-9, case.tolerance if case.noise > 1e-9 else 0.0)
        assert_gradients_close(found, expected, tolerance, case.noise, what=f"k={iterations} ({k}), gamma={damping}")


def test_gradients_match_the_oracle(case, captured):
    compare(case, captured, SOME)


@pytest.mark.slow
def test_gradients_match_the_oracle_at_every_k_and_gamma(case, captured):
    compare(case, captured, [setting for setting in ALL if setting not in SOME])


def compare_segments(case, captured, sizes, ks, dampings):
    """At 1e-10, except where a model computes in float32 inside."""
    if case.program is None:
        pytest.skip("the contract leaves its chains open")
    length = max((chain.length for chain in case.chains or ()), default=4)
    for size in sizes:
        segment = length if size == "L" else size
        count = -(-length // segment)
        for k, damping in product(ks, dampings):
            iterations = max(0, count - 1) if k == "C-1" else k
            torch.manual_seed(SEED)
            _, found, _ = captured.gradients(options(iterations=iterations, damping=damping, segment=segment))
            _, expected = oracle(case, iterations, damping, segment)
            tolerance = 1e-10 if case.tolerance <= 1e-6 else case.tolerance
            what = f"S={segment} ({size}), k={iterations} ({k}), gamma={damping}"
            assert_gradients_close(found, expected, tolerance, case.noise, what=what)


def test_gradients_are_those_of_segments(case, captured):
    compare_segments(case, captured, (2, 3), (0, 1), (0.3,))


@pytest.mark.slow
def test_gradients_are_those_of_segments_at_every_size_k_and_gamma(case, captured):
    compare_segments(case, captured, (2, 3, 5, 8, "L"), (0, 1, 2, "C-1"), (0.0, 0.3))


def test_a_final_norm_is_no_link_even_where_one_link_is_enough():
    """``min_length=1`` must not turn a LayerNorm's own backward into a chain, which would be damped."""
    case = BY_NAME["mlp_module_list"]
    captured = capture(*case.build())
    _, found, _ = captured.gradients(options(iterations=0, damping=0.2, min_length=1))
    _, expected = oracle(case, 0, 0.2)
    assert_gradients_close(found, expected, case.tolerance)


def test_outputs_are_those_of_eager_mode(case, captured):
    torch.manual_seed(SEED)
    output, _, _ = captured.gradients(options(iterations=1))
    expected, _ = eager(case)
    assert_outputs_close(output, expected, case.forward_tolerance)


def test_chains_found_are_those_the_paper_means(case, captured):
    if case.chains is None:
        pytest.skip("the contract leaves this model's chains open")
    torch.manual_seed(SEED)
    _, _, records = captured.gradients(options(iterations=1))
    rewritten = sorted(record.length for record in records if record.decision == "rewritten")
    expected = sorted(case.chains, key=operator.attrgetter("length"))
    assert len(rewritten) == len(expected), f"found {rewritten}, expected {[c.length for c in expected]}"
    for length, chain in zip(rewritten, expected, strict=True):
        assert length == chain.length, f"found {rewritten}, expected {[c.length for c in expected]}"


def forward_part(joint: fx.GraphModule, outputs: int) -> list[tuple]:
    """Every node that the forward outputs need, in order, with its arguments; names do not matter."""
    results = pytree.tree_leaves(joint.graph.output_node().args)[:outputs]
    needed, waiting = set(), [node for node in results if isinstance(node, fx.Node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting.extend(node.all_input_nodes)
    number: dict[fx.Node, int] = {}
    listed = []
    for node in joint.graph.nodes:
        if node in needed:
            number[node] = len(number)
            args = fx.map_arg((node.args, node.kwargs), lambda n: ("node", number[n]))
            listed.append((node.op, str(node.target), str(args)))
    return listed


def test_forward_graph_is_untouched_node_for_node(case, captured):
    for joint in captured.joints:
        rewritten, _ = joint.rewritten(options(iterations=1))
        before = forward_part(joint.module, joint.forward_outputs)
        assert forward_part(rewritten, joint.forward_outputs) == before


def test_without_a_chain_the_graph_is_untouched(case, captured):
    if case.chains != ():
        pytest.skip("has chains")
    for joint in captured.joints:
        rewritten, _ = joint.rewritten(options(iterations=0))
        assert rewritten.graph.python_code("self").src == joint.module.graph.python_code("self").src


VIEWS = tuple(getattr(torch.ops.aten, name) for name in ("slice", "select", "view", "unsqueeze", "permute", "expand"))


def test_what_the_rewrite_concatenates_nothing_else_uses(case, captured):
    """Inductor may overwrite a piece there: Note [Pieces of a concatenation]. It copies views."""
    concatenate = (torch.ops.aten.cat.default, torch.ops.aten.stack.default, torch.ops.aten.constant_pad_nd.default)
    for joint in captured.joints:
        before = {node.name for node in joint.module.graph.nodes}
        for damping in (0.0, 0.2):
            rewritten, _ = joint.rewritten(options(iterations=2, damping=damping))
            for node in rewritten.graph.nodes:
                if node.target in concatenate and node.name not in before:
                    for piece in node.all_input_nodes:
                        view = getattr(piece.target, "overloadpacket", None) in VIEWS
                        given = not piece.all_input_nodes  # an input of the graph, or a constant
                        assert view or given or len(piece.users) == 1, node.format_node()


PARTITIONED = (
    "mlp_module_list", "resnet_postact_train", "encoder_post_norm", "torch_encoder_causal_dropout",
    "gru_cell_every_step", "lstm_cell_start_given", "gru_2_layers_interleaved_every_step", "encoder_decoder",
    "activity_penalties", "partly_frozen", "checkpointed", "hf_gpt2_sdpa",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in PARTITIONED if name in BY_NAME])
def test_gradients_match_the_oracle_after_partitioning(name):
    """The min-cut partitioner may cut the rewritten graph anywhere, and may recompute any value."""
    case = BY_NAME[name]
    iterations, damping = 1, 0.2
    model, args, loss = case.build()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=eager_highway(options(iterations=iterations, damping=damping)))
    leaves = leaves_of(model, args)
    torch.manual_seed(SEED)
    output = compiled(*args)
    found = torch.autograd.grad(loss(output), list(leaves.values()))
    _, expected = oracle(case, iterations, damping)
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, case.tolerance, case.noise)


THROUGH_INDUCTOR = (
    "mlp_module_list", "resnet_postact_train", "encoder_pre_norm", "encoder_post_norm",
    "torch_encoder_pre_norm_dropout", "gru_cell_every_step", "lstm_cell_start_given",
    "gru_2_layers_interleaved_every_step", "encoder_decoder", "activity_penalties", "hf_gpt2_sdpa",
    "hf_bert_sdpa", "hf_llama_sdpa",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [0, 1, "exact"])
@pytest.mark.parametrize("name", [name for name in THROUGH_INDUCTOR if name in BY_NAME])
def test_compiled_by_inductor_gradients_match_the_oracle(name, iterations):
    case, damping = BY_NAME[name], 0.2
    model, args, loss = case.build()
    torch._dynamo.reset()
    compiled = torch.compile(
        model,
        backend="highway",
        options={
            "iterations": iterations, "damping": damping, "rewrite": "always", "min_length": 2, "strict": True,
            "fallback_random": True,
        },
    )  # fmt: skip
    leaves = leaves_of(model, args)
    torch.manual_seed(SEED)
    output = compiled(*args)
    found = torch.autograd.grad(loss(output), list(leaves.values()))
    expected_output, expected = oracle(case, iterations, damping)
    assert_outputs_close(output, expected_output, case.forward_tolerance)
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, case.tolerance, case.noise)
