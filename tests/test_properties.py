"""What must hold for every model, tested on models of every kind. ``tests/mutations.py`` breaks each of them."""

from __future__ import annotations

import copy
import cProfile
import pstats
import random
from dataclasses import asdict

import pytest
import torch
from small import PreNorm
from torch import fx, nn

from hwbp_compiler import passes
from hwbp_compiler.testing import (
    assert_gradients_close,
    fixed_point,
    models,
    reference_gradients,
    relative_error,
    sum_over_paths,
)
from hwbp_compiler.testing.assertions import AtFullLength
from hwbp_compiler.testing.capture import capture, eager_highway, options, run_passes, trace
from hwbp_compiler.testing.models import Model, Recurrence, Stack

SPECS = {
    "mlp": Model(stacks=(Stack(taps=(1,), penalties=(2,)),)),
    "two_kinds_post_norm": Model(stacks=(Stack(depth=4, blocks=("attention", "mlp"), after="layer"),), head=True),
    "masks_shared_weights": Model(stacks=(Stack(after="relu", shared=1, vectors=True),), stem=True, input_grad=False),
    "gates_and_convolutions": Model(stacks=(Stack(blocks=("conv",), update="gate", pre="rms"),)),
    "lstm": Model(stacks=(Recurrence(cell="lstm"),), length=5),
    "gru_of_two_layers_last_state": Model(stacks=(Recurrence(layers=2, every_step=False),), length=5),
    "encoder_decoder": Model(stacks=(Stack(blocks=("mlp",)), Stack(blocks=("cross", "mlp"), depth=4)), length=3),
    "recurrence_without_blocks": Model(stacks=(Recurrence(cell="diagonal", start="learnt"),), length=6),
}


@pytest.fixture(scope="module", params=SPECS)
def spec(request):
    return SPECS[request.param]


@pytest.fixture(scope="module")
def traced(spec):
    return trace(*models.build(spec))


def oracle(spec, iterations, damping, **kwargs):
    model, args, loss = models.build(spec)
    return reference_gradients(models.program(model), args, loss, iterations, damping, **kwargs)[1]


def rewritten(traced, iterations, damping):
    _, found, records = traced.gradients(options(iterations=iterations, damping=damping))
    assert any(record.decision == "rewritten" for record in records), records
    return found


@pytest.mark.parametrize("damping", [0.0, 0.3, 1.0])
def test_as_many_iterations_as_links_are_backprop(spec, traced, damping):
    """The rewritten form is forced here; ordinarily the passes leave such a chain alone."""
    usual = options(iterations=max(spec.chain_lengths), damping=damping)
    _, found, records = traced.gradients(AtFullLength(**asdict(usual)))
    assert records and all(record.decision == "rewritten" for record in records if record.length > 1), records
    assert_gradients_close(found, oracle(spec, "exact", 0.0), 1e-9)


@pytest.mark.parametrize("iterations, damping", [(0, 0.0), (1, 0.0), (1, 0.4), (2, 0.0)])
def test_gradients_sum_over_the_paths_that_cross_at_most_k_blocks(spec, traced, iterations, damping):
    if max(spec.chain_lengths) > 5:
        pytest.skip("too many paths")
    expected = oracle(spec, iterations, damping, solver=sum_over_paths)
    assert_gradients_close(rewritten(traced, iterations, damping), expected, 1e-8)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_damping_one_is_fixed_point_iteration(spec, traced, iterations):
    expected = oracle(spec, iterations, 0.0, solver=fixed_point)
    assert_gradients_close(rewritten(traced, iterations, 1.0), expected, 1e-8)


def results(traced, graph, tangents):
    with torch.no_grad():
        module = fx.GraphModule(traced.joint.module, graph)
        return fx.Interpreter(module).run(*traced.primals, *tangents, enable_io_processing=False)


def gradients_of(traced, tangents, iterations=1, damping=0.2):
    module, _ = traced.joint.rewritten(options(iterations=iterations, damping=damping))
    found = results(traced, module.graph, tangents)[traced.joint.forward_outputs :]
    return {i: g for i, g in enumerate(found) if g is not None}


def test_rewritten_gradients_are_linear_in_the_incoming_gradient(traced):
    torch.manual_seed(0)
    first, second = ([torch.randn_like(t) for t in traced.tangents] for _ in range(2))
    whole = gradients_of(traced, [a - 3 * b for a, b in zip(first, second, strict=True)])
    one, other = gradients_of(traced, first), gradients_of(traced, second)
    assert_gradients_close(whole, {i: g - 3 * other[i] for i, g in one.items()}, 1e-9)


