"""``explain``: what the compiler finds in a model and what it does about it, before anything is compiled."""

from __future__ import annotations

import contextlib
import copy
import html
import inspect
import os
import random
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from . import passes
from .backend import PassSequence
from .errors import HighwayError
from .graph.info import is_tangent
from .graph.record import ChainRecord, GroupRecord
from .options import Options, parse
from .torch_private import CustomGraphPass, user_joint_passes

_COLUMNS = 100


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Report:
    """Say what ``torch.compile(model, backend="highway", options=options)`` would do on these inputs.

    ``model(*args, **kwargs)`` is run once, in eager mode, and traced on the way as ``torch.compile`` traces it; no
    code is generated. The model is left as it was: parameters and their ``.grad``, buffers, inputs, and the states
    of the random number generators.

    Args:
        model: a module or function, compiled already or not. Options it was compiled with are not known here.
        options: those of ``torch.compile``, checked in the same way.
        loss: ``loss(output) -> scalar``; the sum of all floating outputs if absent. What ``torch.compile`` sees is
            the model, so no graph depends on the loss: it is evaluated once, and the report says so where no
            gradient can start from it.

    Raises:
        OptionError: a key or a value in ``options`` that is not allowed.
        ValueError: ``loss(output)`` is not one number.
        HighwayError: a pass failed and ``strict`` is set; otherwise the failure stands in the report.

    >>> report = explain(model, x, options={"iterations": 1})
    >>> print(report)
    """
    ours, patches = parse(options)
    looking = _Looking(ours)
    patches["joint_custom_pre_pass"] = PassSequence((*user_joint_passes(patches), looking))
    with _left_as_it_was(model) as keep:
        output = _traced(model, patches, keep)(*args, **kwargs)
        total = _sum_of_outputs(output) if loss is None else loss(output)
    notes = _notes(looking, total)
    return Report(ours, looking.graphs, notes)


# -- the report -------------------------------------------------------------------------------------------------


@dataclass
class ExplainedGraph:
    """One joint graph (forward and backward of one piece of the model).

    before, after   the graph as it was traced and as the passes leave it
    chains          what was found in it
    failure         the exception that ended the passes; the graph is then compiled as it is. None if there was none
    """

    before: fx.GraphModule
    after: fx.GraphModule
    chains: list[ChainRecord] = field(default_factory=list)
    failure: str | None = None


