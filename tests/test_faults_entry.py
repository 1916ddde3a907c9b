"""Ways to use the package: many threads at once, one part alone, one compiled model inside another."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hwbp_compiler import backend


def output_of(code: str) -> str:
    """The output of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


THREADS = """
import sys, threading, torch
sys.setswitchinterval(1e-5)
start, found = threading.Barrier(24), []

def look():
    start.wait()
    try:
        torch.compile(lambda x: x, backend="highway")
        found.append("right")
    except BaseException as error:
        found.append(repr(error))

threads = [threading.Thread(target=look) for _ in range(24)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == ["right"] * 24, found
"""


def test_many_threads_may_be_the_first_to_look_the_backend_up():
    output_of(THREADS)


def test_registering_it_again_changes_nothing_and_others_are_refused_as_ever():
    output_of("""
import torch
from torch._dynamo.backends.registry import list_backends, lookup_backend, register_backend
torch.compile(lambda x: x, backend="highway")
from hwbp_compiler.backend import highway
register_backend(highway, name="highway")
assert lookup_backend("highway") is highway and "highway" in list_backends()

@register_backend
def another(gm, inputs):
    return gm

@register_backend(name="a_third")
def third(gm, inputs):
    return gm

try:
    register_backend(another, name="highway")
except AssertionError as error:
    assert "duplicate name: highway" in str(error)
else:
    raise SystemExit("not refused")

assert lookup_backend("another") is another and lookup_backend("a_third") is third
try:
    register_backend(lambda gm, inputs: gm, name="another")
except AssertionError as error:
    assert "duplicate name: another" in str(error)
else:
    raise SystemExit("not refused")
""")


@pytest.mark.parametrize("pool", ["nn.MaxPool2d(2)", "nn.AdaptiveMaxPool2d(2)", "nn.AvgPool2d(2)"])
def test_the_backend_that_generates_no_code_works_by_itself(pool):
    output_of(f"""
from hwbp_compiler.testing.capture import eager_highway, options
import torch
from torch import nn
model = nn.Sequential(nn.Conv2d(1, 2, 3), {pool}).double()
x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
torch.compile(model, backend=eager_highway(options()))(x).sum().backward()
found = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(x).sum().backward()
for a, p in zip(found, model.parameters(), strict=True):
    torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)
""")


# -- one compiled model inside another ----------------------------------------------------------------------------


@pytest.fixture
def without_code(monkeypatch):
    """Dynamo alone: the warning comes before any code is generated."""
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, patches: gm.forward)
    backend._warn_of_dropped.cache_clear()


class Body(nn.Module):
    """Not a ``torch.nn.Sequential``: if one is compiled in place, Dynamo looks at no code of it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return self.linear(x).tanh()


def warnings_of(caplog, inner, outer, kind):
    body = Body()
    part = (lambda x: body(x) * 2) if kind == "function" else body.forward
    if kind == "module in place":
        inside = body
        body.compile(backend="highway", **inner)
    else:
        inside = torch.compile(body if kind == "module" else part, backend="highway", **inner)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="hwbp_compiler"):
        x = torch.randn(2, 3)
        found = torch.compile(lambda x: x + inside(x), backend="highway", fullgraph=True, **outer)(x)
    torch.testing.assert_close(found, x + part(x))
    return [r.getMessage() for r in caplog.records]


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("kind", ["module", "module in place", "function"])
def test_inner_options_that_an_outer_model_drops_are_warned_of_once(kind, caplog):
    outer = {"options": {"iterations": 2}}
    (message,) = warnings_of(caplog, {"options": {"iterations": "exact"}}, outer, kind)
    assert "'iterations': 'exact'" in message and "'iterations': 2" in message and "torch.compiler.disable" in message
    torch._dynamo.reset()
    assert not warnings_of(caplog, {"options": {"iterations": "exact"}}, outer, kind)  # once


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("kind", ["module", "module in place"])
@pytest.mark.parametrize("inner", [{}, {"options": {"iterations": 2}}, {"options": {"iterations": 2, "damping": 0.0}}])
def test_no_warning_where_nothing_is_dropped(inner, kind, caplog):
    assert not warnings_of(caplog, inner, {"options": {"iterations": 2}}, kind)


def test_the_advice_keeps_the_inner_options():
    """With ``torch.compiler.disable`` around the call, both are compiled, each with its own options."""
    seen = []

    def compile_fx(gm, inputs, patches):
        seen.append(patches["joint_custom_pre_pass"].options.iterations)
        return gm.forward

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "compile_fx", compile_fx)
        inside = torch.compile(lambda x: x.tanh(), backend="highway", options={"iterations": "exact"})
        apart = torch.compiler.disable(lambda x: inside(x))
        torch.compile(lambda x: apart(x.sin()).cos(), backend="highway", options={"iterations": 2})(torch.randn(3))
    assert set(seen) == {2, "exact"}
