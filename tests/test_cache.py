"""Another process finds compiled graphs in the cache, but only if nothing that matters has changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# A residual chain that is rewritten whenever possible and that calls the scan operator: its multipliers are masks. The
# process that finds it in the cache must know the operator although no pass runs there.
TRAIN = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters

class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for block in self.blocks:
            x = torch.relu(x + torch.tanh(block(x)))
        return x

torch.manual_seed(0)
model = Chain()
options = {"rewrite": "always", "iterations": json.loads(sys.argv[1])}
torch.compile(model, backend="highway", options=options)(torch.randn(3, 4)).square().sum().backward()
print("RESULT", json.dumps({
    "gradient": b"".join(p.grad.numpy().tobytes() for p in model.parameters()).hex(),
    "aot": dict(counters["aot_autograd"]),
    "inductor": dict(counters["inductor"]),
    "highway": dict(counters["highway"]),
}))
"""


def train(iterations: int | str, cache_dir) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, json.dumps(iterations)],
        cwd=cache_dir,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache_dir), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


REWRITE = """
import hashlib, torch
from torch import nn
from hwbp_compiler import explain

class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(3, 4)

    def forward(self, x):
        state = x.new_zeros(2, 4), x.new_zeros(2, 4)
        for x_t in x:
            state = self.cell(x_t, state)
        return state[0]

report = explain(Loop(), torch.ones(6, 2, 3), options={"rewrite": "always", "iterations": 1})
assert report.chains[0].decision == "rewritten"
print("RESULT", hashlib.md5(report.graph_after.print_readable(print_output=False).encode()).hexdigest())
"""


def test_every_process_emits_the_same_graph():
    """Inductor's cache key is the rewritten graph, and a different order of operations rounds differently."""
    found = set()
    for seed in "123":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", REWRITE], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        found |= {line for line in done.stdout.splitlines() if line.startswith("RESULT ")}
    assert len(found) == 1


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict]:
    """Three processes, one after another, over one fresh cache directory."""
    cache_dir = tmp_path_factory.mktemp("cache")
    return {
        "first": train(2, cache_dir),
        "again": train(2, cache_dir),
        "other": train(1, cache_dir),
    }


@pytest.mark.parametrize("first", ["first", "other"])
def test_the_first_process_with_some_options_finds_nothing(runs, first):
    assert runs[first]["aot"]["autograd_cache_miss"] == 1
    assert runs[first]["aot"]["autograd_cache_saved"] == 1
    assert "autograd_cache_hit" not in runs[first]["aot"]
    assert runs[first]["highway"]["graphs_seen"] == 1


def test_the_second_process_finds_forward_and_backward_and_runs_no_pass(runs):
    assert runs["again"]["aot"]["autograd_cache_hit"] == 1
    assert "autograd_cache_miss" not in runs["again"]["aot"]
    assert "autograd_cache_bypass" not in runs["again"]["aot"]
    assert runs["again"]["inductor"]["fxgraph_cache_hit"] == 2
    assert runs["again"]["highway"] == {}


def test_gradients_from_the_cache_are_the_same_bit_for_bit(runs):
    assert runs["first"]["gradient"] == runs["again"]["gradient"]


def test_another_number_of_iterations_gives_other_gradients(runs):
    assert runs["first"]["highway"]["chains_rewritten"] == runs["other"]["highway"]["chains_rewritten"] == 1
    assert runs["first"]["gradient"] != runs["other"]["gradient"]