@dataclass
class Report:
    """What :func:`explain` found. ``print(report)`` for people, :meth:`to_dict` for programs.

    options   the highway's own options in force
    graphs    one entry per joint graph, in the order they were traced; several where Dynamo broke the graph
    notes     what is to be said about the model as a whole, such as why there is no graph
    """

    options: Options
    graphs: list[ExplainedGraph]
    notes: list[str] = field(default_factory=list)

    @property
    def chains(self) -> list[ChainRecord]:
        """All chains of all graphs, the declined ones too."""
        return [chain for graph in self.graphs for chain in graph.chains]

    @property
    def graph_before(self) -> fx.GraphModule | None:
        """The joint graph as traced: the first that has a chain, else the first; None if there is no joint graph."""
        graph = self._shown()
        return None if graph is None else graph.before

    @property
    def graph_after(self) -> fx.GraphModule | None:
        """The same graph as the passes leave it: what Inductor would compile."""
        graph = self._shown()
        return None if graph is None else graph.after

    def _shown(self) -> ExplainedGraph | None:
        return next((g for g in self.graphs if g.chains), self.graphs[0] if self.graphs else None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: ``options``, ``notes``, ``graphs``, and ``chains`` with the number of their
        graph. Estimated times are in seconds."""
        return {
            "options": asdict(self.options),
            "notes": list(self.notes),
            "graphs": [
                {
                    "nodes_before": len(graph.before.graph.nodes),
                    "nodes_after": len(graph.after.graph.nodes),
                    "chains": len(graph.chains),
                    "failure": graph.failure,
                }
                for graph in self.graphs
            ],
            "chains": [
                {"graph": number, **chain.to_dict()}
                for number, graph in enumerate(self.graphs)
                for chain in graph.chains
            ],
        }

    def __str__(self) -> str:
        return "\n".join(_text(self))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the text and all graphs, before and after, as one page that needs no network."""
        Path(path).write_text(_page(self), encoding="utf-8")


# -- tracing ----------------------------------------------------------------------------------------------------


class _Looking(CustomGraphPass):
    """Stands where the highway's pass stands, and rewrites copies of what it is shown."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.graphs: list[ExplainedGraph] = []
        self.inference_graphs = 0

    def __call__(self, graph: fx.Graph) -> None:
        if not any(is_tangent(node) for node in graph.nodes):
            self.inference_graphs += 1
            return
        found = ExplainedGraph(_copy(graph), _copy(graph))
        self.graphs.append(found)
        if self.options.rewrite == "never":
            return
        try:
            found.chains = passes.run(found.after.graph, self.options)
        except Exception as error:
            found.failure = f"{type(error).__name__}: {error}"
            if self.options.strict:
                raise HighwayError(
                    f"the highway rewrite failed and strict=True: {found.failure}",
                    inner_exception=error,
                    first_useful_frame=inspect.currentframe(),
                ).with_traceback(error.__traceback__) from error
        found.after.recompile()

    def uuid(self) -> None:
        """None keeps the graph out of torch.compile's caches: found there, it would not be shown to a pass."""
        return None


def _copy(graph: fx.Graph) -> fx.GraphModule:
    assert graph.owning_module is not None
    with warnings.catch_warnings():  # copying a graph warns of how torch itself copies the layout of its inputs
        warnings.simplefilter("ignore", FutureWarning)
        return fx.GraphModule(graph.owning_module, copy.deepcopy(graph), "JointGraph")


def _traced(model: Callable[..., Any], patches: dict[str, Any], keep: Callable[[Any], None]) -> Callable[..., Any]:
    """``model``, such that running it shows every graph to Inductor's passes and then runs the graph as it stands."""

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        # Private, checked on torch 2.13.0. Inductor owns the module it is given and may change it.
        from torch._inductor.compile_fx import compile_fx

        eager = fx.GraphModule(module, copy.deepcopy(module.graph))
        compile_fx(module, inputs, inner_compile=_no_code, config_patches=patches)

        def run(*values: Any) -> Any:
            keep(values)
            return eager(*values)

        return run

    isolated = {"isolate_recompiles": True}  # the user's own compilations of the same code are not touched
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        isolated = {}
    compiled: Callable[..., Any] = torch.compile(model, backend=backend, **isolated)  # type: ignore[call-overload]

    def run(*args: Any, **kwargs: Any) -> Any:
        # Shapes seen here must not make later compilations of the same code dynamic.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
            return compiled(*args, **kwargs)

    return run


def _no_code(module: fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Callable[..., Any]:
    return module.forward


def _sum_of_outputs(output: Any) -> Tensor | None:
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum((t.sum() for t in tensors[1:]), tensors[0].sum()) if tensors else None


def _notes(looking: _Looking, loss: Tensor | None) -> list[str]:
    if loss is not None and not (isinstance(loss, Tensor) and loss.numel() == 1):
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"explain: loss(output) is {what}; it must be one number")
    if not looking.graphs and not looking.inference_graphs:
        return [
            "torch.compile's front end, Dynamo, found no graph to compile: all of it runs in eager mode. "
            'TORCH_LOGS="graph_breaks" tells why.'
        ]
    if not looking.graphs:
        if not torch.is_grad_enabled():
            return ["Gradients are switched off (torch.no_grad), so there is no backward pass to rewrite."]
        return ["No parameter or input requires a gradient, so there is no backward pass to rewrite."]
    notes = []
    if looking.options.rewrite == "never":
        notes.append('rewrite="never" asks for plain Inductor: nothing was looked for.')
    pieces = len(looking.graphs) + looking.inference_graphs
    if pieces > 1:
        notes.append(
            f"The model was traced in {pieces} pieces: a chain ends where a graph does. "
            'TORCH_LOGS="graph_breaks" tells where and why.'
        )
    if loss is None:
        notes.append("The output has no floating tensor that the report could see: give loss=.")
    elif not loss.requires_grad:
        notes.append("The loss does not depend on anything that requires a gradient.")
    return notes


# -- leaving no trace -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _left_as_it_was(model: Any) -> Iterator[Callable[[Any], None]]:
    """Undo on leaving what running ``model`` does to buffers, to tensors given to the yielded function, and to
    random number generators."""
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    modules = list(module.modules()) if isinstance(module, nn.Module) else []
    buffers = [(m, dict(m._buffers)) for m in modules]
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(values: Any) -> None:
        for value in pytree.tree_leaves(values):
            # A parameter is changed by an optimizer, not by a forward pass, and may be large.
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and id(value) not in kept:
                kept[id(value)] = (value, value.detach().clone())

    keep([b for _, found in buffers for b in found.values() if b is not None])
    with contextlib.ExitStack() as stack:
        for kind in ("cuda", "xpu"):
            devices = list(range(getattr(torch, kind).device_count()))
            stack.enter_context(torch.random.fork_rng(devices, device_type=kind))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        # module.compile() replaces what a call does; the module's own code is to be traced.
        for m in modules[:1]:
            if m.__dict__.get("_compiled_call_impl") is not None:
                stack.callback(setattr, m, "_compiled_call_impl", m._compiled_call_impl)
                m._compiled_call_impl = None
        try:
            yield keep
        finally:
            with torch.no_grad():
                for tensor, value in kept.values():
                    if not torch.equal(tensor, value):  # BatchNorm changes its statistics without a new version
                        tensor.copy_(value)
            kept.clear()  # the compiled code, which Dynamo keeps, holds on to ``keep``
            for m, found in buffers:
                if any(m._buffers.get(name) is not b for name, b in found.items()) or len(m._buffers) != len(found):
                    m._buffers.clear()
                    m._buffers.update(found)


# -- text -------------------------------------------------------------------------------------------------------


def _text(report: Report) -> Iterator[str]:
    chains = report.chains
    rewritten = sum(chain.decision == "rewritten" for chain in chains)
    yield (
        f"{_count(len(chains), 'chain')} in {_count(len(report.graphs), 'joint graph')}: "
        f"{rewritten} rewritten, {len(chains) - rewritten} declined"
    )
    chosen = asdict(report.options)
    yield from _paragraph("options", ", ".join(f"{key}={value!r}" for key, value in chosen.items()))
    for note in report.notes:
        yield from _paragraph("note", note)
    number = 0
    for position, graph in enumerate(report.graphs):
        yield ""
        nodes = len(graph.before.graph.nodes), len(graph.after.graph.nodes)
        sizes = f"{nodes[0]} nodes" + (f", {nodes[1]} after" if nodes[1] != nodes[0] else ", left as it is")
        yield f"graph {position + 1} of {len(report.graphs)}: {sizes}"
        if graph.failure is not None:
            yield from _paragraph("failed", f"{graph.failure}. The graph is compiled as it is.", 2)
        elif not graph.chains and report.options.rewrite != "never":
            yield from _paragraph("no chain", _NO_CHAIN.format(report.options.min_length), 2)
        for chain in graph.chains:
            number += 1
            became = "left as it is: a pass failed" if chain.failed else chain.decision
            yield f"  chain {number}: {_count(chain.length, 'link')}, {became}"
            yield from _chain_text(chain)


_NO_CHAIN = (
    "nothing that carries a gradient past a block element by element (a residual addition, a gate) repeats "
    "min_length={} times or more. All gradients of this graph are exact."
)


def _chain_text(chain: ChainRecord) -> Iterator[str]:
    place, code = _place_and_code(chain.source)
    if place:
        yield from _paragraph("source", place, 4)
        yield from _paragraph("", code, 4)
    yield from _paragraph("multiplier", chain.multiplier, 4)
    for group in chain.groups:
        yield from _paragraph("group", _group_text(group), 4)
    yield from _paragraph("why", chain.reason, 4)
    if chain.estimate is not None and str(chain.estimate) not in chain.reason:
        yield from _paragraph("estimate", str(chain.estimate), 4)


def _group_text(group: GroupRecord) -> str:
    heavy = ", ".join(f"{times} {_short(name)}" for name, times in group.operators.items())
    links = f"{group.links} links at once, each" if group.links > 1 else "1 link"
    return f"{links}: {heavy or 'elementwise only'}"


def _short(operator: str) -> str:
    """``aten.mm.default`` -> ``mm``."""
    return re.sub(r"^aten\.|\.default$", "", operator)


def _place_and_code(source: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.*?):(\d+): (.*)", source, re.DOTALL)
    if match is None:
        return source, ""
    path = Path(match[1])
    roots = [root for root in map(Path, (os.getcwd(), *sys.path)) if path.is_relative_to(root) and root.is_absolute()]
    shortest = min((str(path.relative_to(root)) for root in roots), key=len, default=match[1])
    return f"{shortest}:{match[2]}", match[3]


def _paragraph(label: str, text: str, indent: int = 2) -> list[str]:
    """``label`` in a column of its own, ``text`` beside it, no line wider than the terminal."""
    head = " " * indent + label.ljust(11) + " "
    rest = " " * len(head)
    return textwrap.wrap(text, _COLUMNS, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# -- page -------------------------------------------------------------------------------------------------------

_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>hwbp_compiler: {title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }}
pre {{ font-size: .85rem; line-height: 1.4; overflow-x: auto; padding: .75rem; border: 1px solid #8886; }}
summary {{ cursor: pointer; padding: .25rem 0; }}
</style>
<h1>{title}</h1>
<pre>{text}</pre>
{graphs}
</html>
"""


def _page(report: Report) -> str:
    text = str(report)
    graphs = [
        f"<details><summary>graph {number}, {when}: {len(module.graph.nodes)} nodes</summary>"
        f"<pre>{html.escape(module.print_readable(print_output=False))}</pre></details>"
        for number, graph in enumerate(report.graphs, start=1)
        for when, module in (("before", graph.before), ("after", graph.after))
    ]
    title = html.escape(text.split("\n", 1)[0])
    return _PAGE.format(title=title, text=html.escape(text), graphs="\n".join(graphs))
