"""The highway through a pipeline stage: P_s, found by the compiler's own passes in the stage's joint graph.

A stage is a segment (docs/distributed.md). Besides a segment's backward pass, the recurrence needs one diagonal: P_s,
the product of K over its links. It is the sum over all elementwise paths from the gradient at the stage's output to
that at its input. Paths through a product of links are products of paths through links, so analysing the whole stage at
once gives the same result as analysing every link. Only damping needs the number of links: each counts (1 - gamma).

If P_s is 1 (pre-LN), nothing is computed. If it is a tensor (masks, weight/sigma), it is computed from parameters and
inputs by the part of the forward graph that leads to it, with the random state from which the forward pass started.
That part also gives the stage's output again, which is compared with the original output. So a stage that is not a
function of what the graph knows (a Python counter, stored data) raises an error instead of using the wrong K. If P_s is
another number, the graph holds its value from the time of tracing, and the output is computed again only for this
comparison.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from hwbp_compiler import torch_private
from hwbp_compiler.engine.emitter import Emitter
from hwbp_compiler.engine.evaluate import Coefficient, Evaluator
from hwbp_compiler.engine.stacking import Stacker, StackPlan
from hwbp_compiler.errors import HighwayError, first_line
from hwbp_compiler.graph.chain import Chain, Group
from hwbp_compiler.graph.describe import multiplier
from hwbp_compiler.graph.info import GraphInfo
from hwbp_compiler.graph.old_values import keep_old_values
from hwbp_compiler.graph.program import Program, extract
from hwbp_compiler.options import Options
from hwbp_compiler.passes.candidates import best_tracks
from hwbp_compiler.passes.in_other_words import in_other_words
from hwbp_compiler.passes.sizes_of_gradients import read_sizes_elsewhere
from hwbp_compiler.passes.split_links import split_links
from hwbp_compiler.reasons import Declined, Reason, Why
from hwbp_compiler.report.restore import left_as_it_was

aten = torch.ops.aten


class StageChanged(HighwayError):
    """Computing a stage's forward pass again from the same inputs gave a different output."""


@dataclass(frozen=True)
class StageHighway:
    """P_s of a stage, or why it has none.

    links   residual links in the stage; each counts (1 - gamma) under damping
    number  P_s if it is the same number everywhere, without damping
    graph   (what ``reads`` names) -> (P_s, the stage's output), with P_s broadcastable to the output; if P_s is a
            number other than 1, (the stage's output); if it is 1, None
    reads   per input of ``graph``: ("parameter" or "buffer", its name) or ("argument", its flat position)
    random  whether ``graph`` draws random numbers
    text    P_s in readable form: ``1``, ``mask``, ``weight/sigma``
    why     set if there is no highway: the stage stays exact, and others wait for it
    """

    links: int = 0
    number: float | None = None
    graph: fx.GraphModule | None = None
    reads: tuple[tuple[str, Any], ...] = ()
    random: bool = False
    text: str = "0"
    why: Why | None = None

    @property
    def exists(self) -> bool:
        return self.why is None

    def product(
        self, module: nn.Module, arguments: Sequence[Any], output: Tensor, random_state: RandomState
    ) -> Tensor | None:
        """P_s of one micro-batch, expanded to the output's shape; None if it is a number. ``output`` is the stage's
        output for ``arguments``.

        Raises :class:`StageChanged` if the graph gives another output.
        """
        assert self.graph is not None
        values = _read(self.reads, unwrapped(module), arguments)
        # Autocast's casts are already in the graph.
        casts = torch_private.without_autocast()
        with torch.no_grad(), casts, random_state.again() if self.random else contextlib.nullcontext():
            *product, recomputed = self.graph(*values)
        _same_output(output.detach(), recomputed)
        return product[0].expand_as(output).contiguous() if product else None


