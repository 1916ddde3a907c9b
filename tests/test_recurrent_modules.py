"""``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``: one graph, no unrolling, and the gradients of w^k or of backprop.

The oracle is the module written out as a loop over time (``retold``), in float64.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint
from zoo.recurrent import gru_step, lstm_step

import hwbp_compiler
from hwbp_compiler import testing
from hwbp_compiler.cost import devices
from hwbp_compiler.cost.modules import estimate_recurrent
from hwbp_compiler.options import Truncation
from hwbp_compiler.passes.replace_recurrent_modules import replace_recurrent_modules
from hwbp_compiler.recurrence import operator, packed, tracing
from hwbp_compiler.testing import Link, Program, assert_gradients_close
from hwbp_compiler.testing.assertions import AtFullLength
from hwbp_compiler.testing.capture import capture, leaves_of, options
from hwbp_compiler.testing.compare import assert_outputs_close
from hwbp_compiler.torch_private import SERVES

STEPS, BATCH, INPUT, HIDDEN = 7, 3, 4, 5
# -- modules, retold for the oracle -------------------------------------------------------------------------------


STEP = {"GRU": gru_step, "LSTM": lstm_step}


class Reader(nn.Module):
    """A recurrent module of which the output, the last states, or both are used."""

    def __init__(self, kind: str, uses: str = "both", **arguments: Any) -> None:
        super().__init__()
        self.module = getattr(nn, kind)(INPUT, HIDDEN, **arguments)
        self.kind, self.uses = kind, uses

    def forward(self, x, *state):
        state = state if self.kind == "LSTM" else state[0] if state else None
        output, last = self.module(x, state or None) if self.kind == "LSTM" else self.module(x, state)
        last = last if self.kind == "LSTM" else (last,)
        return {"both": (output, *last), "output": output, "last": last}[self.uses]


def retold(model: Reader) -> Program:
    """The module as a loop over layers, directions and steps."""
    module, width = model.module, 2 if model.kind == "LSTM" else 1
    directions = 2 if module.bidirectional else 1

    def cell(number: int) -> SimpleNamespace:
        suffix = f"_l{number // directions}{'_reverse' if number % directions else ''}"
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return SimpleNamespace(**{name: getattr(module, name + suffix, None) for name in names})

    def forward(run_chain, x, *state):
        batched = x.dim() == 3
        x = x if batched else x.unsqueeze(1)
        x = x.transpose(0, 1) if module.batch_first and batched else x
        zeros = x.new_zeros(module.num_layers * directions, x.shape[1], HIDDEN)
        state = [s if batched else s.unsqueeze(1) for s in state] or [zeros] * width
        series, last = x, []
        for layer in range(module.num_layers):
            if layer and module.dropout:
                p = module.dropout
                series = series * torch.empty(series.shape, dtype=series.dtype).bernoulli_(1 - p).div_(1 - p)
            outputs = []
            for direction in range(directions):
                number = layer * directions + direction
                steps = list(series.unbind(0))[:: -1 if direction else 1]
                step = STEP[model.kind](cell(number))
                links = [Link(step, (x_t,)) for x_t in steps]
                states = run_chain(links, tuple(s[number] for s in state)).states[1:]
                outputs.append(torch.stack([s[0] for s in states][:: -1 if direction else 1]))
                last.append(states[-1])
            series = torch.cat(outputs, -1)
        output = series.transpose(0, 1) if module.batch_first and batched else series
        ends = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if not batched:
            output, ends = output.squeeze(1), tuple(e.squeeze(1) for e in ends)
        return {"both": (output, *ends), "output": output, "last": ends}[model.uses]

    return Program(dict(model.named_parameters()), forward)


@dataclass
class Case:
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    uses: str = "both"
    state: bool = False
    batched: bool = True

    def build(self, kind: str) -> tuple[Reader, tuple[torch.Tensor, ...]]:
        torch.manual_seed(1)
        model = Reader(kind, self.uses, **self.arguments).double()
        batch_first = self.arguments.get("batch_first")
        shape = ((BATCH, STEPS) if batch_first else (STEPS, BATCH)) if self.batched else (STEPS,)
        args = [torch.randn(*shape, INPUT, dtype=torch.float64, requires_grad=True)]
        if self.state:
            chains = model.module.num_layers * (2 if model.module.bidirectional else 1)
            shape = (chains, BATCH, HIDDEN) if self.batched else (chains, HIDDEN)
            for _ in range(2 if kind == "LSTM" else 1):
                args.append(torch.randn(*shape, dtype=torch.float64, requires_grad=True))
        return model, tuple(args)


CASES = [
    Case("plain"),
    Case("output_only", uses="output"),
    Case("last_state_only_given_state", uses="last", state=True),
    Case("no_bias_batch_first", dict(bias=False, batch_first=True)),
    Case("two_layers_both_directions_given_state", dict(num_layers=2, bidirectional=True), state=True),
    Case("three_layers_dropout", dict(num_layers=3, dropout=0.4)),
    Case("unbatched", batched=False, state=True),
]
# -- gradients, truncated and exact -------------------------------------------------------------------------------


SETTINGS = [(0, 0.0), (1, 0.0), (2, 0.3), (5, 0.0), (STEPS - 1, 0.0), (1, 1.0)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_gradients_are_those_of_w_k(kind, case):
    model, args = case.build(kind)
    captured = capture(model, args, testing.probe_loss)
    chains = model.module.num_layers * (2 if model.module.bidirectional else 1)
    for iterations, damping in SETTINGS:
        torch.manual_seed(3)
        expected_output, expected = testing.reference_gradients(
            retold(model), args, testing.probe_loss, iterations, damping
        )
        torch.manual_seed(3)
        output, found, records = captured.gradients(options(iterations=iterations, damping=damping))
        assert [r.decision for r in records] == ["rewritten"] * chains
        assert_outputs_close(output, expected_output, 1e-12)
        assert_gradients_close(found, expected, 1e-9, what=f"iterations={iterations}, damping={damping}")


# STEPS is 7: remainders of 1, 1, 3 and 2 links, and one segment alone.
SEGMENTED = [(2, 0, 0.3), (2, 1, 0.0), (2, 2, 0.3), (3, 0, 0.0), (3, 1, 0.0), (4, 0, 0.3), (4, 1, 0.0), (5, 0, 0.3),
             (STEPS, 0, 0.0), (STEPS + 3, 0, 0.0)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_gradients_are_exact_inside_a_segment_and_truncated_across(kind, case):
    model, args = case.build(kind)
    captured = capture(model, args, testing.probe_loss)
    for segment, iterations, damping in SEGMENTED:
        torch.manual_seed(3)
        _, expected = testing.reference_gradients(
            retold(model), args, testing.probe_loss, iterations, damping, segment=segment
        )
        torch.manual_seed(3)
        chosen = vars(options(iterations=iterations, damping=damping, segment=segment))
        _, found, records = captured.gradients(AtFullLength(**chosen))
        assert {r.decision for r in records} == {"rewritten"}
        assert_gradients_close(found, expected, 1e-10, what=f"S={segment}, k={iterations}, damping={damping}")


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_new_length_compiles_nothing_new_with_segments(kind):
    """Whatever the length of the last segment."""
    model, _ = Case("plain").build(kind)
    run = compiled(model, iterations=1, segment=3, dynamic=True)
    for length in (11, 12, 13, 16):
        x = torch.randn(length, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
        leaves = leaves_of(model, (x,))
        found = torch.autograd.grad(testing.probe_loss(run(x)), list(leaves.values()))
        _, expected = testing.reference_gradients(retold(model), (x,), testing.probe_loss, 1, segment=3)
        assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-10)
        assert hwbp_compiler.counters()["graphs_seen"] == 1


def eager_gradients(model, args, seed=3):
    leaves = leaves_of(model, args)
    torch.manual_seed(seed)
    output = model(*args)
    found = torch.autograd.grad(testing.probe_loss(output), list(leaves.values()))
    return output, dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_iterations_up_to_the_length_are_backprop(kind, case):
    model, args = case.build(kind)
    expected_output, expected = eager_gradients(model, args)
    captured = capture(model, args, testing.probe_loss)
    for iterations in ("exact", STEPS):
        torch.manual_seed(3)
        output, found, records = captured.gradients(options(iterations=iterations))
        assert {r.decision for r in records} == {"declined"}
        assert_outputs_close(output, expected_output, 1e-12)
        assert_gradients_close(found, expected, 1e-9)


# -- compiled -----------------------------------------------------------------------------------------------------


def compiled(model, dynamic=None, **kwargs):
    settings = {"rewrite": "always", "min_length": 2, "strict": True, **kwargs}
    return torch.compile(model, backend="highway", fullgraph=True, dynamic=dynamic, options=settings)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_compiled_by_inductor_in_one_graph(kind):
    case = Case("", dict(num_layers=2 if kind == "GRU" else 1, batch_first=True), state=True)
    model, args = case.build(kind)
    torch.manual_seed(3)
    _, expected = testing.reference_gradients(retold(model), args, testing.probe_loss, 2, 0.2)
    torch.manual_seed(3)
    output = compiled(model, iterations=2, damping=0.2)(*args)
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(testing.probe_loss(output), list(leaves.values()))
    assert hwbp_compiler.counters()["chains_rewritten"] == model.module.num_layers
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-9)


@pytest.mark.parametrize(
    ("kind", "rewrite"), [("RNN", "never"), ("GRU", "never"), ("LSTM", "never"), ("LSTM", "always")]
)
def test_pytorchs_own_kernel_is_bit_for_bit_eager_mode_also_the_second_time(kind, rewrite):
    """Includes the dropout between layers, which the kernel draws itself, and a second backward pass, which records
    again.
    """
    torch.manual_seed(0)
    for arguments in (dict(num_layers=2, dropout=0.5, bidirectional=True), {}):
        model, args = Case("", arguments, state=True).build(kind)
        expected_output, expected = eager_gradients(model, args)
        torch.manual_seed(3)
        output = compiled(model, iterations="exact", rewrite=rewrite)(*args)
        assert_outputs_close(output, expected_output, 0.0)
        leaves = leaves_of(model, args)
        loss = testing.probe_loss(output)
        found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
        assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-14)
        if not arguments:
            found = torch.autograd.grad(loss, list(leaves.values()))
            assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-14)
        else:
            with pytest.raises(RuntimeError, match="a second backward pass through a recurrent module with dropout"):
                torch.autograd.grad(loss, list(leaves.values()))


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_exact_on_a_cpu_records_nothing_and_can_go_back_twice(kind):
    """Everything except the step from state to state is computed for all steps at once. The numbers are eager mode's up
    to rounding.
    """
    for arguments in (dict(num_layers=2, dropout=0.5, bidirectional=True), {}):
        model, args = Case("", arguments, state=True).build(kind)
        expected_output, expected = eager_gradients(model, args)
        torch.manual_seed(3)
        output = compiled(model, iterations="exact", damping=0.3)(*args)
        assert len(operator.kept._alive) == 0
        assert_outputs_close(output, expected_output, 1e-14)
        leaves = leaves_of(model, args)
        loss = testing.probe_loss(output)
        for again in (True, False):
            found = torch.autograd.grad(loss, list(leaves.values()), retain_graph=again)
            assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_exact_backward_of_an_rnn_knows_both_nonlinearities(nonlinearity):
    case = Case("", dict(nonlinearity=nonlinearity), state=True)
    model, args = case.build("RNN")
    _, expected = eager_gradients(model, args)
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(testing.probe_loss(compiled(model)(*args)), list(leaves.values()))
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-12)


# -- inside other things ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_one_module_feeds_another(kind):
    torch.manual_seed(0)
    first, second = (getattr(nn, kind)(INPUT, INPUT).double() for _ in range(2))
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64, requires_grad=True)

    def both(x):
        return second(first(x)[0])[0]

    wanted = [x, *first.parameters(), *second.parameters()]
    expected = torch.autograd.grad(testing.probe_loss(both(x)), wanted)
    found = torch.autograd.grad(testing.probe_loss(compiled(both, iterations="exact")(x)), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_another_backend_called_from_ours_breaks_its_graph_as_ever(backend):
    torch.manual_seed(0)
    inner = nn.GRU(INPUT, INPUT).double()
    by_another = torch.compile(lambda x: inner(x)[0], backend=backend)
    called = torch._dynamo.disable(lambda x: by_another(x))
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(inner(2 * x)[0].square().sum(), x)
    outer = torch.compile(lambda x: called(2 * x), backend="highway")
    assert torch.equal(torch.autograd.grad(outer(x).square().sum(), x)[0], expected[0])


def test_inside_a_transform_of_torch_func_it_runs_in_eager_mode():
    torch.manual_seed(0)
    gru, x = nn.GRU(INPUT, HIDDEN).double(), torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    parameters = dict(gru.named_parameters())
    gradients = torch.func.grad(lambda p: testing.probe_loss(torch.func.functional_call(gru, p, (x,))))
    expected = gradients(parameters)
    found = torch.compile(lambda p: gradients(p), backend="highway", options={"iterations": 2})(parameters)
    for name in parameters:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_gradients_share_no_memory(kind):
    """Otherwise a gradient that is accumulated, or clipped in place, would change twice."""
    model, args = Case("output").build(kind)
    for _ in range(2):
        testing.probe_loss(compiled(model, iterations=2)(*args)).backward()
    found = [p.grad for p in model.parameters()]
    assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)
    expected = torch.autograd.grad(testing.probe_loss(compiled(model, iterations=2)(*args)), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-12, atol=1e-12)


class Checkpointed(nn.Module):
    """A GRU of two layers and an LSTM, recomputed in the backward pass."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(INPUT, HIDDEN, 2, batch_first=True)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, bidirectional=True)

    def region(self, x):
        return self.lstm(self.gru(x.sin())[0].cos())[0]

    def forward(self, x):
        return checkpoint(self.region, x, use_reentrant=False)


