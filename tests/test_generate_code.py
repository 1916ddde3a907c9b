"""Claims about ``generate_code``: it gives the kernels of a model, forward and rewritten backward, without a GPU.

The tests fix the number of kernels per iteration for nn.GRU and nn.LSTM, a loop over a recurrent cell, a pre-LN
Transformer and a post-ReLU ResNet, so that a lost fusion is noticed. Every one of their kernels is compiled for sm_90.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from cells import CASES as CELLS
from small import Residual
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

import hwbp_compiler
from hwbp_compiler import HighwayError, OptionError
from hwbp_compiler.cross_compile import Kernel
from hwbp_compiler.generate import GeneratedCode, generate_code
from hwbp_compiler.passes.write_out_cells import write_out_cells

TARGET = "cuda:sm_90"


@pytest.fixture
def needs_triton():
    pytest.importorskip("triton", reason="generate_code for CUDA targets needs the triton package")


# ---- models -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A GRU written as a loop over nn.GRUCell; every state is returned."""

    def __init__(self, length: int = 6, width: int = 16) -> None:
        super().__init__()
        self.cell, self.length = nn.GRUCell(width, width), length

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros_like(x[0])
        states = []
        for t in range(self.length):
            state = self.cell(x[t], state)
            states.append(state)
        return torch.stack(states)


