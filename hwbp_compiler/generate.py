"""``generate_code``: show the kernels of a model's forward and rewritten backward pass, on any machine."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .cost.ladder import ladder
from .cross_compile import CodeText, Kernel, Target, generate_kernels, need_triton
from .errors import HighwayError
from .graph.record import ChainRecord
from .joint_pass import HighwayPass
from .options import Options, parse
from .pass_sequence import PassSequence
from .pieces import keeping_pieces
from .prepare import prepare
from .report.restore import compiled_apart, left_as_it_was
from .retarget import Retarget
from .scan import register_lowerings
from .torch_private import (
    backward_at_once,
    compile_fx,
    cuda_device_guard,
    device_decompositions,
    user_joint_passes,
)

CPU = "cpu"

# Inductor options that make it measure on the GPU.
_MEASURING = ("max_autotune", "max_autotune_gemm", "max_autotune_pointwise", "coordinate_descent_tuning")


def generate_code(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    target: str = CPU,
    **kwargs: Any,
) -> GeneratedCode:
    """Return the code that ``torch.compile(model, backend="highway", options=options)`` generates, as text.

    ``model(*args, **kwargs)`` is run once, in eager mode on its own device, and is traced as ``torch.compile`` traces
    it. A CUDA target needs the ``triton`` package, but no GPU: the traced graph is compiled as if its tensors lay on
    one. The model is left as it was: parameters and their ``.grad``, buffers, inputs, and the states of the random
    number generators.

    The code for a CUDA target can differ from what runs on a GPU in two cases. Where Inductor would measure on the GPU
    before it decides, it cannot here (``max_autotune`` and similar options are switched off, and products are not
    padded). And a GPU fuses attention with dropout.

    Args:
        model: a module or function on a CPU or on the meta device, compiled already or not.
        *args: the model's positional arguments.
        options: those of ``torch.compile``, checked in the same way. With ``rewrite="profitable"`` the cost model
            decides for the target. With "auto", the code is that of the first form "auto" would choose from.
        target: ``"cpu"`` for C++ code for this machine; ``"cuda:sm_80"``, ``"cuda:sm_90"`` and so on for Triton code.
        **kwargs: the model's keyword arguments.

    Returns:
        A string with all generated modules. Its attributes are its parts: ``.forward``, ``.backward``, ``.kernels``,
        and for a CUDA target ``.ptx`` and ``.cubin``.

    Raises:
        OptionError: a key or value in ``options``, or the target, is not allowed. A ``ValueError``.
        HighwayError: the target is a CUDA device and the ``triton`` package is missing; there is no backward pass; a
            pass failed and ``strict`` is set; or the graph has an operator that only a CPU has.

    >>> code = generate_code(model, x, options={"iterations": 2}, target="cuda:sm_90")
    >>> print(code.backward)
    >>> code.kernels[0].ptx
    """
    ours, patches = parse(options)
    where = None if target == CPU else Target.parse(target)
    if where is not None:
        need_triton(where)
        patches.update(dict.fromkeys(_MEASURING, False))
    register_lowerings()
    patches = keeping_pieces(patches)
    generating = _Generating(ours, patches, where)
    with left_as_it_was(model) as keep:
        generating.trace(model, keep)(*args, **kwargs)
        if rungs := ladder(generating.chains) if ours.auto else []:  # the forms differ in the backward pass only
            generating = _Generating(ours.at(rungs[0].how), patches, where)
            generating.trace(model, keep)(*args, **kwargs)
    if not any(graph.name.startswith("backward") for graph in generating.graphs):
        raise HighwayError(_why_no_backward(generating))
    return GeneratedCode(target, tuple(generating.graphs), tuple(generating.chains))


def _joint_passes(
    patches: Mapping[str, Any], rewrite: HighwayPass | None, where: Target | None
) -> dict[str, PassSequence]:
    """The passes before and after Inductor's own. For a GPU target, our pass sees the graph on the GPU, Inductor's own
    passes see it on the CPU (some compute with its constants), and later steps see it on the GPU again.
    """
    first: list[Any] = list(user_joint_passes(patches))
    last: list[Any] = list(user_joint_passes(patches, "joint_custom_post_pass"))
    highway: list[Any] = [] if rewrite is None else [rewrite]
    if where is not None:
        there, here = Retarget(torch.device("cuda", 0)), Retarget(torch.device("cpu"))
        highway = [there, *highway, here]
        last.append(there)
    found = {"joint_custom_pre_pass": [*first, *highway], "joint_custom_post_pass": last}
    return {name: PassSequence(tuple(passes)) for name, passes in found.items() if passes}


@dataclass(frozen=True)
class GraphCode(CodeText):
    """The code of one graph.

    Attributes:
        name: ``"forward"`` or ``"backward"``, followed by a number if Dynamo split the model into several graphs.
    """

    name: str = ""


class GeneratedCode(str):
    """Generated code: a string that also gives access to its parts.

    Attributes:
        target: the device the code is for: ``"cpu"``, ``"cuda:sm_90"``, ...
        graphs: the graphs in the order they were compiled, each with ``.name``, ``.source`` and ``.kernels``.
        chains: the decision about each chain, as in a report of ``explain``.
    """

    target: str
    graphs: tuple[GraphCode, ...]
    chains: tuple[ChainRecord, ...]

    def __new__(cls, target: str, graphs: tuple[GraphCode, ...], chains: tuple[ChainRecord, ...] = ()) -> GeneratedCode:
        code = super().__new__(cls, "\n".join(_titled(graph, target) for graph in graphs))
        code.target, code.graphs, code.chains = target, graphs, chains
        return code

    @property
    def forward(self) -> str:
        """The generated modules of the forward pass."""
        return self._part("forward")

    @property
    def backward(self) -> str:
        """The generated modules of the backward pass, with its chains rewritten."""
        return self._part("backward")

    def _part(self, name: str) -> str:
        return "\n".join(graph.source for graph in self.graphs if graph.name.startswith(name))

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """All generated kernels, those of the forward pass first. Calls to libraries are not included."""
        return tuple(kernel for graph in self.graphs for kernel in graph.kernels)

    @property
    def ptx(self) -> dict[str, str]:
        """Maps ``"<graph>.<kernel>"`` to the kernel's PTX (CUDA assembly). Triton compiles it when first used.

        Raises:
            HighwayError: the target is a CPU.
        """
        return {f"{graph.name}.{kernel.name}": kernel.ptx for graph in self.graphs for kernel in graph.kernels}

    @property
    def cubin(self) -> dict[str, bytes]:
        """Maps ``"<graph>.<kernel>"`` to the kernel's machine code, an ELF file. Triton compiles it when first used.

        Raises:
            HighwayError: the target is a CPU.
        """
        return {f"{graph.name}.{kernel.name}": kernel.cubin for graph in self.graphs for kernel in graph.kernels}


def _titled(graph: GraphCode, target: str) -> str:
    many = "" if len(graph.kernels) == 1 else "s"
    return f"# ==== {graph.name}: {len(graph.kernels)} kernel{many} for {target} ====\n{graph.source}"


class _Generating:
    """A backend that compiles every graph to text and runs it in eager mode."""

    def __init__(self, options: Options, patches: dict[str, Any], where: Target | None) -> None:
        self.options = options
        self.patches = patches
        self.where = where
        self.pieces = 0
        self.graphs: list[GraphCode] = []
        self.chains: list[ChainRecord] = []

    def trace(self, model: Callable[..., Any], keep: Callable[[Any], None]) -> Callable[..., Any]:
        """``model`` in a form that generates code when it runs."""

        def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self.pieces += 1
            loops = prepare(module, self.options).records
            rewrite = None if self.options.rewrite == "never" else HighwayPass(self.options, loops, quiet=True)
            # Inductor owns the module it gets and may change it, so the eager run uses a copy.
            eager = fx.GraphModule(module, copy.deepcopy(module.graph))
            with backward_at_once(), contextlib.nullcontext() if self.where is None else cuda_device_guard():
                compiled = compile_fx(
                    module,
                    inputs,
                    {**self.patches, **_joint_passes(self.patches, rewrite, self.where)},
                    inner_compile=self._generate,
                    decompositions=None if self.where is None else device_decompositions(),
                )

            self.chains += [*loops, *(rewrite.records if rewrite is not None else ())]

            def run(*values: Any) -> Any:
                keep(values)
                return eager(*values)

            return self._what_runs(compiled, run)

        return compiled_apart(model, backend)

    def _what_runs(self, compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        return eager

    def _generate(self, module: fx.GraphModule, example_inputs: Any, **about: Any) -> Callable[..., Any]:
        # The example inputs lie on this machine's CPU; the values in the graph lie on the target device.
        inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        backward = bool(about.get("is_backward"))
        code = generate_kernels(
            module, inputs, self.where, is_backward=backward, is_inference=bool(about.get("is_inference"))
        )
        name = "backward" if backward else "forward"
        if self.pieces > 1:
            name += f" {self.pieces}"
        self.graphs.append(GraphCode(code.target, code.source, code.kernels, name))
        return module.forward


def _why_no_backward(generating: _Generating) -> str:
    if not generating.pieces:
        reason = (
            "torch.compile's front end, Dynamo, found no graph to compile, so all of the model runs in eager mode; "
            'TORCH_LOGS="graph_breaks" tells why, and torch._dynamo.reset() makes Dynamo look again'
        )
    elif not torch.is_grad_enabled():
        reason = "gradients are switched off; call it outside torch.no_grad()"
    else:
        reason = "no parameter or input requires a gradient"
    return f"generate_code: there is no backward pass: {reason}"