def test_inside_a_checkpoint_layers_are_chains_as_outside():
    torch.manual_seed(0)
    model, x = Checkpointed().double(), torch.randn(STEPS, STEPS, INPUT, dtype=torch.float64)
    plain = copy.deepcopy(model)
    plain.forward = plain.region
    found, expected = (
        torch.autograd.grad(testing.probe_loss(compiled(m, iterations=2, damping=0.3)(x)), list(m.parameters()))
        for m in (model, plain)
    )
    assert hwbp_compiler.counters()["chains_rewritten"] == 2 * 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- outputs that are changed, empty batches ----------------------------------------------------------------------


@pytest.mark.parametrize("iterations", ["exact", STEPS - 1])
def test_an_output_may_be_changed_in_place(iterations):
    """Eager mode on a CPU allows it, although the backward pass here reads that output."""
    torch.manual_seed(0)
    gru, x = nn.GRU(INPUT, HIDDEN).double(), torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)

    def changed(x):
        output, h_n = gru(x)
        output[3:].mul_(2)
        return output.relu_(), h_n.exp_()

    parameters = list(gru.parameters())
    expected = torch.autograd.grad(testing.probe_loss(changed(x)), parameters)
    found = torch.autograd.grad(testing.probe_loss(compiled(changed, iterations=iterations)(x)), parameters)
    bound = 1e-12 if iterations == "exact" else 1e-2  # everything except the longest path
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("iterations", ["exact", 2])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_an_output_changed_in_place_outside_the_graph_is_noticed_where_it_matters(kind, iterations):
    """A backward pass that reads the changed output says so. A copy for the few that may change it would cost everyone
    its memory.
    """
    model, args = Case("plain").build(kind)
    call, wanted = compiled(model, iterations=iterations), [*args, *model.parameters()]
    output, *last = call(*args)
    expected = torch.autograd.grad(
        testing.probe_loss((torch.cat([output[:2], output[2:] * 2]), *map(torch.exp, last))), wanted
    )
    output, *last = call(*args)
    for state in last:
        state.exp_()
    output[2:].mul_(2)
    try:
        found = torch.autograd.grad(testing.probe_loss((output, *last)), wanted)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("iterations", ["exact", 2])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_an_empty_batch(kind, iterations):
    model = Reader(kind).double()
    x = torch.randn(STEPS, 0, INPUT, dtype=torch.float64, requires_grad=True)

    def both(call):
        output = call(x)
        return *output, *torch.autograd.grad(testing.probe_loss(output), [x, *model.parameters()])

    for a, b in zip(both(compiled(model, iterations=iterations)), both(model), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_recording_dies_with_its_output():
    model, args = Case("plain").build("GRU")
    output = compiled(model, iterations="exact", rewrite="never")(*args)
    assert len(operator.kept._alive) == 1
    del output
    assert len(operator.kept._alive) == 0


# -- what is told -------------------------------------------------------------------------------------------------


def test_projections_are_exact_with_a_reason():
    model, args = Case("", dict(proj_size=3)).build("LSTM")
    _, expected = eager_gradients(model, args)
    output = compiled(model, iterations=1)(*args)
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(testing.probe_loss(output), list(leaves.values()))
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 1e-14)
    assert hwbp_compiler.counters()["declined: projections"] == 1