class TransformerBlock(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(x + self.norms[1](self.convs[1](inner)))


def case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "recurrent":
        return Recurrent(), torch.randn(6, 3, 16)
    if name in ("gru", "lstm"):
        return getattr(nn, name.upper())(16, 16), torch.randn(6, 3, 16)
    if name == "transformer":
        blocks = [TransformerBlock() for _ in range(2)]
        return nn.Sequential(nn.Embedding(10, 16), *blocks, nn.LayerNorm(16), nn.Linear(16, 10)), torch.zeros(
            2, 8, dtype=torch.long
        )
    blocks = [ResidualBlock() for _ in range(4)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.Flatten(), nn.Linear(4 * 36, 5)), torch.randn(2, 3, 8, 8)


@functools.cache
def generated(name: str, iterations: int, target: str = TARGET) -> GeneratedCode:
    model, x = case(name)
    options = {"iterations": iterations, "rewrite": "always", "strict": True}
    code = generate_code(model, x, options=options, target=target)
    assert [chain.decision for chain in code.chains] == ["rewritten"]
    return code


def kind(kernel: Kernel) -> str:
    if "tl.associative_scan(" in kernel.source:
        return "scan"
    return "reduction" if "tl.sum(" in kernel.source or "triton_helpers.sum" in kernel.source else "pointwise"


def launches(code: GeneratedCode) -> Counter[str]:
    """The calls of the backward pass: kernels by kind, library functions by name."""
    (graph,) = (graph for graph in code.graphs if graph.name == "backward")
    kinds = {kernel.name: kind(kernel) for kernel in graph.kernels}
    return Counter(kinds.get(name, name.split(".")[-2 if name.endswith(".default") else -1]) for name in graph.launches)


# ---- the kernels of an iteration ----------------------------------------------------------------------------

ATTENTION = "_scaled_dot_product_efficient_attention_backward"
PER_ITERATION = {
    # The gates' gradients in one kernel, one product with the shared weights, the scan.
    "recurrent": {"pointwise": 1, "mm": 1, "scan": 1},
    "gru": {"pointwise": 1, "mm": 1, "scan": 1},
    # Also the gradient of h, which no scan computes: the result of its block beside the last row.
    "lstm": {"pointwise": 2, "mm": 1, "scan": 1},
    # Attention and MLP links alternate: two products each, attention itself, GELU, and the backward of LayerNorm, whose
    # last step is in the scan's loads together with the interleaving. The other kernels put operands into the layouts
    # that the batched products and attention need.
    "transformer": {"pointwise": 5, "reduction": 2, "bmm": 4, ATTENTION: 1, "scan": 1},
    # Two convolutions. For each, the sums over the batch that BatchNorm's backward needs, and what follows from them.
    "resnet": {"pointwise": 2, "reduction": 2, "convolution_backward": 2, "scan": 1},
}


# One for w^0 and one for the iteration. If K = 1 and only the last state has a loss, w^0 is its gradient repeated.
SCANS_OF_ONE_ITERATION = {"recurrent": 2, "gru": 2, "lstm": 3, "transformer": 1, "resnet": 2}


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("name", PER_ITERATION)
def test_an_iteration_is_a_few_kernels_with_one_scan_among_them(name):
    one, two = (launches(generated(name, k)) for k in (1, 2))
    assert two - one == PER_ITERATION[name]
    assert one["scan"] == SCANS_OF_ONE_ITERATION[name]


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("name", PER_ITERATION)
def test_what_an_iteration_scans_is_computed_in_the_kernel_that_scans(name):
    code = generated(name, 1)
    scans = [kernel for kernel in code.kernels if kind(kernel) == "scan"]
    assert len(scans) == SCANS_OF_ONE_ITERATION[name]
    # At least the results of the blocks and a multiplier or the chain's head; injections if there are any.
    assert scans[-1].source.count("tl.load(") >= (2 if name == "gru" else 3)
    # The scan writes only the states, not the running products.
    assert all(len(stored_results_of_the_scan(kernel)) == 1 for kernel in scans)


def stored_results_of_the_scan(kernel: Kernel) -> list[str]:
    (line,) = re.findall(r"(.*) = tl\.associative_scan\(", kernel.source)
    results = [name.strip() for name in line.split(",") if name.strip()]
    return [name for name in results if re.search(rf"tl\.store\(.*, {name},", kernel.source)]


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("name", PER_ITERATION)
def test_every_kernel_compiles_for_the_target(name):
    code = generated(name, 1)
    assert code.ptx.keys() == code.cubin.keys() == {f"{g.name}.{k.name}" for g in code.graphs for k in g.kernels}
    assert all(".target sm_90" in ptx and ".entry triton_" in ptx for ptx in code.ptx.values())
    assert all(binary.startswith(b"\x7fELF") for binary in code.cubin.values())


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_recurrent_module_stays_whole_and_its_exact_backward_is_pytorchs_own(kind):
    forward, backward = generate_code(*case(kind), options={"iterations": "exact"}, target=TARGET).graphs
    assert "torch.ops.highway.recurrent_module.default" in forward.launches
    assert backward.launches == ("torch.ops.highway.recurrent_module_backward.default",)


@pytest.mark.usefixtures("needs_triton")
def test_half_precision_attention_is_the_flash_kernel_and_its_chain_is_rewritten():
    model, x = case("transformer")
    options = {"iterations": 1, "rewrite": "always", "strict": True}
    code = generate_code(model.bfloat16(), x, options=options, target=TARGET)
    assert [chain.decision for chain in code.chains] == ["rewritten"]
    assert launches(code)["_scaled_dot_product_flash_attention_backward"] == 2
    assert "for_cpu" not in code


# ---- what is returned ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_triton")
def test_the_code_is_a_string_of_both_passes():
    code = generated("recurrent", 1)
    assert isinstance(code, str) and code.target == TARGET
    assert "tl.associative_scan(" in code.backward and "tl.associative_scan(" not in code.forward
    assert code.forward in code and code.backward in code
    assert [graph.name for graph in code.graphs] == ["forward", "backward"]
    assert set(code.kernels) == {kernel for graph in code.graphs for kernel in graph.kernels}


def test_code_for_the_cpu_calls_the_scan_and_is_cplusplus():
    code = generated("recurrent", 1, "cpu")
    assert "linear_scan_from_out(" in code.backward  # from the gradient of the last state
    assert all("#include" in kernel.source for kernel in code.kernels)
    with pytest.raises(HighwayError, match="is C\\+\\+ for the CPU"):
        _ = code.ptx


@pytest.mark.usefixtures("needs_triton")
def test_a_model_on_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(*(Residual(1 << 14) for _ in range(4)))
        x = torch.empty(8, 1 << 14)
    code = generate_code(model, x, options={"rewrite": "always", "iterations": 1}, target=TARGET)
    assert "tl.load(" in code.backward and code.chains[0].decision == "rewritten"


@pytest.mark.usefixtures("needs_triton")
def test_model_inputs_and_random_numbers_are_left_as_they_were():
    model, x = case("resnet")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    x.requires_grad_()
    generate_code(model, x, options={"iterations": 0, "rewrite": "always"}, target=TARGET)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters()) and x.grad is None
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.usefixtures("needs_triton")
def test_pieces_between_graph_breaks_are_numbered():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            torch._dynamo.graph_break()
            return self.layers[1](x.sin())

    code = generate_code(Broken(), torch.randn(2, 4), target=TARGET)
    assert [graph.name for graph in code.graphs] == ["forward", "backward", "forward 2", "backward 2"]


# ---- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_91", "gpu", None, 90])
def test_an_unknown_target_is_refused_with_those_that_are_known(target):
    with pytest.raises(OptionError, match="allowed are cuda:sm_70, .*'cpu'") as error:
        generate_code(nn.Linear(2, 2), torch.randn(1, 2), target=target)
    assert isinstance(error.value, ValueError) and repr(target) in str(error.value)


def test_an_unknown_option_is_refused():
    with pytest.raises(OptionError, match="iteration"):
        generate_code(nn.Linear(2, 2), torch.randn(1, 2), options={"iteration": 1})


