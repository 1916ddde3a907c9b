"""Claims about ``torch.ops.highway.linear_scan`` with an initial state, which is one more row of the result."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scan import KINDS, OPERATOR, assert_as_good_as_a_loop, four_threads, multiplier_shape, random, scans
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from hwbp_compiler.scan import inductor
from hwbp_compiler.scan.fallback import linear_scan_torch
from hwbp_compiler.scan.reference import spread

__all__ = ["four_threads"]  # a fixture


def with_one_link_more(values: Tensor, multipliers: Tensor | None, reverse: bool, initial: Tensor):
    """The same as a scan without an initial state, whose first link is the initial state."""

    def joined(rows: Tensor, row: Tensor) -> Tensor:
        return torch.cat([rows, row] if reverse else [row, rows])

    longer = joined(values, initial[None])
    if multipliers is None:
        return longer, None
    factors = spread(multipliers, values)
    factors = factors.expand(values.shape[0], *factors.shape[1:])
    return longer, joined(
        factors, torch.ones_like(factors[:1]) if len(factors) else factors.new_ones(1, *factors.shape[1:])
    )


@settings(max_examples=120, deadline=None)
@given(scans(), st.integers(0, 99), st.booleans())
def test_the_initial_state_is_the_first_row_and_carries_on(scan, seed, strided):
    values, multipliers, reverse = scan
    initial = random(values.shape[1:], values.dtype, -1, 1, seed)
    if strided and initial.ndim:
        initial = initial.repeat_interleave(2, 0)[::2]
    longer, factors = with_one_link_more(values, multipliers, reverse, initial)
    for implementation in (OPERATOR, linear_scan_torch):
        found = implementation(values, multipliers, reverse, initial)
        assert torch.equal(found[-1 if reverse else 0], initial)
        assert_as_good_as_a_loop(found, longer, factors, reverse)


@pytest.mark.parametrize("columns", [1, 7, 40_000])
@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_of_links_and_tiles_of_columns_start_from_it_too(columns, reverse, four_threads):
    shape = (20 if columns > 7 else 70_000, columns)
    values, multipliers = random(shape, torch.float64, -1, 1, 0), random(shape, torch.float64, -1, 1, 1)
    initial = random((columns,), torch.float64, -1, 1, 2)
    found = OPERATOR(values, multipliers, reverse, initial)
    assert_as_good_as_a_loop(found, *with_one_link_more(values, multipliers, reverse, initial), reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_in_all_modes(dtype, kind, reverse):
    shape = (4, 3, 2)
    wanted = multiplier_shape(kind, shape)
    inputs = [random(shape, dtype, -1, 1, 0).requires_grad_(), random(shape[1:], dtype, -1, 1, 2).requires_grad_()]
    if wanted is not None:
        inputs.append(random(wanted, dtype, -1, 1, 1).requires_grad_())

    def scan(values: Tensor, initial: Tensor, multipliers: Tensor | None = None) -> Tensor:
        return OPERATOR(values, multipliers, reverse, initial)

    assert torch.autograd.gradcheck(scan, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scan, inputs)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_registered_as_torch_wants_it(kind, grad):
    wanted = multiplier_shape(kind, (5, 3, 2))
    values, initial = torch.rand(5, 3, 2, requires_grad=grad), torch.rand(3, 2, requires_grad=grad)
    multipliers = None if wanted is None else torch.rand(wanted, requires_grad=grad)
    torch.library.opcheck(OPERATOR, (values, multipliers, True, initial))


def test_without_a_link_the_initial_state_is_all_there_is():
    initial = torch.rand(3, dtype=torch.float64, requires_grad=True)
    values = torch.zeros(0, 3, dtype=torch.float64)
    found = OPERATOR(values, torch.zeros(0, 3, dtype=torch.float64), True, initial)
    assert torch.equal(found, initial[None])
    found.sum().backward()
    assert torch.equal(initial.grad, torch.ones(3))


def test_a_compiled_graph_calls_the_kernel_and_concatenates_nothing():
    inductor.register()
    values, multipliers, initial = torch.rand(9, 4), torch.rand(9, 4), torch.rand(4)
    for factors in (multipliers, None):
        compiled = torch.compile(lambda v, i, m=factors: OPERATOR(v.sin(), m, True, i.cos()), dynamic=False)
        found, (code,) = run_and_get_code(compiled, values, initial)
        torch.testing.assert_close(found, OPERATOR(values.sin(), factors, True, initial.cos()))
        assert code.count("linear_scan_from_out(") == 1 and "torch.ops.highway" not in code


@pytest.mark.parametrize(
    ("initial", "error", "says"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), TypeError, "initial has dtype torch.float64"),
        (torch.zeros(3), ValueError, r"initial has shape \[3\]; it must be \[3, 2\]"),
        (torch.zeros(3, 2, device="meta"), ValueError, "initial is on meta, values are on cpu"),
    ],
)
def test_an_initial_state_that_does_not_fit_is_refused(initial, error, says):
    with pytest.raises(error, match=says):
        OPERATOR(torch.zeros(4, 3, 2), None, False, initial)
