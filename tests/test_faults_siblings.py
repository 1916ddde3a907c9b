"""More cases of faults that users met: siblings of those in the other ``test_faults`` files and in test_pieces.py."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from test_faults_recurrences import make as elementwise
from test_faults_recurrences import retold as elementwise_retold
from test_faults_recurrent import PROGRAMS, one_by_one
from test_faults_skipped import Wrapper, another, assert_same, no_code, ours, step
from test_pieces import PROGRAMS as CATS
from test_pieces import inputs as inputs_of_cats
from test_pieces import overwritten_pieces
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import hwbp_compiler
from hwbp_compiler import HighwayError, backend, explain, recurrent, skipped
from hwbp_compiler.passes.keep_pieces import keep_pieces
from hwbp_compiler.pieces import keeping_pieces
from hwbp_compiler.rolled import live, loop
from hwbp_compiler.testing import (
    Link,
    Program,
    assert_gradients_close,
    fuzz,
    models,
    probe_loss,
    reference_gradients,
    routes,
)
from hwbp_compiler.testing.blocks import USED_TWICE
from hwbp_compiler.testing.capture import capture, decompositions, leaves_of, options, trace
from hwbp_compiler.testing.fuzz import Setting, check
from hwbp_compiler.testing.generated import run_generated
from hwbp_compiler.testing.models import Model, Recurrence, Stack
from hwbp_compiler.testing.reference import keep

# -- concatenations: against the oracle, through Inductor, where sizes coincide ----------------------------


class Gated(nn.Module):
    """One link. With L links, a batch of L and a width of L + 1, K with a row more is as large as the states."""

    def __init__(self, kind, width):
        super().__init__()
        self.kind, self.gate, self.block = kind, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, hold=keep):
        t, z = torch.sigmoid(self.gate(x)), self.block(x)
        if self.kind == "highway":
            return hold(t * torch.relu(z)) + hold(1 - t) * x
        if self.kind == "forget":
            return hold(t) * x + hold(torch.tanh(z))
        return torch.lerp(x, torch.tanh(z), t) if hold is keep else hold(1 - t) * x + hold(t * torch.tanh(z))


def coinciding(kind, links):
    torch.manual_seed(0)
    model = nn.Sequential(*(Gated(kind, links + 1) for _ in range(links))).double()
    return model, torch.randn(links, links + 1, dtype=torch.float64)


def links_of(model):
    def forward(run, x):
        links = [Link(lambda state, side, hold, b=block: ((b(state[0], hold),), ())) for block in model]
        return run(links, (x,)).states[-1][0]

    return Program(dict(model.named_parameters()), forward)


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_a_highway_network_where_sizes_coincide_has_the_gradients_of_the_oracle(iterations):
    model, x = coinciding("highway", 5)
    ours = {"rewrite": "always", "iterations": iterations, "damping": 0.0, "strict": True, "fx_graph_cache": False}
    step = torch.compile(model, backend="highway", options=ours)
    leaves = leaves_of(model, (x,))

    def train():
        return torch.autograd.grad(probe_loss(step(x)), list(leaves.values()))

    found, codes = run_and_get_code(train)
    _, expected = reference_gradients(links_of(model), (x,), probe_loss, iterations)
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-10)
    assert not any(map(overwritten_pieces, codes))
    assert hwbp_compiler.counters()["chains_rewritten"] == 1


@pytest.mark.parametrize("kind", ["highway", "lerp", "forget"])
@pytest.mark.parametrize("links", [3, 5])
@pytest.mark.parametrize("iterations, damping, segment", [(0, 0.0, 1), (1, 0.0, 1), (2, 0.2, 1), (1, 0.0, 2)])
def test_inductors_code_for_gates_where_sizes_coincide_is_right(kind, links, iterations, damping, segment):
    model, x = coinciding(kind, links)
    how = {"iterations": iterations, "damping": damping, "segment": segment}
    _, found, _ = trace(model, (x,), probe_loss).gradients(options(**how), run_generated)
    _, expected = reference_gradients(links_of(model), (x,), probe_loss, **how)
    assert_gradients_close(found, expected, 1e-10)


# -- concatenations: nothing that is concatenated is used elsewhere --------------------------------------

aten = torch.ops.aten
VIEWS = (aten.slice, aten.select, aten.view, aten.unsqueeze, aten.permute, aten.expand)
CONCATENATIONS = (aten.cat.default, aten.stack.default, aten.constant_pad_nd.default)


def has_its_own_memory(piece):
    """Inductor copies inputs and views of another shape, and computes constants anew. A view of the same shape is the
    same buffer to it.
    """
    shared = len(piece.users) > 1
    while getattr(piece.target, "overloadpacket", None) in VIEWS:
        source = piece.all_input_nodes[0]
        if source.meta["val"].shape != piece.meta["val"].shape:
            return True
        piece = source
        shared |= len(piece.users) > 1
    return not piece.all_input_nodes or not shared


def assert_pieces_are_not_shared(graph, before=()):
    for node in graph.nodes:
        if node.target in CONCATENATIONS and node.name not in before:
            for piece in node.all_input_nodes:
                assert has_its_own_memory(piece), f"{piece.format_node()} in {node.format_node()}"


EVERY_WAY = [(1, 0.0, 1), (2, 0.2, 1), (2, 1.0, 1), (1, 0.0, 2), (0, 0.2, 3), (0, 0.0, 4)]
CHAINS = {
    "gate": Stack(depth=6, width=4, update="gate", taps=(2, 5)),
    "two kinds of block": Stack(depth=6, width=4, blocks=("attention", "mlp"), after="layer"),
    "three kinds of block": Stack(depth=7, width=4, blocks=("mlp", "glu", "mixer"), update="lerp", penalties=(1, 4)),
    "gru": Recurrence(width=4, cell="gru", start="given"),
    "lstm": Recurrence(width=4, cell="lstm", start="learnt"),
    "two layers": Recurrence(width=4, cell="gru", layers=2, every_step=False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_segments_and_full_damping_concatenate_nothing_else_uses(name):
    joint = trace(*models.build(Model(stacks=(CHAINS[name],), batch=3, length=6))).joint
    before = {node.name for node in joint.module.graph.nodes}
    for k, gamma, segment in EVERY_WAY:
        rewritten, records = joint.rewritten(options(iterations=k, damping=gamma, segment=segment))
        assert "rewritten" in [r.decision for r in records]
        assert_pieces_are_not_shared(rewritten.graph, before)


class Runs(nn.Module):
    """A program of ``recurrent``: nothing in it is concatenated by the user."""

    def __init__(self, program):
        super().__init__()
        self.program = program

    def forward(self, *tensors):
        return self.program(recurrent, *tensors)


@pytest.mark.parametrize("name", ["lstm", "peephole", "two gates", "a matrix"])
def test_what_a_rolled_loop_concatenates_nothing_else_uses(name, monkeypatch):
    monkeypatch.setattr(loop, "_compiled", one_by_one)
    program, tensors = PROGRAMS[name]
    captured = capture(Runs(program), tuple(tensors(5, 4)), probe_loss)
    for k, gamma, segment in EVERY_WAY:
        how = options(iterations=k, damping=gamma, segment=segment)
        _, _, records = captured.gradients(how)
        assert "rewritten" in [r.decision for r in records]
        for joint in captured.joints:
            assert_pieces_are_not_shared(joint.rewritten(how)[0].graph)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("more", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
def test_what_a_recurrent_module_concatenates_nothing_else_uses(kind, more):
    model = Wrapper(kind(3, 4, **more)).double()
    captured = capture(model, (torch.randn(6, 4, 3, dtype=torch.float64),), probe_loss)
    for k, gamma, segment in EVERY_WAY:
        how = options(iterations=k, damping=gamma, segment=segment)
        captured.gradients(how)
        for joint in captured.joints:
            before = {node.name for node in joint.module.graph.nodes}
            assert_pieces_are_not_shared(joint.rewritten(how)[0].graph, before)


def test_a_view_of_the_same_shape_is_the_piece_itself():
    """Inductor drops such a view, and puts what it views into the concatenation's memory."""

    def both(x, y):
        s = x.sin()
        return torch.cat([s.expand(s.shape), y.cos()]), s * 2

    graph = make_fx(both, tracing_mode="fake")(torch.randn(3, 4), torch.randn(1, 4)).graph
    keep_pieces(graph, set(graph.nodes))
    assert graph.find_nodes(op="call_function", target=torch.ops.highway.cat.default)