def test_without_triton_it_says_what_to_install():
    program = """
import sys, torch
sys.modules["triton"] = None
import importlib.util as util
found = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else found(name, *rest)
import hwbp_compiler
try:
    hwbp_compiler.generate_code(torch.nn.Linear(2, 2), torch.randn(1, 2), target="cuda:sm_90")
except hwbp_compiler.HighwayError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install triton" in run.stdout and "target='cpu'" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("requires_grad", "grad_mode", "says"),
    [(False, True, "no parameter or input requires a gradient"), (True, False, "outside torch.no_grad")],
)
def test_without_a_backward_pass_it_says_why(requires_grad, grad_mode, says):
    model = nn.Linear(2, 2).requires_grad_(requires_grad)
    with torch.set_grad_enabled(grad_mode), pytest.raises(HighwayError, match=says):
        generate_code(model, torch.randn(1, 2))


@pytest.mark.usefixtures("needs_triton")
def test_attention_that_no_fused_kernel_of_a_gpu_takes_is_refused():
    def attend(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q)

    with pytest.raises(HighwayError, match="heads of size 3 .*SDPBackend.MATH"):
        generate_code(attend, torch.randn(1, 1, 4, 3, requires_grad=True), target=TARGET)


# ---- recurrent cells on a GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_cells_written_out_are_the_cells(kind, bias):
    cell = kind(3, 4, bias=bias).double()
    x, h, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4))
    state = h if kind is nn.GRUCell else (h, c)
    counts = []

    def backend(module: torch.fx.GraphModule, inputs: list):
        counts.append(write_out_cells(module, everywhere=True))
        assert not any("cell" in str(node.target) for node in module.graph.nodes)
        return module.forward

    def total(run) -> tuple[Tensor, ...]:
        found = run(x, state)
        found = found if isinstance(found, tuple) else (found,)
        loss = sum((t * (i + 1)).sin().sum() for i, t in enumerate(found))
        wanted = [x, h, *cell.parameters()] if kind is nn.GRUCell else [x, h, c, *cell.parameters()]
        return (*found, *torch.autograd.grad(loss, wanted))

    for found, want in zip(total(torch.compile(cell, backend=backend)), total(cell), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)  # float64, at most another order of sums
    assert counts == [1]


def test_cells_on_a_cpu_are_left_to_torch():
    def backend(module: torch.fx.GraphModule, inputs: list):
        assert write_out_cells(module) == 0
        return module.forward

    torch.compile(nn.GRUCell(3, 4), backend=backend)(torch.randn(2, 3))


def test_a_cell_above_another_is_written_out_too():
    """Nothing records where the replacement of the lower cell lies."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.ModuleList(nn.GRUCell(3, 3) for _ in range(2))

        def forward(self, x, h):
            return self.cells[1](self.cells[0](x, h), h)

    counts = []

    def backend(module: torch.fx.GraphModule, inputs: list):
        with FakeTensorMode():
            for node in module.graph.nodes:  # as if it were a GPU's
                value = node.meta.get("example_value")
                if isinstance(value, Tensor):
                    node.meta["example_value"] = torch.empty(value.shape, device="cuda")
        counts.append(write_out_cells(module))
        return module.forward

    torch.compile(Two(), backend=backend)(torch.randn(2, 3), torch.randn(2, 3))
    assert counts == [2]


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("case", CELLS, ids=lambda case: case.name)
def test_the_code_of_a_cell_over_time_is_python(case):
    """The text of a step is an argument in the code, which Inductor also quotes in comments."""
    cell, x, state = case.build(5)

    def run(x, *state):
        return hwbp_compiler.recurrent(cell, x, pytree.tree_unflatten(state, spec))[0]

    leaves, spec = pytree.tree_flatten(state)
    code = generate_code(run, x, *leaves, options={"iterations": 1, "rewrite": "always"}, target=TARGET)
    ast.parse(code)


# ---- a run over segments --------------------------------------------------------------------------------------


@functools.cache
def in_segments(kind: str, iterations: int) -> GeneratedCode:
    model, x = getattr(nn, kind.upper())(16, 16), torch.randn(17, 3, 16)
    options = {"iterations": iterations, "segment": 3, "rewrite": "always", "strict": True}
    code = generate_code(model, x, options=options, target=TARGET)
    assert [(chain.decision, chain.segments) for chain in code.chains] == [("rewritten", 6)]
    return code


@pytest.mark.usefixtures("needs_triton")
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_run_over_segments_is_two_launches_a_step_and_one_scan(kind):
    """The product with the weights, and everything elementwise between two products."""
    one, two = (launches(in_segments(kind, k)) for k in (1, 2))
    assert two - one == {"pointwise": 3, "mm": 3, "scan": 1}
