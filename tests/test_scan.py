"""Claims about ``linear_scan``: what it computes, how precisely, its gradients, its errors, its fallback."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hwbp_compiler.scan import cpu, linear_scan
from hwbp_compiler.scan.fallback import linear_scan_torch
from hwbp_compiler.scan.hillis_steele import linear_scan_hillis_steele
from hwbp_compiler.scan.operator import previous
from hwbp_compiler.scan.reference import linear_scan_reference, spread

OPERATOR = torch.ops.highway.linear_scan.default
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
KINDS = ["none", "one for all", "per link", "per link, spread", "per column", "broadcast", "full"]
LAYOUTS = ["contiguous", "transposed", "strided", "expanded", "reversed rank"]


# -- a loop in exact arithmetic, and what it may differ by --------------------------------------------------------


def wide(x: Tensor | None) -> Tensor | None:
    """In double precision."""
    return None if x is None else x.to(torch.complex128 if x.dtype.is_complex else torch.float64)


def exact(values: Tensor, multipliers: Tensor | None, reverse: bool) -> Tensor:
    """In double precision, link by link; the longest scans by blocks, in plain torch operators."""
    if values.shape[0] > 2000:
        return linear_scan_torch(wide(values), wide(multipliers), reverse)
    return linear_scan_reference(wide(values), wide(multipliers), reverse=reverse)


def precision(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def error_bound(values: Tensor, multipliers: Tensor | None, reverse: bool) -> Tensor:
    """A bound for the error of a scan link by link, to first order, for each element.

    A link rounds twice in the accumulator's precision, once for ``m * u`` and once for the sum. It also multiplies the
    error so far by m: ``e[i] = |m| e[i-1] + eps (|m| s[i-1] + s[i])``, where s is the scan of absolute values. Storing
    the state rounds once more, in the precision of the dtype.
    """
    accumulator = {torch.float16: torch.float32, torch.bfloat16: torch.float32}.get(values.dtype, values.dtype)
    eps = precision(accumulator)
    if values.dtype.is_complex:
        eps *= 5**0.5  # for a product of two complex numbers
    sizes = wide(values).abs()
    factors = None if multipliers is None else wide(multipliers).abs()
    states = exact(sizes, factors, reverse)
    # The states before each link, times the multipliers: what the scan added to the values.
    rounded = eps * ((states - sizes) + states)
    error = exact(rounded, factors, reverse)
    smallest = torch.finfo(values.dtype).smallest_normal
    stored = exact(values, multipliers, reverse).abs() + error
    return error + precision(values.dtype) * stored + smallest * values.shape[0]


def assert_as_good_as_a_loop(found: Tensor, values: Tensor, multipliers: Tensor | None, reverse: bool = False) -> None:
    assert found.shape == values.shape and found.dtype == values.dtype and found.is_contiguous()
    want = exact(values, multipliers, reverse)
    error = (wide(found) - want).abs()
    # The bound is to first order. A tenth is added for products of roundings.
    allowed = 1.1 * error_bound(values, multipliers, reverse)
    fits = torch.finfo(values.dtype).max
    worst = (error / allowed)[want.abs() + allowed < fits]
    assert not worst.numel() or worst.max() <= 1, f"{worst.max()} times the error of a loop"


# -- scans of all kinds -------------------------------------------------------------------------------------------


def random(shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    parts = low + (high - low) * torch.rand(*shape, 2, generator=generator, dtype=torch.float64)
    return torch.view_as_complex(parts).to(dtype) if dtype.is_complex else parts[..., 0].to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape with other strides, and the same numbers unless it is expanded."""
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "reversed rank":
        order = list(range(x.ndim))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        room = x.new_zeros([2 * n + 1 for n in x.shape])
        view = room[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
        view.copy_(x)
        return view
    if layout == "expanded" and x.ndim > 1:
        return x[:, :1].expand_as(x) if x.shape[1] else x
    return x


def multiplier_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    length, columns = shape[0], shape[1:]
    return {
        "none": None,
        "one for all": (),
        "per link": (length,),
        "per link, spread": (length, *(1 for _ in columns)),
        "per column": (1, *columns),
        "broadcast": (length, *(1 if i % 2 else n for i, n in enumerate(columns))),
        "full": shape,
    }[kind]


@st.composite
def scans(draw, dtypes=(*REAL, *COMPLEX)) -> tuple[Tensor, Tensor | None, bool]:
    dtype = draw(st.sampled_from(dtypes))
    shape = (draw(st.integers(0, 70)), *draw(st.lists(st.integers(1, 9), max_size=3)))
    seed = draw(st.integers(0, 2**32))
    values = laid_out(random(shape, dtype, -1, 1, seed), draw(st.sampled_from(LAYOUTS)))
    wanted = multiplier_shape(draw(st.sampled_from(KINDS)), shape)
    if wanted is None:
        return values, None, draw(st.booleans())
    low, high = draw(st.sampled_from([(0, 1), (-1, 1), (-1.2, 1.2), (0.9, 1.1), (0, 0)]))
    multipliers = random(wanted, dtype, low, high, seed + 1)
    if multipliers.ndim:
        multipliers = laid_out(multipliers, draw(st.sampled_from(LAYOUTS)))
    return values, multipliers, draw(st.booleans())


# -- values -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(scans())
def test_the_kernel_errs_no_more_than_a_loop_in_the_same_precision(scan):
    values, multipliers, reverse = scan
    found = linear_scan(values, multipliers, reverse=reverse)
    assert_as_good_as_a_loop(found, values, multipliers, reverse)


@settings(max_examples=100, deadline=None)
@given(scans())
def test_the_scan_in_torch_operators_errs_no_more_than_a_loop(scan):
    values, multipliers, reverse = scan
    found = linear_scan_torch(values, multipliers, reverse)
    assert_as_good_as_a_loop(found, values, multipliers, reverse)


@settings(max_examples=100, deadline=None)
@given(scans(dtypes=(torch.float64, torch.complex128)))
def test_hillis_steele_agrees_to_rounding(scan):
    values, multipliers, reverse = scan
    found = linear_scan_hillis_steele(values, multipliers, reverse=reverse)
    torch.testing.assert_close(found, exact(values, multipliers, reverse), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(scans(dtypes=(torch.float64,)), st.floats(-3, 3))
def test_the_scan_is_linear_in_the_values(scan, factor):
    values, multipliers, reverse = scan
    other = values.flip(0) + 1

    def u(x: Tensor) -> Tensor:
        return linear_scan(x, multipliers, reverse=reverse)

    torch.testing.assert_close(u(factor * values + other), factor * u(values) + u(other), rtol=1e-9, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(scans(dtypes=(torch.float32,)))
def test_a_reverse_scan_is_the_flipped_scan_of_what_is_flipped(scan):
    values, multipliers, _ = scan
    per_link = multipliers is not None and multipliers.ndim > 0 and multipliers.shape[0] == values.shape[0]
    flipped = multipliers.flip(0) if per_link else multipliers
    assert torch.equal(linear_scan(values, multipliers, reverse=True), linear_scan(values.flip(0), flipped).flip(0))


def test_errors_are_on_average_those_of_a_float32_loop():
    squares = {"kernel": 0.0, "loop": 0.0}
    for seed in range(20):
        values = random((200, 64), torch.float32, -1, 1, seed)
        multipliers = random((200, 64), torch.float32, 0, 1, seed + 100)
        want = exact(values, multipliers, False)
        squares["kernel"] += float((linear_scan(values, multipliers) - want).square().sum())
        squares["loop"] += float((linear_scan_reference(values, multipliers) - want).square().sum())
    assert squares["kernel"] <= 1.05 * squares["loop"]  # a twentieth for chance: 250,000 roundings


# -- all ways of going through memory -----------------------------------------------------------------------------


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def all_ways(length: int, columns: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = (length, *columns)
    values = random(shape, dtype, -1, 1, 0)
    for kind, reverse in itertools.product(["none", "per link", "per column", "full"], [False, True]):
        wanted = multiplier_shape(kind, shape)
        multipliers = None if wanted is None else random(wanted, dtype, -0.9, 1, 1)
        found = linear_scan(values, multipliers, reverse=reverse)
        assert_as_good_as_a_loop(found, values, multipliers, reverse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("columns", [(), (8,), (3, 3), (65,)])
def test_few_columns_are_scanned_in_blocks_of_links(columns, dtype, four_threads):
    # Four threads and at least 4 * 32768 elements: less than two cache lines of columns makes four blocks.
    all_ways(1 + 4 * 32768 // max(1, torch.Size(columns).numel()), columns, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [(16384 + 64,), (7, 4999)])
def test_wide_rows_are_scanned_in_tiles_and_written_past_the_caches(columns, dtype, four_threads):
    all_ways(40, columns, dtype)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 31, 32, 33, 1023, 1024, 1025])
def test_lengths_around_powers_of_two(length):
    all_ways(length, (5,), torch.float32)


def test_a_million_links(four_threads):
    values = random((1_000_000,), torch.float32, -1, 1, 0)
    multipliers = random((1_000_000,), torch.float32, 0, 1, 1)
    state, want = 0.0, []
    for a, m in zip(values.tolist(), multipliers.tolist(), strict=True):
        state = a + m * state
        want.append(state)
    error = (linear_scan(values, multipliers).double() - torch.tensor(want, dtype=torch.float64)).abs()
    # States stay below 100 here, and errors decay as fast as the values do.
    assert error.max() < 100 * 10 * precision(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_numbers_are_read_and_rounded_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    # There are second links, so that numbers pass through the loop over vectors. A sum of two numbers of about the same
    # size often lies half-way between two floats; a sum of numbers of different sizes has many digits to round off.
    for distance, multiplier in itertools.product([77, 1000], [0.0, 1.0]):
        values = torch.stack([every.roll(distance), every])
        found = linear_scan(values, torch.full((2,), multiplier, dtype=dtype))[1]
        want = (every.float() + multiplier * values[0].float()).to(dtype)
        assert torch.equal(found.isnan(), want.isnan())
        assert torch.equal(found.nan_to_num(0), want.nan_to_num(0))


# -- zeros, infinities, inputs as they come -----------------------------------------------------------------------


@pytest.mark.parametrize("scan", [linear_scan, linear_scan_reference, linear_scan_hillis_steele])
def test_the_first_multiplier_has_nothing_to_multiply(scan):
    values, multipliers = torch.ones(100, 3), torch.full((100,), 0.5)
    multipliers[0] = torch.inf
    assert scan(values, multipliers).isfinite().all()
    assert scan(values, multipliers.flip(0), reverse=True).isfinite().all()


@pytest.mark.parametrize("unused", [torch.inf, torch.nan])
@pytest.mark.parametrize("columns", [(), (8,)])
@pytest.mark.parametrize("scan", [linear_scan, linear_scan_torch])
def test_the_first_multiplier_has_nothing_to_multiply_in_blocks_either(scan, columns, unused, four_threads):
    for reverse in (False, True):
        values, multipliers = torch.ones(200_000, *columns), torch.full((200_000, *columns), 0.5)
        want = scan(values, multipliers, reverse=reverse)
        multipliers[-1 if reverse else 0] = unused
        assert torch.equal(scan(values, multipliers, reverse=reverse), want)


@pytest.mark.parametrize("scan", [linear_scan, lambda a, m: linear_scan_torch(a, m, False)])
def test_an_infinite_state_stays_infinite_where_the_product_of_multipliers_is_zero(scan, four_threads):
    values, multipliers = torch.ones(200_000), torch.tensor(0.5)
    values[10] = torch.inf
    found = scan(values, multipliers)
    assert found[:10].isfinite().all() and found[10:].isposinf().all()


@pytest.mark.parametrize("scan", [linear_scan, lambda a, m: linear_scan_torch(a, m, False)])
def test_overflowing_products_of_multipliers_do_no_harm_where_the_states_are_finite(scan, four_threads):
    values = torch.zeros(200_000)
    values[-1] = 1
    assert torch.equal(scan(values, torch.tensor(2.0)), values)


def test_more_dimensions_than_the_kernel_takes_are_copied():
    values = random((2,) * 12, torch.float32, -1, 1, 0)
    multipliers = random((2, 1) * 6, torch.float32, -1, 1, 1)
    assert_as_good_as_a_loop(linear_scan(values, multipliers), values, multipliers)


def test_inputs_are_left_alone():
    values, multipliers = torch.rand(20, 30), torch.rand(20, 30)
    before = values.clone(), multipliers.clone()
    linear_scan(values, multipliers, reverse=True)
    assert torch.equal(values, before[0]) and torch.equal(multipliers, before[1])


# -- tuples of components -----------------------------------------------------------------------------------------


def test_a_triangular_tuple_is_the_recurrence_of_its_matrix():
    length, width, size = 17, 5, 3
    for reverse in (False, True):
        a = [random((length, width), torch.float64, -1, 1, j) for j in range(size)]
        rows = [[random((length, width), torch.float64, -1, 1, 10 * j + k) for k in range(j + 1)] for j in range(size)]
        rows[1][1], rows[2][0], rows[2][1] = None, 0, 0.5
        rows[2][2] = random((length,), torch.float64, -1, 1, 99)
        found = linear_scan(tuple(a), tuple(tuple(row) for row in rows), reverse=reverse)
        state = torch.zeros(size, width, dtype=torch.float64)
        for i in reversed(range(length)) if reverse else range(length):
            matrix = torch.zeros(width, size, size, dtype=torch.float64)
            for j, row in enumerate(rows):
                for k, entry in enumerate(row):
                    number = 1.0 if entry is None else entry
                    matrix[:, j, k] = number if isinstance(number, (int, float)) else number[i]
            state = torch.stack([a[j][i] for j in range(size)]) + torch.einsum("wjk,kw->jw", matrix, state)
            torch.testing.assert_close(torch.stack([u[i] for u in found]), state, rtol=1e-12, atol=1e-12)


def test_a_component_fed_by_nothing_is_returned_as_a_copy():
    a = torch.rand(4)
    (found,) = linear_scan((a,), ((0,),))
    assert torch.equal(found, a) and found.data_ptr() != a.data_ptr()


# -- derivatives and transforms -----------------------------------------------------------------------------------


def differentiable(dtype: torch.dtype, kind: str, reverse: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A small scan with this kind of multiplier as a function of tensors, and its inputs."""
    shape = (4, 3, 2)
    wanted = multiplier_shape(kind, shape)
    inputs = [random(shape, dtype, -1, 1, 0).requires_grad_()]
    if wanted is not None:
        inputs.append(random(wanted, dtype, -1, 1, 1).requires_grad_())

    def scan(values: Tensor, multipliers: Tensor | None = None) -> Tensor:
        return linear_scan(values, multipliers, reverse=reverse)

    return scan, inputs


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_first_and_second_derivatives(dtype, kind, reverse):
    scan, inputs = differentiable(dtype, kind, reverse)
    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_forward_mode_and_batched_derivatives(dtype, kind, reverse):
    scan, inputs = differentiable(dtype, kind, reverse)
    assert torch.autograd.gradcheck(
        scan, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(scan, inputs, check_fwd_over_rev=True)


def test_the_transforms_of_torch_func_are_those_of_the_loop():
    values, multipliers = (random((5, 3), torch.float64, -1, 1, seed) for seed in range(2))
    batch = random((4, 5, 3), torch.float64, -1, 1, 2)
    found, want = {}, {}
    for results, scan in ((found, linear_scan), (want, linear_scan_reference)):

        def loss(m: Tensor, a: Tensor) -> Tensor:
            return scan(a, m, reverse=True).sin().sum()  # noqa: B023 (called in this round)

        results["grad"] = torch.func.grad(loss)(multipliers, values)
        results["grad of each"] = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(multipliers, batch)
        results["hessian"] = torch.func.hessian(loss, argnums=(0, 1))(multipliers, values)
        results["jacobian"] = torch.func.jacfwd(torch.func.jacrev(loss, argnums=1))(multipliers, values)
        results["both reverse"] = torch.func.jacrev(torch.func.jacrev(loss, argnums=1))(multipliers, values)
        results["reverse over forward"] = torch.func.jacrev(torch.func.jacfwd(loss, argnums=1))(multipliers, values)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_forward_mode_within_forward_mode_is_refused_rather_than_zero():
    with pytest.raises(NotImplementedError, match="linear_scan: forward mode within forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda m: linear_scan(torch.ones(3), m)))(torch.ones(3))


@pytest.mark.parametrize("length", [0, 1])
def test_derivatives_of_the_shortest_scans(length):
    values = torch.rand(length, 3, dtype=torch.float64, requires_grad=True)
    multipliers = torch.rand(length, dtype=torch.float64, requires_grad=True)
    linear_scan(values, multipliers).sum().backward()
    assert torch.equal(values.grad, torch.ones(length, 3)) and torch.equal(multipliers.grad, torch.zeros(length))


@pytest.mark.parametrize(("states", "moved"), [([], []), ([5.0], [0.0]), ([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])])
def test_the_states_before_each_link(states, moved):
    assert previous(torch.tensor(states), reverse=False).tolist() == moved
    assert previous(torch.tensor(states[::-1]), reverse=True).tolist() == moved[::-1]


def test_derivatives_of_a_tuple():
    a, b, m = (random((5, 2), torch.float64, -1, 1, seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda a, b, m: linear_scan((a, b), ((m,), (m, 0.5)), reverse=True), (a, b, m))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_is_registered_as_torch_wants_it(kind, grad):
    shape = (5, 3, 2)
    wanted = multiplier_shape(kind, shape)
    values = torch.rand(shape, requires_grad=grad)
    multipliers = None if wanted is None else torch.rand(wanted, requires_grad=grad)
    torch.library.opcheck(OPERATOR, (values, multipliers))
    torch.library.opcheck(OPERATOR, (values.transpose(1, 2), None, True))


@pytest.mark.parametrize("values_dim", [None, 0, 1, 2])
@pytest.mark.parametrize("multipliers_dim", [None, 0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_is_a_stack_of_scans(kind, multipliers_dim, values_dim):
    shape, batch = (6, 4), 3
    wanted = multiplier_shape(kind, shape)
    if wanted is None:
        multipliers_dim = None
    if values_dim is None and multipliers_dim is None:
        return
    many = [random(shape, torch.float64, -1, 1, seed) for seed in range(batch)]
    factors = [None if wanted is None else random(wanted, torch.float64, -1, 1, 9 + s) for s in range(batch)]
    values = many[0] if values_dim is None else torch.stack(many, values_dim)
    multipliers = factors[0] if multipliers_dim is None else torch.stack(factors, multipliers_dim)
    found = torch.func.vmap(OPERATOR, in_dims=(values_dim, multipliers_dim, None))(values, multipliers, True)
    want = torch.stack(
        [
            linear_scan_reference(
                many[0 if values_dim is None else i], factors[0 if multipliers_dim is None else i], reverse=True
            )
            for i in range(batch)
        ]
    )
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_over_values_without_a_dimension_says_so(in_dims):
    values, multipliers = (torch.ones(()) if dim is None else torch.ones(3) for dim in in_dims)
    with pytest.raises(ValueError, match="values has no dimension"):
        torch.func.vmap(linear_scan, in_dims=in_dims)(values, multipliers)


def test_complex_conjugates_that_are_only_views_are_resolved():
    values, multipliers = (random((9, 4), torch.complex64, -1, 1, seed) for seed in range(2))
    assert values.conj().is_conj()
    torch.testing.assert_close(linear_scan(values.conj(), multipliers.conj()), linear_scan(values, multipliers).conj())


# -- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lowered", "as an operator"])
def lowered(request, monkeypatch):
    """Both ways through Inductor: with our lowering and without."""
    from torch._inductor.lowering import lowerings

    from hwbp_compiler.scan import inductor

    inductor.register()
    if request.param != "lowered":
        monkeypatch.delitem(lowerings, OPERATOR)


def test_compiled_gradients_are_those_of_eager_mode_at_any_length(lowered):
    def scan(a: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return linear_scan(2 * a, m.sigmoid(), reverse=True).sin(), linear_scan(a.transpose(0, 1), 0.5)

    compiled = torch.compile(scan, dynamic=True, fullgraph=True)
    for length in (7, 12):
        a, m = (random((length, 4, 3), torch.float32, -1, 1, s).requires_grad_() for s in range(2))
        for found, want in zip(compiled(a, m), scan(a, m), strict=True):
            torch.testing.assert_close(found, want)
        found, want = (torch.autograd.grad(sum(u.sum() for u in f(a, m)), (a, m)) for f in (compiled, scan))
        torch.testing.assert_close(found, want)


def test_a_compiled_graph_calls_the_kernel_without_the_dispatcher():
    from torch._inductor.utils import run_and_get_code

    from hwbp_compiler.scan import inductor

    inductor.register()
    a, m = torch.rand(9, 4), torch.rand(9, 4)
    found, (code,) = run_and_get_code(torch.compile(linear_scan), a, m)
    assert code.count("linear_scan_out(") == 1 and "torch.ops.highway" not in code
    assert torch.equal(found, linear_scan(a, m))


PROCESS = """
import torch
from torch._dynamo.utils import counters
from hwbp_compiler.scan import inductor, linear_scan

inductor.register()
a = torch.linspace(0, 1, 12).reshape(4, 3).requires_grad_()
torch.compile(linear_scan)(a, reverse=True).backward(torch.ones(4, 3))
print(a.grad.tolist())
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
print(counters["aot_autograd"]["autograd_cache_miss"], counters["aot_autograd"]["autograd_cache_hit"])
"""


def test_a_second_process_finds_the_compiled_graph_in_both_caches(tmp_path):
    """Both are new processes, because the key of a graph depends on settings of the process, which other tests may have
    changed.
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def said() -> list[str]:
        run = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout.splitlines()

    gradient = str([[float(i)] * 3 for i in range(1, 5)])
    assert said() == [gradient, "2 0", "1 0"]
    assert said() == [gradient, "0 2", "0 1"]


# -- without a compiler -------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch):
    def build(dtype: torch.dtype):
        raise RuntimeError("no C++ compiler\nand a long story")

    cpu.native.forget()
    monkeypatch.setattr(cpu.native, "build", build)
    yield
    cpu.native.forget()


def test_without_a_compiler_the_scan_is_still_right_and_says_so_once(no_compiler, caplog):
    with caplog.at_level(logging.WARNING, "hwbp_compiler"):
        for dtype, shape in itertools.product([torch.float32, torch.bfloat16], [(0, 3), (1,), (300, 4), (9, 20000)]):
            all_ways(shape[0], shape[1:], dtype)
    assert [record.getMessage() for record in caplog.records] == [
        "linear_scan: no CPU kernel, using torch operators instead: RuntimeError: no C++ compiler"
    ]


def test_a_compiler_that_fails_is_as_good_as_none(monkeypatch, caplog, tmp_path):
    from torch._inductor import config

    cpu.native.forget()
    broken = tmp_path / "g++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    try:
        with config.patch({"cpp.cxx": (str(broken),)}), caplog.at_level(logging.WARNING, "hwbp_compiler"):
            assert linear_scan(torch.ones(3, dtype=torch.complex128)).tolist() == [1, 2, 3]
        assert len(caplog.records) == 1
    finally:
        cpu.native.forget()


# -- errors and documentation -------------------------------------------------------------------------------------


V = torch.zeros(4, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((V.long(), None), TypeError, "values has dtype torch.int64; allowed are float16"),
        ((V.bool(), V), TypeError, "values has dtype torch.bool"),
        ((torch.tensor(1.0), None), ValueError, "values has no dimension"),
        (([1.0, 2.0], None), TypeError, "multipliers must be a lower-triangular tuple of 2 rows"),
        ((3.0, None), TypeError, "values is float"),
        ((V.to_sparse(), None), TypeError, "values has layout torch.sparse_coo"),
        ((V, V.double()), TypeError, "multipliers has dtype torch.float64, values have torch.float32"),
        ((V, torch.zeros(5)), ValueError, r"multipliers has shape \[5\].*dimension 0 must be 1 or 4"),
        ((V, torch.zeros(4, 3, 3)), ValueError, "dimension 2 must be 1 or 2"),
        ((V, torch.zeros(3, 2)), ValueError, r"2 dimensions; allowed are 0 .*1 .*or 3"),
        ((V, torch.zeros(4, device="meta")), ValueError, "multipliers is on meta, values are on cpu"),
        ((V, "half"), TypeError, "multipliers is str"),
        ((V, True), TypeError, "multipliers is bool"),
        ((V, 1j), TypeError, "multipliers is 1j, values are torch.float32"),
        (((), ()), ValueError, "values is an empty tuple"),
        (((V,), (0.5,)), TypeError, r"multipliers\[0\] must be a tuple of 1 entries"),
        (((V, V), ((0.5,), (0.5,))), TypeError, r"multipliers\[1\] must be a tuple of 2 entries"),
        (((V, V[:2]), ((0.5,), (0, 0.5))), ValueError, r"values\[1\] is \[2, 3, 2\].*must agree"),
        (((V, 1.0), ((0.5,), (0, 0.5))), TypeError, r"values\[1\] is float"),
        (((V, V), ((0.5,), (V[:, :2], 0))), ValueError, r"multipliers\[1\]\[0\] has shape"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(arguments, error, says):
    with pytest.raises(error, match=says):
        linear_scan(*arguments)


def test_reverse_must_be_a_bool():
    with pytest.raises(TypeError, match="reverse is 1; allowed are True and False"):
        linear_scan(V, reverse=1)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((V.long(), None), TypeError, "values has dtype"),
        ((V, torch.zeros(3)), ValueError, "dimension 0 must be 1 or 4"),
    ],
)
def test_the_operator_itself_refuses_what_the_function_refuses(arguments, error, says):
    with pytest.raises(error, match=says):
        OPERATOR(*arguments)


def test_meta_tensors_have_their_shape():
    found = linear_scan(V.to("meta").transpose(0, 1), torch.zeros(3, device="meta"))
    assert found.shape == (3, 4, 2) and found.is_contiguous() and found.device.type == "meta"


def test_spread_gives_a_multiplier_per_link_the_missing_dimensions():
    assert spread(torch.zeros(4), V).shape == (4, 1, 1)


def test_the_examples_in_the_documentation():
    import doctest
    import importlib

    results = doctest.testmod(importlib.import_module("hwbp_compiler.scan.function"), extraglobs={"torch": torch})
    assert results.attempted == 2 and not results.failed