def disguised(graph: fx.Graph, seed: int) -> fx.Graph:
    """The same graph with other names, and its nodes in another legal order."""
    draw = random.Random(seed)
    copied = fx.Graph()
    pending = {node: len(node.all_input_nodes) for node in graph.nodes}
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    moved: dict[fx.Node, fx.Node] = {}

    def place(node: fx.Node) -> None:
        moved[node] = copied.node_copy(node, moved.__getitem__)
        if node.op != "placeholder":  # an incoming gradient is recognized by its name
            moved[node]._rename(f"n{draw.randrange(10**9)}")
        for user in node.users:
            pending[user] -= 1
            if not pending[user] and user.op != "output":
                ready.append(user)

    ready: list[fx.Node] = []
    for node in inputs:
        place(node)
    ready += [n for n in graph.nodes if not n.all_input_nodes and n.op not in ("placeholder", "output")]
    while ready:
        place(ready.pop(draw.randrange(len(ready))))
    place(next(iter(reversed(graph.nodes))))
    return copied


def _told(record):
    return record.length, record.decision, record.multiplier, sorted(group.links for group in record.groups)


@pytest.mark.parametrize("seed", [0, 1])
def test_detection_depends_neither_on_names_nor_on_the_order_of_nodes(spec, traced, seed):
    chosen = options(iterations=1, damping=0.2)
    graph = disguised(traced.joint.module.graph, seed)
    records = run_passes(graph, chosen)
    _, expected, plain = traced.gradients(chosen)
    assert sorted(map(_told, records)) == sorted(map(_told, plain))
    found = results(traced, graph, traced.tangents)[traced.joint.forward_outputs :]
    found = {k: torch.zeros_like(expected[k]) if g is None else g for k, g in zip(traced.leaves, found, strict=True)}
    assert_gradients_close(found, expected, 1e-9)


def test_a_batch_of_two_is_two_batches_of_one():
    torch.manual_seed(0)
    model = nn.Sequential(*(PreNorm() for _ in range(4))).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def gradients(x):
        captured = trace(model, (x,), lambda out: out.square().sum())
        return captured.gradients(options(iterations=1, damping=0.2))[1]

    whole, parts = gradients(x), [gradients(x[i : i + 1]) for i in range(2)]
    assert_gradients_close(whole, {k: parts[0][k] + parts[1][k] for k in whole}, 1e-10)


class _Noisy(nn.Module):
    """Dropout in every block and a BatchNorm that keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(4))
        self.double()

    def forward(self, x):
        for line, norm in zip(self.lines, self.norms, strict=True):
            x = x + nn.functional.dropout(torch.tanh(line(norm(x))), 0.4)
        return x


def test_the_same_seed_gives_the_same_dropout_masks_and_batchnorm_buffers_are_those_of_eager_mode():
    torch.manual_seed(0)
    model = _Noisy()
    eager = copy.deepcopy(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    records = []
    compiled = torch.compile(model, backend=eager_highway(options(iterations=1), records=records))
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = eager(x)
        torch.manual_seed(seed)
        output = compiled(x)
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        output.sum().backward()
    assert [record.decision for record in records] == ["rewritten"]
    for (name, a), b in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def test_rewritten_gradients_use_the_dropout_masks_of_their_forward():
    """The rewritten form is exact only with the masks that were drawn in the forward pass. A chain with one iteration
    less is close.
    """
    torch.manual_seed(0)
    model = _Noisy()
    x = torch.randn(5, 4, dtype=torch.float64)
    captured = capture(model, (x,), lambda out: out.square().sum())
    found = []
    for iterations in (3, "exact"):
        torch.manual_seed(3)
        found.append(captured.gradients(options(iterations=iterations))[1])
    assert relative_error(*found) < 0.05


def joint_of(depth: int) -> fx.GraphModule:
    torch.manual_seed(0)
    model = nn.Sequential(*(PreNorm() for _ in range(depth))).double()
    x = torch.randn(2, 4, dtype=torch.float64)
    return trace(model, (x,), lambda out: out.square().sum()).joint.module


def test_node_count_and_work_of_the_passes_are_near_linear_in_depth():
    """Work is counted in function calls, which are the same every time, unlike seconds."""
    nodes, calls = [], []
    run_passes(joint_of(4).graph, options(iterations=1))  # tables are built at first use
    for depth in (16, 32, 64):
        graph = joint_of(depth).graph
        with cProfile.Profile() as profile:
            records = passes.run(graph, options(iterations=1))
        assert [record.decision for record in records] == ["rewritten"]
        nodes.append(len(graph.nodes))
        calls.append(pstats.Stats(profile).total_calls)
    for counted in (nodes, calls):
        first, second = counted[1] - counted[0], counted[2] - counted[1]
        assert second < 2.4 * first, f"16, 32, 64 links: {counted}"
