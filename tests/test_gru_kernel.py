"""The GRU's forward pass on a CPU equals PyTorch's own kernel, for every shape it accepts."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hwbp_compiler.recurrence import cpu
from hwbp_compiler.recurrence.operator import OperatorCall, operator

sizes = st.integers(1, 40)  # below, at and above a vector's length, and not multiples of it


def call_of(module: nn.GRU, x: torch.Tensor, h: torch.Tensor) -> OperatorCall:
    weights = [w.detach() for w in module._flat_weights]
    return OperatorCall(
        "gru", x, None, [h], weights, module.bias, module.num_layers, 0.0, True, module.bidirectional, None
    )


def made(steps, batch, width, hidden, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    module = nn.GRU(width, hidden, dtype=dtype, **options)
    count = module.num_layers * (1 + module.bidirectional)
    x, h = torch.randn(steps, batch, width, dtype=dtype), torch.randn(count, batch, hidden, dtype=dtype)
    return module, call_of(module, x, h)


@settings(deadline=None)
@given(
    steps=st.integers(1, 5),
    batch=st.integers(1, 20),
    width=sizes,
    hidden=sizes,
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_computes_what_torch_gru_computes(steps, batch, width, hidden, layers, bidirectional, bias, threads, seed):
    options = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    module, call = made(steps, batch, width, hidden, seed=seed, **options)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cpu.gru(call)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        expected = module(call.input, call.state[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # sums in another order


@pytest.mark.parametrize("batch, hidden", [(1, 512), (2, 300)])
def test_columns_shared_out_over_threads_meet_after_every_step(batch, hidden):
    module, call = made(50, batch, 3, hidden)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(batch + 1)  # more threads than rows
        found, _ = cpu.gru(call)
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        torch.testing.assert_close(found, module(call.input, call.state[0])[0], rtol=1e-11, atol=1e-11)


def test_float32_is_as_close_to_float64_as_pytorchs_own():
    module, call = made(200, 4, 32, 64, dtype=torch.float32)
    found, _ = cpu.gru(call)
    with torch.no_grad():
        own = module(call.input, call.state[0])[0]
        true = module.double()(call.input.double(), call.state[0].double())[0]
    # Twice: two roundings of one sum differ by chance.
    assert (found - true).abs().max() <= 2 * (own - true).abs().max()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_comes_out_as_from_pytorch(value):
    module, call = made(4, 3, 5, 17)
    call.input[1, 0, 2] = value
    call.state[0][0, 2, 3] = value
    with torch.no_grad():
        expected = module(call.input, call.state[0])[0]
    torch.testing.assert_close(cpu.gru(call)[0], expected, equal_nan=True)


def test_strided_inputs_states_and_weights_are_read_as_they_are():
    module, call = made(6, 4, 8, 20)
    with torch.no_grad():
        expected = module(call.input, call.state[0])[0]
    across = [
        t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (call.input, call.state[0], *call.weights[:2])
    ]
    strided = call._replace(input=across[0], state=[across[1]], weights=[*across[2:], *call.weights[2:]])
    torch.testing.assert_close(cpu.gru(strided)[0], expected)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "lstm"},
        {"autocast": torch.bfloat16},
        {"batch_sizes": torch.tensor([2, 1])},
        {"layers": 2, "dropout": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_everything_else_is_left_to_pytorch(change):
    assert cpu.gru(made(3, 2, 4, 4)[1]._replace(**change)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_left_to_pytorch(dtype):
    assert cpu.gru(made(3, 2, 4, 4, dtype=dtype)[1]) is None


def test_without_a_compiler_pytorchs_kernel_runs_and_nobody_is_warned(monkeypatch, caplog):
    def broken(dtype):
        raise RuntimeError("no compiler here")

    module, call = made(3, 2, 4, 4)
    cpu.native.forget()
    monkeypatch.setattr(cpu.native, "build", broken)
    with caplog.at_level(logging.INFO, "hwbp_compiler"):
        found = operator(*call, [False] * 6)[0]
    cpu.native.forget()
    with torch.no_grad():
        torch.testing.assert_close(found, module(call.input, call.state[0])[0], rtol=0, atol=0)
    assert [(r.levelname, "no compiler here" in r.message) for r in caplog.records] == [("INFO", True)]