# -- concatenations: users' own concatenations in GPU code ---------------------------------------


def many_pieces(t, h, g, m):
    """More pieces than Inductor computes on load."""
    x = 1 - t
    y = torch.cat([x, *(g * i for i in range(1, 10))])
    s = torch.mm(y.view(70, 6), m)
    p = s.view(14, 5, 6)[:5] * t
    q = (p * h) * (t * x)
    return q.sum(1), torch.bmm(q.transpose(1, 2), h), s


@pytest.mark.parametrize("program", [*CATS, many_pieces], ids=lambda f: f.__name__)
def test_gpu_code_does_not_write_over_a_piece(program):
    pytest.importorskip("triton")
    from hwbp_compiler.cross_compile import generate_kernels

    with FakeTensorMode():
        given = [torch.empty(t.shape, dtype=t.dtype) for t in inputs_of_cats()]
        graph = make_fx(program, decompositions())(*given)
        fake = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in given]
    with inductor_config.patch(keeping_pieces({})):
        code = generate_kernels(graph, fake, "cuda:sm_90")
    assert not overwritten_pieces(code.source)


def test_many_pieces_are_right_on_a_cpu():
    found, codes = run_and_get_code(torch.compile(many_pieces, backend="highway"), *inputs_of_cats())
    for have, want in zip(found, many_pieces(*inputs_of_cats()), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    assert not any(map(overwritten_pieces, codes))


# -- generated code ---------------------------------

ALL_SIZES_ALIKE = {
    "gate": Model(stacks=(Stack(depth=4, width=5, update="gate"),), batch=4, length=1),
    "norm after": Model(stacks=(Stack(depth=4, width=5, update="lerp", after="layer"),), batch=5, length=4),
    "heads": Model(stacks=(Stack(depth=5, width=4, taps=(1, 4), heads=True, penalties=(2,)),), batch=5, length=4),
    "gru, given": Model(stacks=(Recurrence(width=5, cell="gru", start="given"),), batch=4, length=4),
    "lstm, learnt": Model(stacks=(Recurrence(width=4, cell="lstm", start="learnt"),), batch=5, length=5),
    "min_gru, zeros": Model(stacks=(Recurrence(width=6, cell="min_gru"),), batch=5, length=5),
}


@pytest.mark.parametrize("name", ALL_SIZES_ALIKE)
@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_generated_code_is_right_where_sizes_coincide_and_memory_is_used_again(name, damping):
    ((_, records),) = check(ALL_SIZES_ALIKE[name], (Setting(1, damping),), "generated")
    assert "rewritten" in [r.decision for r in records]


# -- what the fuzzer draws and compares -------------------------------------


def drawn(count):
    found = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzz.cases())
    def collect(case):
        found.append(case)

    collect()
    return found


