"""``explain``: report what the compiler finds in a model and what it would do, without compiling it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from hwbp_compiler import graph_breaks, passes
from hwbp_compiler.cost.ladder import Rung, ladder
from hwbp_compiler.errors import HighwayError
from hwbp_compiler.graph.info import is_tangent
from hwbp_compiler.graph.origin import names_of_inputs
from hwbp_compiler.graph.record import ChainRecord
from hwbp_compiler.graph.regions import regions_of
from hwbp_compiler.options import Options, parse
from hwbp_compiler.pass_sequence import PassSequence
from hwbp_compiler.passes.near_misses import is_piece_of, near_misses
from hwbp_compiler.prepare import prepare
from hwbp_compiler.reasons import Reason
from hwbp_compiler.recurrence import packed
from hwbp_compiler.rolled.recurrence import Recurrence
from hwbp_compiler.scan import register_lowerings
from hwbp_compiler.torch_private import CustomGraphPass, compile_fx, user_joint_passes

from . import measure as measuring
from .advice import put_to_the_test
from .data import ExplainedGraph, copy_of
from .programs import Programs, of_loop
from .report import Report
from .restore import compiled_apart, isolated, left_as_it_was

_MOST_BREAKS = 3  # lines that break the graph and are shown


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    measure: bool = False,
    errors: bool | Iterable[int | tuple[int, int]] = False,
    **kwargs: Any,
) -> Report:
    """Report what ``torch.compile(model, backend="highway", options=options)`` would do on these inputs.

    ``model(*args, **kwargs)`` is run once, in eager mode, and is traced as ``torch.compile`` traces it. No code is
    generated. The model is left as it was: parameters and their ``.grad``, buffers, inputs, and the states of the
    random number generators.

    Args:
        model: a module or function, compiled already or not. If it is compiled, its own options are not used.
        *args: the model's positional arguments.
        options: those of ``torch.compile``, checked in the same way.
        loss: ``loss(output) -> scalar``. The default is the sum of all floating outputs. The graphs do not depend on
            the loss, because ``torch.compile`` sees only the model. The loss is computed once. If it gives no
            gradient, the report says so.
        measure: also compile the model with ``backend="inductor"`` and with ``backend="highway"``, and time a training
            step of both (``report.measured``). This takes as long as two compilations.
        errors: also compare the parameter gradient of w^k with the exact one on these inputs
            (``report.graphs[i].errors``). Give values of k or pairs (k, S), or True for a few of them. Each takes one
            eager run of the joint graph.
        **kwargs: the model's keyword arguments.

    Returns:
        A report. ``print(report)`` shows it, and ``report.to_html(path)`` writes it as a page. ``report.chains`` has
        one record for each chain: its length in links, K as text, whether it is rewritten and why. Times are in
        seconds and sizes in bytes.

    Raises:
        OptionError: a key or a value in ``options`` is not allowed.
        LossError: ``loss(output)`` is not one number. A ``ValueError``.
        HighwayError: a pass failed and ``strict`` is set. Without ``strict`` the report shows the failure.

    >>> report = explain(model, x, options={"iterations": 1})
    >>> print(report)
    """
    ours, patches = parse(options)
    looking = _Looking(ours)
    inductor_options = dict(patches)
    users = user_joint_passes(patches)
    wanted = errors if isinstance(errors, bool) else tuple(errors)
    times = None
    with left_as_it_was(model) as keep, graph_breaks.listening() as looking.breaks:

        def traced(looking: _Looking, recorded: bool) -> Any:
            shown = {**patches, "joint_custom_pre_pass": PassSequence((*users, looking))}
            return _traced(model, shown, keep, looking, recorded)(*args, **kwargs)

        output = traced(looking, bool(wanted) and not ours.auto)
        rungs = ladder(chain for graph in looking.graphs for chain in graph.chains) if ours.auto else []
        if ours.auto and (rungs or wanted):
            looking.options = ours.at(rungs[0].how) if rungs else ours
            looking.forget()
            output = traced(looking, bool(wanted))
            _say_what_is_chosen_from(looking, rungs)
        total = _sum_of_outputs(output) if loss is None else loss(output)
        notes = _notes(looking, total)
        notes += [f"Declined: {packed.REASON.text} [{line}]." for line in _packed_at(looking.breaks)]
        can_run = isinstance(total, Tensor) and total.requires_grad
        if wanted and can_run:
            assert total is not None
            measuring.backward(total)
            _measure_errors(looking, wanted, _retracing(traced, looking.options.in_numbers()))
        if measure and can_run:
            register_lowerings()
            times = measuring.step_times(
                model, args, kwargs, options, inductor_options, loss or _sum_of_outputs, isolated()
            )
    return Report(ours, looking.graphs, notes, times, _name_of(model))


def _say_what_is_chosen_from(looking: _Looking, rungs: Sequence[Rung]) -> None:
    """Note that the chains are shown in the first of several forms."""
    forms = ", ".join([f"({rung.how})" for rung in rungs] + ["exact backprop"])
    for graph in looking.graphs:
        for chain in graph.chains:
            if chain.iterations is not None:
                chain.because(Reason.SHOWN_OF_AUTO.of(forms=forms, estimate=chain.estimate))
                chain.candidates = tuple((rung.how, None) for rung in rungs)


def _name_of(model: Any) -> str:
    inner = getattr(model, "_orig_mod", model)
    return type(inner).__name__ if isinstance(inner, nn.Module) else getattr(inner, "__qualname__", "model")


def _measure_errors(looking: _Looking, wanted: Any, retraced: Callable[[Options], list[fx.GraphModule]]) -> None:
    for number, (graph, run) in enumerate(zip(looking.graphs, looking.runs, strict=True)):
        longest = max((c.length for c in graph.chains if c.members), default=0)
        if run.primals and run.tangents and longest:

            def joint(how: Options, number: int = number, graph: ExplainedGraph = graph) -> fx.GraphModule:
                return retraced(how)[number] if graph.loops else graph.before

            graph.errors = measuring.errors(joint, run, looking.options.in_numbers(), wanted, longest)


def _retracing(traced: Callable[[_Looking, bool], Any], options: Options) -> Callable[[Options], list[fx.GraphModule]]:
    """Trace the joint graphs again with other options for the loops, which are rewritten before tracing."""

    @functools.cache
    def graphs(how: Options) -> list[fx.GraphModule]:
        again = _Looking(dataclasses.replace(options, rewrite="never", strict=False))
        again.of_loops = dataclasses.replace(how, rewrite="always", strict=False)
        traced(again, False)
        return [graph.before for graph in again.graphs]

    return graphs


# -- tracing ----------------------------------------------------------------------------------------------------


class LossError(ValueError):
    """The ``loss`` given to :func:`hwbp_compiler.explain` does not return one number. A ``ValueError``."""


class _Looking(CustomGraphPass):
    """Replaces the highway's pass and rewrites copies of the graphs that it gets."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.of_loops: Options | None = None  # options for all loops of hwbp_compiler.recurrent; None: each loop's own
        self.names: list[str] = []  # names of the inputs of the graph that is being compiled
        self.loops: list[tuple[Recurrence, dict[str, str]]] = []  # the loops in it, with the user's names
        self.unrolled: Sequence[ChainRecord] = ()  # its Python loops that stay unrolled
        self.breaks: list[graph_breaks.GraphBreak] = []
        self.forget()

    def forget(self) -> None:
        """Reset before tracing again."""
        self.graphs: list[ExplainedGraph] = []
        self.runs: list[measuring.Run] = []
        self.inference_graphs = 0
        self.pieces = 0  # graphs that Dynamo made of the model; one may contain further graphs, such as a scan's body
        self.lacking: list[str] = []  # parts missing from the report, and why
        self.breaks.clear()

    def __call__(self, graph: fx.Graph) -> None:
        if not any(is_tangent(node) for node in graph.nodes):
            self.inference_graphs += 1
            return
        found = ExplainedGraph(copy_of(graph), copy_of(graph))
        self.graphs.append(found)
        self.runs.append(measuring.Run())
        found.chains = [record for loop, _ in self.loops for record in loop.records] + [*self.unrolled]
        found.loops = len(found.chains)
        programs = Programs(_inputs_by_name(graph, self.names))
        for loop, names in self.loops:
            for record, plan in zip(loop.records, loop.recurring, strict=False):
                if record.members:
                    programs.blocks[id(record)] = of_loop(plan, record.length, found.before.graph, names)
        found.programs = [programs.blocks.get(id(chain), []) for chain in found.chains]
        if self.options.rewrite == "never":
            return
        try:
            found.chains += passes.run(found.after.graph, self.options, programs)
            programs.finish()
        except Exception as error:
            found.failure = f"{type(error).__name__}: {error}"
            if self.options.strict:
                raise HighwayError(
                    f"the highway rewrite failed and strict=True: {found.failure}",
                    inner_exception=error,
                    first_useful_frame=inspect.currentframe(),
                ).with_traceback(error.__traceback__) from error
        self._put_to_the_test(found)
        missed = self._near_misses(found)
        found.chains = [c for c in found.chains if not is_piece_of(c, missed)] + missed
        found.programs = [programs.blocks.get(id(chain), []) for chain in found.chains]
        found.rest = [programs.rest.get(id(chain), "") for chain in found.chains]
        found.after.recompile()

    def _near_misses(self, found: ExplainedGraph) -> list[ChainRecord]:
        """Only ``explain`` looks for near misses. An error here says nothing about what is compiled."""
        try:
            return near_misses(found.before.graph, found.chains)
        except Exception as error:
            self.lacking.append(f"The search for near misses failed: {type(error).__name__}: {error}.")
            return []

    def _put_to_the_test(self, found: ExplainedGraph) -> None:
        try:
            put_to_the_test(found.before, found.chains[found.loops :], self.options.in_numbers())
        except Exception as error:
            self.lacking.append(f"The advice below could not be tried out: {type(error).__name__}: {error}.")

    def uuid(self) -> None:
        """None, which keeps the graph out of torch.compile's caches: for a cached graph no pass would run."""
        return None


