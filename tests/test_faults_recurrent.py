"""Loops over time whose sizes are expressions, and loops whose rolled form fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import hwbp_compiler
from hwbp_compiler import HighwayError, backend, joint_pass, recurrent
from hwbp_compiler.options import parse
from hwbp_compiler.rolled import chain, loop, recurrence
from hwbp_compiler.rolled.recurrence import Recurrence
from hwbp_compiler.rolled.replace_loops import replace_loops
from hwbp_compiler.testing.compare import assert_gradients_close
from hwbp_compiler.torch_private import SERVES

LENGTH = 6
OPTIONS = {"iterations": 2, "rewrite": "always", "min_length": 2}


def weight(*shape):
    return torch.randn(*shape, dtype=torch.float64).mul(0.4).requires_grad_()


def lstm(w, u):
    def cell(x, state):
        h, c = state
        i, f, g, o = (x @ w + h @ u).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, (h, c)

    return cell


def peephole(w, u, v):
    def cell(x, state):
        h, c = state
        p, q, r = v.chunk(3, -1)
        i, f, g, o = (x @ w + h @ u).chunk(4, -1)
        c = (f + p * c).sigmoid() * c + (i + q * c).sigmoid() * g.tanh()
        h = (o + r * c).sigmoid() * c.tanh()
        return h, (h, c)

    return cell


def two_gates(w, u):
    def cell(x, state):
        h, c = state
        f, g = (x @ w + h @ u).chunk(2, -1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
        return c.tanh(), (c.tanh(), c)

    return cell


def weights(cell, d):
    gates = 2 if cell is two_gates else 4
    return [weight(3, gates * d), weight(d, gates * d), *([weight(3 * d)] if cell is peephole else [])]


# Programs ``(run, x, *tensors) -> outputs``, and their tensors for a hidden size and a batch.


def functional(cell):
    """Weights are arguments, the first state is zero."""

    def program(run, x, *tensors):
        zero = x.new_zeros(x.shape[1], tensors[1].shape[0])
        return run(cell(*tensors), x, (zero, zero))[0]

    return program, lambda d, batch: [torch.randn(LENGTH, batch, 3, dtype=torch.float64), *weights(cell, d)]


def joined():
    """Inputs and state are concatenated before the loop. Their size is twice a size that the step does not see."""

    def program(run, x, z, w, u):
        state = torch.cat([z, z], -1)
        return run(lstm(w, u), torch.cat([x, x.sin()], -1), (state, state))[0]

    def tensors(d, batch):
        x = torch.randn(LENGTH, batch, d, dtype=torch.float64)
        return [x, weight(batch, d), weight(2 * d, 8 * d), weight(2 * d, 8 * d)]

    return program, tensors


def a_matrix():
    """The state is a matrix that is passed on flat: its length is a product."""

    def program(run, x, z, w):
        def cell(x, h):
            m = h.unflatten(-1, z.shape[1:])
            gate = (m @ w + x.unsqueeze(-1)).sigmoid()
            m = gate * m + (1 - gate) * (m @ w.T).tanh()
            return m.flatten(1), m.flatten(1)

        return run(cell, x, (z * 2).flatten(1))[0]

    def tensors(d, batch):
        return [torch.randn(LENGTH, batch, d, dtype=torch.float64), weight(batch, d, d + 2), weight(d + 2, d + 2)]

    return program, tensors


PROGRAMS = {
    "lstm": functional(lstm),
    "peephole": functional(peephole),
    "two gates": functional(two_gates),
    "joined": joined(),
    "a matrix": a_matrix(),
}


def in_a_loop(cell, inputs, state):
    outputs = []
    for x in inputs:
        output, state = cell(x, state)
        outputs.append(output)
    return torch.stack(outputs), state


def gradients(run, tensors):
    leaves = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(run(*tensors).square().sum(), leaves)
    return {str(i): g for i, g in enumerate(found)}


class Rolled:
    """A backend that puts only the rolled form into the graph, and runs it on the tensors themselves."""

    def __init__(self, **options):
        self.options, self.records = parse({**OPTIONS, **options})[0], []
        setattr(self, SERVES, True)

    def __call__(self, gm, inputs):
        for found in replace_loops(gm, self.options, lambda own: parse(own)[0]):
            self.records += found.records
        return gm


def one_by_one(code, slots, description, sizes):
    """Replaces a step that Inductor compiles."""
    step = loop._function_of(code)

    def run(arguments):
        for row, result in zip(arguments[:slots], step(None, *arguments[slots:], *sizes), strict=True):
            row.copy_(result)

    return loop._CompiledStep(run)


@pytest.fixture
def steps_are_not_compiled(monkeypatch):
    monkeypatch.setattr(loop, "_compiled", one_by_one)


def compiled(program, dynamic, **options):
    torch._dynamo.reset()
    rolled = Rolled(**options)
    return torch.compile(lambda *args: program(recurrent, *args), backend=rolled, dynamic=dynamic), rolled.records


@pytest.mark.usefixtures("steps_are_not_compiled")
@pytest.mark.parametrize("name", PROGRAMS)
def test_symbolic_sizes_have_the_gradients_and_the_highway_of_numbers(name):
    """Another hidden size and another batch run in the graph that was traced for the first."""
    program, tensors = PROGRAMS[name]
    given = tensors(5, 4), tensors(8, 2)  # equal sizes would become one symbol
    of_numbers, told = compiled(program, dynamic=False)
    expected = gradients(of_numbers, given[1])
    run, records = compiled(program, dynamic=True)
    gradients(run, given[0])
    assert_gradients_close(gradients(run, given[1]), expected, 1e-10, 1e-12)
    assert [(r.decision, r.multiplier) for r in records] == [(r.decision, r.multiplier) for r in told]
    assert records[0].decision == "rewritten"
    exact = gradients(lambda *args: program(in_a_loop, *args), given[1])
    assert max((expected[key] - exact[key]).abs().max() for key in exact) > 1e-7  # w^k, not backprop


@pytest.mark.usefixtures("steps_are_not_compiled")
@pytest.mark.parametrize("name", ["lstm", "a matrix"])
def test_with_symbolic_sizes_nearly_all_rounds_are_nearly_exact(name):
    program, tensors = PROGRAMS[name]
    given = tensors(5, 4)
    run, _ = compiled(program, dynamic=True, iterations=LENGTH - 1)
    exact = gradients(lambda *args: program(in_a_loop, *args), given)
    assert_gradients_close(gradients(run, given), exact, 1e-4)


def test_a_sweep_over_hidden_sizes_compiles_what_a_single_one_does():
    """Through Inductor, in eager mode: the second size makes the hidden size a symbol."""
    for d in (4, 5):
        w, u = weight(3, 4 * d), weight(d, 4 * d)
        x, zero = torch.randn(LENGTH, 2, 3, dtype=torch.float64), torch.zeros(2, d, dtype=torch.float64)

        def program(x, w, u, zero=zero):
            return recurrent(lstm(w, u), x, (zero, zero), options={**OPTIONS, "strict": True})[0]

        found = gradients(program, [x, w, u])
    known, _ = compiled(lambda run, x, w, u: run(lstm(w, u), x, (zero, zero))[0], dynamic=False)
    assert_gradients_close(found, gradients(known, [x, w, u]), 1e-10)
    assert hwbp_compiler.counters()["chains_rewritten"] == 2


# -- a fallback that repeats what failed is no fallback -----------------------------------------------------------


def fail(*args, **kwargs):
    raise ZeroDivisionError("planted")


FAILING = {"forward": (Recurrence, "_in_stages"), "backward": (chain._Backprop, "run")}


@pytest.mark.parametrize("where", FAILING)
def test_where_the_rolled_form_fails_once_it_was_accepted_the_loop_runs_as_written(where, monkeypatch, caplog):
    monkeypatch.setattr(recurrence, "_rehearse", lambda *args: None)
    monkeypatch.setattr(*FAILING[where], fail)
    joint_pass.warn_once.cache_clear()
    program, tensors = PROGRAMS["lstm"]
    given = tensors(5, 4)

    def run(**options):
        torch._dynamo.reset()
        one = torch.compile(lambda *a: program(recurrent, *a), backend="highway", options={**OPTIONS, **options})
        return gradients(one, given)

    exact = gradients(lambda *args: program(in_a_loop, *args), given)
    with caplog.at_level("WARNING", logger="hwbp_compiler"):
        assert_gradients_close(run(), exact, 1e-10)
    (told,) = [r.getMessage() for r in caplog.records if r.name.startswith("hwbp_compiler")]
    assert "planted" in told and "eager mode, with exact gradients" in told
    counted = hwbp_compiler.counters()
    assert (counted["chains_rewritten"], counted["chains_declined"]) == (0, counted["chains_found"])
    with pytest.raises(HighwayError, match="planted"):
        run(strict=True)


@pytest.mark.parametrize("name", ["lstm", "joined"])
def test_where_nothing_can_be_compiled_another_size_is_right_too(name, monkeypatch):
    monkeypatch.setattr(backend, "compile_fx", fail)
    program, tensors = PROGRAMS[name]
    run = torch.compile(lambda *a: program(recurrent, *a), backend="highway", dynamic=True, options=OPTIONS)
    for d, batch in ((5, 4), (8, 2)):
        given = tensors(d, batch)
        exact = gradients(lambda *args: program(in_a_loop, *args), given)
        assert_gradients_close(gradients(run, given), exact, 1e-10)


WITHOUT_COMPILER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_faults_recurrent import OPTIONS, PROGRAMS, gradients, in_a_loop
from hwbp_compiler import recurrent
from hwbp_compiler.testing import assert_gradients_close

program, tensors = PROGRAMS["lstm"]
run = torch.compile(lambda *a: program(recurrent, *a), backend="highway", dynamic=True, options=OPTIONS)
for d, batch in ((5, 4), (5, 3), (8, 2)):
    given = tensors(d, batch)
    assert_gradients_close(gradients(run, given), gradients(lambda *a: program(in_a_loop, *a), given), 1e-10)
"""


def test_without_a_compiler_another_batch_and_hidden_size_are_right_too(tmp_path):
    environment = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER, os.path.dirname(__file__)], env={**os.environ, **environment},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "eager mode" in output, output
