"""``explain`` reports what is found in the user's own terms, and leaves the model unchanged."""

from __future__ import annotations

import dataclasses
import doctest
import io
import json
import random
import re
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from small import PreNorm
from torch import nn
from torch._dynamo.testing import CompileCounter

import hwbp_compiler
from hwbp_compiler import HighwayError, OptionError, explain, passes
from hwbp_compiler.graph.record import ChainRecord, GroupRecord
from hwbp_compiler.report import alike, summary
from hwbp_compiler.report.alike import entries_of
from hwbp_compiler.report.text import plain
from hwbp_compiler.testing import Link, Program, reference_gradients

WIDTH, DEPTH = 4, 5
ALWAYS = {"iterations": 1, "rewrite": "always"}


def mlp() -> nn.Module:
    return nn.Sequential(*(PreNorm() for _ in range(DEPTH)))


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x):
        h = x.new_zeros(x.shape[1], WIDTH)
        for x_t in x:
            h = self.cell(x_t, h)
        return h


@torch._dynamo.disable
def untraced(module, x):
    return module(x)


class Small(nn.Module):
    """A model without a chain, traced quickly. It draws random numbers, updates buffers and changes its input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.eager = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        x.mul_(2.0)
        self.calls = self.calls + 1
        return untraced(self.eager, F.dropout(self.norm(self.linear(x)), 0.5))


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


@pytest.fixture(scope="module")
def mlp_report():
    return explain(mlp(), x(), options=ALWAYS)


@pytest.fixture(scope="module")
def tanh_report():
    return explain(Recurrent(nn.RNNCell(2, WIDTH)), torch.randn(6, 3, 2), options=ALWAYS)


@pytest.fixture(scope="module")
def broken_report():
    """Two graphs; only the second has a chain."""
    linear, blocks = nn.Linear(WIDTH, WIDTH), mlp()

    def model(x):
        x = linear(x)
        torch._dynamo.graph_break()
        return blocks(x)

    return explain(model, x(), options=ALWAYS)


# -- what is found ----------------------------------------------------------------------------------------------


def test_a_pre_norm_mlp_is_one_chain_with_multiplier_one(mlp_report):
    (chain,) = mlp_report.chains
    assert (chain.length, chain.multiplier, chain.decision) == (DEPTH, "1", "rewritten")
    assert [group.links for group in chain.groups] == [DEPTH]
    assert chain.estimate.substitution > 0


def test_a_post_relu_resnet_has_the_mask_as_multiplier():
    image = torch.randn(1, 2, 4, 4, requires_grad=True)
    (chain,) = explain(nn.Sequential(*(ConvBlock() for _ in range(4))), image, options=ALWAYS).chains
    assert (chain.length, chain.multiplier) == (4, "mask")


def test_a_gru_has_its_gate_as_multiplier():
    (chain,) = explain(Recurrent(nn.GRUCell(2, WIDTH)), torch.randn(6, 3, 2), options=ALWAYS).chains
    assert (chain.length, chain.multiplier, chain.decision) == (6, "sigmoid(...)", "rewritten")


def test_a_tanh_recurrence_has_no_chain(tanh_report):
    assert tanh_report.chains == []
    assert "All gradients of this graph are exact" in " ".join(str(tanh_report).split())


def test_a_chain_that_iterations_reach_is_declined_with_the_reason():
    report = explain(mlp(), x(), options={"iterations": DEPTH, "rewrite": "always"})
    (chain,) = report.chains
    assert chain.decision == "declined"
    assert f"iterations={DEPTH}" in chain.reason and "ordinary backprop" in chain.reason
    assert report.graph_after.code == report.graph_before.code


def test_rewrite_never_looks_for_nothing():
    report = explain(mlp(), x(), options={"rewrite": "never"})
    assert report.chains == [] and report.graph_after.code == report.graph_before.code
    assert "plain Inductor" in report.notes[0]


# -- the graphs -------------------------------------------------------------------------------------------------


def test_before_and_after_differ_and_can_be_read(mlp_report):
    before, after = (
        graph.print_readable(print_output=False) for graph in (mlp_report.graph_before, mlp_report.graph_after)
    )
    assert before != after and mlp_report.graph_before.code != mlp_report.graph_after.code
    assert "linear_scan" in after and "linear_scan" not in before


def test_a_graph_without_chain_stays_as_it_is(tanh_report):
    assert tanh_report.graph_after.code == tanh_report.graph_before.code


def test_the_graph_is_the_one_the_backend_is_given(mlp_report, monkeypatch):
    seen = []

    def run(graph, options):
        seen.append(str(graph))
        raise StopIteration  # stop the compilation here: no code is generated

    monkeypatch.setattr(passes, "run", run)
    with pytest.raises(HighwayError):
        torch.compile(mlp(), backend="highway", options={"strict": True})(x())
    assert seen == [str(mlp_report.graph_before.graph)]


def test_a_cell_that_is_one_kernel_is_written_out_as_the_backend_does(monkeypatch):
    """As on a GPU, where a cell is one kernel."""
    from hwbp_compiler.passes import write_out_cells

    asked = []
    monkeypatch.setattr(write_out_cells, "_is_fused", lambda node: asked.append(node) or True)
    model = Recurrent(nn.GRUCell(WIDTH, WIDTH))
    (chain,) = explain(model, torch.randn(6, 2, WIDTH), options=ALWAYS).chains
    assert chain.decision == "rewritten" and len(asked) == 6


class Unsteady(nn.Module):
    """Every layer may be left out at random, and one step reads a number."""

    def __init__(self, layerdrop: float, reads: bool) -> None:
        super().__init__()
        self.layers, self.layerdrop, self.reads = mlp(), layerdrop, reads

    def forward(self, x):
        for layer in self.layers:
            if self.training and self.layerdrop and torch.rand([]) < self.layerdrop:
                continue
            x = layer(x)
        return x * x.sum().item() if self.reads else x


def test_a_graph_break_is_told_with_its_line_and_what_keeps_the_model_whole():
    report = explain(Unsteady(0.1, False), x(), options=ALWAYS)
    (note,) = (note for note in report.notes if note.startswith("The graph breaks at "))
    assert "torch.rand([]) < self.layerdrop" in note and note.endswith("Set layerdrop=0 to keep it whole.")
    whole = explain(Unsteady(0.0, False), x(), options=ALWAYS)
    assert [chain.length for chain in whole.chains] == [DEPTH] and not whole.notes
    report = explain(Unsteady(0.0, True), x(), options=ALWAYS)
    (note,) = (note for note in report.notes if note.startswith("The graph breaks at "))
    assert "x.sum().item()" in note and "capture_scalar_outputs = True" in note
    assert note in " ".join(str(report).split()) and note in report.to_dict()["notes"]


def test_a_graph_break_gives_several_graphs_and_the_one_with_chains_is_shown(broken_report):
    assert [len(graph.chains) for graph in broken_report.graphs] == [0, 1]
    assert broken_report.graph_before is broken_report.graphs[1].before
    assert broken_report.graph_after is broken_report.graphs[1].after
    assert "traced in 2 pieces" in str(broken_report)
    (note,) = (note for note in broken_report.notes if note.startswith("The graph breaks at "))
    assert "test_explain.py" in note and "torch._dynamo.graph_break()" in note


# -- text, data, page -------------------------------------------------------------------------------------------


def test_the_text_names_the_users_own_line(mlp_report):
    code = Path(small.__file__).read_text().splitlines()
    line = code.index("        return x + self.down(torch.relu(self.up(self.norm(x))))") + 1
    text = str(mlp_report)
    assert re.search(rf"\bsmall.py:{line}\n\s+return x \+ self\.down\(", text)
    assert "1 chain in 1 joint graph: 1 rewritten, 0 declined" in text


def test_the_whole_model_comes_before_its_chains(mlp_report):
    lines = str(mlp_report).splitlines()
    assert lines[1].split(maxsplit=1) == ["chains", f"1 rewritten ({DEPTH} links), 0 declined"]
    assert lines[2].split(maxsplit=1) == ["gradients", "approximate, k = 1"]
    assert lines[3].startswith("  speed       estimated") and "memory      at most" in str(mlp_report)
    assert lines.index("") < next(i for i, line in enumerate(lines) if "chain 1:" in line)


def test_a_model_of_which_nothing_is_rewritten_is_called_exact(tanh_report):
    assert summary.rows(tanh_report) == [("gradients", "exact"), ("speed", "unchanged: no chain is rewritten")]


def test_auto_says_how_good_a_gradient_has_to_be():
    report = explain(mlp(), x(), options={"rewrite": "always", "target_cosine": 0.95, "check_every": 7})
    gradients = dict(summary.rows(report))["gradients"]
    assert "at least 0.95, checked every 7 steps" in gradients


def test_damping_and_segments_stand_with_the_gradients():
    report = explain(mlp(), x(), options={**ALWAYS, "iterations": 0, "segment": DEPTH - 1, "damping": 0.2})
    assert dict(summary.rows(report))["gradients"] == f"approximate, k = 0, S = {DEPTH - 1}, damping 0.2"


@pytest.fixture(scope="module")
def four_alike():
    """Two layers (the second has twice as many inputs) and two directions."""
    model = nn.GRU(2, WIDTH, num_layers=2, bidirectional=True)
    return explain(model, torch.randn(6, 3, 2), options=ALWAYS)


def test_chains_that_differ_in_layer_and_direction_are_one_entry(four_alike):
    text = str(four_alike)
    assert "  4 chains alike (1 to 4): 6 links each, rewritten\n    module      " in text
    assert text.count("module ") == 1 and "layers 0 and 1, both directions" in text
    assert len(four_alike.chains) == len(four_alike.to_dict()["chains"]) == 4


def test_alike_chains_tell_the_sum_of_their_estimates_and_the_most_memory(four_alike):
    (entry,) = entries_of(four_alike.chains, 0)
    chains = four_alike.chains
    assert entry.record.estimate.substitution == pytest.approx(sum(c.estimate.substitution for c in chains))
    assert entry.record.added_bytes == max(c.added_bytes for c in chains)
    assert f"{entry.record.estimate}, all 4 together" in entry.record.reason
    assert str(chains[0].estimate) in chains[0].reason  # the chains' own records stay


@pytest.mark.parametrize(
    "change",
    [
        {"length": 4}, {"decision": "declined"}, {"multiplier": "mask"}, {"side_losses": [0]}, {"iterations": 2},
        {"segment": 2}, {"reason": "another"}, {"sources": ["model.py:2: h = g(h)"]}, {"failed": True},
        {"groups": [GroupRecord(3, {"mm": 2}, "1")]},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_chains_that_differ_in_anything_else_are_entries_of_their_own(change):
    first = ChainRecord(
        3, "rewritten", "why", "1", [GroupRecord(3, {"mm": 1}, "1")], module="a", iterations=1, segment=1
    )
    other = dataclasses.replace(first, module="b")
    assert [entry.numbers for entry in entries_of([first, other], 4)] == ["5 and 6"]
    assert [entry.numbers for entry in entries_of([first, dataclasses.replace(other, **change)], 4)] == ["5", "6"]


def test_names_of_alike_modules_are_put_together():
    assert doctest.testmod(alike).failed == 0 and doctest.testmod(summary).failed == 0
    assert alike.together(f"cells.{i}" for i in range(9)) == "cells.0, cells.1, cells.2, cells.3, cells.4 and 4 more"
    assert alike.together(["r layer 0", "r layer 1", "r layer 2"]) == "r layers 0 to 2"
    assert alike.together(["r layer 0 reverse", "s layer 0"]) == "r layer 0 reverse and s layer 0"
    assert alike.together(["cell", "cell"]) == "cell"


def test_the_text_fits_a_terminal(mlp_report, tanh_report, broken_report):
    for report in (mlp_report, tanh_report, broken_report):
        assert max(map(len, str(report).splitlines())) <= 100


def test_the_data_are_plain(broken_report):
    data = broken_report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["options"]["iterations"] == 1
    (chain,) = data["chains"]
    assert (chain["graph"], chain["length"], chain["multiplier"]) == (1, DEPTH, "1")
    assert chain["groups"][0]["links"] == DEPTH and chain["estimate"]["copied_bytes"] > 0
    assert [graph["nodes_after"] == graph["nodes_before"] for graph in data["graphs"]] == [True, False]


def test_the_page_is_one_file_with_the_text_and_all_graphs(broken_report, tmp_path):
    broken_report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1 chain in 2 joint graphs" in page and page.count('<details class="graph">') == 4
    assert "linear_scan" in page
    assert "=&#34;always&#34;" in page  # escaped
    assert re.findall(r"(?:src|href)=[^ >]*|url\(|@import|https?:", page) == ['href="data:,"']


# -- what it is given -------------------------------------------------------------------------------------------


def test_options_are_refused_before_the_model_is_called():
    with pytest.raises(OptionError, match="iterations"):
        explain(lambda: pytest.fail("called"), options={"iterations": -1})


def test_the_users_own_joint_pass_sees_the_graph_first():
    def mine(graph):
        for node in graph.nodes:
            if node.op == "call_function":
                node.meta["mine"] = True

    report = explain(nn.Linear(2, 2), torch.ones(1, 2), options={"joint_custom_pre_pass": mine})
    assert any(node.meta.get("mine") for node in report.graph_before.graph.nodes)


def test_functions_and_keyword_arguments():
    weight = torch.ones(2, requires_grad=True)
    report = explain(lambda x, *, scale: (x * weight).sin() * scale, torch.ones(3, 2), scale=2.0)
    assert len(report.graphs) == 1


def test_a_compiled_model_is_the_same_model():
    model = torch.compile(PreNorm(), backend="eager")
    assert len(explain(model, x()).graphs) == 1


def test_a_model_compiled_in_place_stays_so():
    counter, model = CompileCounter(), PreNorm()
    model.compile(backend=counter)
    assert len(explain(model, x()).graphs) == 1
    model(x())
    assert counter.frame_count == 1


def test_without_gradients_there_is_no_graph_and_the_report_says_why():
    model = nn.Linear(2, 2).eval()
    with torch.no_grad():
        report = explain(model, torch.ones(1, 2))
    assert report.graph_before is report.graph_after is None and report.chains == []
    assert "torch.no_grad" in str(report)
    assert len(explain(model, torch.ones(1, 2)).graphs) == 1  # eval mode alone changes nothing
    (note,) = explain(model.requires_grad_(False), torch.ones(1, 2)).notes
    assert "requires a gradient" in note


def test_without_any_graph_the_report_says_so():
    hidden = torch._dynamo.disable(nn.Linear(2, 2))
    report = explain(lambda x: hidden(x), torch.ones(1, 2))
    assert report.graphs == [] and "found no graph" in str(report)


def test_the_loss_must_be_one_number_that_wants_a_gradient():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"shape \(1, 2\); it must be one number: reduce it"):
        explain(model, torch.ones(1, 2), loss=lambda output: output)
    report = explain(model, torch.ones(1, 2), loss=lambda output: output.detach().sum())
    assert "does not depend on anything" in str(report)
    assert explain(model, torch.ones(1, 2), loss=torch.sum).notes == []


# -- what it leaves behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_function", [False, True])
def test_the_model_its_inputs_and_the_random_numbers_are_left_as_they_were(as_function):
    model, given = Small(), x()
    grad = torch.ones(WIDTH, WIDTH)
    model.linear.weight.grad = grad
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def loss(output):
        return output.sum() * (random.random() + np.random.rand())

    explain((lambda x: model(x)) if as_function else model, given, loss=loss)
    if as_function:  # explain cannot see the module of a function, only what enters a graph
        before = {name: found for name, found in before.items() if "calls" not in name and "eager" not in name}
    after = model.state_dict(keep_vars=True)
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value), name
    assert model.linear.weight.grad is grad and torch.equal(grad, torch.ones(WIDTH, WIDTH))
    assert model.linear.bias.grad is None
    assert torch.equal(given, x())
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    assert np.array_equal(np.random.get_state()[1], numpy_state[1]) and np.random.get_state()[2] == numpy_state[2]


def test_a_model_that_raises_is_left_as_it_was_too():
    model = Small()
    with pytest.raises(ZeroDivisionError):
        explain(model, x(), loss=lambda output: 1 / 0)
    assert model.calls == 0 and model.norm.num_batches_tracked == 0


def test_compilations_of_the_users_are_neither_dropped_nor_made_dynamic():
    counter = CompileCounter()
    model = nn.Linear(WIDTH, WIDTH)
    step = torch.compile(model, backend=counter)
    step(torch.ones(2, WIDTH))
    for batch in range(3, 13):  # more often than Dynamo compiles one function
        report = explain(model, torch.ones(batch, WIDTH))
        sizes = report.graph_before.graph.find_nodes(op="placeholder")[-1].meta["val"].shape
        assert [(type(size), size) for size in sizes] == [(int, batch), (int, WIDTH)]
    step(torch.ones(2, WIDTH))
    assert counter.frame_count == 1
    step(torch.ones(20, WIDTH))
    assert counter.frame_count == 2  # as before: Dynamo has not given up on the function


def test_a_dynamic_batch_is_told_of_in_numbers_like_any_other():
    torch._dynamo.mark_dynamic(dynamic := torch.ones(3, WIDTH), 0)
    found, expected = (explain(mlp(), batch, options=ALWAYS) for batch in (dynamic, torch.ones(3, WIDTH)))
    inputs = found.graph_before.graph.find_nodes(op="placeholder")
    assert any(isinstance(node.meta["val"], torch.SymInt) for node in inputs)
    assert json.dumps(found.to_dict()["chains"]) == json.dumps(expected.to_dict()["chains"])
    assert str(found).partition("chain 1")[2] == str(expected).partition("chain 1")[2]


def test_an_output_without_a_gradient_is_not_put_down_to_the_parameters_alone():
    report = explain(lambda x: mlp()(x).argmax(-1), torch.ones(2, WIDTH))
    (note,) = report.notes
    assert "or the output carries none" in note


class AddsOnALineOfItsOwn(nn.Module):
    """Autograd keeps a copy of a ReLU's result, and that copy leads to no addition."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        residual = torch.relu(self.linear(x))
        return x + residual