def test_the_fuzzer_draws_damping_with_every_first_state_and_every_special_block():
    kinds = set()
    for spec, chosen in drawn(1000):
        damped = any(0 < setting.damping < 1 for setting in chosen)
        for stage in spec.stacks:
            if isinstance(stage, Recurrence):
                kinds |= {(stage.start, damped), (stage.cell, damped)}
            else:
                kinds |= {stage.update, *((block, spec.dynamic) for block in stage.blocks)}
    recurrences = ("zeros", "learnt", "given", "gates", "bounded_gates", "min_gru", "diagonal")
    assert {*((name, True) for name in recurrences), *USED_TWICE, ("sized", True)} <= kinds


def test_each_program_that_the_fuzzer_compiles_also_runs_where_memory_is_used_once(monkeypatch):
    compared = []
    monkeypatch.setattr(routes, "assert_same", lambda found, apart: compared.append((found, apart)))
    check(Model(), (Setting(1, 0.2),), "inductor")
    assert compared


@pytest.mark.parametrize("start", ["zeros", "learnt", "given"])
def test_the_fuzzer_draws_loops_whose_sizes_are_expressions_of_symbols(start, monkeypatch):
    sizes, solve = set(), live.Sizes.__init__

    def noting(self, values):
        solve(self, values)
        sizes.update(self._known)

    monkeypatch.setattr(live.Sizes, "__init__", noting)
    monkeypatch.setattr(loop, "_compiled", one_by_one)
    spec = Model(stacks=(Recurrence(width=3, cell="lstm", start=start),), batch=2, length=5)
    ((_, records),) = check(spec, (Setting(1, 0.2),), "symbolic")
    assert [record.decision for record in records] == ["rewritten"]
    assert any(not size.is_Symbol for size in sizes)