def _read(reads: Sequence[tuple[str, Any]], module: nn.Module, arguments: Sequence[Any]) -> list[Any]:
    held = {
        "parameter": dict(module.named_parameters(remove_duplicate=False)),
        "buffer": dict(module.named_buffers(remove_duplicate=False)),
        "argument": dict(enumerate(arguments)),
    }
    values = [held[kind][name] for kind, name in reads]
    if any(isinstance(v, DTensor) for v in values):
        raise StageChanged("parameters that the highway depends on are sharded now, but were not when it was found.")
    return values


@dataclass(frozen=True)
class RandomState:
    """The state of the generators that a stage may draw from: the CPU's and its device's."""

    cpu: Tensor
    device: torch.device
    other: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomState:
        other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(torch.get_rng_state(), device, other)

    @contextlib.contextmanager
    def again(self) -> Any:
        devices = [] if self.other is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.other is not None:
                torch.get_device_module(self.device).set_rng_state(self.other, self.device)
            yield


def find_highway(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StageHighway:
    """Look for the highway through ``module(*args, **kwargs)``; the module is not changed.

    ``args`` are the activations that the stage received. Those that need a gradient have ``requires_grad`` set.
    """
    try:
        return _find(unwrapped(module), args, dict(kwargs), any(_is_compiled(m) for m in module.modules()))
    except Declined as declined:
        return StageHighway(why=declined.why)


def _find(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> StageHighway:
    flat = pytree.tree_leaves((args, kwargs))
    activations = len(pytree.tree_leaves(args))
    taken = [i for i, a in enumerate(flat[:activations]) if isinstance(a, Tensor) and a.requires_grad]
    if not taken:
        raise Declined(Reason.STAGE_GIVES_NO_GRADIENT)
    with contextlib.ExitStack() as stack:
        joint = _trace(stack, module, args, kwargs)
        ends = _ends(joint.graph, taken)
        sharded = any(isinstance(p, DTensor) for p in module.parameters())
        return _in_joint_graph(compiled, sharded, joint, *ends)


def _trace(stack: contextlib.ExitStack, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The joint graph, with the operators that eager mode uses to draw random numbers."""
    module = _copy(module)
    stack.enter_context(left_as_it_was(module))
    stack.enter_context(torch.compiler.set_stance("force_eager"))
    with torch_private.inductor_config.patch(fallback_random=True):
        table = torch_private.select_decomp_table()
    try:
        return torch_private.aot_export_joint_with_descriptors(
            stack, module, args, kwargs, decompositions=table
        ).graph_module
    except Exception as error:
        raise Declined(Reason.STAGE_UNTRACEABLE.of(error=first_line(error))) from error


def _copy(module: nn.Module) -> nn.Module:
    """The same parameters in separate modules. Tracing must not count as a call of the user's module, and torch (seen
    in 2.13) leaves traced tensors in place of tied parameters.
    """
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        return _whole(module, {})
    try:
        return copy.deepcopy(module, {id(p): p for p in module.parameters()})
    except Exception as error:
        raise Declined(Reason.STAGE_UNTRACEABLE.of(error=f"it cannot be copied: {first_line(error)}")) from error


def _whole(module: nn.Module, seen: dict[int, Any]) -> nn.Module:
    """``module`` without FSDP2: parameters have their whole shapes but no contents, since only shapes are traced."""
    if id(module) in seen:
        return seen[id(module)]  # type: ignore[no-any-return]
    kind: Any = type(module)
    if isinstance(module, FSDPModule):  # its class derives from FSDPModule and the module's own class
        kind = next(c for c in kind.__mro__ if c is not type(module) and not issubclass(c, FSDPModule))
    made = seen[id(module)] = kind.__new__(kind)
    made.__dict__.update(module.__dict__)

    def whole(parameter: Any) -> Any:
        if not isinstance(parameter, DTensor):
            return parameter
        if id(parameter) not in seen:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            seen[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        return seen[id(parameter)]

    fields = vars(made)
    fields["_parameters"] = {n: whole(p) for n, p in module.named_parameters(recurse=False, remove_duplicate=False)}
    fields["_buffers"] = {n: b.clone() for n, b in module.named_buffers(recurse=False, remove_duplicate=False)}
    fields["_modules"] = {n: m and _whole(m, seen) for n, m in module._modules.items()}
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        fields[hooks] = type(fields[hooks])((k, h) for k, h in fields[hooks].items() if not _is_of_fsdp(h))
    return made


def _is_of_fsdp(hook: Any) -> bool:
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")


def _by_place(graph: Graph) -> tuple[dict[int, Node], dict[int, Node], dict[int, Node]]:
    """Gradients at the outputs, the outputs, and gradients at the inputs, each by position."""
    (end,) = graph.find_nodes(op="output")
    described = list(zip(end.args[0], end.meta["desc"], strict=True))
    tangents = {
        n.meta["desc"].output.idx: n
        for n in graph.find_nodes(op="placeholder")
        if isinstance(n.meta["desc"], torch_private.TangentAOTInput)
        and isinstance(n.meta["desc"].output, torch_private.PlainAOTOutput)
    }
    outputs = {d.idx: n for n, d in described if isinstance(d, torch_private.PlainAOTOutput)}
    gradients = {
        d.grad_of.idx: n
        for n, d in described
        if isinstance(d, torch_private.GradAOTOutput) and isinstance(d.grad_of, torch_private.PlainAOTInput)
    }
    return tangents, outputs, gradients


def _ends(graph: Graph, taken: list[int]) -> tuple[Node, Node, Node]:
    """The stage's output, the gradient there, and the gradient at the stage's input."""
    tangents, outputs, gradients = _by_place(graph)
    if len(taken) != 1 or len(tangents) != 1:
        raise Declined(Reason.STAGE_TAKES_MORE.of(taken=_tensors(len(taken)), given=_tensors(len(tangents))))
    ((place, tangent),) = tangents.items()
    output, gradient = outputs[place], gradients.get(taken[0])
    if gradient is None:
        raise Declined(Reason.NO_ELEMENTWISE_PATH)
    before, after = _form(gradient), _form(output)
    if before != after:
        raise Declined(Reason.STAGE_CHANGES_STATE.of(before=_said(before), after=_said(after)))
    if after[1].is_complex:
        raise Declined(Reason.COMPLEX.of(what="a complex state between stages"))
    return output, tangent, gradient


def _in_joint_graph(
    compiled: bool, sharded: bool, joint: fx.GraphModule, output: Node, tangent: Node, gradient: Node
) -> StageHighway:
    graph = joint.graph
    (end,) = graph.find_nodes(op="output")
    place = end.args[0].index(gradient)
    _reworded(graph)
    (end,) = graph.find_nodes(op="output")
    gradient = end.args[0][place]
    if gradient is tangent:  # the gradient is unchanged: the stage is the identity
        return StageHighway(number=1.0, text="1")
    info = GraphInfo(graph)
    link = extract(info, (tangent,), [gradient], set())
    split = split_links(Chain([(tangent,), (gradient,)], [link]))
    if (0, 0) not in split.support:
        raise Declined(Reason.NO_ELEMENTWISE_PATH)
    between = info.between({info.index[tangent]}, {info.index[gradient]})
    links = max(
        (sum(j in between for j in track.joins) for track in best_tracks(info, Options(min_length=1))), default=0
    )
    value = _coefficient(graph, end, link, 0, 0)
    found = StageHighway(links, text=_text(link))
    number = value if isinstance(value, float) else None
    if number == 1.0:
        return replace(found, number=number)
    reads, random = _cut_out(joint, [output] if isinstance(value, float) else [value, output], end)
    if sharded and any(kind == "parameter" for kind, _ in reads):
        raise Declined(Reason.STAGE_IS_SHARDED)
    if random and compiled:
        raise Declined(Reason.STAGE_DRAWS_UNSEEN)
    return replace(found, number=number, graph=fx.GraphModule(joint, graph), reads=reads, random=random)


def conditions(module: nn.Module) -> Any:
    """Everything of ``module`` that a trace of it depends on, for comparison with ``==``: its modules and their modes,
    hooks and plain attributes, and the forms of its parameters. Numbers kept elsewhere (a closure, a list) are not
    included.
    """
    modules = tuple(
        (weakref.ref(m), *m._forward_hooks, *m._forward_pre_hooks, *(i for i in vars(m).items() if _is_plain(i[1])))
        for m in unwrapped(module).modules()
    )
    return modules, tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in module.parameters())


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, complex, str)) or inspect.isroutine(value)


def _reworded(graph: Graph) -> None:
    """Normalise the graph as the passes do before they look for anything."""
    keep_old_values(graph)
    read_sizes_elsewhere(graph)
    in_other_words(graph, set())


def _coefficient(graph: Graph, end: Node, link: Program, to: int, source: int) -> Node | float:
    """K from ``source`` to ``to``: a number, or a node before ``end``."""
    group = Group([0], [link])
    emitter = Emitter(graph, end, link.inputs[0].meta["val"].fake_mode, 1)  # type: ignore[union-attr]
    stacker = Stacker(emitter, StackPlan(group.external_tuples))
    value = Evaluator(
        emitter,
        group,
        [None] * link.arity,
        stack=lambda slot: stacker(group.external(slot)),
        inject=lambda statement: None,
    ).value(Coefficient(source), link.outputs[to])
    if isinstance(value, float):
        return value
    return emitter.call(aten.select.int, value.node, 0, 0) if value.batched else value.node


def _cut_out(joint: fx.GraphModule, results: list[Node], end: Node) -> tuple[tuple[tuple[str, Any], ...], bool]:
    """Keep only the part of the graph that computes ``results``, with every draw of random numbers before them. Return
    what it reads, and whether it draws.
    """
    graph = joint.graph
    written = {d.mutated_input for d in end.meta["desc"] if isinstance(d, torch_private.InputMutationAOTOutput)}
    end.args = (tuple(results),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _draws(node))
    reads: list[tuple[str, Any]] = []
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)
            continue
        what = node.meta["desc"]
        if what in written:
            raise Declined(Reason.STAGE_OVERWRITES.of(buffer=getattr(what, "target", "an input")))
        if isinstance(what, torch_private.ParamAOTInput):
            reads.append(("parameter", what.target))
        elif isinstance(what, torch_private.BufferAOTInput):
            reads.append(("buffer", what.target))
        elif isinstance(what, torch_private.PlainAOTInput):
            reads.append(("argument", what.idx))
        else:
            raise Declined(Reason.STAGE_UNTRACEABLE.of(error=f"an input of kind {type(what).__name__}"))
    graph.set_codegen(fx.graph.CodeGen())  # plain inputs and outputs
    graph.lint()
    return tuple(reads), any(_draws(node) for node in graph.nodes)


@dataclass(frozen=True)
class CellHighway:
    """K of one step of a cell, per pair (to, from) of components of its state.

    numbers    K for pairs for which it is the same number everywhere
    graph      for the others: (what ``reads`` names) -> (K of ``pairs`` ..., the next state ...)
    why        set if there is no K: the recurrence is exact
    """

    numbers: dict[tuple[int, int], float] = field(default_factory=dict)
    pairs: tuple[tuple[int, int], ...] = ()
    order: tuple[int, ...] = (0,)
    graph: fx.GraphModule | None = None
    reads: tuple[tuple[str, Any], ...] = ()
    why: Why | None = None

    @property
    def support(self) -> frozenset[tuple[int, int]]:
        return frozenset({*self.numbers, *self.pairs})

    def of_step(
        self, module: nn.Module, arguments: Sequence[Any], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> dict[tuple[int, int], Tensor]:
        """K of the step from ``before`` to ``after``, each with the shape of its component."""
        found = {pair: torch.full_like(before[pair[0]], number) for pair, number in self.numbers.items()}
        if self.graph is not None:
            with torch.no_grad(), torch_private.without_autocast():
                results = self.graph(*_read(self.reads, module, arguments))
            for given, recomputed in zip(after, results[len(self.pairs) :], strict=True):
                _same_output(given.detach(), recomputed)
            found |= {p: k.expand_as(before[p[0]]) for p, k in zip(self.pairs, results, strict=False)}
        return found


def highway_of_cell(step: nn.Module, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> CellHighway:
    """K of ``step(*inputs, *state) -> (*next state, output)``; every component needs a gradient."""
    try:
        with contextlib.ExitStack() as stack:
            joint = _trace(stack, step, (*inputs, *state), {})
            return _of_cell(joint, len(inputs), len(state))
    except Declined as declined:
        return CellHighway(why=declined.why)


def _of_cell(joint: fx.GraphModule, first: int, width: int) -> CellHighway:
    graph = joint.graph
    tangents, outputs, gradients = _by_place(graph)
    if any(c not in tangents or gradients.get(first + c) is None for c in range(width)):
        raise Declined(Reason.COMPONENT_WITHOUT_GRADIENT)
    (end,) = graph.find_nodes(op="output")
    places = [end.args[0].index(gradients[first + c]) for c in range(width)]
    _reworded(graph)
    (end,) = graph.find_nodes(op="output")
    heads, arrived = tuple(tangents[c] for c in range(width)), [end.args[0][p] for p in places]
    if any(a in heads for a in arrived):
        raise Declined(Reason.COMPONENT_WITHOUT_GRADIENT)
    link = extract(GraphInfo(graph), heads, arrived, set())
    split = split_links(Chain([heads, tuple(arrived)], [link]))
    if not split.support:
        raise Declined(Reason.NO_ELEMENTWISE_PATH)
    numbers, nodes = {}, {}
    for to, source in sorted(split.support):
        value = _coefficient(graph, end, link, to, source)
        if isinstance(value, float):
            numbers[to, source] = value
        else:
            nodes[to, source] = value
    found = CellHighway(numbers, tuple(nodes), split.order)
    if not nodes:
        return found
    reads, random = _cut_out(joint, [*nodes.values(), *(outputs[c] for c in range(width))], end)
    if random:
        raise Declined(Reason.CELL_DRAWS_RANDOM_NUMBERS.of(operator="dropout, for one"))
    return replace(found, graph=fx.GraphModule(joint, graph), reads=reads)


def unwrapped(module: nn.Module) -> nn.Module:
    """The stage's own module, inside DistributedDataParallel or torch.compile."""
    while True:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _form(node: Node) -> tuple[tuple[int, ...], torch.dtype]:
    value = node.meta["val"]
    return tuple(value.shape), value.dtype


def _said(form: tuple[tuple[int, ...], torch.dtype]) -> str:
    return f"{str(form[1]).removeprefix('torch.')} {list(form[0])}"


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _text(link: Any) -> str:
    found = multiplier(link, 0, 0)
    return str(found.xreplace({s: s.func(s.name.partition("@")[0]) for s in found.free_symbols})).replace("**", "^")


# The allowed relative difference of the output computed again. Another order of summation is far below it, another
# dropout mask far above.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}


def _same_output(given: Tensor, recomputed: Tensor) -> None:
    scale = given.norm().item()
    if not math.isfinite(scale):
        return  # the user's own checks see values that are not finite
    off = (given - recomputed).norm().item()
    if not off <= _TOLERANCE.get(given.dtype, 1e-3) * max(scale, 1e-30):
        raise StageChanged(
            "the stage's output, computed again from the same inputs and random state, is "
            f"{off / max(scale, 1e-30):.2g} off (relative to its norm). Its highway P depends on that computation. The "
            "forward pass must depend only on parameters, buffers, inputs and PyTorch's own random numbers; counters "
            "and other Python state are not seen."
        )
