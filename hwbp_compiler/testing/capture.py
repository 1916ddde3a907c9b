"""Run the rewritten joint graph without generating code, which saves seconds per test compared with Inductor.

There are three ways. All use Inductor's decompositions and apply the passes at the same point as Inductor:

``eager_highway(options)`` is a backend for ``torch.compile``: it rewrites, partitions, and runs both halves uncompiled.

``capture(model, args, loss)`` compiles once and then gives the gradients for any number of options. Each time it
rewrites a copy of the joint graph and runs it as a whole.

``trace(model, args, loss)`` is the same without Dynamo and AOTAutograd, and four times cheaper. It is for models that
are a plain function of their parameters (no mutation, no random numbers): the joint graph is traced directly.

The first two draw random numbers as eager mode does, so a seed gives the same dropout masks as the model itself.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import (  # type: ignore[import-untyped]
    default_partition,
    make_boxed_func,
    min_cut_rematerialization_partition,
)
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

import hwbp_compiler.backend  # noqa: F401  (has torch.compile ask backends for their context)
from hwbp_compiler.prepare import prepare
from hwbp_compiler.recurrence.operator import operator as recurrent_module
from hwbp_compiler.recurrence.tracing import traced_whole
from hwbp_compiler.torch_private import (
    RUNS_IN,
    SERVES,
    FakeTensorMode,
    TorchDispatchMode,
    aot_autograd,
    inductor_config,
    select_decomp_table,
    without_modes,
)

# A record of passes.run about one chain: .length, .decision, .reason.
Record = Any


def options(**kwargs: Any) -> Any:
    """Options for tests: rewrite every sound chain, however short, and raise on every failure."""
    from hwbp_compiler.options import Options

    return Options(**{"iterations": 4, "rewrite": "always", "min_length": 2, "strict": True, **kwargs})


@functools.cache
def decompositions() -> dict[Any, Any]:
    """Inductor's decompositions, except those that draw random numbers differently from eager mode."""
    with inductor_config.patch(fallback_random=True):
        return select_decomp_table()


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A separate graph over the same tensors: torch cannot copy fake ones that represent constants."""
    tensors = [v for v in vars(module).values() if isinstance(v, Tensor)] + list(module.buffers())
    return copy.deepcopy(module, {id(t): t for t in tensors})


def run_passes(graph: fx.Graph, options: Any) -> list[Record]:
    from hwbp_compiler import passes

    return passes.run(graph, options)


def eager_highway(
    options: Any,
    *,
    records: list[Record] | None = None,
    graphs: list[fx.GraphModule] | None = None,
    partition: Callable[..., Any] = min_cut_rematerialization_partition,
) -> Callable[..., Any]:
    """A backend: the passes under ``options`` (None: no passes), then ``partition``, then no compilation.

    Chains found are appended to ``records``, the joint graph before and after to ``graphs``.
    """

    def partition_fn(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if graphs is not None:
            graphs.append(copied(joint))
        if options is not None:
            found = run_passes(joint.graph, options)
            joint.recompile()
            if records is not None:
                records.extend(found)
        if graphs is not None:
            graphs.append(copied(joint))
        return partition(joint, joint_inputs, **kwargs)

    compile_graph = aot_autograd(
        fw_compiler=_as_it_stands,
        bw_compiler=_as_it_stands,
        partition_fn=partition_fn,
        decompositions=decompositions(),
    )
    if options is None:
        return compile_graph

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        loops, before = prepare(graph, options).records, len(records or ())
        compiled = compile_graph(graph, inputs)
        if records is not None:
            records[before:before] = loops  # only after compiling: Dynamo may start over and come here again
        return compiled

    return _for_us(backend)


def _for_us(backend: Callable[..., Any]) -> Callable[..., Any]:
    """Mark ``backend`` so that Dynamo passes loops and recurrent modules to it whole, as to the real backend."""
    setattr(backend, SERVES, True)
    setattr(backend, RUNS_IN, traced_whole)
    return backend


def _as_it_stands(graph: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    return make_boxed_func(graph.forward)


@dataclass
class Run:
    """What a joint graph's forward half was called with, and what it saved for the backward half."""

    primals: list[Any]
    rng_state: Tensor
    saved: list[Any] = field(default_factory=list)
    went_back: bool = False

    @classmethod
    def of(cls, primals: Sequence[Any]) -> Run:
        return cls([p.detach().clone() if isinstance(p, Tensor) else p for p in primals], torch.get_rng_state())