def test_the_fuzzer_reports_a_model_that_another_backend_gave_up_and_ours_did_not_compile(monkeypatch):
    monkeypatch.setattr(skipped, "_lift", lambda compiled: iter(()))
    monkeypatch.setattr(backend, "compile_fx", no_code)
    specs = (Model(seed=seed) for seed in range(100))
    given_up = next(spec for spec in specs if zlib.crc32(repr(spec).encode()[::-1]) % 4 == 0)
    with pytest.raises(HighwayError, match="compiled nothing"):
        check(given_up, (Setting(1, 0.2),), "inductor")


# -- the same recurrence, rolled up --------------------------------------------


@pytest.mark.parametrize("cell", ["gate and rest", "gate and input"])
def test_a_linear_recurrence_that_is_rolled_up_is_exact_at_any_damping(cell, monkeypatch):
    monkeypatch.setattr(loop, "_compiled", one_by_one)
    model, args = elementwise(cell, loss="all")
    captured = capture(model, args, probe_loss)
    captured._options = how = options(reroll="always", iterations=1, damping=0.3)
    _, found, _ = captured.gradients(how)
    assert captured._loops
    _, expected = reference_gradients(elementwise_retold(model), args, probe_loss, 100)
    assert_gradients_close(found, expected, 1e-10, 1e-13)


# -- another backend first --------------------------------------------------------------------------------


def test_ours_then_inductor_then_ours_with_another_length(monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", no_code)
    model = Wrapper(nn.GRU(3, 4)).double()
    short, long = (torch.randn(length, 2, 3, dtype=torch.float64) for length in (5, 6))
    compiled_by_ours = ours(model, iterations="exact")
    assert step(compiled_by_ours, model, short)[1] == 1
    another(model, short, "inductor")
    found, graphs = step(compiled_by_ours, model, long)
    assert graphs == 1
    assert_same(found, step(model, model, long)[0])


# -- reasons --------------------------------------------------------------------------------


class Recasts(nn.Module):
    """A loop whose cell returns its state in another dtype than it computes in."""

    def __init__(self, gated):
        super().__init__()
        self.gated, self.gate, self.linear = gated, nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = x.new_zeros(2, 4, dtype=torch.float32)
        for x_t in x:
            z, n = torch.sigmoid(self.gate(x_t)), torch.tanh(self.linear(h.double()))
            h = (z * h + (1 - z) * n if self.gated else h + n).float()
        return h


@pytest.mark.parametrize("min_length", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
def test_a_loop_whose_cell_changes_the_dtype_is_a_chain_or_told_why_not(gated, min_length):
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    ours = {"iterations": 1, "rewrite": "always", "min_length": min_length}
    chains = explain(Recasts(gated).double(), x, options=ours).chains
    assert chains
    assert not any(chain.reason.startswith("shorter than min_length=1") for chain in chains)
    longest = max(chains, key=lambda chain: chain.length)
    assert longest.decision == "rewritten" or "dtype" in longest.reason
