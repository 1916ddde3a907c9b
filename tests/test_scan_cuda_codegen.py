"""Claims about the GPU code of ``linear_scan``, on a machine without a GPU.

The kernels are generated for a described device. Their text shows how many there are and what they contain. Compiling
them to PTX shows that they are valid, and Triton's interpreter shows what they compute.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from triton_interpreter import load  # noqa: E402

from hwbp_compiler import cross_compile  # noqa: E402
from hwbp_compiler.cross_compile import CodeText, generate_kernels  # noqa: E402
from hwbp_compiler.scan import inductor  # noqa: E402
from hwbp_compiler.scan.reference import linear_scan_reference  # noqa: E402

scan = torch.ops.highway.linear_scan.default
FULL = (1024, 128, 64)


def generate(
    function: Callable[..., Any], *inputs: tuple | Tensor, dtype=torch.float32, target="cuda:sm_90"
) -> CodeText:
    """The kernels of a function of tensors with these shapes.

    Traced on the CPU: autograd on fake CUDA tensors needs a torch that was built for CUDA.
    """
    mode = FakeTensorMode()
    with mode:
        graph = make_fx(function)(*(torch.empty(shape, dtype=dtype) for shape in inputs))
        fake = [torch.empty(shape, dtype=dtype, device="cuda") for shape in inputs]
    return generate_kernels(graph, fake, target)


def body(kernel: cross_compile.Kernel) -> str:
    return kernel.source[kernel.source.index(f"def {kernel.name}(") :]


def calls(code: CodeText) -> list[str]:
    """What the generated Python calls besides its own kernels."""
    return re.findall(r"(?:torch\.ops|extern_kernels|aten)\.[\w.]+\(", code.source[code.source.index("def call") :])


# ---- one kernel, with its neighbours in it ------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scan_and_what_computes_its_inputs_are_one_kernel(dtype, reverse):
    code = generate(lambda a, m: scan(2 * a, m.sigmoid(), reverse), FULL, FULL, dtype=dtype)
    (kernel,) = code.kernels
    text = body(kernel)
    assert "tl.associative_scan((" in text and "tl.sigmoid(" in text and "exp" not in calls(code)
    assert text.count("tl.load(") == 2 and text.count("tl.store(") == 1 and not calls(code)
    # Nothing is reversed in memory: loads and stores count rows from the end.
    assert ("((-8192)*" in text) == reverse


def test_a_forward_scan_and_what_follows_it_are_one_kernel():
    code = generate(lambda a, m: scan(a, m).sin(), FULL, FULL)
    (kernel,) = code.kernels
    assert "tl.associative_scan" in kernel.source and "sin(" in body(kernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_scans_accumulate_in_float32(dtype):
    (kernel,) = generate(lambda a, m: scan(a, m), FULL, FULL, dtype=dtype).kernels
    pair = re.search(r"tl\.associative_scan\(\((\w+), (\w+),\)", body(kernel))
    for name in pair.groups():
        (source,) = re.findall(rf"{name} = tl\.broadcast_to\((\w+),", body(kernel))
        assert re.search(rf"{source} = \w+\.to\(tl\.float32\)", body(kernel))


def test_what_blocks_of_sixteen_bit_numbers_hand_on_is_float32():
    shape = (65536, 1, 64)
    code = generate(lambda a, m: scan(a, m), shape, shape, dtype=torch.bfloat16)
    dtypes = re.findall(r"empty_strided_cuda\(.*, torch\.(\w+)\)", code.source)
    assert sorted(dtypes) == ["bfloat16", "float32", "float32"]


def test_double_precision_stays_double():
    (kernel,) = generate(lambda a, m: scan(a, m), FULL, FULL, dtype=torch.float64).kernels
    assert ".to(tl.float64)" in body(kernel) and ".to(tl.float32)" not in body(kernel)


@pytest.mark.parametrize("shape", [(), (1024,), (1024, 1, 1), (1, 128, 1), (1, 1, 64)])
def test_broadcast_multipliers_are_not_materialised(shape):
    code = generate(lambda a, m: scan(a, m, True), FULL, shape)
    assert len(code.kernels) == 1 and not calls(code)
    assert code.source.count("= empty_strided_cuda(") == 1


def test_a_sum_over_links_is_a_scan_of_one_tensor():
    (kernel,) = generate(lambda a: scan(a, None, True), FULL).kernels
    assert re.search(r"tl\.associative_scan\(\(\w+,\)", body(kernel))


def test_backward_is_the_other_scan_and_the_sum_of_the_multipliers_gradient():
    def backward(a: Tensor, m: Tensor, grad: Tensor):
        a, m = a.detach().requires_grad_(), m.detach().requires_grad_()
        return torch.autograd.grad(scan(a, m), (a, m), grad)

    code = generate(backward, FULL, FULL, FULL)
    scans = [kernel for kernel in code.kernels if "tl.associative_scan" in kernel.source]
    # u forwards; the gradient backwards with the shift of m in its loads; the product for m.
    assert len(scans) == 2 and len(code.kernels) <= 3 and not calls(code)


# ---- few columns --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [65536, 65537])
def test_a_long_narrow_scan_is_three_kernels_over_blocks(length, reverse):
    shape = (length, 1, 64)
    code = generate(lambda a, m: scan(2 * a, m.sigmoid(), reverse), shape, shape)
    ends, carries, blocks = (body(kernel) for kernel in code.kernels)
    assert all("tl.associative_scan((" in text for text in (ends, carries, blocks)) and not calls(code)
    # The first kernel stores only the ends of blocks, not the states inside.
    sizes = [eval(size) for size in re.findall(r"empty_strided_cuda\((\(.*?\)),", code.source)]
    count = -(-length // 256)
    assert sorted(sizes) == sorted([(count, 1, 64)] * 2 + [(count, 256, 1, 64)])
    # Enough work for every multiprocessor: blocks times columns.
    assert f"xnumel = {count * 64}" in ends and f"xnumel = {count * 64}" in blocks


def test_long_narrow_sums_need_no_scan_for_the_ends_of_blocks():
    code = generate(lambda a: scan(a, None), (65536, 1, 64))
    ends, carries, blocks = (body(kernel) for kernel in code.kernels)
    assert "tl.sum(" in ends and "associative_scan" not in ends
    assert "associative_scan" in carries and "associative_scan" in blocks


def test_whole_blocks_are_read_without_a_bounds_test():
    exact, ragged = (
        generate(lambda a, m: scan(a, m), (n, 1, 64), (n, 1, 64)).kernels[0].source for n in (65536, 65537)
    )
    assert "65537" in body_text(ragged) and "65536" not in body_text(exact)


def body_text(source: str) -> str:
    return source[source.rindex("@triton.jit") :]


def test_many_columns_are_not_cut_into_blocks():
    assert len(generate(lambda a, m: scan(a, m), (65536, 8, 1024), (65536, 8, 1024)).kernels) == 1


# ---- other devices, lengths, dtypes -------------------------------------------------------------------------


def test_complex_scans_call_the_operator():
    code = generate(lambda a, m: scan(a, m), (8, 4), (8, 4), dtype=torch.complex64)
    assert not code.kernels and calls(code) == ["torch.ops.highway.linear_scan.default("]


@pytest.mark.parametrize(("length", "kernels"), [(300, 1), (5000, 3)])
def test_symbolic_lengths_are_compiled_once_for_all(length, kernels):
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    source = ConstantSource("length")
    symbol = env.create_symbol(length, source, DimDynamic.DYNAMIC)
    mode = FakeTensorMode(shape_env=env)
    with mode:
        symbolic = env.create_symintnode(symbol, hint=length, source=source)
        fake = [torch.empty((symbolic, 4, 8), device="cuda") for _ in range(2)]
        graph = make_fx(lambda a, m: scan(a, m.sigmoid(), True))(*fake)
    code = generate_kernels(graph, fake)
    assert len(code.kernels) == kernels and all("ks0" in body(kernel) for kernel in code.kernels)
    assert str(length) not in "".join(body(kernel) for kernel in code.kernels)


@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_90"])
def test_generated_kernels_compile_to_ptx_of_their_target(target):
    code = generate(lambda a, m: scan(2 * a, m.sigmoid(), True), (256, 8, 64), (256, 8, 64), target=target)
    ptx = code.kernels[0].ptx
    assert f".target {target.removeprefix('cuda:')}" in ptx and ".entry triton_" in ptx


def test_all_three_kernels_of_a_long_scan_compile_to_ptx():
    code = generate(lambda a, m: scan(a, m), (65536, 1, 64), (65536, 1, 64), dtype=torch.bfloat16)
    assert all(".target sm_90" in kernel.ptx for kernel in code.kernels)


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_91", "cuda:90", "cpu", "rocm:gfx90a"])
def test_an_unknown_target_is_refused_with_those_that_are_known(target):
    with pytest.raises(ValueError, match=re.escape(f"target is {target!r}; allowed are cuda:sm_70")):
        generate_kernels(torch.fx.GraphModule({}, torch.fx.Graph()), [], target)


def test_the_machine_is_itself_again_afterwards():
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch.utils import _triton

    before = torch.cuda.get_device_properties, triton.runtime.driver._active, CudaInterface.is_available()
    generate(lambda a: a + 1, (8,))
    assert before == (torch.cuda.get_device_properties, triton.runtime.driver._active, CudaInterface.is_available())
    assert _triton.has_triton() == torch.cuda.is_available()


def test_the_graph_handed_in_is_not_changed():
    mode = FakeTensorMode()
    with mode:
        fake = [torch.empty(8, 4, device="cuda")]
        graph = make_fx(lambda a: scan(a.view(4, 8), None))(*fake)
    before = graph.code
    assert generate_kernels(graph, fake).source and graph.code == before


# ---- what the kernels compute -------------------------------------------------------------------------------


# Shape, shape of the multipliers, reverse, dtype. Lengths from 50 on are scanned in blocks of eight below.
CASES = [
    ((37, 3, 5), (37, 3, 5), False, torch.float32),
    ((37, 3, 5), (37,), True, torch.float32),
    ((37, 3, 5), (1, 3, 1), False, torch.float32),
    ((37, 3, 5), None, True, torch.float32),
    ((20, 5), (20, 5), True, torch.bfloat16),
    ((64, 3), (64, 3), True, torch.float32),
    ((67, 3), (67, 3), False, torch.float32),
    ((67, 3), (67, 3), True, torch.float64),
    ((67, 3), (67,), True, torch.float32),
    ((67, 3), None, False, torch.float32),
]


def interleaved(*tensors: Tensor) -> Tensor:
    """The scan of the rows of two sums, in turn, and of a head: an iteration over two kinds of links scans this."""
    *terms, head, multipliers = tensors
    even, odd = (functools.reduce(torch.add, (x.sin() for x in half)) for half in (terms[:5], terms[5:]))
    rows = torch.cat([even.unsqueeze(1), odd.unsqueeze(1)], 1).reshape(8, 2, 3)
    last = head.expand(2, 3).unsqueeze(0)
    return scan(torch.cat([rows, last]), multipliers, True)


def check_interpreted(long: int) -> None:
    """The body of the test below, in a process in which Triton interprets kernels."""
    inductor._LONG = long
    for shape, wanted, reverse, dtype in CASES:
        values = torch.randn(shape, dtype=dtype)
        inputs = [values] if wanted is None else [values, torch.randn(wanted, dtype=dtype)]

        def function(*tensors: Tensor) -> Tensor:
            a, *m = tensors
            return scan(2 * a, 0.5 * m[0] if m else None, reverse)  # noqa: B023 (called in this round)

        code = generate(function, *(x.shape for x in inputs), dtype=dtype)
        assert len(code.kernels) == (3 if shape[0] >= long else 1)
        (found,) = load(code.source)(inputs)
        halved = None if wanted is None else 0.5 * inputs[1].double()
        want = linear_scan_reference(2 * values.double(), halved, reverse=reverse)
        assert found.shape == values.shape and found.dtype == dtype
        # Thirty to seventy links with a few roundings each, in float32 at best, then one in the dtype.
        eps = max(torch.finfo(dtype).eps, 10 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps)
        torch.testing.assert_close(found.double(), want, rtol=eps, atol=eps * want.abs().max().item())
    code = generate(interleaved, *((4, 2, 3),) * 10, (3,), (9,))
    assert len(code.kernels) == 1 and not calls(code)
    inputs = [torch.randn(4, 2, 3) for _ in range(10)] + [torch.randn(3), torch.randn(9)]
    (found,) = load(code.source)(inputs)
    torch.testing.assert_close(found, interleaved(*inputs))
    zeros = torch.zeros(200, 1)
    code = generate(lambda a, m: scan(a, m), (200, 1), ())
    (found,) = load(code.source, XBLOCK=1)([zeros, torch.tensor(1e6)])
    assert torch.equal(found, zeros), "the product of multipliers overflows, the states do not"


def test_generated_kernels_compute_the_scan():
    run = subprocess.run(
        [sys.executable, "-c", "import test_scan_cuda_codegen as test; test.check_interpreted(long=50)"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