@pytest.mark.parametrize("min_length", [4, 9])
def test_the_line_told_is_the_one_that_adds(min_length):
    model = nn.Sequential(*(AddsOnALineOfItsOwn() for _ in range(DEPTH)))
    (chain,) = explain(model, x(), options={**ALWAYS, "min_length": min_length}).chains
    assert chain.source.endswith("return x + residual") and chain.module == "0..4"


class WithAPenalty(nn.Module):
    """A block whose last computed value is a side output."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        gates = self.parts[0](x).softmax(-1)
        out = gates[:, :1] * torch.relu(x) + gates[:, 1:2] * self.parts[1](x)
        return x + out, gates.mean()


class PenaltyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WithAPenalty() for _ in range(DEPTH))

    def forward(self, x):
        total = 0.0
        for block in self.blocks:
            x, penalty = block(x)
            total = total + penalty
        return x.sum() + total


def test_the_line_told_is_the_one_that_adds_to_the_state():
    (chain,) = explain(PenaltyModel(), x().requires_grad_(), options=ALWAYS).chains
    assert chain.source.endswith("return x + out, gates.mean()")


def test_a_module_compiled_before_has_its_own_names():
    (chain,) = explain(torch.compile(mlp(), dynamic=True), x(), options=ALWAYS).chains
    assert chain.module == "0..4"


class ByParity(nn.Module):
    """Two kinds of blocks on one line."""

    def __init__(self):
        super().__init__()
        self.wide = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 6), nn.ReLU(), nn.Linear(6, WIDTH)) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        for block in (*self.wide, *self.narrow):
            x = x + block(x)
        return x


def test_groups_of_one_line_are_told_apart_by_their_modules():
    text = str(explain(ByParity(), torch.ones(2, WIDTH, requires_grad=True), options=ALWAYS))
    assert "(wide.0..wide.1)" in text and "(narrow.0..narrow.1)" in text


def test_links_that_stay_one_after_another_are_not_said_to_be_at_once():
    assert "links alike" in str(explain(mlp(), x(), options={**ALWAYS, "iterations": "exact"}))
    assert "links at once" in str(explain(mlp(), x(), options=ALWAYS))


def test_an_error_that_overflows_is_null_in_json():
    report = explain(mlp(), x(), options=ALWAYS, errors=[0])
    report.graphs[0].errors[0].cosine = float("nan")
    (error,) = json.loads(json.dumps(report.to_dict(), allow_nan=False))["graphs"][0]["errors"]
    assert error["cosine"] is None and error["relative_error"] > 0


def test_nothing_is_counted():
    explain(nn.Linear(2, 2), torch.ones(1, 2))
    assert set(hwbp_compiler.counters().values()) == {0}


# -- failures ---------------------------------------------------------------------------------------------------


@pytest.fixture
def broken_pass(monkeypatch):
    def run(graph, options, watcher):
        raise KeyError("a broken step")

    monkeypatch.setattr(passes, "run", run)


def test_a_failing_pass_is_told(broken_pass):
    report = explain(nn.Linear(2, 2), torch.ones(1, 2))
    assert report.graphs[0].failure == report.to_dict()["graphs"][0]["failure"] == "KeyError: 'a broken step'"
    assert "a broken step" in str(report)


def test_a_failing_pass_raises_where_strict(broken_pass):
    with pytest.raises(HighwayError, match="a broken step"):
        explain(nn.Linear(2, 2), torch.ones(1, 2), options={"strict": True})


def test_a_chain_on_which_a_pass_failed_is_told_from_one_that_was_declined(monkeypatch):
    monkeypatch.setattr(passes, "run", lambda *args: [ChainRecord(4, "declined", "KeyError: 1", failed=True)])
    assert "4 links, unchanged: a pass failed" in str(explain(nn.Linear(2, 2), torch.ones(1, 2)))


# -- drawings, repro script, measurements -----------------------------------------------------------------------


def test_a_repro_script_stands_alone_and_compares_gradients(mlp_report, tmp_path):
    script = tmp_path / "repro.py"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mlp_report.save_repro(script)
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"k = (\d+): relative error (\S+) \(5 links rewritten\)", done.stdout)
    errors = {int(k): float(error) for k, error in lines}
    assert set(errors) == {0, 1, DEPTH - 1}
    # All parameters are inside the links, whose own gradients are exact with L - 1 iterations.
    assert errors[0] > errors[1] > 1e-3 and errors[DEPTH - 1] < 1e-5


def test_a_repro_script_of_a_model_that_draws_random_numbers(tmp_path):
    """Forward and backward are one graph, so the dropout masks are the same in every run; only k makes a difference."""
    blocks = nn.Sequential(*(nn.Sequential(PreNorm(), nn.Dropout(0.5)) for _ in range(4)))
    explain(blocks, x(), options=ALWAYS).save_repro(tmp_path / "repro.py")
    found = runpy.run_path(str(tmp_path / "repro.py"))
    first, second = (found["gradients"](found["joint_graph"]()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any("rand" in str(node.target) for node in found["joint_graph"]().graph.nodes)


def test_drawings(mlp_report, tmp_path):
    pytest.importorskip("pydot")
    mlp_report.draw(tmp_path / "before.dot", after=False)
    assert "linear_scan" not in (tmp_path / "before.dot").read_text()
    mlp_report.draw(tmp_path / "after.dot")
    assert "linear_scan" in (tmp_path / "after.dot").read_text()


def test_pictures(mlp_report, tmp_path):
    pytest.importorskip("pydot")
    if shutil.which("dot") is None:
        pytest.skip("graphviz's program `dot` is not on the PATH (apt-get install graphviz)")
    mlp_report.draw(tmp_path / "after.svg")
    assert "<svg" in (tmp_path / "after.svg").read_text()
    mlp_report.draw(tmp_path / "after.png")
    assert (tmp_path / "after.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_graphviz_is_asked_for_the_picture(mlp_report, tmp_path, monkeypatch, suffix):
    """A program that records its arguments replaces graphviz."""
    pytest.importorskip("pydot")
    stub = tmp_path / "dot"
    stub.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho a picture\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    mlp_report.draw(tmp_path / f"after.{suffix}")
    assert f"-T{suffix}" in (tmp_path / "asked").read_text()
    assert (tmp_path / f"after.{suffix}").read_text() == "a picture\n"


def test_drawings_say_what_is_missing(mlp_report, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'.pdf'; it must end in one of .dot, .svg, .png"):
        mlp_report.draw(tmp_path / "a.pdf")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="graphviz"):
        mlp_report.draw(tmp_path / "a.svg")
    monkeypatch.setitem(sys.modules, "pydot", None)
    with pytest.raises(ImportError, match="pip install pydot"):
        mlp_report.draw(tmp_path / "a.dot")
    nothing = explain(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))
    with pytest.raises(ValueError, match="no joint graph"):
        nothing.draw(tmp_path / "a.dot")
    with pytest.raises(ValueError, match="no joint graph"):
        nothing.save_repro(tmp_path / "a.py")


def truncated_error(model, given, k, segment=1):
    """The relative error of w^k over all parameters, from the oracle: ``x + hold(branch(x))`` link by link."""

    def link(block):
        def step(state, side, hold):
            (h,) = state
            return (h + hold(block.down(torch.relu(block.up(block.norm(h))))),), ()

        return Link(step)

    program = Program(dict(model.named_parameters()), lambda run, h: run([link(b) for b in model], (h,)).states[-1][0])
    gradients = (reference_gradients(program, (given,), torch.sum, n, segment=segment)[1] for n in ("exact", k))
    exact, found = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in gradients)
    return float((found - exact).norm() / exact.norm())


def test_the_error_of_w_k_is_the_oracles():
    model, given = mlp().double(), x().double()
    report = explain(model, given, options=ALWAYS, errors=[0, 2, DEPTH - 1])
    errors = {error.iterations: error.relative_error for error in report.graphs[0].errors}
    assert set(errors) == {0, 2, DEPTH - 1}
    for k in (0, 2):
        assert errors[k] == pytest.approx(truncated_error(model, given, k), rel=1e-6)
    assert errors[DEPTH - 1] < 1e-12
    assert "k = 2   cosine" in str(report) and report.to_dict()["graphs"][0]["errors"][0]["iterations"] == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_error_of_a_graph_that_runs_twice_is_that_of_its_last_run():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stacks = nn.ModuleList(Stack(mlp()) for _ in range(2))

        def forward(self, x):
            for stack in self.stacks:
                torch._dynamo.graph_break()
                x = stack(x)
            return x

    class Stack(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return self.layers(x)

    model, given = Twice().double(), x().double().requires_grad_()
    (graph,) = (graph for graph in explain(model, given, options=ALWAYS, errors=[0]).graphs if graph.chains)
    between = model.stacks[0](given).detach()
    expected = truncated_error(model.stacks[1].layers, between, 0)
    assert graph.errors[0].relative_error == pytest.approx(expected, rel=1e-6)


def test_with_segments_the_error_is_told_for_k_and_s():
    model, given = mlp().double(), x().double()
    report = explain(model, given, options={**ALWAYS, "iterations": 0}, errors=[1, (0, 2), (1, 2), (DEPTH - 1, 1)])
    errors = {(error.iterations, error.segment): error.relative_error for error in report.graphs[0].errors}
    assert set(errors) == {(1, 1), (0, 2), (1, 2), (DEPTH - 1, 1)}
    for k, size in errors:
        expected = truncated_error(model, given, k, size)
        assert errors[k, size] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert "S = 2    k = 0   cosine" in str(report)


def test_segments_and_the_depth_are_told():
    report = explain(mlp(), x(), options={**ALWAYS, "iterations": 0, "segment": DEPTH - 1})
    (chain,) = report.chains
    size, rest = DEPTH - 1, 1
    assert (chain.segments, chain.depth) == (2, (DEPTH, size))
    told = " ".join(str(report).split())
    assert f"segments C = 2, S = {size} links; the one next to the input has {rest} depth" in told
    assert f"depth {DEPTH} blocks one after the other before, {size} now (1 run of {size} steps), and 1 scan" in told
    (data,) = report.to_dict()["chains"]
    assert (data["segment"], data["segments"], data["depth"]) == (size, 2, [DEPTH, size])


def test_what_is_not_rewritten_has_the_depth_of_ordinary_backprop():
    report = explain(mlp(), x(), options={"iterations": "exact"})
    assert report.chains[0].depth == (DEPTH, DEPTH) and "depth" not in str(report)


def test_without_being_asked_nothing_is_measured(mlp_report):
    assert mlp_report.measured is None and mlp_report.graphs[0].errors == []


@pytest.mark.slow
def test_a_measured_step_takes_time_and_leaves_the_model_alone():
    model = mlp()
    report = explain(model, x(), options=ALWAYS, measure=True)
    assert 0 < report.measured.inductor < 1 and 0 < report.measured.highway < 1
    assert "a training step takes" in str(report)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modules_and_all_lines_are_told(mlp_report):
    (chain,) = mlp_report.chains
    assert chain.module == f"0..{DEPTH - 1}" and chain.modules == [str(i) for i in range(DEPTH)]
    assert chain.sources == [chain.source] and chain.source.endswith("x + self.down(torch.relu(self.up(self.norm(x))))")
    assert chain.groups[0].batched and chain.added_bytes > 0


@pytest.mark.parametrize("keys", [["a b", "c-d", "é"], ["it's", 'say "x"', "a[0]"], ["]", "L['self']", "@3"]])
def test_keys_of_a_module_dict_are_told_as_they_are(keys):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({key: PreNorm() for key in keys})

        def forward(self, x):
            for block in self.blocks.values():
                x = block(x)
            return x

    report = explain(Named(), x(), options={**ALWAYS, "min_length": 3})
    (chain,) = report.chains
    assert chain.module == f"blocks.{keys[0]}..blocks.{keys[-1]}"
    ((programs,),) = report.graphs[0].programs
    assert any(f"blocks.{key}.up.weight" in programs.before for key in keys)


def test_the_programs_of_a_block_name_its_weights(mlp_report):
    (block,) = mlp_report.graphs[0].programs[0]
    assert block.forward[-1].endswith("return x + self.down(torch.relu(self.up(self.norm(x))))")
    assert re.search(r"mm\(\w+, \d\.down\.weight", block.before) and "bmm" not in block.before
    assert "# iteration 1" in block.after and "bmm" in block.after
    assert "linear_scan" in mlp_report.graphs[0].rest[0]


def test_a_terminal_of_any_width(mlp_report, monkeypatch):
    for columns in (36, 40, 59, 70):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = str(mlp_report).splitlines()
        assert max(map(len, lines)) <= columns
        # Every word is present, unless it is longer than a line.
        assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", plain(mlp_report, 100))


def test_rich_prints_the_same_text(mlp_report, capsys):
    rich = pytest.importorskip("rich.console")
    rich.Console(width=100, force_terminal=True, file=(out := io.StringIO())).print(mlp_report)
    assert re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).split() == str(mlp_report).split()
    green = re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", out.getvalue())
    assert green == ["rewritten"]  # of the chain, not of the estimate