def _traced(
    model: Callable[..., Any], patches: dict[str, Any], keep: Callable[[Any], None], looking: _Looking, recorded: bool
) -> Callable[..., Any]:
    """``model`` in a form that passes every graph to Inductor's passes when it runs, and then runs the graph unchanged.

    With ``recorded`` it runs the forward and backward graphs instead and keeps their inputs in ``runs``.
    """

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        looking.pieces += 1
        prepared = prepare(module, looking.options, looking.of_loops)
        looking.loops = [(loop, _names_in_step(module, loop)) for loop in prepared.loops]
        looking.unrolled = prepared.unrolled
        eager = fx.GraphModule(module, copy.deepcopy(module.graph))
        looking.names = names_of_inputs(module.graph)
        inner = functools.partial(_recording, looking, len(looking.graphs)) if recorded else _no_code
        halves = compile_fx(module, inputs, patches, inner_compile=inner)  # Inductor owns the module and may change it

        def run(*values: Any) -> Any:
            keep(values)
            return halves(*values) if recorded else eager(*values)

        return run

    return compiled_apart(model, backend)


def _names_in_step(module: fx.GraphModule, loop: Recurrence) -> dict[str, str]:
    """Map names in a loop's step to the user's names, for everything that the step takes from outside."""
    if loop.step is None:
        return {}
    placeholders = module.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, names_of_inputs(module.graph), strict=True))
    return _names_in_region(module, given, loop) or {}


