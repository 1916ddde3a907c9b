"""If something fails, the model still trains with correct gradients and logs one warning. With strict it raises.

``tests/reliability.py`` builds the second table of docs/reliability.md from the marker ``fault(name, outcome)``.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from test_combinations import OPTIONS, expected, gradients, inputs, loss_of, make
from torch import nn
from torch._inductor import codecache

import hwbp_compiler
from hwbp_compiler import HighwayError, backend, joint_pass, prepare
from hwbp_compiler.passes import candidates, pipeline, replace_recurrent_modules
from hwbp_compiler.recurrence import cpu as gru_on_a_cpu
from hwbp_compiler.recurrence import cpu_runs
from hwbp_compiler.rolled import lanes, loop, recurrence
from hwbp_compiler.scan import cpu
from hwbp_compiler.testing import assert_gradients_close

fault = pytest.mark.fault
RELAXED = {**OPTIONS, "strict": False}


@pytest.fixture(autouse=True)
def warned(caplog):
    for remembered in (joint_pass.warn_once, backend._warn_of_cuts, loop.warn_once):
        remembered.cache_clear()
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "hwbp" in r.name]


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def assert_trains_exactly(iterations="exact"):
    model, x = make(), inputs()
    loss_of(torch.compile(model, backend="highway", options=RELAXED)(x)).backward()
    assert_gradients_close(gradients(model), expected(model, x, iterations), 1e-4, 1e-6)


def assert_strict_raises(match):
    torch._dynamo.reset()
    with pytest.raises(HighwayError, match=match):
        torch.compile(make(), backend="highway", options=OPTIONS)(inputs())


PASSES = {
    pipeline: ("GraphInfo", "candidates", "estimate", "rewrite_chain", "apply", "described"),
    candidates: ("followers", "find_recurrences", "check_separation", "split_links", "group_links"),
}


@fault("an exception in any pass", "that graph is compiled as by Inductor; exact gradients")
@pytest.mark.parametrize(
    ("module", "name"), [pytest.param(module, name, id=name) for module, names in PASSES.items() for name in names]
)
def test_an_exception_in_a_pass(module, name, monkeypatch, warned):
    monkeypatch.setattr(module, name, raising(ZeroDivisionError("planted")))
    assert_trains_exactly()
    (message,) = warned()
    assert "ZeroDivisionError: planted" in message and "as Inductor would compile it" in message
    assert hwbp_compiler.counters()["failures"] == 1
    assert_strict_raises("planted")


@fault("an exception when the graph is half changed", "the graph is restored; exact gradients")
def test_an_exception_when_the_graph_is_half_changed(monkeypatch, warned):
    whole = pipeline.apply

    def half(*args, **kwargs):
        whole(*args, **kwargs)
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pipeline, "apply", half)
    assert_trains_exactly()
    assert len(warned()) == 1


@fault("out of memory in a pass", "the same as for any exception in a pass")
def test_out_of_memory_in_a_pass(monkeypatch, warned):
    monkeypatch.setattr(pipeline, "rewrite_chain", raising(MemoryError("planted")))
    assert_trains_exactly()
    assert len(warned()) == 1


def failing_first(monkeypatch, error, times):
    """Inductor fails the first ``times`` times."""
    real, left = backend.compile_fx, [times]

    def compile_fx(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", compile_fx)


ERRORS = {
    "out of memory during compilation": torch.OutOfMemoryError("planted"),
    "missing Triton": ModuleNotFoundError("No module named 'triton'"),
    "an Inductor bug": AssertionError("planted"),
}


@fault(
    "out of memory, missing Triton or an error of Inductor's, on the rewritten graph alone",
    "compiled without the rewrite; exact gradients",
)
@pytest.mark.parametrize("name", ERRORS)
def test_inductor_fails_on_the_rewritten_graph(name, monkeypatch, warned):
    failing_first(monkeypatch, ERRORS[name], times=1)
    assert_trains_exactly()
    (message,) = warned()
    assert "as Inductor would compile it" in message and type(ERRORS[name]).__name__ in message
    failing_first(monkeypatch, ERRORS[name], times=1)
    assert_strict_raises(type(ERRORS[name]).__name__)


def test_a_rewrite_that_is_not_compiled_is_not_counted(monkeypatch):
    real, left = backend.compile_fx, [1]

    def compile_fx(*args, **kwargs):
        compiled = real(*args, **kwargs)
        if left[0]:
            left[0] -= 1
            raise AssertionError("planted")
        return compiled

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    assert_trains_exactly()
    counted = hwbp_compiler.counters()
    assert (counted["chains_found"], counted["chains_rewritten"], counted["chains_declined"]) == (1, 0, 1)


@fault("the same on any graph", "the graph runs in eager mode; exact gradients")
@pytest.mark.parametrize("name", ERRORS)
def test_inductor_fails_on_every_graph(name, monkeypatch, warned):
    failing_first(monkeypatch, ERRORS[name], times=2)
    assert_trains_exactly()
    (message,) = warned()
    assert "eager mode" in message


@fault("the scan's C++ kernel cannot be built", "the scan runs in torch operators; gradients are w^k's")
def test_the_scan_kernel_cannot_be_built(monkeypatch, warned):
    monkeypatch.setattr(cpu.native, "load", lambda dtype: None)
    values, multipliers = torch.randn(9, 3), torch.rand(9, 3)
    found = cpu.linear_scan_cpu(values, multipliers)
    monkeypatch.undo()
    torch.testing.assert_close(found, cpu.linear_scan_cpu(values, multipliers))


class OverTime(nn.Module):
    """A recurrent module, or a user-defined cell over time; ``written`` is a plain loop over the same cell."""

    def __init__(self, kind: str, iterations: int | str = 1, segment: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.options = {**RELAXED, "iterations": iterations, "segment": segment}
        self.kind, self.gru, self.cell = kind, nn.GRU(4, 5), nn.GRUCell(4, 5)

    def step(self, x, h):
        h = self.cell(x, h)
        return h, h

    def forward(self, x):
        if self.kind == "module":
            return self.gru(x)[0]
        start = x.new_zeros(x.shape[1], 5)
        if self.kind == "loop":
            return hwbp_compiler.recurrent(self.step, x, start, options=self.options)[0]
        rows = [start]
        for row in x:
            rows.append(self.cell(row, rows[-1]))
        return torch.stack(rows[1:])

    def gradients(self, step=None) -> dict[str, torch.Tensor]:
        self.zero_grad()
        loss_of((self if step is None else step)(inputs(6, 2, 4))).backward()
        return {name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None}


@fault(
    "the C++ kernels of recurrent modules cannot be built",
    "PyTorch's operators run step by step; gradients stay the same",
)
@pytest.mark.parametrize("options", [{"iterations": "exact"}, {"iterations": 0, "segment": 2}], ids=["exact", "runs"])
def test_the_kernels_of_recurrent_modules_cannot_be_built(options, monkeypatch):
    model = OverTime("module")
    wanted = model.gradients(torch.compile(model, backend="highway", options={**RELAXED, **options}))
    for kernel in (cpu_runs.native, gru_on_a_cpu.native):
        monkeypatch.setattr(kernel, "load", lambda dtype: None)
    found = model.gradients(torch.compile(model, backend="highway", options={**RELAXED, **options}))
    assert_gradients_close(found, wanted, 1e-5, 1e-6)
    if options["iterations"] == "exact":
        assert_gradients_close(found, model.gradients(), 1e-5, 1e-6)


@fault(
    "an exception before the joint graph, while loops and recurrent modules are searched for",
    "the graph runs in eager mode; exact gradients",
)
@pytest.mark.parametrize(
    "place, name",
    [(replace_recurrent_modules, "_Replacement"), (prepare, "replace_loops"), (backend, "register_lowerings")],
    ids=["modules", "loops", "operators"],
)
def test_an_exception_before_the_joint_graph(place, name, monkeypatch, warned):
    monkeypatch.setattr(place, name, raising(ZeroDivisionError("planted")))
    model = OverTime("module")
    found = model.gradients(torch.compile(model, backend="highway", options=RELAXED))
    assert_gradients_close(found, model.gradients(), 1e-5, 1e-6)
    (message,) = warned()
    assert "ZeroDivisionError: planted" in message and "eager mode" in message
    torch._dynamo.reset()
    with pytest.raises(HighwayError, match="planted"):
        model.gradients(torch.compile(model, backend="highway", options=OPTIONS))


@fault("an exception while a loop of `recurrent` is built", "a `HighwayError`, which names the loop")
def test_an_exception_while_a_loop_is_built(monkeypatch):
    monkeypatch.setattr(recurrence, "build", raising(ZeroDivisionError("planted")))
    model = OverTime("loop")
    with pytest.raises(HighwayError, match="a loop of hwbp_compiler.recurrent could not be built .*planted"):
        model.gradients(torch.compile(model, backend="highway", options=RELAXED))


@fault(
    "the step of a loop over time cannot be compiled", "the step runs operator by operator; gradients stay as they were"
)
@pytest.mark.parametrize(
    ("place", "name", "how"),
    [
        *((loop, name, {"iterations": k}) for name in ("step_of", "make_fx", "compile_step") for k in (1, "exact")),
        *((lanes, name, {"segment": 2}) for name in ("make_fx", "compile_step")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)).rpartition(".")[2],
)
def test_the_step_of_a_loop_cannot_be_compiled(place, name, how, monkeypatch, warned):
    model = OverTime("loop", **how)
    place._compiled.cache_clear()
    wanted = model.gradients()
    monkeypatch.setattr(place, name, raising(AssertionError("planted")))
    place._compiled.cache_clear()
    found = model.gradients()
    place._compiled.cache_clear()
    assert_gradients_close(found, wanted, 1e-5, 1e-6)
    (message,) = warned()
    assert "planted" in message and "operator by operator" in message
    assert hwbp_compiler.counters()["failures"] >= 1


@fault(
    "an exception while decisions are counted and logged",
    "that graph is compiled as by Inductor, or runs in eager mode; exact gradients",
)
@pytest.mark.parametrize("empty", [True, False], ids=["before the passes", "after them"])
def test_an_exception_while_reporting(empty, monkeypatch, warned):
    real = backend.report_all

    def fail(records):
        if empty or list(records):
            raise ZeroDivisionError("planted")
        real(records)

    for module in (backend, joint_pass):
        monkeypatch.setattr(module, "report_all", fail)
    assert_trains_exactly()
    (message,) = warned()
    assert "ZeroDivisionError: planted" in message
    assert_strict_raises("planted")


def second_derivative(step, x):
    (first,) = torch.autograd.grad(loss_of(step(x)), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def test_double_backward_is_refused_where_a_graph_runs_in_eager_mode_too(monkeypatch):
    failing_first(monkeypatch, AssertionError("planted"), times=10)
    model, x = OverTime("module"), inputs(6, 2, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="double backward|differentiate twice"):
        second_derivative(torch.compile(model, backend="highway", options=RELAXED), x)


def test_a_loop_in_eager_mode_runs_as_written_and_has_a_second_derivative(monkeypatch):
    failing_first(monkeypatch, AssertionError("planted"), times=10)
    model, x = OverTime("loop"), inputs(6, 2, 4).requires_grad_()
    found = second_derivative(torch.compile(model, backend="highway", options=RELAXED), x)
    model.kind = "written"
    torch.testing.assert_close(found, second_derivative(model, x))


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_combinations import make, inputs, loss_of, expected, gradients, OPTIONS
from test_faults import OverTime
from hwbp_compiler import HighwayError
from hwbp_compiler.testing import assert_gradients_close

model, x = make(), inputs()
loss_of(torch.compile(model, backend="highway", options={**OPTIONS, "strict": False})(x)).backward()
assert_gradients_close(gradients(model), expected(model, x, "exact"), 1e-4, 1e-6)
for kind in ("module", "loop"):
    torch._dynamo.reset()
    model = OverTime(kind, "exact")
    found = model.gradients(torch.compile(model, backend="highway", options={**OPTIONS, "strict": False}))
    model.kind = "module" if kind == "module" else "written"
    assert_gradients_close(found, model.gradients(), 1e-4, 1e-6)
torch._dynamo.reset()
try:
    torch.compile(make(), backend="highway", options=OPTIONS)(x)
except HighwayError:
    print("RIGHT")
"""


def run(tmp_path, **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)], cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "RIGHT" in done.stdout, output
    assert output.count("eager mode") == 1, output


@fault("no working C++ compiler", "the graph runs in eager mode; exact gradients")
def test_no_working_compiler(tmp_path):
    run(tmp_path, CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))


@fault(
    "a cache folder that cannot be written",
    "the graph runs in eager mode; exact gradients. (If the folder cannot even be made, torch itself raises on import)",
)
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that root cannot write to either")
def test_unwritable_cache_folder(tmp_path):
    run(tmp_path, TORCHINDUCTOR_CACHE_DIR="/proc/self")


def test_a_cache_that_cannot_be_written_to_later(monkeypatch, warned):
    monkeypatch.setattr(codecache, "write", raising(PermissionError("planted")))
    monkeypatch.setattr(codecache, "write_atomic", raising(PermissionError("planted")))
    assert_trains_exactly()
    (message,) = warned()
    assert "PermissionError" in message and "eager mode" in message
    assert_strict_raises("planted")