def test_a_tanh_recurrence_has_no_highway_and_the_report_says_so():
    model, args = Case("plain").build("RNN")
    report = hwbp_compiler.explain(model, *args, options={"rewrite": "always", "iterations": 1})
    (chain,) = report.chains
    assert (chain.length, chain.multiplier, chain.decision) == (STEPS, "0", "declined")
    assert "no elementwise path" in chain.reason and "nn.GRU" in chain.advice


def test_explain_shows_one_chain_per_layer_and_direction_with_the_users_line():
    model, args = Case("", dict(num_layers=2, bidirectional=True)).build("LSTM")
    report = hwbp_compiler.explain(model, *args, options={"rewrite": "always", "iterations": 1})
    assert [c.length for c in report.chains] == [STEPS] * 4
    for chain in report.chains:
        assert chain.decision == "rewritten"
        assert chain.multiplier.startswith("c->c: sigmoid(...)")
        assert "test_recurrent_modules.py" in chain.source and "self.module(" in chain.source
    places = {"layer 0", "layer 0 reverse", "layer 1", "layer 1 reverse"}
    assert {c.module for c in report.chains} == {f"module {place}" for place in places}
    assert "recurrent_module_backward" in str(report.graph_before.graph)
    assert "recurrent_module_backward" not in str(report.graph_after.graph)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_explain_draws_a_recurrent_module_shows_its_programs_and_measures_the_error(kind, tmp_path):
    model, args = Case("plain").build(kind)
    report = hwbp_compiler.explain(model, *args, options={"rewrite": "always", "iterations": 1}, errors=True)
    (chain,), (graph,) = report.chains, report.graphs
    ((program,),) = graph.programs
    assert "self.module(" in program.forward[0]
    assert "recurrent_module_backward(" in program.before and "linear_scan(" in program.after
    errors = [e.relative_error for e in graph.errors]
    assert errors[0] > errors[-1] and errors[-1] < 1e-2
    # At least the series of states, and at most every value that the rewritten form computes.
    nodes = [n.meta["val"] for n in report.graph_after.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert args[0].new_empty(STEPS, BATCH, HIDDEN).nbytes < chain.added_bytes < sum(value.nbytes for value in nodes)
    report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('class="block ') == STEPS
    report.save_repro(tmp_path / "repro.py")
    assert f"for k in (0, 1, {STEPS - 1}):" in (tmp_path / "repro.py").read_text()


# -- lengths, precision, packed sequences -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_the_graph_does_not_grow_with_the_length(kind):
    sizes = []
    for steps in (20, 10_000):
        model = Reader(kind)
        report = hwbp_compiler.explain(
            model, torch.randn(steps, 1, INPUT), options={"rewrite": "always", "iterations": 2}
        )
        sizes.append((len(report.graph_before.graph.nodes), len(report.graph_after.graph.nodes)))
        assert report.chains[0].length == steps
    assert sizes[0] == sizes[1]


def test_a_new_length_does_not_compile_again_and_length_10000_runs():
    model, _ = Case("output").build("GRU")
    function = torch.compile(
        model, backend="highway", fullgraph=True, dynamic=True, options={"rewrite": "always", "iterations": 3}
    )
    torch._dynamo.utils.counters.clear()
    for steps in (30, 7, 10_000):
        x = torch.randn(steps, BATCH, INPUT, dtype=torch.float64)
        _, expected = testing.reference_gradients(retold(model), (x,), testing.probe_loss, 3) if steps < 100 else (0, 0)
        parameters = dict(model.named_parameters())
        found = torch.autograd.grad(testing.probe_loss(function(x)), list(parameters.values()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        if expected:
            assert_gradients_close(dict(zip(parameters, found, strict=True)), expected, 1e-9)
        assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_eager_mode(kind, dtype):
    model, args = Case("plain").build(kind)
    low = lambda tensors: tuple(t.detach().to(dtype).requires_grad_() for t in tensors)  # noqa: E731
    _, exact = eager_gradients(model, args)
    _, truncated = testing.reference_gradients(retold(model), args, testing.probe_loss, 2)
    model = model.to(dtype)
    _, eager = eager_gradients(model, low(args))
    _, found, _ = capture(model, low(args), testing.probe_loss).gradients(options(iterations=2))
    error_of_eager = testing.relative_error(eager, exact)
    assert testing.relative_error(found, truncated) <= 1.5 * error_of_eager + torch.finfo(dtype).eps


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_autocast_is_that_of_eager_mode(kind):
    if kind == "LSTM" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("eager mode raises: oneDNN has no LSTM in bfloat16 for this CPU")
    model, args = Case("", dict(num_layers=2)).build(kind)
    model, args = model.float(), tuple(a.detach().float().requires_grad_() for a in args)
    with torch.autocast("cpu", torch.bfloat16):
        expected_output, expected = eager_gradients(model, args)
        output = compiled(model, iterations=1)(*args)
    assert [t.dtype for t in output] == [t.dtype for t in expected_output]
    assert_outputs_close(output, expected_output, 0.0)
    leaves = leaves_of(model, args)
    found = torch.autograd.grad(testing.probe_loss(output), list(leaves.values()))
    assert_gradients_close(dict(zip(leaves, found, strict=True)), expected, 0.02)  # probe_loss is outside autocast


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_packed_sequence_has_eager_modes_gradients(kind):
    """Dynamo breaks the graph where sequences are packed. Given the packed data, the kernel is one operator."""
    model, (x,) = Case("").build(kind)
    lengths = torch.tensor([STEPS, STEPS - 3, 2])

    def run(x):
        output, _ = model.module(rnn.pack_padded_sequence(x, lengths))
        return rnn.pad_packed_sequence(output)[0]

    expected = torch.autograd.grad(testing.probe_loss(run(x)), [x, *model.parameters()])
    settings = {"rewrite": "always", "iterations": 1, "min_length": 2}
    found = torch.autograd.grad(
        testing.probe_loss(torch.compile(run, backend="highway", options=settings)(x)), [x, *model.parameters()]
    )
    assert_gradients_close(dict(enumerate(found)), dict(enumerate(expected)), 1e-12)

    sequence = rnn.pack_padded_sequence(x.detach(), lengths)
    data = sequence.data.requires_grad_()
    zeros = torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64)
    state = (zeros, zeros) if kind == "LSTM" else zeros

    def raw(data, *weights):
        function = torch.lstm if kind == "LSTM" else torch.gru
        return function(data, sequence.batch_sizes, state, weights, True, 1, 0.0, True, False)[0]

    expected = torch.autograd.grad(testing.probe_loss(raw(data, *model.parameters())), [data, *model.parameters()])
    hwbp_compiler.reset_counters()
    step = torch.compile(raw, backend="highway", fullgraph=True, options=settings)
    found = torch.autograd.grad(testing.probe_loss(step(data, *model.parameters())), [data, *model.parameters()])
    assert_gradients_close(dict(enumerate(found)), dict(enumerate(expected)), 1e-12)
    assert hwbp_compiler.counters()["declined: packed_sequence"] == 1


@pytest.mark.parametrize("given", [False, True], ids=["", "given_state"])
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_a_packed_sequence_is_declined_with_its_reason(kind, given, caplog):
    """Where Dynamo breaks the graph, no pass sees the module. The reason is still reported, but only for our graphs."""
    model, (x,) = Case("").build(kind)
    lengths = torch.tensor([STEPS, STEPS - 3, 2])
    state = torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64) if given else None

    def run(x):
        output, _ = model.module(rnn.pack_padded_sequence(x, lengths), state)
        return rnn.pad_packed_sequence(output)[0]

    packed._tell.cache_clear()
    with caplog.at_level("INFO", logger="hwbp_compiler"):
        if not torch.__version__.startswith("2.11."):  # its Dynamo fails at pad_packed_sequence here
            with torch._dynamo.config.patch(allow_rnn=True):
                torch.compile(run, backend="inductor")(x)
        assert hwbp_compiler.counters()["chains_declined"] == 0
        torch._dynamo.reset()
        ours = torch.compile(run, backend="highway")
        ours(x)
        assert hwbp_compiler.counters()["declined: packed_breaks_graph"] == 1
        torch._dynamo.reset()
        ours(x)  # compiled again: not reported again
    (told,) = [message for message in caplog.messages if message.startswith("recurrent module declined")]
    assert "a packed sequence: Dynamo breaks the graph at it" in told
    assert f"{__file__}:" in told and "model.module(rnn.pack_padded_sequence(x, lengths), state)" in told

    counted = hwbp_compiler.counters()
    (note,) = [note for note in hwbp_compiler.explain(run, x).notes if note.startswith("Declined: ")]
    assert "eager mode, with exact gradients" in note and f"{__file__}:" in note
    assert hwbp_compiler.counters() == counted  # explain compiles nothing


# -- threads, and no gradients ------------------------------------------------------------------------------------


def test_threads_that_overlap_do_not_switch_off_each_others_setting():
    """On torch 2.11 one setting applies to all threads."""
    pools = [ThreadPoolExecutor(1) for _ in range(2)]
    contexts = [tracing.traced_whole() for _ in pools]

    def allowed():
        return torch._dynamo.config.allow_rnn

    for pool, context in zip(pools, contexts, strict=True):
        pool.submit(context.__enter__).result()
    pools[0].submit(contexts[0].__exit__, None, None, None).result()
    assert pools[1].submit(allowed).result()
    pools[1].submit(contexts[1].__exit__, None, None, None).result()
    assert not any(pool.submit(allowed).result() for pool in pools) and not allowed()


def test_without_gradients_nothing_is_recorded():
    model, (x,) = Case("plain").build("GRU")
    with torch.no_grad():
        output = compiled(model, iterations="exact")(x)
        assert_outputs_close(output, model(x), 1e-12)  # our kernel sums in another order than PyTorch's
    assert len(operator.kept._alive) == 0


# -- what the cost model decides ----------------------------------------------------------------------------------


def test_the_cost_model_takes_a_gru_of_one_sequence_and_leaves_a_batch_and_onednns_lstm_alone(monkeypatch):
    """On a CPU, exact backprop is one call of ours. For a single sequence it waits for the weights in every step."""
    monkeypatch.setattr(devices, "cores", lambda: 2)
    one, many = torch.empty(512, 1, 128), torch.empty(512, 16, 128)
    assert estimate_recurrent("gru", one, one, Truncation(2)).pays
    assert estimate_recurrent("gru", one, one, Truncation(1, segment=16)).pays
    assert not estimate_recurrent("gru", many, many, Truncation(2)).pays
    assert not estimate_recurrent("lstm", many, many, Truncation(2)).pays


def test_the_cost_model_prefers_exact_where_the_products_of_one_step_are_large(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    x = torch.empty(256, 32, 256)
    assert not estimate_recurrent("gru", x, x, Truncation(2)).pays


@pytest.mark.parametrize("batch, hidden", [(1, 16), (32, 256)])
def test_an_exact_gru_on_a_cpu_records_nothing_and_goes_through_time_in_one_call(batch, hidden):
    x = torch.randn(6, batch, hidden)
    graph = hwbp_compiler.explain(nn.GRU(hidden, hidden), x, options={"iterations": "exact"}).graph_after.graph
    assert not graph.find_nodes(op="call_function", target=operator.backward_operator)
    assert len(graph.find_nodes(op="call_function", target=torch.ops.highway.run_segments.default)) == 1


def measured_on_a_gpu():
    """Maps each case (kind, hidden, steps, layers, dtype, matmul) to the measured rows of its runs."""
    path = Path(__file__).parent.parent / "benchmarks/results/recurrent-cuda.jsonl"
    cases: dict[tuple, dict[str, Any]] = {}
    for row in map(json.loads, path.read_text().splitlines()):
        if row["kind"] != "RNN":
            key = tuple(row[name] for name in ("kind", "hidden", "steps", "layers", "dtype", "matmul"))
            cases.setdefault(key, {})[row["run"]] = row
    return cases


@pytest.mark.parametrize(("case", "runs"), measured_on_a_gpu().items(), ids=lambda value: str(value)[:60])
def test_the_cost_model_decides_as_a_gpu_measured(case, runs):
    """No estimate is off by more than 2.2. The shortest backward passes are Python's time, which the estimate omits
    because a training loop hides it.
    """
    kind, hidden, steps, layers, dtype, matmul = case
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with FakeTensorMode():
            x = torch.empty(steps, 128, hidden, device="cuda", dtype=getattr(torch, dtype))
            for k in (0, 2, 10):
                estimate = estimate_recurrent(kind.lower(), x, x, Truncation(k), layers)
                for expected, run in ((estimate.rewritten, f"k={k}"), (estimate.substitution, "eager")):
                    assert 1 / 2.2 < 1e3 * expected / runs[run]["backward_ms"] < 2.2
                if k == 2:
                    assert estimate.pays == (runs["k=2"]["step_ratio"] > 1)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("rewrite", "iterations", "calls"), [("profitable", 20, 1), ("profitable", 1, 3), ("always", 20, 3)]
)
def test_on_a_gpu_layers_are_taken_apart_only_where_that_pays(rewrite, iterations, calls):
    model = nn.GRU(64, 64, 3)

    def backend(module, inputs):
        with FakeTensorMode():
            for node in module.graph.nodes:  # as if it were a GPU's
                node.meta["example_value"] = pytree.tree_map_only(
                    torch.Tensor,
                    lambda t: torch.empty(t.shape, device="cuda", requires_grad=t.requires_grad),
                    node.meta.get("example_value"),
                )
        replace_recurrent_modules(module, options(rewrite=rewrite, iterations=iterations))
        found.append(len(module.graph.find_nodes(op="call_function", target=operator.operator)))
        return lambda *_: (x,)

    setattr(backend, SERVES, True)
    x, found = torch.randn(300, 128, 64), []
    with tracing.traced_whole():
        torch.compile(lambda x: model(x)[0], backend=backend)(x)
    assert found == [calls]


# -- processes of their own ---------------------------------------------------------------------------------------


ANOTHER_BACKEND = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.gru(x + 1)[0])