def _names_in_region(module: fx.GraphModule, given: dict[fx.Node, str], loop: Recurrence) -> dict[str, str] | None:
    """The same in a region of Dynamo's graph, whose inputs have the names ``given``; None if the loop is elsewhere."""
    for node in module.graph.nodes:
        if node.op == "call_module" and loop.step and module.get_submodule(str(node.target)) is loop:
            outside = node.args[len(loop.step.state) + len(loop.step.inputs) :]
            pairs = zip(loop.step.shared, outside, strict=True)
            return {inner.name: given[outer] for inner, outer in pairs if given.get(outer)}
        for region, operands in regions_of(module, node):
            names = {inner: given.get(outer, "") for inner, outer in operands}
            if (found := _names_in_region(region, names, loop)) is not None:
                return found
    return None


def _inputs_by_name(joint: fx.Graph, names: list[str]) -> dict[str, str]:
    """The joint graph's inputs are those of the Dynamo graph, in order, unless AOTAutograd has added some."""
    primals = [n.name for n in joint.find_nodes(op="placeholder") if not is_tangent(n)]
    return dict(zip(primals, names, strict=True)) if len(primals) == len(names) else {}


def _no_code(module: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
    return module.forward


def _recording(
    looking: _Looking, number: int, module: fx.GraphModule, example_inputs: Any, **kwargs: Any
) -> Callable[..., Any]:
    """Like ``_no_code``, but the halves of joint graph ``number`` also record their inputs."""
    is_backward = bool(kwargs.get("is_backward"))
    tangents = sum(is_tangent(node) for node in module.graph.nodes)

    def half(values: list[Any]) -> Any:
        given = list(values)
        values.clear()
        if number < len(looking.runs) and not kwargs.get("is_inference"):
            run = looking.runs[number]
            run.backward(given, tangents) if is_backward else run.forward(given)
        with torch.no_grad():
            return module(*given)

    half._boxed_call = True  # type: ignore[attr-defined]
    return half


def _sum_of_outputs(output: Any) -> Tensor | None:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum((t.sum() for t in tensors[1:]), tensors[0].sum()) if tensors else None


def _packed_at(breaks: Iterable[graph_breaks.GraphBreak]) -> list[str]:
    """The user's lines that give a recurrent module a packed sequence. The break has a reason of its own."""
    return list(dict.fromkeys(b.source for b in breaks if packed.is_at(b)))


def _broken(breaks: Sequence[graph_breaks.GraphBreak]) -> list[str]:
    """A note for each other line that breaks the graph; of many, for the first ones."""
    found: dict[str, str] = {}
    for b in breaks:
        found.setdefault(b.source, str(b))
    shown = [note for source, note in found.items() if source not in ("", *_packed_at(breaks))]
    more = len(shown) - _MOST_BREAKS
    return shown[:_MOST_BREAKS] + ([f"The graph breaks at {more} further lines."] if more > 0 else [])


def _notes(looking: _Looking, loss: Tensor | None) -> list[str]:
    if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise LossError(f"explain: loss(output) is {what}; it must be one number: reduce it, by .mean() or .sum()")
    if not looking.graphs and not looking.inference_graphs:
        return [
            "torch.compile's front end, Dynamo, found no graph to compile: the whole model runs in eager mode. "
            'TORCH_LOGS="graph_breaks" shows why; torch._dynamo.reset() makes Dynamo look again at code that it '
            "gave up before.",
            *_broken(looking.breaks),
        ]
    if not looking.graphs:
        if not torch.is_grad_enabled():
            return ["Gradients are switched off (torch.no_grad), so there is no backward pass to rewrite."]
        if loss is not None and loss.requires_grad:
            return [
                "Whatever needs a gradient runs in eager mode: torch.compile's front end, Dynamo, made graphs only of "
                'other parts of the model. TORCH_LOGS="graph_breaks" shows where and why.',
                *_broken(looking.breaks),
            ]
        return [
            "No parameter or input that the output depends on requires a gradient, or the output carries none (it is "
            "detached, or made of integers): there is no backward pass to rewrite."
        ]
    notes = list(looking.lacking)
    if looking.options.rewrite == "never":
        notes.append('rewrite="never" asks for plain Inductor: no chains were looked for.')
    if looking.pieces > 1:
        notes.append(
            f"The model was traced in {looking.pieces} pieces: a chain ends where a graph does. "
            'TORCH_LOGS="graph_breaks" shows where and why.'
        )
    notes += _broken(looking.breaks)
    if loss is None:
        notes.append("The report found no floating-point tensor in the output: pass loss=.")
    elif not loss.requires_grad:
        notes.append("The loss does not depend on anything that requires a gradient.")
    return notes
