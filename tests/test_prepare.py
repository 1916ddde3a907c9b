"""Claims about ``prepare``: all tools that look at a model see the graph that is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hwbp_compiler
from hwbp_compiler import backend, generate, testing
from hwbp_compiler.passes import write_out_cells
from hwbp_compiler.report import explaining
from hwbp_compiler.testing import capture as testing_capture

LENGTH, BATCH, WIDTH = 6, 2, 3
OPTIONS = {"rewrite": "always", "iterations": 2, "min_length": 3, "strict": True}


class Everything(nn.Module):
    """A recurrent module, a loop of ``recurrent`` with its own options and one without, and a fused cell."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2)
        self.cell = nn.LSTMCell(WIDTH, WIDTH)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        def step(x_t, h):
            h = 0.9 * h + 0.1 * torch.tanh(x_t + h @ self.weight)
            return h, h

        x, _ = self.gru(x)
        x, _ = hwbp_compiler.recurrent(step, x, torch.zeros_like(x[0]))
        x, _ = hwbp_compiler.recurrent(step, x, torch.zeros_like(x[0]), options={"iterations": 1})
        return self.cell(x[0], (x[1], x[2]))[0]


def model_and_input():
    torch.manual_seed(0)
    return Everything(), torch.randn(LENGTH, BATCH, WIDTH)


@pytest.fixture
def prepared(monkeypatch):
    """The final graph of each caller: Dynamo may call twice."""
    seen = {}

    def watched(caller, real):
        def prepare(gm, *args, **kwargs):
            found = real(gm, *args, **kwargs)
            parts = [part for part in gm.modules() if isinstance(part, torch.fx.GraphModule)]
            decided = [(r.length, r.decision) for r in found.records]
            seen[caller] = [str(part.graph) for part in parts] + decided
            return found

        return prepare

    for module in (backend, explaining, generate, testing_capture):
        monkeypatch.setattr(module, "prepare", watched(module.__name__, module.prepare))
    monkeypatch.setattr(write_out_cells, "_is_fused", lambda node: True)  # as on a GPU
    return seen


def test_all_who_look_see_the_graph_that_is_compiled(prepared):
    model, x = model_and_input()
    torch.compile(model, backend="highway", options=OPTIONS)(x)
    hwbp_compiler.explain(model, x, options=OPTIONS)
    hwbp_compiler.generate_code(model, x, options=OPTIONS)
    ours = testing_capture.options(iterations=2, min_length=3)
    testing_capture.capture(model, (x,), testing.probe_loss).gradients(ours)
    captured = prepared.pop(testing_capture.__name__)
    torch._dynamo.reset()
    torch.compile(model, backend=testing_capture.eager_highway(ours))(x)
    compiled, *others = prepared.values()
    assert len(others) == 3 and all(other == compiled for other in (captured, *others))
    text = "\n".join(map(str, compiled))
    assert "highway.recurrent_module" in text and "highway_recurrence_1" in text and "lstm_cell" not in text


def test_generate_code_tells_of_loops_and_counts_nothing():
    model, x = model_and_input()
    expected = hwbp_compiler.explain(model, x, options=OPTIONS).chains
    before = hwbp_compiler.counters()
    code = hwbp_compiler.generate_code(model, x, options=OPTIONS)
    assert hwbp_compiler.counters() == before
    described = lambda chains: [(c.length, c.decision, c.reason) for c in chains]  # noqa: E731
    assert described(code.chains) == described(expected) and len(code.chains) == 4


@pytest.mark.parametrize("iterations", [0, 1])
def test_captured_loops_follow_the_options_that_gradients_are_asked_for(iterations):
    model, x = model_and_input()
    model, x = model.double(), x.double()
    captured = testing_capture.capture(model, (x,), testing.probe_loss)
    for k in (iterations, LENGTH, iterations):
        found = captured.gradients(testing_capture.options(iterations=k))[1]
        model.zero_grad()
        compiled = torch.compile(model, backend=testing_capture.eager_highway(testing_capture.options(iterations=k)))
        testing.probe_loss(compiled(x)).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-14)