def _memory(values: Sequence[Any]) -> set[int]:
    return {value.data_ptr() for value in values if isinstance(value, Tensor)}


@dataclass
class JointGraph:
    """One captured joint graph, with its runs: between graph breaks, layers of one class share a graph."""

    module: fx.GraphModule
    forward_outputs: int
    runs: list[Run] = field(default_factory=list)

    def run_of(self, saved: Sequence[Any]) -> Run:
        """The run that saved these values. If several fit, the last of them that has not gone back yet."""
        fitting = [run for run in self.runs if _memory(saved) <= _memory(run.saved)]
        run = next((run for run in reversed(fitting) if not run.went_back), fitting[-1])
        run.went_back = True
        return run

    def rewritten(self, options: Any) -> tuple[fx.GraphModule, list[Record]]:
        module = copied(self.module)
        records = run_passes(module.graph, options) if options is not None else []
        module.graph.lint()
        module.recompile()
        return module, records


@dataclass
class Capture:
    """A model compiled once; see :func:`capture`."""

    compiled: Callable[..., Any]
    leaves: dict[str | int, Tensor]
    args: tuple[Any, ...]
    loss: Callable[[Any], Tensor]
    joints: list[JointGraph]
    recompile: Callable[[], None] = lambda: None
    _options: Any = None
    _prepared_for: Any = None
    _loops: list[Record] = field(default_factory=list)
    _records: list[Record] = field(default_factory=list)

    def gradients(self, options: Any) -> tuple[Any, dict[str | int, Tensor], list[Record]]:
        """Output, gradients by parameter name and argument position, and what the passes found.

        ``options`` None runs the joint graph as it was captured.
        """
        self._options, self._records = options, []
        for joint in self.joints:
            joint.runs.clear()
        if options is not None and self._prepared_for not in (None, _preparation(options, self._loops)):
            self.recompile()  # loops and recurrent modules are decided before the joint graph is traced
        output = self.compiled(*self.args)
        found = torch.autograd.grad(self.loss(output), list(self.leaves.values()), allow_unused=True)
        gradients = {
            key: torch.zeros_like(leaf) if gradient is None else gradient
            for (key, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }
        return output, gradients, [*self._loops, *self._records]

    def backward(self, joint: JointGraph, saved: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        run = joint.run_of(saved)
        module, records = joint.rewritten(self._options)
        self._records.extend(records)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(run.rng_state)  # the forward runs again with the same dropout masks
            # Without io processing: use the flat inputs and outputs of the graph itself.
            outputs = fx.Interpreter(module).run(*run.primals, *tangents, enable_io_processing=False)
        return list(outputs)[joint.forward_outputs :]


def _wanted(parameters: dict[str, Tensor]) -> dict[str | int, Tensor]:
    return {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}


def _called(model: nn.Module, parameters: dict[str, Tensor], *args: Any) -> Any:
    return torch.func.functional_call(model, parameters, args)


def _preparation(options: Any, loops: Sequence[Record]) -> Any:
    """The part of ``options`` that determines how a joint graph with these loops or recurrent modules is traced."""
    return options if loops else (options.rewrite, options.iterations == "exact")


def leaves_of(model: nn.Module, args: tuple[Any, ...]) -> dict[str | int, Tensor]:
    """Everything that requires a gradient, keyed as the oracle keys it."""
    leaves: dict[str | int, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    leaves.update((i, a) for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad)
    return leaves


def capture(
    model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor], dynamic: bool | None = None,
    functional: bool = False,
) -> Capture:  # fmt: skip
    """Trace ``model(*args)`` and keep its joint graph (all of them, if the graph breaks). ``dynamic`` has the same
    meaning as in ``torch.compile``. If ``functional``, parameters are plain tensors that the compiled function takes as
    arguments. Then their sizes can be dynamic too.
    """
    # Not the parameters themselves: Dynamo never makes their sizes dynamic.
    parameters = (
        {n: p.detach().requires_grad_(p.requires_grad) for n, p in model.named_parameters()} if functional else {}
    )
    result = Capture(lambda *a: None, {**leaves_of(model, args), **_wanted(parameters)}, args, loss, [])

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        here: list[JointGraph] = []
        asked = result._options or options()
        loops = prepare(graph, asked).records
        if loops or graph.graph.find_nodes(op="call_function", target=recurrent_module):
            result._prepared_for = _preparation(asked, loops)

        def partition_fn(joint: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int, **kwargs: Any) -> Any:
            here.append(JointGraph(copied(joint), num_fwd_outputs))
            result.joints.append(here[0])
            return default_partition(joint, joint_inputs, num_fwd_outputs=num_fwd_outputs, **kwargs)

        def forward_compiler(module: fx.GraphModule, example_inputs: Any) -> Any:
            def run(*primals: Any) -> Any:
                this = Run.of(primals)
                with torch.no_grad():
                    outputs = module(*primals)
                if here:  # otherwise nothing requires a gradient
                    this.saved = list(outputs[here[0].forward_outputs :])
                    here[0].runs.append(this)
                return outputs

            return make_boxed_func(run)

        def backward_compiler(module: fx.GraphModule, example_inputs: Any) -> Any:
            tangents = len([n for n in module.graph.find_nodes(op="placeholder") if "tangents" in n.name])
            return make_boxed_func(lambda *args: result.backward(here[0], args[:-tangents], args[-tangents:]))

        compiled = aot_autograd(
            fw_compiler=forward_compiler,
            bw_compiler=backward_compiler,
            partition_fn=partition_fn,
            decompositions=decompositions(),
        )(graph, inputs)
        result._loops += loops  # only after compiling: Dynamo may start over and come here again
        return compiled

    def recompile() -> None:
        torch._dynamo.reset()
        result.joints.clear()
        result._loops.clear()
        result._prepared_for = None
        if functional:
            compiled = torch.compile(functools.partial(_called, model), backend=_for_us(backend), dynamic=dynamic)
            result.compiled = functools.partial(compiled, parameters)
        else:
            result.compiled = torch.compile(model, backend=_for_us(backend), dynamic=dynamic)

    result.recompile = recompile
    recompile()
    return result


@dataclass
class Trace:
    """A joint graph traced directly; see :func:`trace`."""

    joint: JointGraph
    primals: list[Tensor]
    tangents: list[Tensor]
    leaves: dict[str | int, Tensor]
    output_spec: pytree.TreeSpec

    def gradients(
        self, options: Any, run: Callable[[fx.GraphModule, fx.Graph, list[Any]], Any] | None = None
    ) -> tuple[Any, dict[str | int, Tensor], list[Record]]:
        """Like :meth:`Capture.gradients`. ``run(root, graph, inputs)`` gives the rewritten graph's results; by default,
        operators are called one by one.
        """
        root, graph = self.joint.module, fx.Graph()
        graph.output(graph.graph_copy(root.graph, {}))
        records = run_passes(graph, options) if options is not None else []
        with torch.no_grad():
            results = (run or _interpreted)(root, graph, [*self.primals, *self.tangents])
        outputs, found = results[: self.joint.forward_outputs], results[self.joint.forward_outputs :]
        gradients = {
            key: torch.zeros_like(leaf) if gradient is None else gradient
            for (key, leaf), gradient in zip(self.leaves.items(), found, strict=True)
        }
        return pytree.tree_unflatten(outputs, self.output_spec), gradients, records


def _interpreted(root: fx.GraphModule, graph: fx.Graph, inputs: list[Any]) -> Any:
    # Neither copied nor printed as code: that would take longer than the passes.
    return fx.Interpreter(root, graph=graph).run(*inputs, enable_io_processing=False)


def trace(model: nn.Module, args: tuple[Any, ...], loss: Callable[[Any], Tensor]) -> Trace:
    """The joint graph of ``model(*args)`` at the gradient of ``loss``, without Dynamo and AOTAutograd."""
    leaves = leaves_of(model, args)
    flat, output_spec = pytree.tree_flatten(model(*args))
    wanted = [i for i, value in enumerate(flat) if isinstance(value, Tensor) and value.requires_grad]
    ends = [value.detach().requires_grad_(i in wanted) for i, value in enumerate(flat)]
    found = torch.autograd.grad(
        loss(pytree.tree_unflatten(ends, output_spec)), [ends[i] for i in wanted], allow_unused=True
    )
    tangents = [torch.zeros_like(ends[i]) if g is None else g for i, g in zip(wanted, found, strict=True)]

    # Everything the model reads is an input of the graph, as under Dynamo.
    constants: dict[str | int, Tensor] = dict(model.named_buffers())
    constants.update((n, p) for n, p in model.named_parameters() if n not in leaves)
    constants.update((i, a) for i, a in enumerate(args) if isinstance(a, Tensor) and i not in leaves)

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> tuple[Any, ...]:
        values = dict(zip((*leaves, *constants), primals, strict=True))
        inputs = [values.pop(i, arg) for i, arg in enumerate(args)]
        outputs = pytree.tree_leaves(torch.func.functional_call(model, values, tuple(inputs)))
        gradients = torch.autograd.grad(
            [outputs[i] for i in wanted], primals[: len(leaves)], tangents, allow_unused=True
        )
        return (*outputs, *gradients)

    primals = [leaf.detach().clone().requires_grad_() for leaf in leaves.values()]
    primals += [constant.detach() for constant in constants.values()]
    module = _recorded(joint, primals, tangents)
    _functionalise(module.graph)
    primals = [primal.detach() for primal in primals]
    return Trace(JointGraph(module, len(flat)), primals, tangents, leaves, output_spec)


def _recorded(joint: Callable[..., tuple[Any, ...]], primals: list[Tensor], tangents: list[Tensor]) -> fx.GraphModule:
    """The operators that ``joint`` calls, forward and backward, as a graph: several times faster than ``make_fx``."""
    recorder = _Recorder(decompositions())
    for position, primal in enumerate(primals, start=1):
        recorder.placeholder(f"primals_{position}", primal)
    for position, tangent in enumerate(tangents, start=1):
        recorder.placeholder(f"tangents_{position}", tangent)
    with recorder:
        results = joint(primals, tangents)
    recorder.graph.output(tuple(recorder.named(value) for value in results))
    module = fx.GraphModule(recorder.root, recorder.graph)
    module.graph.eliminate_dead_code()
    return module


class _Recorder(TorchDispatchMode):
    """Runs on real tensors and records every operator that no decomposition handles."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__()
        self.table, self.graph, self.root = table, fx.Graph(), nn.Module()
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Tensor] = []  # keeps tensors alive, so that ids stay unique
        self.described: dict[Any, Tensor] = {}

    def placeholder(self, name: str, value: Tensor) -> None:
        self._keep(value, self.graph.placeholder(name))

    def named(self, value: Any) -> Any:
        """``value`` as an argument of a node."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:  # made outside the graph: a constant
            name = f"_tensor_constant{len(self.alive)}"
            self.root.register_buffer(name, value.detach())
            self._keep(value, self.graph.get_attr(name))
        return self.nodes[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if func in self.table:
                found = self.table[func](*args, **kwargs)
                if found is not NotImplemented:
                    return found
            found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        found = func(*args, **kwargs)
        node = self.graph.call_function(func, map_aggregate(tuple(args), self.named), map_aggregate(kwargs, self.named))
        if isinstance(found, (list, tuple)):
            node.meta["val"] = type(found)(self._fake(value) for value in found)
            for i, value in enumerate(found):
                if isinstance(value, Tensor):
                    self._keep(value, self.graph.call_function(operator.getitem, (node, i)))
        elif isinstance(found, Tensor):
            self._keep(found, node)
        return found

    def _keep(self, value: Tensor, node: fx.Node) -> None:
        node.meta["val"] = self._fake(value)
        self.nodes[id(value)] = node
        self.alive.append(value)

    def _fake(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (tuple(value.shape), value.stride(), value.dtype)
        if key not in self.described:
            with without_modes(), _fakes():
                self.described[key] = torch.empty_strided(key[0], key[1], dtype=key[2], device=value.device)
        return self.described[key]


@functools.cache
def _fakes() -> FakeTensorMode:
    return FakeTensorMode()


def _functionalise(graph: fx.Graph) -> None:
    """Some decompositions end in ``x.add_(eps)`` on a fresh tensor; AOTAutograd would have turned that into ``add``."""
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if node.op == "call_function" and name.split(".")[0].endswith("_"):
            if list(node.args[0].users) != [node]:
                raise NotImplementedError(
                    f"trace supports no in-place changes, but {node.target} changes {node.args[0]}, which is used "
                    "elsewhere; use capture, which functionalises as AOTAutograd does"
                )
            packet, overload = name.split(".")
            node.target = getattr(getattr(torch.ops.aten, packet.removesuffix("_")), overload)
    graph.eliminate_dead_code()