model, x = Model(), torch.randn(5, 2, 3)
if sys.argv[1] == "ours first":
    torch.compile(model, backend="highway", fullgraph=True)(x).sum().backward()
    torch._dynamo.reset()
    counters.clear()
torch.compile(model, backend="inductor")(x).sum().backward()
breaks = [dict(counters["graph_break"]), dict(counters["stats"]), dict(counters["unimplemented"])]
torch._dynamo.reset()
try:
    torch.compile(model, backend="inductor", fullgraph=True)(x)
except Exception as error:
    breaks.append(str(error).splitlines()[0])
assert torch._dynamo.config.allow_rnn is False
counters.clear()
torch._dynamo.reset()
torch._dynamo.config.allow_rnn = True
graphs = []
torch.compile(model, backend=lambda graph, inputs: graphs.append(graph.print_readable(print_output=False)) or graph)(x)
print("RESULT", json.dumps([breaks, graphs]))
"""

CACHED = """
import json, torch
from torch import nn
from torch._dynamo.utils import counters

torch.manual_seed(0)
model, x = nn.GRU(3, 4), torch.randn(9, 2, 3)
options = {"iterations": 1, "rewrite": "always"}
torch.compile(model, backend="highway", options=options)(x)[0].square().sum().backward()
gradient = b"".join(p.grad.numpy().tobytes() for p in model.parameters()).hex()
print("RESULT", json.dumps([gradient, dict(counters["aot_autograd"]), dict(counters["highway"])]))
"""


def run(program: str, *arguments: str, cache=None) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def test_another_backend_breaks_its_graphs_as_in_a_process_without_us():
    alone, after_us = run(ANOTHER_BACKEND, "alone"), run(ANOTHER_BACKEND, "ours first")
    assert alone == after_us
    assert "GRU" in alone[0][-1]  # the break that this test is about


def test_a_second_process_finds_the_compiled_layer_in_the_cache(tmp_path):
    first, again = (run(CACHED, cache=tmp_path) for _ in range(2))
    assert first[1]["autograd_cache_miss"] == 1 and first[2]["chains_rewritten"] == 1
    assert again[1]["autograd_cache_hit"] == 1 and "autograd_cache_miss" not in again[1]
    assert first[0] == again[0]
    assert again[2] == {}
