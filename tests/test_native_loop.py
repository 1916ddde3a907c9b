"""A long loop over time on a CPU runs in one C++ call, with the results of the loop in Python bit for bit."""

from __future__ import annotations

import gc
import resource

import pytest
import torch
from torch import Tensor

from hwbp_compiler import recurrent
from hwbp_compiler.rolled import native_loop
from hwbp_compiler.rolled.loop import _compiled

if native_loop._loop() is None:
    pytest.skip("needs a C++ compiler", allow_module_level=True)

EXACT = {"iterations": "exact"}
T, B, H = 12, 3, 5


def lstm_with_resets(given, state):
    """Two components of the state, and a boolean input."""
    (x, done), (h, c) = given, state
    h, c = (torch.where(done, torch.zeros_like(s), s) for s in (h, c))
    i, f = (x @ W + h @ W + c).sigmoid(), (x - h @ W).sigmoid()
    c = f * c + i * (h @ W).tanh()
    h = c.tanh() * (x + c).sigmoid()
    return h, (h, c)


def looks_up(index, h):
    """An integer input, which indexes a captured table."""
    h = (TABLE[index] + h @ W).tanh()
    return h.sum(-1), h


torch.manual_seed(0)
W = torch.randn(H, H, dtype=torch.float64).mul(0.4)
TABLE = torch.randn(7, H, dtype=torch.float64)


def inputs(name: str) -> tuple:
    """The cell, the inputs and the first state."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(B, H, dtype=torch.float64, generator=generator)
    if name == "look-up":
        return looks_up, torch.randint(0, len(TABLE), (T, B), generator=generator), h
    x = torch.randn(B, T, H, dtype=torch.float64, generator=generator).transpose(0, 1)  # rows that are not contiguous
    return lstm_with_resets, (x, torch.rand(T, B, 1, generator=generator) < 0.2), (h, h.cos())


def results(name: str) -> list[Tensor]:
    """Everything that the loop returns, and every gradient."""
    cell, given, state = inputs(name)
    leaves = [t for t in torch.utils._pytree.tree_leaves((given, state)) if t.is_floating_point()]
    leaves += [W, TABLE] if name == "look-up" else [W]
    for leaf in leaves:
        leaf.requires_grad_()
    outputs, last = recurrent(cell, given, state, options=EXACT)
    values = [outputs, *torch.utils._pytree.tree_leaves(last)]
    gradients = torch.autograd.grad(sum((v * v.detach().cos()).sum() for v in values), leaves)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return [*values, *gradients]


@pytest.fixture
def called(monkeypatch):
    """How many loops ran in C++."""
    count = [0]
    real = native_loop.NativeLoop.run

    def run(self, *arguments):
        done = real(self, *arguments)
        count[0] += done
        return done

    monkeypatch.setattr(native_loop.NativeLoop, "run", run)
    _compiled.cache_clear()
    yield count
    _compiled.cache_clear()


@pytest.mark.parametrize("name", ["LSTM", "look-up"])
def test_the_loop_in_cpp_equals_the_one_in_python(name, called, monkeypatch):
    """Forward, and step by step backwards: with reversed rows, several components and inputs of any dtype."""
    in_python = results(name)
    assert called == [0]
    monkeypatch.setattr(native_loop, "NATIVE_FROM", 1)
    in_cpp = results(name)
    assert called == [2]  # forward and backward
    for a, b in zip(in_python, in_cpp, strict=True):
        assert torch.equal(a, b)


def test_a_shorter_loop_gets_a_native_step_once_it_was_called_often(called, monkeypatch):
    monkeypatch.setattr(native_loop, "CALLS", 2 * T)
    results("look-up")
    assert called == [0]
    results("look-up")
    assert called == [2]


def test_a_step_that_has_no_cpp_form_stays_in_python(called, monkeypatch):
    expected = results("look-up")

    def refuse(*_):
        raise LookupError("no such operator in C++")

    monkeypatch.setattr(native_loop, "NATIVE_FROM", 1)
    monkeypatch.setattr(native_loop, "StepInCpp", refuse)
    assert all(map(torch.equal, results("look-up"), expected))
    assert called == [0]


def test_an_error_in_a_step_reaches_the_caller(called, monkeypatch):
    monkeypatch.setattr(native_loop, "NATIVE_FROM", 1)
    _, index, h = inputs("look-up")
    with torch.no_grad(), pytest.raises((IndexError, RuntimeError), match="out of bounds|out of range"):
        recurrent(looks_up, index + 4, h, options=EXACT)


def test_the_tensors_of_a_call_are_free_after_it(called, monkeypatch):
    monkeypatch.setattr(native_loop, "NATIVE_FROM", 1)
    length = 4000
    _, _, h = inputs("look-up")

    def run(times: int) -> int:
        """Returns the most memory ever used, in bytes."""
        for _ in range(times):
            with torch.no_grad():
                recurrent(looks_up, torch.zeros(length, B, dtype=torch.int64), h, options=EXACT)
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = run(5)
    states = length * h.numel() * h.element_size()
    assert run(60) - before < 15 * states  # a leak would hold the states of all sixty calls
    assert called == [65]
