"""What PyTorch's own tools show about the passes: the structured trace, counters, compile times, switches."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from small import Residual
from torch import nn
from torch._dynamo.utils import compile_times, counters
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import compile_fx

import hwbp_compiler
from hwbp_compiler import backend

ALWAYS = {"iterations": 1, "rewrite": "always"}


@pytest.fixture
def no_code(monkeypatch):
    """Run Inductor's graphs without generating code, which saves seconds per test."""

    def compile_(gm, inputs, patches, inner_compile=None):
        def inner(module, example_inputs, **kwargs):
            return make_boxed_func(module.forward)

        return compile_fx(gm, inputs, inner_compile=inner, config_patches=dict(patches))

    monkeypatch.setattr(backend, "compile_fx", compile_)


def train():
    model = nn.Sequential(*(Residual() for _ in range(5)))
    torch.compile(model, backend="highway", options=ALWAYS)(torch.ones(2, 4)).sum().backward()
    return model


def test_dynamos_counters_have_a_section_of_ours(no_code):
    train()
    assert counters["highway"]["chains_rewritten"] == 1


def test_the_pass_and_its_steps_are_among_the_compile_times(no_code):
    train()
    names, _ = compile_times(repr="csv")
    assert {"pass.highway", "pass.highway.find_chains", "pass.highway.rewrite"} <= set(names)


def test_the_pass_can_be_switched_off_by_name(no_code):
    with inductor_config.patch(disabled_passes="highway"):
        train()
    assert counters["highway"]["chains_rewritten"] == counters["highway"]["failures"] == 0


def test_the_pass_can_be_followed_node_by_node(no_code):
    """Provenance tracking hooks into every node that a pass creates."""
    with inductor_config.patch({"trace.provenance_tracking_level": 1}):
        train()
    assert counters["highway"]["chains_rewritten"] == 1 and counters["highway"]["failures"] == 0


def test_the_debug_log_holds_the_report(no_code, caplog):
    with caplog.at_level(logging.DEBUG, logger="hwbp_compiler"):
        train()
    assert "chain of 5 links rewritten" in caplog.text
    assert "[0..4; " in caplog.text and "return x + self.block(x)]" in caplog.text


def test_the_debug_log_tells_of_the_loops_of_a_graph_too(no_code, caplog):
    cell = nn.GRUCell(3, 4)

    def step(x, h):
        h = cell(x, h)
        return h, h

    model = torch.compile(
        lambda x: hwbp_compiler.recurrent(step, x, torch.zeros(2, 4))[0], backend="highway", options=ALWAYS
    )
    with caplog.at_level(logging.DEBUG, logger="hwbp_compiler"):
        model(torch.ones(7, 2, 3)).sum().backward()
    assert "chain 1: 7 links, rewritten" in caplog.text and "gradients of this graph are exact" not in caplog.text


def test_a_log_of_a_dynamic_batch_holds_the_report_and_ties_the_graph_to_no_size(no_code, caplog):
    model = nn.Sequential(*(Residual() for _ in range(5)))
    compiled = torch.compile(model, backend="highway", options=ALWAYS, dynamic=True)
    with caplog.at_level(logging.DEBUG, logger="hwbp_compiler"):
        for batch in (3, 400):  # sizes reported in kB, and in MB
            compiled(torch.ones(batch, 4)).sum().backward()
    assert "not shown" not in caplog.text and "kB more at a time" in caplog.text
    assert counters["highway"]["graphs_seen"] == 1


def test_dynamos_own_explain_is_still_fine(no_code):
    found = torch._dynamo.explain(train())(torch.ones(2, 4))
    assert found.graph_count == 1 and found.graph_break_count == 0


TRACED = """
import torch
from torch import nn
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from hwbp_compiler import backend

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.relu(self.linear(x))

def inner(module, example_inputs, **kwargs):
    return make_boxed_func(module.forward)

backend.compile_fx = lambda gm, inputs, patches: compile_fx(
    gm, inputs, inner_compile=inner, config_patches=dict(patches))
model = nn.Sequential(*(Block() for _ in range(5)))
options = {"iterations": 1, "rewrite": "always", "fx_graph_cache": False}
torch.compile(model, backend="highway", options=options)(torch.ones(2, 4)).sum().backward()
"""


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """The structured trace of one compilation."""
    folder = tmp_path_factory.mktemp("trace")
    script = folder / "train.py"
    script.write_text(TRACED)
    environment = {**os.environ, "TORCH_TRACE": str(folder / "trace"), "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (log,) = (folder / "trace").glob("*.log")
    return log


def test_the_structured_trace_holds_both_graphs_and_the_report(trace):
    artifacts: dict[str, list[str]] = {}
    current: list[str] = []
    for line in trace.read_text().splitlines():
        if line.startswith("\t"):
            current.append(line)
            continue
        entry = json.loads(line[line.index("{") :])
        current = artifacts.setdefault(entry.get("artifact", {}).get("name", ""), [])
    before, after, report = (
        "\n".join(artifacts[f"highway_{name}"]) for name in ("joint_graph_before", "joint_graph_after", "report")
    )
    assert "linear_scan" not in before and "tangents_1" in before
    assert "linear_scan" in after
    assert "chain 1: 5 links, rewritten" in report


def test_tlparse_shows_them(trace, tmp_path):
    tlparse = shutil.which("tlparse", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if tlparse is None:
        pytest.skip("tlparse is not installed")
    done = subprocess.run(
        [tlparse, trace, "--no-browser", "-o", tmp_path / "out", "--overwrite"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "highway_report" in (tmp_path / "out" / "index.html").read_text()


NO_RICH = """
import sys
sys.modules["rich"] = None
import torch
from torch import nn
from hwbp_compiler import explain
from hwbp_compiler.report import text

class Terminal:
    isatty = lambda self: True
    def __getattr__(self, name):
        return getattr(sys.__stdout__, name)

sys.stdout = Terminal()
report = explain(nn.Linear(2, 2), torch.ones(1, 2))
text.show(report)
print("-- and", str(report) != "")
"""


def test_rich_is_optional():
    """Without rich, the same text is printed plain, in a terminal too."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run([sys.executable, "-c", NO_RICH], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 chains in 1 joint graph") and done.stdout.endswith("-- and True\n")
    assert "\x1b" not in done.stdout
